"""Stand-in for the part of NATTEN up to version 0.17 that 0.20 removed: ``functional``, the module, the questions.

    from kernels.natten import NeighborhoodAttention2D, has_fused_na  # instead of: from natten import ...
    from kernels.natten.functional import na2d_av, na2d_qk  # instead of: from natten.functional import ...

NATTEN's switches between its own kernels are accepted and change nothing: ``kernels.use_backend`` is the one choice.
"""

import torch

from kernels.natten import functional
from kernels.natten.functional import refuse_other_ranks
from kernels.natten.module import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D", "functional", "has_cuda"]

__getattr__ = refuse_other_ranks


def has_cuda() -> bool:
    return torch.cuda.is_available()


def _yes() -> bool:
    return True


def _no() -> bool:
    """None of NATTEN's GEMM-based, tiled or fused kernels is here; callers then take the unfused operators."""
    return False


def _switch(mode: bool = True, **_options: object) -> None:
    """Accepts what NATTEN's switches take."""


has_half = has_bfloat = _yes
has_gemm = has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_fna = has_fused_na = _no
is_fna_enabled = is_fused_na_enabled = is_gemm_na_enabled = is_tiled_na_enabled = is_tf32_in_gemm_na_enabled = _no
use_fna = use_fused_na = use_gemm_na = use_tiled_na = use_tf32_in_gemm_na = _switch
enable_fna = disable_fna = enable_fused_na = disable_fused_na = _switch
enable_gemm_na = disable_gemm_na = enable_tiled_na = disable_tiled_na = enable_tf32 = disable_tf32 = _switch
