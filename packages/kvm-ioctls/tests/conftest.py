"""Marks, the hypothesis profile and a time limit: the folder works wherever it is copied."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

LIMIT = 60.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kvm: needs a /dev/kvm that this user may open, of any kind")
    config.addinivalue_line(
        "markers", "linux: needs a KVM that runs an unmodified kernel: the host's own, or the lab"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK) or os.environ.get("CI"):
        return
    for item in items:
        if item.get_closest_marker("kvm"):
            item.add_marker(pytest.mark.skip(reason="/dev/kvm cannot be opened by this user"))


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    """End a test that hangs, also where pytest-timeout is not installed."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
