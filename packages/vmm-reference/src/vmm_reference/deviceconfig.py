"""What all configurations of devices have in common: a name, a place, and how they are written.

A configuration of a device is an attrs class with plain fields. It is written as a table of a TOML
file, as `KIND,field=value,...` on the command line, or made in Python; `check` is called once it is
part of a `MachineConfig`.
"""

from __future__ import annotations

from vm_memory._values import field, fields, frozen

from .devices import REGISTRY, config_class
from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, ClassVar, TypeVar

    from vm_memory.backing import Backing

    D = TypeVar("D", bound="DeviceConfig")

__all__ = ["DeviceConfig", "device_from_mapping", "parse_device", "to_mapping"]

MAX_SLOT = 31  # PCI device numbers of bus 0, less the host bridge's


@frozen
class DeviceConfig:
    """A device that a machine is to have.

    Attributes:
        id: the name by which the running device is controlled and saved; by default its kind and
            a number, such as `drive0`.
        slot: its PCI device number, 1 to 31; by default the next one that is free.
    """

    kind: ClassVar[str]
    positional: ClassVar[str] = ""  # the field that a first word without `=` gives
    flags: ClassVar[Mapping[str, str]] = {}  # short words for fields that are true or false

    id: str = field(default="", kw_only=True)
    slot: int | None = field(default=None, kw_only=True)

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless a device can be made of this; `field` is what to call it.

        A class with more rules calls this one first.
        """
        name: object = self.id
        if not isinstance(name, str) or (name and not _is_name(name)):
            raise ConfigError(f"{field}.id", repr(name), "must be letters, digits and hyphens")
        slot = self.slot
        if slot is not None and not (type(slot) is int and 1 <= slot <= MAX_SLOT):
            raise ConfigError(f"{field}.slot", slot, f"must be a whole number from 1 to {MAX_SLOT}")

    @property
    def reserved_memory(self) -> int:
        """Bytes of guest-physical space that the device has memory of its own in, whole MiB."""
        return 0

    @property
    def memory_backing(self) -> Backing | None:
        """What that memory is made of; None for the machine's own."""
        return None

    def settled(self: D) -> D:
        """The same device with what it leaves to chance chosen, for all resets to come."""
        return self

    def cloned(self: D, number: int) -> D:
        """The same device for a copy of the machine, of a number from 0.

        What only one machine may hold gets the number or counts on: addresses, names of the host's.
        """
        return self

    @classmethod
    def parse(cls: type[D], text: str) -> D:
        """A device from `value,field=value,flag`: what the command line has after its kind.

        Raises:
            ConfigError: a word is no field of this device, or its value is of another type.
        """
        words = text.split(",") if text else []
        known = {item.name: item.type for item in fields(cls)}
        values: dict[str, Any] = {}
        options: list[str] = []
        # From the right: a path, which comes first, may hold commas.
        while words:
            name, equals, _ = words[-1].partition("=")
            if not (equals and name in known) and words[-1] not in cls.flags:
                break
            options.append(words.pop())
        if words and not cls.positional:
            names = ", ".join([*known, *cls.flags])
            raise ConfigError(cls.kind, words[-1], f"unknown word; known are {names}")
        if words:
            values[cls.positional] = ",".join(words)
        for option in reversed(options):
            name, equals, value = option.partition("=")
            name = cls.flags.get(name, name)
            values[name] = _value(cls.kind, name, value, known[name]) if equals else True
        return _made(cls, values, cls.kind)


def parse_device(text: str) -> DeviceConfig:
    """A device from `KIND,field=value,...`, as on the command line.

    Example:
        >>> parse_device("rng")
        Entropy(id='', slot=None)
    """
    kind, _, rest = text.partition(",")
    return _class(kind, "device").parse(rest)


def device_from_mapping(table: object, field: str, kind: str = "") -> DeviceConfig:
    """A device from a table of a TOML file, whose `kind` says which unless `kind` does.

    Raises:
        ConfigError: a key is unknown or missing, or a value can't be.
    """
    if isinstance(table, DeviceConfig):
        return table
    if not isinstance(table, dict):
        raise ConfigError(field, table, "must be a table")
    values = dict(table)
    cls = _class(kind or values.pop("kind", None), f"{field}.kind")
    names = [item.name for item in fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(field, key, f"unknown key; known are {', '.join(sorted(names))}")
    return _made(cls, values, field)


def to_mapping(device: DeviceConfig) -> dict[str, Any]:
    """The table that `device_from_mapping` makes the same device of."""
    return {"kind": device.kind} | {
        item.name: getattr(device, item.name) for item in fields(type(device))
    }


def _is_name(text: str) -> bool:
    return text.isascii() and text.replace("-", "").isalnum()


def _class(kind: object, field: str) -> type[DeviceConfig]:
    if not isinstance(kind, str) or kind not in REGISTRY:
        raise ConfigError(field, kind, f"unknown kind; known are {', '.join(REGISTRY)}")
    return config_class(kind)


def _made(cls: type[D], values: dict[str, Any], field: str) -> D:
    for item in fields(cls):
        if item.required and item.name not in values:
            raise ConfigError(f"{field}.{item.name}", "(none)", "must be given")
    return cls(**values)


def _value(field: str, name: str, text: str, kind: str) -> object:
    """A word of the command line as its field's type; `check` looks at the rest."""
    if kind.startswith("bool"):
        if text not in ("true", "false"):
            raise ConfigError(f"{field}.{name}", text, "must be true or false")
        return text == "true"
    if kind.startswith("int"):
        if not text.isascii() or not text.isdigit():
            raise ConfigError(f"{field}.{name}", text, "must be a whole number")
        return int(text)
    return text
