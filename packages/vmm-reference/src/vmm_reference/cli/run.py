"""`vmm run`: one machine, its console on the terminal or the standard streams."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from attrs import evolve

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.errors import ConfigError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["configuration", "run", "run_on_terminal"]

STATUSES = """
Exit status: 0 the guest powered off (or Ctrl-A x), 1 the host failed, 2 a mistake in the
arguments, 3 the guest panicked, 4 it reset itself with --on-reset exit, 5 triple fault,
6 KVM internal error, 128 + N ended by signal N; or what a device `debug-exit` is told.
"""


def configuration(path: str | None, options: dict[str, Any]) -> MachineConfig:
    """The machine of a TOML file, changed by what the command line gives.

    Raises:
        ConfigError: the file or a value is not a machine.
    """
    table: dict[str, Any] = {}
    if path is not None:
        import tomllib

        try:
            with open(path, "rb") as file:  # noqa: PTH123
                table = tomllib.load(file)
        except OSError as error:
            raise ConfigError("config", path, error.strerror or str(error)) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError("config", path, f"is not TOML: {error}") from None
    table |= {key: value for key, value in options.items() if value is not None}
    root = " root=/dev/vda" if table.get("drives") else ""
    if "firmware" not in table:
        table.setdefault("cmdline", f"console=ttyS0{root}")
    choose = root and "initrd" not in table
    if table.get("initrd") == "none":
        del table["initrd"]
    config = MachineConfig.from_mapping(table, source=path or "vmm run")
    if choose and config.kernel is not None:
        return evolve(config, initrd=_initrd_for(config.kernel))
    return config


def _initrd_for(kernel: str) -> str | None:
    """An initial file system that mounts the root disk, for a kernel whose modules are at hand.

    A distribution's kernel has the drivers of its disks as modules. One without modules has them
    built in, or is none of ours to know, and gets nothing.
    """
    from pathlib import Path

    from vmm_reference.image.errors import ImageError
    from vmm_reference.image.initramfs import guest_initramfs
    from vmm_reference.image.kernels import local_kernel

    try:
        found = local_kernel(Path(kernel))
    except ImageError:  # it tells no version, so it has no modules either
        return None
    return str(guest_initramfs(found)) if found.modules is not None else None


def run_on_terminal(machine: Machine, api_socket: str | None = None) -> int:
    """Run a machine with its console on the standard streams, until it ends.

    On a terminal the keys are the guest's, but for Ctrl-A x. SIGTERM, SIGINT and SIGHUP stop the
    machine.

    Args:
        machine: started here, unless it came from another host and runs already.
        api_socket: where to make a control socket.

    Returns:
        The exit status: the outcome's, or 128 and the number of the signal.
    """
    caught: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        machine.stop(Outcome.STOPPED)

    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, stop))
        if os.isatty(0):
            from vmm_reference.backends.terminal import Escape, RawTerminal

            terminal = stack.enter_context(RawTerminal(0))
            machine.filter_input(Escape(lambda: machine.stop(Outcome.QUIT)).filter)
            previous = signal.signal(signal.SIGCONT, lambda _number, _frame: terminal.set_raw())
            stack.callback(signal.signal, signal.SIGCONT, previous)
        stack.enter_context(machine)
        if api_socket is not None:
            from vmm_reference.api.server import Control, Server

            stack.enter_context(Server(api_socket, Control(machine)))
        machine.wait()
    return 128 + caught[0] if caught else machine.status


def run(arguments: list[str]) -> int:
    """Carry out `vmm run`; returns the exit status.

    Raises:
        ConfigError: the arguments make no machine.
        VmmError, OSError: the host failed.
    """
    options = vars(_parser().parse_args(arguments))
    path = options.pop("config")
    api_socket, incoming = options.pop("api_socket"), options.pop("incoming")
    tls = options.pop("tls")
    if options["cpus"] is not None:
        text = options["cpus"]
        options["cpus"] = int(text) if text.isascii() and text.isdigit() else text
    if options["drives"] is not None:
        options["drives"] = tuple(Drive.parse(text) for text in options["drives"])
    if options["devices"] is not None:
        options["devices"] = tuple(parse_device(text) for text in options["devices"])
    if incoming is not None:
        given = {name: value for name, value in options.items() if value not in (None, (), False)}
        machine = _receive(incoming, tls, api_socket, given)
    else:
        machine = Machine(configuration(path, options), console=(0, 1))
    status = run_on_terminal(machine, api_socket)
    if machine.outcome is not Outcome.POWER_OFF and machine.outcome is not None:
        detail = f": {machine.detail}" if machine.detail else ""
        print(f"vmm: {machine.outcome.value}{detail}", file=sys.stderr)
    if machine.dropped_output:
        print(
            f"vmm: {machine.dropped_output} bytes of the guest's output were lost", file=sys.stderr
        )
    return status


def _receive(
    address: str, tls: str | None, api_socket: str | None, overrides: dict[str, Any]
) -> Machine:
    """Wait for a machine from another VMM; it runs when this returns."""
    from vmm_reference.api.server import Control, Server
    from vmm_reference.state.incoming import Incoming
    from vmm_reference.state.wire import Tls

    chosen = None if tls is None else Tls(tls)
    incoming = Incoming(address, tls=chosen, console=(0, 1), **overrides)
    print(f"vmm: waiting for a machine at {incoming.address}", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        closing = stack.enter_context(ExitStack())
        closing.callback(incoming.close)
        if api_socket is not None:
            stack.enter_context(Server(api_socket, Control(None, incoming)))
        told = ""
        while True:
            try:
                machine = incoming.receive(0.5)
            except TimeoutError:
                last = incoming.reports[-1] if incoming.reports else ""
                if last != told:
                    print(f"vmm: {last}", file=sys.stderr, flush=True)
                    told = last
                continue
            closing.pop_all()  # the source may have to ask again, as long as the machine runs
            return machine


def _formatter(prog: str) -> argparse.HelpFormatter:
    """As argparse makes one, for every option; it would import shutil to ask for the width."""
    try:
        width = os.get_terminal_size(1).columns
    except OSError:
        width = 80
    return argparse.HelpFormatter(prog, width=max(width - 2, 40))


def _parser() -> argparse.ArgumentParser:
    # argparse here, click elsewhere: click's import alone takes a third of the time from the
    # process's start to the guest's first instruction.
    parser = argparse.ArgumentParser(
        prog="vmm run",
        description="Run a machine until its guest powers off. The guest's serial console is on "
        "the standard streams; on a terminal, Ctrl-A x leaves.",
        epilog=STATUSES,
        allow_abbrev=False,
        formatter_class=_formatter,
    )
    add = parser.add_argument
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
    return parser
