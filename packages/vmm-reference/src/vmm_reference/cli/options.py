"""The command line of `vmm run` as argparse knows it: for its help, and for what is wrong."""

from __future__ import annotations

import argparse

__all__ = ["parser"]

STATUSES = """
Exit status: 0 the guest powered off (or Ctrl-A x), 1 the host failed, 2 a mistake in the
arguments, 3 the guest panicked, 4 it reset itself with --on-reset exit, 5 triple fault,
6 KVM internal error, 128 + N ended by signal N; or what a device `debug-exit` is told.
"""


def parser() -> argparse.ArgumentParser:
    """Every option of `vmm run` with its help."""
    made = argparse.ArgumentParser(
        prog="vmm run",
        description="Run a machine until its guest powers off. The guest's serial console is on "
        "the standard streams; on a terminal, Ctrl-A x leaves.",
        epilog=STATUSES,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--kernel", metavar="PATH", help="Linux image: ELF vmlinux or bzImage")
    add("--firmware", metavar="PATH", help="in the kernel's place: firmware such as SeaBIOS, which "
        "finds a boot loader itself")  # fmt: skip
    add("--variables", metavar="PATH", help="file of the firmware's flash, such as a copy of "
        "OVMF_VARS.fd; it is written")  # fmt: skip
    add("--initrd", metavar="PATH", help="initial RAM file system, or `none`; with a drive and "
        "modules beside the kernel the default is one that mounts the root disk")  # fmt: skip
    add("--drive", dest="drives", metavar="PATH[,ro]", action="append",
        help="raw disk image or block device; the first is /dev/vda; may be repeated")  # fmt: skip
    add("--device", dest="devices", metavar="KIND[,FIELD=VALUE...]", action="append",
        help="another device, such as `rng`; see the documentation; may be repeated")  # fmt: skip
    add("--transport", metavar="mmio|pci", help="how the guest finds virtio devices (default mmio)")
    add("--cpus", metavar="N", help="number of vCPUs (default 1)")
    add("--memory", metavar="SIZE", help="RAM, such as 256M or 2G (default 256M)")
    add("--max-memory", metavar="SIZE", help="how much RAM there may be with what comes later "
        "(default: there are none)")  # fmt: skip
    add("--cmdline", metavar="TEXT", help="the kernel's command line (default console=ttyS0, and "
        "root=/dev/vda with a drive)")  # fmt: skip
    add("--api-socket", metavar="PATH", help="make a control socket, for vmm pause, migrate, ...")
    add("--incoming", metavar="ADDRESS", help="wait for a machine that vmm migrate sends, at "
        "tcp:HOST:PORT or unix:PATH; what is given here replaces what it had")  # fmt: skip
    add("--tls", metavar="FOLDER", help="take machines only from who proves itself: cert.pem, "
        "key.pem and ca.pem")  # fmt: skip
    add("--config", metavar="FILE", help="TOML file with the same names; options here win")
    add("--on-reset", metavar="restart|exit", help="when the guest resets (default restart)")
    add("--protocol", metavar="auto|linux64|pvh", help="how the kernel is entered (default auto)")
    add("--kaslr", action="store_true", default=None,
        help="start a bzImage in its own decompressor")  # fmt: skip
    return made
