"""``autotune.compare``: a function or module of one's own, on every backend that runs here and against any others."""

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autotune import timing
from autotune.contest import NAIVE, Contest
from autotune.measure import Settings, check, doubts, largest_error, leaving_out, other_work, time_and_memory
from autotune.passes import Function, Operations, Pass, tensors_in, upcast, weights_of
from autotune.workloads import least_bytes
from kernels import tolerances
from kernels.backend import interpreting, resolve
from models.commands.types import Number, positive


def compare(
    function: Function,
    *inputs: Any,
    against: Function | Sequence[Function] | Mapping[str, Function] = (),
    backward: bool = False,
    backends: Sequence[str] | None = None,
    compiled: bool | None = None,
    same: bool = True,
    seconds: float = 1.0,
    min_runs: int = 5,
    **options: Any,
) -> Contest:
    """Check and time ``function(*inputs, **options)`` on every backend that runs here, and against other functions.

    Every contender must compute what ``function`` does on the naive path in float32, before anything is timed. A module
    keeps its mode (train or eval), and its buffers and gradients are as before afterwards.

    Args:
        function: a module, or any callable that returns tensors or a structure of them.
        inputs: what it is called with; all tensors on one device, which is where everything runs.
        against: other functions of the same inputs: one, several, or name -> function.
        backward: time the gradients as well: of the weights, and of the inputs that require them (where none does, of
            every floating-point input).
        backends: of ``triton``, ``eager`` and ``reference`` (the naive path), by default all that run here. Where two
            of them run the same operations of PyTorch, the later in this order stands for both.
        compiled: whether what torch.compile makes of the naive path takes part; by default on a GPU only.
        same: False where ``against`` computes something else on purpose: it is then timed without being compared.
        seconds: time to spend on all contenders together.
        min_runs: runs of each that are made even where that takes longer.
        options: keyword arguments of ``function``.

    Raises:
        DisagreementError: two backends compute different things; nothing was timed then.
        TypeError, ValueError: an argument is not what it must be.
    """
    others = _checked(function, against, backends, seconds, min_runs)
    device = _device(function, (inputs, options))
    inputs, options = _detached((inputs, options), backward)
    modules = [module for module in (function, *others.values()) if isinstance(module, nn.Module)]
    run = Pass(function, inputs, options, backward=backward, backend="auto", held=modules)
    on_gpu = device.type == "cuda"
    if compiled or (compiled is None and on_gpu):
        others = {"compiled": torch.compile(function, dynamic=False), **others}
    with (
        _restored(modules),
        torch.random.fork_rng(devices=[device] if on_gpu else []),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # float32 means float32, on every path
    ):
        settings = Settings(device, torch.float32, seconds=seconds, min_runs=min_runs)
        return _measure(run, others, settings, backends, same)


def _checked(
    function: Function, against: Any, backends: Sequence[str] | None, seconds: float, min_runs: int
) -> dict[str, Function]:
    """The other functions by name. TypeError or ValueError, naming the argument, for what cannot be."""
    if not callable(function):
        raise TypeError(f"function must be a module or another callable, got {type(function).__name__}")
    if isinstance(against, Mapping):
        others = dict(against)
    else:
        listed = [against] if callable(against) else list(against) if isinstance(against, Sequence) else None
        if listed is None or isinstance(against, str):
            raise TypeError(f"against must be a callable, several, or name -> callable, got {against!r}")
        others = {}
        for other in listed:
            name = _name(other)
            others[f"{name} ({len(others) + 2})" if name in (_name(function), *others) else name] = other
    for name, other in others.items():
        if not callable(other):
            raise TypeError(f"against must hold callables, got {type(other).__name__} for {name!r}")
        if name in ("triton", "eager", NAIVE, "compiled", _name(function)):
            raise ValueError(f"against must not use the name {name!r}, which is that of function or one of its paths")
    known = ("triton", "eager", "reference")
    if backends is not None and (isinstance(backends, str) or not backends or not set(backends) <= set(known)):
        raise ValueError(f"backends must be some of {', '.join(known)}, got {backends!r}")
    for name, value, kind in (("seconds", seconds, Number(at_least=0)), ("min_runs", min_runs, positive)):
        if not kind.holds(value):
            raise ValueError(f"{name} must be {kind}, got {value!r}")
    return others


def _name(function: Function) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "function" if name == "<lambda>" else name


def _device(function: Function, given: Any) -> torch.device:
    """Where everything runs. ValueError where that is nowhere, or more than one place."""
    if not tensors_in(given):
        raise ValueError("inputs must hold a tensor, and they hold none")
    held = [*tensors_in(given), *weights_of(function)]
    devices = sorted({str(tensor.device) for tensor in held})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(f"inputs and weights must be on one device that computes, they are on {', '.join(devices)}")
    if not any(tensor.dtype in tolerances.GRADIENT for tensor in held):
        raise ValueError("inputs must hold a tensor of float64, float32, float16 or bfloat16, and they hold none")
    return held[0].device


