"""Linux drives our virtqueues: `queues.py KIND KERNEL INITRD FOLDER ROUNDS TRANSPORT < RINGS`.

Runs where unmodified kernels run. One machine gets a device for each ring that standard input
names, a JSON array of [size, packed, indirect, event_idx]; its shell is told to use all of them,
and what went through each is compared. Prints a JSON array of findings, one object a ring.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shell

from virtio_queue.constants import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.devices import rng
from vmm_reference.devices.blk import model as blk
from vmm_reference.devices.blk.model import Block
from vmm_reference.devices.rng import Rng
from vmm_reference.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtio_queue import DescriptorChain
    from vm_memory import GuestMemory
    from vmm_reference.devices.blk.model import Backend

TRANSPORT = sys.argv[6]
PAGES, MANY = 32, 512  # of a disk that are copied in a round, two requests each
BLOCKS = 70  # of entropy that are read in a round, one by one
SEG_MAX = slice(12, 16)  # of the configuration space, virtio 1.3 section 5.2.4
RING = F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED

Wish = tuple[int, bool, bool, bool]


def features(wish: Wish) -> int:
    """The ring features to offer."""
    _, packed, indirect, event_idx = wish
    return packed * F_RING_PACKED | indirect * F_INDIRECT_DESC | event_idx * F_EVENT_IDX


class Seen:
    """What a device saw of its ring.

    Attributes:
        chains: how many were served.
        indirect: how many of them lay in an indirect table.
        longest: the most descriptors of one that did not.
        kicks: how often the driver notified.
    """

    def __init__(self) -> None:
        self.chains = self.indirect = self.longest = self.kicks = 0

    def add(self, chain: DescriptorChain) -> None:
        """Count a chain."""
        elements = len(chain.readable) + len(chain.writable)
        self.chains += 1
        if elements > chain.slots or chain.slots == 1 < elements:
            self.indirect += 1
        else:
            self.longest = max(self.longest, elements)


class Disk(Block):
    """A disk whose ring is as wished."""

    def __init__(self, backend: Backend, wish: Wish) -> None:
        super().__init__(backend)
        self.queue_sizes = (wish[0],)
        self.device_features = self.device_features & ~RING | features(wish)
        self.seen = Seen()

    def read_config(self, offset: int, length: int) -> bytes:
        """Header, status and the segments of a request have to fit the ring."""
        config = bytearray(super().read_config(0, 256))
        config[SEG_MAX] = (self.queue_sizes[0] - 2).to_bytes(4, "little")
        return bytes(config[offset : offset + length])

    def process(self, queue_index: int) -> None:
        """Count kicks."""
        self.seen.kicks += 1
        super().process(queue_index)

    def _serve(self, chain: DescriptorChain, memory: GuestMemory) -> int:
        self.seen.add(chain)
        return super()._serve(chain, memory)


class Source(Rng):
    """An entropy device whose ring is as wished, and whose bytes are known."""

    def __init__(self, wish: Wish, seed: int) -> None:
        self.stream = bytearray()
        generator = random.Random(seed)

        def entropy(length: int) -> bytes:
            data = generator.randbytes(length)
            self.stream += data
            return data

        super().__init__(entropy)
        self.queue_sizes = (wish[0],)
        self.device_features = self.device_features & ~RING | features(wish)
        self.seen = Seen()

    def process(self, queue_index: int) -> None:
        """Count kicks."""
        self.seen.kicks += 1
        super().process(queue_index)

    def _serve(self, chain: DescriptorChain, memory: GuestMemory) -> int:
        self.seen.add(chain)
        return super()._serve(chain, memory)


class Guest:
    """A machine with a shell, and its devices in the order of the wishes."""

    def __init__(
        self, kernel: str, initrd: str, drives: list[Drive],
        make: Callable[[int, Backend | None], Disk | Source | Rng],
    ) -> None:  # fmt: skip
        self.devices: list[Any] = []

        def entropy(_: object) -> Any:
            self.devices.append(make(0, None))
            return self.devices[-1]

        def disk(backend: Backend, **_: object) -> Any:
            self.devices.append(make(len(self.devices), backend))
            return self.devices[-1]

        # What the factories make their devices with.
        vars(rng).update(Rng=entropy)
        vars(blk).update(Block=disk)
        config = MachineConfig(
            kernel=kernel, initrd=initrd, drives=drives, cpus=2, memory="256M",
            cmdline="console=ttyS0 panic=-1 quiet", transport=TRANSPORT,
        )  # fmt: skip
        self.machine = Machine(config)

    def __enter__(self) -> Guest:
        self.machine.start()
        shell.ready(self.machine)
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.stop()

    def tell(self, command: str) -> str:
        """Run a command in the guest; it has to succeed. Returns what it printed."""
        return shell.tell(self.machine, command)

    def power_off(self) -> None:
        """End the guest as it wants to be ended."""
        shell.power_off(self.machine)

    def findings(self, wishes: list[Wish], devices: list[Any]) -> list[dict[str, Any]]:
        """What became of each ring."""
        board = self.machine._board
        assert board is not None
        slots = [wiring.slot for wiring in board.devices.values() if wiring.slot is not None]
        of_model = {id(slot.device.model): slot.device for slot in slots}
        found = []
        for wish, model in zip(wishes, devices, strict=True):
            device = of_model[id(model)]
            found.append(
                {
                    "wish": wish,
                    "status": device.status,
                    "size": device.queues[0].size,
                    "negotiated": device.driver_features & RING == features(wish),
                    "position": device.queues[0].save().next_used,
                    "refused": device.refused,
                    "reason": device.reset_reason,
                    **vars(model.seen),
                }
            )
        return found


def block(
    kernel: str, initrd: str, folder: Path, rounds: int, wishes: list[Wish]
) -> list[dict[str, Any]]:
    """Each disk's first half is copied onto its second by several processes at once."""
    pages = PAGES if rounds == 1 else MANY
    images = [folder / f"queue-{number}.img" for number in range(len(wishes))]
    halves = [random.Random(number).randbytes(pages << 12) for number in range(len(wishes))]
    for image, half in zip(images, halves, strict=True):
        image.write_bytes(half + bytes(len(half)))

    def make(number: int, backend: Backend | None) -> Disk | Rng:
        return Rng(os.getrandom) if backend is None else Disk(backend, wishes[number - 1])

    drives = [Drive(str(image), engine="python") for image in images]
    with Guest(kernel, initrd, drives, make) as guest:
        for number in range(len(wishes)):
            disk = f"/dev/vd{chr(ord('a') + number)}"
            # Four processes page by page, then all in large pieces through the page cache.
            piece = 4096
            if rounds > 1:  # eight requests by one call: each page is one still
                piece = 32768
                limits = f"/sys/block/{Path(disk).name}/queue"
                guest.tell(f"echo 4 >{limits}/max_sectors_kb; echo 2 >{limits}/nomerges")
            part = (pages << 12) // piece // 4
            for _ in range(rounds):
                guest.tell(
                    f"for part in 0 1 2 3; do dd if={disk} of={disk} bs={piece} count={part} "
                    f"skip=$((part * {part})) seek=$((({pages} << 12) / {piece} + part * {part})) "
                    "iflag=direct oflag=direct conv=notrunc 2>/dev/null & done; wait"
                )
            guest.tell(
                f"echo 3 >/proc/sys/vm/drop_caches; dd if={disk} of={disk} bs={pages // 4 << 12} "
                "count=2 seek=4 conv=notrunc,fsync 2>/dev/null"
            )
        found = guest.findings(wishes, guest.devices[1:])
        guest.power_off()
    for image, half, finding in zip(images, halves, found, strict=True):
        finding["same"] = image.read_bytes() == half * 2
        image.unlink()
    return found


