"""A command line as bytes: the one check that every boot makes."""

from __future__ import annotations

from linux_loader.errors import CmdlineError

__all__ = ["encode_cmdline"]


def encode_cmdline(text: str, capacity: int) -> bytes:
    r"""Return a command line as the guest reads it, with its NUL.

    Args:
        text: the whole line.
        capacity: the most characters the kernel takes, its NUL not counted.

    Raises:
        CmdlineError: a character is not printable ASCII, or there are too many.

    >>> encode_cmdline("console=ttyS0", 255)
    b'console=ttyS0\x00'
    """
    if not (text.isascii() and text.isprintable()):
        for index, character in enumerate(text):
            if not " " <= character <= "~":
                raise CmdlineError(
                    "cmdline", index, character, "only printable ASCII reaches the kernel unharmed"
                )
    if len(text) > capacity:
        raise CmdlineError(
            "cmdline", None, len(text), f"this kernel takes {capacity} characters: shorten it"
        )
    return text.encode("ascii") + b"\0"
