"""KVM's user API as data: structures, ioctls and exits, one row each.

This is the only place where a number or a layout of the kernel is declared. The build reads it
(`native/generate.py`) for the extension's constants and for a checker that compares every row with
the system's own header; the tests compare it with the classes; the documentation prints it.
Nothing here is imported while a guest runs: only an error message looks a name up.
"""

from __future__ import annotations

from kvm_ioctls.table.exits import EXITS, ExitRow, exit_layout
from kvm_ioctls.table.ioctls import HOST, IOCTLS, MACHINES, Ioctl, find
from kvm_ioctls.table.structs import ARCHITECTURES, Field, Layout, layout, structs

__all__ = [
    "ARCHITECTURES", "EXITS", "HOST", "IOCTLS", "MACHINES", "ExitRow", "Field", "Ioctl", "Layout",
    "exit_layout", "find", "layout", "structs",
]  # fmt: skip
