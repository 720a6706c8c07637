"""Settings of the harness's own tests: the repository's root is where `benchmarks` is found."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[2]))
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
