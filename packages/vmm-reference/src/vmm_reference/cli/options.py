"""The command line of `vmm run` as argparse knows it: for its help, and for what is wrong."""

from __future__ import annotations

import argparse

from .run import FLAGS, LISTS, VALUES

__all__ = ["parser"]

STATUSES = """
Exit status: 0 the guest powered off (or Ctrl-A x), 1 the host failed, 2 a mistake in the
arguments, 3 the guest panicked, 4 it reset itself with --on-reset exit, 5 triple fault,
6 KVM internal error, 128 + N ended by signal N; or what a device `debug-exit` is told.
"""


# What stands in the help for each field: its value, and what it is.
_HELP = {
    "kernel": ("PATH", "Linux image: ELF vmlinux or bzImage"),
    "firmware": ("PATH", "in the kernel's place: firmware such as SeaBIOS, which finds a boot "
                 "loader itself"),
    "variables": ("PATH", "file of the firmware's flash, such as a copy of OVMF_VARS.fd; it is "
                  "written"),
    "initrd": ("PATH", "initial RAM file system, or `none`; with a drive and modules beside the "
               "kernel the default is one that mounts the root disk"),
    "transport": ("mmio|pci", "how the guest finds virtio devices (default mmio)"),
    "cpus": ("N", "number of vCPUs (default 1)"),
    "memory": ("SIZE", "RAM, such as 256M or 2G (default 256M)"),
    "max_memory": ("SIZE", "how much RAM there may be with what comes later (default: there are "
                   "none)"),
    "cmdline": ("TEXT", "the kernel's command line (default console=ttyS0, and root=/dev/vda with "
                "a drive)"),
    "api_socket": ("PATH", "make a control socket, for vmm pause, migrate, ..."),
    "incoming": ("ADDRESS", "wait for a machine that vmm migrate sends, at tcp:HOST:PORT or "
                 "unix:PATH; what is given here replaces what it had"),
    "tls": ("FOLDER", "take machines only from who proves itself: cert.pem, key.pem and ca.pem"),
    "config": ("FILE", "TOML file with the same names; options here win"),
    "on_reset": ("restart|exit", "when the guest resets (default restart)"),
    "protocol": ("auto|linux64|pvh", "how the kernel is entered (default auto)"),
    "drives": ("PATH[,ro]", "raw disk image or block device; the first is /dev/vda; may be "
               "repeated"),
    "devices": ("KIND[,FIELD=VALUE...]", "another device, such as `rng`; see the documentation; "
                "may be repeated"),
    "kaslr": ("", "start a bzImage in its own decompressor"),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Every option of `vmm run` with its help."""
    made = argparse.ArgumentParser(
        prog="vmm run",
        description="Run a machine until its guest powers off. The guest's serial console is on "
        "the standard streams; on a terminal, Ctrl-A x leaves.",
        epilog=STATUSES,
        allow_abbrev=False,
    )
    for name, field in (*VALUES.items(), *LISTS.items()):
        metavar, text = _HELP[field]
        action = "append" if name in LISTS else "store"
        made.add_argument(name, dest=field, metavar=metavar, action=action, help=text)
    for name, field in FLAGS.items():
        made.add_argument(name, dest=field, action="store_true", default=None, help=_HELP[field][1])
    return made
