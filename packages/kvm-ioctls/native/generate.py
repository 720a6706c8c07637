"""Write the extension's generated sources: called by CMake as `generate.py OUT.c`.

Beside OUT.c it writes `kvm_numbers.h`, every ioctl's number, and `kvm_check.c`, which compiles
only if these numbers and our layouts are those of the system's `linux/kvm.h`, as far as it goes.
All three come from `kvm_ioctls.table`.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

from kvm_ioctls import constants  # noqa: E402
from kvm_ioctls.table import EXITS, IOCTLS, STRUCTS, exit_layout, layout  # noqa: E402
from kvm_ioctls.table.structs import GUARDS  # noqa: E402

MACHINES = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv"}
# Types whose members linux/kvm.h spells with unnamed parts, or that are no structure at all.
PLAIN = ("u64", "unsigned long")


def numbers() -> str:
    """The header with one constant for each ioctl."""
    return "".join(f"#define {row.name} {row.request:#x}UL\n" for row in IOCTLS)


def check(architecture: str) -> str:
    """C that the compiler refuses when a number or a layout differs from the system's header."""
    lines = [
        "#if __has_include(<linux/kvm.h>)",
        "#include <stddef.h>",
        "#include <linux/kvm.h>",
    ]
    for row in IOCTLS:
        if row.architecture == "all" or architecture in row.architecture.split("/"):
            lines += [
                f"#ifdef {row.name}",
                f'_Static_assert({row.name} == {row.request:#x}UL, "{row.name}");',
                "#endif",
            ]
    for row in EXITS:
        # The header names the architecture's own part of the union only where it is built.
        if row.architecture not in ("s390", architecture, "all", "powerpc", "riscv", "loongarch"):
            continue
        lines += [
            f"#ifdef KVM_EXIT_{row.name}",
            f'_Static_assert(KVM_EXIT_{row.name} == {row.reason}, "KVM_EXIT_{row.name}");',
        ]
        prefix = f"{row.member}." if row.member else ""
        lines += [
            f"_Static_assert(offsetof(struct kvm_run, {prefix}{field}) == {offset}, "
            f'"{row.name}.{field}");'
            for field, (offset, _, _) in exit_layout(row).items()
        ]
        lines.append("#endif")
    for name in constants.__all__:
        value = getattr(constants, name)
        if isinstance(value, int):
            lines += [
                f"#ifdef {name}",
                f'_Static_assert({name} == {value}, "{name}");',
                "#endif",
            ]
    used = {row.struct for row in IOCTLS if row.struct}
    for name in STRUCTS:
        if name in PLAIN or name.startswith("exit "):
            continue
        if architecture != "x86" and name not in used:
            continue
        if architecture != "x86" and not any(
            row.architecture == "all" for row in IOCTLS if row.struct == name
        ):
            continue
        ours = layout(name)
        guard = GUARDS.get(name)
        lines += [f"#ifdef {guard}"] if guard else []
        lines.append(f'_Static_assert(sizeof(struct {name}) == {ours.size}, "{name}");')
        lines += [
            f"_Static_assert(offsetof(struct {name}, {field.name}) == {field.offset}, "
            f'"{name}.{field.name}");'
            for field in ours.fields
        ]
        lines += ["#endif"] if guard else []
    lines += ["#endif", "typedef int kvm_check_is_not_empty;"]
    return "\n".join(lines) + "\n"


def main(out: Path) -> None:
    """Write the three files."""
    out.with_name("kvm_numbers.h").write_text(numbers())
    out.with_name("kvm_check.c").write_text(
        check(MACHINES.get(platform.machine(), platform.machine()))
    )
    ffi = FFI()
    ffi.cdef((HERE / "cdef.h").read_text())
    ffi.cdef("".join(f"#define {row.name} ...\n" for row in IOCTLS))
    ffi.cdef("#define KVMI_KICKED ...\n")
    ffi.set_source("kvm_ioctls._native", '#include "kvmi.h"\n#include "kvm_numbers.h"\n')
    ffi.emit_c_code(str(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
