"""Marks, Hypothesis profile and time limit of this package's tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("soak", max_examples=2000, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, so that the tests also run outside the repository."""
    config.addinivalue_line("markers", "kvm: needs a /dev/kvm that this user may open")
    config.addinivalue_line("markers", "linux: needs a KVM that runs an unmodified kernel")
    if config.pluginmanager.hasplugin("timeout") and not config.getoption("--timeout", None):
        long = {"soak", "fuzz"} & {os.environ.get("HYPOTHESIS_PROFILE"),
                                   config.getoption("--hypothesis-profile", None)}  # fmt: skip
        config.option.timeout = 1200 if long else 120


@pytest.fixture
def hugepages() -> Iterator[int]:
    """Eight free huge pages of 2 MiB for a test, where the host gives them."""
    folder = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    control = folder / "nr_hugepages"
    try:
        lock = control.open()
    except OSError as error:
        pytest.skip(f"no huge pages of 2 MiB here: {error}")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes may run such a test
        before = int(control.read_text())
        free = int((folder / "free_hugepages").read_text())
        try:
            control.write_text(str(before - free + 8))
        except OSError as error:
            pytest.skip(f"huge pages of 2 MiB cannot be had: {error}")
        try:
            if int((folder / "free_hugepages").read_text()) != 8:
                pytest.skip("the host has not enough free memory for 8 huge pages")
            yield 8
        finally:
            control.write_text(str(before))
