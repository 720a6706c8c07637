"""A machine to a folder, and a folder to a machine.

The order of a snapshot: memory while the guest runs, then with the guest paused what it has
written meanwhile and all states, then, while it runs on, the disk's confirmation and the commit.
The paused part is on the I/O thread, so that no device works between its state and its memory.

Time: a machine that was paused or saved goes on as if no time had passed. Its kvmclock and its TSC
continue where they were, and the guest is told that it was stopped (KVM_KVMCLOCK_CTRL), so that
its watchdogs keep calm. The real-time clock shows the host's time.
"""

from __future__ import annotations

import enum
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kvm_ioctls.state import VcpuState, VmState
from vm_memory import Anonymous, FilePrivate, GuestAddress, GuestMemory, Memfd, Options
from vm_memory._values import evolve
from vm_memory.filler import Filler
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.errors import HostError

from . import memory as pages
from .folder import Difference, SnapshotReader, SnapshotWriter
from .format import FormatError
from .memory import MemoryDigests, MemoryState, Source
from .ranges import joined

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm_reference.board import Board

__all__ = ["Restore", "Restored", "merge", "open_snapshot", "verify"]

T = TypeVar("T")

_SYSTEM_TIME = 0x4B564D01  # MSR_KVM_SYSTEM_TIME_NEW (Documentation/virt/kvm/x86/msr.rst)


class Restore(enum.Enum):
    """How memory comes back.

    Attributes:
        EAGER: all of it is read, and its digests compared, before the guest runs.
        COPY_ON_WRITE: the file is mapped: the guest runs at once, unwritten pages are shared with
            all who map the same file, and the file must stay. Read to the end by `verify`.
        ON_DEMAND: what the guest touches comes at once, the rest in the background; afterwards
            nothing depends on the file.
    """

    EAGER = "eager"
    COPY_ON_WRITE = "copy-on-write"
    ON_DEMAND = "on-demand"


class Tracking:
    """Which pages have changed since the last snapshot of a running board.

    Attributes:
        base: folder and digest of that snapshot.
        digests: of its memory.
    """

    def __init__(self, folder: Path, digest: str, digests: MemoryDigests) -> None:
        self.folder = folder
        self.digest = digest
        self.digests = digests


class Saving:
    """One snapshot under way: `running` while the guest runs, `paused`, then `commit`.

    Args:
        board: of the machine.
        config: what it is.
        folder: where to.
        base: the folder of the snapshot to tell the difference to, or None for a whole one.
        track: whether a difference to this one may be asked for.
    """

    def __init__(
        self,
        board: Board,
        config: MachineConfig,
        folder: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None,
        track: bool,
    ) -> None:
        self._board, self._config, self._track = board, config, track
        self._base = None
        known = board.tracking
        if base is not None:
            if known is None or known.folder != Path(base).resolve():
                where = "none" if known is None else str(known.folder)
                hint = "take a whole one with track=True first"
                told = f"what changed is known since {where}"
                raise HostError(f"difference to {base}", told, hint)
            if Path(folder).resolve() == known.folder:
                hint = "name another folder: a difference needs its base"
                raise HostError(f"snapshot {folder}", "is the base itself", hint)
            self._base = known
        self._writer = SnapshotWriter(folder)
        self._digests = known.digests if self._base is not None and known else None
        self._ranges: set[tuple[int, int]] | None = None if self._base is None else set()

    def running(self) -> None:
        """Write what is likely to stay as it is, while the guest runs."""
        board = self._board
        if self._base is None:
            board.tracking = None
            board.ram.log_dirty_pages(on=True)
            board.ram.dirty()
            self._digests = pages.store(board.memory, self._writer.memory)
        else:
            self._store(board.ram.dirty())

    def paused(self) -> None:
        """Write the rest and all states. The guest stands still; on the I/O thread."""
        board = self._board
        if self._digests is None:
            if self._track:
                board.ram.log_dirty_pages(on=True)
                board.ram.dirty()
            self._digests = pages.store(board.memory, self._writer.memory)
        else:
            self._store(board.ram.dirty())
        if not self._track:
            board.ram.log_dirty_pages(on=False)
        regions = pages.describe(board.memory)
        ranges = None if self._ranges is None else tuple(joined(self._ranges))
        writer = self._writer
        writer.add_table("config", self._config.to_mapping())
        writer.add("memory", MemoryState(regions, ranges))
        writer.add("digests", self._digests)
        for name, state in board.save():
            writer.add(name, state)

    def copy_drives(self) -> dict[str, str]:
        """Put copies of what the guest writes on drives beside it: their paths, by drive's name.

        The guest stands still; on the I/O thread.

        Raises:
            HostError: one can't be copied.
        """
        from vmm_reference.devices.blk.setup import DriveControl

        found = {}
        for name, device in self._config.named_devices().items():
            if isinstance(device, Drive) and not device.read_only:
                control = self._board.control(name)
                assert isinstance(control, DriveControl)
                found[name] = self._writer.beside(f"{name}.img")
                control.copy(found[name])
        return found

    def commit(self) -> str:
        """Make it the folder's snapshot; its digest. The guest may run."""
        from importlib.metadata import version

        base = None
        folder = self._writer.folder
        if self._base is not None:
            where = os.path.relpath(self._base.folder, folder.resolve())
            base = Difference(where, self._base.digest)
        digest = self._writer.commit(version("vmm-reference"), base)
        assert self._digests is not None
        self._board.tracking = (
            Tracking(folder.resolve(), digest, self._digests) if self._track else None
        )
        return digest

    def abandon(self) -> None:
        """Take away what was written. What changed since the base is not known any more."""
        self._board.tracking = None
        self._writer.abandon()

    def _store(self, ranges: list[tuple[int, int]]) -> None:
        self._digests = pages.store(self._board.memory, self._writer.memory, self._digests, ranges)
        if self._ranges is not None:
            self._ranges.update(ranges)


