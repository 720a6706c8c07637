"""Boots: `vmm run`, QEMU's microvm and, where a binary is given, Firecracker, in one lab run.

All of them get the same vmlinux, initramfs, command line, serial console, memory and CPU count, and
no drive; the guest resets itself through the i8042 as soon as its init has told its clock. Each
round has all of them, with one and with two vCPUs, in an order of its own, as who was there before
can cost time.
On a machine whose own KVM runs unmodified kernels that KVM is used instead of the lab.

    nox -s bench -- boot --peer firecracker=/path/to/firecracker

The files lie on a tmpfs, so that no VMM waits for a disk, or for the lab's way to the host's: the
guest's, and those of each VMM too, be they shared libraries or a Python with its packages.
`native/boot_driver.c` starts each VMM and takes the stamps; it sees the first KVM_RUN from outside,
by one perf event on the kernel's tracepoint kvm:kvm_entry. Two stamps come from the guest: its own
clock at init's first line and at its reset. The option `hugepagesz=1`, which no kernel supports,
makes an otherwise quiet kernel write one line to its console as soon as it has one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs

from benchmarks._guests import followed
from benchmarks.harness import CACHE, Bench, Goal, Row, Skip

__all__ = ["rows"]

HERE = Path(__file__).parent
CPUS = (1, 2)
MEMORY = 256  # MiB
CMDLINE = "console=ttyS0 quiet mitigations=off reboot=k panic=-1 hugepagesz=1"
PATIENCE = 120
"""Seconds after which one boot has failed."""

STAGES = {
    "entry": "start to first KVM_RUN",
    "kernel": "start to kernel's first line",
    "init": "start to init's first line",
    "exit": "whole process",
    "clock_init": "guest's clock at init",
    "clock_off": "guest's clock at reset",
}
"""The stamps of one boot, in seconds, and what the rows call them."""

GOALS = {
    ("exit", "qemu", 1): Goal.peer(0.75),
    ("exit", "qemu", 2): Goal.peer(0.85),
    ("exit", "firecracker", 1): Goal.peer(1.3),
    ("clock_init", "firecracker", 1): Goal.peer(1.05),
    ("clock_init", "firecracker", 2): Goal.peer(1.05),
    ("entry", "qemu", 1): Goal.peer(0.5),
    ("entry", "qemu", 2): Goal.peer(0.5),
}

STAMP = re.compile(r"(-?\d+) (entry|line|exit|timeout|note) ?(.*)")
KERNEL_LINE = re.compile(r"\[ *\d+\.\d+\] ")
IMPORT = re.compile(r"import time: +(\d+) \| +(\d+) \| ( *)(\S+)")


@attrs.frozen
class Boot:
    """What the driver saw of one boot.

    Attributes:
        stamps: seconds, by the keys of `STAGES`; what was not seen is absent.
        lines: the VMM's output and the console's.
        status: the exit status.
        failure: what went wrong, or an empty string.
    """

    stamps: Mapping[str, float]
    lines: tuple[str, ...]
    status: int
    failure: str

    @classmethod
    def parse(cls, text: str) -> Boot:
        """Read what the driver printed."""
        stamps: dict[str, float] = {}
        lines: list[str] = []
        status, failure = -1, ""
        for found in map(STAMP.fullmatch, text.splitlines()):
            if found is None:
                continue
            seconds, word, rest = int(found[1]) / 1e9, found[2], found[3]
            if word == "line":
                lines.append(rest)
                if KERNEL_LINE.match(rest):
                    stamps.setdefault("kernel", seconds)
                elif rest.startswith("init "):
                    stamps.setdefault("init", seconds)
                    stamps.setdefault("clock_init", float(rest.split()[1]))
                elif rest.startswith("off "):
                    stamps.setdefault("clock_off", float(rest.split()[1]))
            elif word == "timeout":
                failure = f"it did not end within {PATIENCE} s"
            elif word == "exit":
                stamps["exit"] = seconds
                status = int(rest)
            elif word == "entry":
                stamps["entry"] = seconds
        if not failure and "clock_off" not in stamps:
            failure = f"it ended with status {status} before the guest's reset"
        return cls(stamps, tuple(lines), status, failure)


@attrs.frozen
class Vmm:
    """One VMM of the comparison.

    Attributes:
        name: as the rows call it.
        install: shell text that copies it into the folder on the tmpfs, which is the current one.
        command: shell text that starts it there; `$N` is the number of vCPUs.
    """

    name: str
    install: str
    command: str


def ours() -> Vmm:
    """`vmm run` of this very environment, with its interpreter and their libraries."""
    environment = Path(sys.prefix)
    if not (environment / "bin" / "vmm").exists():
        raise Skip(f"{environment} has no vmm; install the five packages into this environment")
    # Without the start-up hooks (*.pth) of tools that share this environment, such as coverage.
    words = {"env": environment, "library": Path(os.__file__).parent,
             "program": Path(sys.executable).resolve()}  # fmt: skip
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    install = """
mkdir -p python/bin python/lib
cp {program} python/bin/{version}
cp -a {library} python/lib/{version}
cp -a {env} env
rm -f env/lib/{version}/site-packages/*.pth
ln -sf $PWD/python/bin/{version} env/bin/python
sed -i "s#^home *=.*#home = $PWD/python/bin#" env/pyvenv.cfg
""".format(version=version, **{name: shlex.quote(str(path)) for name, path in words.items()})
    command = (
        "env/bin/python env/bin/vmm run --kernel vmlinux --initrd initrd --cpus $N "
        f"--memory {MEMORY}M --on-reset exit --cmdline {shlex.quote(CMDLINE)}"
    )
    return Vmm("ours", install, command)


def qemu(program: Path) -> Vmm:
    """QEMU's smallest machine, with the i8042 that the reset needs."""
    # Its loader is given to it by name, for the libraries beside it; its firmware is with -L.
    # Where that lies only the installed one knows: it looks from where it is.
    name = shlex.quote(str(program))
    install = f"""
mkdir -p qemu/share
cp {name} qemu/program
ldd qemu/program | sed -n 's/.* => \\(.*\\) (.*/\\1/p' | xargs -I% cp -L % qemu/
cp -L "$(ldd qemu/program | sed -n 's/^[[:space:]]*\\(\\/.*ld-linux[^ ]*\\) .*/\\1/p')" qemu/loader
{name} -L help | while read -r folder; do
    if [ -d "$folder" ]; then cp -rL "$folder/." qemu/share; fi
