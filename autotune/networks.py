"""A model against itself on the naive path, and against what a compiler makes of it.

Both paths must agree in float32; in another precision, which rounds at every layer, ours may round as much as naive's.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autotune import timing
from autotune.measure import (
    Call,
    Settings,
    check,
    in_turns,
    largest_error,
    leave_out,
    on_backend,
    ratios,
    time_and_memory,
)
from kernels import tolerances

CHECKED_BATCH = 2  # images with which a model is checked


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
    peer: nn.Module | None = None,
) -> dict[str, Any]:
    """Check a float32 model on its first images, then time it in the precision asked for, to which it is converted.

    A contender that cannot run is left out with the reason. ``compiled``: what the compiler makes of the model takes
    part; for ``latency`` as CUDA graphs on a GPU, where launching hundreds of small kernels one by one takes longer
    than running them. ``peer``, another network on the same images, is timed beside it, and compiled where ours is.

    Raises:
        DisagreementError: our logits or gradients are not those of the naive path; nothing was timed then.
    """
    model.train(training)
    agreement = {} if settings.compile_only else _agreement(model, images[:CHECKED_BATCH], settings, training)
    timed, timed_images = model.to(settings.dtype), images.to(settings.dtype)
    one_pass = model_pass(timed, timed_images, training=training)
    calls = {"ours": on_backend(settings.backend, one_pass), "naive": on_backend("reference", one_pass)}
    modules: dict[str, Any] = {"compiled": timed}
    if peer is not None:
        modules["peer_compiled"] = peer.to(settings.dtype)
        calls["peer"] = model_pass(peer, timed_images, training=training)
    if compiled and settings.compiler is not None:
        mode = "reduce-overhead" if latency and settings.compiler == "inductor" else None
        for name, module in modules.items():
            module: Any = torch.compile(module, dynamic=False, backend=settings.compiler, mode=mode)
            calls[name] = on_backend(settings.backend, model_pass(module, timed_images, training=training))
    if settings.compile_only:
        for name in modules.keys() & calls.keys():
            calls[name]()
        return {}
    # Two results in the timed precision, each that far from the exact one, and some room for another batch.
    bound = 4 * max(agreement["rounding"], agreement["tolerance"])

    def judged(name: str, original: str = "ours") -> dict[str, str]:
        if name not in calls:
            return {}
        pair: dict[str, Call] = {"ours": functools.partial(_joined, calls[original])}
        pair[name] = functools.partial(_joined, calls[name])
        reasons = leave_out(pair, pair["ours"](), bound, "logits or gradients")
        return {name: reason for name, reason in reasons.items() if calls.pop(name)}

    with batch_norms_held(timed):
        left_out = judged("naive")
    # Not with batch norms held, for which they would be compiled again.
    left_out |= judged("compiled") | judged("peer_compiled", "peer")
    found = time_and_memory(calls, settings, in_turns if settings.thorough else timing.measure)
    for times in found.values():
        times["images_per_second"] = 1000 * images.shape[0] / times["p50_ms"]
    speed_up = ratios(found)
    if {"compiled", "peer_compiled"} <= found.keys():  # like with like
        speed_up["peer_compiled"] = found["peer_compiled"]["p50_ms"] / found["compiled"]["p50_ms"]
    return {**agreement, "contenders": found, "left_out": left_out, "speed_up": speed_up}
