"""The state machine of `virtio_queue.testing.stateful`, run on a good device and on bad ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from virtio_queue import ActivationError, UsageError
from virtio_queue.testing import DeviceRuleError, Echo
from virtio_queue.testing.stateful import DeviceMachine

if TYPE_CHECKING:
    from vm_memory import GuestMemory


class EchoMachine(DeviceMachine):
    """Echo is a correct device."""

    def make_model(self, memory: GuestMemory) -> Echo:
        return Echo(memory)


class PciEchoMachine(EchoMachine):
    """And over the other transport."""

    pci = True


TestEcho = EchoMachine.TestCase
TestPciEcho = PciEchoMachine.TestCase
TestEcho.settings = TestPciEcho.settings = settings(max_examples=60, stateful_step_count=25)


class Keeper(Echo):
    """Keeps what it takes until the driver resets it, as receive queues do."""

    def process(self, queue_index: int) -> None:
        for _ in self.queues[queue_index].chains(self.memory):
            pass
        self.queues[queue_index].enable_notifications(self.memory)


class KeeperMachine(DeviceMachine):
    """What is not answered at once is not missed."""

    answers = False

    def make_model(self, memory: GuestMemory) -> Keeper:
        return Keeper(memory)


TestKeeper = KeeperMachine.TestCase
TestKeeper.settings = settings(max_examples=40, stateful_step_count=25)


class Forgetful(Echo):
    """Takes buffers and never gives them back."""

    def process(self, queue_index: int) -> None:
        for _ in self.queues[queue_index].chains(self.memory):
            pass


class Silent(Echo):
    """Uses buffers, and claims that nobody needs to hear of it."""

    def process(self, queue_index: int) -> None:
        super().process(queue_index)
        self.queues[queue_index].needs_notification(self.memory)


class Deaf(Echo):
    """Never asks for kicks again."""

    def process(self, queue_index: int) -> None:
        super().process(queue_index)
        self.queues[queue_index].disable_notifications(self.memory)


class Absent(Echo):
    """Cannot start."""

    def activate(self, memory: GuestMemory, driver_features: int, queues: object) -> None:
        raise ActivationError("never")


class Fragile(Echo):
    """Raises for what any driver may write."""

    def write_config(self, offset: int, data: bytes) -> None:
        self.config[offset + len(data) - 1] = 0


class Broken(DeviceMachine):
    """A machine over a device that `model_class` names."""

    model_class: ClassVar[type[Echo]] = Echo

    def make_model(self, memory: GuestMemory) -> Echo:
        return self.model_class(memory)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (Forgetful, DeviceRuleError),
        (Silent, DeviceRuleError),
        (Deaf, DeviceRuleError),
        (Absent, DeviceRuleError),
        (Fragile, IndexError),
    ],
)
def test_bad_devices_are_found(model: type[Echo], error: type[Exception]) -> None:
    """A device that loses buffers or notifications, or that a register makes raise, is caught."""

    class Machine(Broken):
        model_class = model

    with pytest.raises(error):
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=3000,  # the first one that is found ends the search
                stateful_step_count=10,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
            ),
        )


def test_a_machine_needs_a_model() -> None:
    """Without `make_model` the machine says what to do."""
    with pytest.raises(UsageError, match="override"):
        DeviceMachine()
