"""Write the extension's generated sources: called by CMake as `generate.py OUT.c`.

Beside OUT.c it writes `kvm_numbers.h`, every ioctl's number, and `kvm_check.c`, which compiles
only if these numbers and our layouts are those of the system's `linux/kvm.h`, as far as it goes.
All three come from `kvm_ioctls.table`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

from kvm_ioctls.table import HOST, IOCTLS  # noqa: E402
from kvm_ioctls.table.checker import source  # noqa: E402


def numbers() -> str:
    """The header with one constant for each ioctl."""
    return "".join(f"#define {row.name} {row.request:#x}UL\n" for row in IOCTLS)


def main(out: Path) -> None:
    """Write the three files."""
    out.with_name("kvm_numbers.h").write_text(numbers())
    # Where the system has no header there is nothing to compare with; the tests bring headers.
    check = f"#if __has_include(<linux/kvm.h>)\n{source(HOST)}#endif\ntypedef int not_empty;\n"
    out.with_name("kvm_check.c").write_text(check)
    ffi = FFI()
    ffi.cdef((HERE / "cdef.h").read_text())
    ffi.cdef("".join(f"#define {row.name} ...\n" for row in IOCTLS))
    for name in ("KICKED", "POSTED", "DECLARATIONS", "COALESCED_PAGE"):
        ffi.cdef(f"#define KVMI_{name} ...\n")
    ffi.set_source("kvm_ioctls._native", '#include "kvmi.h"\n#include "kvm_numbers.h"\n')
    ffi.emit_c_code(str(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
