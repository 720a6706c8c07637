"""Load kernels, initrds, boot parameters and command lines into guest memory.

Every public name of the package can be imported from here; its module is loaded on first use.

>>> from linux_loader import Cmdline
>>> print(Cmdline().with_parameter("console", "ttyS0").with_flag("quiet"))
console=ttyS0 quiet
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linux_loader.cmdline import Cmdline
    from linux_loader.device_tree_boot import LoadedImage, load_image
    from linux_loader.e820 import E820Entry, E820Type
    from linux_loader.entry import EntryState, SegmentState, TableState
    from linux_loader.errors import CmdlineError, ImageError, LoaderError, PlacementError
    from linux_loader.flat import Flat
    from linux_loader.inspection import Inspection, inspect
    from linux_loader.kinds import Format, Protocol
    from linux_loader.layout import Layout
    from linux_loader.loading import Loaded, load, plan
    from linux_loader.placement import Placement, Plan
    from linux_loader.screen import Screen
    from linux_loader.unpacking import unpack_kernel

__all__ = [
    "Cmdline",
    "CmdlineError",
    "E820Entry",
    "E820Type",
    "EntryState",
    "Flat",
    "Format",
    "ImageError",
    "Inspection",
    "Layout",
    "Loaded",
    "LoadedImage",
    "LoaderError",
    "Placement",
    "PlacementError",
    "Plan",
    "Protocol",
    "Screen",
    "SegmentState",
    "TableState",
    "inspect",
    "load",
    "load_image",
    "plan",
    "unpack_kernel",
]

_MODULES = {
    "cmdline": ("Cmdline",),
    "device_tree_boot": ("LoadedImage", "load_image"),
    "e820": ("E820Entry", "E820Type"),
    "entry": ("EntryState", "SegmentState", "TableState"),
    "errors": ("CmdlineError", "ImageError", "LoaderError", "PlacementError"),
    "flat": ("Flat",),
    "inspection": ("Inspection", "inspect"),
    "kinds": ("Format", "Protocol"),
    "layout": ("Layout",),
    "loading": ("Loaded", "load", "plan"),
    "placement": ("Placement", "Plan"),
    "screen": ("Screen",),
    "unpacking": ("unpack_kernel",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'linux_loader' has no attribute {name!r}")
    value: object = getattr(__import__(f"linux_loader.{module}", fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
