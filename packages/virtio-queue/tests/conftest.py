"""Marks, a Hypothesis profile and a time limit, whether or not plugins are installed."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_LIMIT_SECONDS = 120

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("soak", deadline=None, max_examples=20_000)
settings.register_profile("fuzz", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, so that the tests also run in an empty folder."""
    config.addinivalue_line("markers", "kvm: needs a /dev/kvm that this user may open")
    config.addinivalue_line("markers", "linux: needs a KVM that runs an unmodified kernel")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a test that hangs, also where pytest-timeout is absent."""

    def expired(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"{item.nodeid} took more than {_LIMIT_SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(_LIMIT_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """One mebibyte of guest memory from address 0, and a second one behind a hole."""
    ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 30), 1 << 20)]
    with GuestMemory.from_ranges(ranges) as memory:
        yield memory
