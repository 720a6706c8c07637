"""What every test of this package shares: marks, how hypothesis runs, and a time limit.

It holds when this folder is copied elsewhere, and without any plugin but hypothesis'.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from vmm_reference.config import MachineConfig
    from vmm_reference.state.testing import Remains

TIME_LIMIT = 60  # seconds a test may take, unless its mark `timeout` says otherwise

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("soak", max_examples=5000, deadline=None, print_blob=True)
settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

MARKS = (
    "kvm: needs a /dev/kvm that this user may open, of any kind",
    "linux: needs a KVM that runs an unmodified kernel: the host's own, or the lab",
    "soak: takes long; left out unless a mark expression names it",
    "timeout(seconds): how long the test may take",
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.option.markexpr:
        soaked = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaked)
        items[:] = [item for item in items if item not in soaked]
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIME_LIMIT))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a test that takes too long, where no plugin does it."""
    mark = item.get_closest_marker("timeout")
    if mark is None or item.config.pluginmanager.hasplugin("timeout"):
        yield
        return
    seconds = float(mark.args[0] if mark.args else mark.kwargs["timeout"])

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what can't run here, saying why; under CI that is a failure."""
    reason = ""
    if item.get_closest_marker("kvm") or item.get_closest_marker("linux"):
        reason = no_kvm()
    if not reason and item.get_closest_marker("linux"):
        reason = no_linux()
    if reason and os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    elif reason:
        pytest.skip(reason)


@functools.cache
def no_kvm() -> str:
    """Why /dev/kvm can't be used, or nothing."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return ""


@functools.cache
def no_linux() -> str:
    """Why no unmodified kernel runs here, or nothing: asks the probe guest of `vmm doctor`."""
    command = [str(Path(sys.executable).with_name("vmm")), "doctor", "--probe"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "the probe guest did not answer in 60 s"
    return "" if answer.returncode == 0 else answer.stdout.strip() or "the probe guest failed"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., MachineConfig]:
    """Makes the configuration of a machine with a guest of a few instructions: source, fields."""
    from vmm_reference.config import MachineConfig
    from vmm_reference.state.testing import COMPUTE
    from vmm_reference.testing import tiny_kernel

    def build(source: str = COMPUTE, **fields: Any) -> MachineConfig:
        path = tmp_path / "kernel"
        path.write_bytes(tiny_kernel(source))
        values = {"kernel": str(path), "memory": "32M", "on_reset": "exit"} | fields
        return MachineConfig(**values)

    return build


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Remains, bytes]:
    """What the guest `COMPUTE` leaves when nothing interrupts it."""
    from vmm_reference.state.testing import COMPUTE, PIECES, undisturbed

    return undisturbed(tmp_path_factory.mktemp("twin") / "kernel", COMPUTE, PIECES)
