"""Each operator against its alternatives: eager unfold, compiled unfold, and the hardware's limit.

Every contender computes the same function of the same inputs and is held against the definition in float32 before
anything is timed. Contenders take turns, so that the clock of a hot GPU slows them all alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from autotune import timing, workloads
from autotune.comparison import check, largest_error, on_backend, one_line, time_and_memory
from autotune.workloads import Inputs, Size, Workload, channels_last, generation, operator_workloads
from kernels import tolerances

__all__ = ["PASSES", "OperatorBench", "benchmark_workloads", "contmix_chain", "naive_bytes", "why_not"]

PASSES = ("forward", "forward+backward")
GRAPH_BELOW_MS = 1.0  # a call shorter than this may be bound by its launches, and is timed in a CUDA graph as well

Call = Callable[[], list[Tensor]]


def _with_generation(found: Iterable[Workload]) -> Iterator[Workload]:
    """Involutions in the memory format that models are measured in, each also with its kernels generated inside."""
    for workload in found:
        if workload.operator == "involution2d":
            yield channels_last(workload)
            yield generation(channels_last(workload))
        else:
            yield workload


def _tiny_workloads() -> Iterator[Workload]:
    size = (6, 5)
    yield workloads.involution("tiny", 1, 32, size, 3, 16)
    for operator in ("na2d_av", "na2d_qk", "na2d_softmax_av"):
        yield workloads.neighborhood(operator, "tiny", 1, 2, 16, size, 3)
    yield workloads.contmix("tiny", 1, 2, 16, size, (3, 5), context=9)
    yield workloads.outlook("tiny", 1, 2, 16, size, 3, 2)
    yield workloads.depthwise("tiny", 1, 16, size, 5)


def benchmark_workloads(batch: int | None = None, size: Size | None = None, *, quick: bool = False) -> list[Workload]:
    """The operators at the models' own shapes: batch 128 at 224², then batch 2 at 800×1280; or at the shape given.

    ``quick`` takes one tiny shape of each operator instead.
    """
    if quick:
        found = _tiny_workloads()
    elif size is not None:
        found = operator_workloads(batch or 128, size)
    else:
        found = [*operator_workloads(batch or 128, (224, 224)), *operator_workloads(batch or 2, (800, 1280))]
    return list(_with_generation(found))


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


def _call(function: Callable[..., Tensor], inputs: Inputs, gradient: Tensor, *, backward: bool) -> Call:
    """``function`` of the inputs, called as Workload does: for the output, or that and every argument's gradient."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(**inputs)]

    def forward_backward() -> list[Tensor]:
        with torch.enable_grad():
            out = function(**inputs)
        return [out.detach(), *torch.autograd.grad(out, _tensors(inputs), gradient)]

    return forward_backward if backward else forward


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [t for value in inputs.values() for t in (value if isinstance(value, tuple) else (value,))]


def _definition(workload: Workload) -> Callable[..., Tensor]:
    function, options = getattr(kernels.reference, workload.operator), dict(workload.options)

    def definition(**inputs: Any) -> Tensor:
        return function(**inputs, **options)

    return definition


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


def _contmix_chain(options: dict[str, Any], backend: str) -> Callable[..., Tensor]:
    return lambda **inputs: on_backend(backend, lambda: contmix_chain(**inputs, **options))()


def _span_and_involution(options: dict[str, Any], backend: str) -> Callable[..., Tensor]:
    """The span convolution, then our involution2d."""
    shape = (options["groups"], options["kernel_size"], options["kernel_size"])

    def chain(*, x, features, weight, bias) -> Tensor:
        kernel = F.conv2d(features, weight[:, :, None, None], bias).unflatten(1, shape)
        with kernels.use_backend(backend):
            return kernels.involution2d(x, kernel)

    return chain


# Fused operators, and the chain on our own kernels that each replaces.
UNFUSED = {"contmix2d": _contmix_chain, "involution2d_generate": _span_and_involution}