def _detached(structure: Any, gradients: bool) -> Any:
    """The same tensors, apart from whatever computed them; ``gradients`` has all require them where none does."""
    every = gradients and not any(tensor.requires_grad for tensor in tensors_in(structure))

    def detached(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().requires_grad_(leaf.requires_grad or (every and leaf.is_floating_point()))

    return tree_map(detached, structure)


@contextlib.contextmanager
def _restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Buffers are afterwards what they were: batch norms change theirs while they are timed."""
    kept = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.data.copy_(value)


def _paths(run: Pass, device: torch.device, backends: Sequence[str] | None) -> tuple[dict[str, str], int]:
    """Name -> backend of those that run here and differ in what they run; the naive path is the last.

    And how many operations the first of them does, as far as PyTorch's counter knows.
    """
    ran: dict[str, Operations] = {}
    for backend in ("triton", "eager", "reference"):
        if backends is not None and backend not in backends:
            continue
        try:
            resolve(backend, torch.empty(0, device=device))
            if backend == "triton" and interpreting():
                raise ValueError("TRITON_INTERPRET=1 runs kernels in Python, and timing that means nothing")
        except ValueError as error:
            if backends is not None:
                raise ValueError(f"backends: {error}") from None
            continue
        operations = Operations()
        with operations:
            run.on(backend).checked()
        ran[NAIVE if backend == "reference" else backend] = operations
    later = {tuple(operations.names): name for name, operations in ran.items()}  # the last of those that are alike
    found = {name: "reference" if name == NAIVE else name for name in ran if name in later.values()}
    if backends is None and len(found) == 1:  # nothing of ours inside, or nothing that differs from PyTorch's own
        found = {_name(run.function): "reference"}
    return found, next(iter(ran.values())).count


def _exact(run: Pass, naive: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """On the naive path, in float32 where the precision is less; ``naive`` where the function takes no other."""
    if dtype.itemsize >= 4:
        return naive
    function, held = run.function, run.held
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).float()
            held = [function]
        inputs, options = upcast((run.inputs, run.options))
        return Pass(function, inputs, options, backward=run.backward, backend="reference", held=held).checked()
    return naive


def _measure(
    run: Pass, others: dict[str, Function], settings: Settings, backends: Sequence[str] | None, same: bool
) -> Contest:
    device = settings.device
    naive = run.on("reference").checked()
    paths, operations = _paths(run, device, backends)
    dtypes = [tensor.dtype for tensor in (*run.tensors, *naive) if tensor.dtype in tolerances.GRADIENT]
    dtype = max(dtypes, key=tolerances.GRADIENT.__getitem__)  # the least precise
    what, tolerance = "outputs", tolerances.LOGITS
    if run.backward:
        what, tolerance = "outputs and gradients", tolerances.MODEL_GRADIENT
    expected = _exact(run, naive, dtype)
    if dtype == torch.float64:
        tolerance = tolerances.FOREIGN_FLOAT64
    elif dtype != torch.float32:  # the function rounds at every step: it says itself how much
        tolerance = max(tolerances.GRADIENT[dtype], tolerances.OTHER_PRECISION * largest_error(naive, expected))
    kinds = {name: NAIVE if backend == "reference" else "ours" for name, backend in paths.items()}
    calls: dict[str, Pass] = {name: run.on(backend) for name, backend in paths.items()}
    errors: dict[str, float | None] = {}
    for name, call in calls.items():
        errors[name] = check(largest_error(call.checked(), expected), tolerance, f"{what} on {name}")["relative_error"]
    # Another module may have other weights, so that only outputs and the inputs' gradients can be the same.
    expected = expected[: len(expected) - bool(run.backward and run.weights)]
    left_out: dict[str, str] = {}
    for name, other in others.items():
        kinds[name], backend = ("compiled", "reference") if name == "compiled" else ("peer", "auto")
        call = Pass(other, run.inputs, run.options, backward=run.backward, backend=backend, held=run.held)
        with leaving_out(name, calls, left_out):
            found, errors[name] = call.checked()[: len(expected)], None
            if same or name == "compiled":
                errors[name] = check(largest_error(found, expected), tolerance, what)["relative_error"]
            calls[name] = call
    outputs = naive[: len(expected) - (len(run.leaves) if run.backward else 0)]
    read, written = (sum(tensor.nbytes for tensor in tensors) for tensors in (run.tensors, outputs))
    floor_bytes = least_bytes(read, written, backward=run.backward)
    del expected, naive, outputs

    floor_ms = timing.copy_milliseconds(device, floor_bytes, seconds=settings.seconds / 4)
    elsewhere = other_work()
    times, baseline = time_and_memory(calls, settings), [*paths][-1]
    timed = []
    for name, found in times.items():
        ratios = {"speed_up": times[baseline]["p50_ms"] / found["p50_ms"], "of_floor": floor_ms / found["p50_ms"]}
        row = {"name": name, "kind": kinds[name], "status": "ok", "relative_error": errors[name]}
        timed.append({**row, **found, **ratios})
    machine = timing.describe_machine(device)
    return Contest(
        title=_name(run.function),
        backward=run.backward,
        baseline=baseline,
        rows=[
            *timed,
            *({"name": n, "kind": kinds[n], "status": "left out", "message": m} for n, m in left_out.items()),
        ],
        floor_bytes=floor_bytes,
        floor_ms=floor_ms,
        operations=operations,
        tolerance=tolerance,
        dtype=timing.precision(dtype),
        machine=machine,
        warnings=doubts(elsewhere(), machine["cpu_count"], [[found] for found in times.values()]),
    )
