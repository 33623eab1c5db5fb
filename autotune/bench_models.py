"""Models against the same model on the naive path, and against the peers they are measured by.

Weights are random: what is timed does not depend on them. Inference runs the form a trained model is deployed in,
``optimize_for_inference``. Before anything is timed the logits, or the loss and its gradients, of a small
batch in float32 must be those of the naive path, and what a compiler made of a model must compute what the model does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import models
from autotune import timing
from autotune.bench_operators import Call, why_not
from autotune.comparison import (
    DisagreementError,
    batch_norms_held,
    check,
    inference_pass,
    joined,
    largest_error,
    on_backend,
    one_line,
    training_pass,
)
from autotune.timing import Timing
from autotune.workloads import Size, settled_model
from kernels import tolerances

__all__ = [
    "PLANS",
    "ModelBench",
    "Plan",
    "placed",
    "random_images",
    "random_images_model",
]

Placeable = TypeVar("Placeable", nn.Module, Tensor)
CHECKED_BATCH = 2


@dataclass(frozen=True)
class Plan:
    """A model in one pass, and whom it meets: ``peer`` is (library, name), ``compiled`` has both compiled as well.

    ``latency`` measures inference of a single image, compiled for that: as CUDA graphs on a GPU, where launching its
    hundreds of small kernels one by one takes longer than running them.
    """

    model: str
    training: bool = False
    peer: tuple[str, str] | None = None
    compiled: bool = False
    latency: bool = False

    @property
    def kind(self) -> str:
        return "training" if self.training else "latency" if self.latency else "inference"


RESNET = ("torchvision", "resnet50")
CONVNEXT = ("torchvision", "convnext_tiny")
VOLO = ("timm", "volo_d1_224")
PLANS = (  # the most telling first: where time is short, the last are skipped
    Plan("overlock_t"),
    Plan("overlock_t", training=True),
    Plan("rednet50", peer=RESNET, compiled=True),
    Plan("overlock_xt", peer=CONVNEXT, compiled=True),
    Plan("volo_d1", peer=VOLO, compiled=True),
    Plan("overlock_xt", training=True, peer=CONVNEXT, compiled=True),
    Plan("rednet50", training=True, peer=RESNET, compiled=True),
    Plan("volo_d1", training=True, peer=VOLO, compiled=True),
    Plan("overlock_t", compiled=True, latency=True),
    Plan("rednet50", peer=RESNET, compiled=True, latency=True),
    Plan("volo_d1", peer=VOLO, compiled=True, latency=True),
)


def placed(what: Placeable, dtype: torch.dtype, device: torch.device, layout: torch.memory_format) -> Placeable:
    """A model or images in that precision, on that device and in that memory format."""
    return what.to(device=device, dtype=dtype).to(memory_format=layout)  # pyright: ignore[reportCallIssue, reportReturnType]


def random_images(batch: int, size: Size, seed: int = 0) -> Tensor:
    """Standard normal [B, 3, H, W], as normalised photographs roughly are."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def random_images_model(name: str, **arguments: Any) -> nn.Module:
    """A random model for ``random_images`` of any size."""
    return settled_model(name, random_images(2, (128, 128)), **arguments)


def _one_pass(plan: Plan) -> Callable[[nn.Module, Tensor], Call]:
    return training_pass if plan.training else inference_pass


