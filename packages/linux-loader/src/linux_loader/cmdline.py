"""The kernel command line: built from parts, checked, never ambiguous to the guest."""

from __future__ import annotations

import attrs

from linux_loader.encode import encode_cmdline
from linux_loader.errors import CmdlineError

__all__ = ["Cmdline"]

_CAPACITY = 2047


def _split(text: str) -> list[str]:
    """Split at the blanks outside quotes, as `next_arg` of Linux does."""
    words: list[str] = []
    start, quoted = 0, False
    for index, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif character == " " and not quoted:
            if index > start:
                words.append(text[start:index])
            start = index + 1
    if quoted:
        raise CmdlineError("cmdline", text.rindex('"'), text, "the quotation mark must be closed")
    if start < len(text):
        words.append(text[start:])
    return words


def _check_words(
    _: Cmdline, attribute: attrs.Attribute[tuple[str, ...]], words: tuple[str, ...]
) -> None:
    for word in words:
        encode_cmdline(word, len(word))
        if _split(word) != [word]:
            raise CmdlineError(attribute.name, None, word, "must be one word; quote its blanks")
        # Linux strips quotation marks before it looks for the end of its parameters.
        if attribute.name == "parameters" and word.replace('"', "") == "--":
            raise CmdlineError(attribute.name, None, word, "ends the parameters: use with_init")


@attrs.frozen
class Cmdline:
    """A command line: parameters for the kernel, then, behind `--`, arguments for init.

    A value: each `with_…` method returns a longer one. What it accepts, `parse` reads back from
    its text word for word.

    Attributes:
        parameters: words for the kernel, quoted where they hold blanks.
        init_args: words that the kernel hands to init unread.

    >>> line = Cmdline().with_parameter("console", "ttyS0").with_flag("quiet")
    >>> line = line.with_parameter("dyndbg", "file ec.c +p").with_init("single")
    >>> print(line)
    console=ttyS0 quiet dyndbg="file ec.c +p" -- single
    >>> Cmdline.parse(str(line)) == line
    True
    """

    parameters: tuple[str, ...] = attrs.field(default=(), validator=_check_words)
    init_args: tuple[str, ...] = attrs.field(default=(), validator=_check_words)

    @classmethod
    def parse(cls, text: str) -> Cmdline:
        """Take a line apart at its blanks and at its first unquoted `--`.

        Raises:
            CmdlineError: a character is not printable ASCII, or a quotation mark stays open.
        """
        encode_cmdline(text, len(text))
        words = _split(text)
        cut = words.index("--") if "--" in words else len(words)
        return cls(tuple(words[:cut]), tuple(words[cut + 1 :]))

    def with_parameter(self, name: str, *values: str) -> Cmdline:
        """Append `name=value`; several values are joined by commas, blanks are quoted.

        Raises:
            CmdlineError: the kernel could not read these back: an empty name, one with a blank,
                `=` or a quotation mark; no value; a quotation mark in a value; a comma in one of
                several values.
        """
        if not values:
            raise CmdlineError("parameter", None, name, "needs a value; or use with_flag")
        for value in values:
            if '"' in value:
                raise CmdlineError(name, None, value, "a value cannot hold a quotation mark")
            if "," in value and len(values) > 1:
                raise CmdlineError(name, None, value, "a comma would split this value in two")
        joined = ",".join(values)
        if " " in joined:
            joined = f'"{joined}"'
        return self._with_word(name, f"={joined}")

    def with_flag(self, name: str) -> Cmdline:
        """Append a parameter without a value.

        Raises:
            CmdlineError: as for `with_parameter`.
        """
        return self._with_word(name, "")

    def with_init(self, *words: str) -> Cmdline:
        """Append arguments for init; blanks are quoted.

        Raises:
            CmdlineError: a word is empty, or holds a quotation mark or an unprintable character.
        """
        for word in words:
            if not word or '"' in word:
                raise CmdlineError("init", None, word, "must be a word without quotation marks")
        return attrs.evolve(
            self,
            init_args=(*self.init_args, *[f'"{word}"' if " " in word else word for word in words]),
        )

    def with_virtio_mmio(
        self, size: int, address: int, irq: int, device: int | None = None
    ) -> Cmdline:
        """Append `virtio_mmio.device=`, which announces a device where there is no ACPI.

        Args:
            size: bytes of its register window.
            address: guest-physical.
            irq: interrupt number.
            device: number of the platform device, where it matters.

        >>> print(Cmdline().with_virtio_mmio(4096, 0xD0000000, 5))
        virtio_mmio.device=4K@0xd0000000:5
        """
        if size < 1 or address < 0 or irq < 0 or (device is not None and device < 0):
            raise CmdlineError(
                "virtio_mmio.device", None, (size, address, irq, device), "must not be negative"
            )
        text = str(size)
        for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
            if size % (1 << shift) == 0:
                text = f"{size >> shift}{unit}"
                break
        suffix = "" if device is None else f":{device}"
        return self.with_parameter("virtio_mmio.device", f"{text}@{address:#x}:{irq}{suffix}")

    def encode(self, capacity: int = _CAPACITY) -> bytes:
        """Return the line with its NUL.

        Raises:
            CmdlineError: it is longer than `capacity` characters.
        """
        return encode_cmdline(str(self), capacity)

    def __str__(self) -> str:
        """The line as the kernel reads it."""
        words = list(self.parameters)
        if self.init_args:
            words += ["--", *self.init_args]
        return " ".join(words)

    def _with_word(self, name: str, rest: str) -> Cmdline:
        if not name or any(character in ' ="' for character in name):
            raise CmdlineError(
                "parameter", None, name, "a name is not empty and holds no blank, '=' or quote"
            )
        return attrs.evolve(self, parameters=(*self.parameters, name + rest))
