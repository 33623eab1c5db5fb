"""Contenders that compute the same: each is checked before it is timed, then they take turns.

An operator is held against its definition in float32 (float64 in float64), so that the bound is on our rounding alone;
a model, whose precision rounds at every layer, against itself on the naive path.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from autotune import timing, workloads
from autotune.timing import Timing
from autotune.workloads import Inputs, Workload
from kernels import tolerances

PASSES = ("forward", "forward+backward")
GRAPH_BELOW_MS = 1.0  # a call shorter than this may be bound by its launches, and is timed in a CUDA graph as well
CHECKED_BATCH = 2  # images with which a model is checked

Call = Callable[[], list[Tensor]]


class DisagreementError(Exception):
    """Two contenders computed different things."""


def one_line(error: Exception) -> str:
    """What an error says, for a cell of a table: a disagreement speaks for itself, others with their type."""
    text = str(error) if isinstance(error, DisagreementError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


@dataclass(frozen=True)
class Settings:
    """How everything in one run is measured.

    ``backend`` is our path's; ``seconds`` are spent on timing each case, but every contender runs ``min_runs`` times.
    ``thorough``: everything that can stand in for ours takes part, not only the naive path, and short calls are timed
    in CUDA graphs too. ``compiler`` is torch.compile's backend, None to leave compiling out. ``compile_only`` runs what
    is compiled once, which fills the caches on disk. ``ceilings`` are those of ``ceilings.measure_ceilings``, or the
    copy's alone.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    seconds: float = 1.0
    min_runs: int = 5
    thorough: bool = False
    compiler: str | None = None
    compile_only: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)


# ---- checking


