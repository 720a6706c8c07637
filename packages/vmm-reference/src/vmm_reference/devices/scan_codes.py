"""What a keyboard of 104 keys says of each key, in the three scan code sets.

Keys have the names that Linux has for them. Set 1 is that of the PC/XT, and what a controller makes
of set 2; set 3, of IBM's terminals, has one byte for each key. Sources are IBM's Personal System/2
Hardware Interface Technical Reference, keyboards, and Microsoft's keyboard scan code specification.
"""

from __future__ import annotations

from vmm_reference.errors import ConfigError

from .i8042 import SET_2

__all__ = ["BREAKS", "KEYS", "REPEATS", "SEQUENCES", "TYPES_3", "code_3", "keys_of", "scan_code"]

_EXTENDED, _EXTENDED_TOO, _BREAK = 0xE0, 0xE1, 0xF0

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
"""Whether a key's code stands behind E0, and its code in set 1."""

SEQUENCES = {
    "sysrq": (bytes.fromhex("e0 2a e0 37"), bytes.fromhex("e0 b7 e0 aa")),
    "pause": (bytes.fromhex("e1 1d 45 e1 9d c5"), b""),
}
"""Keys that say more, down and up, in set 1: print screen behind a shift, and pause all at once."""

_OTHERS_3 = {
    "esc": 0x08, "f1": 0x07, "f2": 0x0F, "f3": 0x17, "f4": 0x1F, "f5": 0x27, "f6": 0x2F, "f7": 0x37,
    "f8": 0x3F, "f9": 0x47, "f10": 0x4F, "f11": 0x56, "f12": 0x5E, "102nd": 0x13, "backslash": 0x5C,
    "capslock": 0x14, "leftctrl": 0x11, "leftalt": 0x19, "scrolllock": 0x5F, "numlock": 0x76,
    "kpminus": 0x84, "kpplus": 0x7C, "kpasterisk": 0x7E, "kpenter": 0x79, "kpslash": 0x77,
    "rightctrl": 0x58, "rightalt": 0x39, "home": 0x6E, "up": 0x63, "pageup": 0x6F, "left": 0x61,
    "right": 0x6A, "end": 0x65, "down": 0x60, "pagedown": 0x6D, "insert": 0x67, "delete": 0x64,
    "leftmeta": 0x8B, "rightmeta": 0x8C, "compose": 0x8D, "sysrq": 0x57, "pause": 0x62,
}  # fmt: skip

REPEATS, BREAKS = 1, 2
"""Of a key in set 3: whether it repeats while it is down, and whether it tells that it goes up."""

_BREAKING = ("leftshift", "rightshift", "leftctrl", "leftalt", "capslock")
_SILENT = (
    *("esc", "sysrq", "scrolllock", "pause", "numlock", "insert", "home", "pageup", "end"),
    *("pagedown", "rightctrl", "rightalt", "leftmeta", "rightmeta", "compose"),
    *(f"f{number}" for number in range(1, 13)),
    *(f"kp{number}" for number in range(10)),
    *("kpminus", "kpasterisk", "kpenter", "kpslash", "kpdot"),
)

_PLAIN = dict(zip("`-=[]\\;',./ \n\t\b\x1b", (
    "grave", "minus", "equal", "leftbrace", "rightbrace", "backslash", "semicolon", "apostrophe",
    "comma", "dot", "slash", "space", "enter", "tab", "backspace", "esc",
), strict=True))  # fmt: skip
_SHIFTED = dict(zip('~!@#$%^&*()_+{}|:"<>?', "`1234567890-=[]\\;',./", strict=True))


def code_3(name: str) -> int:
    """A key's code in set 3."""
    other = _OTHERS_3.get(name)
    return SET_2[KEYS[name][1]] if other is None else other


def _types_3() -> bytes:
    types = bytearray(256)
    for name in (*KEYS, *SEQUENCES):
        types[code_3(name)] = BREAKS if name in _BREAKING else 0 if name in _SILENT else REPEATS
    return bytes(types)


TYPES_3 = _types_3()
"""`REPEATS` and `BREAKS` of each key by its code in set 3, until software changes them."""


def scan_code(name: str, *, down: bool, number: int = 2) -> bytes:
    """What the keyboard says of a key in a scan code set, 1 to 3.

    Example:
        >>> [scan_code("up", down=False, number=number).hex() for number in (1, 2, 3)]
        ['e0c8', 'e0f075', 'f063']
    """
    if number == 3:
        return bytes([code_3(name)] if down else [_BREAK, code_3(name)])
    if name in SEQUENCES:
        codes = SEQUENCES[name][0 if down else 1]
    else:
        extended, code = KEYS[name]
        codes = bytes([_EXTENDED] * extended + [code if down else code | 0x80])
    if number == 1:
        return codes
    return b"".join(map(_in_set_2, codes))


def _in_set_2(code: int) -> bytes:
    """A byte of set 1 in set 2."""
    if code in (_EXTENDED, _EXTENDED_TOO):
        return bytes([code])
    return bytes([_BREAK] if code & 0x80 else []) + SET_2[code & 0x7F : (code & 0x7F) + 1]


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