@dataclass(frozen=True)
class ModelBench:
    """How the models of one run are measured; ``compiler`` is torch.compile's backend, None to leave compiling out."""

    device: torch.device
    dtype: torch.dtype
    batch: int = 128
    size: Size = (224, 224)
    backend: str = "auto"
    compiler: str | None = "inductor"
    layout: torch.memory_format = torch.channels_last
    seconds: float = 2.0
    min_runs: int = 5

    def model(self, plan: Plan) -> nn.Module:
        """Ours in float32, for inference in the form it is deployed in."""
        arguments = {"return_dense": False} if plan.model.startswith("volo") else {}  # as its peer trains
        model = random_images_model(plan.model, **arguments).train(plan.training)
        return self._placed(model if plan.training else models.optimize_for_inference(model))

    def peer(self, plan: Plan) -> nn.Module:
        """The peer in float32 with random weights. ImportError where its library is not installed."""
        assert plan.peer is not None
        library, name = plan.peer
        torch.manual_seed(0)
        if library == "timm":
            import timm  # pyright: ignore[reportMissingImports]

            model = timm.create_model(name, pretrained=False)
        else:
            import torchvision  # pyright: ignore[reportMissingImports]

            model = torchvision.models.get_model(name, weights=None)
        return self._placed(model.train(plan.training))

    def batch_of(self, plan: Plan) -> int:
        return 1 if plan.latency else self.batch

    def images(self, dtype: torch.dtype, batch: int) -> Tensor:
        return placed(random_images(batch, self.size), dtype, self.device, self.layout)

    def _placed(self, model: nn.Module) -> nn.Module:
        return placed(model, torch.float32, self.device, self.layout)

    def _timed_copy(self, model: nn.Module) -> nn.Module:
        return placed(copy.deepcopy(model), self.dtype, self.device, self.layout)

    def _with_compiled(self, name: str, model: nn.Module, plan: Plan) -> dict[str, Call]:
        """A float32 model in the timed precision, and what a compiler makes of it where the plan asks for that."""
        one_pass, images = _one_pass(plan), self.images(self.dtype, self.batch_of(plan))
        timed = self._timed_copy(model)
        calls = {name: on_backend(self.backend, one_pass(timed, images))}
        if name == "ours":
            calls["naive"] = on_backend("reference", one_pass(timed, images))
        if plan.compiled and self.compiler is not None:
            mode = "reduce-overhead" if plan.latency and self.compiler == "inductor" else None
            compiled: Any = torch.compile(timed, dynamic=False, backend=self.compiler, mode=mode)
            compiled_name = "compiled" if name == "ours" else f"{name}_compiled"
            calls[compiled_name] = on_backend(self.backend, one_pass(compiled, images))
        return calls

    def compile_only(self, plan: Plan) -> None:
        """Run the check and the compiled contenders once, which leaves all code in the caches on disk.

        The check's kernels, of float32 and of the timed type, took longer to compile than a model to measure.
        """
        with contextlib.suppress(DisagreementError):  # it will be said where it is measured
            self._agreement(self.model(plan), plan)
        sides = {"ours": self.model} | ({} if plan.peer is None else {"peer": self.peer})
        for side, build in sides.items():
            for name, call in self._with_compiled(side, build(plan), plan).items():
                if name.endswith("compiled"):
                    call()

    def _rounding(self, model: nn.Module, plan: Plan) -> float:
        """How far the timed precision is from float32 on a small batch, on the selected backend."""
        one_pass = _one_pass(plan)
        exact = joined(one_pass(model, self.images(torch.float32, CHECKED_BATCH)))
        return largest_error(joined(one_pass(self._timed_copy(model), self.images(self.dtype, CHECKED_BATCH))), exact)

    def _agreement(self, model: nn.Module, plan: Plan) -> dict[str, float]:
        """Ours against the naive path on a small batch: the same in float32, and no worse rounded in the timed one.
        ``rounding`` is how far two paths may be from each other as they are timed."""
        what, tolerance = (
            ("loss and gradients", tolerances.MODEL_GRADIENT) if plan.training else ("logits", tolerances.LOGITS)
        )
        call = _one_pass(plan)(model, self.images(torch.float32, CHECKED_BATCH))
        backends = (self.backend, "reference")

        def error() -> float:
            ours, naive = (joined(on_backend(backend, call)) for backend in backends)
            return largest_error(ours, naive)

        def rounding(backend: str) -> float:
            return on_backend(backend, lambda: self._rounding(model, plan))()

        with batch_norms_held(model):
            if plan.training:  # nor can two paths agree better than either agrees with the exact gradients
                naive = functools.partial(on_backend, "reference")
                exact = _one_pass(plan)(copy.deepcopy(model).double(), self.images(torch.float64, CHECKED_BATCH))
                tolerance = max(tolerance, 4 * largest_error(joined(naive(call)), joined(naive(exact))))
            found = check(error(), tolerance, f"{what} in float32")
            if self.dtype != torch.float32:
                ours, naive = map(rounding, backends)
                check(ours, tolerances.OTHER_PRECISION * naive, f"{what} in {self.dtype}")
        return found | {"rounding": error() if self.dtype == torch.float32 else rounding(self.backend)}

    def measure(self, plan: Plan) -> dict[str, Any]:
        """Check, then time every contender in turns; one that cannot run is left out with the reason.

        Raises:
            DisagreementError: our logits or gradients are not those of the naive path; nothing was timed then.
        """
        model = self.model(plan)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            agreement = self._agreement(model, plan)
        calls, left_out = self._with_compiled("ours", model, plan), {}
        # Two results in the timed precision, each that far from the exact one, and some room for another batch.
        bound = 4 * max(agreement["rounding"], tolerances.LOGITS)
        allowed: dict[str, float] = {"naive": bound, "compiled": bound}
        if plan.peer is not None:
            try:
                peer = self.peer(plan)
                allowed["peer_compiled"] = 4 * max(self._rounding(peer, plan), tolerances.LOGITS)
                calls |= self._with_compiled("peer", peer, plan)
            except Exception as error:  # not installed, or another version: ours is still worth its time
                left_out["peer"] = one_line(error)
        for name in [name for name in calls if name in allowed]:
            original = calls["peer" if name.startswith("peer") else "ours"]
            reason = why_not(functools.partial(joined, calls[name]), joined(original), allowed[name], name)
            if reason is not None:
                left_out[name] = reason
                del calls[name]
        peaks = {name: timing.peak_memory(call, self.device) for name, call in calls.items()}
        times = in_turns(calls, self.device, seconds=self.seconds, min_runs=self.min_runs)
        contenders = {
            name: asdict(found)
            | {"peak_bytes": peaks[name], "images_per_second": 1000 * self.batch_of(plan) / found.p50_ms}
            for name, found in times.items()
        }
        against = {"naive": "ours", "peer": "ours", "peer_compiled": "compiled"}
        speed_up = {
            other: times[other].p50_ms / times[ours].p50_ms
            for other, ours in against.items()
            if other in times and ours in times
        }
        return {**agreement, "contenders": contenders, "left_out": left_out, "speed_up": speed_up}


def in_turns(calls: dict[str, Call], device: torch.device, *, seconds: float, min_runs: int) -> dict[str, Timing]:
    """As ``timing.measure``, for calls so long that what the L2 cache holds before them does not matter.

    On a GPU a run of each follows the other in the stream, between device events.
    """
    if device.type != "cuda":
        return timing.measure(calls, device, seconds=seconds, min_runs=min_runs)
    durations = {name: _event_milliseconds([call])[0] for name, call in calls.items()}
    runs = max(min_runs, min(50, int(1000 * seconds / sum(durations.values()))))
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
