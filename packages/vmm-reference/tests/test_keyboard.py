"""A keyboard on its controller: commands, keys, translation, interrupts, and a guest that reads."""

from __future__ import annotations

import re
import threading
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.devices.i8042 import I8042
from vmm_reference.devices.keyboard import BUFFER, Controls, Keyboard
from vmm_reference.devices.scan_codes import KEYS, SEQUENCES, code_3, keys_of, scan_code
from vmm_reference.errors import ConfigError
from vmm_reference.machine import Machine
from vmm_reference.testing import tiny_kernel

DATA, COMMAND = 0, 4
FULL = 1


class Bench:
    """A controller with a keyboard, switched on without translation, and its interrupts."""

    def __init__(self, command_byte: int = 0x05) -> None:
        self.levels: list[bool] = []
        self.taken = threading.Event()
        self._seconds: float | None = None
        self.keyboard = Keyboard(self.taken.set, self._timer)
        self.controller = I8042(lambda: None, self.levels.append)
        self.controller.connect(self.keyboard)
        self.controller.write(COMMAND, b"\x60")
        self.controller.write(DATA, bytes([command_byte]))

    def _timer(self, seconds: float | None) -> None:
        self._seconds = seconds

    def due(self) -> float | None:
        """Seconds until a key repeats."""
        return self._seconds

    def tell(self, *values: int) -> bytes:
        """Send bytes to the keyboard; what it answers."""
        answer = b""
        for value in values:
            self.controller.write(DATA, bytes([value]))
            answer += self.read()
        return answer

    def read(self) -> bytes:
        """All that there is."""
        found = bytearray()
        while self.controller.read(COMMAND, 1)[0] & FULL:
            found += self.controller.read(DATA, 1)
        return bytes(found)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        ((0xFF,), "faaa"),
        ((0xF2,), "faab83"),
        ((0xEE,), "ee"),
        ((0xED, 0x07), "fafa"),
        ((0xF3, 0x20), "fafa"),
        ((0xF0, 0x00), "fafa02"),
        ((0xF0, 0x02), "fafa"),
        ((0xF0, 0x03, 0xF0, 0x00), "fafafafa03"),
        ((0xF0, 0x01, 0xF0, 0x00, 0xFF, 0xF0, 0x00), "fafafafa01faaafafa02"),
        ((0xF0, 0x04), "fafe"),
        ((0xFC, 0x1C, 0x32, 0xF0, 0x00), "fafafafafa02"),
        ((0xF7, 0xF8, 0xF9), "fafafa"),
        ((0xF4,), "fa"),
        ((0xF5,), "fa"),
        ((0xF6,), "fa"),
        ((0xFA,), "fa"),
        ((0xFE,), "00"),
        ((0x55,), "fe"),
        ((0xED, 0xF2), "fafaab83"),
    ],
)
def test_commands(sent: tuple[int, ...], answer: str) -> None:
    """Each is answered as a keyboard answers; a command in the place of data is a command."""
    assert Bench().tell(*sent).hex() == answer


def test_lights_and_the_self_tests() -> None:
    """The controller finds a keyboard's line; lights are as they were set until a reset."""
    bench = Bench()
    bench.controller.write(COMMAND, b"\xab")
    assert bench.read() == b"\0"
    bench.tell(0xED, 0x0E)
    assert bench.keyboard.metrics()["leds"] == 6
    bench.tell(0xFF)
    assert bench.keyboard.leds == 0
    assert bench.tell(0xFE) == b"\xaa"


def test_keys_in_both_sets() -> None:
    """As the keyboard says them, and as a PC's software from before hears them."""
    plain, translating = Bench(), Bench(0x45)
    for bench in (plain, translating):
        for name in ("a", "up", "f7", "rightctrl"):
            assert bench.keyboard.press(name)
            assert bench.keyboard.press(name, down=False)
    assert plain.read().hex() == "1cf01ce075e0f07583f083e014e0f014"
    assert translating.read().hex() == "1e9ee048e0c841c1e01de09d"
    assert plain.keyboard.dropped == translating.keyboard.dropped == 0


