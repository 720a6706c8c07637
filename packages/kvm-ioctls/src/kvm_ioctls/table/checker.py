"""C that compiles only if the declarations here are those of the headers it is compiled with.

The build compiles it for its own machine (`native/generate.py`); the tests compile it for every
architecture, by cross compilers and their headers. What a header is too old to know is passed over.
"""

from __future__ import annotations

from kvm_ioctls import arm64, constants, riscv64
from kvm_ioctls.table.exits import EXITS, exit_layout
from kvm_ioctls.table.foreign import FOREIGN
from kvm_ioctls.table.ioctls import IOCTLS
from kvm_ioctls.table.structs import ARCHITECTURES, GUARDS, layout, structs

__all__ = ["source"]

# Names that other architectures give another value, or gave one before they had the ring.
_X86_VALUES = ("KVM_COALESCED_MMIO_PAGE_OFFSET", "KVM_DIRTY_LOG_PAGE_OFFSET")
# Types that are no structures, and members that no header names.
_PLAIN = ("u64", "unsigned long", "int")
_OWN = {"arm64": arm64, "riscv": riscv64}


def source(architecture: str) -> str:
    """The checker for `x86`, `arm64` or `riscv`, or of the rows of `s390`, `powerpc` or `none`."""
    lines = ["#include <stddef.h>", "#include <linux/kvm.h>"]
    if architecture in ARCHITECTURES:
        lines += [*_ioctls(architecture), *_exits(architecture), *_constants(architecture)]
        lines += _structs(architecture)
    else:
        for row in FOREIGN:
            if row.on(architecture):  # powerpc has other direction bits, so the parts are compared
                what = (
                    f"_IOC_NR({row.name}) == {row.nr} && _IOC_SIZE({row.name}) == {row.struct or 0}"
                )
                lines += _guarded(row.name, [_assertion(what, row.name)])
        lines.insert(0, "#include <sys/ioctl.h>")
    return "\n".join([*lines, "typedef int kvm_check_is_not_empty;", ""])


def _assertion(condition: str, text: str) -> str:
    return f'_Static_assert({condition}, "{text}");'


def _guarded(macro: str, lines: list[str]) -> list[str]:
    return [f"#ifdef {macro}", *lines, "#endif"]


def _ioctls(architecture: str) -> list[str]:
    lines = []
    for row in IOCTLS:
        if row.on(architecture):
            what = f"{row.name} == {row.number(architecture):#x}UL"
            lines += _guarded(row.name, [_assertion(what, row.name)])
    return lines


def _exits(architecture: str) -> list[str]:
    lines = []
    for row in EXITS:
        name = f"KVM_EXIT_{row.name}"
        inner = [_assertion(f"{name} == {row.reason}", name)]
        # The debug exit's data is the architecture's own; all others are in the generic header.
        prefix = f"{row.member}." if row.member else ""
        if row.name != "DEBUG" or row.architecture == architecture:
            for field, (offset, _, _) in exit_layout(row).items():
                if field.startswith("_"):
                    continue
                what = f"offsetof(struct kvm_run, {prefix}{field}) == {offset}"
                inner.append(_assertion(what, f"{row.name}.{field}"))
        lines += _guarded(name, inner)
    return lines


def _constants(architecture: str) -> list[str]:
    values = {name: getattr(constants, name) for name in constants.__all__}
    if architecture != "x86":
        values = {name: value for name, value in values.items() if name not in _X86_VALUES}
        values |= vars(_OWN[architecture])
    lines = []
    for name, value in values.items():
        if isinstance(value, int) and name.startswith(("KVM_", "GUEST_")):
            lines += _guarded(
                name, [_assertion(f"{name} == {value}U{'L' * (value >> 32 > 0)}", name)]
            )
    if architecture != "x86":
        for expression, value in _OWN[architecture].EXPRESSIONS.items():
            lines.append(_assertion(f"{expression} == {value:#x}UL", expression))
    return lines


def _structs(architecture: str) -> list[str]:
    lines = []
    for name in structs(architecture):
        if name in _PLAIN:
            continue
        ours = layout(name, architecture)
        inner = [_assertion(f"sizeof(struct {name}) == {ours.size}", name)]
        for field in ours.fields:
            if not field.name.startswith("_"):
                what = f"offsetof(struct {name}, {field.name}) == {field.offset}"
                inner.append(_assertion(what, f"{name}.{field.name}"))
        guard = GUARDS.get(name)
        lines += _guarded(guard, inner) if guard else inner
    return lines
