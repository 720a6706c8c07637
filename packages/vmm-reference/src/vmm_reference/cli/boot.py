"""`vmm boot`: Debian's own kernel under this VMM, with everything it needs built on the way."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from linux_loader import E820Entry, plan
from linux_loader.cache import default_folder
from vmm_reference.backends.console import ConsoleTimeout
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.errors import VmmError
from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import FLAVOURS, debian_kernel, local_kernel
from vmm_reference.layout import e820_ranges
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

from .run import run_on_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm_reference.backends.console import Console

__all__ = ["CheckFailed", "boot", "check"]

_SCRATCH_SIZE = 16 << 20
# Without hardware the first boot after a change takes half a minute; nothing takes this long.
_PATIENCE = 300.0

# An init line such as `vmm-check: cpus=2`, or `vmm-check: disk=ok on=/dev/vda`.
_FACT = re.compile(r"^vmm-check: (\w+)=(\S*)")


class CheckFailed(VmmError):
    """The guest's self-check found something that is not as configured.

    Attributes:
        fact: which of its findings.
        found: what the guest says.
        expected: what the machine was configured with.
    """

    def __init__(self, fact: str, found: str, expected: str) -> None:
        super().__init__(fact, found, expected)
        self.fact = fact
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return f"self-check: {self.fact}: {self.found or '(nothing)'}, expected {self.expected}"


@click.command()
@click.option("--flavour", type=click.Choice([*FLAVOURS]), default="cloud", show_default=True)
@click.option("--kernel", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A kernel of your own, with its modules beside it.")  # fmt: skip
@click.option("--cpus", type=int, default=1, show_default=True)
@click.option("--memory", default="256M", show_default=True)
@click.option("--prepare", is_flag=True, help="Only fetch and build what a boot needs.")
def boot(flavour: str, kernel: Path | None, cpus: int, memory: str, prepare: bool) -> int:
    """Boot Debian's own kernel, or yours.

    On a terminal it ends in a shell of the guest; leave with Ctrl-A x. Otherwise the guest checks
    itself, the times of the stages are printed, and it powers off.
    """
    guest = local_kernel(kernel) if kernel is not None else debian_kernel(flavour)
    initrd = guest_initramfs(guest)
    interactive = os.isatty(0) and os.isatty(1)
    with tempfile.TemporaryDirectory(prefix="vmm-boot-") as folder:
        scratch = Path(folder, "scratch.img")
        with scratch.open("wb") as file:
            file.truncate(_SCRATCH_SIZE)
        config = MachineConfig(
            kernel=str(guest.vmlinuz),
            initrd=str(initrd),
            cpus=cpus,
            memory=memory,
            drives=[Drive(str(scratch))],
            cmdline="console=ttyS0 pci=off panic=-1 quiet "
            + ("" if interactive else "vmm.check vmm.scratch=/dev/vda"),
        )
        if prepare:
            _unpack(config)
            return 0
        if interactive:
            return run_on_terminal(Machine(config, console=(0, 1)))
        outcome = check(config)
    if outcome is not Outcome.POWER_OFF:
        print(f"vmm: the guest did not power off: {outcome.value}", file=sys.stderr)
    return outcome.status


def check(config: MachineConfig) -> Outcome:
    """Boot a guest whose init checks itself; print its lines as they come, then the stage times.

    Raises:
        CheckFailed: a finding differs from the configuration.
        ConsoleTimeout: the guest fell silent.
    """
    began = _process_start()
    stages: dict[str, float] = {}
    facts: dict[str, str] = {}
    with Machine(config) as machine:
        for line in _lines(machine.console):
            print(line, flush=True)
            if line.startswith("vmm-init: start"):
                stages["init's first line"] = time.monotonic()
            if match := _FACT.match(line):
                facts[match[1]] = match[2]
                stages["self-check done"] = time.monotonic()
        outcome = machine.wait(_PATIENCE)
        times = machine.timeline
    stages = {
        "kernel loaded": times["loaded"],
        "first KVM_RUN": times["first_run"],
        "first output": times.get("first_output", times["end"]),
        **stages,
        "end": times["end"],
    }
    for name, when in stages.items():
        print(f"{name:<18}{when - began:8.2f} s after the process started")
    if machine.detail:
        print(f"{outcome.value}: {machine.detail}")
    if outcome is Outcome.POWER_OFF:
        _compare(facts, config)
    return outcome


def _compare(facts: dict[str, str], config: MachineConfig) -> None:
    expected = {"cpus": str(config.cpus), "disk": "ok", "entropy": "ok", "result": "ok"}
    for fact, value in expected.items():
        if facts.get(fact) != value:
            raise CheckFailed(fact, facts.get(fact, ""), value)
    # The kernel keeps some for itself: its image, the map of all pages, what is reserved.
    mebibytes = int(facts.get("memory_kib", "0")) >> 10
    configured = config.memory >> 20
    if not configured * 0.9 - 64 <= mebibytes <= configured:
        raise CheckFailed("memory", f"{mebibytes} MiB", f"nearly {configured} MiB")


def _lines(console: Console) -> Iterator[str]:
    """The console's lines, each as soon as it is whole, until the machine ends."""
    while True:
        try:
            yield console.expect(r"([^\n]*)\n", _PATIENCE)[1].rstrip("\r")
        except ConsoleTimeout:
            if console.ended:
                return
            raise


def _unpack(config: MachineConfig) -> None:
    """Put the unpacked kernel into the cache, where a boot without a writable disk finds it."""
    usable = [
        E820Entry(start, size, 1 if ram else 2) for start, size, ram in e820_ranges(config.memory)
    ]
    assert config.kernel is not None
    plan(config.kernel, memory_map=usable, cache=default_folder())


def _process_start() -> float:
    """When this process was started, on the monotonic clock; it ticks a hundred times a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return (
        int(fields[19]) / os.sysconf("SC_CLK_TCK")
        + time.monotonic()
        - time.clock_gettime(time.CLOCK_BOOTTIME)
    )
