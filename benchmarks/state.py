"""Snapshots and restores: writing against raw writing, and how soon a guest runs again.

A snapshot is of a machine that stands still; the floor writes the same memory to a file of the
same file system, in blocks as long as ours and past the page cache as ours are. Both have it all
on the disk in the end.

A restore is measured from the call, in a process that has made one before, to the guest's first
exit, by one of its first instructions. The floor makes every ioctl that ours made, recorded from
ours, in bare C with the memory mapped, read, or supplied in the same way; it proves no digests.
Memory holds random bytes in the share that the row's name says; the file is in the page cache.
Clones and migrations (`_moves`) are parts of their own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import _moves
from benchmarks.guest.clones import private
from benchmarks.harness import CACHE, Bench, Goal, Row, Skip
from kvm_ioctls import Kvm, Vcpu, Vm
from kvm_ioctls._fd import Descriptor
from vm_memory import GuestAddress
from vmm_reference import Machine, MachineConfig
from vmm_reference.state.folder import SnapshotReader
from vmm_reference.state.memory import MemoryState
from vmm_reference.testing import tiny_kernel

HERE = Path(__file__).parent
MIB = 1 << 20
BLOCK = 8 * MIB
WAYS = ("copy-on-write", "on-demand", "eager")
# Size of the guest and how many MiB of it hold data.
GUESTS = ((128, 128), (1024, 1024), (8192, 1024))
_RECORD = struct.Struct("<IIQQII")
# Writes to a port that nobody has, for ever: each is an exit that the vCPU's thread sees.
EXITS = "movw $0x5678, %dx; 1: outb %al, %dx; jmp 1b"
PATIENCE = 20.0  # seconds, which a guest that runs at all never needs
# Answers each byte with a dot.
ANSWER = """
1:  movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz 1b
    movw $0x3f8, %dx
    inb %dx, %al
    PUT '.'
    jmp 1b
"""


def files(bench: Bench) -> Iterator[Row]:
    """Snapshots and restores; see the module's text."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise Skip("no /dev/kvm that this user may open")
    floor = bench.compile(HERE / "native" / "state_floor.c", "-pthread")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="state-") as name:
        folder = Path(name)
        for size, data in GUESTS:
            with machine_of(folder, size) as machine:
                machine.pause()
                fill(machine, size, data)
                if size == 1024:
                    yield bench.compare(
                        f"snapshot, {size} MiB of {data} data", "MB/s",
                        ours=partial(written, machine, folder),
                        floor=partial(raw, machine, folder, data),
                        goal=Goal.floor_rate(0.9),
                    )  # fmt: skip
                machine.snapshot(folder / "snapshot")
            for way in WAYS:
                script = folder / "script"
                script.write_bytes(recorded(folder / "snapshot", way))
                yield bench.compare(
                    f"restore {way}, {size} MiB of {data} data", "ms",
                    ours=partial(restored, folder / "snapshot", way),
                    floor=partial(bare, floor, script, folder / "snapshot", way),
                    goal=Goal.floor_plus(5) if way == "copy-on-write" else (),
                )  # fmt: skip
            shutil.rmtree(folder / "snapshot")


def clones(bench: Bench) -> Iterator[Row]:
    """Machines of one snapshot: from a template, and each as a process of its own."""
    fan_out, forked, fresh = [], [], []
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="clones-") as name:
        kernel, snapshot = Path(name, "kernel"), Path(name, "snapshot")
        kernel.write_bytes(tiny_kernel(ANSWER))
        with Machine(MachineConfig(kernel=str(kernel), memory=128 * MIB)) as machine:
            machine.snapshot(snapshot)
        for _ in range(bench.rounds + 1):
            command = [sys.executable, str(HERE / "guest" / "clones.py"), str(snapshot)]
            done = subprocess.run([*command, "25"], capture_output=True, check=True, timeout=100)
            found = json.loads(done.stdout)
            fan_out.append(found["fan_out"])
            forked.append(statistics.median(found["private"]))
            fresh.append(alone(snapshot))
    yield Row.of("25 clones, from the first fork to the last's answer", "ms", ours=fan_out[1:])
    yield Row.of("private memory of a clone, forked", "MiB", ours=forked[1:], goal=Goal.at_most(5))
    yield Row.of(
        "private memory of a clone, a fresh process", "MiB", ours=fresh[1:], goal=Goal.at_most(25)
    )


def moves(bench: Bench) -> Iterator[Row]:
    """Migrations, where they can be."""
    try:
        yield from _moves.rows(bench)
    except Skip as skip:
        bench.note(f"no migrations: {skip.reason}")