def start_clock(board: Board) -> None:
    """Let the guest's clock go on from there, and tell the guest that it was stopped."""
    if board.clock is None:
        return
    board.vm.set_clock(evolve(board.clock, flags=0))
    board.clock = None
    for vcpu in board.vm.vcpus:
        if vcpu.get_msrs([_SYSTEM_TIME]).values.get(_SYSTEM_TIME, 0) & 1:  # the guest uses kvmclock
            vcpu.kvmclock_ctrl()


class States(Protocol):
    """Where states are read from: a snapshot's folder, or what came over a link."""

    def names(self) -> list[str]:
        """All states, in the order in which they were saved."""

    def state(self, name: str, kind: type[T]) -> T:
        """One of them, as exactly this class, or a `FormatError`."""

    def close(self) -> None:
        """It is not needed any more."""


class Restored:
    """An opened snapshot, ready to become a board.

    Attributes:
        config: of the machine, with what was overridden.
        memory: of the guest.
        vcpus: states of its vCPUs.
        vm: what KVM knew of it as a whole.
        tracking: what differences may be taken to.
        kinds: classes of the devices' states by name, as far as they are known.
    """

    def __init__(
        self,
        reader: States,
        config: MachineConfig,
        memory: GuestMemory,
        filler: Filler | None,
        tracking: Tracking | None,
        kinds: Mapping[str, type] | None = None,
    ) -> None:
        self.kinds = kinds or {}
        self._reader = reader
        self.config = config
        self.memory = memory
        self.filler = filler
        self.tracking = tracking
        self.vcpus = [
            reader.state(f"vcpu{n}", VcpuState) for n in range(config.max_cpus or config.cpus)
        ]
        self.vm = reader.state("vm", VmState)

    def apply(self, parts: dict[str, Any]) -> None:
        """Restore devices: each takes a state of the class that it saves itself.

        Raises:
            FormatError: the snapshot has other devices, or one refuses its state.
        """
        own = {"config", "memory", "digests", "vm"}
        own |= {f"vcpu{n}" for n in range(len(self.vcpus))}
        saved = [name for name in self._reader.names() if name not in own]
        if sorted(saved) != sorted(parts):
            rule = f"are the devices saved; this machine has {', '.join(parts)}"
            raise FormatError("manifest.parts", ", ".join(saved), rule)
        states: list[tuple[Any, Any]] = [
            (part, self._reader.state(name, self.kinds.get(name) or type(part.save())))
            for name, part in parts.items()
        ]
        for (part, state), name in zip(states, parts, strict=True):
            try:
                part.restore(state)
            except ValueError as error:
                raise FormatError(name, state, f"can't be restored: {error}") from error

    def close(self) -> None:
        """Close the files; the memory stays."""
        self._reader.close()

    def discard(self) -> None:
        """Close everything, where it became no machine."""
        self.close()
        if self.filler is not None:
            self.filler.close()
        self.memory.close()


