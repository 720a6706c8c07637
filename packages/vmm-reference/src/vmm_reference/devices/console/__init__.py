"""The console device: `model` is the device, `setup` its wiring."""

from __future__ import annotations

__all__: list[str] = []
