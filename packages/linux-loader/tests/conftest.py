"""Marks, Hypothesis profile and time limit of this package's tests."""

from __future__ import annotations

import os

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
        config.option.timeout = 120