done
"""
    command = (
        "qemu/loader --library-path qemu qemu/program -L qemu/share "
        "-M microvm,accel=kvm,pit=on,pic=on,rtc=on,isa-serial=on "
        f"-cpu host -smp $N -m {MEMORY} -nodefaults -no-user-config -no-reboot -display none "
        "-serial stdio -device i8042 -kernel vmlinux -initrd initrd "
        f"-append {shlex.quote(CMDLINE)}"
    )
    return Vmm("qemu", install, command)


def firecracker(program: Path) -> Vmm:
    """Firecracker without its API server, its log and its filter of system calls."""
    command = "./firecracker --no-api --no-seccomp --level Off --config-file firecracker$N.json"
    return Vmm("firecracker", f"cp {shlex.quote(str(program))} firecracker", command)


def firecracker_config(cpus: int) -> str:
    """The configuration file that firecracker reads."""
    source = {"kernel_image_path": "vmlinux", "initrd_path": "initrd", "boot_args": CMDLINE}
    machine = {"vcpu_count": cpus, "mem_size_mib": MEMORY}
    return json.dumps({"boot-source": source, "machine-config": machine, "drives": []})


def job(vmms: Sequence[Vmm], files: Mapping[str, Path], rounds: int) -> str:
    """The script that makes all boots; before each it writes a line with `== NAME CPUS ROUND`."""
    lines = [
        "set -e",
        "folder=$(mktemp -d -p /dev/shm)",
        "trap 'rm -rf $folder' EXIT",
        "cd $folder",
        *(f"cp {shlex.quote(str(source))} {name}" for name, source in files.items()),
        *(vmm.install for vmm in vmms),
        *(f"echo {shlex.quote(firecracker_config(n))} >firecracker{n}.json" for n in CPUS),
    ]
    for vmm in vmms:
        head = f'echo "== {vmm.name} $N $round"; echo "round $round, {vmm.name}, $N vCPUs" >&2'
        run = f"{head}; ./driver {PATIENCE} {vmm.command}"
        lines.append(f"boot_{vmm.name}() {{ {run}; }}")
    boots = [f"N={n}; boot_{vmm.name}" for n in CPUS for vmm in vmms]
    shuffle = random.Random(0).shuffle  # the same orders in every run
    for turn in range(rounds + 1):
        shuffle(boots)
        lines += [f"round={turn}", *boots]
    imports = next(vmm for vmm in vmms if vmm.name == "ours")
    lines.append('N=1; echo "== imports 1 0"')
    lines.append(f"PYTHONPROFILEIMPORTTIME=1 ./driver {PATIENCE} {imports.command}")
    return "\n".join(lines)


def place(bench: Bench, modules: Sequence[str] = ()) -> tuple[str, object]:
    """Where to boot: a name to print, and an object whose `run` runs a command there.

    Args:
        bench: is told of a lab that had to be started again.
        modules: of the lab's kernel.
    """
    tests = str(HERE.parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from lab.direct import Direct
    from lab.host import runs_linux
    from lab.lab import Lab

    if runs_linux():
        return "this machine's own KVM", Direct()
    return "the lab", Lab(report=bench.note, modules=modules)


def kernel_files() -> dict[str, Path]:
    """The vmlinux of Debian's cloud kernel, and an initramfs of busybox and `guest/boot-init`."""
    from linux_loader import unpack_kernel
    from vmm_reference.image import build_initramfs, debian_kernel

    kernel = debian_kernel("cloud")
    vmlinux = CACHE / f"vmlinux-{kernel.version}"
    if not vmlinux.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = vmlinux.with_suffix(".new")
        fresh.write_bytes(unpack_kernel(kernel.vmlinuz))
        fresh.replace(vmlinux)
    return {
        "vmlinux": vmlinux,
        "initrd": build_initramfs(None, kernel, init=HERE / "guest" / "boot-init"),
    }