def entropy(
    kernel: str, initrd: str, folder: Path, rounds: int, wishes: list[Wish]
) -> list[dict[str, Any]]:
    """Each source is read from, `BLOCKS` times in a round; its last bytes are compared."""
    images = [folder / f"source-{number}.img" for number in range(len(wishes) - 1)]
    for image in images:
        image.write_bytes(bytes(512))

    def make(number: int, backend: Backend | None) -> Source:
        return Source(wishes[number], number)

    with Guest(kernel, initrd, [Drive(str(i), engine="python") for i in images], make) as guest:
        got = []
        for number in range(len(wishes)):
            name = f"virtio_rng.{number}"
            text = guest.tell(
                f"echo {name} >/sys/class/misc/hw_random/rng_current && "
                f"dd if=/dev/hwrng of=/dev/null bs=64 count={BLOCKS * rounds} 2>/dev/null && "
                "dd if=/dev/hwrng bs=64 count=8 2>/dev/null | hexdump -v -e '1/1 \"%02x\"'; echo"
            )
            got.append(bytes.fromhex("".join(text.split())))
        found = guest.findings(wishes, guest.devices)
        guest.power_off()
    for data, model, finding in zip(got, guest.devices, found, strict=True):
        finding["same"] = len(data) == 512 and runs_of(bytes(model.stream), data)
    for image in images:
        image.unlink()
    return found


def runs_of(stream: bytes, data: bytes) -> bool:
    """Whether data is pieces of a stream in its order: the kernel takes some for itself."""
    at = position = 0
    while at < len(data):
        length = min(8, len(data) - at)
        position = stream.find(data[at : at + length], position)
        if position < 0:
            return False
        while (
            at + length < len(data)
            and stream[position + length : position + length + 1]
            == (data[at + length : at + length + 1])
        ):
            length += 1
        at += length
        position += length
    return True


def main() -> None:
    """See the module."""
    kind, kernel, initrd, folder, rounds, _ = sys.argv[1:]
    wishes = [(size, bool(p), bool(i), bool(e)) for size, p, i, e in json.load(sys.stdin)]
    start = time.monotonic()
    run = {"block": block, "entropy": entropy}[kind]
    found = run(kernel, initrd, Path(folder), int(rounds), wishes)
    print(f"{len(wishes)} rings in {time.monotonic() - start:.1f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
