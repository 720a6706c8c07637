r"""Exits that need no decision, declared once and served in C without returning to Python.

A guest that prints through a serial port makes two exits a character: it reads the line status,
which is always "ready", and writes the byte, which nobody needs to look at before the guest goes
on. Both can be declared:

```python
def handle(writes):                       # called before any later exit is returned, in order
    console.write(bytes(write.data for write in writes))

hot = HotExits(handle, wake=eventfd)      # wake: somebody may call hot.flush() when it is signalled
hot.post(0x3F8, pio=True)                 # writes wait in a queue
hot.answer(0x3FD, b"\x60", pio=True)      # reads get a constant
hot.ignore(0x80, pio=True)                # writes vanish
for vcpu in vm.vcpus:
    vcpu.serve_hot(hot)
```

One `HotExits` serves all vCPUs of a VM, so posted writes keep the order in which the guest made
them across vCPUs too. `Vcpu.run()` hands them over before it returns whatever ended the run, so no
other exit is seen too early. An access that no declaration covers whole, string I/O, and a posted
write that finds the queue full come as ordinary exits. A run that has served `limit` exits without
another returns `Interrupted`, so that signal handlers and stop flags get their turn.

A device with more registers keeps its model, and lets declared exits serve what needs no decision
at the moment. For a 16550 UART:

- the handler replays each posted write into the model, where the ordinary exit would have gone
  (`uart.write(write.address - base, write.data.to_bytes(write.size, "little"))`);
- after every access that reached the model, and whenever the host changed it (input arrived, output
  was taken), the declarations follow it: `data.enabled` while a byte written to the transmitter
  only leaves (no divisor latch, no loopback); `status.answer(...)` with what the line status now
  reads; `status.enabled` while reading it changes nothing (no error bits that the read clears);
- all other registers stay ordinary exits, which see the model with every earlier write in it;
- output that the host takes slowly: while fewer than `room` more bytes fit, switch `status` off, so
  that the guest's next look at it is an exit that counts what is posted;
- the thread that waits for `wake` calls flush(), or output would wait for the next exit.

What was served is counted by `Declaration.count`, `Vcpu.served` and `HotExits.full`.

Which way for which device:

- a doorbell, where somebody waits for the write itself: `Vm.ioeventfd`;
- registers that are written often and read never, one vCPU or order not important:
  `Vm.register_coalesced_mmio`, which does not even leave the kernel, but nobody is told of a write;
- a console, a debug port, a status register with a constant answer: declared exits;
- everything else: the ordinary exits.
"""

from __future__ import annotations

from _thread import allocate_lock
from collections import namedtuple
from functools import partial
from struct import Struct

from kvm_ioctls._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NamedTuple, NoReturn

    from kvm_ioctls.vm.events import HasFileno

    class _Fields(NamedTuple):
        address: int
        data: int
        size: int
        pio: bool

else:
    _Fields = namedtuple("_Fields", ("address", "data", "size", "pio"))

__all__ = ["Declaration", "HotExits", "PostedWrite"]

_NOTHING, _POST, _ANSWER, _IGNORE = range(4)
_SPACES = {True: 1 << 16, False: 1 << 64}


class PostedWrite(_Fields):
    """A write that the guest made and nobody had to look at before it went on.

    Attributes:
        address: guest-physical address, or port with `pio`.
        data: the value written, little-endian as the guest wrote it.
        size: 1, 2, 4 or 8 bytes.
        pio: whether it is a port.
    """

    __slots__ = ()


# A guest that prints makes many: from the queue's rows to values without a call into Python each.
_ROW = Struct("<QQI?3x")
_posted_write: Callable[[tuple[int, int, int, bool]], PostedWrite]
_posted_write = partial(tuple.__new__, PostedWrite)


