"""The keyboard controller of a PC, ports 0x60 and 0x64, without keyboard and mouse.

It is there for what else hangs on it: the reset line of the processor, by which kernels reboot
(`reboot=k`), and the self tests that tell software whether a controller exists.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import I8042State

__all__ = ["I8042"]

DATA, COMMAND = 0, 4  # offsets from port 0x60

STATUS_OUTPUT, STATUS_SYSTEM, STATUS_COMMAND = 0x01, 0x04, 0x08
STATUS_UNLOCKED, STATUS_AUX = 0x10, 0x20

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

COMMAND_BYTE_SYSTEM, COMMAND_BYTE_NO_KEYBOARD, COMMAND_BYTE_NO_AUX = 0x04, 0x10, 0x20
OUTPUT_PORT_RESET, OUTPUT_PORT_A20 = 0x01, 0x02  # the reset line is active low
INPUT_PORT = 0x80  # the keyboard is not locked
PASSED, NO_LINE = 0x55, 0x02  # answers of tests: all well; the clock line is stuck high


class I8042:
    r"""A keyboard controller with nothing plugged in.

    Args:
        reset: is called when the guest pulls the reset line. The controller goes on as it was;
            whoever resets the machine makes a new one.

    Example:
        >>> controller = I8042(reset=lambda: print("reset"))
        >>> controller.write(4, b"\xfe")
        reset
    """

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._status = STATUS_SYSTEM | STATUS_UNLOCKED
        self._command_byte = COMMAND_BYTE_SYSTEM | COMMAND_BYTE_NO_KEYBOARD | COMMAND_BYTE_NO_AUX
        self._output_port = OUTPUT_PORT_RESET | OUTPUT_PORT_A20
        self._output = 0
        self._expecting = 0  # the command whose data byte is to come, or 0

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

    def save(self) -> I8042State:
        """All of the controller's registers."""
        from .states import I8042State

        return I8042State(
            self._status, self._command_byte, self._output_port, self._output, self._expecting
        )

    def restore(self, state: I8042State) -> None:
        """Become the controller that `state` was saved from."""
        self._status = state.status
        self._command_byte = state.command_byte
        self._output_port = state.output_port
        self._output = state.output
        self._expecting = state.expecting if state.expecting in WITH_DATA else 0

    def _read(self, offset: int) -> int:
        if offset == COMMAND:
            return self._status
        if offset == DATA:
            self._status &= ~(STATUS_OUTPUT | STATUS_AUX)
            return self._output
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
        elif command in (TEST_KEYBOARD, TEST_AUX):
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
        elif command >= PULSE and not command & OUTPUT_PORT_RESET:
            self._reset()

    def _data(self, value: int) -> None:
        self._status &= ~STATUS_COMMAND
        command, self._expecting = self._expecting, 0
        if command == WRITE_COMMAND_BYTE:
            self._command_byte = value
        elif command == WRITE_OUTPUT_PORT:
            self._output_port = value | OUTPUT_PORT_RESET
            if not value & OUTPUT_PORT_RESET:
                self._reset()
        elif command == WRITE_KEYBOARD_OUTPUT:
            self._answer(value)
        elif command == WRITE_AUX_OUTPUT:
            self._answer(value)
            self._status |= STATUS_AUX
        # Anything else is for a keyboard or mouse, and there is none to answer.

    def _answer(self, value: int) -> None:
        self._output = value
        self._status = self._status & ~STATUS_AUX | STATUS_OUTPUT
