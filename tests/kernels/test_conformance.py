"""What every operator keeps to, on every backend: one test per rule, run over the table in ``operators``.

These are the rules of numbers; those of configs stand in ``test_configs``, those of PyTorch's in ``test_pytorch``. What
an operator does beyond them its own file tests.
"""

import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from tests.kernels.operators import OPERATOR, OPERATORS
from tests.kernels.row import Operator
from tests.kernels.rules import (
    BY_NAME,
    CASES,
    EVERY_CASE,
    ON_ALL,
    ON_OURS,
    OURS,
    check,
    first_cases,
    kept,
    pixels_first,
    run,
)  # fmt: skip
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor


@pytest.mark.parametrize(
    ("operator", "backend", "dtype"),
    [
        pytest.param(operator, backend, dtype, id=f"{operator.name}, {name}, {backend}, {dtype}")
        for operator, name in CASES
        for backend in OURS
        for dtype in FORWARD_TOLERANCE
        if dtype == torch.float32 or backend == "eager" or name == "plain"
    ],
)
def test_definition(operator, backend, dtype):
    """Output and gradients are those of the float64 definition: sums run in float32 at least, whatever their length."""
    check(operator, operator.tensors(batch=2, dtype=dtype), backend)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels first": pixels_first,
    "transposed": lambda tensor: tensor.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "expanded": lambda tensor: tensor[:1].expand_as(tensor) if len(tensor) == 2 else tensor,
    "a crop": lambda tensor: torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2],
}


@ON_OURS
@pytest.mark.parametrize("layout", LAYOUTS)
@BY_NAME
def test_layouts(operator, layout, backend):
    """Any strides are read as they are; outputs take the memory order of one argument, gradients that of their own."""
    tensors = {name: LAYOUTS[layout](tensor) for name, tensor in operator.tensors(batch=2).items()}
    out, grads = check(operator, tensors, backend, LAYOUTS[layout])
    if layout == "a crop":
        assert out.is_contiguous()
    if layout == "pixels first" and (backend == "triton" or DEVICE == "cpu"):  # elsewhere PyTorch chooses
        if out.shape == tensors[operator.like].shape:
            assert out.stride() == tensors[operator.like].stride()
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
            assert grad.stride() == tensor.stride(), name


@pytest.mark.parametrize("most", [1, 150])
@EVERY_CASE
def test_small_steps(operator, most, monkeypatch):
    """Steps of one output, of unequal sizes, of one image or of one group give the same sums."""
    for path in {path for row in OPERATORS for path in row.steps}:
        module, _, name = path.rpartition(".")
        bounds = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(path, {DEVICE: most} if isinstance(bounds, dict) else most)
    check(operator, operator.tensors(batch=2), "eager")
    if operator.inputs in [OPERATOR[name].inputs for name in ("involution2d_generate", "contmix2d")]:
        check(operator, operator.tensors(batch=2), "triton")  # its other kernels do everything in one launch


@ON_ALL
@BY_NAME
def test_empty_batch(operator, backend):
    tensors = operator.tensors(batch=0)
    out, grads = run(operator, tensors, backend)
    assert out.shape == operator.exact(tensors)[0].shape
    for tensor, grad in zip(tensors.values(), grads, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@ON_OURS
@BY_NAME
def test_same_bits(operator, backend):
    tensors, out, grads = kept(operator.name, backend)
    again, grads_again = run(operator, tensors, backend)
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, grads_again))


@ON_ALL
@BY_NAME
def test_no_gradient_shares_memory(operator, backend):
    """No gradient shares memory with another, an input or the output, or overlaps itself as the output's own does."""
    tensors, out, grads = kept(operator.name, backend)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (out, *tensors.values(), *grads)]
    assert len(set(storages)) == len(storages)
    for grad in grads:
        assert all(stride > 0 for stride, size in zip(grad.stride(), grad.shape, strict=True) if size > 1)


@ON_ALL
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.logits], ids=lambda operator: operator.name)
def test_huge_logits(operator, backend):
    """The exponential of these logits overflows, their softmax does not; masked ones get no weight and make no NaN."""
    tensors = operator.tensors()
    for name in operator.logits:
        tensors[name] = 1e4 * tensors[name]
    if operator.masked:
        tensors[operator.logits[0]][..., :4] = float("-inf")
    expected, _ = operator.exact(tensors)
    out, grads = run(operator, tensors, backend)
    # Sums of logits that are rounded in float32 are known to 1e-3 only.
    assert_close(out, expected, FORWARD_TOLERANCE[torch.float32] if operator.masked else 2e-3)
    assert all(grad.isfinite().all() for grad in grads)


@ON_ALL
def test_huge_logits_that_are_alike(backend):
    """Where outputs have windows of their own, weights follow from differences of logits, whatever their size."""
    operator = OPERATOR["na2d_softmax_av"]
    tensors = operator.tensors()
    tensors["logits"] = tensors["logits"].round() + 3e4
    tensors["rpb"].round_()
    expected, _ = operator.exact(tensors)
    assert_close(run(operator, tensors, backend)[0], expected, FORWARD_TOLERANCE[torch.float32])