# As Linux' driver knows set 3, in its own order of codes: the keys from 0x07 on.
SET_3 = {
    "f1": 0x07, "esc": 0x08, "tab": 0x0D, "grave": 0x0E, "f2": 0x0F, "leftctrl": 0x11,
    "leftshift": 0x12, "102nd": 0x13, "capslock": 0x14, "q": 0x15, "1": 0x16, "f3": 0x17,
    "leftalt": 0x19, "z": 0x1A, "s": 0x1B, "a": 0x1C, "w": 0x1D, "2": 0x1E, "f4": 0x1F, "c": 0x21,
    "x": 0x22, "d": 0x23, "e": 0x24, "4": 0x25, "3": 0x26, "f5": 0x27, "space": 0x29, "v": 0x2A,
    "f": 0x2B, "t": 0x2C, "r": 0x2D, "5": 0x2E, "f6": 0x2F, "n": 0x31, "b": 0x32, "h": 0x33,
    "g": 0x34, "y": 0x35, "6": 0x36, "f7": 0x37, "rightalt": 0x39, "m": 0x3A, "j": 0x3B, "u": 0x3C,
    "7": 0x3D, "8": 0x3E, "f8": 0x3F, "comma": 0x41, "k": 0x42, "i": 0x43, "o": 0x44, "0": 0x45,
    "9": 0x46, "f9": 0x47, "dot": 0x49, "slash": 0x4A, "l": 0x4B, "semicolon": 0x4C, "p": 0x4D,
    "minus": 0x4E, "f10": 0x4F, "apostrophe": 0x52, "leftbrace": 0x54, "equal": 0x55, "f11": 0x56,
    "sysrq": 0x57, "rightctrl": 0x58, "rightshift": 0x59, "enter": 0x5A, "rightbrace": 0x5B,
    "backslash": 0x5C, "f12": 0x5E, "scrolllock": 0x5F, "down": 0x60, "left": 0x61, "pause": 0x62,
    "up": 0x63, "delete": 0x64, "end": 0x65, "backspace": 0x66, "insert": 0x67, "kp1": 0x69,
    "right": 0x6A, "kp4": 0x6B, "kp7": 0x6C, "pagedown": 0x6D, "home": 0x6E, "pageup": 0x6F,
    "kp0": 0x70, "kpdot": 0x71, "kp2": 0x72, "kp5": 0x73, "kp6": 0x74, "kp8": 0x75,
    "numlock": 0x76, "kpslash": 0x77, "kpenter": 0x79, "kp3": 0x7A, "kpplus": 0x7C, "kp9": 0x7D,
    "kpasterisk": 0x7E, "kpminus": 0x84, "leftmeta": 0x8B, "rightmeta": 0x8C, "compose": 0x8D,
}  # fmt: skip


def test_set_3_has_a_byte_for_each_key() -> None:
    """The ones that a driver of another hand expects."""
    assert {name: code_3(name) for name in (*KEYS, *SEQUENCES)} == SET_3


def test_keys_in_set_3_are_of_three_types() -> None:
    """Some repeat, some tell that they go up, some do neither; software chooses others."""
    bench = Bench()
    bench.tell(0xF0, 3)

    def strokes(name: str) -> str:
        bench.keyboard.press(name)
        for _ in range(2):
            if bench.due() is not None:
                bench.keyboard.repeat()
        bench.keyboard.press(name, down=False)
        assert bench.due() is None
        return bench.read().hex()

    assert [strokes(name) for name in ("a", "leftctrl", "f1")] == ["1c1c1c", "11f011", "07"]
    bench.tell(0xFC, 0x1C)
    assert [strokes(name) for name in ("a", "b")] == ["1cf01c", "323232"]
    bench.tell(0xFA)
    assert [strokes(name) for name in ("f1", "a")] == ["070707f007", "1c1c1cf01c"]
    bench.tell(0xF9)
    assert strokes("leftctrl") == "11"
    bench.tell(0xF6)
    assert [strokes(name) for name in ("a", "leftctrl", "f1")] == ["1c1c1c", "11f011", "07"]


