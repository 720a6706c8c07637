"""The serial port by declared exits: what the guest sees is as if each access had been an exit.

The recipe is that of `kvm_ioctls.hot`: writes to the transmitter are posted, and replayed into the
UART before any other access reaches it; the line status is a constant until something changes it.
"""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_ioctls import exits
from kvm_ioctls.hot import HotExits, PostedWrite
from kvm_ioctls.testing import Guest, Mode
from vmm_reference.devices.serial import DATA, LCR_DLAB, LSR, MCR_LOOP, Serial
from vmm_reference.devices.states import SerialState

pytestmark = pytest.mark.kvm

BASE, RECEIVE, BREAK, END = 0x3F8, 0x11, 0x12, 0x10
PROGRAM, RESULTS = 0x3000, 0x6000
# Reads triples from a list: 1, register, value to write; 2, register, 0 to read, with the value put
# into another list; 3 and 4: something arrives on the line.
GUEST = f"""
    mov ${PROGRAM}, %esi
    mov ${RESULTS}, %edi
next:
    mov (%esi), %cl
    movzbl 1(%esi), %edx
    add ${BASE}, %edx
    mov 2(%esi), %al
    add $3, %esi
    cmp $1, %cl
    je write
    cmp $2, %cl
    je read
    cmp $3, %cl
    je receive
    cmp $4, %cl
    je break
    out %al, ${END}
    hlt
write:
    out %al, %dx
    jmp next
read:
    in %dx, %al
    mov %al, (%edi)
    inc %edi
    jmp next
receive:
    out %al, ${RECEIVE}
    jmp next
break:
    out %al, ${BREAK}
    jmp next
"""
Step = tuple[int, int, int]
STEPS = st.one_of(
    st.tuples(st.just(1), st.just(DATA), st.integers(0, 255)),  # what a guest does most
    st.tuples(st.just(2), st.just(LSR), st.just(0)),
    st.tuples(st.just(1), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just(2), st.integers(0, 7), st.just(0)),
    st.tuples(st.just(3), st.just(0), st.integers(0, 255)),
    st.tuples(st.just(4), st.just(0), st.just(0)),
)


class Line:
    """A UART, what it sent, and the exits that the guest made."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.exits = 0
        self.uart = Serial(interrupt=lambda level: None, transmit=self._transmit)

    def _transmit(self, data: bytes) -> None:
        self.sent += data
        self.uart.transmitted(len(data))

    def settle(self) -> None:
        """Called whenever the UART may have changed."""

    def run(self, guest: Guest, steps: list[Step]) -> bytes:
        """Let the guest take the steps; what it read."""
        program = bytes(value for step in steps for value in step) + bytes(3)
        guest.memory[PROGRAM : PROGRAM + len(program)] = program
        while True:
            seen = guest.run()
            self.exits += 1
            match seen:
                case exits.IoOut(port=port, data=data) if port == END:
                    break
                case exits.IoOut(port=port, data=data) if port == RECEIVE:
                    self.uart.receive(data)
                case exits.IoOut(port=port) if port == BREAK:
                    self.uart.receive_break()
                case exits.IoOut(port=port, data=data):
                    self.uart.write(port - BASE, data)
                case exits.IoIn(port=port, data=view):
                    view[:] = self.uart.read(port - BASE, 1)
                case other:
                    raise AssertionError(other)
            self.settle()
        count = sum(step[0] == 2 for step in steps)
        return bytes(guest.memory[RESULTS : RESULTS + count])

    def state(self) -> tuple[SerialState, bool]:
        return self.uart.save(), self.uart.interrupt_level


class HotLine(Line):
    """The same by declared exits, with another thread that takes what was sent while it runs."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.wake = os.eventfd(0)
        self.hot = HotExits(self._handle, room=room, wake=self.wake)
        self.data = self.hot.post(BASE + DATA, pio=True, size=1)
        self.status = self.hot.answer(BASE + LSR, bytes(1), pio=True, size=1)
        self._settling = threading.Lock()
        self._told: tuple[bool, bytes] | None = None
        self._stop = False
        self._flusher = threading.Thread(target=self._flush)
        self._flusher.start()
        self.settle()

    def _flush(self) -> None:
        while os.eventfd_read(self.wake) and not self._stop:
            self.hot.flush()

    def _handle(self, writes: list[PostedWrite]) -> None:
        for write in writes:
            self.uart.write(write.address - BASE, write.data.to_bytes(write.size, "little"))
        self.settle()

    def settle(self) -> None:
        """Declare what the UART lets be served: a byte that only leaves, and a constant LSR."""
        with self._settling:
            state = self.uart.save()
            leaves = not state.lcr & LCR_DLAB and not state.mcr & MCR_LOOP
            constant = not state.line_errors and not any(state.received_errors)
            answer = self.uart.read(LSR, 1) if constant else b""
            # What changes is an ordinary exit meanwhile, as long as this thread is kept from it.
            if (leaves, answer) != self._told:
                self._told = leaves, answer
                self.data.enabled = leaves
                if constant:
                    self.status.answer(answer)
                self.status.enabled = constant

    def close(self) -> None:
        self._stop = True
        os.eventfd_write(self.wake, 1)
        self._flusher.join(30)
        os.close(self.wake)


def both(steps: list[Step], room: int) -> tuple[Line, HotLine]:
    """Take the steps one way and the other; everything must be the same but the exits."""
    plain, hot = Line(), HotLine(room)
    try:
        with Guest(GUEST, Mode.PROTECTED) as guest, Guest(GUEST, Mode.PROTECTED) as other:
            other.vcpu.serve_hot(hot.hot)
            assert hot.run(other, steps) == plain.run(guest, steps)
        assert hot.sent == plain.sent
        assert hot.state() == plain.state()
    finally:
        hot.close()
    return plain, hot


@settings(max_examples=60)
@given(steps=st.lists(STEPS, max_size=40), room=st.integers(1, 16))
def test_a_guest_cannot_tell_declared_exits_from_others(steps: list[Step], room: int) -> None:
    """Any use of a UART reads the same, sends the same, and leaves the same state."""
    both(steps, room)


def test_a_boot_log_makes_hardly_any_exits() -> None:
    """A driver that polls the line status and writes: no exit a byte, and all is counted."""
    text = b"[    0.000000] Linux version 6.1.0\r\n"
    steps = [(1, 2, 1), (1, 1, 0)]  # the FIFOs on, interrupts off
    for byte in text * 4:
        steps += [(2, LSR, 0), (1, DATA, byte)]
    plain, hot = both(steps, room=1024)
    assert bytes(hot.sent) == text * 4
    assert plain.exits == len(steps) + 1
    assert hot.exits == 3
    assert hot.data.count == hot.status.count == len(text) * 4
    assert hot.hot.full == 0