@BY_NAME
def test_wide_offsets(operator, monkeypatch):
    """Kernels with 64-bit offsets compute the same bits."""
    tensors, out, grads = kept(operator.name, "triton")
    asked = []
    for module in [module for name, module in sys.modules.items() if name.startswith("kernels.")]:
        if hasattr(module, "fits_int32"):
            monkeypatch.setattr(module, "fits_int32", lambda *tensors: asked.append(tensors))
    wide_out, wide_grads = run(operator, tensors, "triton")
    assert asked, "no launcher asks fits_int32, which says whether offsets need 64 bits"
    assert torch.equal(out, wide_out)
    assert all(map(torch.equal, grads, wide_grads))


def _definition(operator: Operator, given: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients by the definition; ``given`` also holds the gradient of the output."""
    out, inputs = operator.exact({name: tensor for name, tensor in given.items() if name != "gradient"})
    return [out, *torch.autograd.grad(out, tuple(inputs.values()), given["gradient"].double())]


@BY_NAME
def test_reach_of_a_nan_in_kernels(operator):
    """One NaN reaches every output and gradient that depends on the number in its place, and besides only what the
    definition makes NaN by multiplying it with the zeros around a map; where it spreads, what depends on its block."""
    others = [case for case, dtype in first_cases(operator)[1:] if dtype == torch.float32]
    for case in [next(iter(operator.cases.values())), *others]:
        operator = operator.at(case)
        drawn = operator.tensors(batch=2)
        drawn["gradient"] = torch.ones_like(operator(drawn))
        before = _definition(operator, drawn)
        for name, tensor in drawn.items():
            element = tuple(size // 2 for size in tensor.shape)
            block = element[: operator.spreads.get(name, tensor.dim())]

            def given(place, number, name=name, tensor=tensor, drawn=drawn):
                changed = tensor.clone()
                changed[place] += number
                return drawn | {name: changed}

            dependent, of_block = (
                [(a - b).abs() > 1e-9 for a, b in zip(_definition(operator, given(place, 1)), before, strict=True)]
                for place in (element, block)
            )
            bad = given(element, float("nan"))
            allowed = [a.isnan() | b for a, b in zip(_definition(operator, bad), of_block, strict=True)]
            out, grads = run(operator, bad, "triton", bad.pop("gradient"))
            whats = ("output", *(f"gradient of {key}" for key in bad))
            for what, found, least, most in zip(whats, (out, *grads), dependent, allowed, strict=True):
                assert found[least].isnan().all(), f"a NaN in {name} is lost from {what}"
                assert not found[~most].isnan().any(), f"a NaN in {name} goes too far in {what}"


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere it would have to wait for the device")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@EVERY_CASE
def test_reach_of_nan_and_infinity_on_the_eager_path(operator, bad):
    """There they reach exactly what they reach in the definition.

    Of the gradient of a depthwise convolution's weight only some number must be reached: whether PyTorch multiplies by
    the zeros around the map depends on the CPU.
    """
    drawn = operator.tensors(batch=2)
    if operator.name == "depthwise_conv2d":  # where zeros around the weight make the kernel larger
        drawn["x"] = drawn["x"].contiguous(memory_format=torch.channels_last)
    gradient = random_tensor(*operator(drawn).shape)
    for place in (*drawn, "gradient"):
        if (place, bad) == ("proj_weight", float("inf")):
            continue  # keys are projected first, and ∞ − ∞ arises there that does not in the affinities
        tensors = {name: tensor.clone() for name, tensor in (drawn | {"gradient": gradient}).items()}
        tensors[place][tuple(size // 2 for size in tensors[place].shape)] = bad
        grad = tensors.pop("gradient")
        out, grads = run(operator, tensors, "eager", grad)
        exact, exact_grads = run(operator, tensors, "reference", grad)
        for what, ours, expected in zip(("output", *drawn), (out, *grads), (exact, *exact_grads), strict=True):
            finite, right = ours.isfinite(), expected.isfinite()
            if (operator.name, what) == ("depthwise_conv2d", "weight"):
                finite, right = finite.all(), right.all()
            assert torch.equal(finite, right), f"{bad} in {place}: {what}"


@ON_ALL
def test_a_position_bias_sums_in_float32(backend):
    """The gradient of a table's entry sums over the pixels of a map; in bfloat16 a sum of ones would stop at 256."""
    query = torch.ones(1, 1, 28, 28, 1, dtype=torch.bfloat16, device=DEVICE)
    rpb = torch.zeros(1, 5, 5, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with kernels.use_backend(backend):
        kernels.na2d_qk(query, query, 3, rpb=rpb).sum().backward()
    exact = torch.zeros(1, 5, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    kernels.reference.na2d_qk(query.double(), query.double(), 3, rpb=exact).sum().backward()
    assert rpb.grad is not None
    assert exact.grad is not None
    assert_close(rpb.grad, exact.grad, GRADIENT_TOLERANCE[torch.bfloat16])