@pytest.mark.parametrize(
    ("number", "byte", "wanted"),
    [
        (1, 0x05, "e02ae037e037e0b7e0aae11d45e19dc5"),
        (2, 0x05, "e012e07ce07ce0f07ce0f012e11477e1f014f077"),
        (2, 0x45, "e02ae037e037e0b7e0aae11d45e19dc5"),
        (3, 0x05, "5762"),
    ],
)
def test_print_screen_and_pause(number: int, byte: int, wanted: str) -> None:
    """Print screen comes behind a shift and repeats without; pause is up as soon as it is down."""
    bench = Bench(byte)
    bench.tell(0xF0, number)
    found = b""
    for name in SEQUENCES:
        bench.keyboard.press(name)
        found += bench.read()
        if bench.due() is not None:
            bench.keyboard.repeat()
            found += bench.read()
        bench.keyboard.press(name, down=False)
        found += bench.read()
    assert found.hex() == wanted


def test_the_key_that_went_down_last_repeats() -> None:
    """After the delay, at the rate, until it goes up or another key goes down."""
    bench = Bench()
    bench.tell(0xF3, 0x00)  # 250 ms, 30 a second
    bench.keyboard.press("leftshift")
    bench.keyboard.press("a")
    assert bench.due() == 0.25
    bench.read()
    bench.keyboard.repeat()
    assert bench.due() == pytest.approx(1 / 30)
    bench.keyboard.repeat()
    assert bench.read() == b"\x1c\x1c"
    bench.keyboard.press("leftshift", down=False)
    assert bench.due() is not None
    bench.keyboard.press("b")
    assert bench.due() == 0.25
    bench.keyboard.press("a", down=False)
    bench.keyboard.stop_time()
    assert bench.due() is None
    bench.keyboard.start_time()
    bench.read()
    for _ in range(100):
        bench.keyboard.repeat()
    assert bench.read() == b"\x32" * (BUFFER + 1)  # what finds no room is not said
    bench.keyboard.press("b", down=False)
    assert bench.due() is None
    bench.keyboard.repeat()  # late
    assert bench.read() == b"\xf0\x32"
    bench.tell(0xF3, 0x7F)
    assert (bench.keyboard.delay, bench.keyboard.period) == (1.0, 0.5)
    assert bench.keyboard.metrics()["repeated"] == 2 + BUFFER + 1


def test_only_what_is_held_repeats() -> None:
    """The owner's typing does not; what he holds does, until he lets it go or types."""
    bench = Bench()
    controls = Controls(bench.keyboard, threading.Lock(), bench.taken)
    controls.press("leftshift", "a")
    assert bench.due() is None
    bench.read()
    controls.hold("leftshift", "b")
    assert bench.due() == 0.5
    controls.let_go("b", "leftshift")
    assert bench.due() is None
    assert bench.read().hex() == "1232f032f012"
    controls.hold("c")
    controls.type("d")
    assert bench.due() is None


@pytest.mark.parametrize("command", [0xFF, 0xF6, 0xF5, 0xF4])
def test_no_key_repeats_after_a_command_that_clears(command: int) -> None:
    """Reset, defaults, and switching scanning off or on."""
    bench = Bench()
    bench.keyboard.press("a")
    assert bench.due() == 0.5
    bench.tell(command)
    bench.read()
    assert bench.due() is None
    bench.keyboard.repeat()
    assert bench.read() == b""


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_translated_to_its_code(name: str) -> None:
    """Down and up, with its prefix where it has one."""
    bench = Bench(0x45)
    bench.keyboard.press(name)
    bench.keyboard.press(name, down=False)
    extended, code = KEYS[name]
    prefix = b"\xe0" if extended else b""
    assert bench.read() == prefix + bytes([code]) + prefix + bytes([code | 0x80])


def test_interrupts_are_edges() -> None:
    """One for each byte: the line falls when the guest takes a byte, whatever waits behind it."""
    bench = Bench()
    bench.keyboard.press("a")
    bench.keyboard.press("a", down=False)
    assert bench.levels == [True]
    assert bench.read() == b"\x1c\xf0\x1c"
    assert bench.levels == [True, False] * 3
    bench.controller.write(COMMAND, b"\xad")
    bench.keyboard.press("b")
    assert bench.read() == b""
    bench.controller.write(COMMAND, b"\xae")
    assert bench.read() == b"\x32"


