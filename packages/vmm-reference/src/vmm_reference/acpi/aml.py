"""An encoder for the AML that this machine needs: ACPI 6.4, chapter 20, and resources, 6.4.

Every function returns bytes; a tree of calls is a tree of terms. Nothing is read back: what a
kernel makes of it is for `iasl -d` and for kernels to say, and the tests ask both.
"""

from __future__ import annotations

from struct import pack

__all__ = [
    "ARG0",
    "ARG1",
    "BYTE",
    "DWORD",
    "LOCAL0",
    "LOCAL1",
    "and_",
    "buffer",
    "bus_numbers",
    "call",
    "create_qword_field",
    "device",
    "eisa_id",
    "equal",
    "field",
    "if_",
    "integer",
    "interrupt",
    "io_ports",
    "io_window",
    "irq",
    "memory32",
    "memory_window32",
    "memory_window64",
    "method",
    "name",
    "notify",
    "package",
    "resources",
    "return_",
    "scope",
    "store",
    "string",
    "system_io",
]

LOCAL0, LOCAL1 = b"\x60", b"\x61"
ARG0, ARG1 = b"\x68", b"\x69"

BYTE, DWORD = 1, 3  # access types of fields (20.2.5.2)

_NULL_TARGET = b"\0"


def integer(value: int) -> bytes:
    """A constant, in the shortest form (20.2.3).

    Example:
        >>> [integer(n).hex() for n in (0, 1, 2, 0x300, 0x12345678, 1 << 40)]
        ['00', '01', '0a02', '0b0003', '0c78563412', '0e0000000000010000']

    Raises:
        ValueError: it does not fit into 64 bits.
    """
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"value: {value}: must fit into 64 bits")


def string(text: str) -> bytes:
    """A null-terminated ASCII string."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A seven-character identifier such as `PNP0501`, compressed to a number (19.3.4).

    Example:
        >>> eisa_id("PNP0501").hex()
        '0c41d00501'
    """
    vendor = 0
    for letter in text[:3]:
        vendor = vendor << 5 | (ord(letter) - 0x40) & 0x1F
    return b"\x0c" + pack(">HH", vendor, int(text[3:], 16))