def open_snapshot(
    folder: str | os.PathLike[str],
    how: Restore,
    overrides: dict[str, Any],
    *,
    track: bool = False,
    keep: bool = False,
) -> Restored:
    """Read a snapshot up to the point where KVM is needed.

    Args:
        folder: where it is.
        how: memory comes back.
        overrides: fields of the machine's configuration that are to be others now.
        track: whether a difference to it may be asked for later.
        keep: read all states now, for several machines that go on from it in forks.

    Raises:
        FormatError: something in it is not what was written, or unknown.
        ConfigError: what the configuration names is not there, such as a drive.
        HostError: a file is not there, or can't be read.
    """
    with ExitStack() as stack:
        readers = _chain(stack, folder)
        top = readers[-1]
        if keep:
            top.keep()
        config = _config(top, overrides)
        sources = [Source(reader.memory, reader.state("memory", MemoryState)) for reader in readers]
        _same_regions(sources)
        digests = None
        if how is Restore.EAGER or track:
            digests = top.state("digests", MemoryDigests)
        memory, filler = _memory(sources, how, digests, shared=config.shared_memory)
        stack.callback(memory.close)
        if filler is not None:
            stack.callback(filler.close)
        tracking = None
        if track and digests is not None:
            tracking = Tracking(Path(folder).resolve(), top.digest, digests)
        restored = Restored(top, config, memory, filler, tracking)
        for reader in readers[:-1]:
            reader.close()
        stack.pop_all()
        return restored


def _chain(stack: ExitStack, folder: str | os.PathLike[str]) -> list[SnapshotReader]:
    """The snapshot and all it tells differences to, the whole one first."""
    readers = [stack.enter_context(SnapshotReader(folder))]
    while (base := readers[0].base()) is not None:
        readers.insert(0, stack.enter_context(base))
        if len(readers) > 1000:
            raise FormatError("base", folder, "is one of more than 1000 in a row")
    return readers


def _config(reader: SnapshotReader, overrides: dict[str, Any]) -> MachineConfig:
    return MachineConfig.from_mapping(reader.table("config") | overrides, f"{reader.folder}")


def _same_regions(sources: list[Source]) -> None:
    first = sources[0].state
    if first.ranges is not None:
        raise FormatError("memory.ranges", first.ranges, "are a difference without a base")
    for source in sources[1:]:
        if source.state.regions != first.regions or source.state.ranges is None:
            raise FormatError("memory.regions", source.state.regions, "must be those of the base")


def _memory(
    sources: list[Source], how: Restore, digests: MemoryDigests | None, *, shared: bool = False
) -> tuple[GuestMemory, Filler | None]:
    ranges = [(GuestAddress(r.guest_address), r.size) for r in sources[0].state.regions]
    if how is Restore.COPY_ON_WRITE:
        backing = FilePrivate(sources[0].fd)
        memory = GuestMemory.from_ranges(ranges, backing=backing, dirty_page_size=pages.PAGE)
        pages.load(memory, sources[1:])
    else:
        given = Memfd() if shared and how is Restore.EAGER else Anonymous()
        options = Options()
        if how is Restore.ON_DEMAND and sources[1:]:
            # A huge page that a difference brings would cover pages that are to come on demand.
            options = Options(transparent_hugepages=False)
        memory = GuestMemory.from_ranges(
            ranges, backing=given, options=options, dirty_page_size=pages.PAGE
        )
        if how is Restore.EAGER:
            pages.load(memory, sources, digests)
        else:
            pages.load(memory, sources[1:])
    filler = Filler(memory, sources[0].fd) if how is Restore.ON_DEMAND else None
    for _ in memory.harvest_dirty():
        pass  # reading it in is no change
    return memory, filler


def verify(folder: str | os.PathLike[str]) -> None:
    """Read a snapshot whole, memory included, and compare every digest.

    Raises:
        FormatError, HostError: as for `open_snapshot`.
    """
    restored = open_snapshot(folder, Restore.EAGER, {})
    restored.close()
    restored.memory.close()


def merge(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Make one whole snapshot of a difference and all that it builds on; its digest.

    `target` may be the folder of the difference itself, or that of a base.

    Raises:
        FormatError, HostError: as for `open_snapshot`; nothing has changed then.
    """
    with ExitStack() as stack:
        readers = _chain(stack, folder)
        top = readers[-1]
        sources = [Source(reader.memory, reader.state("memory", MemoryState)) for reader in readers]
        _same_regions(sources)
        digests = top.state("digests", MemoryDigests)
        memory, _ = _memory(sources, Restore.EAGER, digests)
        stack.callback(memory.close)
        writer = stack.enter_context(SnapshotWriter(target))
        pages.store(memory, writer.memory)
        for name in top.names():
            if name == "memory":
                writer.add(name, MemoryState(sources[0].state.regions))
            else:
                writer.copy(name, top)
        return writer.commit(top.manifest.writer)
