"""The status machine as pure functions, and errors as values."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import virtio_queue
from virtio_queue import errors
from virtio_queue.constants import F_RING_RESET, F_VERSION_1
from virtio_queue.status import check_features, decide, queue_configurable, status_names

ACK, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
OFFERED = F_VERSION_1 | 7
statuses = st.integers(0, 255)


def _decide(status: int, written: int, accepted: int = F_VERSION_1) -> tuple[int, str]:
    after, action, _ = decide(status, written, offered=OFFERED, accepted=accepted)
    return after, action


def test_3_1_1_the_way_a_driver_goes() -> None:
    """Reset, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, one after the other."""
    assert _decide(0, ACK) == (1, "none")
    assert _decide(1, ACK | DRIVER) == (3, "none")
    assert _decide(3, 3 | FEATURES_OK) == (11, "none")
    assert _decide(11, 11 | DRIVER_OK) == (15, "activate")
    assert _decide(15, 0) == (0, "reset")


def test_firmware_takes_two_steps_at_once() -> None:
    """SeaBIOS writes ACKNOWLEDGE and DRIVER together."""
    assert _decide(0, 3) == (3, "none")
    assert _decide(0, 11) == (11, "none")


@pytest.mark.parametrize(
    ("status", "written"),
    [
        (0, DRIVER),
        (1, ACK | FEATURES_OK),
        (3, 3 | DRIVER_OK),
        (3, 15),
        (0, 15),
        (1, DRIVER),
        (11, 3 | DRIVER_OK),
        (15, 11),
        (15 | NEEDS_RESET, 15),
        (11 | NEEDS_RESET, 15 | NEEDS_RESET),
        (11 | FAILED, 15),
    ],
)
def test_2_1_1_skipped_steps_and_cleared_bits_are_refused(status: int, written: int) -> None:
    """FEATURES_OK before DRIVER, DRIVER_OK before FEATURES_OK, cleared bits: nothing changes."""
    after, action, why = decide(status, written, offered=OFFERED, accepted=F_VERSION_1)
    assert (after, action) == (status, "none")
    assert why


def test_driver_ok_twice_activates_once() -> None:
    """Writing what is set already does nothing."""
    assert _decide(15, 15) == (15, "none")


@given(status=statuses, written=st.integers(0, 0xFFFF_FFFF), accepted=st.integers(0, 1 << 40))
def test_status_properties(status: int, written: int, accepted: int) -> None:
    """2.1: only a reset clears; the driver never sets NEEDS_RESET or unknown bits; order holds."""
    after, action, why = decide(status, written, offered=OFFERED, accepted=accepted)
    if written == 0:
        assert (after, action) == (0, "reset")
        return
    assert action in ("none", "activate")
    assert after & status == status
    assert not (after & ~status) & ~(ACK | DRIVER | DRIVER_OK | FEATURES_OK | FAILED)
    gained = after & ~status
    if gained & DRIVER_OK:
        assert action == "activate"
        assert status & FEATURES_OK
    if gained & FEATURES_OK:
        assert after & DRIVER
        assert check_features(OFFERED, accepted) == ""
    if status & (NEEDS_RESET | FAILED):
        assert not gained & ~FAILED
    if why:
        assert action == "none"


@given(steps=st.lists(st.sampled_from([1, 2, 3, 4, 7, 8, 11, 15, 64, 79, 128, 255]), max_size=30))
def test_reachable_statuses_are_prefixes_of_the_way(steps: list[int]) -> None:
    """From reset, whatever is written, each step has the ones before it."""
    status = 0
    for step in steps:
        status, _ = _decide(status, status | step)
        way = (ACK, DRIVER, FEATURES_OK, DRIVER_OK)
        present = [bool(status & bit) for bit in way]
        assert present == sorted(present, reverse=True)


def test_2_2_2_features() -> None:
    """A subset of what was offered, with VERSION_1, is acceptable; anything else says why."""
    assert check_features(OFFERED, F_VERSION_1) == ""
    assert "0x8" in check_features(OFFERED, F_VERSION_1 | 8)
    assert "VERSION_1" in check_features(OFFERED, 1)


def test_when_a_queue_may_be_configured() -> None:
    """Between FEATURES_OK and DRIVER_OK, or after its own reset under VIRTIO_F_RING_RESET."""
    assert not queue_configurable(3, F_RING_RESET, was_reset=True)
    assert queue_configurable(11, 0, was_reset=False)
    assert not queue_configurable(15, F_RING_RESET, was_reset=False)
    assert not queue_configurable(15, 0, was_reset=True)
    assert queue_configurable(15, F_RING_RESET, was_reset=True)
    assert not queue_configurable(11 | NEEDS_RESET, 0, was_reset=False)
    assert not queue_configurable(11 | FAILED, 0, was_reset=False)


def test_names() -> None:
    """Statuses are spelled in the order of the way."""
    assert status_names(0) == "0"
    assert status_names(0xCF).startswith("ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK|DEVICE_NEEDS")


@pytest.mark.parametrize(
    "error",
    [
        errors.ChainError("2.7.5", 3, 0x40, "rule"),
        errors.ChainError("2.7.6.1", None, 9, "rule"),
        errors.QueueConfigError("size", 3, "rule"),
        errors.EndOfChainError(16, 3),
        errors.UsageError("what", "rule"),
        errors.QueueStateError("what", "rule"),
        errors.StateError("what", "rule"),
        errors.ActivationError("reason"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes(error: errors.VirtioQueueError) -> None:
    """Pickling keeps type, message and fields; each error is a ValueError."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__reduce__() == error.__reduce__()
    assert isinstance(error, ValueError)


def test_every_public_name_can_be_imported() -> None:
    """What `__all__` promises is there, and nothing else is invented."""
    for name in virtio_queue.__all__:
        assert getattr(virtio_queue, name) is not None
    with pytest.raises(AttributeError):
        _ = virtio_queue.nothing_of_that_name
