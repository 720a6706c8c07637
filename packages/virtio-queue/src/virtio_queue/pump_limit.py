"""Limits of what pumps do in a time: token buckets of bytes and of operations."""

from __future__ import annotations

from attrs import frozen

from virtio_queue._native import ffi, lib
from virtio_queue.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_queue._native import CData

__all__ = ["Limiter", "TokenBucket"]

_MOST = 1 << 62


@frozen
class TokenBucket:
    """A rate with a burst.

    A request is let through while there is a token left, whatever its size; what it owes delays the
    next ones, so that the rate holds over time.

    Attributes:
        size: tokens (bytes, or operations) that a full bucket holds, from 1.
        refill_ms: milliseconds in which an empty bucket fills, from 1.
        one_time_burst: tokens to be used up first, once.
    """

    size: int
    refill_ms: int
    one_time_burst: int = 0


class Limiter:
    """Limits of bandwidth and operations, shared by as many pumps as it is given to.

    Args:
        bandwidth: tokens are bytes; None for no limit.
        operations: tokens are requests, or frames; None for no limit.

    Raises:
        UsageError: a bucket's numbers are out of range.
    """

    def __init__(
        self, bandwidth: TokenBucket | None = None, operations: TokenBucket | None = None
    ) -> None:
        handle = lib.vp_limiter_new()
        if not handle:
            raise MemoryError("a rate limiter")
        self.handle: CData = ffi.gc(handle, lib.vp_limiter_free)
        self._buckets: tuple[TokenBucket | None, TokenBucket | None] = (None, None)
        self.set(bandwidth, operations)

    def set(self, bandwidth: TokenBucket | None, operations: TokenBucket | None) -> None:
        """Put new limits in the place of the former ones, at any time.

        A bucket that is new is full, one that is as it was keeps its level.

        A request that waits already goes on waiting for as long as the former limits said, unless
        `Pump.nudge` has it ask again.

        Raises:
            UsageError: a bucket's numbers are out of range; both limits stay as they were.
        """
        for name, bucket in (("bandwidth", bandwidth), ("operations", operations)):
            if bucket is not None and not (
                1 <= bucket.size < _MOST
                and 1 <= bucket.refill_ms < 1 << 32
                and 0 <= bucket.one_time_burst < _MOST
            ):
                rule = "size from 1, refill_ms from 1 to 2**32 - 1, one_time_burst from 0"
                raise UsageError(name, f"{bucket} is not a limit: {rule}")
        now = lib.vp_now()
        former, self._buckets = self._buckets, (bandwidth, operations)
        for which, bucket in enumerate(self._buckets):
            if bucket == former[which]:
                continue
            size, refill, burst = (
                (0, 1, 0)
                if bucket is None
                else (bucket.size, bucket.refill_ms * 1_000_000, bucket.one_time_burst)
            )
            lib.vp_limiter_set(self.handle, which, size, refill, burst, now)
