"""An AT keyboard of 104 keys, with United States' legends, on the controller of `i8042`.

It speaks scan code set 2, which the controller translates for those who want set 1. Commands are
those of IBM's Personal System/2 Hardware Interface Technical Reference, keyboards. The host presses
its keys; what the guest has not fetched waits in a buffer of 16 bytes, and a press that does not
fit is refused, so that whoever types can wait (`Controls.type`).

Not modelled: repetition of keys that are held down, scan code sets 1 and 3.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, ClassVar

import attrs

from vmm_reference.acpi import aml
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError

from .i8042 import SET_2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm_reference.wiring import Wiring

    from .states import KeyboardState

__all__ = ["BUFFER", "KEYS", "Controls", "Keyboard", "Keys", "build", "keys_of", "scan_code"]

BUFFER = 16  # bytes

SET_LEDS, ECHO, SCAN_CODE_SET, IDENTIFY, SET_TYPEMATIC = 0xED, 0xEE, 0xF0, 0xF2, 0xF3
ENABLE, DISABLE, SET_DEFAULTS = 0xF4, 0xF5, 0xF6
KEY_TYPES, RESEND, RESET = range(0xF7, 0xFE), 0xFE, 0xFF
WITH_DATA = (SET_LEDS, SCAN_CODE_SET, SET_TYPEMATIC)
ACKNOWLEDGE, PASSED, AGAIN = 0xFA, 0xAA, 0xFE
IDENTITY = (0xAB, 0x83)
DEFAULT_TYPEMATIC = 0x2B  # 500 ms until a key repeats, 10.9 times a second

_EXTENDED, _BREAK = 0xE0, 0xF0

# Keys by their codes in set 1, which begin at 1.
_NAMES = (
    *("esc", *"1234567890", "minus", "equal", "backspace"),
    *("tab", *"qwertyuiop", "leftbrace", "rightbrace", "enter"),
    *("leftctrl", *"asdfghjkl", "semicolon", "apostrophe", "grave"),
    *("leftshift", "backslash", *"zxcvbnm", "comma", "dot", "slash", "rightshift"),
    *("kpasterisk", "leftalt", "space", "capslock"),
    *("f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9", "f10", "numlock", "scrolllock"),
    *("kp7", "kp8", "kp9", "kpminus", "kp4", "kp5", "kp6", "kpplus"),
    *("kp1", "kp2", "kp3", "kp0", "kpdot"),
)
_MORE = {"102nd": 0x56, "f11": 0x57, "f12": 0x58}
_BEHIND_E0 = {
    "kpenter": 0x1C, "rightctrl": 0x1D, "kpslash": 0x35, "rightalt": 0x38, "home": 0x47, "up": 0x48,
    "pageup": 0x49, "left": 0x4B, "right": 0x4D, "end": 0x4F, "down": 0x50, "pagedown": 0x51,
    "insert": 0x52, "delete": 0x53, "leftmeta": 0x5B, "rightmeta": 0x5C, "compose": 0x5D,
}  # fmt: skip

KEYS: dict[str, tuple[bool, int]] = {
    **{name: (False, code) for code, name in enumerate(_NAMES, 1)},
    **{name: (False, code) for name, code in _MORE.items()},
    **{name: (True, code) for name, code in _BEHIND_E0.items()},
}
"""Whether a key's code stands behind E0, and its code in set 1, by the name that Linux has."""

_PLAIN = dict(zip("`-=[]\\;',./ \n\t\b\x1b", (
    "grave", "minus", "equal", "leftbrace", "rightbrace", "backslash", "semicolon", "apostrophe",
    "comma", "dot", "slash", "space", "enter", "tab", "backspace", "esc",
), strict=True))  # fmt: skip
_SHIFTED = dict(zip('~!@#$%^&*()_+{}|:"<>?', "`1234567890-=[]\\;',./", strict=True))


