"""Declared exits: served in C, in order with all others, bounded, counted."""

from __future__ import annotations

import os
import select
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_ioctls import ArgumentError, KvmError, exits
from kvm_ioctls.hot import HotExits, PostedWrite
from kvm_ioctls.testing import Guest, Mode

pytestmark = pytest.mark.kvm

HELLO = """
    mov $text, %si
1:  mov $0x3fd, %dx
2:  in %dx, %al
    test $0x20, %al
    jz 2b
    lodsb
    test %al, %al
    jz 3f
    mov $0x3f8, %dx
    out %al, %dx
    jmp 1b
3:  out %al, $0x10
    hlt
text: .asciz "hello, world"
"""


def test_a_console_makes_no_exits() -> None:
    """A guest that polls and prints is served in C; its text is whole, and counted."""
    text = bytearray()
    hot = HotExits(lambda writes: text.extend(write.data for write in writes))
    data, status = hot.post(0x3F8, pio=True), hot.answer(0x3FD, b"\x60", pio=True)
    with Guest(HELLO) as guest:
        guest.vcpu.serve_hot(hot)
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\0")
        assert text == b"hello, world"
        assert (data.count, status.count) == (12, 13)
        assert guest.vcpu.served == 25
        assert guest.vcpu.runs == 26


def test_posted_writes_come_before_any_later_exit() -> None:
    """The handler has seen every write when the exit behind it is returned, and none twice."""
    seen: list[int] = []
    hot = HotExits(lambda writes: seen.extend(write.data for write in writes))
    hot.post(0x80, 2, pio=True)
    source = "1: inc %al; out %al, $0x80; out %al, $0x81; out %al, $0x10; jmp 1b"
    with Guest(source) as guest:
        guest.vcpu.serve_hot(hot)
        for turn in range(1, 200):
            assert guest.run() == exits.IoOut(0x10, 1, 1, bytes([turn]))
            assert seen == [turn, turn]
            seen.clear()


def test_every_access_as_it_was_made() -> None:
    """Addresses, widths and values of posted writes, and partial answers, of ports and memory."""
    seen: list[PostedWrite] = []
    hot = HotExits(seen.extend)
    hot.post(0x60, 4, pio=True)
    hot.post(0xD0000000, 0x10)
    hot.answer(0xD0000100, bytes(range(1, 9)))
    source = """
        mov $0x11223344, %eax
        out %al, $0x61
        out %ax, $0x62
        out %eax, $0x60
        mov $0xd0000000, %ebx
        mov $0x1122334455667788, %rcx
        mov %rcx, 8(%rbx)
        movw $0xabcd, 1(%rbx)
        mov 0x100(%rbx), %rax
        mov %rax, 0x200(%rbx)
        movzwl 0x103(%rbx), %eax
        mov %eax, 0x200(%rbx)
        mov %eax, 13(%rbx)
        hlt
    """
    with Guest(source, Mode.LONG) as guest:
        guest.vcpu.serve_hot(hot)
        assert guest.run() == exits.MmioWrite(0xD0000200, bytes(range(1, 9)))
        assert seen == [
            PostedWrite(0x61, 0x44, 1, True),
            PostedWrite(0x62, 0x3344, 2, True),
            PostedWrite(0x60, 0x11223344, 4, True),
            PostedWrite(0xD0000008, 0x1122334455667788, 8, False),
            PostedWrite(0xD0000001, 0xABCD, 2, False),
        ]
        assert guest.run() == exits.MmioWrite(0xD0000200, b"\x04\x05\0\0")
        # Four bytes at the range's third last lie partly outside of it.
        assert guest.run() == exits.MmioWrite(0xD000000D, b"\x04\x05\0\0")


def test_a_full_queue_makes_ordinary_exits() -> None:
    """What finds no room is returned, after everything that had room."""
    seen: list[int] = []
    hot = HotExits(lambda writes: seen.extend(write.data for write in writes), room=3)
    hot.post(0x80, pio=True)
    with Guest("1: inc %al; out %al, $0x80; jmp 1b") as guest:
        guest.vcpu.serve_hot(hot)
        assert guest.run() == exits.IoOut(0x80, 1, 1, b"\x04")
        assert seen == [1, 2, 3]
        assert hot.full == 1
        assert guest.run() == exits.IoOut(0x80, 1, 1, b"\x08")
        assert seen == [1, 2, 3, 5, 6, 7]


def test_a_run_is_bounded() -> None:
    """A guest that does nothing but declared exits gives its caller a turn every so often."""
    hot = HotExits(lambda writes: None, limit=100)
    ignored = hot.ignore(0x80, pio=True)
    with Guest("1: out %al, $0x80; jmp 1b") as guest:
        guest.vcpu.serve_hot(hot)
        for turn in (100, 200):
            assert guest.run() == exits.Interrupted(kicked=False)
            assert ignored.count == turn


