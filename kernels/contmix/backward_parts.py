"""ContMix's backward pass of bands, some rows of some images at a time.

The first kernel makes softmax weights p again, and the logits' gradients ds = p ∘ (Σ_c grad · value − δ), δ = Σ_c
grad · out; it ends query's gradient and stores p and ds. From these come the other gradients: value's, a sum over the
outputs that see an input; projected keys' as a product; bias' and rpb's as sums.
"""

import torch
from torch import Tensor

from kernels.contmix.arguments import Rows, Sizes, Targets, Tensors, part_of, problem_of
from kernels.contmix.backward_band import grad_logits_band
from kernels.contmix.backward_band_stored import grad_parameters_band, grad_value_band
from kernels.contmix.bands import rows_of_block
from kernels.contmix.configs import Problem, tile_of
from kernels.launch import ceil_divide
from kernels.neighborhood.tables import fold

# Numbers of one kind that a backward pass stores at a time, p and ds each, or as many as value has: 32 MB of 16 bits.
MOST_STORED = 1 << 24


def _stored(problem: Problem) -> tuple[int, int]:
    """How many numbers an output leaves: of p, of all that its tile sees, and of ds."""
    (seen, columns), kernel_size = tile_of(problem), problem.kernel_size
    rows = 16 // columns
    of_window = sum(int(rows_of_block(kernel_size, rows, seen, i)) for i in range(ceil_divide(kernel_size, rows)))
    return ceil_divide(kernel_size + rows - 1, rows) * rows * seen, of_window * seen


def rows_of(tensors: Tensors, first_row: int, last_row: int) -> Rows:
    """Room for what these rows of a map leave."""
    batch, groups, _, height, width = tensors.value.shape
    stored = _stored(problem_of(tensors))
    weights, logits = (
        tensors.value.new_empty((batch, groups, last_row + 1 - first_row, width, count)) for count in stored
    )
    return Rows(Sizes(batch, groups, height, width, first_row, last_row), weights, logits)


def backward_band(tensors: Tensors, targets: Targets) -> None:
    """Fills the targets."""
    batch, groups, _, height, width = tensors.value.shape
    dtype, per_row = tensors.statistics.dtype, groups * width * max(_stored(problem_of(tensors)))
    most = max(MOST_STORED, tensors.value.numel())
    images, count = max(1, min(batch, most // (per_row * height))), max(1, min(height, most // per_row))
    # Parts of nearly the same size, for a small last one would leave a GPU idle; of rows of whole tiles.
    images, count = (ceil_divide(size, ceil_divide(size, part)) for size, part in ((batch, images), (height, count)))
    count = min(height, ceil_divide(count, 16) * 16)
    found: list[tuple[Tensor, Tensor]] = []
    for i_batch in range(0, batch, images):
        part, into, value, projected = tensors, targets, targets.value, targets.projected
        if images < batch:
            entries = slice(i_batch, i_batch + images)
            part, into = part_of(tensors, entries), part_of(targets, entries)
            value, projected = into.value, torch.empty_like(into.projected, dtype=dtype)
        if count < height:
            value, projected = (torch.empty_like(of, dtype=dtype) for of in (into.value, into.projected))
        for first_row in range(0, height, count):
            rows = rows_of(part, first_row, min(first_row + count, height) - 1)
            grad_logits_band(part, into.query, into.previous, rows)
            grad_value_band(part, rows, value, first_row > 0)
            sums = grad_parameters_band(part, rows, projected, first_row > 0)
            tables = targets.bias, targets.rpb
            if images < batch or count < height:
                tables = torch.empty_like(targets.bias, dtype=dtype), torch.empty_like(targets.rpb, dtype=dtype)
                found.append(tables)
            fold(sums, *tables, projected)
        for target, filled in ((into.value, value), (into.projected, projected)):
            if filled is not target:
                target.copy_(filled)
    for target, parts in zip((targets.bias, targets.rpb), zip(*found, strict=True), strict=False):
        target.copy_(torch.stack(parts).sum(0))
