"""Initial file systems: what is in them, and when they are built again."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmm_reference.cli.image import image
from vmm_reference.image.cpio import Entry, unpack
from vmm_reference.image.errors import ImageError, ModuleError, PackageError
from vmm_reference.image.initramfs import build_initramfs, busybox, guest_initramfs
from vmm_reference.image.kernels import Kernel, debian_kernel
from vmm_reference.image.packages import find_tool
from vmm_reference.image.testing import fake_busybox, make_kernel, make_module


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has a busybox."""
    monkeypatch.setenv("VMM_CACHE", str(tmp_path / "cache"))
    fake_busybox(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def kernel(tmp_path: Path, cache: Path) -> Kernel:
    """A kernel with three modules that build on each other."""
    return make_kernel(
        tmp_path / "kernel",
        {
            "virtio.ko": make_module(),
            "virtio_ring.ko": make_module(["virtio"]),
            "virtio_mmio.ko": make_module(["virtio_ring"], ["acpi*:LNRO0005:*"]),
            "extra.ko": make_module(),
        },
        builtin=["fs/ext4"],
    )


def contents(image: Path) -> dict[str, Entry]:
    return {entry.name: entry for entry in unpack(image.read_bytes())}


def test_guest_image_has_what_its_init_needs(kernel: Kernel) -> None:
    """A guest's image has init, busybox, the console's node, and the modules with their index."""
    found = contents(guest_initramfs(kernel))
    assert found["init"].mode == stat.S_IFREG | 0o755
    assert found["init"].data.startswith(b"#!/bin/busybox sh\n")
    assert found["bin/busybox"].mode == stat.S_IFREG | 0o755
    assert found["bin/sh"].data == b"busybox"
    assert (found["dev/console"].mode, found["dev/console"].rdev) == (stat.S_IFCHR | 0o600, (5, 1))
    for folder in ("proc", "sys", "tmp"):
        assert stat.S_ISDIR(found[folder].mode)
    base = f"/lib/modules/{kernel.version}/kernel/drivers"
    assert found["lib/modules/load"].data.decode().split() == [
        f"{base}/virtio.ko", f"{base}/virtio_ring.ko", f"{base}/virtio_mmio.ko",
    ]  # fmt: skip
    assert b"LNRO0005" in found[f"lib/modules/{kernel.version}/modules.alias"].data
    assert f"lib/modules/{kernel.version}/kernel/drivers/extra.ko" not in found


def test_own_init_modules_and_files(kernel: Kernel, tmp_path: Path) -> None:
    """A caller's init, modules and files, folders and links among them, are all there."""
    init = tmp_path / "start"
    init.write_text("#!/bin/busybox sh\n")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file").write_bytes(b"data")
    (folder / "sub/file").chmod(0o640)
    (folder / "link").symlink_to("sub/file")
    script = tmp_path / "alias"
    script.symlink_to(init)
    output = build_initramfs(
        tmp_path / "own.cpio",
        kernel,
        ["extra"],
        init=init,
        files={"/opt": folder, "etc/rc": b"#!/bin/sh\n", "etc/motd": b"hi", "linked": script},
    )
    assert output == tmp_path / "own.cpio"
    found = contents(output)
    assert found["init"].data == found["linked"].data == init.read_bytes()
    assert found["opt/sub/file"] == Entry("opt/sub/file", stat.S_IFREG | 0o640, b"data")
    assert found["opt/link"].data == b"sub/file"
    assert stat.S_ISLNK(found["opt/link"].mode)
    assert stat.S_IMODE(found["etc/rc"].mode) == 0o755
    assert stat.S_IMODE(found["etc/motd"].mode) == 0o644
    assert found["lib/modules/load"].data.count(b"\n") == 1


def test_same_request_same_bytes(kernel: Kernel, tmp_path: Path) -> None:
    """Building again, elsewhere or later, gives the same bytes."""
    first = guest_initramfs(kernel, files={"etc/motd": b"hi"})
    data = first.read_bytes()
    first.unlink()
    assert guest_initramfs(kernel, files={"etc/motd": b"hi"}).read_bytes() == data
    assert guest_initramfs(kernel, output=tmp_path / "x", files={"etc/motd": b"hi"}) == (
        tmp_path / "x"
    )
    assert (tmp_path / "x").read_bytes() == data


def test_rebuilt_when_inputs_change(kernel: Kernel, tmp_path: Path) -> None:
    """The image is reused untouched until a module, a file or the request changes."""
    added = tmp_path / "added"
    added.write_text("one")

    def build() -> Path:
        return guest_initramfs(kernel, files={"added": added})

    image = build()
    made = image.stat().st_mtime_ns
    assert build() == image
    assert image.stat().st_mtime_ns == made
    added.write_text("other")
    assert contents(build())["added"].data == b"other"
    assert kernel.modules is not None
    (kernel.modules / "kernel/drivers/virtio.ko").write_bytes(make_module([], ["new-alias"]))
    changed = contents(build())
    assert b"new-alias" in changed[f"lib/modules/{kernel.version}/modules.alias"].data
    assert guest_initramfs(kernel, modules=["extra"], files={"added": added}) != image


def test_kernel_without_modules(cache: Path, tmp_path: Path) -> None:
    """A kernel that has all built in gets an image without modules."""
    kernel = Kernel(tmp_path / "vmlinux", None, "6.9.0")
    found = contents(guest_initramfs(kernel))
    assert not any(name.startswith("lib/") for name in found)


def test_what_cannot_be_built(kernel: Kernel, tmp_path: Path, cache: Path) -> None:
    """An unknown module, an absent file, an odd file and an odd place are errors; no file stays."""
    output = tmp_path / "image"
    with pytest.raises(ModuleError, match="unheard_of"):
        guest_initramfs(kernel, output=output, modules=["unheard_of"])
    with pytest.raises(ImageError, match="absent"):
        guest_initramfs(kernel, output=output, files={"x": tmp_path / "absent"})
    with pytest.raises(ImageError, match="absent"):
        build_initramfs(output, kernel, init=tmp_path / "absent")
    with pytest.raises(ImageError, match="neither a file"):
        guest_initramfs(kernel, output=output, files={"x": Path("/dev/null")})
    with pytest.raises(ImageError, match="plain path"):
        guest_initramfs(kernel, output=output, files={"../x": b""})
    with pytest.raises(ImageError, match="occurs twice"):
        guest_initramfs(kernel, output=output, files={"init": b""})
    assert not output.exists()
    assert not (cache / "images").exists() or not list((cache / "images").iterdir())


def test_busybox_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package, a static busybox of the system serves, a dynamic one does not."""
    monkeypatch.setenv("VMM_CACHE", str(tmp_path))
    shell = find_tool("sh")
    own = find_tool("busybox")

    def lookup(path: str | None) -> None:
        tools = {"busybox": path}
        monkeypatch.setattr("vmm_reference.image.packages.find_tool", tools.get)
        monkeypatch.setattr("vmm_reference.image.initramfs.find_tool", tools.get)

    for unfit in (None, shell):
        lookup(unfit)
        with pytest.raises(PackageError, match="busybox-static"):
            busybox()
    if own is not None and b"/ld-linux" not in Path(own).read_bytes():
        lookup(own)
        assert busybox() == Path(own).resolve()


def test_command_builds_an_image(kernel: Kernel, tmp_path: Path) -> None:
    """The command prints the path of what it built, and refuses mistakes in one line."""
    run = CliRunner().invoke
    output = tmp_path / "image"
    (tmp_path / "motd").write_text("hi")
    arguments = ["initramfs", "--kernel", str(kernel.vmlinuz), "-o", str(output)]
    done = run(image, [*arguments, "--module", "extra", "--add", f"{tmp_path}/motd:/etc/motd"])
    assert (done.exit_code, done.output) == (0, f"{output}\n")
    assert contents(output)["etc/motd"].data == b"hi"
    assert b"extra.ko" in contents(output)["lib/modules/load"].data
    for wrong, words in (
        (["--add", "nowhere"], "SOURCE:/PLACE"),
        (["--add", "nowhere:/x"], "does not exist"),
        (["--flavour", "tiny"], "tiny"),
    ):
        failed = run(image, [*arguments, *wrong])
        assert failed.exit_code == 2
        assert words in failed.output
    failed = run(image, ["initramfs", "--modules", str(tmp_path)])
    assert failed.exit_code == 2
    assert "--kernel" in failed.output
    own = run(image, [*arguments, "--init", str(tmp_path / "motd")])
    assert own.exit_code == 0
    assert contents(output)["init"].data == b"hi"


@pytest.mark.timeout(300)
def test_real_kernel_checked_by_cpio(tmp_path: Path) -> None:
    """An image for Debian's cloud kernel is an archive to cpio, with the drivers of our devices."""
    program = find_tool("cpio")
    if program is None:
        pytest.skip("the program cpio is not installed")
    try:
        built = guest_initramfs(debian_kernel(), output=tmp_path / "image")
    except ImageError as error:
        pytest.skip(f"Debian's packages can't be had: {error}")
    listing = subprocess.run(
        [program, "-t", "--quiet"],
        input=built.read_bytes(),
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout.decode()
    names = listing.splitlines()
    assert names == [entry.name for entry in unpack(built.read_bytes())]
    modules = {name.rpartition("/")[2] for name in names if name.endswith(".ko")}
    wanted = {"virtio_mmio.ko", "virtio_blk.ko", "virtio-rng.ko", "pvpanic-mmio.ko"}
    assert wanted <= modules
