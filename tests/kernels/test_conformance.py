"""What every operator keeps to, on every backend: one test per rule, run over the table in ``operators``.

What an operator does beyond that its own file tests.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd import forward_ad
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
from autotune.tunables import find_tunables
from autotune.tuner import disagreement
from kernels import parallel
from kernels.launch import record_launches
from kernels.tuning.choose import Request, observing
from tests.kernels.operators import MAPS, OPERATORS, Operator
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor

BACKENDS = ("reference", "eager", "triton")
OURS = BACKENDS[1:]
BY_NAME = pytest.mark.parametrize("operator", OPERATORS, ids=[operator.name for operator in OPERATORS])
EVERY_CASE = pytest.mark.parametrize(
    "operator", [pytest.param(o.at(case), id=f"{o.name}, {name}") for o in OPERATORS for name, case in o.cases.items()]
)
ON_ALL = pytest.mark.parametrize("backend", BACKENDS)
ON_OURS = pytest.mark.parametrize("backend", OURS)


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def run(
    operator: Operator, tensors: dict[str, Tensor], backend: str, grad: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients; of its sum unless ``grad`` is given, and then the output's gradient overlaps itself."""
    inputs = leaves(tensors)
    with kernels.use_backend(backend):
        out = operator(inputs)
    return out, torch.autograd.grad(
        out, tuple(inputs.values()), torch.ones_like(out[:1, :1]).expand_as(out) if grad is None else grad
    )


def check(operator: Operator, tensors: dict[str, Tensor], backend: str) -> None:
    """Output and gradients against the float64 definition of the same values."""
    dtype = next(iter(tensors.values())).dtype
    expected, inputs = operator.exact(tensors)
    grad = torch.randn_like(expected).to(dtype)
    out, grads = run(operator, tensors, backend, grad)
    assert out.dtype == dtype
    assert_close(out, expected, operator.rounding * FORWARD_TOLERANCE[dtype])
    exact = torch.autograd.grad(expected, tuple(inputs.values()), grad.double())
    tolerance = GRADIENT_TOLERANCE[dtype] * (operator.rounding if dtype.itemsize == 2 else 1)
    for name, ours, right in zip(inputs, grads, exact, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, right, tolerance, f"gradient of {name}")


@ON_OURS
@EVERY_CASE
def test_definition(operator, backend):
    check(operator, operator.tensors(batch=2), backend)


