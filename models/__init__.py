"""OverLoCK, RedNet and VOLO on the operators of ``kernels``, under their official state-dict names."""

import sys

from models import overlock, rednet, volo  # noqa: F401  (register their entry points)
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

if hasattr(sys.modules.get("timm.models"), "register_model"):
    register_with_timm()
