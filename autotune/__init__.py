"""Measuring and tuning of the kernels, from the command line: ``python -m autotune --help``."""