@ON_OURS
@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(operator, backend, dtype):
    check(operator, operator.tensors(batch=2, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@EVERY_CASE
def test_eager_dtypes(operator, dtype):
    """Sums run in float32 at least, whatever their length."""
    check(operator, operator.tensors(dtype=dtype), "eager")


def _pixels_first(tensor: Tensor) -> Tensor:
    """The map's axes before all others but the batch: as NHWC, or heads last."""
    axis = next((n for n in range(1, tensor.dim() - 1) if tensor.shape[n : n + 2] in MAPS), None)
    if axis is None:
        return tensor
    return tensor.movedim((axis, axis + 1), (1, 2)).contiguous().movedim((1, 2), (axis, axis + 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels first": _pixels_first,
    "transposed": lambda tensor: tensor.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "expanded": lambda tensor: tensor[:1].expand_as(tensor) if len(tensor) == 2 else tensor,
    "a crop": lambda tensor: torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2],
}


@ON_OURS
@pytest.mark.parametrize("layout", LAYOUTS)
@BY_NAME
def test_layouts(operator, layout, backend):
    """Any strides are read as they are; the output has the memory order of one argument, a gradient of its own."""
    tensors = {name: LAYOUTS[layout](tensor) for name, tensor in operator.tensors(batch=2).items()}
    check(operator, tensors, backend)
    out, grads = run(operator, tensors, backend, torch.ones_like(operator(tensors)))
    if layout == "a crop":
        assert out.is_contiguous()
    if layout == "pixels first" and (backend == "triton" or DEVICE == "cpu"):  # elsewhere PyTorch chooses
        if out.shape == tensors[operator.like].shape:
            assert out.stride() == tensors[operator.like].stride()
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
            assert grad.stride() == tensor.stride(), name


# How much a step of an operator's may hold, by where that is kept.
STEPS = {
    "kernels.aggregation.eager_tiles": "STEP_ELEMENTS",
    "kernels.outlook.eager": "BLOCK_ELEMENTS",
    "kernels.depthwise.eager": "GRADIENT_ELEMENTS",
    "kernels.involution.generate": "STEP_BYTES_ELSEWHERE",
    "kernels.contmix.backward_own": "MOST_STORED",
}


@pytest.mark.parametrize("most", [1, 150])
@EVERY_CASE
def test_small_steps(operator, most, monkeypatch):
    """Steps of one output, of unequal sizes, of one image or group: all give the same sums."""
    for module, name in STEPS.items():
        module = importlib.import_module(module)
        monkeypatch.setattr(module, name, {DEVICE: most} if isinstance(getattr(module, name), dict) else most)
    monkeypatch.setattr("kernels.involution.generate.STEP_BYTES", {DEVICE: most})
    check(operator, operator.tensors(batch=2), "eager")
    if operator.inputs in [o.inputs for o in OPERATORS if o.name in ("involution2d_generate", "contmix2d")]:
        check(operator, operator.tensors(batch=2), "triton")  # whose other kernels do it all in one launch


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the eager path leaves threads alone")
@pytest.mark.parametrize("threads", [2, 5])
@BY_NAME
def test_threads(operator, threads, monkeypatch):
    """Shared out among so many threads, however small: the same bits every time, and the caller's setting stays."""
    before = torch.get_num_threads()
    monkeypatch.setattr(parallel, "WORTH_A_THREAD", 1)
    torch.set_num_threads(threads)
    try:
        tensors = operator.tensors(batch=3)
        check(operator, tensors, "eager")
        out, grads = run(operator, tensors, "eager")
        again, grads_again = run(operator, tensors, "eager")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, grads_again))


@ON_ALL
@BY_NAME
def test_empty_batch(operator, backend):
    tensors = operator.tensors(batch=0)
    out, grads = run(operator, tensors, backend)
    assert out.shape == operator.exact(tensors)[0].shape
    for tensor, grad in zip(tensors.values(), grads, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@functools.cache
def _kept(name: str, backend: str) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
    """Inputs, output and gradients of a run that several tests look at."""
    operator = next(operator for operator in OPERATORS if operator.name == name)
    tensors = operator.tensors(batch=2)
    return tensors, *run(operator, tensors, backend)


@ON_OURS
@BY_NAME
def test_same_bits(operator, backend):
    tensors, out, grads = _kept(operator.name, backend)
    again, grads_again = run(operator, tensors, backend)
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, grads_again))


@ON_ALL
@BY_NAME
def test_no_gradient_shares_memory(operator, backend):
    """Not with another, an input or the output, and none overlaps itself, though the output's gradient does."""
    tensors, out, grads = _kept(operator.name, backend)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (out, *tensors.values(), *grads)]
    assert len(set(storages)) == len(storages)
    for grad in grads:
        assert all(stride > 0 for stride, size in zip(grad.stride(), grad.shape, strict=True) if size > 1)


@ON_ALL
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.logits], ids=lambda operator: operator.name)
def test_huge_logits(operator, backend):
    """exp of these overflows; the softmax does not. A caller's mask gives no weight, and nothing becomes NaN."""
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


@BY_NAME
def test_wide_offsets(operator, monkeypatch):
    """Kernels with 64-bit offsets compute the same bits."""
    tensors, out, grads = _kept(operator.name, "triton")
    asked = []
    for module in [module for name, module in sys.modules.items() if name.startswith("kernels.")]:
        if hasattr(module, "fits_int32"):
            monkeypatch.setattr(module, "fits_int32", lambda *tensors: asked.append(tensors))
    wide_out, wide_grads = run(operator, tensors, "triton")
    assert asked
    assert torch.equal(out, wide_out)
    assert all(map(torch.equal, grads, wide_grads))


