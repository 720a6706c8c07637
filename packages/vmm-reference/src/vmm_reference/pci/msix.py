"""MSI-X: a table of messages, a mask for each and for all, and what waits for a mask to go (6.8.2).

A message is sent by signalling an eventfd. While a vector may send, KVM listens to the eventfd and
delivers the message without a word to this process. While it is masked KVM does not listen, so the
eventfd itself remembers: readable means pending, and KVM sends what it missed once it listens.
"""

from __future__ import annotations

import os
import select
import threading
from struct import unpack_from
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm_ioctls import Vm

__all__ = ["ENTRY_SIZE", "MsiRoutes", "Msix"]

ENTRY_SIZE = 16
MASKED = 1  # in vector control, 6.8.2.9

_PIC_MASTER, _PIC_SLAVE, _IOAPIC = 0, 1, 2
_FIRST_GSI = 24  # the IOAPIC of KVM has pins for those below
_LIMIT = 4096


class MsiRoutes:
    """The routing table of a VM: the controllers' pins as KVM makes them, and messages.

    Thread-safe. A change replaces KVM's whole table; a line without a message leads nowhere.
    """

    def __init__(self, vm: Vm) -> None:
        from kvm_ioctls.state import IrqchipRoute

        self._vm = vm
        self._lock = threading.Lock()
        self._messages: dict[int, tuple[int, int]] = {}
        self._taken: set[int] = set()
        self._pins = [
            IrqchipRoute(gsi, _PIC_MASTER if gsi < 8 else _PIC_SLAVE, gsi % 8) for gsi in range(16)
        ] + [IrqchipRoute(gsi, _IOAPIC, gsi) for gsi in range(24)]

    def take(self, count: int) -> list[int]:
        """Interrupt numbers for a device's messages.

        Raises:
            ValueError: KVM has no more.
        """
        with self._lock:
            most = range(_FIRST_GSI, _LIMIT - len(self._pins) + _FIRST_GSI)
            free = [gsi for gsi in most if gsi not in self._taken][:count]
            if len(free) < count:
                raise ValueError(f"{count} interrupts: KVM routes no more than {_LIMIT}")
            self._taken.update(free)
            return free

    def give_back(self, gsis: list[int]) -> None:
        """Numbers that are not used any more."""
        with self._lock:
            self._taken.difference_update(gsis)
            known = [gsi for gsi in gsis if self._messages.pop(gsi, None) is not None]
            if known:
                self._settle()

    def set(self, gsi: int, address: int, data: int) -> None:
        """What a number sends."""
        with self._lock:
            if self._messages.get(gsi) != (address, data):
                self._messages[gsi] = address, data
                self._settle()

    def _settle(self) -> None:
        from kvm_ioctls.state import MsiRoute

        messages = [MsiRoute(gsi, *message) for gsi, message in self._messages.items()]
        self._vm.set_gsi_routing([*self._pins, *messages])


class Msix:
    """A function's vectors. Thread-safe.

    Args:
        count: vectors, 1 to 2048.
        routes: of the machine.
        irqfd: connects an eventfd with an interrupt number.
        irqfd_deassign: disconnects it.
        eventfd: makes an eventfd that lives as long as the function.

    Attributes:
        enabled: whether the driver uses MSI-X; what is masked by `function_mask` all the same.
    """

    def __init__(
        self,
        count: int,
        routes: MsiRoutes,
        irqfd: Callable[[int, int], object],
        irqfd_deassign: Callable[[int, int], object],
        eventfd: Callable[[], int],
    ) -> None:
        self.enabled = False
        self._function_mask = False
        self._routes, self._irqfd, self._irqfd_deassign = routes, irqfd, irqfd_deassign
        self._lock = threading.Lock()
        self._table = bytearray((bytes(12) + MASKED.to_bytes(4, "little")) * count)
        self._gsis = routes.take(count)
        self._live = [False] * count
        self._own = [eventfd() for _ in range(count)]
        self._fds = [{fd} for fd in self._own]

    def __len__(self) -> int:
        return len(self._own)

    def signal(self, vector: int) -> None:
        """Send a vector's message, or remember it."""
        os.eventfd_write(self._own[vector], 1)

    def move(self, fd: int, vector: int | None) -> None:
        """Let an eventfd, beside the vector's own, send a vector's message, or none at all."""
        with self._lock:
            for number, fds in enumerate(self._fds):
                if fd in fds and number != vector:
                    fds.remove(fd)
                    if self._live[number]:
                        self._irqfd_deassign(fd, self._gsis[number])
            if vector is not None and fd not in self._fds[vector]:
                self._fds[vector].add(fd)
                if self._live[vector]:
                    self._irqfd(fd, self._gsis[vector])

    def set_control(self, *, enabled: bool, function_mask: bool) -> None:
        """Message control has changed (6.8.2.3)."""
        with self._lock:
            self.enabled, self._function_mask = enabled, function_mask
            for vector in range(len(self._own)):
                self._settle(vector)

    def read_table(self, offset: int, length: int) -> bytes:
        """What a guest reads; behind the table are zeros."""
        return bytes(self._table[offset : offset + length]).ljust(length, b"\0")

    def write_table(self, offset: int, data: bytes) -> None:
        """What a guest writes: whole 32-bit words (6.8.2); anything else is ignored."""
        if offset % 4 or len(data) not in (4, 8) or offset + len(data) > len(self._table):
            return
        with self._lock:
            self._table[offset : offset + len(data)] = data
            for vector in {offset // ENTRY_SIZE, (offset + len(data) - 1) // ENTRY_SIZE}:
                self._table[vector * ENTRY_SIZE + 12] &= MASKED
                self._table[vector * ENTRY_SIZE + 13 : (vector + 1) * ENTRY_SIZE] = bytes(3)
                self._settle(vector)

    def read_pending(self, offset: int, length: int) -> bytes:
        """The pending bits, 64 vectors in 8 bytes."""
        size = (len(self._own) + 63) // 64 * 8
        bits = sum(1 << vector for vector in self.pending()) if offset < size else 0
        return bits.to_bytes(size, "little")[offset : offset + length].ljust(length, b"\0")

    def pending(self) -> tuple[int, ...]:
        """Vectors that wait for a mask to go."""
        with self._lock:
            return tuple(
                vector
                for vector, fds in enumerate(self._fds)
                if not self._live[vector] and _readable(fds)
            )

    def save_table(self) -> bytes:
        """All entries."""
        return bytes(self._table)

    def restore(self, table: bytes, pending: tuple[int, ...]) -> None:
        """Become what was saved; `set_control` follows. The caller has checked both."""
        with self._lock:
            self._table[:] = table
        for vector in pending:
            self.signal(vector)

    def close(self) -> None:
        """Disconnect everything."""
        with self._lock:
            self.enabled = False
            for vector in range(len(self._own)):
                self._settle(vector)
            self._routes.give_back(self._gsis)

    def _settle(self, vector: int) -> None:
        """Let KVM listen to a vector's eventfds while it may send, and to none while not."""
        gsi = self._gsis[vector]
        low, high, data, control = unpack_from("<IIII", self._table, vector * ENTRY_SIZE)
        live = self.enabled and not self._function_mask and not control & MASKED
        if live:
            self._routes.set(gsi, high << 32 | low, data)
        if live != self._live[vector]:
            self._live[vector] = live
            connect = self._irqfd if live else self._irqfd_deassign
            for fd in self._fds[vector]:
                connect(fd, gsi)


def _readable(fds: set[int]) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
