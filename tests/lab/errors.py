"""What can go wrong with a lab."""

from __future__ import annotations

__all__ = ["LabDied", "LabError", "LabTimeout"]


class LabError(Exception):
    """The base of everything that a lab raises."""


class LabDied(LabError):
    """The lab fell silent, or its emulator ended, before the job did.

    `Lab.run` and `Lab.converse` answer it by running the job again in a fresh lab; who works with
    `Lab.popen` does so himself, or lets it fail the test.

    Attributes:
        reason: what was noticed, in one line.
        log: the last lines of the lab's console and of its emulator's complaints.
    """

    def __init__(self, reason: str, log: str) -> None:
        super().__init__(reason, log)
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        return f"{self.reason}; the last lines of its log:\n{self.log}"


class LabTimeout(LabError):
    """A job did not end, or did not say what was expected, in the time it was given.

    Attributes:
        what: what was waited for, and how long.
        output: what the job had written until then.
    """

    def __init__(self, what: str, output: str) -> None:
        super().__init__(what, output)
        self.what = what
        self.output = output

    def __str__(self) -> str:
        return f"{self.what}; its output so far ends with:\n{self.output[-2000:]}"