Kind = tuple[str, bool, str]


class _OnMeta(TorchDispatchMode):
    """This package's operators themselves on meta tensors, where otherwise their fake implementations stand in."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dynamic_kernels":
            return OPDEFS[func.name()]._init_fn(*args)
        return func(*args, **(kwargs or {}))


def _requests(
    operator: Operator, dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = Tensor.detach
) -> list[Request]:
    """Launches of a forward and a backward pass that want a config; nothing is computed."""
    found: list[Request] = []
    inputs = leaves({name: layout(tensor) for name, tensor in operator.tensors(2, dtype, "meta").items()})
    with record_launches(), observing(found.append), kernels.use_backend("triton"), _OnMeta():
        out = operator(inputs)
        torch.autograd.grad(out, tuple(inputs.values()), torch.empty_like(out))
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Configs are chosen as there; what was chosen is forgotten."""

    def forget():
        for module in modules:
            for value in vars(module).values():
                if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                    value.cache_clear()

    find_tunables()  # imports them all
    modules = [module for name, module in sys.modules.items() if re.fullmatch(r"kernels\..*configs", name)]
    for module in modules:
        monkeypatch.setattr(module, "interpreting", lambda: False)
    forget()
    yield
    forget()


@pytest.mark.usefixtures("as_on_a_gpu")
@BY_NAME
def test_heuristic(operator):
    """A config that tuning would accept for every problem, from one pixel to the models' largest maps."""
    met = set()
    for case in (*operator.cases.values(), *operator.scales):
        for dtype in (torch.bfloat16, torch.float32):
            for layout in (Tensor.detach, _pixels_first):
                for request in _requests(operator.at(case), dtype, layout):
                    met.add((request.launcher.name, request.problem))
                    config = request.launcher.heuristic(request.problem)
                    assert config.valid(request.problem), (request.launcher.name, config, request.problem)
    assert len(met) > 100


def _kind(request: Request) -> Kind:
    """Its kernel, which of the two window rules it follows, and what else tells its forms apart: a softmax, padding."""
    clamped = any(getattr(argument, "clamped", False) for argument in request.arguments)
    others = {type(argument).__name__ for argument in request.arguments} - {"Tensor", "NoneType"}
    return request.launcher.name, clamped, str([*sorted(others), request.keywords])


@functools.cache
def _first_met() -> dict[Kind, tuple[str, Any]]:
    """Kernel -> the operator that meets them first, and the first case there after the smallest."""
    found: dict[Kind, tuple[str, Any]] = {}
    for operator in OPERATORS:
        smallest, *others = operator.cases.values()
        for case in (*others, smallest):
            for request in _requests(operator.at(case), torch.float32):
                found.setdefault(_kind(request), (operator.name, case))
    return found


def _first_cases(operator: Operator) -> list[Any]:
    """Cases of an operator that between them run the kernels that no operator before it runs."""
    return list({id(case): case for name, case in _first_met().values() if name == operator.name}.values())


def test_every_launcher_is_met():
    assert {kind[0] for kind in _first_met()} == set(find_tunables())


@pytest.mark.slow
@BY_NAME
def test_every_config(operator):
    """Of each kernel, where the operator is the first that launches it: right wherever tuning may choose it."""
    mine = {kind: case for kind, (name, case) in _first_met().items() if name == operator.name}
    checked = []

    def check_configs(request: Request) -> None:
        if mine.get(_kind(request)) is not case or _kind(request) in checked:
            return
        checked.append(_kind(request))
        reference = request.reference()
        for config in _tiles(request):
            try:
                found = request.run(config)
            except Exception as error:  # a GPU's shared memory may be too small for what is not valid here
                if config.valid(request.problem) or type(error).__name__ != "OutOfResources":
                    raise
                continue
            wrong = disagreement(found, reference, request.problem)
            assert wrong is None, f"{request.launcher.name}, {config}: {wrong}"

    for case in _first_cases(operator):
        with observing(check_configs):
            run(operator.at(case), operator.at(case).tensors(batch=2), "triton")
    assert set(checked) == set(mine)


