"""What the notebooks compute and draw: they hold text and three-line cells, everything else lives here.

``session`` (device, sizes, picture, models, tables) and ``recording`` (the kernels in a model's own calls) serve
several of them; the other modules belong to one notebook each: equivariance, complexity and receptive_field to 00,
sweeps to 01, roofline to 02, breakdown to 03, kernels_view to 04, landscape and subject to 05.
"""
