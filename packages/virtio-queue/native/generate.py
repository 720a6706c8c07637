"""Write the C source of `virtio_queue._native` from `cdef.h`: `python generate.py OUTPUT`."""

import sys
from pathlib import Path

import cffi

ffi = cffi.FFI()
ffi.cdef(Path(__file__).with_name("cdef.h").read_text(encoding="utf-8"))
ffi.set_source("virtio_queue._native", '#include "pump.h"')
ffi.emit_c_code(sys.argv[1])
