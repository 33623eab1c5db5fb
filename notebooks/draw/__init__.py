"""What several notebooks share: the photograph and models, tables, the kernels in a model's own calls, their pictures.

``calls`` takes dynamic kernels from what a model passes to ``kernels``, ``points`` draws them over the photograph.
Everything else stands in the cells.
"""

from .calls import Call, around, contmix_kernels, involution_kernels, outlook_kernel, recorded
from .common import bare, committed, label, load, picture, table
from .points import POINTS, Column, place, points_figure

__all__ = [
    "POINTS", "Call", "Column", "around", "bare", "committed", "contmix_kernels", "involution_kernels", "label", "load",
    "outlook_kernel", "picture", "place", "points_figure", "recorded", "table",
]  # fmt: skip
