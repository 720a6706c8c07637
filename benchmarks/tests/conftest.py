"""Settings of the harness's own tests, and where `benchmarks` and the lab are found."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
