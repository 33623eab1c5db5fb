"""Every operator at the shapes at which the published models run it.

Each ``Workload`` is data: the inputs' shapes, the multiply-adds, and from them the fewest bytes that must move. Shapes
follow from the image's size, so 224² gives the classification shapes and 800×1280 those of dense prediction.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import kernels
from autotune.passes import Operations

Inputs = dict[str, Any]  # argument -> Tensor, or a tuple of tensors
Size = tuple[int, int]


@dataclass(frozen=True)
class Input:
    """A tensor argument: normal with deviation ``std``; ``channels_last`` puts its channels, all dimensions between the
    batch and H×W, innermost in memory (``torch.channels_last`` for four dimensions)."""

    shape: tuple[int, ...]
    std: float = 1.0
    channels_last: bool = False

    def draw(self, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = self.std * torch.randn(self.shape, generator=generator, device=device)
        if self.channels_last:
            tensor = tensor.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))
        return tensor.to(dtype).requires_grad_()


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Workload:
    """One operator at one shape of one model.

    ``inputs`` maps each tensor argument to its ``Input`` (a tuple of them where the argument is a tuple of tensors),
    ``options`` holds the other arguments. ``part``, a function of the inputs, runs in place of the operator: part of a
    model that is none. What is not ``trained`` has no backward pass.
    """

    operator: str
    model: str
    shape: str
    inputs: Mapping[str, Any]
    output: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    part: Callable[..., Any] | None = None
    trained: bool = True

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.operator, self.model, self.shape)))

    @property
    def facts(self) -> dict[str, Any]:
        """What a row of results says of it."""
        return {"name": self.name, "operator": self.operator, "model": self.model, "shape": self.shape}

    @property
    def function(self) -> Callable[..., Any]:
        """What is run, of the inputs by name."""
        return self.part or functools.partial(getattr(kernels, self.operator), **self.options)

    def draw_inputs(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random tensors that require gradients, the same every time on the same device."""
        generator = _generator(device, 0)
        return tree_map(lambda spec: spec.draw(generator, dtype, device), self.inputs)

    def draw_gradient(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A random gradient of the output, in the memory format of the first input, as the output is."""
        first = tree_leaves(self.inputs)[0]
        spec = Input(self.output, channels_last=first.channels_last)
        return spec.draw(_generator(device, 1), dtype, device).detach()

    def run(self, inputs: Inputs, gradient: Tensor | None = None, backend: str | None = None) -> list[Tensor]:
        """The output; given its gradient, also that of every tensor argument. ``backend``: not the selected one."""
        with kernels.use_backend(backend or kernels.get_backend()), torch.set_grad_enabled(gradient is not None):
            out = self.function(**inputs)
        if gradient is None:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, tree_leaves(inputs), gradient)]

    def call(self, dtype: torch.dtype, device: torch.device) -> Callable[[], list[Tensor]]:
        """A forward and, where it is trained, a backward pass on random tensors."""
        gradient = self.draw_gradient(dtype, device) if self.trained else None
        return functools.partial(self.run, self.draw_inputs(dtype, device), gradient)

    @property
    def multiply_adds(self) -> int:
        """Those of the forward pass, by the operator's own formula. ValueError for a shape that it does not take."""
        meta = tree_map(lambda spec: torch.empty(spec.shape, device="meta"), self.inputs)
        with kernels.use_backend("eager"), Operations() as ran:
            getattr(kernels, self.operator)(**meta, **self.options)
        return ran.count // 2

    def floor_bytes(self, dtype: torch.dtype, *, backward: bool = False) -> int:
        """Fewest bytes to move, forward or forward and backward."""
        inputs = sum(math.prod(spec.shape) for spec in tree_leaves(self.inputs))
        return dtype.itemsize * least_bytes(inputs, math.prod(self.output), backward=backward)

    def operations(self, *, backward: bool = False) -> int:
        """Two per multiply-add; a backward pass does the forward's twice, once for each factor's gradient."""
        return 2 * self.multiply_adds * (3 if backward else 1)


def least_bytes(inputs: int, output: int, *, backward: bool) -> int:
    """Fewest bytes to move: each input read once and each output written once, in each of the two passes.

    A backward pass reads the inputs and the output's gradient, and writes the gradient of every input.
    """
    return 3 * inputs + 2 * output if backward else inputs + output


def _text(size: Size) -> str:
    return f"{size[0]}²" if size[0] == size[1] else f"{size[0]}×{size[1]}"


def involution(model: str, batch: int, channels: int, size: Size, kernel_size: int, group_channels: int) -> Workload:
    image = (batch, channels, *size)
    weight = (batch, channels // group_channels, kernel_size, kernel_size, *size)
    inputs = {"x": Input(image), "weight": Input(weight)}
    shape = f"{channels}@{_text(size)} K={kernel_size}"
    return Workload("involution2d", model, shape, inputs, image)


def neighborhood(operator: str, model: str, batch: int, heads: int, dim: int, size: Size, kernel_size: int) -> Workload:
    """``na2d_av``, ``na2d_qk`` or ``na2d_softmax_av``."""
    features, weights = Input((batch, heads, *size, dim)), Input((batch, heads, *size, kernel_size**2))
    rpb = Input((heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
    inputs = {
        "na2d_av": {"attn": weights, "value": features},
        "na2d_qk": {"query": features, "key": features},
        "na2d_softmax_av": {"logits": weights, "value": features, "rpb": rpb},
    }[operator]
    shape, output = f"{heads}×{dim}@{_text(size)} K={kernel_size}", weights if operator == "na2d_qk" else features
    return Workload(operator, model, shape, inputs, output.shape, {"kernel_size": kernel_size})


def contmix(
    model: str, batch: int, heads: int, dim: int, size: Size, kernel_sizes: tuple[int, int], context: int = 49
) -> Workload:
    positions, value = sum(k * k for k in kernel_sizes), (batch, len(kernel_sizes), heads, dim, *size)
    inputs = {
        # Deviations that leave logits of deviation 1, as far from a one-hot softmax as from a flat one.
        "query": Input((batch, heads, dim, *size), std=dim**-0.5, channels_last=True),
        "key": Input((batch, heads, dim, context)),
        "value": Input(value, channels_last=True),
        "proj_weight": Input((positions, context), std=context**-0.5),
        "proj_bias": Input((positions,)),
        "rpb": tuple(Input((heads, 2 * k - 1, 2 * k - 1)) for k in kernel_sizes),
    }
    shape = f"{heads}×{dim}@{_text(size)} K={','.join(map(str, kernel_sizes))}"
    return Workload("contmix2d", model, shape, inputs, value, {"kernel_sizes": kernel_sizes})


def outlook(model: str, batch: int, heads: int, dim: int, size: Size, kernel_size: int, stride: int) -> Workload:
    windows = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    image = (batch, *size, heads * dim)
    inputs = {"logits": Input((batch, *windows, heads, kernel_size**2, kernel_size**2)), "value": Input(image)}
    shape = f"{heads}×{dim}@{_text(size)} K={kernel_size} s={stride}"
    options = {"kernel_size": kernel_size, "stride": stride, "padding": kernel_size // 2, "scale": 1.0}
    return Workload("outlook_attention2d", model, shape, inputs, image, options)


def depthwise(model: str, batch: int, channels: int, size: Size, kernel_size: int) -> Workload:
    image, weight = (batch, channels, *size), (channels, 1, kernel_size, kernel_size)
    inputs = {"x": Input(image, channels_last=True), "weight": Input(weight), "bias": Input((channels,))}
    shape = f"{channels}@{_text(size)} K={kernel_size}"
    return Workload("depthwise_conv2d", model, shape, inputs, image)


def channels_last(workload: Workload, last: bool = True) -> Workload:
    """The same with every input in ``torch.channels_last``, in which RedNet has its maps, or with none."""
    return replace(workload, inputs=tree_map(lambda spec: replace(spec, channels_last=last), workload.inputs))


def generation(workload: Workload) -> Workload:
    """The involution that generates its kernels from RedNet's C/4 features, for one that is given them."""
    batch, channels, *size = workload.output
    x, weight = tree_leaves(workload.inputs)
    groups, kernel_size = weight.shape[1:3]
    rows, features = groups * kernel_size**2, channels // 4
    inputs = {
        "x": x,
        "features": Input((batch, features, *size), channels_last=x.channels_last),
        "weight": Input((rows, features), std=features**-0.5),
        "bias": Input((rows,)),
    }
    options = {"kernel_size": kernel_size, "groups": groups}
    return replace(workload, operator="involution2d_generate", inputs=inputs, options=options)


def workload_of(operator: str, *, batch: int, channels: int, size: Size, kernel_size: int) -> Workload:
    """An operator at a shape of one's own, with as many channels per group or head as its model has.

    These are 16, in VOLO's outlook attention (whose stride is 2) 32. ContMix has a second kernel of 5×5, and half of
    the channels for each.

    Raises:
        ValueError: no operator has that name, or it does not take that shape.
    """
    for name, value in (("batch", batch), ("channels", channels), ("kernel_size", kernel_size), ("size", min(size))):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if operator not in OPERATORS:
        raise ValueError(f"operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    build, multiple = OPERATORS[operator]
    if channels % multiple:
        raise ValueError(f"channels must be a multiple of {multiple} for {operator}, got {channels}")
    workload = build(batch, channels, size, kernel_size)
    try:
        workload.operations()
    except ValueError as error:
        raise ValueError(f"kernel_size {kernel_size} at size {_text(size)} does not suit {operator}: {error}") from None
    return workload


Build = Callable[[int, int, Size, int], Workload]
# name -> workload from batch, channels, size and kernel size; and what the channels must be a multiple of
OPERATORS: dict[str, tuple[Build, int]] = {
    "involution2d": (lambda b, c, s, k: involution("", b, c, s, k, 16), 16),
    "involution2d_generate": (lambda b, c, s, k: generation(involution("", b, c, s, k, 16)), 16),
    **{
        name: (lambda b, c, s, k, name=name: neighborhood(name, "", b, c // 16, 16, s, k), 16)
        for name in ("na2d_av", "na2d_qk", "na2d_softmax_av")
    },
    "contmix2d": (lambda b, c, s, k: contmix("", b, c // 32, 16, s, (5, k)), 32),
    "outlook_attention2d": (lambda b, c, s, k: outlook("", b, c // 32, 32, s, k, 2), 32),
    "depthwise_conv2d": (lambda b, c, s, k: depthwise("", b, c, s, k), 1),
}


def operator_workloads(batch: int, image: Size = (224, 224)) -> list[Workload]:
    """Every operator as RedNet-50, OverLoCK-T and VOLO-D1 call it for images of that size, in their memory formats.

    Involutions come with given kernels, too, at RedNet's shapes. OverLoCK enlarges a map that is smaller than the
    dynamic kernel, and so do these shapes.
    """

    def at(reduction: int, minimum: int = 1) -> Size:
        return max(minimum, math.ceil(image[0] / reduction)), max(minimum, math.ceil(image[1] / reduction))

    stages = [(64, at(4), 17), (128, at(8), 15), (256, at(16), 13), (512, at(32), 7)]
    focus: list[tuple[int, Size, int]] = [(8, at(16, 13), 13), (16, at(32, 7), 7)]
    heads, size, kernel_size = focus[0]
    given = [channels_last(involution("RedNet-50", batch, channels, size, 7, 16)) for channels, size, _ in stages]
    return [
        *given,
        *map(generation, given),
        neighborhood("na2d_av", "OverLoCK-T", batch, heads, 16, size, kernel_size),
        neighborhood("na2d_qk", "OverLoCK-T", batch, heads, 16, size, kernel_size),
        *(neighborhood("na2d_softmax_av", "OverLoCK-T", batch, heads, 16, size, k) for heads, size, k in focus),
        *(contmix("OverLoCK-T", batch, heads, 16, size, (5, k)) for heads, size, k in focus),
        outlook("VOLO-D1", batch, 6, 32, at(8), 3, 2),
        *(depthwise("OverLoCK-T", batch, channels, size, k) for channels, size, k in stages),
    ]


def benchmark_workloads(batch: int | None = None, size: Size | None = None, *, quick: bool = False) -> list[Workload]:
    """The operators at the models' own shapes: batch 128 at 224², then batch 2 at 800×1280; or at the shape given.

    ``quick`` takes one tiny shape of each operator instead.
    """
    if quick:
        return [workload_of(name, batch=1, channels=32, size=(6, 5), kernel_size=3) for name in OPERATORS]
    if size is not None:
        return operator_workloads(batch or 128, size)
    return [*operator_workloads(batch or 128, (224, 224)), *operator_workloads(batch or 2, (800, 1280))]