def scan_code(name: str, *, down: bool) -> bytes:
    """What the keyboard says of a key, in scan code set 2.

    Example:
        >>> scan_code("a", down=True).hex(), scan_code("up", down=False).hex()
        ('1c', 'e0f075')
    """
    extended, code = KEYS[name]
    head = bytes([_EXTENDED] if extended else []) + bytes([] if down else [_BREAK])
    return head + SET_2[code : code + 1]


def keys_of(character: str) -> tuple[str, ...]:
    """The keys to hold down together for a character: the last one is its own.

    Raises:
        ConfigError: no key has it.
    """
    if character in _SHIFTED:
        return "leftshift", *keys_of(_SHIFTED[character])
    if character.isascii() and character.isupper():
        return "leftshift", character.lower()
    name = _PLAIN.get(character, character)
    if name not in KEYS or (len(name) == 1 and not name.isascii()):
        raise ConfigError("text", repr(character), "is on no key of this keyboard")
    return (name,)


class Keyboard:
    """The keyboard, as its controller and the host see it.

    Args:
        taken: called when bytes have left the buffer.

    Attributes:
        leds: those that are lit: bit 0 scroll lock, 1 num lock, 2 caps lock.
        scanning: whether keys are reported.
        dropped: presses that the guest did not want, or found no room.
    """

    def __init__(self, taken: Callable[[], object] = lambda: None) -> None:
        self.leds = 0
        self.scanning = True
        self.dropped = 0
        self.ready: Callable[[], object] = lambda: None
        """Set by the controller: called when there is something to fetch."""
        self._taken = taken
        self._typematic = DEFAULT_TYPEMATIC
        self._expecting = 0  # the command whose data byte is to come, or 0
        self._last = 0
        self._answers: deque[int] = deque(maxlen=4)  # come before what keys say
        self._codes: deque[int] = deque()

    @property
    def room(self) -> int:
        """Bytes that the buffer takes now."""
        return BUFFER - len(self._codes)

    def press(self, name: str, *, down: bool = True) -> bool:
        """A key goes down, or up; False, and nothing happens, where the buffer has no room.

        A keyboard that was told not to scan reports nothing.
        """
        code = scan_code(name, down=down)
        if not self.scanning:
            self.dropped += 1
            return True
        if len(code) > self.room:
            self.dropped += 1
            return False
        self._codes.extend(code)
        self.ready()
        return True

    def fetch(self) -> int | None:
        """The next byte for the controller, if there is one."""
        if self._answers:
            self._last = self._answers.popleft()
        elif self._codes:
            self._last = self._codes.popleft()
            self._taken()
        else:
            return None
        return self._last

    def receive(self, value: int) -> None:
        """A byte from the controller: a command, or the data of one."""
        command, self._expecting = self._expecting, 0
        # What it is told now is answered first, and what it had begun to say is not continued.
        self._answers.clear()
        if command and value < SET_LEDS:
            self._data(command, value)
        elif value in WITH_DATA:
            self._expecting = value
            self._say(ACKNOWLEDGE)
        elif value == ECHO:
            self._say(ECHO)
        elif value == IDENTIFY:
            self._say(ACKNOWLEDGE, *IDENTITY)
        elif value in (ENABLE, DISABLE, SET_DEFAULTS):
            self._codes.clear()
            self._typematic = DEFAULT_TYPEMATIC
            self.scanning = value != DISABLE
            self._say(ACKNOWLEDGE)
        elif value in KEY_TYPES:  # of set 3: taken, without effect on this one
            self._say(ACKNOWLEDGE)
        elif value == RESEND:
            self._say(self._last)
        elif value == RESET:
            self._codes.clear()
            self.leds, self.scanning, self._typematic = 0, True, DEFAULT_TYPEMATIC
            self._say(ACKNOWLEDGE, PASSED)
        else:
            self._say(AGAIN)

    def _data(self, command: int, value: int) -> None:
        if command == SET_LEDS:
            self.leds = value & 7
            self._say(ACKNOWLEDGE)
        elif command == SET_TYPEMATIC:
            self._typematic = value & 0x7F
            self._say(ACKNOWLEDGE)
        elif value == 0:
            self._say(ACKNOWLEDGE, 2)
        else:
            self._say(ACKNOWLEDGE if value == 2 else AGAIN)

    def _say(self, *values: int) -> None:
        self._answers.extend(values)
        self.ready()

    def metrics(self) -> dict[str, int]:
        """Presses that were lost, bytes that wait, and the lights."""
        return {"dropped": self.dropped, "waiting_bytes": len(self._codes), "leds": self.leds}

    def save(self) -> KeyboardState:
        """Everything; keys that are held down are the host's affair."""
        from .states import KeyboardState

        return KeyboardState(
            leds=self.leds,
            scanning=self.scanning,
            typematic=self._typematic,
            expecting=self._expecting,
            last=self._last,
            answers=bytes(self._answers),
            codes=bytes(self._codes),
        )

    def restore(self, state: KeyboardState) -> None:
        """Become the keyboard that `state` was saved from."""
        self.leds, self.scanning = state.leds, state.scanning
        self._typematic, self._last = state.typematic, state.last
        self._expecting = state.expecting if state.expecting in WITH_DATA else 0
        self._answers.clear()
        self._answers.extend(state.answers)
        self._codes = deque(state.codes)


