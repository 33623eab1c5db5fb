"""A model against itself on the naive path, and against what a compiler makes of it.

Both paths must agree in float32; in another precision, which rounds at every layer, ours may round as much as naive's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from autotune import timing
from autotune.measure import Settings, check, in_turns, largest_error, one_line, ratios, time_and_memory
from autotune.passes import Pass, batch_norms_held
from kernels import tolerances

CHECKED_BATCH = 2  # images with which a model is checked


def _agreement(model: nn.Module, images: Tensor, settings: Settings, training: bool) -> dict[str, float]:
    """Ours against the naive path on a small batch: the same in float32, and no worse rounded in the timed precision.

    ``rounding`` is how far two paths may be from each other as they are timed.
    """
    tolerance = tolerances.MODEL_GRADIENT if training else tolerances.LOGITS
    what = "logits and gradients" if training else "logits"

    def results(backend: str, model: nn.Module, images: Tensor) -> list[Tensor]:
        return Pass(model, [images], backward=training, backend=backend, held=[model]).checked()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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
    ``training``: the gradients of all weights as well, without an optimiser.

    Raises:
        DisagreementError: our logits or gradients are not those of the naive path; nothing was timed then.
    """
    model.train(training)
    agreement = {} if settings.compile_only else _agreement(model, images[:CHECKED_BATCH], settings, training)
    timed, inputs = model.to(settings.dtype), [images.to(settings.dtype)]

    def one_pass(module: Any, backend: str = settings.backend) -> Pass:
        return Pass(module, inputs, backward=training, backend=backend)

    calls = {"ours": one_pass(timed), "naive": one_pass(timed, "reference")}
    modules: dict[str, Any] = {"compiled": timed}
    if peer is not None:
        modules["peer_compiled"] = peer.to(settings.dtype)
        calls["peer"] = one_pass(peer)
    if compiled and settings.compiler is not None:
        mode = "reduce-overhead" if latency and settings.compiler == "inductor" else None
        for name, module in modules.items():
            calls[name] = one_pass(torch.compile(module, dynamic=False, backend=settings.compiler, mode=mode))
    if settings.compile_only:
        for name in modules.keys() & calls.keys():
            calls[name]()
        return {}
    # Two results in the timed precision, each that far from the exact one, and some room for another batch.
    bound = 4 * max(agreement["rounding"], agreement["tolerance"])
    left_out: dict[str, str] = {}

    def judge(name: str, original: str = "ours") -> None:
        if name in calls:
            try:
                check(largest_error(calls[name].checked(), calls[original].checked()), bound, "logits or gradients")
            except Exception as error:  # out of memory, a compiler that gives up: one contender less
                left_out[name] = one_line(error)
                del calls[name]

    with batch_norms_held([timed]):
        judge("naive")
    # Not with batch norms held, for which they would be compiled again.
    judge("compiled")
    judge("peer_compiled", "peer")
    found = time_and_memory(calls, settings, in_turns if settings.thorough else timing.measure)
    for times in found.values():
        times["images_per_second"] = 1000 * images.shape[0] / times["p50_ms"]
    speed_up = ratios(found)
    if {"compiled", "peer_compiled"} <= found.keys():  # like with like
        speed_up["peer_compiled"] = found["peer_compiled"]["p50_ms"] / found["compiled"]["p50_ms"]
    return {**agreement, "contenders": found, "left_out": left_out, "speed_up": speed_up}
