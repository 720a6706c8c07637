"""What a device's factory is given: the machine's side of one device.

A factory (`vmm_reference.devices.REGISTRY`) makes a device's model and its backend, and connects
them here: `virtio` gives a model its transport, interrupts and kicks, `ports` and `mmio` are the
buses, `on_close` remembers what is to be given back. Whatever a factory does is undone in reverse
order when the device is unplugged or the machine ends.
"""

from __future__ import annotations

from contextlib import ExitStack

from .errors import ConfigError
from .slots import MmioSlot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from virtio_queue import DeviceModel

    from .board import Board
    from .devices.i8042 import I8042
    from .outcome import Outcome
    from .slots import VirtioSlot

__all__ = ["Wiring"]


class Wiring:
    """One device's connections, until `close`.

    Attributes:
        name: the device's, unique in the machine.
        memory: the guest's.
        vm: for what only KVM can do, such as an interrupt line or a memory slot.
        loop: the I/O thread, for backends' descriptors and timers.
        ports: the port I/O space.
        mmio: the memory-mapped I/O space.
        parts: what has `save` and `restore`, by name, in the order of restoring.
        control: what the factory returned: how the machine's owner reaches the running device.
        slot: of its virtio device, or None.
        starts: what is called before the vCPUs run.
        number: the PCI slot that it is to have, or None.
    """

    def __init__(self, board: Board, name: str, number: int | None = None) -> None:
        self.name = name
        self.number = number
        self.parts: dict[str, Any] = {}
        self.control: object = None
        self.slot: VirtioSlot | None = None
        self.memory, self.vm, self.loop = board.memory, board.vm, board.loop
        self.ports, self.mmio = board.ports, board.mmio
        self._board = board
        self._stack = ExitStack()
        self.starts: list[Callable[[], object]] = []
        self._count: Callable[[], dict[str, int]] = dict
        self._pauses: list[tuple[Callable[[], object], Callable[[], object]]] = []
        self._hand_overs: list[tuple[Callable[[], object], Callable[[], object]]] = []

    def virtio(
        self,
        model: DeviceModel,
        *,
        shared_memory: Mapping[int, tuple[int, int]] | None = None,
        vectors: int | None = None,
    ) -> VirtioSlot:
        """Put a virtio device with this model into the machine, on the machine's transport.

        The model's `process` is called on the loop's thread for each kick; where it has an
        attribute `unfinished` that is true afterwards, again when other devices had their turn.
        A backend's completions come through `VirtioSlot.device` under its lock.

        Args:
            model: one with state has `save` and `restore`.
            shared_memory: guest address and length of each shared memory region, by its id.
            vectors: of MSI-X on a PCI bus, 2 at least. A driver that finds fewer than one for each
                queue and one for the configuration has its queues share one: for a device whose
                queues mostly interrupt together, that is one interrupt in place of several.
        """
        if hasattr(model, "save"):
            self.parts[f"{self.name}-model"] = model
        slot: VirtioSlot
        if (root := self._board.pci) is not None:
            from .pci.virtio import PciSlot

            if shared_memory:
                raise ValueError("shared memory regions have no BAR of their own yet")
            number = root.take_slot(self.number)
            slot = PciSlot(
                self,
                model,
                root.bus,
                number,
                root.routes,
                placed=not self._board.running,
                vectors=vectors,
            )
            self.parts[f"{self.name}-pci"] = slot
        else:
            index = self._board.take_mmio_index()
            slot = MmioSlot(self, model, index, shared_memory or {})
        self.parts[f"{self.name}-transport"] = slot.transport
        self.parts[self.name] = slot.device
        self.slot = slot
        return slot

    def keep(self, part: Any, name: str = "") -> None:
        """Save and restore `part`, as `NAME` or as `NAME-name`, with the machine."""
        self.parts[f"{self.name}-{name}" if name else self.name] = part

    def area(self) -> tuple[int, int]:
        """Guest address and size of the memory that the device has for its own.

        Raises:
            ConfigError: the device has come later: memory is laid out when the machine starts.
        """
        area = self._board.ram.areas.get(self.name)
        if area is None:
            raise ConfigError("device", self.name, "has memory: it must be there from the start")
        return area

    def show_memory(self, address: int, size: int) -> None:
        """Let the guest have a part of the device's own memory, or of what else may come."""
        self._board.ram.show(address, size)

    def hide_memory(self, address: int) -> None:
        """Take away what `show_memory` showed from there on."""
        self._board.ram.hide(address)

    def line(self, gsi: int) -> Callable[[bool], None]:
        """Sets the level of an interrupt line."""
        vm = self.vm
        return lambda level: vm.irq_line(gsi, level)

    def announce(self, term: Callable[[], bytes]) -> None:
        r"""Add a term of `vmm_reference.acpi.aml` to what the guest's ACPI has in `\_SB`.

        Only a machine that boots needs it, so it is asked for when the tables are made.
        """
        self._board.announced.devices.append(term)

    def table(self, signature: bytes, body: bytes) -> None:
        """Give the guest's ACPI another table, without its header."""
        self._board.announced.tables.append((signature, body))

    def announce_memory(self, address: int, size: int, node: int) -> None:
        """Tell the guest's ACPI that memory of a node may come there."""
        self._board.announced.memory.append((address, size, node))

    def announce_fixed_hardware(self) -> None:
        """Tell the guest's ACPI of PM1 blocks and PM timer: it is not hardware-reduced then."""
        self._board.announced.fixed_hardware = True

    def on_event(self, bit: int, method: str) -> None:
        r"""Have the guest's ACPI call a method of `\_SB` for an event of `devices.pm`."""
        self._board.announced.events.append((bit, method))

    def keyboard_controller(self) -> I8042:
        """Where a keyboard is plugged in; the guest's ACPI says that there is one then."""
        self._board.announced.boot_flags |= 1 << 1  # 8042 (ACPI 6.4, table 5.11)
        return self._board.legacy.i8042

    def raise_event(self, bit: int) -> None:
        """Raise an event of `devices.pm`; any thread but one in the power device."""
        self._board.tell(bit)

    def end(self, outcome: Outcome, detail: str = "") -> None:
        """End the machine; from any thread."""
        self._board.end(outcome, detail)

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the device goes, before what was registered earlier."""
        self._stack.callback(callback)

    def on_pause(self, stop: Callable[[], object], go: Callable[[], object]) -> None:
        """Call `stop` once the vCPUs stand still, and `go` before they run again.

        After `stop` nothing of the device may touch memory or state. A machine starts with `go`
        neither called nor needed.
        """
        self._pauses.append((stop, go))

    def on_dirty_log(self, log: Callable[[bool], object]) -> None:
        """Call `log` now and whenever it changes whether written pages are to be noted.

        For who writes the guest's memory by other ways than `memory`; any thread calls.
        """
        self._board.ram.add_logger(log)
        self.on_close(lambda: self._board.ram.remove_logger(log))

    def on_hand_over(self, release: Callable[[], object], acquire: Callable[[], object]) -> None:
        """Call `release` when the machine goes to another VMM, `acquire` when it becomes ours.

        `acquire` is called before the first run of a machine that comes from another VMM
        (`incoming`), and when one that went comes back. It raises `HostError` where it can't.
        """
        self._hand_overs.append((release, acquire))

    @property
    def incoming(self) -> bool:
        """Whether the machine is still another VMM's: what only one may hold is not to be taken."""
        return self._board.incoming

    def release(self) -> None:
        """Give up what only one machine may hold."""
        for release, _ in self._hand_overs:
            release()

    def acquire(self) -> None:
        """Take it."""
        for _, acquire in self._hand_overs:
            acquire()

    def metrics(self) -> dict[str, int]:
        """What is counted: by the `metrics` of the model and of each part, and by virtio itself."""
        found = self._count()
        for part in self.parts.values():
            if hasattr(part, "metrics"):
                found |= part.metrics()
        if self.slot is not None:
            device = self.slot.device
            if hasattr(device.model, "metrics"):
                found |= device.model.metrics()
            found |= {"refused": device.refused + found.get("refused", 0)}
            found["needs_reset"] = int(bool(device.reset_reason))
        return found

    def count(self, metrics: Callable[[], dict[str, int]]) -> None:
        """Let `metrics` say what is counted of a device that has no state."""
        self._count = metrics

    def on_start(self, callback: Callable[[], object]) -> None:
        """Call `callback` just before the vCPUs run, or at once where they do already."""
        if self._board.running:
            callback()
        else:
            self.starts.append(callback)

    def pause(self) -> None:
        """Let everything of the device stand still."""
        for stop, _ in self._pauses:
            stop()

    def resume(self) -> None:
        """Let it go on."""
        for _, go in self._pauses:
            go()

    def close(self) -> None:
        """Give everything back. On the loop's thread, or when the loop does not run."""
        self._stack.close()
