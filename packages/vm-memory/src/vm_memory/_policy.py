"""Telling the kernel how to treat new regions, and asking it where pages are."""

from __future__ import annotations

import os

from vm_memory._mapping import PAGE, refused
from vm_memory._native import ffi, lib
from vm_memory.errors import MappingError
from vm_memory.options import Lock, NumaMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._mapping import Mapping
    from vm_memory.options import NumaPolicy, Options

# From <sys/mman.h>.
_MADV_MERGEABLE = 12
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15

# Large enough that a call is no overhead, small enough for a progress bar.
_CHUNK = 64 << 20


def apply(options: Options, mappings: list[Mapping]) -> None:
    """Apply options to new mappings: what decides about pages first, then the pages.

    Raises:
        MappingError: when the host refuses one.
    """
    for mapping in mappings:
        if options.numa is not None:
            _bind(mapping, options.numa)
        if options.transparent_hugepages is not None:
            advice = _MADV_HUGEPAGE if options.transparent_hugepages else _MADV_NOHUGEPAGE
            _advise(mapping, advice, "transparent huge pages; the kernel may be built without")
        if options.mergeable:
            _advise(mapping, _MADV_MERGEABLE, "KSM; the kernel may be built without")
        error = lib.vmm_mapping_exclude(mapping.handle, not options.dump, not options.inherit)
        if error:
            raise MappingError("madvise, to exclude memory from dumps or children", error)
        mapping.inherited = options.inherit
        if options.lock is not Lock.NONE:
            _lock(mapping, whole=options.lock is Lock.ALL)
    if options.prefault:
        _prefault(mappings, options)


def _advise(mapping: Mapping, advice: int, what: str) -> None:
    error = lib.vmm_advise(mapping.address, mapping.length, advice)
    if error:
        raise MappingError(f"madvise {advice}", error, what)


def _bind(mapping: Mapping, policy: NumaPolicy) -> None:
    bits = 1024
    mask = ffi.new("uint64_t[]", bits // 64)
    for node in policy.nodes:
        mask[node // 64] = mask[node // 64] | 1 << node % 64
    error = lib.vmm_bind(mapping.address, mapping.length, policy.mode, mask, bits)
    if error:
        nodes = ", ".join(map(str, policy.nodes))
        raise MappingError(
            f"mbind to nodes {nodes}, {NumaMode(policy.mode).name.lower()}",
            error,
            f"the host's nodes are {_read('/sys/devices/system/node/online')}",
        )


def _lock(mapping: Mapping, *, whole: bool) -> None:
    error = lib.vmm_lock(mapping.address, mapping.length, not whole)
    if error:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
        raise MappingError(
            f"mlock of {mapping.length:#x} bytes", error, f"RLIMIT_MEMLOCK is {limit}"
        )


def _prefault(mappings: list[Mapping], options: Options) -> None:
    """Touch all pages. The work runs in threads, whose calls hold no lock of Python's."""
    import threading

    chunks = [
        (mapping, start, min(_CHUNK, mapping.length - start))
        for mapping in mappings
        for start in range(0, mapping.length, _CHUNK)
    ]
    total = sum(length for _, _, length in chunks)
    waiting = iter(chunks)
    state = threading.Condition()
    results: list[tuple[int, int]] = []
    stop = False

    def work() -> None:
        while True:
            with state:
                chunk = None if stop else next(waiting, None)
            if chunk is None:
                return
            mapping, start, length = chunk
            error = lib.vmm_populate(mapping.address + start, length, mapping.page)
            with state:
                results.append((length, error))
                state.notify()

    threads: list[threading.Thread] = []
    done = 0
    try:
        for _ in range(min(options.prefault, len(chunks))):
            thread = threading.Thread(target=work)
            thread.start()
            threads.append(thread)
        for number in range(len(chunks)):
            with state:
                state.wait_for(lambda number=number: len(results) > number)  # type: ignore[misc]
            length, error = results[number]
            if error:
                raise refused(f"prefault of {total:#x} bytes", error, mappings[0].page)
            done += length
            if options.progress is not None:
                options.progress(done, total)
    finally:
        with state:
            stop = True
        for thread in threads:
            thread.join()


def advise(mapping: Mapping, advice: int, offset: int, length: int) -> None:
    """Advise about the pages of a range.

    Raises:
        MappingError: when the host refuses.
    """
    start = offset // mapping.page * mapping.page
    error = lib.vmm_advise(mapping.address + start, offset + length - start, advice)
    if error:
        raise MappingError(f"madvise {advice}", error)


def nodes(mapping: Mapping, offset: int, length: int) -> dict[int, int]:
    """How many pages of a range lie on which NUMA node; pages not there yet are left out.

    Raises:
        MappingError: when the kernel does not say.
    """
    first = offset // PAGE * PAGE
    found: dict[int, int] = {}
    while first < offset + length:
        count = min(-(-(offset + length - first) // PAGE), 65536)
        status = ffi.new("int[]", count)
        error = lib.vmm_nodes(mapping.address + first, PAGE, count, status)
        if error:
            raise MappingError("move_pages, to ask where pages are", error)
        for node in ffi.unpack(status, count):
            if node >= 0:
                found[node] = found.get(node, 0) + 1
        first += count * PAGE
    return found


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return "unknown"
    try:
        return os.read(fd, 100).decode().strip()
    finally:
        os.close(fd)
