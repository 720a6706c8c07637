"""What both sides of a migration know: options, progress, figures, the offer, what goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state import CpuidEntry
from vmm_reference.errors import ConfigError, HostError

from .memory import MemoryState

if TYPE_CHECKING:
    from .connection import Tls

__all__ = ["MigrationError", "Offer", "Options", "Progress", "Report", "Round"]

MAX_STREAMS = 16


class MigrationError(HostError):
    """A migration did not come to its end.

    Attributes:
        runs: whether the machine runs on where it was. If not it is paused, whole or in two parts,
            until `recover` or `resolve`.
    """

    def __init__(self, what: str, cause: object, hint: str = "", *, runs: bool = True) -> None:
        super().__init__(what, cause, hint)
        self.runs = runs


@attrs.frozen(kw_only=True)
class Options:
    """How to migrate.

    Attributes:
        streams: connections that carry memory, 1 to 16.
        compress: try zstd on memory.
        tls: certificates; the other side must have some too.
        downtime: seconds that the guest may stand still: it is paused once what is left can be
            sent in that time at the measured bandwidth, and another round would not leave far less.
        bandwidth: bytes a second of memory at most, or None.
        timeout: seconds for all of it, then it is given up (or post-copy begins, if chosen).
        auto_converge: slow the vCPUs down while they write faster than the link carries.
        post_copy: after so many rounds hand the machine over although pages are missing, which
            follow on demand and in the background; 0 does so at once, None never.
        local: hand the memory itself over, to a VMM on this host, on a Unix socket.

    Raises:
        ConfigError: names the field, its value and the rule.
    """

    streams: int = 1
    compress: bool = False
    tls: Tls | None = None
    downtime: float = 0.3
    bandwidth: int | None = None
    timeout: float | None = None
    auto_converge: bool = False
    post_copy: int | None = None
    local: bool = False

    def __attrs_post_init__(self) -> None:
        if type(self.streams) is not int or not 1 <= self.streams <= MAX_STREAMS:
            raise ConfigError("streams", self.streams, f"must be from 1 to {MAX_STREAMS}")
        for name in ("compress", "auto_converge", "local"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, getattr(self, name), "must be true or false")
        if not _number(self.downtime) or not 0 < self.downtime <= 3600:
            raise ConfigError("downtime", self.downtime, "must be seconds, up to 3600")
        if self.timeout is not None and (not _number(self.timeout) or self.timeout <= 0):
            raise ConfigError("timeout", self.timeout, "must be seconds")
        if self.bandwidth is not None and (type(self.bandwidth) is not int or self.bandwidth < 1):
            raise ConfigError("bandwidth", self.bandwidth, "must be bytes a second")
        if self.post_copy is not None and (type(self.post_copy) is not int or self.post_copy < 0):
            raise ConfigError("post_copy", self.post_copy, "must be a number of rounds")
        if self.local and (self.tls is not None or self.post_copy is not None):
            raise ConfigError("local", self.local, "goes without tls and post_copy")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@attrs.frozen
class Round:
    """One pass over memory.

    Attributes:
        pages: pages that it had to send.
        zeros: how many of them were zero, and cost nothing.
        sent: bytes that went over the links.
        seconds: how long it took.
        dirty_rate: bytes a second that the guest wrote meanwhile.
        throttle: per cent of their time that was taken from the vCPUs.
    """

    pages: int
    zeros: int
    sent: int
    seconds: float
    dirty_rate: float
    throttle: int


@attrs.frozen
class Progress:
    """How far a migration is.

    Attributes:
        phase: `memory`, `paused`, `filling` or `done`.
        rounds: number of the current pass.
        sent: bytes over the links so far.
        left: bytes of memory still to be sent.
        bandwidth: bytes of memory a second, measured.
    """

    phase: str
    rounds: int
    sent: int
    left: int
    bandwidth: float


@attrs.frozen
class Report:
    """The figures of a migration that came to its end.

    Attributes:
        rounds: the passes over memory; the last is that of the paused guest.
        sent: bytes over the links.
        seconds: in all.
        downtime: seconds from the request to pause to the word that it runs there, and
        pause: until the vCPUs stood still,
        memory: until the last pages were there,
        states: until states were taken and sent,
        restore: until the other side had taken them,
        start: until it said that it runs; the way of that word back counts too.
        post_copy: seconds that pages followed afterwards; 0 where there was nothing to follow.
    """

    rounds: tuple[Round, ...]
    sent: int
    seconds: float
    downtime: float
    pause: float
    memory: float
    states: float
    restore: float
    start: float
    post_copy: float


@attrs.frozen
class Offer:
    """What the source tells before anything else.

    Attributes:
        writer: the release that speaks; for people.
        config: of the machine, in the written form of its table.
        memory: its regions.
        cpuid: leaves that its guest sees, of each vCPU.
        streams: links for pages that will follow.
        post_copy: whether one for faults follows.
        local: whether memory's descriptors follow behind this, instead of pages.
    """

    writer: str
    config: str
    memory: MemoryState
    cpuid: tuple[tuple[CpuidEntry, ...], ...]
    streams: int
    post_copy: bool
    local: bool
    version: int = 1
