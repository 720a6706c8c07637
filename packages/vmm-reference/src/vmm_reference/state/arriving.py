"""A machine on its way here: built around empty memory, filled, and at last made what it was.

All that takes long is done before the guest stands still there: the devices are made, the vCPUs
have their CPUID and their threads, every class of state has been read once. What is left for that
moment is what changes until then.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from vm_memory import Anonymous, GuestAddress, GuestMemory, Memfd, sharing
from vmm_reference.config import MachineConfig
from vmm_reference.cpu.compat import refuse_other_cpu
from vmm_reference.machine import Machine

from .format import FormatError, decode, fields, parse, state
from .moving import MAX_STREAMS, Offer
from .snapshot import Restored
from .stream import Pages
from .warming import rehearse
from .wire import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.board import Board

    from .postcopy import PostCopy
    from .wire import Link

__all__ = ["Arrival"]

T = TypeVar("T")


class _States:
    """The states that came over the link, as a snapshot's reader gives them."""

    def __init__(self, plain: dict[str, Any]) -> None:
        self._plain = plain

    def names(self) -> list[str]:
        return list(self._plain)

    def state(self, name: str, kind: type[T]) -> T:
        if name not in self._plain:
            raise FormatError("states", name, f"is no part of this; there are {self.names()}")
        return state(self._plain[name], kind, name)

    def close(self) -> None:
        pass


class Arrival:
    """A machine that another VMM has offered; nothing of it runs before `run`.

    Args:
        link: that the offer has come over.
        payload: the offer.
        console: as for `Machine`.
        overrides: fields of the machine's configuration that are others here.
        supplier: makes what supplies pages that follow behind the machine.

    Attributes:
        machine: it.
        pages: its memory, to be filled.
        post_copy: what supplies pages, where that was offered.
        streams: links that carry memory.

    Raises:
        FormatError, ConfigError: the offer is none, or this host lacks what the machine needs.
        HostError: this host can't continue the machine. Nothing is left behind in any case.
    """

    def __init__(
        self,
        link: Link,
        payload: bytes,
        *,
        console: tuple[int, int] | None,
        overrides: dict[str, Any],
        supplier: Callable[[GuestMemory], PostCopy],
    ) -> None:
        offer = decode(payload, Offer, "offer")
        if not 0 <= offer.streams <= MAX_STREAMS:
            raise FormatError("offer.streams", offer.streams, f"must be at most {MAX_STREAMS}")
        table = fields(parse(offer.config.encode(), "offer.config"), "offer.config") | overrides
        config = MachineConfig.from_mapping(table, "offer.config")
        if len(offer.cpuid) != (count := config.max_cpus or config.cpus):
            raise FormatError("offer.cpuid", len(offer.cpuid), f"must be that of {count} vCPUs")
        refuse_other_cpu(offer.cpuid[0])
        self._local, self._expected = offer.local, 0 if offer.local else offer.streams
        self.streams: list[Link] = []
        self.post_copy: PostCopy | None = None
        self._seen = 0
        self._states: dict[str, Any] = {}
        self._missing: bytes | None = None
        self._kinds: dict[str, type] = {}
        self._still = ExitStack()
        with ExitStack() as stack:
            memory = _memory(link, offer, shared=config.shared_memory)
            undo = stack.enter_context(ExitStack())
            undo.callback(memory.close)
            self.machine = Machine(config, console=console)
            self.machine._prepare(memory)
            undo.pop_all()  # the machine has it now
            stack.callback(self.machine.close)
            for vcpu, leaves in zip(self._board.vm.vcpus, offer.cpuid, strict=True):
                vcpu.set_cpuid2(leaves)
            self.pages = Pages(memory)
            if offer.post_copy:
                self.post_copy = supplier(memory)
            stack.pop_all()

    @property
    def _board(self) -> Board:
        assert self.machine._board is not None
        return self.machine._board

    @property
    def expects_streams(self) -> bool:
        """Whether not all have come yet."""
        return len(self.streams) < self._expected

    def moves(self) -> bool:
        """Whether the streams have brought anything since the last look."""
        seen = sum(link.received for link in self.streams)
        moves, self._seen = seen != self._seen, seen
        return moves

    def rehearse(self) -> None:
        """Do once, while memory comes, what will be done while the guest stands still."""
        self._kinds = rehearse(self._board)

    def receive_missing(self, payload: bytes) -> None:
        """Which pages will follow.

        Raises:
            ProtocolError: it was said before.
        """
        if self._missing is not None:
            raise ProtocolError("MISSING", len(payload), "is there twice")
        self._missing = payload

    def receive_states(self, payload: bytes) -> None:
        """All states; from here on the guest stands still.

        Raises:
            ProtocolError: they are there already.
            FormatError: they are none.
        """
        if self._states:
            raise ProtocolError("STATES", len(payload), "are there twice")
        if gc.isenabled():
            gc.disable()
            self._still.callback(gc.enable)
        self._states = fields(parse(payload, "states"), "states")

    def take(self, *, split: bool) -> None:
        """Become the machine whose states have come; nothing runs yet.

        Raises:
            ProtocolError: what is missing was to be told, or not to be.
            FormatError: the states are not those of this machine.
        """
        if split != (self._missing is not None):
            raise ProtocolError("SPLIT", split, "must come with what is missing, and alone")
        board = self._board
        if self._missing is not None:
            if self.post_copy is None:
                raise ProtocolError("SPLIT", split, "was not offered")
            board.missing = self.post_copy
            self.post_copy.begin(self._missing)
        states = _States(self._states)
        config, memory = self.machine.config, board.memory
        board.restore(Restored(states, config, memory, None, None, self._kinds))

    def acquire(self) -> None:
        """Take what only one machine may hold.

        Raises:
            HostError: another machine has it.
        """
        self._board.acquire()

    def go(self) -> None:
        """Do all that could fail on the way to let it run."""
        self.machine._go()

    def run(self) -> None:
        """Let it run, and do then what has time until it does."""
        self.machine._run()
        self._still.close()
        if not self._local:
            self.machine._announce()

    def lose(self, why: str) -> None:
        """End it while it runs; it is its owner's to close."""
        from vmm_reference.outcome import Outcome

        self.machine._ended(Outcome.HOST_FAILURE, why)

    def discard(self) -> None:
        """Give everything back, where it is not to run here."""
        self._still.close()
        for link in self.streams:
            link.close()
        if self.post_copy is not None:
            self.post_copy.close()
        self.machine.close()


def _memory(link: Link, offer: Offer, *, shared: bool) -> GuestMemory:
    """Memory for it: empty, or handed over."""
    regions = [(GuestAddress(r.guest_address), r.size) for r in offer.memory.regions]
    if not offer.local:
        backing = Memfd() if shared else Anonymous()
        return GuestMemory.from_ranges(regions, backing=backing, dirty_page_size=4096)
    memory = sharing.receive(link.socket, dirty_page_size=4096)
    if [(region.guest_address, region.size) for region in memory.regions] != regions:
        memory.close()
        raise FormatError("offer.memory", regions, "is not what came with it")
    return memory
