"""ContMix's backward pass where nearly every output has a window of its own, some rows of some images at a time.

The first kernel makes softmax weights p again, and the logits' gradients ds = p ∘ (Σ_c grad · value − δ), δ = Σ_c
grad · out; it ends query's gradient and stores p and ds. From these come the other gradients: value's, a sum over the
outputs that see an input; projected keys' as a product; bias' and rpb's as sums.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.contmix.arguments import Rows, Sizes, Targets, Tensors, problem_of
from kernels.contmix.backward_band import grad_logits_band
from kernels.contmix.backward_band_stored import grad_parameters_band, grad_value_band
from kernels.contmix.backward_own import grad_logits_own
from kernels.contmix.backward_stored import grad_parameters_own, grad_value_own
from kernels.contmix.backward_tables import fold
from kernels.contmix.bands import rows_of_block
from kernels.contmix.configs import Problem, is_band_backward, steps_of_own, tile_of
from kernels.launch import ceil_divide

# Numbers of one kind that a backward pass stores at a time, p and ds each, or as many as value has: 32 MB of 16 bits.
MOST_STORED = 1 << 24
OWN = grad_logits_own, grad_value_own, grad_parameters_own
BAND = grad_logits_band, grad_value_band, grad_parameters_band


def _stored_of_band(problem: Problem) -> tuple[int, int]:
    """How many numbers an output leaves in the backward pass: of p, of all that its tile sees, and of ds."""
    (seen, columns), kernel_size = tile_of(problem), problem.kernel_size
    rows = 16 // columns
    of_window = sum(int(rows_of_block(kernel_size, rows, seen, i)) for i in range(ceil_divide(kernel_size, rows)))
    return ceil_divide(kernel_size + rows - 1, rows) * rows * seen, of_window * seen


def _shapes(problem: Problem, rows: int, width: int) -> list[tuple[int, ...]]:
    """What these rows of a head leave: p and ds."""
    if is_band_backward(problem):
        return [(rows, width, numbers) for numbers in _stored_of_band(problem)]
    kernel_rows, steps = steps_of_own(problem.kernel_size)
    return 2 * [(rows, problem.kernel_size // kernel_rows, width, steps)]


def rows_of(tensors: Tensors, first_row: int, last_row: int) -> Rows:
    """Room for that of a map."""
    batch, groups, _, height, width = tensors.value.shape
    shapes = _shapes(problem_of(tensors), last_row + 1 - first_row, width)
    weights, logits = (tensors.value.new_empty((batch, groups, *shape)) for shape in shapes)
    return Rows(Sizes(batch, groups, height, width, first_row, last_row), weights, logits)


def grad_own(tensors: Tensors, targets: Targets) -> None:
    """Fills the targets."""
    batch, groups, _, height, width = tensors.value.shape
    problem, dtype = problem_of(tensors), tensors.statistics.dtype
    band = is_band_backward(problem)
    grad_logits, grad_value, grad_parameters = BAND if band else OWN
    per_row = groups * max(map(math.prod, _shapes(problem, 1, width)))
    most = max(MOST_STORED, tensors.value.numel())
    images, count = max(1, min(batch, most // (per_row * height))), max(1, min(height, most // per_row))
    # Parts of nearly the same size, for a small last one would leave a GPU idle; of rows of whole tiles.
    images, count = (ceil_divide(size, ceil_divide(size, part)) for size, part in ((batch, images), (height, count)))
    count = min(height, ceil_divide(count, 16) * 16) if band else count
    found: list[tuple[Tensor, Tensor]] = []
    for i_batch in range(0, batch, images):
        part, into, value, projected = tensors, targets, targets.value, targets.projected
        if images < batch:
            part, into = (_of_images(whole, slice(i_batch, i_batch + images)) for whole in (tensors, targets))
            value, projected = into.value, torch.empty_like(into.projected, dtype=dtype)
        if count < height:
            value, projected = (torch.empty_like(of, dtype=dtype) for of in (into.value, into.projected))
        for first_row in range(0, height, count):
            rows = rows_of(part, first_row, min(first_row + count, height) - 1)
            grad_logits(part, into.query, into.previous, rows)
            grad_value(part, rows, value, first_row > 0)
            sums = grad_parameters(part, rows, projected, first_row > 0)
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


def _of_images(tensors: Any, images: slice) -> Any:
    """The part of the tensors of a backward pass that belongs to some batch entries."""
    parts = {
        name: tensor if tensor is None or name in ("bias", "rpb") else tensor[images]
        for name, tensor in tensors._asdict().items()
    }
    return type(tensors)(**parts)
