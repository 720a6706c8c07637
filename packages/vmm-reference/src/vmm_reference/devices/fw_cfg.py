"""The firmware configuration device of QEMU: by it firmware learns what the machine is.

Items have a 16-bit key or a file name, and are read a byte at a time or by DMA. Specification:
QEMU's `docs/specs/fw_cfg`.
"""

from __future__ import annotations

from struct import pack, unpack

from vm_memory import GuestAddress, MemoryAccessError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vm_memory import GuestMemory

    from .states import FwCfgState

__all__ = ["DATA", "DMA", "FILES", "MAX_DMA", "PORT", "SELECTOR", "SIZE", "FwCfg"]

PORT, SIZE = 0x510, 12
SELECTOR, DATA, DMA = 0, 1, 4
"""Offsets of the registers: two bytes, the second of which is the data's too, and eight bytes."""

SIGNATURE_KEY, ID_KEY, DIRECTORY_KEY, FIRST_FILE_KEY = 0x00, 0x01, 0x19, 0x20
FILES = 0x2000
"""How many files there can be; keys above are those of another architecture or for writing."""
MAX_DMA = 16 << 20
"""Bytes that one DMA access may move: no item is longer, and a vCPU would wait for it."""

_SIGNATURE = b"QEMU"
_DMA_SIGNATURE = b"QEMU CFG"
_TRADITIONAL, _HAS_DMA = 1, 2
_MAX_NAME = 55
_ERROR, _READ, _SKIP, _SELECT, _WRITE = 1, 2, 4, 8, 16  # bits of a DMA access's control


class FwCfg:
    """Items that only the host writes.

    Args:
        memory: the guest's, for DMA.
        items: contents by key, beside those that the device has itself.
        files: contents by name.

    Attributes:
        errors: DMA accesses that were refused, or whose structure is not in memory.

    Raises:
        ValueError: a file has no possible name, or there are too many.
    """

    def __init__(
        self, memory: GuestMemory, items: Mapping[int, bytes], files: Mapping[str, bytes]
    ) -> None:
        self._memory = memory
        self._items = dict(items)
        self._items[SIGNATURE_KEY] = _SIGNATURE
        self._items[ID_KEY] = pack("<I", _TRADITIONAL | _HAS_DMA)
        if len(files) > FILES:
            raise ValueError(f"{len(files)} files: must be {FILES} at most")
        directory = [pack(">I", len(files))]
        for key, (name, content) in enumerate(sorted(files.items()), FIRST_FILE_KEY):
            if not name.isascii() or not 1 <= len(name) <= _MAX_NAME:
                raise ValueError(f"file name {name!r}: must be 1 to {_MAX_NAME} ASCII characters")
            directory.append(pack(">IHxx56s", len(content), key, name.encode()))
            self._items[key] = content
        self._items[DIRECTORY_KEY] = b"".join(directory)
        self._key = 0
        self._offset = 0
        self._address_high = 0
        self.errors = 0

    def read(self, offset: int, length: int) -> bytes:
        """The next bytes of the selected item, zeros behind its end; or the sign of DMA."""
        if offset == DATA:
            return self._take(length)
        if offset >= DMA:
            return _DMA_SIGNATURE[offset - DMA :][:length].ljust(length, b"\0")
        return b"\xff" * length

    def write(self, offset: int, data: bytes) -> None:
        """Select an item, or give the address of a DMA access, whose lower half starts it."""
        if offset == SELECTOR and len(data) == 2:
            self._select(int.from_bytes(data, "little"))
        elif offset == DMA and len(data) == 4:
            self._address_high = int.from_bytes(data, "big")
        elif offset == DMA + 4 and len(data) == 4:
            high, self._address_high = self._address_high, 0
            self._access(GuestAddress(high << 32 | int.from_bytes(data, "big")))

    def metrics(self) -> dict[str, int]:
        """DMA accesses that were refused."""
        return {"dma_errors": self.errors}

    def save(self) -> FwCfgState:
        """Where in which item the guest reads."""
        from .states import FwCfgState

        return FwCfgState(self._key, self._offset, self._address_high)

    def restore(self, state: FwCfgState) -> None:
        """Go on reading there."""
        self._key, self._offset = state.key, state.offset
        self._address_high = state.address_high

    def _select(self, key: int) -> None:
        self._key, self._offset = key, 0

    def _take(self, length: int) -> bytes:
        start = self._offset
        content = self._items.get(self._key, b"")
        self._offset = min(start + length, len(content))
        return content[start : start + length].ljust(length, b"\0")

    def _access(self, address: GuestAddress) -> None:
        try:
            control, length, target = unpack(">IIQ", self._memory.read(address, 16))
            if control & _SELECT:
                self._select(control >> 16)
            done = self._move(control, length, GuestAddress(target))
            self.errors += not done
            self._memory.write(address, pack(">I", 0 if done else _ERROR))
        except MemoryAccessError:  # there is no place where the guest would see an answer
            self.errors += 1

    def _move(self, control: int, length: int, target: GuestAddress) -> bool:
        if control & _READ:
            if length > MAX_DMA or not self._memory.check_range(target, length):
                return False
            self._memory.write(target, self._take(length))
        elif control & _SKIP:
            self._offset = min(self._offset + length, len(self._items.get(self._key, b"")))
        return not control & (_WRITE | _ERROR)
