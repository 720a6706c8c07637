"""What the tests of the whole share: a machine that runs Linux guests, and images to run there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from vmm_reference.image.disk import build_disk
from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import Kernel, debian_kernel
from vmm_reference.image.packages import find_tool

sys.path.insert(0, str(Path(__file__).parent))

from lab.direct import Direct
from lab.host import runs_linux
from lab.lab import Lab
from programs import files_of

NEEDY = ("kvm", "linux")
# What the host's end of devices needs.
OUTER_MODULES = ("tun", "vhost_net", "vhost_vsock", "bridge", "veth")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI is set, a test that needs KVM must run: its skip is a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") and any(map(item.get_closest_marker, NEEDY)):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where it must run: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files a guest's machine may write for the test to see."""
    return tmp_path_factory.mktemp("share")


@pytest.fixture(scope="session")
def linux(share: Path) -> Iterator[Lab | Direct]:
    """Where commands find a KVM that runs unmodified kernels: this host, or one kept lab."""
    if runs_linux():
        yield Direct()
        return
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("this KVM runs no unmodified kernel, and qemu-system-x86_64 is not here")
    with Lab(memory="4G", modules=OUTER_MODULES, shares=[share]) as lab:
        yield lab


@pytest.fixture(scope="session")
def vmm() -> str:
    """The command `vmm` of the environment that the tests run in."""
    path = Path(sys.executable).with_name("vmm")
    assert path.exists(), f"{path} is not there; install vmm-reference into this environment"
    return str(path)


@pytest.fixture(scope="session")
def kernels() -> dict[str, Kernel]:
    """Debian's kernels by flavour, unpacked into the cache."""
    if find_tool("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not here to unpack Debian's kernels with")
    return {flavour: debian_kernel(flavour) for flavour in ("cloud", "generic")}


@pytest.fixture(scope="session")
def initrds(kernels: dict[str, Kernel]) -> dict[str, Path]:
    """An initial file system for each of the kernels."""
    return {flavour: guest_initramfs(kernel) for flavour, kernel in kernels.items()}


@pytest.fixture(scope="session")
def fio_disk(share: Path) -> Path:
    """A disk with fio and all its libraries."""
    return build_disk(share / "fio.img", size=192 << 20, files=files_of("fio"))


@pytest.fixture
def root_disk(share: Path, tmp_path: Path) -> Path:
    """A root disk of its own for a test, in the shared folder."""
    return build_disk(share / f"{tmp_path.name}.img", size=64 << 20)
