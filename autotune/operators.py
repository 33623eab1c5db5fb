"""An operator against its alternatives: the definition, which unfolds, the same compiled, and the hardware's limit.

It is compared with its definition in float32 (float64 in float64), so that the bound is on our rounding alone.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from autotune import timing
from autotune.cases import Case
from autotune.measure import Call, Settings, check, graphs, largest_error, leaving_out, ratios, time_and_memory
from autotune.passes import PASSES, upcast
from autotune.workloads import Inputs, Workload
from kernels import tolerances

# A call shorter than this may be bound by its launches, and is timed in a CUDA graph as well: an eager backward
# pass takes the host milliseconds.
GRAPH_BELOW_MS = 10.0


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


def contenders(workload: Workload, inputs: Inputs, gradient: Tensor | None, settings: Settings) -> dict[str, Call]:
    """Ours first, then what it is compared with: calls that return the output (and gradients)."""
    options = dict(workload.options)
    definition: Callable[..., Tensor] = functools.partial(getattr(kernels.reference, workload.operator), **options)

    def call(part: Callable[..., Tensor] | None, inputs: Inputs = inputs, backend: str | None = None) -> Call:
        return functools.partial(replace(workload, part=part).run, inputs, gradient, backend)

    calls = {"ours": call(None, backend=settings.backend), "naive": call(definition)}
    if settings.thorough:
        if workload.operator == "depthwise_conv2d":  # PyTorch's convolution in its other memory layout
            x = inputs["x"].detach().contiguous().requires_grad_()
            calls["channels_first"] = call(definition, {**inputs, "x": x})
        if workload.operator in UNFUSED:
            calls["unfused"] = call(functools.partial(UNFUSED[workload.operator], **options), backend=settings.backend)
    if settings.compiler is not None:

        def compiled_definition(**inputs: Any) -> Tensor:
            return definition(**inputs)

        calls["compiled"] = call(torch.compile(compiled_definition, dynamic=False, backend=settings.compiler))
    return calls


def measure_operator(workload: Workload, settings: Settings, *, backward: bool = False) -> dict[str, Any]:
    """Check every contender, then time it. A contender that cannot run, or disagrees, is left out with the reason.

    Where the definition does not fit in the GPU's memory, ours is compared with the eager path, also in float32.

    Raises:
        DisagreementError: our output or a gradient is not that of the definition; nothing was timed then.
    """
    inputs = workload.draw_inputs(settings.dtype, settings.device)
    gradient = workload.draw_gradient(settings.dtype, settings.device) if backward else None
    calls = contenders(workload, inputs, gradient, settings)
    if settings.compile_only:
        if "compiled" in calls:
            calls["compiled"]()
        return {}
    wider = None if gradient is None else gradient.to(torch.promote_types(settings.dtype, torch.float32))
    exact = upcast(inputs), wider
    against, expected, left_out = "reference", None, dict[str, str]()
    with contextlib.suppress(torch.OutOfMemoryError):
        expected = workload.run(*exact, backend=against)
    if expected is None:
        reason = "the definition does not fit in the GPU's memory"
        left_out = {name: reason for name in ("naive", "compiled") if calls.pop(name, None)}
        against, expected = "eager", workload.run(*exact, backend="eager")
    tolerance, what = tolerances.GRADIENT[settings.dtype], "output and gradients" if backward else "output"
    agreement = check(largest_error(calls["ours"](), expected), tolerance, what)
    for name in list(calls)[1:]:
        with leaving_out(name, calls, left_out):
            check(largest_error(calls[name](), expected), tolerances.CHAIN * tolerance, what)
    del expected
    row: dict[str, Any] = {"against": against, **agreement, "left_out": left_out}
    row["contenders"] = found = time_and_memory(calls, settings)
    if settings.thorough and settings.device.type == "cuda" and found["ours"]["p50_ms"] < GRAPH_BELOW_MS:
        replays = dict(graphs(calls))
        if "ours" in replays:
            timed = timing.measure(replays, settings.device, seconds=settings.seconds, min_runs=settings.min_runs)
            row["graph"] = found = {name: asdict(times) for name, times in timed.items()}
    floor = _floor(workload, settings, backward)
    row["floor"] = floor | {"fraction": floor["ms"] / found["ours"]["p50_ms"]}
    return row | {"speed_up": ratios(found)}


def operator_cases(
    found: Sequence[Workload], settings: Settings, passes: Sequence[str], finish: Callable[..., Any] = dict
) -> list[Case]:
    """A row for each workload and pass; ``finish`` makes it of what was measured."""

    def case(workload: Workload, kind: str) -> Case:
        facts = {"kind": "operator", **workload.facts, "batch": workload.output[0], "pass": kind}
        return Case(facts, lambda: finish(measure_operator(workload, settings, backward=kind == PASSES[1])))

    return [case(workload, kind) for workload in found for kind in passes]


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
