"""The x86 Linux boot image and its setup header (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

import struct

from linux_loader.decompress import MAX_KERNEL_SIZE
from linux_loader.errors import ImageError
from linux_loader.kinds import Format, format_of
from vm_memory._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linux_loader.source import Source

__all__ = ["BzImage", "parse_bzimage"]

HEADER_START = 0x1F1
_HEADER_LIMIT = 0x290  # where boot_params continues with edd_mbr_sig_buffer
_SECTOR = 512

LOADED_HIGH = 1
XLF_KERNEL_64 = 1
XLF_CAN_BE_LOADED_ABOVE_4G = 2


@frozen(kw_only=True)
class BzImage:
    """A checked setup header. Fields that the protocol version does not have hold its defaults.

    Attributes:
        protocol: version of the boot protocol, 0x020f for 2.15.
        header: the bytes from 0x1f1 to the header's end, as they go into the zero page.
        setup_size: bytes of boot sector and real-mode code; the protected-mode code follows.
        kernel_size: bytes of the protected-mode code.
        version: kernel_version, empty where the image has none.
        loadflags: bit 0 (LOADED_HIGH) tells a bzImage from a zImage.
        code32_start: 32-bit entry, and where an unrelocatable image is loaded.
        initrd_addr_max: last byte an initrd may occupy.
        kernel_alignment: of the load address of a relocatable kernel; a power of two.
        relocatable: whether the protected-mode code may be loaded elsewhere.
        xloadflags: bit 0 (XLF_KERNEL_64): there is a 64-bit entry at 0x200.
        cmdline_size: longest command line, without its NUL.
        payload_offset: of the compressed kernel in the file; 0 where there is none.
        payload_size: bytes of it.
        pref_address: where the kernel runs best.
        init_size: memory needed from the address it runs at, before it knows the memory map.
    """

    protocol: int
    header: bytes
    setup_size: int
    kernel_size: int
    version: str
    loadflags: int
    code32_start: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable: bool
    xloadflags: int
    cmdline_size: int
    payload_offset: int
    payload_size: int
    pref_address: int
    init_size: int

    @property
    def unpacked_limit(self) -> int:
        """The most bytes that may come out of the payload: it is unpacked inside `init_size`."""
        return min(self.init_size or MAX_KERNEL_SIZE, MAX_KERNEL_SIZE)


def parse_bzimage(source: Source) -> BzImage:
    """Read and check the setup header of a boot image, protocol 2.00 and later.

    Raises:
        ImageError: the header breaks a rule of the protocol, or the file is shorter than it says.
    """
    head = source.read_up_to(0, 4096)
    if len(head) < 0x214 or format_of(head) is not Format.BZIMAGE:
        raise ImageError("header", 0x202, head[0x202:0x206], "must be 'HdrS', after 55 aa at 0x1fe")
    protocol = int.from_bytes(head[0x206:0x208], "little")
    if not 0x200 <= protocol < 0x300:
        raise ImageError("version", 0x206, protocol, "must be boot protocol 2.x (0x200 to 0x2ff)")
    header_end = min(0x202 + head[0x201], _HEADER_LIMIT)
    if header_end < 0x21C or len(head) < header_end:
        raise ImageError("jump", 0x201, head[0x201], "must span a setup header inside the file")
    # Fields past the header's stated end are code: they read as absent.
    fields = head[:header_end].ljust(_HEADER_LIMIT, b"\0")
    header = _HeaderFields(fields, protocol)

    setup_size = ((head[0x1F1] or 4) + 1) * _SECTOR
    kernel_size = source.size - setup_size
    if kernel_size <= 0:
        raise ImageError(
            "setup_sects",
            0x1F1,
            head[0x1F1],
            f"leaves no code in {source.size:#x} bytes of file",
        )
    if protocol >= 0x204:
        syssize = header.u32(0x1F4, 0x204) * 16
        # The last unit of 16 bytes may be begun only.
        if syssize > kernel_size + 15:
            raise ImageError(
                "syssize", 0x1F4, syssize, f"only {kernel_size:#x} bytes follow: the file is cut"
            )
        kernel_size = min(kernel_size, syssize) or kernel_size

    alignment = header.u32(0x230, 0x205) or 0x100000
    if alignment & (alignment - 1):
        raise ImageError("kernel_alignment", 0x230, alignment, "must be a power of two")
    payload_offset = header.u32(0x248, 0x208)
    payload_size = header.u32(0x24C, 0x208)
    if payload_size and payload_offset + payload_size > source.size - setup_size:
        raise ImageError(
            "payload_length", 0x24C, payload_size, "the payload must end inside the file"
        )
    code32_start = header.u32(0x214, 0x200)
    loaded_high = head[0x211] & LOADED_HIGH
    if not code32_start:
        code32_start = 0x100000 if loaded_high else 0x10000
    return BzImage(
        protocol=protocol,
        header=head[HEADER_START:header_end],
        setup_size=setup_size,
        kernel_size=kernel_size,
        version=_version(source, head, setup_size),
        loadflags=head[0x211],
        code32_start=code32_start,
        initrd_addr_max=header.u32(0x22C, 0x203) or 0x37FFFFFF,
        kernel_alignment=alignment,
        relocatable=bool(header.u32(0x234, 0x205) & 0xFF),
        xloadflags=header.u32(0x236, 0x20C) & 0xFFFF,
        cmdline_size=header.u32(0x238, 0x206) or 255,
        payload_offset=setup_size + payload_offset if payload_size else 0,
        payload_size=payload_size,
        pref_address=header.u64(0x258, 0x20A) or (0x100000 if loaded_high else 0x10000),
        init_size=header.u32(0x260, 0x20A),
    )


class _HeaderFields:
    """Reads fields by offset; 0 where the protocol is older than the field."""

    def __init__(self, data: bytes, protocol: int) -> None:
        self._data = data
        self._protocol = protocol

    def u32(self, offset: int, since: int) -> int:
        return int(struct.unpack_from("<I", self._data, offset)[0]) if self._has(since) else 0

    def u64(self, offset: int, since: int) -> int:
        return int(struct.unpack_from("<Q", self._data, offset)[0]) if self._has(since) else 0

    def _has(self, since: int) -> bool:
        return self._protocol >= since


def _version(source: Source, head: bytes, setup_size: int) -> str:
    """Read the string that kernel_version points at, 0x200 below."""
    pointer = int.from_bytes(head[0x20E:0x210], "little")
    if not pointer or pointer + 0x200 >= setup_size:
        return ""
    text = source.read_up_to(pointer + 0x200, min(256, setup_size - pointer - 0x200))
    text = text.split(b"\0", 1)[0]
    return "".join([chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in text])
