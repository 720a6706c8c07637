"""What a machine that begins with a kernel has in its memory, and the tables that ACPI gets."""

from __future__ import annotations

from linux_loader import (
    CmdlineError,
    E820Entry,
    E820Type,
    LoaderError,
    PlacementError,
    Protocol,
    load,
)
from linux_loader.cache import default_folder
from vm_memory import GuestAddress

from . import layout
from .acpi import tables
from .devices import pm
from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from linux_loader import EntryState
    from vm_memory import GuestMemory

    from .config import MachineConfig

__all__ = ["Announcements", "load_kernel"]


class Announcements:
    r"""What the devices have to tell by ACPI, until its tables are made.

    Attributes:
        devices: each gives a term of `vmm_reference.acpi.aml` for `\_SB`.
        events: bits of `vmm_reference.devices.pm`'s events, and the method that each calls.
        tables: signature and body of further tables.
        memory: address, size and node of memory that may come.
        boot_flags: of the FADT (table 5.11).
        fixed_hardware: whether there are PM1 blocks and a PM timer.
    """

    def __init__(self) -> None:
        self.devices: list[Callable[[], bytes]] = []
        self.events: list[tuple[int, str]] = []
        self.tables: list[tuple[bytes, bytes]] = []
        self.memory: list[tuple[int, int, int]] = []
        self.boot_flags = 0
        self.fixed_hardware = False

    def build(self, config: MachineConfig, *, address: int) -> bytes:
        """All tables, as they lie from `address` on."""
        more = list(self.tables)
        if self.memory:
            from .acpi.srat import srat

            ram = layout.ram_ranges(config.memory)
            more.append((b"SRAT", srat(config.max_cpus or config.cpus, ram, self.memory)))
        return tables.build(
            cpus=config.cpus,
            max_cpus=config.max_cpus,
            devices=[term() for term in self.devices],
            events=self.events,
            more=more,
            boot_flags=self.boot_flags,
            fixed_hardware=self.fixed_hardware,
            address=address,
        )


def load_kernel(memory: GuestMemory, config: MachineConfig, announced: Announcements) -> EntryState:
    """Put ACPI tables, kernel, initrd and boot parameters into memory, which is fresh.

    Raises:
        ConfigError: the kernel, its command line or the initrd can't be loaded.
    """
    assert config.kernel is not None
    acpi = announced.build(config, address=layout.ACPI_TABLES)
    memory.write(GuestAddress(layout.ACPI_TABLES), acpi)
    memory.write(GuestAddress(layout.RESET_VECTOR), pm.RESET_CODE)
    ranges = layout.e820_ranges(config.memory, pci=config.transport == "pci")
    try:
        return load(
            memory,
            config.kernel,
            memory_map=[
                E820Entry(address, size, E820Type.RAM if usable else E820Type.RESERVED)
                for address, size, usable in ranges
            ],
            cmdline=config.cmdline,
            initrd=config.initrd,
            protocol=None if config.protocol == "auto" else Protocol(config.protocol),
            rsdp=layout.ACPI_TABLES,
            kaslr=config.kaslr,
            cache=default_folder(),
            zeroed=True,
            # Copied, not mapped: in huge pages the guest runs faster than on the page cache.
            map_files=False,
        ).entry
    except LoaderError as error:
        raise _refused(config, error) from error


def _refused(config: MachineConfig, error: LoaderError) -> ConfigError:
    """What the loader objects to, as a mistake in the field that a user can change."""
    match error:
        case CmdlineError():
            return ConfigError("cmdline", f"{len(config.cmdline)} characters", error.rule)
        case PlacementError():
            return ConfigError("memory", f"{config.memory // layout.MIB}M", str(error))
    return ConfigError("kernel", config.kernel, str(error))
