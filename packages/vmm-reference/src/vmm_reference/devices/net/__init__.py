"""The network device: `model` is the device, `control` its control queue, `setup` its wiring."""

from __future__ import annotations

__all__: list[str] = []
