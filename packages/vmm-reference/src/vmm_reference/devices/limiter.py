"""How much a device may do in a time: token buckets, for bytes and for operations.

A bucket holds at most `size` tokens and fills up evenly in `refill_time`. What is asked for is
granted whole as soon as the bucket is not empty, and taken even if it is more than there is: the
debt is paid before anything else is granted. So a request larger than the bucket passes, nothing
is ever cut, and over any stretch of time no more than `size`, the burst and one request exceed the
rate. All arithmetic is in whole numbers: no token is lost to rounding.
"""

from __future__ import annotations

import time

from vmm_reference.config import parse_size
from vmm_reference.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.wiring import Wiring

    from .states import LimiterState

__all__ = ["Limiter", "TokenBucket", "build_limiter", "parse_bucket"]

_MS = 1_000_000  # nanoseconds


class TokenBucket:
    """One bucket, full at first.

    Args:
        size: tokens it holds, at least 1.
        refill_time: milliseconds in which it fills up when it is empty, at least 1.
        one_time_burst: tokens on top that are taken first and never come back.

    Attributes:
        size: as given.
        refill_time: as given.
        one_time_burst: as given, whatever is left of it.

    Example:
        >>> bucket = TokenBucket(size=100, refill_time=1000)
        >>> bucket.take(150, now=0), bucket.wait(now=0)
        (True, 500000001)
        >>> bucket.take(1, now=400_000_000), bucket.take(1, now=510_000_000)
        (False, True)
    """

    def __init__(self, size: int, refill_time: int, one_time_burst: int = 0) -> None:
        if size < 1 or refill_time < 1 or one_time_burst < 0:
            raise ValueError(
                f"size {size}, refill_time {refill_time}: must be at least 1; "
                f"one_time_burst {one_time_burst}: must not be negative"
            )
        self.size = size
        self.refill_time = refill_time
        self.one_time_burst = one_time_burst
        self._period = refill_time * _MS
        # In tokens times nanoseconds of the period, so that each nanosecond adds a whole number.
        self._level = self._full = size * self._period
        self._burst = one_time_burst
        self._filled: int | None = None  # when `_level` was right

    def wait(self, now: int) -> int:
        """Nanoseconds from `now` (on a clock that does not go back) until `take` grants again."""
        self._fill(now)
        if self._burst or self._level > 0:
            return 0
        return -self._level // self.size + 1

    def take(self, tokens: int, now: int) -> bool:
        """Take tokens, all of them or, where none are there, none."""
        if self.wait(now):
            return False
        burst = min(self._burst, tokens)
        self._burst -= burst
        self._level -= (tokens - burst) * self._period
        return True

    def save(self) -> tuple[int, int]:
        """Its level, in tokens times nanoseconds of `refill_time`, and the burst that is left."""
        return self._level, self._burst

    def restore(self, level: int, burst: int) -> None:
        """Take up what `save` gave; no more than the bucket holds."""
        self._level, self._burst, self._filled = min(level, self._full), burst, None

    def _fill(self, now: int) -> None:
        if self._filled is not None and now > self._filled:
            self._level = min(self._full, self._level + (now - self._filled) * self.size)
        self._filled = now if self._filled is None else max(now, self._filled)


class Limiter:
    """What a device asks before it does something: one bucket for bytes, one for operations.

    Args:
        clock: nanoseconds on a clock that does not go back.
        later: has its second argument called after so many nanoseconds.

    Attributes:
        bandwidth: the bucket of bytes, or None without limit. Exchange it at any time.
        ops: the bucket of operations, likewise.
        throttled: how often something had to wait.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        later: Callable[[int, Callable[[], None]], None],
        *,
        bandwidth: TokenBucket | None = None,
        ops: TokenBucket | None = None,
    ) -> None:
        self.bandwidth = bandwidth
        self.ops = ops
        self.throttled = 0
        self._clock = clock
        self._later = later
        self._waiting = False

    def admit(self, size: int, resume: Callable[[], None]) -> bool:
        """Whether one operation of `size` bytes may be done now; it is counted if so.

        If not, `resume` is called once it is worth asking again; callers that come meanwhile are
        refused and share that call.
        """
        if self.bandwidth is None and self.ops is None:
            return True
        now = self._clock()
        wait = max(bucket.wait(now) for bucket in (self.bandwidth, self.ops) if bucket is not None)
        if wait == 0:
            if self.bandwidth is not None:
                self.bandwidth.take(size, now)
            if self.ops is not None:
                self.ops.take(1, now)
            return True
        if not self._waiting:
            self._waiting = True
            self.throttled += 1

            def wake() -> None:
                self._waiting = False
                resume()

            self._later(wait, wake)
        return False

    def save(self) -> LimiterState:
        """The levels of the buckets."""
        from .states import LimiterState

        return LimiterState(
            bandwidth=self.bandwidth.save() if self.bandwidth is not None else (),
            ops=self.ops.save() if self.ops is not None else (),
        )

    def restore(self, state: LimiterState) -> None:
        """Take up the levels for those buckets that are limited here too."""
        for bucket, saved in ((self.bandwidth, state.bandwidth), (self.ops, state.ops)):
            if bucket is not None and saved:
                bucket.restore(*saved)


def parse_bucket(text: str, field: str = "bucket") -> TokenBucket | None:
    """A bucket from `SIZE`, `SIZE/MILLISECONDS`, or either with `+BURST`; None from nothing.

    `10M` is 10 MiB a second. Sizes are as `vmm_reference.config.parse_size` takes them, the
    default of the refill time is a second.

    Example:
        >>> bucket = parse_bucket("10M/100+1G")
        >>> bucket.size, bucket.refill_time
        (10485760, 100)

    Raises:
        ConfigError: the text is something else.
    """
    if text == "":
        return None
    if isinstance(text, str):
        rate, plus, burst = text.partition("+")
        size, slash, refill = rate.partition("/")
        try:
            return TokenBucket(
                parse_size(size), int(refill) if slash else 1000, parse_size(burst) if plus else 0
            )
        except (ConfigError, ValueError):
            pass
    rule = "must be SIZE[/MILLISECONDS][+BURST], such as 10M, 1000/100 or 10M+1G"
    raise ConfigError(field, text, rule)


def build_limiter(wiring: Wiring, bandwidth: str, ops: str) -> Limiter:
    """A limiter on the host's clock and the I/O loop, from the texts that `parse_bucket` takes."""
    loop = wiring.loop
    return Limiter(
        time.monotonic_ns,
        lambda wait, call: loop.call_later(wait / 1e9, call),
        bandwidth=parse_bucket(bandwidth),
        ops=parse_bucket(ops),
    )
