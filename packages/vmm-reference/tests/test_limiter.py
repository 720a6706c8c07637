from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.devices.limiter import Limiter, TokenBucket
from vmm_reference.devices.states import LimiterState, StateError

MS = 1_000_000


@given(
    size=st.integers(1, 10_000),
    refill=st.integers(1, 5_000),
    burst=st.integers(0, 10_000),
    steps=st.lists(st.tuples(st.integers(0, 3_000 * MS), st.integers(1, 20_000)), max_size=40),
)
def test_a_bucket_keeps_its_rate_and_never_starves(
    size: int, refill: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    """Over any stretch: at most the rate, the bucket, the burst and one request; never less."""
    bucket = TokenBucket(size, refill, burst)
    now = 0
    granted: list[tuple[int, int]] = []
    for pause, tokens in steps:
        now += pause
        wait = bucket.wait(now)
        assert bucket.take(tokens, now) is (wait == 0)
        if wait:
            # What it says is exact: a nanosecond earlier it refuses, then it grants.
            assert not bucket.take(1, now + wait - 1)
            now += wait
            assert bucket.take(tokens, now)
        granted.append((now, tokens))
        total = sum(taken for _, taken in granted)
        allowed = (size + burst + max(taken for _, taken in granted)) * refill * MS + now * size
        assert total * refill * MS <= allowed


def test_a_request_larger_than_the_bucket_passes_and_is_paid_for() -> None:
    """Ten times the bucket is granted at once; nothing more for ten times the refill, less one."""
    bucket = TokenBucket(100, 1000)
    assert bucket.take(1000, 0)
    assert not bucket.take(1, 8999 * MS)
    assert bucket.take(1, 9001 * MS)


def test_a_burst_comes_once() -> None:
    """The burst is used first and does not come back; the bucket does."""
    bucket = TokenBucket(10, 1000, one_time_burst=50)
    assert all(bucket.take(10, 0) for _ in range(6))
    assert not bucket.take(10, 0)
    assert [bucket.take(10, 3600 * 1000 * MS) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("bad", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_nonsense_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        TokenBucket(*bad)


class Clock:
    """Time by hand, and calls that wait for it."""

    def __init__(self) -> None:
        self.now = 0
        self.waiting: list[tuple[int, Callable[[], None]]] = []

    def later(self, wait: int, callback: Callable[[], None]) -> None:
        self.waiting.append((self.now + wait, callback))

    def advance(self, to: int) -> None:
        self.now = to
        due = [callback for when, callback in self.waiting if when <= to]
        self.waiting = [item for item in self.waiting if item[0] > to]
        for callback in due:
            callback()


def test_a_limiter_wakes_who_was_refused_once() -> None:
    """Both buckets count; a refusal arranges one call, however often is asked meanwhile."""
    clock = Clock()
    limiter = Limiter(
        lambda: clock.now, clock.later, bandwidth=TokenBucket(1000, 100), ops=TokenBucket(2, 100)
    )
    woken: list[int] = []

    def resume() -> None:
        woken.append(clock.now)

    assert limiter.admit(10, resume)
    assert limiter.admit(10, resume)
    assert not limiter.admit(10, resume)  # out of operations
    assert not limiter.admit(10, resume)
    assert (len(clock.waiting), limiter.throttled) == (1, 1)
    clock.advance(200 * MS)
    assert woken == [200 * MS]
    assert limiter.admit(2000, resume)
    assert not limiter.admit(1, resume)  # out of bytes
    limiter.bandwidth = None  # changed while it runs
    assert limiter.admit(1 << 20, resume)


def test_without_buckets_everything_passes() -> None:
    clock = Clock()
    limiter = Limiter(lambda: clock.now, clock.later)
    assert limiter.admit(1 << 40, lambda: None)
    assert limiter.save() == LimiterState(bandwidth=(), ops=())


def test_levels_are_saved() -> None:
    """A restored limiter owes what the saved one did."""
    clock = Clock()
    first = Limiter(lambda: clock.now, clock.later, ops=TokenBucket(1, 1000, 1))
    assert first.admit(1, lambda: None)
    assert first.admit(1, lambda: None)
    second = Limiter(lambda: clock.now, clock.later, ops=TokenBucket(1, 1000, 1))
    second.restore(first.save())
    assert not second.admit(1, lambda: None)
    assert second.save() == first.save()
    with pytest.raises(StateError, match=r"LimiterState\.ops"):
        LimiterState(bandwidth=(), ops=(1,))
    with pytest.raises(StateError, match=r"LimiterState\.ops"):
        LimiterState(bandwidth=(), ops=(1, -1))
