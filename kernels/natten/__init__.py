"""Stand-in for the part of NATTEN up to version 0.17 that 0.20 removed: its two-dimensional unfused operators.

from kernels.natten import NeighborhoodAttention2D, has_fused_na  # instead of: from natten import ...
from kernels.natten.functional import na2d_av, na2d_qk  # instead of: from natten.functional import ...
"""

from kernels.natten.context import *  # noqa: F403
from kernels.natten.functional import refuse_other_ranks as __getattr__  # noqa: F401
from kernels.natten.module import NeighborhoodAttention2D as NeighborhoodAttention2D
