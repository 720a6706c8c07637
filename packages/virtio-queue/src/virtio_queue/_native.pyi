from collections.abc import Callable
from typing import Any

class CData:
    # vq_ring
    next_avail: int
    next_used: int
    pending: int
    sequence: int
    in_flight: int
    fault: CData
    flights: CData
    # vq_fault
    rule: int
    descriptor: int
    value: int
    # vq_batch
    chain_capacity: int
    segment_capacity: int
    iovec_capacity: int
    header_size: int
    headers: CData
    count: int
    outstanding: int
    chains: CData
    segments: CData
    iovecs: CData
    # vq_flight
    slots: int
    done: int
    length: int
    batch: CData
    def __getitem__(self, index: int) -> CData: ...
    def __bool__(self) -> bool: ...

class _Ffi:
    NULL: CData
    def new(self, cdecl: str, init: object = ...) -> CData: ...
    def gc(self, cdata: CData, destructor: Callable[[CData], object], size: int = ...) -> CData: ...
    def buffer(self, cdata: CData, size: int = ...) -> Any: ...
    def cast(self, cdecl: str, source: object) -> CData: ...
    def from_buffer(self, cdecl: str, python_buffer: object) -> CData: ...

class _Lib:
    def vq_new(
        self,
        size: int,
        desc: int,
        driver: int,
        device: int,
        packed: int,
        event_idx: int,
        indirect: int,
        in_order: int,
    ) -> CData: ...
    def vq_free(self, ring: CData) -> None: ...
    def vq_bind(self, ring: CData, table: int) -> int: ...
    def vq_batch_new(self, chains: int, segments: int, iovecs: int) -> CData: ...
    def vq_batch_free(self, batch: CData) -> None: ...
    def vq_pop(self, ring: CData, batch: CData, limit: int, track: int) -> int: ...
    def vq_undo(self, ring: CData, head: int) -> int: ...
    def vq_complete(self, ring: CData, count: int, heads: CData, lengths: CData) -> int: ...
    def vq_complete_batch(self, ring: CData, batch: CData, lengths: CData) -> int: ...
    def vq_complete_one(self, ring: CData, head: int, length: int) -> int: ...
    def vq_needs_notification(self, ring: CData) -> int: ...
    def vq_enable_notifications(self, ring: CData) -> int: ...
    def vq_disable_notifications(self, ring: CData) -> None: ...
    def vq_adopt(self, ring: CData, head: int, slots: int, room: int, done: int) -> int: ...

ffi: _Ffi
lib: _Lib
