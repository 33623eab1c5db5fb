"""What several notebooks share: the photograph and models, tables, a model's own calls and pictures of their kernels.

``calls`` takes what a model passes to ``kernels``, ``points`` draws over the photograph. Everything else stands in the
cells.
"""

from .calls import Call, around, recorded
from .common import bare, committed, label, load, picture, table
from .points import POINTS, Column, place, points_figure

__all__ = [
    "POINTS", "Call", "Column", "around", "bare", "committed", "label", "load", "picture", "place", "points_figure",
    "recorded", "table",
]  # fmt: skip
