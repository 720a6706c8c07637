"""Block requests (5.2.6) in plain Python: the oracle that the pump is compared with."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from attrs import define, frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Answer", "BlockModel"]

_SECTOR = 512
_HEADER = struct.Struct("<I4xQ")
_SEGMENT = struct.Struct("<QII")
_UNMAP = 1
_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES = 0, 1, 4, 8, 11, 13
_OK, _IOERR, _UNSUPP = 0, 1, 2


@frozen
class Answer:
    """What becomes of one request.

    Attributes:
        status: the status byte.
        data: what is written from the beginning of the device-writable part.
        length: bytes that go back with the chain: up to the first gap.
        counter: the counter of a refusal, or an empty string.
    """

    status: int
    data: bytes = b""
    length: int = 0
    counter: str = ""


@define
class BlockModel:
    """A disk and the rules for its requests; arguments as those of `BlockPump`.

    Attributes:
        disk: its bytes, which requests change.
        features: that were negotiated.
    """

    disk: bytearray
    read_only: bool = False
    identity: bytes = b""
    flush: bool = True
    discard: bool = True
    write_zeroes: bool = True
    max_data: int = 256 << 20
    max_discard: tuple[int, int] = (1 << 22, 64)
    max_write_zeroes: tuple[int, int] = (1 << 17, 1)

    def serve(self, readable: bytes, room: int) -> Answer | None:
        """Carry out a request, or None for one that is not for the pump.

        Args:
            readable: the device-readable part.
            room: bytes of the device-writable part.
        """
        if room < 1:
            return None
        data_room = room - 1
        answer = self._execute(readable, data_room)
        if answer is None:
            return None
        length = len(answer.data)
        return Answer(answer.status, answer.data, length + (length == data_room), answer.counter)

    def _execute(self, readable: bytes, room: int) -> Answer | None:
        if len(readable) < _HEADER.size:
            return Answer(_IOERR, counter="refused_header")
        kind, sector = _HEADER.unpack_from(readable)
        payload = readable[_HEADER.size :]
        if kind == _IN:
            return self._move(sector, room)
        if kind == _OUT:
            return self._move(sector, len(payload), payload)
        if kind == _GET_ID:
            return Answer(_OK, self.identity.ljust(20, b"\0")[:room])
        if kind == _FLUSH:
            return Answer(_OK) if self.flush else _unsupported()
        if kind == _DISCARD:
            return self._change(payload, *self.max_discard, 0) if self.discard else _unsupported()
        if kind == _WRITE_ZEROES:
            if not self.write_zeroes:
                return _unsupported()
            return self._change(payload, *self.max_write_zeroes, _UNMAP)
        return None

    def _move(self, sector: int, length: int, payload: bytes | None = None) -> Answer:
        if payload is not None and self.read_only:
            return Answer(_IOERR, counter="refused_read_only")
        if length > self.max_data or not self._on_disk(sector, length):
            return Answer(_IOERR, counter="refused_range")
        start = sector * _SECTOR
        if payload is None:
            return Answer(_OK, bytes(self.disk[start : start + length]))
        self.disk[start : start + length] = payload
        return Answer(_OK)

    def _change(self, payload: bytes, sectors: int, segments: int, flags: int) -> Answer:
        if self.read_only:
            return Answer(_IOERR, counter="refused_read_only")
        count, rest = divmod(len(payload), _SEGMENT.size)
        if rest or not 1 <= count <= segments:
            return Answer(_IOERR, counter="refused_segments")
        for sector, length, given in _segments(payload):
            if given & ~flags:
                return _unsupported()
            if length > sectors or not self._on_disk(sector, length * _SECTOR):
                return Answer(_IOERR, counter="refused_range")
        for sector, length, _ in _segments(payload):
            start = sector * _SECTOR
            self.disk[start : start + length * _SECTOR] = bytes(length * _SECTOR)
        return Answer(_OK)

    def _on_disk(self, sector: int, length: int) -> bool:
        whole = length > 0 and length % _SECTOR == 0
        return whole and sector + length // _SECTOR <= len(self.disk) // _SECTOR


def _segments(payload: bytes) -> Iterator[tuple[int, int, int]]:
    return _SEGMENT.iter_unpack(payload)


def _unsupported() -> Answer:
    return Answer(_UNSUPP, counter="refused_unsupported")
