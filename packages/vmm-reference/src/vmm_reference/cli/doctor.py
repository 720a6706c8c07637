"""`vmm doctor`: what this host can do, and what to do about what is missing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
from attrs import frozen

from kvm_ioctls import Kvm, KvmError, constants
from vmm_reference.probe import probe

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Finding", "doctor", "examine"]

_NO_LINUX = 3

# What the VMM uses of KVM, and what is lost where the host's KVM does not have it.
_CAPABILITIES = {
    "KVM_CAP_IRQCHIP": "interrupt controllers in the kernel: required",
    "KVM_CAP_IRQFD": "interrupts raised by eventfd: required",
    "KVM_CAP_IOEVENTFD": "device kicks without an exit: required",
    "KVM_CAP_IMMEDIATE_EXIT": "vCPUs that can be stopped reliably: required",
    "KVM_CAP_TSC_DEADLINE_TIMER": "the guest's cheapest timer",
    "KVM_CAP_SYNC_MMU": "guest memory that follows the host's mappings",
}


@frozen
class Finding:
    """One line of the doctor's report.

    Attributes:
        topic: what was looked at.
        good: whether it is as a machine wants it.
        fact: what was found.
        cure: what to do about it; empty where there is nothing to do.
    """

    topic: str
    good: bool
    fact: str
    cure: str = ""


def examine() -> Iterator[Finding]:
    """Look at the host: KVM, its module and capabilities, huge pages, tun, vhost, memory."""
    yield from _kvm()
    yield from _hugepages()
    yield _device("/dev/net/tun", "tap networking", "modprobe tun")
    yield _device("/dev/vhost-net", "network queues served by the kernel", "modprobe vhost_net")
    yield _device("/dev/vhost-vsock", "vsock served by the kernel", "modprobe vhost_vsock")
    meminfo = _meminfo()
    available = meminfo.get("MemAvailable", 0) >> 10
    yield Finding("memory", available >= 512, f"{available} MiB available to guests")


def _kvm() -> Iterator[Finding]:
    path = Path("/dev/kvm")
    modules = sorted(p.name for p in Path("/sys/module").glob("kvm_*"))
    yield Finding(
        "KVM module",
        bool(modules),
        ", ".join(modules) or "none loaded",
        "" if modules else "modprobe kvm_intel or kvm_amd; enable virtualization in the firmware",
    )
    try:
        kvm = Kvm()
    except KvmError as error:
        fact = error.strerror or str(error)
        cure = getattr(error, "hint", "")
        if error.errno == errno.EACCES:
            fact += f" ({_owner(path)})"
        yield Finding("/dev/kvm", False, fact, cure)
        return
    with kvm:
        fact = f"API {kvm.get_api_version()}, {_owner(path)}"
        yield Finding("/dev/kvm", True, fact)
        for name, use in _CAPABILITIES.items():
            value = kvm.check_extension(getattr(constants, name))
            yield Finding(name, value > 0, use if value > 0 else f"absent: {use}")
        most = kvm.check_extension(constants.KVM_CAP_MAX_VCPUS)
        yield Finding("vCPUs", True, f"at most {most} in a machine")
        result = probe(kvm)
        if result.runs_linux:
            yield Finding("unmodified kernels", True, f"run ({', '.join(result.passed)} work)")
        else:
            yield Finding(
                "unmodified kernels",
                False,
                f"don't run: the probe guest's {result.failed} ended in {result.reason}",
                "use a host with VT-x or AMD-V, or the lab (`./dev boot` does)",
            )


def _owner(path: Path) -> str:
    info = path.stat()
    try:
        return f"{path.owner()}:{path.group()} mode {info.st_mode & 0o777:o}"
    except KeyError:
        return f"{info.st_uid}:{info.st_gid} mode {info.st_mode & 0o777:o}"


def _hugepages() -> Iterator[Finding]:
    for folder in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
        total = int((folder / "nr_hugepages").read_text())
        free = int((folder / "free_hugepages").read_text())
        yield Finding(
            f"hugepages of {size >> 10} MiB" if size >= 1024 else f"hugepages of {size} KiB",
            total > 0,
            f"{free} of {total} free",
            "" if total else f"echo N > {folder}/nr_hugepages",
        )


def _device(path: str, use: str, cure: str) -> Finding:
    if not Path(path).exists():
        return Finding(path, False, f"absent: {use}", f"as root: {cure}")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(path, False, f"not yours to open: {use}", f"check the owner of {path}")
    return Finding(path, True, use)


def _meminfo() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


@click.command()
@click.option("--probe", "only_probe", is_flag=True, help="Only whether an unmodified kernel runs.")
def doctor(only_probe: bool) -> int:
    """Say what this host can do, and what to do about what is missing.

    Exit status 0; with --probe 3 where this KVM can't run an unmodified kernel, 1 without a KVM.
    """
    if only_probe:
        with Kvm() as kvm:
            result = probe(kvm)
        if result.runs_linux:
            print("KVM here runs unmodified kernels")
            return 0
        print(f"KVM here can't run an unmodified kernel ({result.failed}: {result.reason})")
        return _NO_LINUX
    findings = list(examine())
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        mark = click.style("ok", fg="green") if finding.good else click.style("--", fg="yellow")
        click.echo(f"{mark}  {finding.topic:<{width}}  {finding.fact}")
        if finding.cure:
            click.echo(f"    {'':<{width}}  {finding.cure}")
    return 0
