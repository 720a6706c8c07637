"""What a machine with firmware has instead of a kernel: its image, flash, and what it is told.

The image ends at 4 GiB, read-only; its last 128 KiB lie below 1 MiB too, in RAM, which is what a
PC's chipset shows once firmware has copied itself there. Below the image may lie a flash chip with
the firmware's variables, kept in a file. Memory, CPUs and ACPI tables are told by the CMOS memory
and the firmware configuration device.
"""

from __future__ import annotations

import os
import time
from struct import pack

from linux_loader import E820Entry, E820Type, load
from vm_memory import GuestAddress, Permissions

from . import layout
from .acpi import linker
from .devices import fw_cfg
from .errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linux_loader import EntryState
    from vm_memory import GuestMemory

    from .config import MachineConfig
    from .pci.bus import PciBus
    from .wiring import Wiring

__all__ = ["add_chipset", "add_flash", "add_fw_cfg", "load_firmware", "rom_ranges"]

# Items of the configuration device (QEMU's include/standard-headers/linux/qemu_fw_cfg.h).
_RAM_SIZE, _CPUS, _MAX_CPUS = 0x03, 0x05, 0x0F
_E820, _SERIAL_CONSOLE = "etc/e820", "etc/sercon-port"


def rom_ranges(config: MachineConfig) -> list[tuple[int, int]]:
    """Address and size of the firmware's image and, where it has one, of its variables' flash."""
    ranges = []
    end = layout.MMIO_GAP_END
    for path in (config.firmware, config.variables):
        if path is not None:
            size = os.stat(path).st_size  # noqa: PTH116 - pathlib is not imported on the boot path
            end -= size
            ranges.append((end, size))
    return ranges


def load_firmware(memory: GuestMemory, path: str, size: int) -> EntryState:
    """Put firmware where the processor begins and below 1 MiB.

    Args:
        memory: with a region that the image fills, up to 4 GiB.
        path: of the image.
        size: of the machine's RAM, in bytes.

    Raises:
        LoaderError: the image can't be firmware.
    """
    ram = [E820Entry(address, length, E820Type.RAM) for address, length in layout.ram_ranges(size)]
    return load(memory, path, memory_map=ram, zeroed=True, map_files=False).entry


def add_flash(wiring: Wiring, path: str, address: int, *, restored: bool) -> None:
    """A flash chip whose array is the machine's memory at `address`, kept in a file.

    Args:
        wiring: the machine's side.
        path: of the file.
        address: guest-physical; the memory there has a slot of its own.
        restored: whether the memory holds what the chip had; else it takes the file's content.

    Raises:
        HostError: the file can't be read or written.
    """
    from kvm_ioctls import constants

    from .devices.flash import Flash

    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"variables {path}", error.strerror, "give a copy that can be written"
        ) from None
    wiring.on_close(lambda: os.close(fd))
    memory, vm = wiring.memory, wiring.vm
    region = memory.find_region(GuestAddress(address))
    assert region is not None
    (array,) = memory.slices(GuestAddress(address), region.size, Permissions.WRITE)
    if not restored:
        memory.write(GuestAddress(address), os.pread(fd, region.size, 0))
    slot = next(s.slot for s in vm.slots if s.guest_phys_addr == address)

    def changed(offset: int, length: int) -> bool:
        memory.mark_dirty(GuestAddress(address + offset), length)
        try:
            return os.pwrite(fd, array[offset : offset + length], offset) == length
        except OSError:  # a full disk is the guest's to deal with, as a chip that fails is
            return False

    def show(whole: bool) -> None:
        """In KVM's hands while it shows its array, in ours while it does not."""
        vm.set_user_memory_region(
            slot=slot,
            guest_phys_addr=address,
            memory=region.buffer if whole else None,
            flags=constants.KVM_MEM_READONLY,
        )

    flash = Flash(array, changed, show)
    wiring.mmio.add(address, region.size, flash)
    wiring.keep(flash)


def add_chipset(wiring: Wiring, bus: PciBus | None) -> None:
    """ACPI's fixed hardware, and on a PCI bus the bridges that firmware looks for."""
    from .devices import pm1, pm_timer
    from .outcome import Outcome

    # Ticks that come late, as after a pause, are lost: made up, they would swamp firmware.
    wiring.vm.reinject_control(False)
    blocks = pm1.Pm1(lambda: wiring.end(Outcome.POWER_OFF))
    wiring.ports.add(pm1.PORT, pm1.SIZE, blocks)
    wiring.keep(blocks, "pm1")
    wiring.announce_fixed_hardware()

    timer = pm_timer.PmTimer(time.monotonic)
    wiring.ports.add(pm_timer.PORT, pm_timer.SIZE, timer)
    wiring.keep(timer, "timer")
    if bus is not None:
        from .pci import chipset

        for name, function in chipset.add_chipset(bus).items():
            wiring.keep(function, name)


def add_fw_cfg(wiring: Wiring, config: MachineConfig, acpi: bytes) -> None:
    """The device by which firmware learns what the machine is.

    Args:
        wiring: the machine's side.
        config: of the machine.
        acpi: its tables, made for address 0.
    """
    ranges = [(*piece, E820Type.RAM) for piece in layout.ram_ranges(config.memory)]
    reserved = layout.TSS + 0x3000 - layout.IDENTITY_MAP
    ranges.append((layout.IDENTITY_MAP, reserved, E820Type.RESERVED))
    cpus = pack("<H", config.cpus)
    device = fw_cfg.FwCfg(
        wiring.memory,
        {_RAM_SIZE: pack("<Q", config.memory), _CPUS: cpus, _MAX_CPUS: cpus},
        {
            _E820: b"".join([pack("<QQI", *piece) for piece in ranges]),
            _SERIAL_CONSOLE: pack("<H", layout.SERIAL_PORT),
            **linker.link(acpi),
        },
    )
    wiring.ports.add(fw_cfg.PORT, fw_cfg.SIZE, device)
    wiring.keep(device)
