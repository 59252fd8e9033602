"""A pytest fixture that counts bytes: ``from gas_engine.testing import byte_tracker`` in a conftest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .memory import ByteTracker

__all__ = ["byte_tracker"]


@pytest.fixture
def byte_tracker() -> Iterator[ByteTracker]:
    """A ``ByteTracker`` at work for the whole test: tensors of other fixtures that exist before are not counted.

    def test_bytes(byte_tracker):
        network(x).sum().backward()
        assert byte_tracker.peak < 2**20
    """
    with ByteTracker() as tracker:
        yield tracker
