"""What has come into a running machine or is to leave it, until the guest's ACPI has looked.

The registers of processors and of memory modules have it in common: `up` and `down`, each a number
plus 1, or 0, which reading takes off its list. The guest is told to look again while one waits.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["DOWN", "UP", "Changes"]

UP, DOWN = 0, 1


class Changes:
    """The two lists.

    Args:
        notify: tells the guest's ACPI to look.

    Attributes:
        up: numbers of what has come.
        down: numbers of what is to be given up.
    """

    def __init__(self, notify: Callable[[], object]) -> None:
        self.up: list[int] = []
        self.down: list[int] = []
        self._notify = notify

    def come(self, number: int) -> None:
        """Something has come."""
        self.up.append(number)
        self._notify()

    def ask_for(self, number: int) -> None:
        """Something is to be given up; asking again changes nothing."""
        if number not in self.down:
            self.down.append(number)
            self._notify()

    def forget(self, number: int) -> None:
        """It has gone."""
        self.up = [other for other in self.up if other != number]
        self.down = [other for other in self.down if other != number]

    def take(self, register: int) -> int:
        """The guest reads `UP` or `DOWN`."""
        waiting = self.up if register == UP else self.down
        number = waiting.pop(0) + 1 if waiting else 0
        if waiting:
            self._notify()  # one at a time
        return number

    def restore(self, up: Iterable[int], down: Iterable[int]) -> None:
        """Take over lists; what the guest has not looked at is told again."""
        self.up, self.down = list(up), list(down)
        if self.up or self.down:
            self._notify()
