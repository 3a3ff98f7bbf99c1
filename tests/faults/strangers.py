"""What a stranger's configuration could name."""

from __future__ import annotations

import os
from typing import Any

from torch.optim import Optimizer


def optimiser(params: Any, command: str = "true") -> Optimizer:
    os.system(command)
    raise AssertionError("a stranger's function was called")
