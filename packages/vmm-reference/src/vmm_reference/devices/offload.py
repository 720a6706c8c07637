"""Queues that somebody else serves in a device's place: a thread of C, or the host's kernel.

The device keeps the features, the configuration and its other queues. Who serves runs while the
driver does, from DRIVER_OK to the reset, and stands still with the machine.
"""

from __future__ import annotations

from functools import reduce

from virtio_queue.errors import ActivationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    from virtio_queue import Queue
    from virtio_queue.pump import Pump
    from vm_memory import GuestMemory
    from vmm_reference.slots import VirtioSlot
    from vmm_reference.wiring import Wiring
else:
    Protocol = object

__all__ = ["Offload", "PumpServer", "Server"]


class Server(Protocol):
    """Who serves queues: a `PumpServer`, or one of `vmm_reference.backends.vhost`.

    Attributes:
        features: the feature bits of queues that it can work with.
        together: whether all its queues have to be ready before it serves one.
        attention: readable when `attend` is to be called, or -1.
    """

    features: int
    together: bool
    attention: int

    def connect(self, slot: VirtioSlot, numbers: Sequence[int]) -> None:
        """Have the kicks of these queues, and send their interrupts."""

    def start(self, features: int, queues: Mapping[int, Queue]) -> None:
        """Serve queues, by their numbers, from where they are.

        Raises:
            OSError: it can't.
        """

    def stop(self) -> None:
        """Touch the queues no more, and leave them where they are."""

    def forget(self) -> None:
        """The driver is gone: what was kept for it is of no use. After `stop`."""

    def attend(self) -> None:
        """Raise what went wrong.

        Raises:
            ChainError: the driver broke a ring.
        """

    def metrics(self) -> dict[str, int]:
        """What is counted there."""


class PumpServer:
    """A thread of C that serves queues; each kind of device has its own.

    Args:
        memory: the guest's.
        pump: the thread.

    Attributes:
        features: all that there are.
        together: whether all its queues have to be ready before it serves one.
        attention: readable when `attend` is to be called.
    """

    features = -1
    together = True

    def __init__(self, memory: GuestMemory, pump: Pump) -> None:
        self._memory = memory
        self.pump = pump
        self.attention = pump.attention
        self._slot: VirtioSlot | None = None

    def connect(self, slot: VirtioSlot, numbers: Sequence[int]) -> None:
        """Have the kicks of these queues, and send their interrupts."""
        self._slot = slot
        for number in numbers:
            slot.take_kick(number)

    def start(self, features: int, queues: Mapping[int, Queue]) -> None:
        """Serve queues, by their numbers, from where they are.

        Raises:
            PumpError: the host can't start a thread.
        """
        slot = self._slot
        assert slot is not None
        self.pump.wire(
            [slot.kicks[number] for number in queues],
            [slot.pump_call(number) for number in queues],
            slot.interrupt_word,
        )
        self._start(features, tuple(queues.values()))

    def _start(self, features: int, queues: Sequence[Queue]) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Touch the queues no more."""
        self.pump.stop()

    def forget(self) -> None:
        """Nothing is kept."""

    def attend(self) -> None:
        """Raise what went wrong.

        Raises:
            ChainError: the driver broke a ring; the pump has stopped.
        """
        self.pump.take()

    def metrics(self) -> dict[str, int]:
        """What the pump counts."""
        return self.pump.counters

    def close(self) -> None:
        """Give the thread's descriptors back."""
        self.pump.stop()
        del self.pump


class Offload:
    """Those who serve a device's queues. Under the device's lock.

    Args:
        what: they are called in an error.
        servers: each with the numbers of its queues.
    """

    def __init__(self, what: str, servers: Sequence[tuple[Server, Sequence[int]]]) -> None:
        self._what = what
        self._servers = servers
        self._running: list[Server] = []
        self._driver: tuple[int, Sequence[Queue]] | None = None
        self._held = False

    @property
    def features(self) -> int:
        """The feature bits that all of them can work with."""
        return reduce(lambda bits, each: bits & each[0].features, self._servers, -1)

    def plug_in(self, slot: VirtioSlot, wiring: Wiring) -> None:
        """Connect all of them; nothing runs before the machine does, or while it is paused."""
        device, loop = slot.device, wiring.loop
        self._held = True

        def stop() -> None:
            with device.lock:
                self._held = True
                self.stop()

        def go() -> None:
            with device.lock:
                self._held = False
                self.go_on()

        def attend(first: int) -> None:
            device.process(first)

        for server, numbers in self._servers:
            server.connect(slot, numbers)
            if (fd := server.attention) >= 0:
                loop.add(fd, 1, lambda _events, first=numbers[0]: attend(first))  # type: ignore[misc]
                wiring.on_close(lambda fd=fd: loop.remove(fd))  # type: ignore[misc]
        wiring.on_close(stop)
        wiring.on_pause(stop, go)
        wiring.on_start(go)

    def activate(self, features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready.

        Raises:
            ActivationError: somebody refuses.
        """
        self._driver = features, queues
        try:
            self.go_on()
        except OSError as error:
            self.reset()
            raise ActivationError(f"{self._what} refuses: {error.strerror}") from error

    def reset(self) -> None:
        """The driver is gone; they have stopped when this returns."""
        self.stop()
        self._driver = None
        for server, _ in self._servers:
            server.forget()

    def go_on(self) -> None:
        """Have queues that are ready served; does nothing without a driver.

        Raises:
            OSError: somebody refuses.
        """
        if self._driver is None or self._running or self._held:
            return
        features, queues = self._driver
        for server, numbers in self._servers:
            ready = {number: queues[number] for number in numbers if queues[number].ready}
            if len(ready) == len(numbers) or (ready and not server.together):
                self._running.append(server)
                server.start(features, ready)

    def stop(self) -> None:
        """Have them stop; the queues are where they were left."""
        for server in self._running:
            server.stop()
        self._running = []

    def attend(self, queue_index: int) -> None:
        """Look after who serves a queue.

        Raises:
            ChainError: the driver broke a ring.
        """
        for server, numbers in self._servers:
            if queue_index in numbers:
                server.attend()

    def metrics(self) -> dict[str, int]:
        """What all of them count, together."""
        total: dict[str, int] = {}
        for server, _ in self._servers:
            for name, number in server.metrics().items():
                total[name] = total.get(name, 0) + number
        return total
