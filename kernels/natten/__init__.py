"""Stand-in for the part of NATTEN up to version 0.17 that 0.20 removed: its two-dimensional unfused operators."""
