"""Devices whose queues the kernel serves: when it starts, when it stops, what is offered.

The kernel's part is a fake here, since hosts without the modules have none; the tests of the whole
have the real one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from virtio_queue import Queue
from virtio_queue.constants import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.backends import vhost
from vmm_reference.backends.vhost import VhostVsock
from vmm_reference.devices.net import features
from vmm_reference.devices.net.served import ServedNet
from vmm_reference.devices.offload import Offload
from vmm_reference.devices.vsock.served import ServedVsock
from vmm_reference.errors import HostError
from vmm_reference.testing import Bench

if TYPE_CHECKING:
    from vmm_reference.slots import VirtioSlot

MAC = bytes.fromhex("020000000001")


class FakeKernel:
    """Notes what it is told."""

    together = True
    attention = -1

    def __init__(self, features: int) -> None:
        self.features = features
        self.log: list[str] = []
        self.fails = False
        self.accepted = 0

    def start(self, features: int, queues: Mapping[int, Queue]) -> None:
        if self.fails:
            raise OSError(22, "Invalid argument")
        self.accepted = features
        self.log.append(f"start {len(queues)}")

    def stop(self) -> None:
        self.log.append("stop")

    def connect(self, slot: VirtioSlot, numbers: Sequence[int]) -> None:
        raise AssertionError("there is no slot")

    def forget(self) -> None:
        assert self.log[-1:] != ["start 2"]

    def attend(self) -> None:
        pass

    def metrics(self) -> dict[str, int]:
        return {"started": len(self.log)}


class FakeTap:
    """A tap that is only set up."""

    vnet_header = True
    offloads = features.HOST_OFFLOADS | features.GUEST_OFFLOADS
    queues = 2

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_offloads(self, offloads: int) -> None:
        self.told.append(offloads)

    def set_queues(self, pairs: int) -> None:
        self.told.append(-pairs)


def test_the_kernel_serves_while_the_driver_does() -> None:
    """From DRIVER_OK to the reset, but for pauses; the control queue stays here."""
    kernel = [FakeKernel(F_VERSION_1 | F_INDIRECT_DESC | features.F_MRG_RXBUF) for _ in range(2)]
    offload = Offload("vhost-net", [(kernel[0], (0, 1)), (kernel[1], (2, 3))])
    net = ServedNet(FakeTap(), MAC, offload, pairs=2)
    bench = Bench(net)
    assert [each.log for each in kernel] == [["start 2"]] * 2
    assert not net.device_features & (F_EVENT_IDX | features.F_CTRL_RX)
    assert kernel[0].accepted & features.F_MRG_RXBUF
    for queue in range(4):
        bench.queue(queue).add([bytes(100)], [])
        bench.driver.kick(queue)
        assert bench.queue(queue).reap() == []
    (used,) = bench.send(4, [b"\4\0", b"\2\0"], [1])
    assert used.data == b"\0"
    offload.stop()
    offload.stop()
    offload.go_on()
    offload.go_on()
    assert kernel[0].log == ["start 2", "stop", "start 2"]
    bench.driver.write_status(0)
    assert kernel[1].log[-1] == "stop"
    offload.go_on()
    assert kernel[1].log[-1] == "stop"
    assert net.metrics()["started"] == 8
    bench.close()


def test_a_kernel_that_refuses_needs_a_reset() -> None:
    kernel = FakeKernel(F_VERSION_1)
    kernel.fails = True
    bench = Bench(ServedNet(FakeTap(), MAC, Offload("vhost-net", [(kernel, (0, 1))])), start=False)
    with pytest.raises(AssertionError, match=r"3\.1\.1"):
        bench.driver.start()
    assert bench.needs_reset
    assert "vhost-net refuses: Invalid argument" in bench.device.reset_reason
    kernel.fails = False
    bench.driver.start()
    assert kernel.log[-1] == "start 2"
    bench.close()


def sockets(kernel: FakeKernel) -> ServedVsock:
    """A socket device of this kernel's."""
    return ServedVsock(7, Offload("vhost-vsock", [(kernel, range(2))]))


