"""Models that are measured, what they see, and how: against the naive path, and what a compiler makes of them.

Both paths must agree in float32; in another precision, which rounds at every layer, ours may round as much as naive's.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import models
from autotune import timing
from autotune.measure import Settings, check, in_turns, largest_error, leaving_out, ratios, time_and_memory
from autotune.passes import Pass, layers_held
from autotune.results import BUSY
from autotune.workloads import Size
from kernels import tolerances
from models._contract import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:  # a GPU machine measures without a photograph
    from pathlib import Path

    from PIL import Image

CHECKED_BATCH = 2  # images with which a model is checked


def _agreement(model: nn.Module, images: Tensor, settings: Settings, training: bool) -> dict[str, float]:
    """Ours against the naive path on a small batch: the same in float32, and no worse rounded in the timed precision.

    ``rounding`` is how far two paths may be from each other as they are timed.
    """
    tolerance = tolerances.MODEL_GRADIENT if training else tolerances.LOGITS
    what = "logits and gradients" if training else "logits"

    def results(backend: str, model: nn.Module, images: Tensor) -> list[Tensor]:
        return Pass(model, [images], backward=training, backend=backend, held=[model], squared=True).checked()

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
    alone: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Check a float32 model on its first images, then time it in the precision asked for, to which it is converted.

    A contender that cannot run is left out with the reason. ``compiled``: what the compiler makes of the model takes
    part; for ``latency`` as CUDA graphs on a GPU, where launching hundreds of small kernels one by one takes longer
    than running them, and every call begins on an idle device. ``peer``, another network on the same images, is timed
    beside it, and compiled where ours is. ``training``: the gradients of all weights as well, without an optimiser.
    ``alone`` is called when all is compiled, and returns when no other process disturbs what follows.

    Raises:
        DisagreementError: our logits or gradients are not those of the naive path; nothing was timed then.
    """
    model.train(training)
    agreement = {} if settings.compile_only else _agreement(model, images[:CHECKED_BATCH], settings, training)
    timed, images = model.to(settings.dtype), images.to(settings.dtype)

    def one_pass(module: Any, backend: str = settings.backend, images: Tensor = images) -> Pass:
        return Pass(module, [images], backward=training, backend=backend, squared=True)

    calls = {"ours": one_pass(timed), "naive": one_pass(timed, "reference")}
    modules: dict[str, Any] = {"compiled": timed}
    if peer is not None:
        modules["peer_compiled"] = peer.to(settings.dtype)
        calls["peer"] = one_pass(peer)
    if compiled and settings.compiler is not None:
        mode = "reduce-overhead" if latency and settings.compiler == "inductor" else None
        for name, module in modules.items():
            calls[name] = one_pass(torch.compile(module, dynamic=False, backend=settings.compiler, mode=mode))
    for name in modules.keys() & calls.keys():
        with contextlib.suppress(Exception):  # it will say why when it is compared
            calls[name]()
    if settings.compile_only:
        return {}
    if images.is_cuda:
        torch.cuda.empty_cache()  # others may need the memory
    alone()
    left_out: dict[str, str] = {}
    wider = torch.float32 if settings.dtype.itemsize < 4 else torch.float64

    def judge(name: str, module: Any = timed, original: str = "ours") -> None:
        """Leave a contender out if it is farther from the results in a wider precision than rounding explains: four
        times as far as ``original``, the same run eagerly. Our path and the naive one bound each other."""
        if name in calls:
            with leaving_out(name, calls, left_out):
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    exact = one_pass(copy.deepcopy(module).to(wider), images=images.to(wider)).checked()
                errors = [largest_error(calls[each].checked(), exact) for each in (name, original)]
                error, own = sorted(errors, reverse=True) if name == "naive" else errors
                check(error, max(tolerances.CHAIN * agreement["tolerance"], 4 * own), "logits or gradients")

    with layers_held([timed]):
        judge("naive")
    # Not with layers held, for which they would be compiled again.
    judge("compiled")
    judge("peer_compiled", peer, "peer")
    turns = functools.partial(in_turns, idle=latency)
    found = time_and_memory(calls, settings, turns if settings.thorough else timing.measure)
    for name, times in found.items():
        times["images_per_second"] = 1000 * images.shape[0] / times["p50_ms"]
        if name in BUSY:
            times["busy_ms"] = timing.busy_milliseconds(calls[name], settings.device)
    speed_up = ratios(found)
    if {"compiled", "peer_compiled"} <= found.keys():  # like with like
        speed_up["peer_compiled"] = found["peer_compiled"]["p50_ms"] / found["compiled"]["p50_ms"]
    return {**agreement, "contenders": found, "left_out": left_out, "speed_up": speed_up}


def photograph(path: Path | None = None) -> Image.Image:
    """A file's photograph in RGB; without one the portrait of Grace Hopper that matplotlib ships."""
    from matplotlib.cbook import get_sample_data

    from models.commands.images import read_image

    return read_image(path or get_sample_data("grace_hopper.jpg", asfileobj=False))


def image_batch(photo: Image.Image, size: Size, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The photograph resized and centre-cropped to (height, width), ImageNet-normalised, repeated: [B, 3, H, W]."""
    from models.commands.images import Preprocessing

    prepared = Preprocessing(size, 1.0, "bicubic", IMAGENET_MEAN, IMAGENET_STD)(photo)
    return prepared.repeat(batch, 1, 1, 1).to(device=device, dtype=dtype)


def random_model(name: str, **arguments: Any) -> nn.Module:
    """A model with random weights of which none is zero.

    Initialisations start some weights at zero (the last batch norm of a RedNet block, position biases), which would
    leave their branches, and any mistake inside them, out of the output.
    """
    torch.manual_seed(0)
    model = models.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def settled_model(name: str, images: Tensor, **arguments: Any) -> nn.Module:
    """A random model, in evaluation mode, whose batch norms have the statistics of ``images`` (several pixels per map).

    Activations then keep their size from layer to layer, as in a trained model. Fresh batch norms normalise nothing: an
    involution squares its input, and in RedNet-50 activations overflow.
    """
    model = random_model(name, **arguments).eval()
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return model


def random_images(batch: int, size: Size) -> Tensor:
    """Standard normal [B, 3, H, W], as normalised photographs roughly are."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
