"""PVH: a 32-bit entry with `struct hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h)."""

from __future__ import annotations

import struct

from linux_loader.entry import TableState, protected_mode
from linux_loader.placement import Placement
from linux_loader.request import initrd_range
from linux_loader.tables import descriptor_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from linux_loader.e820 import E820Entry
    from linux_loader.entry import EntryState
    from linux_loader.request import BootRequest

__all__ = ["plan_pvh", "start_info"]

_MAGIC = 0x336EC578
_VERSION = 1
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_ENTRY = struct.Struct("<QQII")


def start_info(
    *,
    address: int,
    memory_map: tuple[E820Entry, ...],
    cmdline: int,
    modules: Iterable[tuple[int, int]],
    rsdp: int,
) -> bytes:
    """Return the start info, followed by the module list and the memory map it points at.

    Args:
        address: where it will lie, guest-physical.
        memory_map: sorted entries.
        cmdline: address of the command line, 0 for none.
        modules: address and size of each; the first one is Linux's initrd.
        rsdp: address of the ACPI root pointer, 0 for none.
    """
    module_list = b"".join([_MODULE.pack(start, size, 0, 0) for start, size in modules])
    at_modules = address + _START_INFO.size
    at_map = at_modules + len(module_list)
    info = _START_INFO.pack(
        _MAGIC,
        _VERSION,
        0,
        len(module_list) // _MODULE.size,
        at_modules if module_list else 0,
        cmdline,
        rsdp,
        at_map,
        len(memory_map),
        0,
    )
    table = b"".join([_ENTRY.pack(item.address, item.size, item.type, 0) for item in memory_map])
    return info + module_list + table


def plan_pvh(
    request: BootRequest, *, kernel: list[Placement], entry: int
) -> tuple[list[Placement], EntryState]:
    """Plan the start of an image at its 32-bit PVH entry; the initrds become the one module.

    Raises:
        LoaderError: something does not fit.
    """
    request.refuse_linux_extras("PVH")
    layout = request.layout
    gdt = descriptor_table(long=False)
    placements = [
        *kernel,
        Placement("GDT", layout.gdt, len(gdt), gdt),
        Placement("stack", layout.stack & -4096, layout.stack % 4096),
        request.cmdline_placement(2047, address=layout.cmdline),
    ]
    initrds = request.initrd_placements(placements, 1 << 32)
    info = start_info(
        address=layout.start_info,
        memory_map=request.memory_map,
        cmdline=layout.cmdline,
        modules=[initrd_range(initrds)] if initrds else [],
        rsdp=request.rsdp,
    )
    placements += initrds
    placements.append(Placement("start info", layout.start_info, len(info), info))
    state = protected_mode(
        rip=entry,
        rsp=layout.stack,
        rbx=layout.start_info,
        gdt=TableState(layout.gdt, len(gdt) - 1),
    )
    return placements, state
