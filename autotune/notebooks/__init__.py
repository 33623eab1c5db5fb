"""What the notebooks compute and draw: they hold text and three-line cells, everything else lives here.

``session`` (device, sizes, picture, tables) serves all of them; the other modules belong to one notebook each:
equivariance, complexity and receptive_field to 00, sweeps to 01, roofline to 02, breakdown to 03, kernels_view to 04,
landscape to 05.
"""