def environment() -> dict[str, str]:
    """The environment of the VMMs: nothing of the caller's that could slow a Python down."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/", "LANG": "C.UTF-8"}


def imports(boot: Boot, count: int = 12) -> str:
    """The modules whose own import cost most, of a boot with -X importtime."""
    found = [match for match in map(IMPORT.search, boot.lines) if match]
    costs = sorted(((int(match[1]), match[4]) for match in found), reverse=True)
    total = sum(cost for cost, _ in costs) / 1e6
    head = f"-X importtime of vmm run: {len(costs)} modules, {total:.2f} s; the dearest, itself:"
    return "\n".join([head, *(f"{cost / 1e6:8.3f} s  {name}" for cost, name in costs[:count])])


def rows(bench: Bench) -> Iterator[Row]:
    """Boot all, and compare ours with each peer, stage by stage."""
    vmms = [ours()]
    absent: dict[str, str] = {}
    for name, where, made in (
        ("qemu", "qemu-system-x86_64", qemu),
        ("firecracker", "firecracker", firecracker),
    ):
        try:
            vmms.append(made(bench.peer(name, where=where)))
        except Skip as skip:
            absent[name] = skip.reason
    driver = bench.compile(HERE / "native" / "boot_driver.c", "-static", name="boot_driver")
    script = job(vmms, kernel_files() | {"driver": driver}, bench.rounds)
    where, booter = place(bench)
    count = (bench.rounds + 1) * len(CPUS) * len(vmms)
    bench.note(f"{count} boots in {where}; one takes 3 to 15 s there")
    try:
        done = booter.converse(  # type: ignore[attr-defined]  # Lab and Direct share no base
            ["/bin/sh", "-c", script],
            partial(followed, bench.note, seconds=count * 30 + 60),
            env=environment(),
            cwd="/",
        )
    finally:
        if hasattr(booter, "stop"):
            booter.stop()
    yield from compared(bench, done.stdout, absent)
    if done.returncode:
        raise RuntimeError(f"the job ended with status {done.returncode}: {done.stderr[-500:]}")


def compared(bench: Bench, output: str, absent: Mapping[str, str]) -> Iterator[Row]:
    """The rows of what a job has printed.

    Raises:
        RuntimeError: a boot of ours failed.
    """
    runs: dict[tuple[str, int], list[Boot]] = {}
    skipped = dict(absent)
    for piece in re.split(r"^== ", output, flags=re.MULTILINE)[1:]:
        head, _, text = piece.partition("\n")
        name, cpus, turn = head.split()
        boot = Boot.parse(text)
        if boot.failure:
            last = "\n".join(boot.lines[-5:])
            if name in ("ours", "imports"):
                raise RuntimeError(f"boot of {head}: {boot.failure}; its last lines:\n{last}")
            skipped[name] = f"{boot.failure}: {' / '.join(boot.lines[-2:])}"
        elif name == "imports":
            bench.note(imports(boot))
        elif turn != "0":  # the first round is discarded
            runs.setdefault((name, int(cpus)), []).append(boot)
    for cpus in CPUS:
        for stage, words in STAGES.items():
            for peer in ("qemu", "firecracker"):
                yield Row.of(
                    f"{words}, {cpus} vCPU{'s' if cpus > 1 else ''}",
                    "s",
                    ours=values(runs.get(("ours", cpus), ()), stage),
                    peer=() if peer in skipped else values(runs.get((peer, cpus), ()), stage),
                    peer_name=peer,
                    goal=GOALS.get((stage, peer, cpus), ()),
                    skipped={"peer": skipped[peer]} if peer in skipped else {},
                )


def values(boots: Sequence[Boot], stage: str) -> list[float]:
    """A stage's stamps, or none at all where a boot lacks it."""
    found = [boot.stamps[stage] for boot in boots if stage in boot.stamps]
    return found if len(found) == len(boots) else []