def name(path: str, value: bytes) -> bytes:
    """`Name (path, value)`."""
    return b"\x08" + _path(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """`Scope (path) {terms}`."""
    return b"\x10" + _sized(_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """`Device (path) {terms}`."""
    return b"\x5b\x82" + _sized(_path(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """`Method (path, arguments) {terms}`."""
    flags = bytes([arguments | serialized << 3])
    return b"\x14" + _sized(_path(path) + flags + b"".join(terms))


def package(*elements: bytes) -> bytes:
    """`Package () {elements}`."""
    return b"\x12" + _sized(bytes([len(elements)]) + b"".join(elements))


def system_io(path: str, port: int, length: int) -> bytes:
    """`OperationRegion (path, SystemIO, port, length)`."""
    return b"\x5b\x80" + _path(path) + b"\x01" + integer(port) + integer(length)


def field(region: str, *units: tuple[str, int], access: int = BYTE) -> bytes:
    """`Field (region, access, NoLock, Preserve) {units}`; a unit is a name and its bits.

    A unit without a name leaves bits out.
    """
    names = b"".join((_path(unit) if unit else b"\0") + _length(bits) for unit, bits in units)
    return b"\x5b\x81" + _sized(_path(region) + bytes([access]) + names)


def create_qword_field(source: str, offset: int, path: str) -> bytes:
    """`CreateQWordField (source, offset, path)`."""
    return b"\x8f" + _path(source) + integer(offset) + _path(path)


def call(path: str) -> bytes:
    """A call of a method without arguments."""
    return _path(path)


def store(source: bytes | str, target: bytes | str) -> bytes:
    """`Store (source, target)`."""
    return b"\x70" + _term(source) + _term(target)


def and_(left: bytes, right: bytes) -> bytes:
    """`And (left, right)`, for its value."""
    return b"\x7b" + left + right + _NULL_TARGET


def equal(left: bytes, right: bytes) -> bytes:
    """`LEqual (left, right)`."""
    return b"\x93" + left + right


def buffer(content: bytes) -> bytes:
    """`Buffer (length) {content}`."""
    return b"\x11" + _sized(integer(len(content)) + content)


def if_(predicate: bytes, *terms: bytes) -> bytes:
    """`If (predicate) {terms}`."""
    return b"\xa0" + _sized(predicate + b"".join(terms))


def notify(path: str, value: int) -> bytes:
    """`Notify (path, value)`."""
    return b"\x86" + _path(path) + integer(value)


def return_(value: bytes | str) -> bytes:
    """`Return (value)`."""
    return b"\xa4" + _term(value)


def resources(*descriptors: bytes) -> bytes:
    """`ResourceTemplate () {descriptors}`: a buffer of descriptors and the end tag (6.4.2.9)."""
    content = b"".join(descriptors) + b"\x79\0"
    return b"\x11" + _sized(integer(len(content)) + content)


def io_ports(port: int, length: int) -> bytes:
    """`IO (Decode16, port, port, 1, length)` (6.4.2.5)."""
    return pack("<BBHHBB", 0x47, 1, port, port, 1, length)


def irq(number: int) -> bytes:
    """`IRQNoFlags () {number}` (6.4.2.1): edge, active high, of the 8259."""
    return pack("<BH", 0x22, 1 << number)


def memory32(address: int, length: int) -> bytes:
    """`Memory32Fixed (ReadWrite, address, length)` (6.4.3.4)."""
    return pack("<BHBII", 0x86, 9, 1, address, length)


def interrupt(gsi: int, *, level: bool = False) -> bytes:
    """`Interrupt (ResourceConsumer, Edge or Level, ActiveHigh, Exclusive) {gsi}` (6.4.3.6)."""
    return pack("<BHBBI", 0x89, 6, 1 if level else 3, 1, gsi)


def bus_numbers(first: int, last: int) -> bytes:
    """`WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, ...)` (6.4.3.5.3)."""
    return pack("<BHBBBHHHHH", 0x88, 13, 2, 0x0C, 0, 0, first, last, 0, last - first + 1)


def io_window(first: int, last: int) -> bytes:
    """`WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, ...)`."""
    return pack("<BHBBBHHHHH", 0x88, 13, 1, 0x0C, 3, 0, first, last, 0, last - first + 1)


def memory_window32(address: int, length: int) -> bytes:
    """`DWordMemory (..., NonCacheable, ReadWrite, ...)` (6.4.3.5.2)."""
    last = address + length - 1
    return pack("<BHBBBIIIII", 0x87, 23, 0, 0x0C, 1, 0, address, last, 0, length)


def memory_window64(address: int, length: int, *, cacheable: bool = False) -> bytes:
    """`QWordMemory (..., NonCacheable or Cacheable, ReadWrite, ...)` (6.4.3.5.1).

    The minimum is 14 bytes behind its start, the maximum 22, the length 38.
    """
    last = address + length - 1
    return pack(
        "<BHBBBQQQQQ", 0x8A, 43, 0, 0x0C, 3 if cacheable else 1, 0, address, last, 0, length
    )


def _term(value: bytes | str) -> bytes:
    return _path(value) if isinstance(value, str) else value


def _path(path: str) -> bytes:
    """A name string (20.2.2): an optional root, and segments of at most four characters."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [segment.ljust(4, "_").encode("ascii") for segment in path.lstrip("\\").split(".")]
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"path: {path!r}: must be segments of one to four characters")
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + b"\x2e" + b"".join(segments)
    return root + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def _sized(content: bytes) -> bytes:
    """The content behind its length, which counts itself (20.2.4)."""
    for size in range(1, 5):
        total = len(content) + size
        if total < (64 if size == 1 else 1 << 4 + 8 * (size - 1)):
            return _encode_length(total, size) + content
    raise ValueError(f"content of {len(content)} bytes: must be less than 256 MiB")


def _length(bits: int) -> bytes:
    """The length of a field unit, which does not count itself."""
    size = 1 if bits < 64 else 2
    return _encode_length(bits, size)


def _encode_length(value: int, size: int) -> bytes:
    if size == 1:
        return bytes([value])
    rest = (value >> 4).to_bytes(size - 1, "little")
    return bytes([(size - 1) << 6 | value & 0xF]) + rest
