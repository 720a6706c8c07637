"""Exits of a vCPU and access to its registers, beside the same system calls in a bare C loop.

The floor runs the same vCPU in the same thread by KVM_RUN in C, and touches the exit's data. QEMU,
the peer, runs the same instructions as its firmware; two lengths of it are subtracted.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import evolve

from benchmarks.harness import Bench, Goal, Measure, Row, Skip, per_call
from kvm_ioctls import exits
from kvm_ioctls.hot import HotExits
from kvm_ioctls.table import IOCTLS
from kvm_ioctls.testing import Guest, Mode, assemble

EXITS, CALLS = 3000, 20_000
TYPED, HOT, FIELD = Goal.floor(1.20), Goal.floor(1.03), Goal.floor(1.25)
NUMBERS = {row.name: row.request for row in IOCTLS}
OUT, IN = "1: out %al, $0x10; jmp 1b", "1: in $0x10, %al; jmp 1b"
STORE = "mov $0xd0000000, %ebx; 1: mov %al, (%rbx); jmp 1b"
LOAD = "mov $0xd0000000, %ebx; 1: mov (%rbx), %al; jmp 1b"
HANDLER = """
    lidt idtr
    sti
1:  hlt
    jmp 1b
handler: out %al, $0x10
    movl $0, 0xfee000b0
    add $12, %esp  # instead of IRET, which not every KVM emulates
    sti
    jmp 1b
idtr: .word 0x1ff
    .long 0x2000
