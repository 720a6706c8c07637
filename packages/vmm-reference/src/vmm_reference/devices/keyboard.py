"""An AT keyboard of 104 keys, with United States' legends, on the controller of `i8042`.

It speaks the scan code sets 1 to 3 (`scan_codes`), set 2 at first, which the controller translates
for those who want set 1. Commands are those of IBM's Personal System/2 Hardware Interface Technical
Reference, keyboards. The host presses its keys; the last one that is held down repeats. What the
guest has not fetched waits in a buffer of 16 bytes, and a press that does not fit is refused, so
that whoever types can wait (`Controls.type`).
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

from .scan_codes import BREAKS, KEYS, REPEATS, SEQUENCES, TYPES_3, code_3, keys_of, scan_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm_reference.wiring import Wiring

    from .states import KeyboardState

__all__ = ["BUFFER", "Controls", "Keyboard", "Keys", "build"]

BUFFER = 16  # bytes

SET_LEDS, ECHO, SCAN_CODE_SET, IDENTIFY, SET_TYPEMATIC = 0xED, 0xEE, 0xF0, 0xF2, 0xF3
ENABLE, DISABLE, SET_DEFAULTS, RESEND, RESET = 0xF4, 0xF5, 0xF6, 0xFE, 0xFF
WITH_DATA = (SET_LEDS, SCAN_CODE_SET, SET_TYPEMATIC)
# Types of the keys in set 3: of all, and of those whose codes follow.
TYPES_OF_ALL = {0xF7: REPEATS, 0xF8: BREAKS, 0xF9: 0, 0xFA: REPEATS | BREAKS}
TYPES_OF_SOME = {0xFB: REPEATS, 0xFC: BREAKS, 0xFD: 0}
ACKNOWLEDGE, PASSED, AGAIN = 0xFA, 0xAA, 0xFE
IDENTITY = (0xAB, 0x83)
DEFAULT_SET = 2
DEFAULT_TYPEMATIC = 0x2B  # 500 ms until a key repeats, 10.9 times a second


class Keyboard:
    """The keyboard, as its controller and the host see it.

    Args:
        taken: called when bytes have left the buffer.
        timer: given the seconds after which `repeat` is to be called, or None for never.

    Attributes:
        leds: those that are lit: bit 0 scroll lock, 1 num lock, 2 caps lock.
        scanning: whether keys are reported.
        dropped: presses that the guest did not want, or found no room.
        repeated: how often keys have repeated.
    """

    def __init__(
        self,
        taken: Callable[[], object] = lambda: None,
        timer: Callable[[float | None], object] = lambda _: None,
    ) -> None:
        self.leds = 0
        self.scanning = True
        self.dropped = self.repeated = 0
        self.ready: Callable[[], object] = lambda: None
        """Set by the controller: called when there is something to fetch."""
        self._taken, self._timer = taken, timer
        self._held = ""  # the key that repeats
        self._set = DEFAULT_SET
        self._types = bytearray(TYPES_3)
        self._typematic = DEFAULT_TYPEMATIC
        self._expecting = 0  # the command whose data byte is to come, or 0
        self._last = 0
        self._answers: deque[int] = deque(maxlen=4)  # come before what keys say
        self._codes: deque[int] = deque()

    @property
    def room(self) -> int:
        """Bytes that the buffer takes now."""
        return BUFFER - len(self._codes)

    @property
    def delay(self) -> float:
        """Seconds that a key is down before it repeats."""
        return 0.25 * ((self._typematic >> 5) + 1)

    @property
    def period(self) -> float:
        """Seconds from one repetition to the next."""
        return float((8 + (self._typematic & 7)) * 2 ** (self._typematic >> 3 & 3)) / 240

    def code(self, name: str, *, down: bool) -> bytes:
        """What a key says now when it goes down, or up; it may be nothing."""
        if self._set == 3 and not down and not self._types[code_3(name)] & BREAKS:
            return b""
        return scan_code(name, down=down, number=self._set)

    def press(self, name: str, *, down: bool = True, held: bool = True) -> bool:
        """A key goes down, or up; False, and nothing happens, where the buffer has no room.

        A keyboard that was told not to scan reports nothing. One that is not held does not repeat,
        however long it takes until there is room for it to go up.
        """
        code = self.code(name, down=down)
        if not self.scanning:
            self.dropped += 1
            return True
        if len(code) > self.room:
            self.dropped += 1
            return False
        if down:
            self._hold(name if held else "")
        elif name == self._held:
            self._hold("")
        self._codes.extend(code)
        self.ready()
        return True

    def repeat(self) -> None:
        """The key that is held down says so again, where there is room."""
        if not self._held:
            return
        code = scan_code(self._held, down=True, number=self._set)
        if self._held == "sysrq":
            code = code[-2:]  # the shift is down already
        if len(code) <= self.room:
            self.repeated += 1
            self._codes.extend(code)
            self.ready()
        self._timer(self.period)

    def stop_time(self) -> None:
        """The machine stands still: nothing repeats."""
        self._timer(None)

    def start_time(self) -> None:
        """The machine goes on."""
        if self._held:
            self._timer(self.period)

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
        elif value in WITH_DATA or value in TYPES_OF_SOME:
            self._expecting = value
            self._say(ACKNOWLEDGE)
        elif value == ECHO:
            self._say(ECHO)
        elif value == IDENTIFY:
            self._say(ACKNOWLEDGE, *IDENTITY)
        elif value in (ENABLE, DISABLE, SET_DEFAULTS):
            self._forget()
            self.scanning = value != DISABLE
            if value != ENABLE:
                self._default()
            self._say(ACKNOWLEDGE)
        elif value in TYPES_OF_ALL:
            self._types = bytearray([TYPES_OF_ALL[value]]) * len(TYPES_3)
            self._say(ACKNOWLEDGE)
        elif value == RESEND:
            self._say(self._last)
        elif value == RESET:
            self._forget()
            self._default()
            self.leds, self.scanning, self._set = 0, True, DEFAULT_SET
            self._say(ACKNOWLEDGE, PASSED)
        else:
            self._say(AGAIN)

    def _data(self, command: int, value: int) -> None:
        if command in TYPES_OF_SOME:
            self._types[value] = TYPES_OF_SOME[command]
            self._expecting = command  # until another command
            self._say(ACKNOWLEDGE)
        elif command == SET_LEDS:
            self.leds = value & 7
            self._say(ACKNOWLEDGE)
        elif command == SET_TYPEMATIC:
            self._typematic = value & 0x7F
            self._say(ACKNOWLEDGE)
        elif value == 0:
            self._say(ACKNOWLEDGE, self._set)
        elif value <= 3:
            self._forget()
            self._set = value
            self._say(ACKNOWLEDGE)
        else:
            self._say(AGAIN)

    def _hold(self, name: str) -> None:
        if name and self._set == 3 and not self._types[code_3(name)] & REPEATS:
            name = ""
        if name == "pause":  # it is up again as soon as it is down
            name = ""
        if name or self._held:
            self._timer(self.delay if name else None)
        self._held = name

    def _forget(self) -> None:
        """What keys have said, and which is down."""
        self._codes.clear()
        self._hold("")

    def _default(self) -> None:
        self._typematic, self._types = DEFAULT_TYPEMATIC, bytearray(TYPES_3)

    def _say(self, *values: int) -> None:
        self._answers.extend(values)
        self.ready()

    def metrics(self) -> dict[str, int]:
        """Presses that were lost, repetitions, bytes that wait, and the lights."""
        return {
            "dropped": self.dropped,
            "repeated": self.repeated,
            "waiting_bytes": len(self._codes),
            "leds": self.leds,
        }

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
            number=self._set,
            types=bytes(self._types),
        )

    def restore(self, state: KeyboardState) -> None:
        """Become the keyboard that `state` was saved from."""
        self.leds, self.scanning = state.leds, state.scanning
        self._typematic, self._last = state.typematic, state.last
        known = state.expecting in WITH_DATA or state.expecting in TYPES_OF_SOME
        self._expecting = state.expecting if known else 0
        self._set, self._types = state.number, bytearray(state.types)
        self._hold("")
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
        strokes = _strokes(names, down=True) + _strokes(names[::-1], down=False)
        self._strokes(strokes, time.monotonic() + timeout)

    def hold(self, *names: str, timeout: float = 10.0) -> None:
        """Hold keys down, of which the last one repeats.

        Raises:
            ConfigError, TimeoutError: as for `press`.
        """
        self._strokes(_strokes(names, down=True), time.monotonic() + timeout, held=True)

    def let_go(self, *names: str, timeout: float = 10.0) -> None:
        """Let keys go.

        Raises:
            ConfigError, TimeoutError: as for `press`.
        """
        self._strokes(_strokes(names, down=False), time.monotonic() + timeout)

    def type(self, text: str, timeout: float = 30.0) -> None:
        """Type a text of ASCII.

        Raises:
            ConfigError: a character is on no key; nothing is typed then.
            TimeoutError: the guest does not fetch what is typed.
        """
        deadline = time.monotonic() + timeout
        for names in [keys_of(character) for character in text]:
            strokes = _strokes(names, down=True) + _strokes(names[::-1], down=False)
            self._strokes(strokes, deadline)

    def _strokes(
        self, strokes: Iterable[tuple[str, bool]], deadline: float, *, held: bool = False
    ) -> None:
        for name, down in strokes:
            while True:
                self._event.clear()
                with self._lock:
                    fits = self.keyboard.room >= len(self.keyboard.code(name, down=down))
                    if fits:
                        self.keyboard.press(name, down=down, held=held)
                        break
                if not self._event.wait(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError("the guest does not fetch what is typed")


def _strokes(names: Iterable[str], *, down: bool) -> list[tuple[str, bool]]:
    for name in names:
        if name not in KEYS and name not in SEQUENCES:
            known = ", ".join([*KEYS, *SEQUENCES])
            raise ConfigError("key", name, f"is none of {known}")
    return [(name, down) for name in names]


def build(config: Keys, wiring: Wiring) -> Controls:
    """A keyboard on the machine's controller."""
    taken = threading.Event()
    controller = wiring.keyboard_controller()
    loop, lock = wiring.loop, wiring.ports.lock(controller)
    wanted = [0]  # the number of the timer that counts; others are late

    def due(number: int) -> None:
        with lock:
            if number == wanted[0]:
                keyboard.repeat()

    def timer(seconds: float | None) -> None:
        wanted[0] += 1
        if seconds is not None:
            number = wanted[0]
            loop.call_soon(lambda: loop.call_later(seconds, lambda: due(number)))

    def stop() -> None:
        with lock:
            keyboard.stop_time()

    def go() -> None:
        with lock:
            keyboard.start_time()

    keyboard = Keyboard(taken.set, timer)
    controller.connect(keyboard)
    wiring.on_pause(stop, go)
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
    return Controls(keyboard, lock, taken)
