"""A keyboard on its controller: commands, keys, translation, interrupts, and a guest that reads."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.devices.i8042 import I8042
from vmm_reference.devices.keyboard import (
    BUFFER,
    KEYS,
    Controls,
    Keyboard,
    keys_of,
    scan_code,
)
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
        self.keyboard = Keyboard(self.taken.set)
        self.controller = I8042(lambda: None, self.levels.append)
        self.controller.connect(self.keyboard)
        self.controller.write(COMMAND, b"\x60")
        self.controller.write(DATA, bytes([command_byte]))

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
        ((0xF0, 0x03), "fafe"),
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
