"""One thread for all tests of serving: fastest for tiny models."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Set torch to one thread."""
    torch.set_num_threads(1)
