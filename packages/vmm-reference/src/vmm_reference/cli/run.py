"""`vmm run`: one machine, its console on the terminal or the standard streams."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import ExitStack

from vm_memory._values import evolve
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.errors import ConfigError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import Any
else:
    import _signal as signal  # without the enumerations that signal makes of its numbers

__all__ = ["Signals", "configuration", "run", "run_on_terminal"]

# What the command line may say: an option's name, and the field that it gives. The help is apart.
VALUES = {
    "--kernel": "kernel",
    "--firmware": "firmware",
    "--variables": "variables",
    "--initrd": "initrd",
    "--transport": "transport",
    "--cpus": "cpus",
    "--memory": "memory",
    "--max-memory": "max_memory",
    "--cmdline": "cmdline",
    "--api-socket": "api_socket",
    "--incoming": "incoming",
    "--tls": "tls",
    "--config": "config",
    "--on-reset": "on_reset",
    "--protocol": "protocol",
}
LISTS = {"--drive": "drives", "--device": "devices"}
FLAGS = {"--kaslr": "kaslr"}


def options(arguments: list[str]) -> dict[str, Any]:
    """What a command line says, by field; what it does not say is None.

    Anything but options and values in their plain form is argparse's matter: help, and mistakes.
    A boot can't wait for it.
    """
    found: dict[str, Any] = dict.fromkeys([*VALUES.values(), *LISTS.values(), *FLAGS.values()])
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word in FLAGS:
            found[FLAGS[word]] = True
            continue
        if not equals:
            value = next(words, "-")
        if value.startswith("-") or not (name in VALUES or name in LISTS):
            from .options import parser

            return vars(parser().parse_args(arguments))
        if name in VALUES:
            found[VALUES[name]] = value
        else:
            found[LISTS[name]] = [*(found[LISTS[name]] or ()), value]
    return found


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


class Signals:
    """Listens to signals for as long as the context lasts, on the main thread.

    Python runs a signal's handler when the main thread next comes to a bytecode. A signal that
    another thread gets, or that comes just before the main thread begins to wait, is not noticed
    until that wait ends, which for a machine may be never. The interpreter's wake-up descriptor
    gets it in any case, so that is what the machine's I/O thread listens to.

    Args:
        machine: on whose I/O thread they are told, once it runs.
        told: called there with the number of each.
        numbers: which.
    """

    def __init__(self, machine: Machine, told: Callable[[int], None], *numbers: int) -> None:
        self._machine, self._told, self._numbers = machine, told, numbers

    def __enter__(self) -> Signals:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _note) for number in self._numbers}
        self._machine.on_readable(self._reader, self._read)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        os.close(self._reader)

    def _read(self, _events: int) -> None:
        for number in os.read(self._reader, 64):
            if number in self._before:
                self._told(number)


def _note(_number: int, _frame: FrameType | None) -> None:
    """In the place of what the signal would do by itself."""


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
    again: list[Callable[[], None]] = []  # what a shell may have undone while this stood still

    def told(number: int) -> None:
        if number == signal.SIGCONT:
            for action in again:
                action()
            return
        caught.append(number)
        machine.stop(Outcome.STOPPED)

    with ExitStack() as stack:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT)
        stack.enter_context(Signals(machine, told, *numbers))
        if os.isatty(0):
            from vmm_reference.backends.terminal import Escape, RawTerminal

            again.append(stack.enter_context(RawTerminal(0)).set_raw)
            machine.filter_input(Escape(lambda: machine.stop(Outcome.QUIT)).filter)
        stack.enter_context(machine)
        gc.freeze()
        gc.enable()
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
    given = options(arguments)
    path = given.pop("config")
    api_socket, incoming = given.pop("api_socket"), given.pop("incoming")
    tls = given.pop("tls")
    if given["cpus"] is not None:
        text = given["cpus"]
        given["cpus"] = int(text) if text.isascii() and text.isdigit() else text
    if given["drives"] is not None:
        given["drives"] = tuple(Drive.parse(text) for text in given["drives"])
    if given["devices"] is not None:
        given["devices"] = tuple(parse_device(text) for text in given["devices"])
    if incoming is not None:
        overrides = {name: value for name, value in given.items() if value not in (None, (), False)}
        machine = _receive(incoming, tls, api_socket, overrides)
    else:
        machine = Machine(configuration(path, given), console=(0, 1))
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
    from vmm_reference.state.connection import Tls
    from vmm_reference.state.incoming import Incoming

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
