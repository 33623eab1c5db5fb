"""Finding tuned configs for the kernels, and measuring them: ``python -m autotune --help``."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.tuner import tuning

__all__ = ["tuning"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: the command line explains itself without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from autotune import tuner

    return getattr(tuner, name)


if os.environ.get("DYNAMIC_KERNELS_AUTOTUNE") == "1":
    from autotune import tuner
    from kernels.tuning import choose

    choose.on_miss = tuner.best_config