class Declaration:
    """One declared range. It can be switched, changed and removed while vCPUs run.

    Attributes:
        address: its first address.
        length: how many addresses it has.
        pio: whether they are ports.
    """

    def __init__(
        self, hot: HotExits, index: int, kind: int, address: int, length: int, pio: bool, size: int
    ) -> None:
        self.address, self.length, self.pio = address, length, pio
        self._hot, self._index, self._kind, self._size = hot, index, kind, size
        self._base = hot._count(index)
        self._enabled = True
        self._row = ffi.new("kvmi_declaration *")
        self._row.pio, self._row.size = int(pio), size
        self._row.first, self._row.length = address, length

    @property
    def enabled(self) -> bool:
        """Whether exits are served; if not, they come as ordinary ones."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self._store()

    @property
    def count(self) -> int:
        """How many exits it has served."""
        return self._hot._count(self._index) - self._base

    def answer(self, value: bytes) -> None:
        """Change the constant that reads are answered with.

        Raises:
            ArgumentError: it has another length than the range, or the range is not for reads.
        """
        if self._kind != _ANSWER or len(value) != self.length:
            self._hot._refuse({"value": value}, f"the range takes answers of {self.length} bytes"
                              if self._kind == _ANSWER else "this range is for writes")  # fmt: skip
        self._row.value = int.from_bytes(value, "little")
        self._store()

    def remove(self) -> None:
        """Undeclare the range for good."""
        self._kind = _NOTHING
        self._store()
        self._hot._free(self._index)

    def _store(self) -> None:
        self._row.kind = self._kind if self._enabled else _NOTHING
        lib.kvmi_hot_set(self._hot._hot, self._index, self._row)


class HotExits:
    """Declared exits and the queue of posted writes, for all vCPUs of a VM.

    Attributes:
        room: how many posted writes the queue holds.
        limit: how many exits in a row a run may serve.
    """

    def __init__(
        self,
        handle: Callable[[list[PostedWrite]], object],
        *,
        room: int = 1024,
        limit: int = 4096,
        wake: int | HasFileno | None = None,
    ) -> None:
        """Make an empty set.

        Args:
            handle: takes posted writes, oldest first; called by run() on vCPU threads and by
                flush(), one call at a time. It must not wait for a vCPU, whose run may wait for
                it. What it raises comes out of these, and the exit that run() was about to return
                is returned by the next run().
            room: 1 to 65536.
            limit: 1 or more.
            wake: an eventfd that is signalled when a write meets an empty queue. It must stay open
                as long as vCPUs use the set.

        Raises:
            ArgumentError: a number is out of its range.
        """
        if not 1 <= room <= 1 << 16 or not 1 <= limit < 1 << 32:
            self._refuse({"room": room, "limit": limit}, "room is 1 to 65536, limit 1 or more")
        self.room, self.limit = room, limit
        self._handle = handle
        self._wake = wake  # referenced, so that it is not collected
        number = -1 if wake is None else wake if isinstance(wake, int) else wake.fileno()
        made = lib.kvmi_hot_new(room, number)
        if made == ffi.NULL:
            raise MemoryError("no memory for the queue of posted writes")
        self._hot: Any = ffi.gc(made, lib.kvmi_hot_free)
        self._declared: dict[int, Declaration] = {}
        self._batch = ffi.new("kvmi_posted[]", min(room, 256))
        self._lock = allocate_lock()
        self._changes = allocate_lock()

    def post(
        self, address: int, length: int = 1, *, pio: bool = False, size: int = 0
    ) -> Declaration:
        """Let writes go into the queue.

        Args:
            address: first guest-physical address, or port with `pio`.
            length: how many addresses.
            pio: ports instead of memory.
            size: only accesses of so many bytes; 0 for any.

        Raises:
            ArgumentError: the range is empty, leaves its space, or meets another for writes.
        """
        return self._declare(_POST, address, length, pio, size)

    def ignore(
        self, address: int, length: int = 1, *, pio: bool = False, size: int = 0
    ) -> Declaration:
        """Let writes vanish; arguments and errors as for post()."""
        return self._declare(_IGNORE, address, length, pio, size)

    def answer(
        self, address: int, value: bytes, *, pio: bool = False, size: int = 0
    ) -> Declaration:
        """Answer reads with constant bytes.

        Args:
            address: first guest-physical address, or port with `pio`.
            value: one byte for each address, at most 8.
            pio: ports instead of memory.
            size: only accesses of so many bytes; 0 for any.

        Raises:
            ArgumentError: the range is empty or too long, leaves its space, or meets another for
                reads.
        """
        return self._declare(_ANSWER, address, len(value), pio, size, value)

    def flush(self) -> int:
        """Hand all posted writes to the handler; from any thread but the handler itself.

        Whoever calls it must not hold a lock that the handler takes.

        Returns:
            How many there were.
        """
        total = 0
        with self._lock:
            try:
                while True:
                    count = lib.kvmi_hot_take(self._hot, self._batch, len(self._batch))
                    if not count:
                        return total
                    total += count
                    rows = _ROW.iter_unpack(ffi.buffer(self._batch, count * _ROW.size))
                    self._handle(list(map(_posted_write, rows)))
            except BaseException:
                lib.kvmi_hot_take(self._hot, self._batch, 0)  # no run needs to wait for these
                raise

    @property
    def declarations(self) -> tuple[Declaration, ...]:
        """What is declared, in the order in which an access is compared with it."""
        return tuple(self._declared[index] for index in sorted(self._declared))

    @property
    def full(self) -> int:
        """How many writes came as ordinary exits because the queue was full."""
        return int(lib.kvmi_hot_full(self._hot))

    def _declare(
        self, kind: int, address: int, length: int, pio: bool, size: int, value: bytes = b""
    ) -> Declaration:
        shown = {"address": address, "length": length, "pio": pio, "size": size}
        if length < 1 or (kind == _ANSWER and length > 8):
            self._refuse(shown, "a range has at least one address, and for reads at most 8")
        if address < 0 or address + length > _SPACES[pio] or length >= 1 << 64:
            self._refuse(shown, f"it must lie within the {_SPACES[pio]:#x} addresses")
        if size not in (0, 1, 2, 4, 8):
            self._refuse(shown, "size is 1, 2, 4 or 8, or 0 for any")
        with self._changes:
            for other in self._declared.values():
                if (other.pio == pio and (other._kind == _ANSWER) == (kind == _ANSWER)
                        and address < other.address + other.length
                        and other.address < address + length
                        and (not size or not other._size or size == other._size)):  # fmt: skip
                    self._refuse(shown, f"it meets the range at {other.address:#x} of"
                                 f" {other.length:#x} addresses")  # fmt: skip
            index = next((n for n in range(lib.KVMI_DECLARATIONS) if n not in self._declared), None)
            if index is None:
                self._refuse(shown, f"at most {lib.KVMI_DECLARATIONS} ranges can be declared")
            made = Declaration(self, index, kind, address, length, pio, size)
            if kind == _ANSWER:
                made._row.value = int.from_bytes(value, "little")
            self._declared[index] = made
            made._store()
        return made

    def _free(self, index: int) -> None:
        with self._changes:
            self._declared.pop(index, None)

    def _count(self, index: int) -> int:
        return int(lib.kvmi_hot_count(self._hot, index))

    def _refuse(self, arguments: dict[str, Any], why: str) -> NoReturn:
        from kvm_ioctls._hints import refuse

        raise refuse("declare", 22, arguments, why)
