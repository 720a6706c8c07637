"""What can go wrong while packages are fetched and images are built."""

from __future__ import annotations

from vmm_reference.errors import VmmError

__all__ = ["CpioError", "DiskError", "ImageError", "ModuleError", "PackageError"]


class ImageError(VmmError):
    """An image, or a part of one, could not be made.

    Attributes:
        problem: what is wrong, naming the file, package or value.
        remedy: what to do about it; empty where nothing can be advised.

    Example:
        >>> print(ImageError("no such flavour: 'tiny'", "use cloud or generic"))
        no such flavour: 'tiny'; use cloud or generic
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class PackageError(ImageError):
    """A Debian package could not be found, downloaded or unpacked."""


class CpioError(ImageError):
    """An archive entry cannot be written, or an archive cannot be read."""


class ModuleError(ImageError):
    """A kernel module is missing, cannot be read, or depends on itself."""


class DiskError(ImageError):
    """A root disk could not be made."""