@attrs.frozen
class Keys(DeviceConfig):
    """A keyboard, whose controller ACPI announces then."""

    kind: ClassVar[str] = "keyboard"


class Controls:
    """How the owner of a machine presses keys; from any thread but the I/O loop's.

    Attributes:
        keyboard: for its lights and counters.
    """

    def __init__(self, keyboard: Keyboard, lock: threading.Lock, taken: threading.Event) -> None:
        self.keyboard = keyboard
        self._lock = lock
        self._event = taken

    def press(self, *names: str, timeout: float = 10.0) -> None:
        """Hold keys down together and let them go, such as `press("leftctrl", "leftalt", "f1")`.

        Raises:
            ConfigError: there is no such key.
            TimeoutError: the guest does not fetch what is typed.
        """
        for name in names:
            if name not in KEYS:
                raise ConfigError("key", name, f"is none of {', '.join(KEYS)}")
        strokes = [(name, True) for name in names]
        strokes += [(name, False) for name in reversed(names)]
        self._strokes(strokes, time.monotonic() + timeout)

    def type(self, text: str, timeout: float = 30.0) -> None:
        """Type a text of ASCII.

        Raises:
            ConfigError: a character is on no key; nothing is typed then.
            TimeoutError: the guest does not fetch what is typed.
        """
        deadline = time.monotonic() + timeout
        for names in [keys_of(character) for character in text]:
            strokes = [(name, True) for name in names]
            self._strokes([*strokes, *((name, False) for name in reversed(names))], deadline)

    def _strokes(self, strokes: Iterable[tuple[str, bool]], deadline: float) -> None:
        for name, down in strokes:
            while True:
                self._event.clear()
                with self._lock:
                    fits = self.keyboard.room >= len(scan_code(name, down=down))
                    if fits:
                        self.keyboard.press(name, down=down)
                        break
                if not self._event.wait(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError("the guest does not fetch what is typed")


def build(config: Keys, wiring: Wiring) -> Controls:
    """A keyboard on the machine's controller."""
    taken = threading.Event()
    keyboard = Keyboard(taken.set)
    controller = wiring.keyboard_controller()
    controller.connect(keyboard)
    wiring.keep(keyboard)
    wiring.announce(
        lambda: aml.device(
            "KBD",
            aml.name("_HID", aml.eisa_id("PNP0303")),
            aml.name(
                "_CRS",
                aml.resources(aml.io_ports(0x60, 1), aml.io_ports(0x64, 1), aml.irq(1)),
            ),
        )
    )
    return Controls(keyboard, wiring.ports.lock(controller), taken)
