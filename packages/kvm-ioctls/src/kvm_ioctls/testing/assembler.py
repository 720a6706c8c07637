"""Machine code from source, by the GNU assembler and linker."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

__all__ = ["AssemblyError", "assemble"]

_MODES = {16: ("--32", "elf_i386", ".code16\n"), 32: ("--32", "elf_i386", ".code32\n"),
          64: ("--64", "elf_x86_64", ".code64\n")}  # fmt: skip


class AssemblyError(Exception):
    """The assembler or linker refused the source; the text is what it said."""


@functools.lru_cache(maxsize=512)
def assemble(source: str, bits: int = 16, origin: int = 0x1000) -> bytes:
    r"""Assemble and link `source` for the address `origin`.

    Args:
        source: AT&T syntax; statements end with a newline or `;`.
        bits: 16, 32 or 64.
        origin: the address its first byte will have.

    Raises:
        AssemblyError: the source is not accepted, or `as` or `ld` (binutils) is missing.

    >>> assemble("hlt")
    b'\xf4'
    """
    flag, machine, head = _MODES[bits]
    with tempfile.TemporaryDirectory(prefix="kvm-ioctls-") as name:
        folder = Path(name)
        (folder / "guest.s").write_text(head + source + "\n")
        _call(["as", flag, "-o", "guest.o", "guest.s"], folder)
        _call(
            ["ld", "-m", machine, "--oformat", "binary", "-N", "-e", str(origin), "-Ttext",
             hex(origin), "-o", "guest.bin", "guest.o"],
            folder,
        )  # fmt: skip
        return (folder / "guest.bin").read_bytes()


def _call(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError as error:
        raise AssemblyError(f"{command[0]} is not there: install binutils") from error
    if done.returncode:
        raise AssemblyError(done.stderr.strip())
