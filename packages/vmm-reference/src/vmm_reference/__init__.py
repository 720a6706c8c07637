"""A virtual machine monitor in Python, and its command vmm.

What a program needs is here; each name is loaded when it is first used, since a boot waits for
every import.

Example:
    >>> from vmm_reference import MachineConfig, parse_size
    >>> parse_size("256M") >> 20
    256
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_reference.backends.console import Console, ConsoleTimeout
    from vmm_reference.config import Drive, MachineConfig, parse_size
    from vmm_reference.errors import ConfigError, HostError, VmmError
    from vmm_reference.machine import Machine
    from vmm_reference.outcome import Outcome

__all__ = [
    "ConfigError",
    "Console",
    "ConsoleTimeout",
    "Drive",
    "HostError",
    "Machine",
    "MachineConfig",
    "Outcome",
    "VmmError",
    "parse_size",
]

_HOMES = {
    "ConfigError": "errors",
    "Console": "backends.console",
    "ConsoleTimeout": "backends.console",
    "Drive": "config",
    "HostError": "errors",
    "Machine": "machine",
    "MachineConfig": "config",
    "Outcome": "outcome",
    "VmmError": "errors",
    "parse_size": "config",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(__import__(f"{__name__}.{home}", fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