def test_sockets_of_the_kernel() -> None:
    """Its queues are the kernel's; the event that connections are gone comes from here."""
    kernel = FakeKernel(F_VERSION_1)
    vsock = sockets(kernel)
    bench = Bench(vsock)
    assert kernel.log == ["start 2"]
    bench.queue(1).add([bytes(44)], [])
    bench.driver.kick(1)
    assert bench.queue(1).reap() == []
    other = sockets(FakeKernel(F_VERSION_1))
    bench.queue(2).add([], [4])
    bench.driver.kick(2)
    vsock.offload.stop()
    moved = bench.moved_to(other)
    assert [used.data for used in moved.queue(2).reap()] == [bytes(4)]
    bench.driver.write_status(0)
    assert kernel.log == ["start 2", "stop"]
    moved.close()
    bench.close()


def test_a_host_without_it() -> None:
    if os.path.exists("/dev/vhost-vsock"):  # noqa: PTH110
        pytest.skip("this host has vhost-vsock")
    bench = Bench(sockets(FakeKernel(F_VERSION_1)), start=False)
    with pytest.raises(HostError, match="modprobe vhost_vsock"):
        VhostVsock(bench.memory, 7)
    bench.close()


class Calls:
    """The kernel's vhost device, as far as it is called."""

    def __init__(self) -> None:
        self.features: list[int] = []
        self.flags: list[int] = []

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> bytes:
        if request == 0x4008AF00:
            self.features.append(int.from_bytes(argument, "little"))
        elif request == 0x4028AF11:  # struct vhost_vring_addr: index, flags, addresses
            self.flags.append(int.from_bytes(argument[4:8], "little"))
        return bytes(argument) if isinstance(argument, bytes | bytearray) else b""


def test_the_kernel_logs_pages_only_while_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """VHOST_F_LOG_ALL and the rings' flag follow the machine, also while the queues are served."""
    kernel = Calls()
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    bench = Bench(Source())
    queues = dict(enumerate(bench.device.queues))
    monkeypatch.setattr(vhost.VhostQueues, "_run", lambda _self, *, on: on)
    server = vhost.VhostQueues("/dev/null", bench.memory)
    server._kicks = server._calls = [os.eventfd(0)]
    told: list[Callable[[bool], object]] = []
    wiring: Any = SimpleNamespace(on_dirty_log=told.append)
    server.follow(bench.device, wiring)
    (log,) = told
    log(False)
    server.start(0, queues)
    log(True)
    log(False)
    assert kernel.features == [0, 1 << 26, 0]
    assert kernel.flags == [0, 1, 0]
    server.stop()
    log(True)
    server.start(0, queues)
    assert kernel.features[3:] == [1 << 26]
    assert kernel.flags[3:] == [1]
    server.stop()
    os.close(server._kicks[0])
    os.close(server.fd)
    bench.close()


def test_pages_that_the_kernel_wrote_count_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log holds a bit for each page; it is taken when the queues are, each mark once."""
    places = [GuestAddress(0), GuestAddress(8 << 20)]
    memory = GuestMemory.from_ranges([(at, 4 << 20) for at in places], dirty_page_size=4096)
    monkeypatch.setattr(fcntl, "ioctl", Calls().ioctl)
    monkeypatch.setattr(vhost.VhostQueues, "_run", lambda _self, *, on: on)
    bench = Bench(Source())
    server = vhost.VhostQueues("/dev/null", memory)
    server._kicks = server._calls = [os.eventfd(0)]
    for page in (3, 4, 0x3FF, 0x800, 0xBFF):
        server._log[page // 8] |= 1 << page % 8
    for expected in ([(3, 2), (0x3FF, 1), (0x800, 1), (0xBFF, 1)], []):
        server.start(0, dict(enumerate(bench.device.queues)))
        server.stop()
        found = [(at // 4096, length // 4096) for at, length in memory.harvest_dirty()]
        assert found == expected
    os.close(server._kicks[0])
    os.close(server.fd)
    bench.close()
    memory.close()


class Source:
    """A device with one queue."""

    device_id = 4
    device_features = F_VERSION_1
    queue_sizes = (8,)

    def read_config(self, offset: int, length: int) -> bytes:
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def activate(self, memory: object, driver_features: int, queues: object) -> None:
        pass

    def reset(self) -> None:
        pass

    def process(self, queue_index: int) -> None:
        pass
