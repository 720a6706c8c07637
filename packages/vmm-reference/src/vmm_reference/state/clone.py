"""Many machines of one snapshot, and the template process that makes one cost next to nothing.

A template has read the snapshot and imported all that a machine needs, and has neither a descriptor
of KVM nor a thread: what it then forks shares its memory, the interpreter's and the guest's, until
it is written. KVM's descriptors belong to the process that made them, and a fork has none of its
parent's threads, so a process with either can be no template; it is refused.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from vm_memory._values import evolve
from vmm_reference.config import MachineConfig
from vmm_reference.cpu.compat import refuse_other_cpu
from vmm_reference.errors import HostError, VmmError
from vmm_reference.machine import Machine

from .snapshot import Restore, open_snapshot
from .warming import warm

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self


__all__ = ["Template", "identity", "on_copies"]


def identity(config: MachineConfig, number: int) -> dict[str, Any]:
    """What a clone has for itself, as fields of its configuration: see each device's `cloned`.

    The device `vmgenid` makes its identifier anew after each restore by itself.

    Args:
        config: of the machine that was saved.
        number: of the clone, from 0.
    """
    fields: dict[str, Any] = {
        "drives": tuple(drive.cloned(number) for drive in config.drives),
        "devices": tuple(device.cloned(number) for device in config.devices),
    }
    if config.variables is not None:
        fields["variables"] = f"{config.variables}-{number}"
    return fields


def on_copies(config: MachineConfig, images: dict[str, str]) -> MachineConfig:
    """The same machine with copies of drives' images, by the drives' names."""
    paths = {id(config.named_devices()[name]): path for name, path in images.items()}

    def copied(device: Any) -> Any:
        return evolve(device, path=paths[id(device)]) if id(device) in paths else device

    return evolve(
        config,
        drives=tuple(map(copied, config.drives)),
        devices=tuple(map(copied, config.devices)),
    )


class Template:
    """A snapshot that is read, in a process that forks machines from it.

    Args:
        folder: of the snapshot, which must stay as it is.
        overrides: fields of the configuration that are others in all clones.

    Raises:
        HostError: this process has a descriptor of KVM, or more than one thread; or as for
            `open_snapshot`.
        FormatError, ConfigError: as for `open_snapshot`.
    """

    def __init__(self, folder: str | os.PathLike[str], **overrides: Any) -> None:
        refuse_used_process()
        self._restored = open_snapshot(folder, Restore.COPY_ON_WRITE, overrides, keep=True)
        try:
            refuse_other_cpu(self._restored.vcpus[0].cpuid)
        except BaseException:
            self._restored.discard()
            raise
        self.config = self._restored.config
        warm(self.config)
        gc.collect()
        gc.freeze()  # so that the collector of a clone writes to none of this

    def fork(
        self,
        number: int,
        run: Callable[[Machine], int],
        *,
        console: tuple[int, int] | None = None,
    ) -> int:
        """Start a clone in a process of its own; its identifier, for `os.waitpid`.

        Args:
            number: of the clone, from 0; no two have the same.
            run: gets the machine, not started, in the new process; gives the exit status. What it
                raises is printed, as one line where it is a fault of host or configuration.
            console: as for a new machine.

        Raises:
            HostError: this process has a descriptor of KVM, or more than one thread.
            OSError: it can't be forked.
        """
        refuse_used_process()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            config, fields = self.config, identity(self.config, number)
            if any(getattr(config, name) != value for name, value in fields.items()):
                config = evolve(config, **fields)  # only then: checking writes to many pages
            self._restored.config = config
            machine = Machine(config, console=console)
            machine._restored = self._restored
            status = run(machine)
        except (VmmError, OSError) as error:
            print(f"clone {number}: {error}", file=sys.stderr)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def close(self) -> None:
        """Give everything back; clones go on."""
        self._restored.discard()
        gc.unfreeze()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def refuse_used_process() -> None:
    """Raise `HostError` where this process can be no template any more."""
    hint = "make the template before the first machine, in a process of its own"
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except OSError:  # that of the listing itself
            continue
        if target == "/dev/kvm" or target.startswith("anon_inode:kvm"):
            raise HostError("template", f"this process has {target} open", hint)
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads > 1:
        raise HostError("template", f"this process has {threads} threads", hint)
