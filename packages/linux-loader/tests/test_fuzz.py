"""The fuzz session, for two seconds of every run."""

from __future__ import annotations

from linux_loader.testing.fuzz import fuzz, hostile_image


def test_hostile_images_are_handled() -> None:
    """Nothing but LoaderError, in bounded time and memory."""
    assert fuzz(2.0, seed=1) > 20


def test_a_seed_names_an_image() -> None:
    """The same seed gives the same image again."""
    valid = [b"0123456789" * 200]
    assert hostile_image(5, valid) == hostile_image(5, valid)
    assert len({hostile_image(seed, valid) for seed in range(20)}) > 15
