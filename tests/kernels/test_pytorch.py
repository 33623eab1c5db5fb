"""What every operator is to PyTorch: compiled, exported to other dtypes, transformed, counted and differentiated.

Rules over the table in ``operators``.
"""

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.launch import record_launches
from tests.kernels.row import Operator
from tests.kernels.rules import BY_NAME, EVERY_CASE, ON_ALL, ON_OURS, kept, leaves, pixels_first, run
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor


@ON_OURS
@BY_NAME
def test_gradients_are_computed_where_asked(operator, backend):
    """Gradients are right for each argument alone, and under checkpointing, where saved tensors can be read once."""
    tensors, out, grads = kept(operator.name, backend)
    grad = torch.ones_like(out[:1, :1]).expand_as(out)
    with kernels.use_backend(backend):
        for (name, tensor), expected in zip(tensors.items(), grads, strict=True):
            alone = tensor.detach().requires_grad_()
            found = torch.autograd.grad(operator({**tensors, name: alone}), alone, grad)[0]
            assert_close(found, expected, GRADIENT_TOLERANCE[torch.float32], name)
        inputs = leaves(tensors)
        again = checkpoint(operator, inputs, use_reentrant=False)
        found = torch.autograd.grad(again, tuple(inputs.values()), grad)
        assert_close(found, grads, GRADIENT_TOLERANCE[torch.float32], "under checkpointing")


@ON_OURS
@BY_NAME
def test_one_graph(operator, backend):
    """torch.compile(fullgraph=True), forward and backward: the same numbers in the same memory order."""
    torch.compiler.reset()
    tensors = operator.tensors(batch=1)
    out, grads = run(operator, tensors, backend)
    inputs = leaves(tensors)
    with kernels.use_backend(backend):
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")(inputs)
    assert_close(compiled, out, FORWARD_TOLERANCE[torch.float32])
    assert compiled.stride() == out.stride()
    found = torch.autograd.grad(compiled.sum(), tuple(inputs.values()))
    assert_close(found, grads, GRADIENT_TOLERANCE[torch.float32], "gradient")


class _Recorded(TorchDispatchMode):
    """Calls of this package's registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dynamic_kernels":
            self.calls.append((func, _pytree.tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


@ON_OURS
@BY_NAME
def test_registration(operator, backend):
    """opcheck accepts the fakes, with strides, of all that both passes call, and all else of the first call."""
    if backend == "eager" and operator.name == "depthwise_conv2d" and DEVICE != "cpu":
        pytest.skip("there it is PyTorch's own convolution")
    for layout in (pixels_first, Tensor.detach):
        with record_launches(), _Recorded() as recorded:  # what kernels compute is not looked at
            run(operator, {name: layout(tensor) for name, tensor in operator.tensors().items()}, backend)
            assert recorded.calls
            for overload, arguments in {call[0]: call for call in recorded.calls}.values():
                torch.library.opcheck(overload, arguments, test_utils="test_faketensor")
    overload, arguments = recorded.calls[0]
    arguments = _pytree.tree_map_only(Tensor, Tensor.requires_grad_, arguments)
    torch.library.opcheck(overload, arguments)


@ON_OURS
@BY_NAME
def test_flops(operator, backend):
    """FLOPs follow the formula; those of kernels are counted on meta tensors, so that nothing is computed."""
    if backend == "eager" and operator.name == "depthwise_conv2d" and DEVICE != "cpu":
        pytest.skip("there it is PyTorch's own convolution, counted by its own formula")
    inputs = leaves(operator.tensors(batch=3, device="meta" if backend == "triton" else DEVICE))
    with kernels.use_backend(backend), FlopCounterMode(display=False) as forward:
        out = operator(inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), tuple(inputs.values()))
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(6 * n for n in operator.multiply_adds)


def second_derivatives(operator: Operator, tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    """Gradients, for all inputs and the output's gradient, of a weighted sum of the gradients of the inputs."""
    inputs = leaves(tensors)
    with kernels.use_backend(backend):
        out = operator(inputs)
        given = random_tensor(*out.shape, dtype=out.dtype, seed=1).requires_grad_()
        grads = torch.autograd.grad(out, tuple(inputs.values()), given, create_graph=True)
        total = torch.stack([(g * random_tensor(*g.shape, dtype=g.dtype, seed=2)).sum() for g in grads]).sum()
        return torch.autograd.grad(total, (*inputs.values(), given), materialize_grads=True)


@ON_OURS
@BY_NAME
def test_second_derivatives(operator, backend):
    """They are those of the definition, or refused by a sentence that says how to get them."""
    tensors = operator.tensors(dtype=torch.float64)
    if operator.twice:
        expected = second_derivatives(operator, tensors, "reference")
        assert_close(second_derivatives(operator, tensors, backend), expected, GRADIENT_TOLERANCE[torch.float64])
        return
    with pytest.raises(NotImplementedError, match=rf'{operator.name} can be .* once.*use_backend\("reference"\)'):
        second_derivatives(operator, tensors, backend)


