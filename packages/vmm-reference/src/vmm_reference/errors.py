"""What can go wrong in the VMM, one tree, each with the fields a program needs to react."""

from __future__ import annotations

__all__ = ["ConfigError", "HostError", "RuleError", "VmmError"]


class VmmError(Exception):
    """The base of every error that this package raises by itself."""


class RuleError(VmmError, ValueError):
    """A value that breaks a rule; the base of those that say where it was found.

    Attributes:
        field: where the value is.
        value: what it is.
        rule: what it must be.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(field, value, rule)
        self.field = field
        self.value = value
        self.rule = rule


class ConfigError(RuleError):
    """A machine that can't be: names the field, the value and the rule it breaks.

    Raised before anything is started; the command line turns it into one line and exit status 2.
    """

    def __str__(self) -> str:
        return f"{self.field}: {self.value}: {self.rule}"


class HostError(VmmError, OSError):
    """The host could not give what a correct configuration asks for: says what to do next."""

    def __init__(self, what: str, cause: object, hint: str = "") -> None:
        super().__init__(what, cause, hint)
        self.what = what
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}: {self.cause}" + (f"; {self.hint}" if self.hint else "")
