"""Tiny models are quickest on one thread."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For every test of the room."""
    torch.set_num_threads(1)
