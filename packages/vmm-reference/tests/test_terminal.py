"""The terminal is the guest's while it runs and comes back as it was, whatever ends the VMM."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.backends.terminal import Escape, RawTerminal

# A program that has its terminal in raw mode and then ends in the way it is told.
PROGRAM = """
import os, signal, sys, time
from vmm_reference.backends.terminal import RawTerminal
how = sys.argv[1]
def stop(number, frame):
    raise SystemExit(3)
signal.signal(signal.SIGTERM, stop)
with RawTerminal(0):
    os.write(1, b"raw\\n")
    if how == "return":
        pass
    elif how == "raise":
        raise ValueError("deliberate")
    else:
        while True:  # a signal that comes just before a sleep is noticed after it
            time.sleep(0.05)
"""


@given(st.binary().filter(lambda data: b"\x01" not in data), st.lists(st.integers(0, 5)))
def test_what_holds_no_escape_passes_unchanged(data: bytes, cuts: list[int]) -> None:
    """Bytes without Ctrl-A are the guest's, however they are cut into reads."""
    keys = Escape(lambda: pytest.fail("left without being asked"))
    pieces, position = [], 0
    for cut in cuts:
        pieces.append(data[position : position + cut])
        position += cut
    pieces.append(data[position:])
    assert b"".join(map(keys.filter, pieces)) == data


@given(st.lists(st.sampled_from([b"q", b"\x01x", b"\x01a", b"\x01\x01", b"\x01?"])))
def test_escapes_are_found_across_reads(parts: list[bytes]) -> None:
    """Ctrl-A x leaves, Ctrl-A a and Ctrl-A Ctrl-A send one, any other is swallowed."""
    left: list[int] = []
    keys = Escape(lambda: left.append(1))
    stream = b"".join(parts)
    result = b"".join(keys.filter(stream[i : i + 1]) for i in range(len(stream)))
    meaning = {b"q": b"q", b"\x01a": b"\x01", b"\x01\x01": b"\x01"}
    assert result == b"".join(meaning.get(part, b"") for part in parts)
    assert len(left) == parts.count(b"\x01x")


def _wait_for(fd: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        seen += os.read(fd, 1024)


@pytest.mark.parametrize("how", ["return", "raise", "SIGTERM", "SIGKILL"])
def test_the_terminal_comes_back(how: str) -> None:
    """Mode settings are the same after a return, an exception, SIGTERM and SIGKILL."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdin=slave, stdout=slave, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(master, b"raw")
        if how.startswith("SIG"):
            assert termios.tcgetattr(slave) != before
            process.send_signal(getattr(signal, how))
        process.wait(20)
        deadline = time.monotonic() + 10
        while termios.tcgetattr(slave) != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_raw_mode_hands_over_every_key() -> None:
    """Echo, line editing, signals and newline translation are off while the context lasts."""
    master, slave = pty.openpty()
    with RawTerminal(slave):
        iflag, oflag, _, lflag = termios.tcgetattr(slave)[:4]
        assert not lflag & (termios.ECHO | termios.ICANON | termios.ISIG)
        assert not iflag & (termios.ICRNL | termios.IXON)
        assert not oflag & termios.OPOST
    os.close(master)
    os.close(slave)