def _tiles(request: Request) -> Iterable[Any]:
    """All configs; of those that only schedule the same blocks, which the interpreter does not, one there."""
    scheduling = {"num_warps", "num_stages", "loads"} if DEVICE == "cpu" else set()
    tiles = {}
    for config in request.launcher.configs:
        tiles.setdefault(tuple(value for name, value in asdict(config).items() if name not in scheduling), config)
    return tiles.values()


@ON_OURS
@BY_NAME
def test_gradients_are_computed_where_asked(operator, backend):
    """For each argument alone, and under gradient checkpointing, where saved tensors come only once."""
    tensors, out, grads = _kept(operator.name, backend)
    grad = torch.ones_like(out[:1, :1]).expand_as(out)
    with kernels.use_backend(backend):
        for (name, tensor), expected in zip(tensors.items(), grads, strict=True):
            alone = tensor.detach().requires_grad_()
            found = torch.autograd.grad(operator({**tensors, name: alone}), alone, grad)[0]
            assert_close(found, expected, GRADIENT_TOLERANCE[torch.float32], name)
        inputs = leaves(tensors)
        again = checkpoint(operator, inputs, use_reentrant=False)
        for found, expected in zip(torch.autograd.grad(again, tuple(inputs.values()), grad), grads, strict=True):
            assert_close(found, expected, GRADIENT_TOLERANCE[torch.float32], "under checkpointing")


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
    for ours, right in zip(torch.autograd.grad(compiled.sum(), tuple(inputs.values())), grads, strict=True):
        assert_close(ours, right, GRADIENT_TOLERANCE[torch.float32], "gradient")


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
    """Schema and fake implementation, strides too, of all that both passes call; autograd of what the first does."""
    if backend == "eager" and operator.name == "depthwise_conv2d" and DEVICE != "cpu":
        pytest.skip("there it is PyTorch's own convolution")
    for layout in (Tensor.detach, _pixels_first):
        with _Recorded() as recorded:
            run(operator, {name: layout(tensor) for name, tensor in operator.tensors().items()}, backend)
        assert recorded.calls
        for overload, arguments in {call[0]: call for call in recorded.calls}.values():
            torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))
    overload, arguments = recorded.calls[0]
    arguments = _pytree.tree_map_only(Tensor, Tensor.requires_grad_, arguments)
    torch.library.opcheck(overload, arguments, test_utils=("test_autograd_registration", "test_aot_dispatch_dynamic"))


@ON_OURS
@BY_NAME
def test_flops(operator, backend):
    """Of kernels on meta tensors, so that nothing is computed."""
    if backend == "eager" and operator.name == "depthwise_conv2d" and DEVICE != "cpu":
        pytest.skip("there it is PyTorch's own convolution, counted by its own formula")
    inputs = leaves(operator.tensors(batch=3, device="meta" if backend == "triton" else DEVICE))
    with kernels.use_backend(backend), FlopCounterMode(display=False) as forward:
        out = operator(inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), tuple(inputs.values()))
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(6 * n for n in operator.multiply_adds)


@ON_OURS
@BY_NAME
def test_derivatives(operator, backend):
    """The first by finite differences; the second too, or refused by a sentence that says how to get one."""
    tensors = leaves(operator.tensors(dtype=torch.float64))
    values = tuple(tensors.values())

    def function(*values):
        return operator(dict(zip(tensors, values, strict=True)))

    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        if operator.twice:
            assert torch.autograd.gradgradcheck(function, values, fast_mode=True)
            return
        grads = torch.autograd.grad(function(*values).sum(), values, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf'{operator.name} can be .* once.*use_backend\("reference"\)'):
        grads[0].sum().backward()