"""


def rows(bench: Bench) -> Iterator[Row]:
    """All rows of the suite."""
    bench.note(
        "floor: the same vCPU by KVM_RUN in C; peer: QEMU, the same instructions as firmware"
    )
    floor = _library(bench)
    qemu_out, qemu_in = _qemu(bench, "out %al, $0x80"), _qemu(bench, "in $0x80, %al")
    for name, source, peer in (
        ("port out", OUT, qemu_out), ("port in", IN, qemu_in), ("MMIO write", STORE, None),
        ("MMIO read", LOAD, None), ("HLT", "1: hlt; jmp 1b", None),
    ):  # fmt: skip
        with Guest(source, Mode.LONG) as guest:
            yield bench.compare(
                f"{name}, typed exit", "ns", ours=_typed(guest), floor=_bare(floor, guest),
                peer=peer, peer_name="QEMU", goal=TYPED,
            )  # fmt: skip
    yield from _hot(bench, floor, qemu_out, qemu_in)
    yield from _events(bench, floor)
    yield from _registers(bench, floor)


def _library(bench: Bench) -> ctypes.CDLL:
    built = bench.compile(Path(__file__).parent / "native" / "exits_floor.c", "-shared", "-fPIC")
    library = ctypes.CDLL(str(built))
    for name in ("floor_exits", "floor_irqfd", "floor_ioeventfd", "floor_ioctl"):
        getattr(library, name).restype = ctypes.c_double
    return library


def _page(guest: Guest) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(guest.vcpu.run_page)))


def _done(figure: float) -> float:
    if figure < 0:
        raise Skip("the guest made another exit than the bare loop expects")
    return figure


def _bare(floor: ctypes.CDLL, guest: Guest, count: int = EXITS) -> Measure:
    page = _page(guest)
    return lambda: _done(floor.floor_exits(guest.vcpu.fileno(), page, count))


def _typed(guest: Guest) -> Measure:
    """Run, match and use the value, as a caller does."""
    run = guest.vcpu.run

    def measure() -> float:
        total = 0
        start = time.perf_counter_ns()
        for _ in range(EXITS):
            match run():
                case exits.IoOut(data=data) | exits.MmioWrite(data=data):
                    total += data[0]
                case exits.IoIn(data=view) | exits.MmioRead(data=view):
                    view[0] = 0x60
                case exits.Hlt():
                    pass
                case other:
                    raise Skip(f"the guest made {other!r}")
        return (time.perf_counter_ns() - start) / EXITS

    return measure


def _hot(bench: Bench, floor: ctypes.CDLL, peer_out: Measure, peer_in: Measure) -> Iterator[Row]:
    def declared(
        name: str, source: str, peer: Measure, declare: Callable[[HotExits], object]
    ) -> Row:
        hot = HotExits(lambda writes: None, limit=EXITS, room=4096)
        declare(hot)
        with Guest(source, Mode.LONG) as guest:

            def ours() -> float:
                guest.vcpu.serve_hot(hot)
                start = time.perf_counter_ns()
                guest.vcpu.run()
                took = (time.perf_counter_ns() - start) / EXITS
                guest.vcpu.serve_hot(None)
                return took

            return bench.compare(name, "ns", ours=ours, floor=_bare(floor, guest), peer=peer,
                                 peer_name="QEMU", goal=HOT)  # fmt: skip

    yield declared("port out, declared: ignored", OUT, peer_out, lambda h: h.ignore(0x10, pio=True))
    yield declared("port out, declared: posted", OUT, peer_out, lambda h: h.post(0x10, pio=True))
    yield declared("port in, declared: answered", IN, peer_in,
                   lambda h: h.answer(0x10, b"\x60", pio=True))  # fmt: skip


def _events(bench: Bench, floor: ctypes.CDLL) -> Iterator[Row]:
    with Guest(HANDLER, Mode.PROTECTED, irqchip=True) as guest, _eventfd() as event:
        _interrupts(guest)
        guest.vm.irqfd(event, 24)
        run, fd = guest.vcpu.run, guest.vcpu.fileno()

        def ours() -> float:
            start = time.perf_counter_ns()
            for _ in range(EXITS):
                os.eventfd_write(event.fileno(), 1)
                if not isinstance(run(), exits.IoOut):
                    raise Skip("the interrupt did not arrive")
            return (time.perf_counter_ns() - start) / EXITS

        page = _page(guest)
        yield bench.compare(
            "irqfd to the handler's exit", "ns", ours=ours, goal=TYPED,
            floor=lambda: _done(floor.floor_irqfd(fd, page, EXITS, event.fileno())),
        )  # fmt: skip
    source = "1: out %al, $0x20; out %al, $0x10; jmp 1b"
    with Guest(source, Mode.LONG) as guest, _eventfd() as event:
        guest.vm.ioeventfd(event, 0x20, 1, pio=True)
        run, fd = guest.vcpu.run, guest.vcpu.fileno()

        def polled() -> float:
            start = time.perf_counter_ns()
            for _ in range(EXITS):
                run()
                os.eventfd_read(event.fileno())
            return (time.perf_counter_ns() - start) / EXITS

        page = _page(guest)
        yield bench.compare(
            "ioeventfd to the poller, and an exit", "ns", ours=polled, goal=TYPED,
            floor=lambda: _done(floor.floor_ioeventfd(fd, page, EXITS, event.fileno())),
        )  # fmt: skip


class _eventfd:  # noqa: N801 - used like a function
    def __init__(self) -> None:
        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def __enter__(self) -> _eventfd:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def _interrupts(guest: Guest) -> None:
    """Let GSI 24 be vector 0x30, and its gate lead to the handler."""
    from kvm_ioctls import MsiRoute

    entry = guest.memory.find(b"\xe6\x10", 0x1000)
    guest.memory[0x2180:0x2188] = (
        (entry & 0xFFFF) | 8 << 16 | 0x8E00 << 32 | (entry >> 16) << 48
    ).to_bytes(8, "little")
    guest.vm.set_gsi_routing([MsiRoute(24, 0xFEE00000, 0x30)])
    lapic = guest.vcpu.get_lapic()
    guest.vcpu.set_lapic(evolve(lapic, svr=0x1FF))


def _registers(bench: Bench, floor: ctypes.CDLL) -> Iterator[Row]:
    with Guest("hlt", Mode.LONG) as guest:
        vcpu = guest.vcpu
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        raw, special = vcpu.raw_regs(), vcpu.raw_sregs()
        buffer = ctypes.create_string_buffer(regs.to_bytes(), 512)

        def bare(name: str, data: bytes) -> Measure:
            def measure() -> float:
                ctypes.memmove(buffer, data, len(data))
                number = ctypes.c_ulong(NUMBERS[name])
                return _done(floor.floor_ioctl(vcpu.fileno(), number, buffer, CALLS))

            return measure

        scope = {"vcpu": vcpu, "regs": regs, "sregs": sregs, "raw": raw, "special": special}
        packed, special_packed = regs.to_bytes(), sregs.to_bytes()
        for name, statement, number, data, goal in (
            ("get_regs, raw buffer", "raw.get()", "KVM_GET_REGS", packed, FIELD),
            ("get_regs, one field", "raw.get()['rip']", "KVM_GET_REGS", packed, FIELD),
            ("get_regs, whole value", "vcpu.get_regs()", "KVM_GET_REGS", packed,
             Goal.floor_plus(3000)),
            ("set_regs, raw buffer", "raw.set()", "KVM_SET_REGS", packed, FIELD),
            ("set_regs, whole value", "vcpu.set_regs(regs)", "KVM_SET_REGS", packed,
             Goal.floor_plus(3000)),
            ("get_sregs, raw buffer", "special.get()", "KVM_GET_SREGS", special_packed, FIELD),
            ("get_sregs, one field", "special.get()['cr3']", "KVM_GET_SREGS", special_packed,
             FIELD),
            ("get_sregs, whole value", "vcpu.get_sregs().cs.base", "KVM_GET_SREGS", special_packed,
             Goal.floor_plus(15_000)),
        ):  # fmt: skip
            yield bench.compare(
                name, "ns", ours=per_call(statement, calls=CALLS, scope=scope),
                floor=bare(number, data), goal=goal,
            )  # fmt: skip


def _qemu(bench: Bench, instruction: str) -> Measure:
    """Nanoseconds of one exit of QEMU, from two lengths of the same firmware."""

    def run(program: Path, count: int) -> float:
        source = f"""
            .org 0
        start: mov ${count}, %ecx
        1:  {instruction}
            dec %ecx
            jnz 1b
            mov $0xf4, %dx
            out %al, %dx
            hlt
            .org 0xfff0
            jmp start
            .org 0xffff
            .byte 0
        """
        with tempfile.NamedTemporaryFile(suffix=".bin") as firmware:
            firmware.write(assemble(source, 16, 0))
            firmware.flush()
            command = [
                str(program), "-accel", "kvm", "-M", "pc", "-m", "16", "-display", "none",
                "-nodefaults", "-no-reboot", "-bios", firmware.name,
                "-device", "isa-debug-exit,iobase=0xf4",
            ]  # fmt: skip
            start = time.perf_counter_ns()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            except subprocess.TimeoutExpired:
                raise Skip("QEMU did not end within 60 s on this KVM") from None
            took = time.perf_counter_ns() - start
        if not done.returncode & 1:
            raise Skip(f"QEMU ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        return took

    def measure() -> float:
        program = bench.peer("qemu", where="qemu-system-x86_64")
        short, long = 2_000, 102_000
        return (run(program, long) - run(program, short)) / (long - short)

    return measure