def test_a_kick_ends_it() -> None:
    """A kick from another thread ends a run that is serving declared exits, posted writes first."""
    seen: list[PostedWrite] = []
    wake = os.eventfd(0)
    hot = HotExits(seen.extend, limit=1 << 31, room=1 << 16, wake=wake)
    hot.ignore(0x80, pio=True)
    hot.post(0x81, pio=True)
    kicked: list[exits.Exit] = []
    with Guest("out %al, $0x81; 1: out %al, $0x80; jmp 1b") as guest:
        guest.vcpu.serve_hot(hot)
        runner = threading.Thread(target=lambda: kicked.append(guest.run()))
        runner.start()
        assert select.select([wake], [], [], 30)[0] == [wake]
        guest.vcpu.kick()
        runner.join(30)
        assert kicked == [exits.Interrupted(kicked=True)]
        assert len(seen) == 1
    os.close(wake)


def test_the_wake_lets_another_thread_take_writes() -> None:
    """While the guest halts in the kernel, somebody else is told of its output and takes it."""
    seen: list[int] = []
    wake = os.eventfd(0)
    hot = HotExits(lambda writes: seen.extend(write.data for write in writes), wake=wake)
    hot.post(0x80, pio=True)
    with Guest("mov $7, %al; out %al, $0x80; cli; hlt", irqchip=True) as guest:
        guest.vcpu.serve_hot(hot)
        runner = threading.Thread(target=guest.run)
        runner.start()
        assert select.select([wake], [], [], 30)[0] == [wake]
        assert hot.flush() == 1
        assert seen == [7]
        assert hot.flush() == 0
        guest.vcpu.kick()
        runner.join(30)
        assert not runner.is_alive()
    os.close(wake)


def test_a_handler_that_raises_loses_no_exit() -> None:
    """Its exception comes out of run(), and the next run() returns what was about to come."""

    def refuse(writes: list[PostedWrite]) -> None:
        if not tried:
            tried.append(1)
            raise RuntimeError("not now")

    tried: list[int] = []
    hot = HotExits(refuse)
    hot.post(0x80, pio=True)
    with Guest("out %al, $0x80; mov $9, %al; out %al, $0x10; hlt") as guest:
        guest.vcpu.serve_hot(hot)
        with pytest.raises(RuntimeError, match="not now"):
            guest.run()
        with pytest.raises(KvmError, match="EBUSY"):
            guest.vcpu.serve_hot(None)
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x09")
        assert guest.run() == exits.Hlt()
        guest.vcpu.serve_hot(None)


def test_writes_that_another_thread_took_come_first_too() -> None:
    """A run waits until the handler is done with writes, whichever thread has handed them over."""
    order: list[str] = []
    entered, leave, returned = threading.Event(), threading.Event(), threading.Event()

    def handle(writes: list[PostedWrite]) -> None:
        entered.set()
        assert leave.wait(30)
        order.extend(f"write {write.data}" for write in writes)

    wake = os.eventfd(0)
    hot = HotExits(handle, wake=wake)
    hot.post(0x80, pio=True)
    source = "mov $5, %al; out %al, $0x80; 1: cmpb $0, 0x5000; je 1b; out %al, $0x10"
    with Guest(source) as guest:
        guest.vcpu.serve_hot(hot)

        def run() -> None:
            order.append(type(guest.run()).__name__)
            returned.set()

        threads = [threading.Thread(target=run), threading.Thread(target=hot.flush)]
        threads[0].start()
        assert select.select([wake], [], [], 30)[0] == [wake]
        threads[1].start()
        assert entered.wait(30)
        guest.memory[0x5000] = 1
        assert not returned.wait(0.3)
        leave.set()
        for thread in threads:
            thread.join(30)
    os.close(wake)
    assert order == ["write 5", "IoOut"]


def test_declarations_change_while_it_runs() -> None:
    """Switched off, a range makes exits; an answer can be changed; a removed range is free."""
    hot = HotExits(lambda writes: None)
    answer = hot.answer(0x60, b"\x01", pio=True)
    with Guest("1: in $0x60, %al; out %al, $0x10; jmp 1b") as guest:
        guest.vcpu.serve_hot(hot)
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x01")
        answer.answer(b"\x02")
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x02")
        assert answer.enabled
        answer.enabled = False
        assert not answer.enabled
        assert isinstance(guest.run(), exits.IoIn)
        answer.enabled = True
        assert isinstance(guest.run(), exits.IoOut)
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x02")
        assert answer.count == 3
        answer.remove()
        assert hot.declarations == ()
        assert isinstance(guest.run(), exits.IoIn)
        again = hot.answer(0x60, b"\x03", pio=True)
        assert again.count == 0
        assert isinstance(guest.run(), exits.IoOut)
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x03")


