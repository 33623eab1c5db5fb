"""Stand-in for the part of NATTEN that its version 0.20 removed; see ``functional``."""

from kernels.natten import functional

__all__ = ["functional"]
