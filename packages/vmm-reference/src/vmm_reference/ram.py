"""The machine's RAM: all that it may ever have is mapped here, and KVM shows what the guest has.

Memory that may come later is address space and nothing more until it is written: the host has no
pages behind it. What has not come has no slot in KVM. So a guest that touches it meets an empty
bus, and whoever else has the memory (devices, snapshots, migration) needs not know what comes
and goes: it reads as zeros.
"""

from __future__ import annotations

import threading

from vm_memory import Anonymous, FileShared, GuestAddress, GuestMemory, Memfd

from . import layout
from .errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm_ioctls import Vm
    from vm_memory.backing import Backing

    from .config import MachineConfig

__all__ = ["MODULES", "Ram", "check_addresses", "hotplug_areas", "memory_end"]

MODULES = "modules"  # the area of ACPI's memory devices
_GIB = 1 << 30
_KVM_MEM_LOG_DIRTY_PAGES, _KVM_MEM_READONLY = 1, 2
_FIRST_SLOT = 64  # of what comes and goes; below are those that stay


def hotplug_areas(config: MachineConfig) -> dict[str, tuple[int, int]]:
    """Guest address and size of what may come: `MODULES`, and devices with memory by their names.

    Each begins at a GiB, so that whatever a kernel takes for a block of memory begins there too.
    """
    wanted = {}
    if config.max_memory is not None and config.max_memory > config.memory:
        wanted[MODULES] = config.max_memory - config.memory
    for name, device in config.named_devices().items():
        if device.reserved_memory:
            wanted[name] = device.reserved_memory
    areas = {}
    at = layout.behind_ram(config.memory)
    for name, size in wanted.items():
        areas[name] = at, size
        at += -(-size // _GIB) * _GIB
    return areas


def memory_end(config: MachineConfig) -> int:
    """The first guest address above all memory that the machine has or may get."""
    areas = hotplug_areas(config).values()
    return max([layout.behind_ram(config.memory), *(at + size for at, size in areas)])


def _replaced(memory: GuestMemory, address: int, size: int, backing: Backing) -> GuestMemory:
    """The same memory, of which this area is made of something else.

    Raises:
        HostError: it can't be.
    """
    from vm_memory import VmMemoryError

    place = GuestAddress(address), size
    rest, _ = memory.remove(*place)
    try:
        made = GuestMemory.from_ranges([place], backing=backing, dirty_page_size=4096)
    except VmMemoryError as error:
        raise HostError(f"memory of {backing}", str(error), "check the file") from error
    return rest.insert(made.regions[0])


def check_addresses(config: MachineConfig, bits: int) -> None:
    """Refuse memory that has no address here. More than the host has is no mistake: it may wait.

    Args:
        config: of the machine.
        bits: width of guest-physical addresses on this host.

    Raises:
        ConfigError: some of the memory would lie beyond them.
    """
    if memory_end(config) > 1 << bits:
        size = config.max_memory or config.memory
        rule = f"does not fit into the {bits} bits of guest-physical addresses that this host has"
        raise ConfigError("memory", f"{size // layout.MIB}M", rule)


class Ram:
    """The memory of one machine.

    Args:
        config: says where it lies.
        given: memory that is to be it, with its content, or None for new memory.

    Attributes:
        memory: all of it.
        areas: what `hotplug_areas` says.

    Raises:
        ConfigError: this host refuses so much.
        HostError: what is given does not lie where this machine has memory.
    """

    def __init__(self, config: MachineConfig, given: GuestMemory | None) -> None:
        self.areas = hotplug_areas(config)
        roms = []
        if config.firmware is not None:
            from .firmware import rom_ranges

            roms = rom_ranges(config)
        pieces = sorted([*layout.ram_ranges(config.memory), *roms, *self.areas.values()])
        ranges = [(GuestAddress(address), size) for address, size in pieces]
        fresh = given is None
        if given is None:
            made_of = Memfd() if config.shared_memory else Anonymous()
            try:
                given = GuestMemory.from_ranges(ranges, backing=made_of, dirty_page_size=4096)
            except OSError as error:
                size = sum(size for _, size in pieces)
                rule = f"can't be had on this host: {error.strerror}"
                raise ConfigError("memory", f"{size // layout.MIB}M", rule) from error
        found = [(region.guest_address, region.size) for region in given.regions]
        if found != ranges:
            raise HostError("memory", f"{found} was saved", f"this machine has it at {ranges}")
        for name, device in config.named_devices().items():
            backing = device.memory_backing
            # What was saved of a private file is the machine's, and not what the file has.
            if backing is not None and (fresh or isinstance(backing, FileShared)):
                given = _replaced(given, *self.areas[name], backing)
        self.memory = given
        self._vm: Vm | None = None
        self._lock = threading.Lock()
        self._shown: dict[int, int] = {}  # slots of what comes and goes, by guest address
        self._flags = 0
        self._loggers: list[Callable[[bool], object]] = []

    def attach(self, vm: Vm) -> None:
        """Show a new virtual machine what is there from the start."""
        self._vm = vm
        hidden = [at for at, _ in self.areas.values()]
        stay = [region for region in self.memory.regions if region.guest_address not in hidden]
        for slot, region in enumerate(stay):
            rom = layout.MMIO_GAP_START <= region.guest_address < layout.MMIO_GAP_END
            vm.set_user_memory_region(
                slot=slot,
                guest_phys_addr=region.guest_address,
                memory=region.buffer,
                flags=_KVM_MEM_READONLY if rom else 0,
            )

    def show(self, address: int, size: int) -> None:
        """Let the guest have a part of an area; any thread.

        Raises:
            KvmError: the host refuses.
        """
        assert self._vm is not None
        with self._lock:
            used = set(self._shown.values())
            slot = next(n for n in range(_FIRST_SLOT, 1 << 15) if n not in used)
            self._vm.set_user_memory_region(
                slot=slot,
                guest_phys_addr=address,
                memory=self._buffer(address, size),
                flags=self._flags,
            )
            self._shown[address] = slot

    def hide(self, address: int) -> None:
        """Take away what `show` showed from this address on; any thread. What is in it stays."""
        assert self._vm is not None
        with self._lock:
            slot = self._shown.pop(address)
            if self._flags:
                log = self._vm.get_dirty_log(slot)
                self.memory.merge_dirty(GuestAddress(address), log)
            self._vm.set_user_memory_region(slot=slot, memory=None)

    def log_dirty_pages(self, *, on: bool) -> None:
        """Let KVM note which pages the guest writes, or not, and who else can; any thread."""
        assert self._vm is not None
        with self._lock:
            loggers = list(self._loggers)
            self._flags = _KVM_MEM_LOG_DIRTY_PAGES * on
            for slot in self._vm.slots:
                flags = slot.flags & ~_KVM_MEM_LOG_DIRTY_PAGES | self._flags
                if flags != slot.flags:
                    self._vm.set_user_memory_region(
                        slot=slot.slot,
                        guest_phys_addr=slot.guest_phys_addr,
                        memory=self._buffer(slot.guest_phys_addr, slot.size),
                        flags=flags,
                    )
        for log in loggers:
            log(on)

    def add_logger(self, log: Callable[[bool], object]) -> None:
        """Tell somebody who writes memory on his own whether pages are noted; now and later."""
        with self._lock:
            self._loggers.append(log)
            on = bool(self._flags)
        log(on)

    def remove_logger(self, log: Callable[[bool], object]) -> None:
        """Tell him no more."""
        with self._lock:
            self._loggers.remove(log)

    def dirty(self) -> list[tuple[int, int]]:
        """Guest address and length of what guest and devices have written since the last call."""
        assert self._vm is not None
        with self._lock:
            for slot in self._vm.slots:
                if slot.flags & _KVM_MEM_LOG_DIRTY_PAGES:
                    log = self._vm.get_dirty_log(slot.slot)
                    self.memory.merge_dirty(GuestAddress(slot.guest_phys_addr), log)
        # Regions end at whole pages, and so do these.
        return [(int(address), length) for address, length in self.memory.harvest_dirty()]

    def _buffer(self, address: int, size: int) -> memoryview:
        region = self.memory.find_region(GuestAddress(address))
        assert region is not None
        start = address - region.guest_address
        return region.buffer[start : start + size]