@ON_ALL
@BY_NAME
def test_forward_mode(operator, backend):
    """The tangent is that of the definition."""
    tensors = operator.tensors(dtype=torch.float64)
    tangents = [torch.randn_like(tensor) for tensor in tensors.values()]

    def function(*values):
        return operator(dict(zip(tensors, values, strict=True)), kernels.reference)

    expected = torch.func.jvp(function, tuple(tensors.values()), tuple(tangents))[1]
    with kernels.use_backend(backend), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, tensors.values(), tangents)
        found = forward_ad.unpack_dual(operator(dict(zip(tensors, duals, strict=True)))).tangent
    assert found is not None
    assert_close(found, expected, FORWARD_TOLERANCE[torch.float64])


@BY_NAME
def test_forward_mode_through_a_recorded_graph_is_refused(operator):
    if operator.name == "depthwise_conv2d" and DEVICE != "cpu":
        pytest.skip("the eager path is PyTorch's convolution there, which has forward-mode derivatives")
    inputs = leaves(operator.tensors())
    with kernels.use_backend("eager"):
        out = operator(inputs)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=r"use_backend\(\"reference\"\)"):
            torch.autograd.grad(out, tuple(inputs.values()), grad)


@BY_NAME
def test_gradients_under_vmap(operator):
    """Gradients of every argument, for several sets of arguments at once, are those of each set alone."""
    sets = [operator.tensors(dtype=torch.float64) for _ in range(3)]

    def loss(tensors):
        return operator(tensors).sin().sum()

    with kernels.use_backend("eager"):
        together = torch.vmap(torch.func.grad(loss))({name: torch.stack([s[name] for s in sets]) for name in sets[0]})
        for index, tensors in enumerate(map(leaves, sets)):
            alone = torch.autograd.grad(loss(tensors), tuple(tensors.values()))
            for name, expected in zip(tensors, alone, strict=True):
                assert_close(together[name][index], expected, GRADIENT_TOLERANCE[torch.float64], name)


@ON_ALL
@BY_NAME
def test_autocast(operator, backend):
    """Every input is cast, as those of a convolution are, and the output is that of the cast inputs."""
    tensors = operator.tensors()
    with torch.autocast(DEVICE, torch.bfloat16):
        out, grads = run(operator, tensors, backend)
    expected, right = run(operator, {name: tensor.bfloat16() for name, tensor in tensors.items()}, backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    for name, ours, theirs in zip(tensors, grads, right, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, operator.rounding * GRADIENT_TOLERANCE[torch.bfloat16], name)


@pytest.mark.parametrize(
    "layout", [Tensor.detach, pixels_first, lambda x: x.movedim(-1, 2).contiguous().movedim(2, -1)]
)
@EVERY_CASE
def test_strides_are_planned(operator, layout):
    """Fake tensors, which compiled code is planned with, have the strides that eager mode gives, of axes of length 1
    too; so have their gradients."""
    for batch in (1, 2):
        tensors = {name: layout(t) if t.dim() > 3 else t for name, t in operator.tensors(batch).items()}
        with FakeTensorMode() as mode:
            planned, planned_grads = run(operator, {name: mode.from_tensor(t) for name, t in tensors.items()}, "eager")
        out, grads = run(operator, tensors, "eager")
        for name, tensor, fake in zip(("output", *tensors), (out, *grads), (planned, *planned_grads), strict=True):
            assert tensor.stride() == fake.stride(), name


@BY_NAME
def test_transforms_inside_compiled_functions(operator):
    """torch.func.grad and jvp work in compiled functions, where the operators have to give way to the reference."""
    tensors = operator.tensors()
    (name, first), *others = tensors.items()

    def function(value):
        return operator({name: value} | dict(others))

    def both(value):
        gradient = torch.func.grad(lambda x: function(x).sin().sum())(value)
        return gradient, torch.func.jvp(function, (value,), (value,))[1]

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")(first)
    torch.testing.assert_close(compiled, both(first), rtol=1e-4, atol=1e-5)


def test_dynamic_sizes_in_inductor(monkeypatch):
    """To Inductor the output's sizes are sums, H + 2 by W + 2, and its strides products of them."""
    monkeypatch.undo()  # Inductor cannot work with a poisoned torch.empty
    torch.compiler.reset()

    def function(x, weight):
        return kernels.involution2d(x, weight, padding=1)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 5, 6), (3, 7, 9)):
        x, weight = random_tensor(batch, 4, height, width), random_tensor(batch, 2, 1, 1, height + 2, width + 2)
        torch.testing.assert_close(compiled(x, weight), function(x, weight))


@pytest.mark.slow
def test_views_of_maps_in_inductor(monkeypatch):
    """One operator takes a map as it is, another a view of it. Inductor would pad such a map on a GPU, and PyTorch 2.11
    then read the view by strides that the map did not have."""
    monkeypatch.undo()
    torch.compiler.reset()

    def function(attn, weight, a, b, c, d, e):
        x = a + b * c + d * e  # enough to be stored before it is used
        value = x.unflatten(1, (12, 28)).permute(0, 1, 3, 4, 2)
        return kernels.na2d_av(attn, value, 3), kernels.depthwise_conv2d(x, weight)

    maps = [random_tensor(2, 336, 7, 7).to(memory_format=torch.channels_last) for _ in range(5)]
    inputs = random_tensor(2, 12, 7, 7, 9), random_tensor(336, 1, 5, 5), *maps
    with torch._inductor.config.patch(disable_padding_cpu=False):
        found = torch.compile(function, fullgraph=True, dynamic=False)(*inputs)
    torch.testing.assert_close(found, function(*inputs))
