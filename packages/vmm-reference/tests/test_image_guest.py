"""The guest's own programs, in a plain emulator: what they find, mount, write and say.

No KVM is needed, so these run anywhere; the devices are an emulator's, over PCI.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import time
from pathlib import Path

import pytest

from vmm_reference.image.disk import build_disk
from vmm_reference.image.errors import ImageError
from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import Kernel, debian_kernel
from vmm_reference.image.packages import find_tool

PATIENCE = 200  # seconds
PROMPT = b"# "
EMULATOR = find_tool("qemu-system-x86_64")

pytestmark = [
    pytest.mark.skipif(EMULATOR is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Debian's cloud kernel."""
    try:
        return debian_kernel()
    except ImageError as error:
        pytest.skip(f"Debian's kernel can't be had: {error}")


def boot(kernel: Kernel, words: str, *, drive: Path | None = None, typed: str = "") -> str:
    """All that a guest prints until it ends by itself; types at its first prompt."""
    # The kernel proves its timer by counting ticks against the processor's clock, which a busy host
    # makes it find broken; on KVM it does not.
    append = f"console=ttyS0 quiet mitigations=off panic=-1 no_timer_check {words}"
    command = [
        *(str(EMULATOR), "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "256"),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(guest_initramfs(kernel))),
        *("-append", append),
        *("-device", "virtio-rng-pci"),
    ]
    if drive is not None:
        command += ["-drive", f"file={drive},format=raw,if=virtio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as emulator:
        assert emulator.stdin is not None
        assert emulator.stdout is not None
        try:
            output = b""
            end = time.monotonic() + PATIENCE
            while select.select([emulator.stdout], [], [], max(0, end - time.monotonic()))[0]:
                if not (piece := os.read(emulator.stdout.fileno(), 4096)):
                    break
                output += piece
                if typed and PROMPT in output:
                    emulator.stdin.write(typed.encode())
                    emulator.stdin.flush()
                    typed = ""
            else:
                pytest.fail(f"the guest fell silent after:\n{output.decode(errors='replace')}")
        finally:
            emulator.kill()
    return output.decode(errors="replace").replace("\r\n", "\n")


def facts(output: str) -> dict[str, str]:
    """The values of the lines `vmm-check: NAME=VALUE`."""
    lines = (line.partition("vmm-check: ")[2] for line in output.splitlines())
    return {name: value for name, _, value in (line.partition("=") for line in lines if line)}


def test_check_on_the_root_disk(kernel: Kernel, tmp_path: Path) -> None:
    """The check counts what is there, and what it wrote to the root disk is found on the host."""
    disk = build_disk(tmp_path / "root.img")
    output = boot(kernel, "root=/dev/vda vmm.check vmm.exit=reboot", drive=disk)
    assert output.lstrip().startswith("vmm-init: start uptime=")
    found = facts(output)
    assert found["kernel"] == kernel.version
    assert found["cpus"] == "2"
    assert 200_000 < int(found["memory_kib"]) < 256 << 10
    assert found["disk"] == "ok on=/dev/vda file=/vmm-check.bin"
    assert found["entropy"] == "ok source=virtio_rng.0"
    assert found["result"] == "ok"
    assert "vmm-init: end action=reboot uptime=" in output
    check = subprocess.run(
        [find_tool("e2fsck") or "e2fsck", "-fn", disk], capture_output=True, check=False, timeout=20
    )
    assert check.returncode == 0
    written = subprocess.run(
        [find_tool("debugfs") or "debugfs", "-R", "cat /vmm-check.bin", disk],
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout
    assert hashlib.sha256(written).hexdigest() == found["disk_sha256"]


def test_check_on_a_scratch_disk(kernel: Kernel, tmp_path: Path) -> None:
    """A scratch disk is overwritten from its start with what the check says."""
    disk = tmp_path / "scratch.img"
    disk.write_bytes(bytes(1 << 20))
    output = boot(kernel, "vmm.check vmm.scratch=/dev/vda", drive=disk)
    found = facts(output)
    assert (found["disk"], found["result"]) == ("ok on=/dev/vda", "ok")
    data = disk.read_bytes()
    assert hashlib.sha256(data[: 1 << 18]).hexdigest() == found["disk_sha256"]
    assert not any(data[1 << 18 :])
    assert "reboot: Power down" in output


def test_shell_of_the_root_disk(kernel: Kernel, tmp_path: Path) -> None:
    """With a root disk its own init runs, gives a shell, and powers off after it."""
    disk = build_disk(tmp_path / "root.img")
    output = boot(kernel, "root=/dev/vda", drive=disk, typed="id; tty; echo $((6 * 7)) >/a; exit\n")
    assert "vmm-root: start uptime=" in output
    assert "uid=0(root)" in output
    assert "/dev/ttyS0" in output
    assert "can't access tty" not in output
    assert "reboot: Power down" in output
    shown = subprocess.run(
        [find_tool("debugfs") or "debugfs", "-R", "cat /a", disk],
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout
    assert shown == b"42\n"


def test_root_disk_that_is_not_there(kernel: Kernel) -> None:
    """A root disk that does not appear is said, and the check fails without hanging."""
    output = boot(kernel, "root=/dev/vdz vmm.check")
    assert "vmm-init: error: no disk /dev/vdz" in output
    assert facts(output)["result"] == "failed"
    assert "vmm-init: end action=poweroff" in output
