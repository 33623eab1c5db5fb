"""Our path against the naive unfold path: check that both agree, then time them and take their peak memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import kernels
from autotune import timing, workloads
from autotune.workloads import Size, Workload
from kernels import tolerances

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "DisagreementError",
    "Settings",
    "batch_norms_held",
    "compare_paths",
    "inference_pass",
    "joined",
    "measure_model",
    "measure_module",
    "measure_operator",
    "on_backend",
    "one_line",
    "time_and_memory",
    "training_pass",
]

Call = Callable[[], list[Tensor]]

# An operator is held against the naive path in float32 (float64 in float64), so that the bound is on our rounding
# alone, a model against itself on the naive path in float32. In any other precision both paths round at every layer,
# and a bound has to come from the model itself.


class DisagreementError(Exception):
    """The two paths computed different things."""


def one_line(error: Exception) -> str:
    """What an error says, for a cell of a table: a disagreement speaks for itself, others with their type."""
    text = str(error) if isinstance(error, DisagreementError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


@dataclass(frozen=True)
class Settings:
    """How everything in one run is measured.

    ``backend`` is our path's; ``seconds`` are spent on timing each line, but every path runs ``min_runs`` times.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    batch: int = 1
    seconds: float = 1.0
    min_runs: int = 5


def on_backend(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a function that runs on ``backend``, whichever is selected otherwise."""

    def wrapped() -> Any:
        with kernels.use_backend(backend):
            return call()

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


def time_and_memory(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, min_runs: int
) -> dict[str, dict[str, Any]]:
    """Percentiles and runs of each call as ``timing.measure`` takes them, and its ``peak_bytes``."""
    peaks = {name: timing.peak_memory(call, device) for name, call in calls.items()}
    times = timing.measure(calls, device, seconds=seconds, min_runs=min_runs)
    return {name: asdict(found) | {"peak_bytes": peaks[name]} for name, found in times.items()}


def compare_paths(call: Callable[[], Any], settings: Settings) -> dict[str, Any]:
    """Times and peak memory of ``call`` on our path and on the naive one, and the ratio of the medians."""
    calls = {"ours": on_backend(settings.backend, call), "naive": on_backend("reference", call)}
    found: dict[str, Any] = {**time_and_memory(calls, settings.device, settings.seconds, settings.min_runs)}
    return found | {"speed_up": found["naive"]["p50_ms"] / found["ours"]["p50_ms"]}


def measure_operator(
    workload: Workload, settings: Settings, *, backward: bool, bytes_per_second: float
) -> dict[str, Any]:
    """Check one operator, time it, and hold its time against the memory floor, ``floor_bytes`` at that speed.

    Raises:
        DisagreementError: an output or gradient is not that of the naive path; nothing was timed then.
    """
    inputs = workload.draw_inputs(settings.dtype, settings.device)
    gradient = workload.draw_gradient(settings.dtype, settings.device)
    run = workload.forward_backward if backward else workload.forward
    exact, exact_gradient = workloads.upcast(inputs), gradient.to(torch.promote_types(settings.dtype, torch.float32))
    agreement = check(
        largest_error(
            on_backend(settings.backend, lambda: run(inputs, gradient))(),
            on_backend("reference", lambda: run(exact, exact_gradient))(),
        ),
        tolerances.GRADIENT[settings.dtype],
        "output and gradients" if backward else "output",
    )
    compared = compare_paths(lambda: run(inputs, gradient), settings)
    floor_bytes = workload.floor_bytes(settings.dtype, backward=backward)
    floor_ms = 1000 * floor_bytes / bytes_per_second
    return {
        **agreement,
        **compared,
        "operations": workload.operations(backward=backward),
        "floor": {"bytes": floor_bytes, "ms": floor_ms, "fraction": floor_ms / compared["ours"]["p50_ms"]},
    }


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


def measure_model(name: str, size: Size, photo: Image.Image, settings: Settings, *, training: bool) -> dict[str, Any]:
    """``measure_module`` of one of our models, with random weights, on the photograph."""
    model = workloads.photograph_model(name, photo).to(settings.device)
    images = workloads.image_batch(photo, size, settings.batch, torch.float32, settings.device)
    return measure_module(model, images, settings, training=training)


def measure_module(model: nn.Module, images: Tensor, settings: Settings, *, training: bool) -> dict[str, Any]:
    """Check a model in float32 and in the precision to be timed, to which it is converted, then time it.

    Raises:
        DisagreementError: logits or gradients are not those of the naive path; nothing was timed then.
    """
    one_pass = training_pass if training else inference_pass
    what, tolerance = ("gradients", tolerances.MODEL_GRADIENT) if training else ("logits", tolerances.LOGITS)
    call = one_pass(model.train(training), images)

    def results(backend: str) -> list[Tensor]:
        return on_backend(backend, lambda: joined(call))()

    with batch_norms_held(model):
        exact = results("reference")
        agreement = check(largest_error(results(settings.backend), exact), tolerance, f"{what} in float32")
        if settings.dtype != torch.float32:
            call = one_pass(model.to(settings.dtype), images.to(settings.dtype))
            tolerance = tolerances.OTHER_PRECISION * largest_error(results("reference"), exact)
            agreement = check(largest_error(results(settings.backend), exact), tolerance, what)
        del exact
    compared = compare_paths(call, settings)
    return {**agreement, **compared, "images_per_second": 1000 * settings.batch / compared["ours"]["p50_ms"]}


def inference_pass(model: nn.Module, images: Tensor) -> Call:
    """A call that returns the logits."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return _floating(model(images))

    return call


def training_pass(model: nn.Module, images: Tensor) -> Call:
    """Forward and backward, without an optimiser: a call that returns the loss and every parameter's gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def call() -> list[Tensor]:
        with torch.enable_grad():
            loss = torch.stack([out.float().square().mean() for out in _floating(model(images))]).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]

    return call


def joined(call: Call) -> list[Tensor]:
    """Outputs as they are, many gradients as one vector: single ones may be all but zero, and their ratio noise."""
    torch.manual_seed(0)  # drops and mixes the same every time
    first, *others = call()
    return [first, torch.cat([gradient.flatten() for gradient in others])] if others else [first]


def _floating(output: Any) -> list[Tensor]:
    """A model's outputs but for integer ones: logits, a dict of logits, or logits and the box of mixed tokens."""
    if isinstance(output, Tensor):
        return [output]
    return [value for value in (output.values() if isinstance(output, dict) else output) if value.is_floating_point()]
