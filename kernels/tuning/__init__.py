"""Which config a launch uses. Finding better ones is ``autotune``'s business; this package only looks them up."""

from kernels.tuning.choose import repeated, tunable

__all__ = ["repeated", "tunable"]