def test_a_keyboard_that_may_not_scan_says_nothing() -> None:
    """What is pressed then is lost and counted, as are presses that find no room."""
    bench = Bench()
    bench.tell(0xF5)
    assert bench.keyboard.press("a")
    assert (bench.read(), bench.keyboard.dropped) == (b"", 1)
    bench.tell(0xF4)
    taken = sum(bench.keyboard.press("a") for _ in range(1000))
    assert taken == BUFFER + 1  # one is with the controller
    assert bench.keyboard.metrics()["waiting_bytes"] == BUFFER


@pytest.mark.parametrize("character", [chr(n) for n in range(32, 127)] + ["\n", "\t"])
def test_text_is_keys(character: str) -> None:
    """Every character of ASCII has one, with shift where the legend is the upper one."""
    *held, name = keys_of(character)
    assert name in KEYS
    assert held == ["leftshift"] * (character.isupper() or character in '~!@#$%^&*()_+{}|:"<>?')


def test_what_is_on_no_key_is_refused_before_anything_is_typed() -> None:
    """By name."""
    bench = Bench()
    controls = Controls(bench.keyboard, threading.Lock(), bench.taken)
    with pytest.raises(ConfigError, match="'é'"):
        controls.type("aé")
    with pytest.raises(ConfigError, match="key: hyper"):
        controls.press("hyper")
    assert bench.read() == b""
    with pytest.raises(TimeoutError, match="does not fetch"):
        controls.type("x" * 20, timeout=0.01)


def test_whoever_types_waits_for_the_guest() -> None:
    """More than fits arrives whole when it is fetched."""
    bench = Bench()
    lock = threading.Lock()
    controls = Controls(bench.keyboard, lock, bench.taken)
    text = "The quick brown fox." * 5
    typist = threading.Thread(target=controls.type, args=(text,))
    typist.start()
    found = b""
    while typist.is_alive():
        with lock:
            found += bench.read()
        assert bench.due() is None  # what waits to go up does not repeat
    typist.join()
    found += bench.read()
    wanted = b""
    for character in text:
        names = keys_of(character)
        wanted += b"".join(scan_code(name, down=True) for name in names)
        wanted += b"".join(scan_code(name, down=False) for name in reversed(names))
    assert found == wanted


class Model:
    """A keyboard in the plainest form: what it has still to say, in order."""

    def __init__(self) -> None:
        self.answers: deque[int] = deque()
        self.codes: deque[int] = deque()
        self.scanning = True


events = st.lists(
    st.one_of(
        st.tuples(st.just("key"), st.sampled_from(["a", "up", "f7"]), st.booleans()),
        st.tuples(st.just("read"), st.just(""), st.just(False)),
        st.tuples(st.sampled_from(["enable", "disable", "echo"]), st.just(""), st.just(False)),
    ),
    max_size=60,
)


@given(events)
def test_against_a_plain_model(events: list[tuple[str, str, bool]]) -> None:
    """Bytes come once, in order, answers first; the buffer never has more than its size."""
    bench, model = Bench(), Model()
    held: list[int] = []  # with the controller

    def pull() -> None:
        queue = model.answers or model.codes
        if not held and queue:
            held.append(queue.popleft())

    for kind, name, down in events:
        if kind == "key":
            code = scan_code(name, down=down)
            fits = len(code) <= BUFFER - len(model.codes)
            assert bench.keyboard.press(name, down=down) is (fits or not model.scanning)
            if fits and model.scanning:
                model.codes.extend(code)
        elif kind == "read":
            value = bench.controller.read(DATA, 1)[0]
            if held:
                assert value == held.pop()
        else:
            command = {"enable": 0xF4, "disable": 0xF5, "echo": 0xEE}[kind]
            bench.controller.write(DATA, bytes([command]))
            model.answers.clear()
            if kind != "echo":
                model.codes.clear()
                model.scanning = kind == "enable"
            model.answers.append(0xEE if kind == "echo" else 0xFA)
        pull()
        assert bool(bench.controller.read(COMMAND, 1)[0] & FULL) is bool(held)
        assert len(model.codes) <= BUFFER


