"""The tables of the documentation, written from the declarations: `python -m ...parity FILE`.

A test compares the committed file with what this writes, so that neither goes stale.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from kvm_ioctls._hints import HINTS
from kvm_ioctls.table.exits import EXITS
from kvm_ioctls.table.foreign import FOREIGN
from kvm_ioctls.table.ioctls import IOCTLS, Ioctl

__all__ = ["OBJECTS", "render", "tested"]

OBJECTS = {"kvm": "Kvm", "vm": "Vm", "vcpu": "Vcpu", "device": "Device"}

# What no test can carry out on the machines at hand: it is called, and the kernel's answer checked.
_REFUSED = (
    "KVM_MEMORY_ENCRYPT", "KVM_XEN_", "KVM_HYPERV_EVENTFD", "KVM_SET_MEMORY_ATTRIBUTES", "KVM_ARM_",
    "KVM_SET_VAPIC_ADDR", "KVM_TPR_ACCESS_REPORTING", "KVM_SMI", "KVM_GET_REG_LIST",
    "KVM_GET_ONE_REG", "KVM_SET_ONE_REG", "KVM_PRE_FAULT_MEMORY",
)  # fmt: skip
_IN_LAB = ("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE")

_IOCTLS = """\
## Every ioctl

Generated from `kvm_ioctls.table`. *On KVM*: carried out by tests on a real `/dev/kvm`; *in the
lab*: on stock `kvm_amd`; *refusal*: called, and the kernel's answer checked, because no machine at
hand can carry it out; *headers*: not carried out by this library, its number compared with the
kernel's headers.

| Ioctl | Number | Architecture | Method of | Capability | Tested |
| --- | --- | --- | --- | --- | --- |
"""
_EXITS = """
## Every exit

Shown by a *guest* that makes it, by one in the *lab*, or by a run *page* laid out as the header
says.

| Reason | Number | Classes | Architecture | Shown |
| --- | --- | --- | --- | --- |
"""
_ERRORS = """
## Errors: likely cause and cure

The first row that fits speaks; `*` stands for anything.

| Ioctl | errno | What it says |
| --- | --- | --- |
"""


def tested(row: Ioctl) -> str:
    """How the tests show an ioctl: `on KVM`, `in the lab`, `refusal` or `headers`."""
    if not row.wrapped:
        return "headers"
    if row.name.startswith(_REFUSED):
        return "refusal"
    return "in the lab" if row.name in _IN_LAB else "on KVM"


def render() -> str:
    """The three tables as Markdown."""
    lines = _IOCTLS.splitlines()
    for row in (*IOCTLS, *FOREIGN):
        architecture = row.architecture.split("/")[0]
        number = row.number(architecture if row.wrapped and architecture != "all" else "x86")
        where = ", ".join(OBJECTS[kind] for kind in row.fd.split()) if row.wrapped else ""
        capability = row.capability or ""
        lines.append(f"| `{row.name}` | `{number:#x}` | {row.architecture} | {where} | {capability}"
                     f" | {tested(row)} |")  # fmt: skip
    lines += _EXITS.splitlines()
    for exit_row in EXITS:
        classes = ", ".join(f"`{name}`" for name in exit_row.classes)
        lines.append(f"| `KVM_EXIT_{exit_row.name}` | {exit_row.reason} | {classes}"
                     f" | {exit_row.architecture} | {exit_row.shown} |")  # fmt: skip
    lines += _ERRORS.splitlines()
    for name, number, text in HINTS:
        lines.append(f"| `{name}` | {errno.errorcode[number]} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render())
