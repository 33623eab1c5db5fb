"""Finding tuned configs for the kernels, and measuring them: ``python -m autotune --help``."""

import os

from autotune import tuner
from autotune.tuner import tuning
from kernels.tuning import choose

__all__ = ["tuning"]

if os.environ.get("DYNAMIC_KERNELS_AUTOTUNE") == "1":
    choose.on_miss = tuner.best_config
