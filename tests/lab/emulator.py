"""The emulator's process: QEMU, pinned to one CPU, ended with the process that started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab import tsc
from lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket

    from lab.cpus import Cpu
    from lab.outer import Outer

__all__ = ["Emulator"]

PROGRAM = "qemu-system-x86_64"

# Without its algorithms' self-tests and the look-ups of interrupt routes in ACPI's tables (virtio
# takes message-signalled ones) the kernel is up three seconds sooner.
# Without fast byte strings, kernels clear pages by words, not bytes. The emulator looks through all
# translated blocks of a page at each store to it, so to clear 2 MiB where a guest's kernel was took
# half a second by bytes; now it takes an eighth of that, and every guest after the first boots in
# half the time.
CPU = "max,-erms"
# On a host that takes its CPU away, an emulated timer fails the kernel's test of it, which panics.
CMDLINE = "console=ttyS0 panic=-1 mitigations=off quiet cryptomgr.notests acpi=noirq no_timer_check"
# The kernel's own measurement of the counter, and its watchdog over it, go wrong on a busy host.
CLOCK = "tsc_early_khz={} tsc=reliable"

# Pins itself, asks for SIGKILL at its parent's death, and becomes QEMU. All of QEMU's threads
# inherit the pinning.
LAUNCHER = """
import ctypes, os, sys
parent, cpu, program, *arguments = sys.argv[1:]
os.sched_setaffinity(0, {int(cpu)})
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit("its parent died before it could start")
try:
    os.execvp(program, [program, *arguments])
except FileNotFoundError:
    sys.exit(f"{program} is not installed; on Debian it comes with qemu-system-x86")
"""


class Emulator:
    """One run of QEMU.

    Args:
        outer: what it boots.
        cpu: where it runs, and in whose folder it keeps its files.
        agent: the end of a socket pair that the agent will talk through.
        command: the shell words that start the agent.
        memory: as QEMU's `-m` takes it.
        append: more arguments for the kernel.
        shares: folders that jobs may write to.

    Attributes:
        folder: holds the console's log, QEMU's complaints, and the folder shared with the lab.
    """

    def __init__(
        self,
        outer: Outer,
        cpu: Cpu,
        agent: socket,
        *,
        command: str,
        memory: str,
        append: str,
        shares: Sequence[Path],
    ) -> None:
        self.folder = cpu.folder
        self.share = cpu.folder / "share"
        self.share.mkdir()
        (self.share / "agent").write_text(command)
        ticks = tsc.rate()
        clock = CLOCK.format(ticks) if ticks else ""
        arguments = [
            "-accel", "tcg,thread=multi,tb-size=1024",
            "-smp", "1", "-cpu", CPU, "-m", memory,
            "-display", "none", "-nodefaults", "-no-reboot", "-no-user-config",
            "-serial", f"file:{self.folder / 'console'}",
            "-kernel", str(outer.kernel),
            "-initrd", str(outer.initramfs),
            "-append", f"{CMDLINE} {clock} {append}",
            "-chardev", f"socket,id=agent,fd={agent.fileno()}",
            "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=agent,name=lab.agent",
        ]  # fmt: skip
        views = [("share", self.share, ""), ("agent", Path("/"), ",readonly=on")]
        views += [("job", Path("/"), ",readonly=on")]
        views += [(f"share{number}", path, "") for number, path in enumerate(shares)]
        for tag, path, option in views:
            where = str(path).replace(",", ",,")
            arguments += [
                "-virtfs",
                f"local,path={where},mount_tag={tag},security_model=none,multidevs=remap{option}",
            ]
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(cpu.number)]
        with (self.folder / "complaints").open("wb") as complaints:
            self.process = subprocess.Popen(
                [*launcher, PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                pass_fds=(agent.fileno(), cpu.lock),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self.process.pid

    def heartbeat(self) -> bytes:
        """What the lab's heart has written last; it changes every second."""
        try:
            return (self.share / "heartbeat").read_bytes()
        except FileNotFoundError:
            return b""

    def ended(self) -> int | None:
        """The exit status, None while it runs."""
        return self.process.poll()

    def log(self, lines: int = 20) -> str:
        """The last lines of the console and of QEMU's complaints."""
        text = ""
        for name in ("console", "complaints"):
            path = self.folder / name
            if path.exists():
                text += path.read_text(errors="replace").rstrip("\n") + "\n"
        return "\n".join(text.strip().splitlines()[-lines:])

    def end(self) -> None:
        """Kill it: nothing it holds is worth keeping, and a stopped one hears nothing else."""
        if self.process.poll() is None:
            self.process.kill()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                raise LabError(f"QEMU (process {self.pid}) does not end on SIGKILL") from None