PARTS = {"files": files, "clones": clones, "moves": moves}


def alone(folder: Path) -> float:
    """What `vmm restore` keeps for itself while its guest is idle."""
    command = [sys.executable, "-m", "vmm_reference", "restore", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)
        time.sleep(0.2)
        found = private(process.pid)
        process.kill()
    return found


def machine_of(folder: Path, size: int) -> Machine:
    """A machine of so many MiB whose guest makes exits for ever."""
    kernel = folder / "kernel"
    kernel.write_bytes(tiny_kernel(EXITS))
    return Machine(MachineConfig(kernel=str(kernel), memory=size * MIB))


def fill(machine: Machine, size: int, data: int) -> None:
    """Let so many MiB of its memory hold random bytes, evenly spread."""
    board = machine._board
    assert board is not None
    block = random.Random(1).randbytes(MIB)
    for number in range(2, data):
        at = number * size // data * MIB
        board.memory.write(GuestAddress(at if at < 3 << 30 else at + (1 << 30)), block)


def written(machine: Machine, folder: Path) -> float:
    """Write a snapshot of a paused machine; MB/s of its data."""
    target = folder / "written"
    start = time.perf_counter()
    machine.snapshot(target)
    took = time.perf_counter() - start
    (file,) = target.rglob("memory")
    rate = file.stat().st_blocks * 512 / took / 1e6
    shutil.rmtree(target)
    return rate


def raw(machine: Machine, folder: Path, data: int) -> float:
    """Write as much of the same memory to a file, straight to the disk, and sync it; MB/s."""
    board = machine._board
    assert board is not None
    region = board.memory.regions[0]
    size = min(data * MIB, region.size)
    start = time.perf_counter()
    fd = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        for at in range(0, size, BLOCK):
            os.pwrite(fd, region.buffer[at : at + BLOCK], at)
        os.fsync(fd)
    finally:
        os.close(fd)
    took = time.perf_counter() - start
    (folder / "raw").unlink()
    return size / took / 1e6


def restored(folder: Path, way: str) -> float:
    """Restore a machine; milliseconds to its first exit."""
    start = time.perf_counter()
    with Machine.restore(folder, way) as machine:
        board = machine._board
        assert board is not None
        while not board.ports.unclaimed_writes:
            if time.perf_counter() - start > PATIENCE:
                raise RuntimeError(f"the restored guest made no exit in {PATIENCE:g} s")
            time.sleep(0.0002)
        took = time.perf_counter() - start
    return took * 1e3


def bare(program: Path, script: Path, folder: Path, way: str) -> float:
    """The same by the floor's program."""
    (memory,) = folder.rglob("memory")
    with SnapshotReader(folder) as reader:
        regions = reader.state("memory", MemoryState).regions
    command = [str(program), str(script), str(memory), way]
    command += [f"{r.guest_address}:{r.size}:{r.file_offset}" for r in regions]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise Skip(done.stderr.strip())
    return int(done.stdout) / 1e6


def recorded(folder: Path, way: str) -> bytes:
    """Every ioctl of a restore in its order, for the floor's program.

    It is not the process's first, which also asks what this host's CPU can do.
    """
    Machine.restore(folder, way).close()
    script: list[bytes] = []
    real = {name: getattr(Descriptor, name) for name in ("_value", "_read", "_write", "_try")}
    targets = {Kvm: 0, Vm: 1, Vcpu: 2}

    def record(name: str, owner: Any, request: int, argument: Any) -> None:
        target = targets.get(type(owner))
        if target is None:
            return
        if name == "_value":
            script.append(_RECORD.pack(target, 0, request, argument, 0, 0))
            return
        data = bytes(argument)  # as many zeros, where the kernel fills them in
        script.append(_RECORD.pack(target, 1, request, 0, len(data), 0))
        script.append(data.ljust(-(-len(data) // 8) * 8, b"\0"))

    def recorder(name: str) -> Any:
        def call(owner: Any, request: int, argument: Any = 0, /, **named: Any) -> Any:
            record(name, owner, request, argument)
            return real[name](owner, request, argument, **named)

        return call

    for name in real:
        setattr(Descriptor, name, recorder(name))
    try:
        machine = Machine.restore(folder, way)
        machine.start()
        machine.pause()
        end = len(script)
    finally:
        for name, method in real.items():
            setattr(Descriptor, name, method)
    machine.close()
    return b"".join(script[:end])
