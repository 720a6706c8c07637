"""The disk: `model` is the device, `pumped` the same served by C, `setup` its wiring."""

from __future__ import annotations

__all__: list[str] = []
