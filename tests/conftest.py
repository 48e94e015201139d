"""What every test begins with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """The order in which workers take tests changes from run to run; what a test draws does not."""
    torch.manual_seed(0)
