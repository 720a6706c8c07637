"""How a kernel was configured: from itself, or from what its package laid beside it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import attrs

from linux_loader.decompress import decompress
from linux_loader.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DRIVERS", "Driver", "drivers", "embedded_config", "parse_config"]

_IKCONFIG_START, _IKCONFIG_END = b"IKCFG_ST", b"IKCFG_ED"
_MAX_CONFIG = 4 << 20
_MAX_LIST = 4 << 20

DRIVERS = {
    "virtio_mmio": ("CONFIG_VIRTIO_MMIO", "virtio_mmio", "virtio_mmio_probe"),
    "virtio_pci": ("CONFIG_VIRTIO_PCI", "virtio_pci", "virtio_pci_probe"),
    "virtio_blk": ("CONFIG_VIRTIO_BLK", "virtio_blk", "virtblk_probe"),
    "virtio_net": ("CONFIG_VIRTIO_NET", "virtio_net", "virtnet_probe"),
    "virtio_console": ("CONFIG_VIRTIO_CONSOLE", "virtio_console", "virtcons_probe"),
    "serial_console": ("CONFIG_SERIAL_8250_CONSOLE", "8250", "univ8250_console_setup"),
    "ext4": ("CONFIG_EXT4_FS", "ext4", "ext4_fill_super"),
    "squashfs": ("CONFIG_SQUASHFS", "squashfs", "squashfs_fill_super"),
    "overlayfs": ("CONFIG_OVERLAY_FS", "overlay", "ovl_fill_super"),
}
"""What a guest needs: its configuration symbol, its module, and a function of its own."""


@attrs.frozen
class Driver:
    """Whether a kernel has a driver.

    Attributes:
        state: `built in`, `module`, `absent`, `not built in` (a module or absent) or `unknown`.
        source: where the answer comes from; empty where it is unknown.
    """

    state: str
    source: str


def parse_config(text: str) -> dict[str, str]:
    r"""Return the symbols of a configuration that are set, as they stand behind the `=`.

    >>> parse_config('# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C="x y"\n')
    {'CONFIG_B': 'y', 'CONFIG_C': '"x y"'}
    """
    result = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and name.startswith("CONFIG_"):
            result[name] = value
    return result


def embedded_config(data: bytes) -> dict[str, str] | None:
    """Return the configuration inside an unpacked kernel (CONFIG_IKCONFIG); None without it.

    Raises:
        ImageError: it is there, but broken.
    """
    start = data.find(_IKCONFIG_START)
    if start < 0:
        return None
    start += len(_IKCONFIG_START)
    end = data.find(_IKCONFIG_END, start, start + _MAX_CONFIG)
    if end < 0:
        raise ImageError("IKCFG_ST", start, None, "must be followed by IKCFG_ED")
    text = decompress(data[start:end], limit=_MAX_CONFIG)
    return parse_config(text.decode("utf-8", "replace"))


def config_beside(path: str) -> tuple[dict[str, str], str] | None:
    """Return the configuration in `config-VERSION` beside `vmlinuz-VERSION`, and its path."""
    folder, name = os.path.split(path)
    _, dash, version = name.partition("-")
    beside = os.path.join(folder, f"config-{version}")  # noqa: PTH118  (as the caller wrote it)
    text = _read(beside) if dash else None
    return None if text is None else (parse_config(text), beside)


def modules_beside(path: str) -> tuple[set[str], set[str], str] | None:
    """Return the modules built into a kernel, those beside it, and the list's path.

    From `modules.builtin` and `modules.order` in `../lib/modules/VERSION`, as packages lay it.
    """
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
    _, dash, version = name.partition("-")
    root = os.path.dirname(folder)  # noqa: PTH120
    where = f"{root}/lib/modules/{version}"
    built_in = _read(f"{where}/modules.builtin") if dash else None
    if built_in is None:
        return None
    order = _read(f"{where}/modules.order") or ""
    return _module_names(built_in), _module_names(order), f"{where}/modules.builtin"


def _module_names(text: str) -> set[str]:
    return {
        line.rsplit("/", 1)[-1].partition(".")[0].replace("-", "_") for line in text.splitlines()
    }


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read(_MAX_LIST)
    except OSError:
        return None


def drivers(
    config: tuple[Mapping[str, str], str] | None,
    modules: tuple[set[str], set[str], str] | None,
    symbols: Mapping[str, int] | None,
) -> dict[str, Driver]:
    """Tell of each of `DRIVERS` whether a kernel has it, by the best source there is.

    Args:
        config: a configuration and where it is from.
        modules: names built in, names beside, and where they are from.
        symbols: the kernel's own; they know what is built in, not what is a module.
    """
    result = {}
    for name, (option, module, function) in DRIVERS.items():
        if config is not None:
            state = {"y": "built in", "m": "module"}.get(config[0].get(option, ""), "absent")
            result[name] = Driver(state, config[1])
        elif modules is not None and module in modules[0] | modules[1]:
            state = "built in" if module in modules[0] else "module"
            result[name] = Driver(state, modules[2])
        elif symbols and function in symbols:
            result[name] = Driver("built in", "kallsyms")
        elif modules is not None:
            result[name] = Driver("absent", modules[2])
        elif symbols:
            result[name] = Driver("not built in", "kallsyms")
        else:
            result[name] = Driver("unknown", "")
    return result
