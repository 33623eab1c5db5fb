"""Which config a launch uses. Finding better ones is ``autotune``'s business; this package only looks them up."""

from kernels.tuning.choose import tunable

__all__ = ["tunable"]
