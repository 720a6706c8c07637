"""The socket device: `model` is the device, `connection` one of its streams, `setup` its wiring."""

from __future__ import annotations

__all__: list[str] = []
