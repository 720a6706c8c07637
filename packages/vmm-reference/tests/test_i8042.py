from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.devices.i8042 import I8042, SystemControl
from vmm_reference.devices.states import I8042State, StateError, SystemControlState

DATA, COMMAND = 0, 4
FULL, SYSTEM, AUX, TIMEOUT = 0x01, 0x04, 0x20, 0x40


class Controller:
    """A controller that counts its resets, and one-byte accesses."""

    def __init__(self) -> None:
        self.resets = 0
        self.device = I8042(self.reset)

    def reset(self) -> None:
        self.resets += 1

    def command(self, value: int, *data: int) -> None:
        self.device.write(COMMAND, bytes([value]))
        for byte in data:
            self.device.write(DATA, bytes([byte]))

    @property
    def status(self) -> int:
        return self.device.read(COMMAND, 1)[0]

    def answer(self) -> int:
        assert self.status & FULL
        return self.device.read(DATA, 1)[0]


@pytest.fixture
def i8042() -> Controller:
    return Controller()


def test_input_buffer_is_always_free(i8042: Controller) -> None:
    """A kernel that waits for the input buffer before its reset command never waits."""
    assert i8042.status == 0x14
    i8042.command(0x20)
    assert i8042.status & 0x02 == 0


@pytest.mark.parametrize("command", range(256))
def test_only_reset_commands_reset(i8042: Controller, command: int) -> None:
    """0xFE, and every other pulse command that names the reset line, resets; nothing else does."""
    i8042.command(command)
    assert i8042.resets == (1 if command >= 0xF0 and command % 2 == 0 else 0)


def test_reset_through_the_output_port(i8042: Controller) -> None:
    """Bit 0 of the output port is the reset line, active low; A20 is kept and read back."""
    i8042.command(0xD1, 0x01)
    i8042.command(0xD0)
    assert (i8042.resets, i8042.answer()) == (0, 0x01)
    i8042.command(0xD1, 0x02)
    assert i8042.resets == 1


def test_self_tests(i8042: Controller) -> None:
    """The controller is well; the lines of keyboard and mouse lead nowhere."""
    answers = []
    for command in (0xAA, 0xAB, 0xA9):
        i8042.command(command)
        answers.append(i8042.answer())
    assert answers == [0x55, 0x02, 0x02]
    assert not i8042.status & FULL


def test_command_byte(i8042: Controller) -> None:
    """The command byte reads back, and the enable commands change its bits."""
    i8042.command(0x20)
    assert i8042.answer() == 0x34
    i8042.command(0x60, 0x03)
    i8042.command(0xAD)
    i8042.command(0xA7)
    i8042.command(0x20)
    assert i8042.answer() == 0x33
    i8042.command(0xAE)
    i8042.command(0xA8)
    i8042.command(0x20)
    assert i8042.answer() == 0x03


def test_echo_to_the_two_output_buffers(i8042: Controller) -> None:
    """0xD2 and 0xD3 give their byte back, marked as the keyboard's or the mouse's."""
    i8042.command(0xD2, 0x5A)
    assert (i8042.status & AUX, i8042.answer()) == (0, 0x5A)
    i8042.command(0xD3, 0xA5)
    assert (i8042.status & AUX, i8042.answer()) == (AUX, 0xA5)


def test_no_keyboard_answers(i8042: Controller) -> None:
    """A byte for the keyboard gets no answer, one for the mouse times out."""
    i8042.device.write(DATA, b"\xff")
    assert not i8042.status & FULL
    i8042.command(0xD4, 0xFF)
    assert i8042.status & (AUX | TIMEOUT) == AUX | TIMEOUT
    assert i8042.answer() == 0xFE
    assert not i8042.status & (FULL | AUX | TIMEOUT)
    i8042.command(0xC0)
    assert i8042.answer() == 0x80


accesses = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 5), st.binary(max_size=4)),
        st.tuples(st.sampled_from([DATA, COMMAND]), st.binary(min_size=1, max_size=1)),
        st.tuples(st.integers(0, 5), st.integers(0, 8)),
    ),
    max_size=40,
)


@given(accesses)
def test_nothing_raises_and_state_is_the_whole_device(
    accesses: list[tuple[int, bytes | int]],
) -> None:
    """Any accesses: reads have their width, and a restored twin goes on exactly the same."""
    one, two = Controller(), Controller()
    for offset, value in accesses:
        two.device.restore(one.device.save())
        if isinstance(value, bytes):
            one.device.write(offset, value)
            two.device.write(offset, value)
        else:
            data = one.device.read(offset, value)
            assert len(data) == value
            assert two.device.read(offset, value) == data
        assert one.device.save() == two.device.save()
        assert one.resets == two.resets


FIELDS = ("status", "command_byte", "output_port", "output", "expecting")


@pytest.mark.parametrize("field", FIELDS)
def test_impossible_state_is_refused(field: str) -> None:
    """Registers have eight bits."""
    with pytest.raises(StateError, match=f"I8042State.{field}"):
        I8042State(**{**dict.fromkeys(FIELDS, 0), field: 256}, released=False)


def test_the_fast_way_to_a20_and_reset() -> None:
    """What is written to port 0x92 is read back; bit 0 resets, and is clear afterwards."""
    resets: list[int] = []
    port = SystemControl(lambda: resets.append(1))
    assert port.read(0, 2) == b"\x02\xff"
    port.write(0, b"\xf0")
    assert (port.read(0, 1), resets) == (b"\xf0", [])
    port.write(0, b"")
    port.write(1, b"\xff")
    twin = SystemControl(lambda: None)
    twin.restore(port.save())
    assert twin.read(0, 1) == b"\xf0"
    port.write(0, b"\x03")
    assert (port.read(0, 1), resets, port.metrics()) == (b"\x02", [1], {"resets": 1})
    with pytest.raises(StateError, match=r"SystemControlState\.value"):
        SystemControlState(256)
