"""The keyboard controller of a PC, ports 0x60 and 0x64 (Intel 8042 with IBM's firmware), and 0x92.

It is there in any case, for what else hangs on it: the reset line of the processor, by which
kernels reboot (`reboot=k`), and the self tests that tell software whether a controller exists. A
keyboard may be connected. A mouse is not: a byte for it times out.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .keyboard import Keyboard
    from .states import I8042State, SystemControlState

__all__ = ["I8042", "SET_2", "SYSTEM_CONTROL_PORT", "SystemControl"]

DATA, COMMAND = 0, 4  # offsets from port 0x60
SYSTEM_CONTROL_PORT = 0x92
_FAST_RESET, _FAST_A20 = 0x01, 0x02

STATUS_OUTPUT, STATUS_SYSTEM, STATUS_COMMAND = 0x01, 0x04, 0x08
STATUS_UNLOCKED, STATUS_AUX, STATUS_TIMEOUT = 0x10, 0x20, 0x40

READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0x20, 0x60
DISABLE_AUX, ENABLE_AUX, TEST_AUX = 0xA7, 0xA8, 0xA9
SELF_TEST, TEST_KEYBOARD, DISABLE_KEYBOARD, ENABLE_KEYBOARD = 0xAA, 0xAB, 0xAD, 0xAE
READ_INPUT_PORT, READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xC0, 0xD0, 0xD1
WRITE_KEYBOARD_OUTPUT, WRITE_AUX_OUTPUT, WRITE_AUX = 0xD2, 0xD3, 0xD4
PULSE = 0xF0  # the low four bits that are 0 name output lines to pulse

WITH_DATA = (
    WRITE_COMMAND_BYTE,
    WRITE_OUTPUT_PORT,
    WRITE_KEYBOARD_OUTPUT,
    WRITE_AUX_OUTPUT,
    WRITE_AUX,
)

COMMAND_BYTE_INTERRUPT, COMMAND_BYTE_AUX_INTERRUPT, COMMAND_BYTE_SYSTEM = 0x01, 0x02, 0x04
COMMAND_BYTE_NO_KEYBOARD, COMMAND_BYTE_NO_AUX, COMMAND_BYTE_TRANSLATE = 0x10, 0x20, 0x40
OUTPUT_PORT_RESET, OUTPUT_PORT_A20 = 0x01, 0x02  # the reset line is active low
INPUT_PORT = 0x80  # the keyboard is not locked
# Answers: of tests, all is well, a line is well, the clock line is stuck high; of nobody.
PASSED, GOOD_LINE, NO_LINE, NOBODY = 0x55, 0x00, 0x02, 0xFE

_BREAK = 0xF0  # in set 2, in front of the code of a key that goes up

# Codes of set 2 by those of set 1 that the controller makes of them, from 0 on.
SET_2 = bytes.fromhex(
    "ff 76 16 1e 26 25 2e 36 3d 3e 46 45 4e 55 66 0d"
    "15 1d 24 2d 2c 35 3c 43 44 4d 54 5b 5a 14 1c 1b"
    "23 2b 34 33 3b 42 4b 4c 52 0e 12 5d 1a 22 21 2a"
    "32 31 3a 41 49 4a 59 7c 11 29 58 05 06 04 0c 03"
    "0b 83 0a 01 09 77 7e 6c 75 7d 7b 6b 73 74 79 69"
    "72 7a 70 71 84 60 61 78 07 0f 17 1f 27 2f 37 3f"
    "47 4f 56 5e 08 10 18 20 28 30 38 40 48 50 57 6f"
    "13 19 39 51 53 5c 5f 62 63 64 65 67 68 6a 6d 6e"
)
_SET_1 = {code: number for number, code in enumerate(SET_2)} | {0x7F: 0x54, 0x02: 0x41}


class SystemControl:
    r"""System control port A of the PS/2, 0x92: the fast way to the controller's two lines.

    Bit 0 resets the machine when it is 1, bit 1 is the A20 line. The line has no effect: no guest
    of this machine wraps at 1 MiB, as KVM has no such gate. What is written is read back, bit 0 as
    0. (Port B, 0x61, with the timer's gate and the refresh bit, is KVM's own.)

    Args:
        reset: is called when the guest asks for a reset.

    Attributes:
        resets: how often it did.

    Example:
        >>> port = SystemControl(lambda: print("reset"))
        >>> port.write(0, bytes([port.read(0, 1)[0] | 1]))
        reset
    """

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._value = _FAST_A20  # on from the start, as firmware leaves it
        self.resets = 0

    def read(self, offset: int, length: int) -> bytes:
        """What was written."""
        return bytes([0xFF if offset + n else self._value for n in range(length)])

    def write(self, offset: int, data: bytes) -> None:
        """The register."""
        if offset or not data:
            return
        self._value = data[0] & ~_FAST_RESET
        if data[0] & _FAST_RESET:
            self.resets += 1
            self._reset()

    def metrics(self) -> dict[str, int]:
        """Resets that the guest asked for."""
        return {"resets": self.resets}

    def save(self) -> SystemControlState:
        """The register."""
        from .states import SystemControlState

        return SystemControlState(self._value)

    def restore(self, state: SystemControlState) -> None:
        """Become the register that `state` was saved from."""
        self._value = state.value & ~_FAST_RESET


class I8042:
    r"""A keyboard controller with nothing plugged in, until `connect`.

    Args:
        reset: is called when the guest pulls the reset line. The controller goes on as it was;
            whoever resets the machine makes a new one.
        interrupt: is given the level of the keyboard's interrupt, each time that it changes.
        aux_interrupt: likewise of the mouse's.

    Attributes:
        ignored: commands that it does not know, and bytes for what is not there.

    Example:
        >>> controller = I8042(reset=lambda: print("reset"))
        >>> controller.write(4, b"\xfe")
        reset
    """

    def __init__(
        self,
        reset: Callable[[], None],
        interrupt: Callable[[bool], None] = lambda _: None,
        aux_interrupt: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._reset = reset
        self._lines = interrupt, aux_interrupt
        self._levels = [False, False]
        self._keyboard: Keyboard | None = None
        self._status = STATUS_SYSTEM | STATUS_UNLOCKED
        self._command_byte = COMMAND_BYTE_SYSTEM | COMMAND_BYTE_NO_KEYBOARD | COMMAND_BYTE_NO_AUX
        self._output_port = OUTPUT_PORT_RESET | OUTPUT_PORT_A20
        self._output = 0
        self._expecting = 0  # the command whose data byte is to come, or 0
        self.ignored = 0
        self._released = False  # whether the last code was the prefix of a key that goes up

    def connect(self, keyboard: Keyboard) -> None:
        """Plug a keyboard in, and translate what it says, as a PC's firmware leaves it."""
        self._keyboard = keyboard
        self._command_byte |= COMMAND_BYTE_TRANSLATE
        keyboard.ready = self._fetch

    def read(self, offset: int, length: int) -> bytes:
        """Offset 0 is the data port, offset 4 the status; nothing else answers."""
        return bytes([self._read(offset + n) for n in range(length)])

    def write(self, offset: int, data: bytes) -> None:
        """Offset 0 is the data port, offset 4 the command; anything else is ignored."""
        for value in data:
            if offset == COMMAND:
                self._command(value)
            elif offset == DATA:
                self._data(value)
            offset += 1

    def metrics(self) -> dict[str, int]:
        """What the guest said to nobody."""
        return {"ignored": self.ignored}

    def save(self) -> I8042State:
        """All of the controller's registers."""
        from .states import I8042State

        return I8042State(
            self._status,
            self._command_byte,
            self._output_port,
            self._output,
            self._expecting,
            self._released,
        )

    def restore(self, state: I8042State) -> None:
        """Become the controller that `state` was saved from."""
        self._status = state.status
        self._command_byte = state.command_byte
        self._output_port = state.output_port
        self._output = state.output
        self._expecting = state.expecting if state.expecting in WITH_DATA else 0
        self._released = state.released
        self._settle()

    def _read(self, offset: int) -> int:
        if offset == COMMAND:
            return self._status
        if offset == DATA:
            value = self._output
            self._status &= ~(STATUS_OUTPUT | STATUS_AUX | STATUS_TIMEOUT)
            self._settle()
            self._fetch()
            return value
        return 0xFF

    def _command(self, command: int) -> None:
        self._status |= STATUS_COMMAND
        self._expecting = 0
        if command in WITH_DATA:
            self._expecting = command
        elif command == READ_COMMAND_BYTE:
            self._answer(self._command_byte)
        elif command == SELF_TEST:
            self._status |= STATUS_SYSTEM
            self._answer(PASSED)
        elif command == TEST_KEYBOARD:
            self._answer(NO_LINE if self._keyboard is None else GOOD_LINE)
        elif command == TEST_AUX:
            self._answer(NO_LINE)
        elif command == READ_INPUT_PORT:
            self._answer(INPUT_PORT)
        elif command == READ_OUTPUT_PORT:
            self._answer(self._output_port)
        elif command == DISABLE_KEYBOARD:
            self._command_byte |= COMMAND_BYTE_NO_KEYBOARD
        elif command == ENABLE_KEYBOARD:
            self._command_byte &= ~COMMAND_BYTE_NO_KEYBOARD
        elif command == DISABLE_AUX:
            self._command_byte |= COMMAND_BYTE_NO_AUX
        elif command == ENABLE_AUX:
            self._command_byte &= ~COMMAND_BYTE_NO_AUX
        elif command < PULSE:
            self.ignored += 1
        elif not command & OUTPUT_PORT_RESET:
            self._reset()
        self._fetch()

    def _data(self, value: int) -> None:
        self._status &= ~STATUS_COMMAND
        command, self._expecting = self._expecting, 0
        if command == WRITE_COMMAND_BYTE:
            self._command_byte = value
            self._settle()
        elif command == WRITE_OUTPUT_PORT:
            self._output_port = value | OUTPUT_PORT_RESET
            if not value & OUTPUT_PORT_RESET:
                self._reset()
        elif command == WRITE_KEYBOARD_OUTPUT:
            self._answer(value)
        elif command == WRITE_AUX_OUTPUT:
            self._answer(value, STATUS_AUX)
        elif command == WRITE_AUX:
            self.ignored += 1
            self._answer(NOBODY, STATUS_AUX | STATUS_TIMEOUT)
        elif self._keyboard is not None:  # which the controller switches on to be heard
            self._command_byte &= ~COMMAND_BYTE_NO_KEYBOARD
            self._keyboard.receive(value)
        else:
            self.ignored += 1
        self._fetch()

    def _fetch(self) -> None:
        """Take the keyboard's next byte, where the guest has taken the last one."""
        off = self._command_byte & COMMAND_BYTE_NO_KEYBOARD
        if self._keyboard is None or off or self._status & STATUS_OUTPUT:
            return
        while (value := self._keyboard.fetch()) is not None:
            if self._command_byte & COMMAND_BYTE_TRANSLATE:
                if value == _BREAK:
                    self._released = True
                    continue
                value = translated(value) | 0x80 * self._released
                self._released = False
            self._answer(value)
            return

    def _answer(self, value: int, flags: int = 0) -> None:
        self._output = value
        self._status = self._status & ~(STATUS_AUX | STATUS_TIMEOUT) | STATUS_OUTPUT | flags
        self._settle()

    def _settle(self) -> None:
        """Bring the interrupt lines up to what the registers say."""
        full, aux = self._status & STATUS_OUTPUT, self._status & STATUS_AUX
        wanted = (
            bool(full and not aux and self._command_byte & COMMAND_BYTE_INTERRUPT),
            bool(full and aux and self._command_byte & COMMAND_BYTE_AUX_INTERRUPT),
        )
        for number, level in enumerate(wanted):
            if level != self._levels[number]:
                self._levels[number] = level
                self._lines[number](level)


def translated(code: int) -> int:
    """A byte of scan code set 2 in set 1, prefix of keys that go up apart."""
    return _SET_1.get(code, code)
