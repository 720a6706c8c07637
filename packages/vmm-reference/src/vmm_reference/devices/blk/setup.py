"""A disk in the machine: its image, who serves its requests, and what its owner may change."""

from __future__ import annotations

from vmm_reference.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from virtio_queue import VirtioDevice
    from vmm_reference.backends.file import FileBackend
    from vmm_reference.config import Drive
    from vmm_reference.wiring import Wiring

    from .model import Backend, Block

__all__ = ["DriveControl", "build"]


class DriveControl:
    """What the owner of the machine may do with a running drive, from any thread.

    Args:
        backend: the image.

    Attributes:
        block: the device's model.
        device: whose driver is told of a change.
    """

    block: Block
    device: VirtioDevice

    def __init__(self, backend: FileBackend) -> None:
        self._backend = backend

    @property
    def size(self) -> int:
        """Of the image, in bytes."""
        return self._backend.size

    def resize(self, size: int | None = None) -> None:
        """Make the image larger or smaller, or find out its new size; the guest notices by itself.

        Args:
            size: in bytes, a multiple of 512; by default what the file or block device has now.

        Raises:
            HostError: it can't be; the drive is as it was.
        """
        device = self.device
        with device.lock:
            self._backend.resize(size)
            with device.config_change():
                self.block.exchange(self._backend)

    def copy(self, path: str) -> None:
        """Make a new file that has what the image has now. The machine is paused.

        Raises:
            HostError: the host can't.
        """
        self._backend.copy(path)

    def swap(self, path: str) -> None:
        """Take another image in place of this one, read-only or not as this one is.

        Raises:
            HostError: it can't be opened, or another machine uses it; the drive is as it was.
        """
        from vmm_reference.backends.file import FileBackend

        other = FileBackend(path, read_only=self._backend.read_only)
        device = self.device
        with device.lock:
            with device.config_change():
                self.block.exchange(other)
            self._backend.close()
            self._backend = other

    def limit(self, *, bandwidth: str | None = None, ops: str | None = None) -> None:
        """Change a limit, as in the drive's configuration; an empty text lifts it.

        Raises:
            ConfigError: it is no limit.
        """
        from vmm_reference.devices.limiter import parse_bucket

        texts = {"bandwidth": bandwidth, "ops": ops}
        buckets = {
            name: parse_bucket(text, name) for name, text in texts.items() if text is not None
        }
        with self.device.lock:
            self.block.limit(buckets)

    def close(self) -> None:
        """Close the image."""
        self._backend.close()

    def unlock(self) -> None:
        """Let another machine have the image."""
        self._backend.unlock()

    def lock(self) -> None:
        """Have the image again, or raise `HostError`."""
        self._backend.lock()


def build(config: Drive, wiring: Wiring) -> DriveControl | None:
    """A disk on the file or block device that the configuration names; an overlay is as it is."""
    if config.overlay:
        from vmm_reference.backends.overlay import Overlay

        overlay = Overlay(config.path, config.overlay)
        wiring.on_close(overlay.close)
        _in_python(config, wiring, overlay)
        return None
    from vmm_reference.backends.file import FileBackend

    backend = FileBackend(config.path, read_only=config.read_only, locked=not wiring.incoming)
    control = DriveControl(backend)
    wiring.on_close(control.close)
    wiring.on_hand_over(control.unlock, control.lock)
    make = _in_python if config.engine == "python" else _by_pump
    control.block, control.device = make(config, wiring, backend)
    return control


def _in_python(config: Drive, wiring: Wiring, backend: Backend) -> tuple[Block, VirtioDevice]:
    """Served on the I/O thread."""
    from vmm_reference.devices.limiter import build_limiter

    from .model import Block

    block = Block(
        backend,
        serial=config.serial,
        queues=config.queues,
        limiter=build_limiter(wiring, config.bandwidth, config.ops),
        kick=lambda queue: slot.kick(queue),
    )
    slot = wiring.virtio(block)
    return block, slot.device


def _by_pump(config: Drive, wiring: Wiring, backend: FileBackend) -> tuple[Block, VirtioDevice]:
    """Served by a thread of C."""
    from virtio_queue.errors import PumpError

    from .pumped import PumpedBlock

    engine: Literal["sync", "io_uring"] = "io_uring" if config.engine == "io_uring" else "sync"
    try:
        block = PumpedBlock(
            backend, engine, wiring.memory, serial=config.serial, queues=config.queues
        )
    except PumpError as error:
        hint = f"{error.hint}, or allow it to this process"
        raise HostError(f"drive {config.path}", error.strerror, hint) from error
    if config.bandwidth or config.ops:
        from vmm_reference.devices.limiter import parse_bucket

        block.limit({"bandwidth": parse_bucket(config.bandwidth), "ops": parse_bucket(config.ops)})
    wiring.on_close(block.server.close)
    slot = wiring.virtio(block)
    block.offload.plug_in(slot, wiring)
    return block, slot.device
