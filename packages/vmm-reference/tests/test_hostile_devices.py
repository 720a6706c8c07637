"""Any driver, good or bad, against disk and entropy device, on both transports; published holes.

Numbers are those of the list of holes that other monitors had; what concerns queues and transports
as such is in virtio-queue's `test_published_holes.py`, malformed requests are in `test_blk.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from virtio_queue.device import VirtioDevice
from virtio_queue.mmio import MmioTransport
from virtio_queue.testing import Arena, MmioDriver
from virtio_queue.testing.stateful import DeviceMachine
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.backends.file import FileBackend
from vmm_reference.devices.blk.model import Block
from vmm_reference.devices.rng import MAX_REQUEST, Rng

SECTORS = 64


class Disk:
    """An image in memory that fails the test where it is reached outside."""

    size = SECTORS * 512
    read_only = False

    def __init__(self) -> None:
        self.data = bytearray(self.size)

    def _at(self, offset: int, length: int) -> slice:
        assert 0 <= offset <= offset + length <= self.size
        return slice(offset, offset + length)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = self.data[self._at(offset, len(buffer))]
            offset += len(buffer)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            self.data[self._at(offset, len(buffer))] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        self._at(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.data[self._at(offset, length)] = bytes(length)


kinds = st.one_of(st.sampled_from([0, 1, 4, 8, 11, 13]), st.integers(0, 2**32 - 1))
sectors = st.one_of(
    st.integers(0, SECTORS), st.just(SECTORS - 1), st.just(2**64 - 1), st.integers(0, 2**64 - 1)
)
headers = st.builds(lambda kind, sector: struct.pack("<IIQ", kind, 0, sector), kinds, sectors)
payloads = st.one_of(
    st.sampled_from([b"", bytes(512), b"z" * 1024, bytes(513)]),
    st.lists(
        st.builds(
            lambda sector, count, flags: struct.pack("<QII", sector, count, flags),
            sectors,
            st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)),
            st.integers(0, 3),
        ),
        max_size=3,
    ).map(b"".join),
)
requests = st.tuples(
    st.one_of(
        st.builds(lambda header, payload: [header, payload], headers, payloads),
        st.builds(lambda header, payload: [header + payload], headers, payloads),
        st.lists(st.binary(max_size=20), max_size=3),
    ).map(lambda pieces: [piece for piece in pieces if piece]),
    st.lists(st.sampled_from([1, 20, 511, 512, 1024]), max_size=3),
).filter(any)  # no ring can hold a buffer of no elements


class BlockMachine(DeviceMachine):
    """Requests that are nearly right, and anything else."""

    buffers = requests

    def make_model(self, memory: GuestMemory) -> Block:
        return Block(Disk(), serial="hostile", queues=2)

    def transplant(self, old: Any, new: Any) -> None:
        new.restore(old.save())


class BlockOnPci(BlockMachine):
    """The same by the other registers."""

    pci = True


class RngMachine(DeviceMachine):
    """Buffers of any kind."""

    def make_model(self, memory: GuestMemory) -> Rng:
        return Rng(lambda length: b"\x5a" * length)


class RngOnPci(RngMachine):
    """The same by the other registers."""

    pci = True


TestBlock = BlockMachine.TestCase
TestBlock.__doc__ = "A disk survives any driver on virtio-mmio."
TestBlockOnPci = BlockOnPci.TestCase
TestBlockOnPci.__doc__ = "A disk survives any driver on virtio-pci."
TestRng = RngMachine.TestCase
TestRng.__doc__ = "An entropy device survives any driver on virtio-mmio."
TestRngOnPci = RngOnPci.TestCase
TestRngOnPci.__doc__ = "An entropy device survives any driver on virtio-pci."


def driver_of(model: Block | Rng, size: int) -> MmioDriver:
    """A driver that is started, with that much memory."""
    memory = GuestMemory.from_ranges([(GuestAddress(0), size)])
    device = VirtioDevice(model, memory, lambda: None)
    arena = Arena(0x1000, size - 0x1000)
    driver = MmioDriver(MmioTransport(device, device.process), arena=arena)
    driver.start()
    return driver


def test_04_cve_2026_27211_a_header_in_sector_0_is_data(tmp_path: Path) -> None:
    """A guest makes its raw image look like another format: opened again it is as raw as before."""
    secret, image = tmp_path / "secret", tmp_path / "disk.img"
    secret.write_bytes(b"secret" * 1000)
    image.write_bytes(bytes(1 << 16))
    name = str(secret).encode()
    head = b"QFI\xfb" + struct.pack(">IQIIQ", 3, 72, len(name), 16, 1 << 40) + bytes(40) + name
    head = head.ljust(512, b"\0")
    for _ in range(2):
        backend = FileBackend(str(image))
        driver = driver_of(Block(backend), 1 << 20)
        (queue,) = driver.queues
        queue.add([struct.pack("<IIQ", 1, 0, 0), head], [1])
        queue.add([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
        queue.add([struct.pack("<IIQ", 0, 0, 127)], [512, 1])
        driver.kick()
        data = [used.data for used in queue.reap()]
        assert data == [b"\0", head + b"\0", bytes(513)]
        assert backend.size == 1 << 16
        backend.close()


def test_10_discards_of_millions_of_segments_are_refused() -> None:
    """A payload that is all segments is refused by its length, before any of them is looked at."""
    block = Block(Disk())
    driver = driver_of(block, 16 << 20)
    (queue,) = driver.queues
    segments = struct.pack("<QII", 0, 1, 0) * (8 << 16)  # each of them good
    for kind in (11, 13):
        queue.add([struct.pack("<IIQ", kind, 0, 0), segments], [1])
        driver.kick()
        (used,) = queue.reap()
        assert used.data == b"\1"
    assert block.refused == 2


def test_13_entropy_for_gigabytes_is_capped() -> None:
    """A request with room for 8 MiB gets 64 KiB, and is told so."""
    asked: list[int] = []

    def entropy(length: int) -> bytes:
        asked.append(length)
        return b"\x5a" * length

    driver = driver_of(Rng(entropy), 16 << 20)
    (queue,) = driver.queues
    queue.add([], [8 << 20])
    driver.kick()
    (used,) = queue.reap()
    assert (asked, used.length) == ([MAX_REQUEST], MAX_REQUEST)


def test_22_a_flood_leaves_nothing_behind() -> None:
    """Bad requests by the thousand are counted; the device holds no more than after the first."""
    block = Block(Disk())
    driver = driver_of(block, 1 << 20)
    (queue,) = driver.queues
    for number in range(3000):
        queue.add([struct.pack("<IIQ", 0xDEAD0000 + number, 0, number)], [1])
        driver.kick()
        (used,) = queue.reap()
        assert used.data == b"\2"
    assert block.requests == {-1: 3000}
    assert block.metrics()["refused_requests"] == 3000
