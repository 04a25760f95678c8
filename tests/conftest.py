"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run beside the processes that they start; on two cores more threads only take turns."""
    torch.set_num_threads(1)
