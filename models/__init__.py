"""OverLoCK, RedNet and VOLO on the operators of ``kernels``, under their official state-dict names."""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models._timm import register_with_timm
    from models.checkpoints import load_checkpoint, save_checkpoint
    from models.inference import optimize_for_inference
    from models.registry import create_model, list_models

__all__ = [
    "create_model",
    "list_models",
    "load_checkpoint",
    "optimize_for_inference",
    "register_with_timm",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Imported when asked for, as modules such as ``models.overlock`` are: the help on commands needs no PyTorch."""
    if name in __all__:
        from models import _timm, checkpoints, inference, registry

        return next(vars(each)[name] for each in (registry, checkpoints, inference, _timm) if name in vars(each))
    if importlib.util.find_spec(f"models.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"models.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if hasattr(sys.modules.get("timm.models"), "register_model"):
    __getattr__("register_with_timm")()
