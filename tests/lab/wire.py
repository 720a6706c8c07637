"""What host and agent say to each other: frames over one virtio-serial port.

A frame is its kind, the number of the job it belongs to, the length of its body, and the body.
Frames of a job that has ended are ignored by both sides.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct("<BII")

# To the agent.
START = 1  # body: see `pack_start`
STDIN = 2  # bytes for the job; an empty body is the end of them
RESIZE = 3  # body: WINDOW
SIGNAL = 4  # body: NUMBER; to the command itself, or SIGKILL to all of the job

# From the agent.
READY = 16  # the lab takes jobs
STDOUT = 17
STDERR = 18
TAKEN = 19  # body: NUMBER; so many bytes of STDIN have reached the job
EXIT = 20  # body: NUMBER; the exit status, 128 + n after signal n

NUMBER = struct.Struct("<I")
_COUNTS = struct.Struct("<B5I")
WINDOW = struct.Struct("<HH")  # rows, columns

STDIN_WINDOW = 65536
"""How many bytes of STDIN may be on their way, not yet TAKEN."""

PORT = "lab.agent"
"""The name of the virtio-serial port."""


def frame(kind: int, job: int, body: bytes = b"") -> bytes:
    """One frame as bytes."""
    return HEADER.pack(kind, job, len(body)) + body


def frames(buffer: bytearray) -> list[tuple[int, int, bytes]]:
    """Take the complete frames off the front of a buffer, as (kind, job, body)."""
    found = []
    at = 0
    while len(buffer) - at >= HEADER.size:
        kind, job, length = HEADER.unpack_from(buffer, at)
        end = at + HEADER.size + length
        if len(buffer) < end:
            break
        found.append((kind, job, bytes(buffer[at + HEADER.size : end])))
        at = end
    del buffer[:at]
    return found


class Start:
    """The body of START: what to run and how.

    Attributes:
        pty: standard input, output and error are one pseudo-terminal.
        cwd: the working directory.
        argv: the command.
        env: its environment, as NAME=VALUE.
        shares: folders that are shared with the host.
        warm: files to keep in memory from job to job, as SIZE:MTIME_NS:PATH; those of size -1
            are no more.
    """

    def __init__(
        self,
        pty: bool,
        cwd: bytes,
        argv: list[bytes],
        env: list[bytes],
        shares: list[bytes],
        warm: list[bytes],
    ) -> None:
        self.pty = pty
        self.cwd = cwd
        self.argv = argv
        self.env = env
        self.shares = shares
        self.warm = warm

    def pack(self) -> bytes:
        """As bytes.

        Raises:
            ValueError: a string holds a NUL, which neither a path nor an argument can.
        """
        lists = ([self.cwd], self.argv, self.env, self.shares, self.warm)
        if any(b"\0" in string for strings in lists for string in strings):
            raise ValueError("arguments, environment and paths hold no NUL byte")
        counts = _COUNTS.pack(self.pty, *map(len, lists))
        return counts + b"\0".join(string for strings in lists for string in strings)

    @classmethod
    def unpack(cls, body: bytes) -> Start:
        """The inverse of `pack`."""
        pty, *counts = _COUNTS.unpack_from(body)
        strings = iter(body[_COUNTS.size :].split(b"\0"))
        (cwd,), argv, env, shares, warm = [[next(strings) for _ in range(n)] for n in counts]
        return cls(bool(pty), cwd, argv, env, shares, warm)