@given(st.lists(st.tuples(st.sampled_from([DATA, COMMAND]), st.binary(max_size=3)), max_size=40))
def test_state_is_the_whole_device(accesses: list[tuple[int, bytes]]) -> None:
    """Any accesses, between presses: a restored twin goes on exactly the same."""
    one, two = Bench(), Bench()
    for offset, data in accesses:
        two.keyboard.restore(one.keyboard.save())
        two.controller.restore(one.controller.save())
        for bench in (one, two):
            bench.controller.write(offset, data)
            bench.keyboard.press("down")
        assert one.controller.read(offset, 1) == two.controller.read(offset, 1)
        assert one.keyboard.save() == two.keyboard.save()
        assert one.controller.save() == two.controller.save()


# Reads set 1 by polling and tells of each code that goes down, as a digit of its lower half.
READER = """
    movb $0x60, %al
    outb %al, $0x64
    movb $0x45, %al
    outb %al, $0x60
    PUT 's'
1:  inb $0x64, %al
    testb $1, %al
    jz 1b
    inb $0x60, %al
    testb $0x80, %al
    jnz 1b
    movb %al, %bl
2:  movw $0x3fd, %dx
    inb %dx, %al
    testb $0x20, %al
    jz 2b
    movb %bl, %al
    addb $0x40, %al
    movw $0x3f8, %dx
    outb %al, %dx
    jmp 1b
"""


@pytest.mark.kvm
def test_a_guest_reads_what_is_typed(tmp_path: Path) -> None:
    """All of it, and after a restore it goes on."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel(READER))
    config = MachineConfig(kernel=str(path), memory="32M", devices=[parse_device("keyboard")])
    codes = {character: KEYS[keys_of(character)[-1]][1] for character in "hello world"}
    wanted = "".join(chr(0x40 + codes[character]) for character in "hello world")
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        machine.device("keyboard0").type("hello world")
        assert machine.console.expect(r"(?s).{11}", 30)[0] == wanted
        assert machine.metrics()["keyboard0"]["dropped"] == 0
        machine.snapshot(tmp_path / "snapshot")
    with Machine.restore(tmp_path / "snapshot") as machine:
        machine.device("keyboard0").press("h")
        machine.console.expect(chr(0x40 + codes["h"]), 30)


@pytest.mark.kvm
def test_three_keys_that_end_most_guests(tmp_path: Path) -> None:
    """Control, Alt and Delete, in this order; a machine without a keyboard says what it lacks."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel(READER))
    config = MachineConfig(kernel=str(path), memory="32M", devices=[parse_device("keyboard")])
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        machine.send_ctrl_alt_del()
        # What the guest prints for codes 0x1D, 0x38 and (0xE0) 0x53, of which the last is no text.
        machine.console.expect("]x\N{REPLACEMENT CHARACTER}", 30)
    without = MachineConfig(kernel=str(path), memory="32M")
    with Machine(without) as machine, pytest.raises(ConfigError, match="keyboard"):
        machine.send_ctrl_alt_del()


@pytest.mark.kvm
def test_a_key_that_is_held_repeats_in_a_guest(tmp_path: Path) -> None:
    """Until it is let go, and not while the machine is paused."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel(READER))
    config = MachineConfig(kernel=str(path), memory="32M", devices=[parse_device("keyboard")])
    letter = re.escape(chr(0x40 + KEYS["a"][1]))
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        controls = machine.device("keyboard0")
        controls.hold("a")
        machine.console.expect(f"({letter}){{3}}", 30)
        machine.pause()
        count = controls.keyboard.repeated
        machine.resume()
        machine.console.expect(f"({letter}){{2}}", 30)
        assert controls.keyboard.repeated > count >= 2
        controls.let_go("a")
        controls.press("b")
        machine.console.expect(chr(0x40 + KEYS["b"][1]), 30)
