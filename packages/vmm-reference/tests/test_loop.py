"""The I/O loop: callbacks in order on one thread, timers, and one broken callback alone."""

import os
import threading
import time
from functools import partial

import pytest

from vmm_reference.loop import READ, Loop


@pytest.fixture
def failures() -> list[BaseException]:
    return []


@pytest.fixture
def loop(failures: list[BaseException]) -> Loop:
    return Loop(failures.append)


def _finish(loop: Loop) -> None:
    done = threading.Event()
    loop.call_soon(done.set)
    assert done.wait(10)


def test_calls_from_many_threads_all_run_in_each_threads_order(loop: Loop) -> None:
    """call_soon loses nothing and keeps the order of every caller, on the loop's own thread."""
    seen: list[tuple[int, int]] = []
    threads_seen: set[int] = set()

    def note(item: tuple[int, int]) -> None:
        threads_seen.add(threading.get_ident())
        seen.append(item)

    def caller(number: int) -> None:
        for step in range(200):
            loop.call_soon(partial(note, (number, step)))

    loop.start()
    callers = [threading.Thread(target=caller, args=(n,)) for n in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    _finish(loop)
    loop.stop()
    assert len(seen) == 800
    for number in range(4):
        assert [step for n, step in seen if n == number] == list(range(200))
    assert len(threads_seen) == 1


def test_a_descriptor_that_takes_a_number_over_is_not_told_of_the_old_ones_events(
    loop: Loop, failures: list[BaseException]
) -> None:
    """Two are ready at once, and the first to be served puts others in the place of both."""
    fds = [os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    seen: list[int] = []

    def read(fd: int, _events: int) -> None:
        seen.append(os.eventfd_read(fd))

    def replace(_events: int) -> None:
        for fd in fds:
            loop.remove(fd)
            os.close(fd)
        again = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        assert sorted(again) == sorted(fds)
        for fd in again:
            loop.add(fd, READ, partial(read, fd))

    for fd in fds:
        loop.add(fd, READ, replace)
    loop.turn(1)
    assert (failures, seen) == ([], [])
    os.eventfd_write(fds[0], 7)
    loop.turn(1)
    assert (failures, seen) == ([], [7])
    loop.stop()
    for fd in fds:
        os.close(fd)


def test_a_descriptor_is_served_until_it_is_removed(loop: Loop) -> None:
    """A ready eventfd calls back; after remove it does not."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    values: list[int] = []
    loop.add(fd, READ, lambda _events: values.append(os.eventfd_read(fd)))
    loop.start()
    os.eventfd_write(fd, 7)
    deadline = time.monotonic() + 10
    while not values and time.monotonic() < deadline:
        time.sleep(0.001)
    loop.call_soon(lambda: loop.remove(fd))
    _finish(loop)
    os.eventfd_write(fd, 9)
    _finish(loop)
    loop.stop()
    os.close(fd)
    assert values == [7]


def test_a_callback_that_raises_is_reported_and_the_rest_run(
    loop: Loop, failures: list[BaseException]
) -> None:
    """The loop survives an exception and hands it to its owner."""

    def broken() -> None:
        raise ValueError("broken")

    loop.start()
    loop.call_soon(broken)
    _finish(loop)
    loop.stop()
    assert [str(error) for error in failures] == ["broken"]


def test_timers_fire_in_time_order(loop: Loop) -> None:
    """call_later runs what is due, the earlier first, and not before its time."""
    seen: list[str] = []
    done = threading.Event()
    start = time.monotonic()

    def late() -> None:
        seen.append("late")
        done.set()

    def arm() -> None:
        loop.call_later(0.06, late)
        loop.call_later(0.02, lambda: seen.append("early"))

    loop.start()
    loop.call_soon(arm)
    assert done.wait(10)
    loop.stop()
    assert seen == ["early", "late"]
    assert time.monotonic() - start >= 0.06


def test_what_has_time_waits_for_the_next_turn_whoever_wakes_the_loop(loop: Loop) -> None:
    """call_within does not wake a loop that is awake before the time is over, or never slept."""
    seen: list[str] = []
    loop.call_within(3600, lambda: seen.append("first"))
    loop.call_later(0, lambda: loop.call_within(3600, lambda: seen.append("second")))
    loop.turn(0)
    assert seen == ["first", "second"]
    loop.turn(0)
    assert seen == ["first", "second"]
    loop.stop()
    loop.call_within(0, lambda: seen.append("third"))
    assert seen == ["first", "second"]


def test_what_has_time_wakes_a_loop_that_would_sleep_longer(loop: Loop) -> None:
    """Called while the loop waits for nothing, or for something later, it is done all the same."""
    loop.start()
    for wait in (None, 3600):
        if wait is not None:
            loop.call_soon(lambda: loop.call_later(3600, lambda: pytest.fail("an hour is over")))
        loop.call(lambda: None)
        done = threading.Event()
        loop.call_within(0.01, done.set)
        assert done.wait(10)
    loop.stop()


def test_what_has_time_is_done_by_threads_that_come_at_any_moment(loop: Loop) -> None:
    """None that comes while the loop falls asleep is forgotten, and each is done once."""
    seen: list[int] = []
    finished = threading.Semaphore(0)

    def work(first: int) -> None:
        for number in range(first, first + 200):
            done = threading.Event()

            def note(number: int = number, done: threading.Event = done) -> None:
                seen.append(number)
                done.set()

            loop.call_within(0.0005, note)
            if not done.wait(10):
                return
        finished.release()

    loop.start()
    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert finished.acquire(blocking=False)
    loop.stop()
    assert sorted(seen) == [1000 * n + number for n in range(3) for number in range(200)]


def test_a_loop_that_stands_by_does_nothing_yet(loop: Loop) -> None:
    """Nobody can wait for it; what was added meanwhile is served from its start on."""
    seen: list[str] = []
    loop.stand_by()
    loop.call_soon(lambda: seen.append("called"))
    with pytest.raises(RuntimeError, match="does not run"):
        loop.call(lambda: None)
    with pytest.raises(RuntimeError, match="does not run"), loop.hold():
        pass
    assert seen == []
    loop.start()
    loop.call(lambda: seen.append("waited for"))
    loop.stop()
    assert seen == ["called", "waited for"]


def test_a_loop_that_stands_by_is_stopped(loop: Loop) -> None:
    """Its thread ends, and has called nobody."""
    seen: list[str] = []
    loop.stand_by()
    loop.call_soon(lambda: seen.append("called"))
    loop.stop()
    assert seen == []
    assert "io" not in [thread.name for thread in threading.enumerate()]


def test_a_stopped_loop_takes_no_more_calls(loop: Loop) -> None:
    """After stop, which may come twice and from any thread, call_soon does nothing."""
    loop.start()
    loop.stop()
    loop.stop()
    loop.call_soon(lambda: pytest.fail("ran after stop"))