@dataclass(frozen=True)
class OperatorBench:
    """How the operators of one run are measured.

    ``seconds`` are spent on timing a row; ``compiler`` is torch.compile's backend, None to leave compiling out;
    ``ceilings`` are those of ``ceilings.measure_ceilings``.
    """

    device: torch.device
    dtype: torch.dtype
    ceilings: dict[str, float]
    backend: str = "auto"
    compiler: str | None = "inductor"
    seconds: float = 0.5
    min_runs: int = 5

    def contenders(self, workload: Workload, inputs: Inputs, gradient: Tensor, *, backward: bool) -> dict[str, Call]:
        """Ours first, then what it is compared with: calls that return the output (and gradients)."""
        run = workload.forward_backward if backward else workload.forward
        definition = _definition(workload)
        functions: dict[str, tuple[Callable[..., Tensor], Inputs]] = {"naive": (definition, inputs)}
        if workload.operator == "depthwise_conv2d":  # PyTorch's convolution in its other memory layout
            x = inputs["x"].detach().contiguous().requires_grad_()
            functions["channels_first"] = definition, {**inputs, "x": x}
        if workload.operator in UNFUSED:
            functions["unfused"] = UNFUSED[workload.operator](dict(workload.options), self.backend), inputs
        if self.compiler is not None:
            functions["compiled"] = torch.compile(definition, dynamic=False, backend=self.compiler), inputs
        calls = {name: _call(*given, gradient, backward=backward) for name, given in functions.items()}
        return {"ours": on_backend(self.backend, lambda: run(inputs, gradient)), **calls}

    def compile_only(self, workload: Workload, *, backward: bool) -> None:
        """Run the compiled contender once, which leaves its code in the caches on disk."""
        inputs, gradient = self._draw(workload)
        if self._too_large(workload, backward) is None:
            self.contenders(workload, inputs, gradient, backward=backward)["compiled"]()

    def _draw(self, workload: Workload) -> tuple[Inputs, Tensor]:
        return workload.draw_inputs(self.dtype, self.device), workload.draw_gradient(self.dtype, self.device)

    def measure(self, workload: Workload, *, backward: bool) -> dict[str, Any]:
        """Check every contender, then time it. A contender that cannot run, or disagrees, is left out with the reason.

        Where the definition does not fit in the GPU's memory, ours is held against the eager path, in float32 as well.

        Raises:
            DisagreementError: our output or a gradient is not that of the definition; nothing was timed then.
        """
        inputs, gradient = self._draw(workload)
        calls = self.contenders(workload, inputs, gradient, backward=backward)
        too_large = self._too_large(workload, backward)
        against = "reference" if too_large is None else "eager"
        run = workload.forward_backward if backward else workload.forward
        gradient = gradient.to(torch.promote_types(self.dtype, torch.float32))
        expected = on_backend(against, functools.partial(run, workloads.upcast(inputs), gradient))()

        tolerance, what = tolerances.GRADIENT[self.dtype], "output and gradients" if backward else "output"
        agreement = {"against": against, **check(largest_error(calls["ours"](), expected), tolerance, what)}
        left_out = {name: too_large for name in ("naive", "compiled") if name in calls and too_large is not None}
        for name in [name for name in calls if name != "ours" and name not in left_out]:
            reason = why_not(calls[name], expected, tolerances.CHAIN * tolerance, what)
            if reason is not None:
                left_out[name] = reason
        del expected
        timed = self._timed(workload, {n: c for n, c in calls.items() if n not in left_out}, backward=backward)
        return {**agreement, "left_out": left_out, **timed}

    def _too_large(self, workload: Workload, backward: bool) -> str | None:
        if self.device.type != "cuda":
            return None
        needed, free = naive_bytes(workload, self.dtype, backward=backward), torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return None if needed < free else f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"

    def _timed(self, workload: Workload, calls: dict[str, Call], *, backward: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"contenders": time_and_memory(calls, self.device, self.seconds, self.min_runs)}
        best = {name: found["p50_ms"] for name, found in row["contenders"].items()}
        if self.device.type == "cuda" and best["ours"] < GRAPH_BELOW_MS:
            graphs = dict(_graphs(calls))
            if "ours" in graphs:
                replayed = timing.measure(graphs, self.device, seconds=self.seconds, min_runs=self.min_runs)
                row["graph"] = {name: asdict(found) for name, found in replayed.items()}
                best = {name: found.p50_ms for name, found in replayed.items()}
        floor_bytes = workload.floor_bytes(self.dtype, backward=backward)
        operations = workload.operations(backward=backward)
        memory_ms = 1000 * floor_bytes / self.ceilings["copy_bytes_per_second"]
        rates = {name: self.ceilings[f"{name}_operations_per_second"] for name in ("bf16", "fp32")}
        operations_ms = 1000 * operations / max(rates.values())  # on whichever unit is the fastest
        floor_ms = max(memory_ms, operations_ms)
        row["floor"] = {
            "bytes": floor_bytes,
            "memory_ms": memory_ms,
            "operations": operations,
            "operations_ms": operations_ms,
            "fp32_operations_ms": 1000 * operations / rates["fp32"],
            "ms": floor_ms,
            "fraction": floor_ms / best["ours"],
        }
        row["speed_up"] = {name: time / best["ours"] for name, time in best.items() if name != "ours"}
        return row


def why_not(call: Call, expected: list[Tensor], tolerance: float, what: str) -> str | None:
    """Why a contender cannot be compared with: it fails, or computes something else. None where it can."""
    try:
        check(largest_error(call(), expected), tolerance, what)
    except Exception as error:  # out of memory, a compiler that gives up: one contender less
        return one_line(error)
    return None


def _graphs(calls: dict[str, Call]) -> Iterator[tuple[str, Callable[[], None]]]:
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
