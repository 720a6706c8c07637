"""Declarations that are written twice: what cffi is told, and the headers of the C behind it.

cffi converts by the one, the compiler by the other, and a number that is 64 bits wide here and 32
there is cut in silence. The checker is C that does not compile if one type differs.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

PACKAGES = Path(__file__).parent.parent / "packages"
HEADERS = {
    "vm-memory": "vm_memory.h",
    "virtio-queue": "pump.h",
    "kvm-ioctls": "kvmi.h",
}


def compiles(folder: Path, source: str) -> str:
    """What the compiler objects to; empty when it takes the source."""
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-Werror", f"-I{folder}", "-fsyntax-only",
               "-xc", "-"]  # fmt: skip
    return subprocess.run(
        command, input=source, capture_output=True, text=True, check=False, timeout=60
    ).stderr


def cdef(package: str) -> str:
    """What cffi is told, without comments."""
    text = (PACKAGES / package / "native" / "cdef.h").read_text()
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def prototypes(text: str) -> list[str]:
    """The functions that are declared."""
    outside = re.sub(r"\{.*?\}", "", text, flags=re.DOTALL)
    return [part.strip() + ";" for part in outside.split(";") if "(" in part]


def fields(ffi: Any, text: str) -> list[tuple[str, str, str]]:
    """Type, name and type of each field of each structure whose fields are declared."""
    names = [f"struct {name}" for name in re.findall(r"struct (\w+)\s*\{", text)]
    names += re.findall(r"\}\s*(\w+);", text)
    return [
        (name, field, ffi.getctype(kind.type))
        for name in names
        for field, kind in ffi.typeof(name).fields or ()
    ]


@pytest.mark.parametrize("package", HEADERS)
def test_cffi_and_the_compiler_are_told_the_same(package: str) -> None:
    """Every function by a second declaration, every field of a structure by its type."""
    native = importlib.import_module(f"{package.replace('-', '_')}._native")
    text = cdef(package)
    functions, members = prototypes(text), fields(native.ffi, text)
    assert len(functions) > 10
    assert len(members) > 5
    lines = [f'#include "{HEADERS[package]}"', *functions]
    lines += [
        f"_Static_assert(__builtin_types_compatible_p(__typeof__((({kind} *)0)->{field}), "
        f'__typeof__({of})), "{field} of {kind}");'
        for kind, field, of in members
    ]
    folder = PACKAGES / package / "native"
    assert compiles(folder, "\n".join(lines)) == ""
    # The checker can fail: one wrong type of each kind is found.
    wrong = functions[-1].replace("uint64_t", "uint16_t").replace("uint32_t", "uint16_t")
    wrong = wrong.replace("(struct vp_pump *pump)", "(int pump)")
    assert "conflicting types" in compiles(folder, "\n".join([lines[0], wrong]))
    assert "static assertion failed" in compiles(
        folder, "\n".join([lines[0], lines[-1].replace(f"({members[-1][2]})", "(char)")])
    )


def test_both_headers_of_the_table_of_regions_are_one() -> None:
    """virtio-queue repeats vm-memory's structures: each field at the same place, same version."""
    other = {"vmm_table": "their_table", "vmm_table_region": "their_region"}
    lines = ['#include "vm_memory.h"', "enum { VERSION = VMM_TABLE_VERSION };"]
    lines += ["#undef VMM_TABLE_VERSION"]
    lines += [f"#define {ours} {theirs}" for ours, theirs in other.items()]
    lines += [f'#include "{PACKAGES / "virtio-queue" / "native" / "vmm_table.h"}"']
    lines += [f"#undef {ours}" for ours in other]
    lines += ['_Static_assert(VMM_TABLE_VERSION == VERSION, "version");']
    ffi = importlib.import_module("vm_memory._native").ffi
    for ours, theirs in other.items():
        lines += [f'_Static_assert(sizeof(struct {ours}) == sizeof(struct {theirs}), "{ours}");']
        for field, _ in ffi.typeof(f"struct {ours}").fields:
            place = f"__builtin_offsetof(struct {{}}, {field})"
            lines += [f"_Static_assert({place.format(ours)} == {place.format(theirs)}, "
                      f'"{field} of {ours}");']  # fmt: skip
            if field not in ("retain", "release", "regions"):  # these name the structures
                kind = f"__typeof__(((struct {{}} *)0)->{field})"
                lines += [f"_Static_assert(__builtin_types_compatible_p({kind.format(ours)}, "
                          f'{kind.format(theirs)}), "type of {field}");']  # fmt: skip
    assert compiles(PACKAGES / "vm-memory" / "native", "\n".join(lines)) == ""
