"""One narrow member of each family, with every kind of block that the family has."""

from __future__ import annotations

from typing import Any

from models.overlock import OverLoCK
from models.rednet import RedNet
from models.volo import VOLO
from tests.support import golden_fill

__all__ = ["FAMILIES", "narrow"]

FAMILIES = ("overlock", "rednet", "volo")


def narrow(family: str, **options: Any) -> Any:
    """In evaluation mode, with trained-like parameters, so that nothing is symmetric by accident."""
    options = {"num_classes": 5, **options}
    if family == "overlock":
        structure = {"depth": (1, 0, 0, 1), "sub_depth": (1, 1), "embed_dim": (8, 8, 16, 16), "sub_num_heads": (1, 2)}
        model = OverLoCK(**{**structure, **options})
    elif family == "rednet":
        model = RedNet((1, 1, 0, 0), **options)
    else:
        model = VOLO((1, 1, 1, 1), (12, 24), (3, 4), **{"stem_dim": 8, "img_size": 64, "mix_token": False, **options})
    return golden_fill().fill_(model).eval()