def test_string_io_is_an_ordinary_exit() -> None:
    """Several accesses at once are not served in C."""
    hot = HotExits(lambda writes: None)
    answer = hot.answer(0x80, b"\x05", pio=True)
    source = "cld; mov $0x7000, %di; mov $4, %cx; mov $0x80, %dx; rep insb; in %dx, %al; hlt"
    with Guest(source) as guest:
        guest.vcpu.serve_hot(hot)
        assert guest.run() == exits.IoIn(0x80, 1, 4, memoryview(bytes(4)))
        assert guest.run() == exits.Hlt()
        assert answer.count == 1


def test_misuse_is_refused() -> None:
    """Ranges that cannot be, that meet, and too many of them; nothing is declared then."""
    hot = HotExits(lambda writes: None)
    first = hot.post(0x10, 4, pio=True, size=1)
    for call, rule in (
        (lambda: hot.post(0x13, 2, pio=True), "meets the range at 0x10"),
        (lambda: hot.ignore(0x10, pio=True, size=1), "meets"),
        (lambda: hot.post(0x20, 0), "at least one"),
        (lambda: hot.post(-1), "must lie within"),
        (lambda: hot.post(0xFFFF, 2, pio=True), "must lie within"),
        (lambda: hot.post(0x20, size=3), "size is"),
        (lambda: hot.answer(0x20, bytes(9)), "at most 8"),
        (lambda: first.answer(b"1234"), "for writes"),
        (lambda: HotExits(lambda writes: None, room=0), "room is"),
        (lambda: HotExits(lambda writes: None, limit=0), "limit"),
    ):
        with pytest.raises(ArgumentError, match=rule):
            call()
    assert hot.declarations == (first,)
    hot.post(0x10, 4, pio=True, size=2)
    answer = hot.answer(0x10, b"1234", pio=True)
    with pytest.raises(ArgumentError, match="4 bytes"):
        answer.answer(b"1")
    hot.post(0x10, 4)
    for index in range(60):
        hot.ignore(0x1000 + index)
    with pytest.raises(ArgumentError, match="at most 64"):
        hot.ignore(0x5000)


ACCESSES = st.lists(
    st.tuples(st.sampled_from("oi"), st.integers(0x40, 0x4B), st.sampled_from([1, 2, 4])),
    min_size=1,
    max_size=12,
)
RANGES = st.lists(
    st.tuples(
        st.sampled_from(["post", "ignore", "answer"]),
        st.integers(0x40, 0x4B),
        st.integers(1, 4),
        st.sampled_from([0, 1, 2, 4]),
    ),
    max_size=6,
)
REGISTER = {1: "%al", 2: "%ax", 4: "%eax"}


@given(ranges=RANGES, accesses=ACCESSES, room=st.integers(1, 4))
@settings(max_examples=40)
def test_any_declarations_agree_with_a_model(
    ranges: list[tuple[str, int, int, int]], accesses: list[tuple[str, int, int]], room: int
) -> None:
    """Each access is an exit or served as a model of the rules says, and all come in order."""
    events: list[tuple[str, int, int]] = []
    hot = HotExits(
        lambda writes: events.extend(("posted", w.address, w.size) for w in writes), room=room
    )
    model: list[tuple[str, int, int, int]] = []
    for kind, port, length, size in ranges:
        try:
            if kind == "answer":
                hot.answer(port, bytes(length), pio=True, size=size)
            else:
                getattr(hot, kind)(port, length, pio=True, size=size)
        except ArgumentError:
            continue
        model.append((kind, port, length, size))
    expected: list[tuple[str, int, int]] = []
    waiting = 0
    for direction, port, size in accesses:
        kinds = ("answer",) if direction == "i" else ("post", "ignore")
        kind = next(
            (k for k, first, length, width in model
             if k in kinds and first <= port and port + size <= first + length
             and width in (0, size)), "exit")  # fmt: skip
        if kind == "post" and waiting < room:
            waiting += 1
            expected.append(("posted", port, size))
        elif kind in ("exit", "post"):
            waiting = 0
            expected.append(("exit", port, size))
    source = ""
    for direction, port, size in accesses:
        register = REGISTER[size]
        source += f"out {register}, ${port};" if direction == "o" else f"in ${port}, {register};"
    with Guest(source + "hlt") as guest:
        guest.vcpu.serve_hot(hot)
        while not isinstance(seen := guest.run(), exits.Hlt):
            assert isinstance(seen, exits.IoIn | exits.IoOut)
            events.append(("exit", seen.port, seen.size))
    assert events == expected