@ON_ALL
@BY_NAME
def test_forward_mode(operator, backend):
    """The definition's derivative; through a graph that our operators recorded before, an error."""
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
def test_gradients_under_vmap(operator):
    """Of every argument, for several sets of arguments at once."""
    sets = [operator.tensors(dtype=torch.float64) for _ in range(3)]

    def loss(tensors):
        return operator(tensors).sin().sum()

    with kernels.use_backend("eager"):
        together = torch.vmap(torch.func.grad(loss))({name: torch.stack([s[name] for s in sets]) for name in sets[0]})
        for index, tensors in enumerate(map(leaves, sets)):
            alone = torch.autograd.grad(loss(tensors), tuple(tensors.values()))
            for name, expected in zip(tensors, alone, strict=True):
                assert_close(together[name][index], expected, GRADIENT_TOLERANCE[torch.float64], name)


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


@ON_ALL
@BY_NAME
def test_autocast(operator, backend):
    """Every input is cast, as a convolution's, and what is computed is what the cast inputs give."""
    tensors = operator.tensors()
    with torch.autocast(DEVICE, torch.bfloat16):
        out, grads = run(operator, tensors, backend)
    expected, right = run(operator, {name: tensor.bfloat16() for name, tensor in tensors.items()}, backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    for name, ours, theirs in zip(tensors, grads, right, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, operator.rounding * GRADIENT_TOLERANCE[torch.bfloat16], name)


@ON_ALL
@BY_NAME
def test_a_nan_stays_in_its_image(operator, backend):
    for name, shape in operator.inputs.items():
        if shape[0] != "B":
            continue
        tensors = operator.tensors(batch=2)
        tensors[name][1] = float("nan")
        with kernels.use_backend(backend):
            out = operator(tensors)
        assert out[0].isfinite().all(), name
        assert out[1].isnan().any(), name


def _definition(operator: Operator, given: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients of inputs and of the output's gradient, which comes with them."""
    out, inputs = operator.exact({name: tensor for name, tensor in given.items() if name != "gradient"})
    return [out, *torch.autograd.grad(out, tuple(inputs.values()), given["gradient"].double())]


@ON_OURS
@BY_NAME
def test_reach_of_a_nan(operator, backend):
    """One NaN reaches every output and gradient that depends on the number in its place, and besides only what the
    definition makes NaN by multiplying it with the zeros around a map."""
    if backend == "eager" and DEVICE != "cpu":
        pytest.skip("off the CPU the eager path does not look for a NaN: it would have to wait for the device")
    for case in [next(iter(operator.cases.values())), *_first_cases(operator)[1:]]:
        operator = operator.at(case)
        drawn = operator.tensors()
        drawn["gradient"] = torch.ones_like(operator(drawn))

        before = _definition(operator, drawn)
        for name, tensor in drawn.items():
            element = tensor.numel() // 2
            given = {key: value.clone() for key, value in drawn.items()}
            given[name].view(-1)[element] += 1
            dependent = [(a - b).abs() > 1e-9 for a, b in zip(_definition(operator, given), before, strict=True)]
            given[name].view(-1)[element] = float("nan")
            allowed = [a.isnan() | b for a, b in zip(_definition(operator, given), dependent, strict=True)]
            out, grads = run(operator, given, backend, given.pop("gradient"))
            whats = ("output", *(f"gradient of {key}" for key in given))
            for what, found, least, most in zip(whats, (out, *grads), dependent, allowed, strict=True):
                assert found[least].isnan().all(), f"a NaN in {name} is lost from {what}"
                if backend == "eager" or name not in operator.spreads:
                    assert not found[~most].isnan().any(), f"a NaN in {name} goes too far in {what}"


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere products with bands of zeros are not looked at")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@EVERY_CASE
def test_what_is_not_finite(operator, bad):
    """On the eager path it reaches exactly what it reaches in the definition.

    But for a depthwise convolution's weight: whether its gradient in PyTorch multiplies by the zeros around the map
    depends on the CPU.
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
        right, right_grads = run(operator, tensors, "reference", grad)
        for what, ours, expected in zip(("output", *drawn), (out, *grads), (right, *right_grads), strict=True):
            if (operator.name, what) != ("depthwise_conv2d", "weight"):
                assert torch.equal(ours.isfinite(), expected.isfinite()), f"{bad} in {place}: {what}"
