"""The rate of this processor's time-stamp counter, which the lab's kernel is told.

The emulator hands its own processor's counter on. A kernel that has to measure its rate does so at
boot against an emulated timer; where the host takes the emulator's CPU away meanwhile it is far off
(321 MHz for 2596 were seen), its clock runs eight times too fast, and whoever waits there waits
an eighth of what was asked for.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time

__all__ = ["rate"]

READ = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl $32, %rdx; or %rdx, %rax; ret
SPAN = 0.05
"""Seconds between the two looks at it; two looks are a microsecond sharp, so 40 ppm."""


def rate() -> int | None:
    """Its ticks in a millisecond; None on another architecture, or where no code may be written."""
    if platform.machine() != "x86_64":
        return None
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except PermissionError:
        return None
    code.write(READ)
    held = ctypes.c_char.from_buffer(code)
    counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(held))

    def look() -> tuple[int, int]:
        """Nanoseconds and ticks of one moment: of several looks the one least interrupted."""
        looks = []
        for _ in range(20):
            before = time.monotonic_ns()
            ticks = counter()
            looks.append((time.monotonic_ns() - before, before, ticks))
        took, before, ticks = min(looks)
        return before + took // 2, ticks

    start, first = look()
    time.sleep(SPAN)
    end, last = look()
    return round((last - first) * 1_000_000 / (end - start))
