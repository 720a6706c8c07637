"""Devices whose queues the kernel serves: when it starts, when it stops, what is offered.

The kernel's part is a fake here, since hosts without the modules have none; the tests of the whole
have the real one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from virtio_queue import Queue
from virtio_queue.constants import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
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

    attention = -1

    def __init__(self, features: int) -> None:
        self.features = features
        self.log: list[str] = []
        self.fails = False
        self.accepted = 0

    def start(self, features: int, queues: Sequence[Queue]) -> None:
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

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        raise AssertionError("the kernel sends")

    def receive(self, queue: int) -> bytes | None:
        raise AssertionError("the kernel receives")

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
