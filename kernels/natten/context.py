"""The questions that NATTEN answers about its build, and the switches between its own kernels.

The answers make a caller take the unfused operators, which are what this package has. The switches are accepted and
change nothing: ``kernels.use_backend`` is the one choice here.
"""

from torch.cuda import is_available as has_cuda  # noqa: F401


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


def _switch(*_arguments: object, **_options: object) -> None:
    """Accepts what NATTEN's switches take."""


has_half = has_bfloat = are_deterministic_algorithms_enabled = _yes
has_gemm = has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_fna = has_fused_na = _no
is_fna_enabled = is_fused_na_enabled = is_kv_parallelism_in_fused_na_enabled = is_autotuner_enabled = _no
is_gemm_na_enabled = is_tiled_na_enabled = is_tf32_in_gemm_na_enabled = _no
use_fna = use_fused_na = use_kv_parallelism_in_fused_na = use_autotuner = use_deterministic_algorithms = _switch
use_gemm_na = use_tiled_na = use_tf32_in_gemm_na = set_memory_usage_preference = _switch
enable_fna = enable_fused_na = enable_gemm_na = enable_tiled_na = enable_tf32 = enable_autotuner = _switch
disable_fna = disable_fused_na = disable_gemm_na = disable_tiled_na = disable_tf32 = disable_autotuner = _switch