def on_backend(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` as a function that runs on ``backend``, whichever is selected otherwise."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        with kernels.use_backend(backend):
            return call(*arguments, **options)

    return wrapped


def largest_error(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest ‖out − expected‖ / ‖expected‖ among pairs of tensors, NaN where one has a NaN."""
    errors = [timing.relative_error(out, want) for out, want in zip(outputs, expected, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error))


def check(error: float, tolerance: float, what: str) -> dict[str, float]:
    """The two numbers for the record; DisagreementError where the error is beyond its bound, or NaN."""
    if not error <= tolerance:
        raise DisagreementError(f"{what}: relative error {error:.1e} against the naive path, allowed {tolerance:.1e}")
    return {"relative_error": error, "tolerance": tolerance}


def leave_out(calls: dict[str, Call], expected: list[Tensor], tolerance: float, what: str) -> dict[str, str]:
    """Take those but ``ours`` out of ``calls`` that fail or compute something else: name -> reason."""
    reasons = {}
    for name in [name for name in calls if name != "ours"]:
        try:
            check(largest_error(calls[name](), expected), tolerance, what)
        except Exception as error:  # out of memory, a compiler that gives up: one contender less
            reasons[name] = one_line(error)
            del calls[name]
    return reasons


# ---- timing


def time_and_memory(
    calls: Mapping[str, Callable[[], object]], settings: Settings, measure: Callable[..., Any] = timing.measure
) -> dict[str, dict[str, Any]]:
    """Percentiles and runs of each call as ``measure`` takes them, and its ``peak_bytes``."""
    peaks = {name: timing.peak_memory(call, settings.device) for name, call in calls.items()}
    times = measure(calls, settings.device, seconds=settings.seconds, min_runs=settings.min_runs)
    return {name: asdict(found) | {"peak_bytes": peaks[name]} for name, found in times.items()}


def ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times as long as ours the others take."""
    return {name: times["p50_ms"] / found["ours"]["p50_ms"] for name, times in found.items() if name != "ours"}


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float, min_runs: int
) -> dict[str, Timing]:
    """As ``timing.measure``, for calls so long that what the L2 cache holds before them does not matter.

    On a GPU a run of each follows the other in the stream, between device events.
    """
    if device.type != "cuda":
        return timing.measure(calls, device, seconds=seconds, min_runs=min_runs)
    durations = [_event_milliseconds([call])[0] for call in calls.values()]
    runs = max(min_runs, min(50, int(1000 * seconds / sum(durations))))
    samples = _event_milliseconds([*calls.values()] * runs)
    return {name: Timing.of(samples[index :: len(calls)]) for index, name in enumerate(calls)}


def _event_milliseconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Device time of each call, one after another."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def _graphs(calls: Mapping[str, Call]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each call as the replay of a CUDA graph; without those that cannot be captured."""
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # allocations and lazy set-up belong before a capture
                call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                call()
            yield name, graph.replay


# ---- operators


def contmix_chain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rpb: Sequence[Tensor],
    kernel_sizes: Sequence[int],
) -> Tensor:
    """contmix2d as a chain: affinity, projection, then ``na2d_softmax_av`` of each kernel size; all of it is stored."""
    affinity = torch.einsum("bgchw,bgcl->bghwl", query, key)
    logits = F.linear(affinity, proj_weight, proj_bias).split([size**2 for size in kernel_sizes], -1)
    mixed = [
        kernels.na2d_softmax_av(part, value[:, m].movedim(2, -1), size, rpb=rpb[m]).movedim(-1, 2)
        for m, (part, size) in enumerate(zip(logits, kernel_sizes, strict=True))
    ]
    return torch.stack(mixed, 1)


def span_and_involution(
    x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: int, groups: int
) -> Tensor:
    """involution2d_generate as a chain: the span convolution, then ``involution2d``."""
    kernel = F.conv2d(features, weight[:, :, None, None], bias).unflatten(1, (groups, kernel_size, kernel_size))
    return kernels.involution2d(x, kernel)


# Fused operators, and the chain on our own kernels that each replaces.
UNFUSED: dict[str, Callable[..., Tensor]] = {"contmix2d": contmix_chain, "involution2d_generate": span_and_involution}


def naive_bytes(workload: Workload, dtype: torch.dtype, *, backward: bool) -> int:
    """Estimate of what the naive path allocates: the unfolded neighbourhoods and their product with the kernel.

    Both have an entry for every multiply-add, but outlook attention's, whose K² weights a source share one neighbour.
    A backward pass keeps them and adds their gradients. The reference in float32 and its inputs come on top.
    """
    if workload.operator == "depthwise_conv2d":
        entries = 0
    else:
        weights = workload.options["kernel_size"] ** 2 if workload.operator == "outlook_attention2d" else 1
        entries = workload.multiply_adds // weights
    working = 2 * entries * (2 if backward else 1)
    return max(dtype.itemsize, 4) * working + 2 * workload.floor_bytes(torch.float32, backward=backward)


def too_large(workload: Workload, settings: Settings, *, backward: bool) -> str | None:
    """Why the naive path does not fit in the GPU's memory, or None."""
    if settings.device.type != "cuda":
        return None
    needed = naive_bytes(workload, settings.dtype, backward=backward)
    free = torch.cuda.mem_get_info(settings.device)[0]
    free += torch.cuda.memory_reserved(settings.device) - torch.cuda.memory_allocated(settings.device)
    return None if needed < free else f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def contenders(workload: Workload, inputs: Inputs, gradient: Tensor | None, settings: Settings) -> dict[str, Call]:
    """Ours first, then what it is compared with: calls that return the output (and gradients)."""
    options = dict(workload.options)
    definition: Callable[..., Tensor] = functools.partial(getattr(kernels.reference, workload.operator), **options)

    def call(function: Callable[..., Tensor] | None, inputs: Inputs = inputs) -> Call:
        return functools.partial(workload.run, inputs, gradient, function)

    calls = {"ours": on_backend(settings.backend, call(None)), "naive": call(definition)}
    if settings.thorough:
        if workload.operator == "depthwise_conv2d":  # PyTorch's convolution in its other memory layout
            x = inputs["x"].detach().contiguous().requires_grad_()
            calls["channels_first"] = call(definition, {**inputs, "x": x})
        if workload.operator in UNFUSED:
            chain = functools.partial(UNFUSED[workload.operator], **options)
            calls["unfused"] = call(on_backend(settings.backend, chain))
    if settings.compiler is not None:

        def compiled_definition(**inputs: Any) -> Tensor:
            return definition(**inputs)

        calls["compiled"] = call(torch.compile(compiled_definition, dynamic=False, backend=settings.compiler))
    return calls


def measure_operator(workload: Workload, settings: Settings, *, backward: bool = False) -> dict[str, Any]:
    """Check every contender, then time it. A contender that cannot run, or disagrees, is left out with the reason.

    Where the definition does not fit in the GPU's memory, ours is held against the eager path, in float32 as well.

    Raises:
        DisagreementError: our output or a gradient is not that of the definition; nothing was timed then.
    """
    inputs = workload.draw_inputs(settings.dtype, settings.device)
    gradient = workload.draw_gradient(settings.dtype, settings.device) if backward else None
    calls = contenders(workload, inputs, gradient, settings)
    left_out, against, reason = {}, "reference", too_large(workload, settings, backward=backward)
    if reason is not None:
        against, left_out = "eager", {name: reason for name in ("naive", "compiled") if calls.pop(name, None)}
    if settings.compile_only:
        if "compiled" in calls:
            calls["compiled"]()
        return {}
    exact = None if gradient is None else gradient.to(torch.promote_types(settings.dtype, torch.float32))
    expected = on_backend(against, workload.run)(workloads.upcast(inputs), exact)
    tolerance, what = tolerances.GRADIENT[settings.dtype], "output and gradients" if backward else "output"
    agreement = check(largest_error(calls["ours"](), expected), tolerance, what)
    left_out |= leave_out(calls, expected, tolerances.CHAIN * tolerance, what)
    del expected
    row: dict[str, Any] = {"against": against, **agreement, "left_out": left_out}
    row["contenders"] = found = time_and_memory(calls, settings)
    if settings.thorough and settings.device.type == "cuda" and found["ours"]["p50_ms"] < GRAPH_BELOW_MS:
        graphs = dict(_graphs(calls))
        if "ours" in graphs:
            timed = timing.measure(graphs, settings.device, seconds=settings.seconds, min_runs=settings.min_runs)
            row["graph"] = found = {name: asdict(times) for name, times in timed.items()}
    floor = _floor(workload, settings, backward)
    row["floor"] = floor | {"fraction": floor["ms"] / found["ours"]["p50_ms"]}
    return row | {"speed_up": ratios(found)}


def _floor(workload: Workload, settings: Settings, backward: bool) -> dict[str, Any]:
    """The least time: every input and output moved once at a copy's speed, or the arithmetic where it takes longer."""
    moved, operations = workload.floor_bytes(settings.dtype, backward=backward), workload.operations(backward=backward)
    memory_ms = 1000 * moved / settings.ceilings["copy_bytes_per_second"]
    floor = {"bytes": moved, "operations": operations, "memory_ms": memory_ms, "ms": memory_ms}
    rates = {name: settings.ceilings.get(f"{name}_operations_per_second") for name in ("bf16", "fp32")}
    if rates["bf16"] and rates["fp32"]:
        operations_ms = 1000 * operations / max(rates["bf16"], rates["fp32"])  # on whichever unit is the fastest
        floor |= {"operations_ms": operations_ms, "fp32_operations_ms": 1000 * operations / rates["fp32"]}
        floor["ms"] = max(memory_ms, operations_ms)
    return floor


# ---- models


@contextlib.contextmanager
def batch_norms_held(model: nn.Module) -> Iterator[None]:
    """Batch norms use their running statistics inside, for comparing gradients.

    With the batch's own statistics a random model amplifies rounding: RedNet-26's float32 gradients are then up to
    1e-2 from the float64 ones on either path, and 6e-5 when held; in float64 the paths agree to 1e-12 either way.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def model_pass(model: nn.Module, images: Tensor, *, training: bool) -> Call:
    """A call that returns the logits; of ``training`` the loss and every parameter's gradient, without an optimiser."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return _floating(model(images))

    def forward_backward() -> list[Tensor]:
        with torch.enable_grad():
            loss = torch.stack([out.float().square().mean() for out in _floating(model(images))]).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]

    return forward_backward if training else inference


def _floating(output: Any) -> list[Tensor]:
    """A model's outputs but for integer ones: logits, a dict of logits, or logits and the box of mixed tokens."""
    if isinstance(output, Tensor):
        return [output]
    return [value for value in (output.values() if isinstance(output, dict) else output) if value.is_floating_point()]


def _joined(call: Call) -> list[Tensor]:
    """Outputs as they are, many gradients as one vector: single ones may be all but zero, and their ratio noise."""
    torch.manual_seed(0)  # drops and mixes the same every time
    first, *others = call()
    return [first, torch.cat([gradient.flatten() for gradient in others])] if others else [first]


def _agreement(model: nn.Module, images: Tensor, settings: Settings, training: bool) -> dict[str, float]:
    """Ours against the naive path on a small batch: the same in float32, and no worse rounded in the timed precision.

    ``rounding`` is how far two paths may be from each other as they are timed.
    """
    tolerance, what = (
        (tolerances.MODEL_GRADIENT, "loss and gradients") if training else (tolerances.LOGITS, "logits")
    )  # fmt: skip

    def results(backend: str, model: nn.Module, images: Tensor) -> list[Tensor]:
        return on_backend(backend, _joined)(model_pass(model, images, training=training))

    with batch_norms_held(model), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, naive = (results(backend, model, images) for backend in (settings.backend, "reference"))
        if training:  # two paths cannot agree better than either agrees with the exact gradients
            exact = results("reference", copy.deepcopy(model).double(), images.double())
            tolerance = max(tolerance, 4 * largest_error(naive, exact))
        error = largest_error(ours, naive)
        found = check(error, tolerance, f"{what} in float32")
        if settings.dtype == torch.float32:
            return found | {"rounding": error}
        lower = copy.deepcopy(model).to(settings.dtype), images.to(settings.dtype)
        rounding, allowed = (
            largest_error(results(backend, *lower), exact)
            for backend, exact in ((settings.backend, ours), ("reference", naive))
        )
        check(rounding, tolerances.OTHER_PRECISION * allowed, f"{what} in {settings.dtype}")
    return found | {"rounding": rounding}


def measure_model(
    model: nn.Module,
    images: Tensor,
    settings: Settings,
    *,
    training: bool,
    compiled: bool = False,
    latency: bool = False,
) -> dict[str, Any]:
    """Check a float32 model on its first images, then time it in the precision asked for, to which it is converted.

    A contender that cannot run is left out with the reason. ``compiled``: what the compiler makes of the model takes
    part; for ``latency`` as CUDA graphs on a GPU, where launching hundreds of small kernels one by one takes longer
    than running them.

    Raises:
        DisagreementError: our logits or gradients are not those of the naive path; nothing was timed then.
    """
    model.train(training)
    try:
        agreement = _agreement(model, images[:CHECKED_BATCH], settings, training)
    except DisagreementError:
        if not settings.compile_only:  # it will be said where it is measured
            raise
        agreement = {}
    timed, timed_images = model.to(settings.dtype), images.to(settings.dtype)
    one_pass = model_pass(timed, timed_images, training=training)
    calls = {"ours": on_backend(settings.backend, one_pass), "naive": on_backend("reference", one_pass)}
    if compiled and settings.compiler is not None:
        mode = "reduce-overhead" if latency and settings.compiler == "inductor" else None
        module: Any = torch.compile(timed, dynamic=False, backend=settings.compiler, mode=mode)
        calls["compiled"] = on_backend(settings.backend, model_pass(module, timed_images, training=training))
    if settings.compile_only:
        if "compiled" in calls:
            calls["compiled"]()
        return {}
    # Two results in the timed precision, each that far from the exact one, and some room for another batch.
    bound = 4 * max(agreement["rounding"], tolerances.LOGITS)

    def judged(name: str) -> dict[str, str]:
        pair: dict[str, Call] = {n: functools.partial(_joined, calls[n]) for n in ("ours", name) if n in calls}
        reasons = leave_out(pair, pair["ours"](), bound, "logits or gradients")
        return {name: reason for name, reason in reasons.items() if calls.pop(name)}

    with batch_norms_held(timed):
        left_out = judged("naive")
    left_out |= judged("compiled")  # which would compile again for batch norms that are held
    found = time_and_memory(calls, settings, in_turns if settings.thorough else timing.measure)
    for times in found.values():
        times["images_per_second"] = 1000 * images.shape[0] / times["p50_ms"]
    return {**agreement, "contenders": found, "left_out": left_out, "speed_up": ratios(found)}
