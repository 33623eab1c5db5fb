"""What the families share: construction, feature maps, and the methods that training scripts written for timm call.

A family derives from ``BackboneContract`` and provides

* ``paper``: the number in the arXiv under which it was published;
* ``stages``: the modules and parameters of each feature map that no earlier map needs; then those of the head;
* ``classifiers``: module name of each classifier -> its number of input features, the main one first;
* ``_forward_stages(x, last)`` and ``forward_head(x, pre_logits=False)``;
* ``group_matcher``, and where it differs: ``no_weight_decay``, ``adapt_state_dict``, ``return_plain_logits``,
  ``folded`` (its inference form), ``global_pools``, ``fixed_input_size``, ``training_only``, ``plain_options``.
"""

import numbers
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from kernels.backend import under_autocast
from models.checks import flag, integer, number, one_of
from models.feature_info import FeatureInfo
from models.layers.basic import initialise
from models.layers.fusion import CONVOLUTIONS, as_built

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_CLASSES = 10_000_000


def pretrained_config(**overrides: Any) -> dict[str, Any]:
    """How the official weights expect their images, in timm's vocabulary; ``overrides`` replace single entries."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.925,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "classifier": (),
    } | overrides


class Stage(nn.Sequential):
    """Blocks in sequence: each takes what the one before it returns, and ``context`` beside it.

    With gradient checkpointing each block is computed again in the backward pass.
    """

    grad_checkpointing = False

    def forward(self, input: Tensor, *context: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing and torch.is_grad_enabled():
                input = checkpoint(block, input, *context, use_reentrant=False)
            else:
                input = block(input, *context)
        return input


class BackboneContract(nn.Module):
    """Classifier, features and training switches under the names timm gives them.

    Arguments that every family takes:
        num_classes: outputs of the classifiers; 0 leaves them out, and pooled features are returned.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the last block in training, in [0, 1).
        features_only: return feature maps instead of logits.
        out_indices: which maps; a number n means the last n, None all. Stages that they do not need are not built.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range, or ``out_indices`` comes without
            ``features_only``; the message names it.
    """

    sides: ClassVar = (32, 16384)  # of an image: smallest and largest, in pixels
    fixed_input_size: ClassVar = False  # whether ``img_size`` is an argument
    global_pools: ClassVar[tuple[str, ...]] = ("avg", "")  # the poolings of forward_head, its default first
    training_only: ClassVar[tuple[str, ...]] = ()  # modules that evaluation does not use
    plain_options: ClassVar[dict[str, Any]] = {}  # with which training returns logits alone, as evaluation does
    paper: ClassVar[str]
    stages: ClassVar[tuple[tuple[str, ...], ...]]

    num_features: int  # channels of forward_features' output
    head_hidden_size: int  # features of forward_head(…, pre_logits=True)

    def __init__(
        self,
        maps: Sequence[tuple[str, int, int]],
        num_classes: int,
        in_chans: int,
        drop_path_rate: float,
        features_only: bool,
        out_indices: int | Sequence[int] | None,
    ) -> None:
        """``maps``: module, channels and reduction of each feature map, in depth order."""
        super().__init__()
        self.num_classes = integer("num_classes", num_classes, 0, MOST_CLASSES)
        self.in_chans = integer("in_chans", in_chans)
        self.drop_path_rate = number("drop_path_rate", drop_path_rate, 0, 1)
        self.features_only = flag("features_only", features_only)
        self.feature_info = FeatureInfo(
            {"num_chs": channels, "reduction": reduction, "module": module} for module, channels, reduction in maps
        )
        self.out_indices = list(range(len(maps)))
        if out_indices is not None:
            if not features_only:
                raise ValueError(f"out_indices needs features_only=True, got out_indices={out_indices}")
            self.out_indices = self.resolve_indices(out_indices, "out_indices")
        self.num_features = self.head_hidden_size = maps[self.out_indices[-1]][1]
        self.classifiers: dict[str, int] = {}
        self.left_out: list[str] = []  # modules and parameters of the complete model that this one lacks
        self.global_pool = self.global_pools[0]
        self.grad_checkpointing = False
        self.pretrained_cfg = pretrained_config()

    def _drop_path_rates(self, blocks: int) -> Iterator[float]:
        """The rate of each of so many blocks: they rise linearly from 0 to ``drop_path_rate``."""
        return iter(np.linspace(0, self.drop_path_rate, blocks).tolist())

    def _leave_out_unused(self, head: bool = True) -> None:
        """Removes the stages after the last feature map chosen and, with ``head``, the head."""
        last = self.out_indices[-1]
        for name in [name for stage in self.stages[last + 1 : -1] for name in stage] + list(self.stages[-1]) * head:
            parent, _, child = name.rpartition(".")
            if hasattr(self.get_submodule(parent), child):
                delattr(self.get_submodule(parent), child)
            self.left_out.append(name)
        self.feature_info = FeatureInfo(self.feature_info[: last + 1], self.out_indices)
        self.num_features = self.feature_info[-1]["num_chs"]
        if head:
            self.head_hidden_size, self.classifiers = self.num_features, {}

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    # ---- what a family provides

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        """Runs up to and including feature map ``last``.

        Returns the features at that point (after the last map: what ``forward_features`` returns) and the feature
        maps 0..last, each [B, C, H, W].
        """
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameter names by depth, for layer-wise learning rates."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay although they have several dimensions."""
        return set()

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries of a weight file in the form in which ``load_checkpoint`` compares them with the model's."""
        absent = tuple(f"{name}." for name in self.left_out)
        return {name: t for name, t in state.items() if name not in self.left_out and not name.startswith(absent)}

    def return_plain_logits(self) -> None:
        """Makes training return logits alone, as evaluation does, for scripts that expect nothing else."""

    @staticmethod
    def make_classifier(in_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(in_features, num_classes) if num_classes else nn.Identity()

    # ---- what every family has from here

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            maps = self._forward_stages(x, self.out_indices[-1])[1]
            return [maps[index] for index in self.out_indices]
        x = self.forward_features(x)
        return self.forward_head(x) if self.classifiers else x

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> the features that ``forward_head`` takes."""
        return self._forward_stages(x, len(self.feature_info) - 1)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of an image [B, in_chans, H, W], with or without the final features; timm's signature.

        Args:
            indices: which of the model's maps; a number n means the last n, None all.
            norm: accepted for timm's sake, and without effect.
            stop_early: do not run past the last wanted map.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.
        """
        one_of("output_fmt", output_fmt, ("NCHW",))
        flag("norm", norm)
        chosen = self.resolve_indices(indices)
        early = flag("stop_early", stop_early) | flag("intermediates_only", intermediates_only)
        features, maps = self._forward_stages(x, chosen[-1] if early else len(self.feature_info) - 1)
        wanted = [maps[i] for i in chosen]
        return wanted if intermediates_only else (features, wanted)

    def resolve_indices(self, indices: int | Sequence[int] | None, argument: str = "indices") -> list[int]:
        """Indices of feature maps that the model returns, ascending; an error names ``argument``."""
        available, count = self.out_indices, len(self.feature_info)
        if indices is None:
            return list(available)
        if isinstance(indices, numbers.Integral):
            return available[-integer(argument, indices, 1, len(available)) :]
        if not isinstance(indices, Sequence | np.ndarray) or isinstance(indices, str | bytes):
            raise TypeError(f"{argument} must be an int, a sequence of ints or None, got {indices!r}")
        chosen = sorted({integer(f"{argument}[{n}]", i, -count, count - 1) % count for n, i in enumerate(indices)})
        if not chosen or not set(chosen) <= set(available):
            raise ValueError(f"{argument} must be drawn from {available}, got {indices}")
        return chosen

    def get_classifier(self) -> nn.Module:
        """The main classifier; an ``nn.Identity`` where the model has none."""
        return self.get_submodule(next(iter(self.classifiers))) if self.classifiers else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces all classifiers by new ones of ``num_classes`` outputs (0: none).

        ``global_pool``: one of ``global_pools``; "" returns the features unpooled, and needs ``num_classes`` 0.
        """
        if not self.classifiers:
            raise ValueError("a features_only or pruned model has no classifier to reset")
        num_classes = integer("num_classes", num_classes, 0, MOST_CLASSES)
        self.set_global_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        for name, in_features in self.classifiers.items():
            old = self.get_submodule(name)
            like = next(old.parameters(), next(self.parameters()))
            new = self.make_classifier(in_features, num_classes)
            initialise(new, (nn.Linear, nn.Conv2d), nn.init.trunc_normal_, std=0.02)
            self.set_submodule(name, new.to(device=like.device, dtype=like.dtype).train(old.training))

    def set_global_pool(self, global_pool: str, num_classes: int | None = None) -> None:
        """Sets how ``forward_head`` pools (see ``reset_classifier``); the classifiers stay."""
        one_of("global_pool", global_pool, self.global_pools)
        if global_pool == "" and self.classifiers and (self.num_classes if num_classes is None else num_classes):
            raise ValueError("global_pool '' leaves features that a classifier does not take: it needs num_classes=0")
        self.global_pool = global_pool

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last of the feature maps ``indices``, which are returned as numbers from 0.

        The head goes with ``prune_head`` or with the last stage, the norm before it with ``prune_norm``.
        """
        if self.features_only:
            raise ValueError("a features_only model is built without the stages it does not need: choose out_indices")
        chosen = self.resolve_indices(indices)
        self.out_indices = self.out_indices[: chosen[-1] + 1]
        self._leave_out_unused(flag("prune_head", prune_head) or chosen[-1] < len(self.feature_info) - 1)
        if flag("prune_norm", prune_norm) and hasattr(self, "norm"):
            self.norm = nn.Identity()
        return chosen

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Saves memory in training: a block's activations are computed again in the backward pass.

        Batch norms then see every batch twice, so their running statistics move twice as fast.
        """
        self.grad_checkpointing = flag("enable", enable)
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def _check_image(self, x: Tensor) -> None:
        """ValueError or TypeError unless ``x`` is [B, in_chans, H, W], of sufficient size and the model's dtype."""
        if isinstance(x, fx.Proxy):
            return
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
            raise TypeError(f"x must be a dense torch.Tensor, got {getattr(x, 'layout', type(x).__name__)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point image batch, got {x.dtype}")
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must have shape [B, {self.in_chans}, H, W], got {list(x.shape)}")
        if min(x.shape[2:]) < self.sides[0]:
            raise ValueError(f"x must be at least {self.sides[0]} pixels high and wide, got {tuple(x.shape[2:])}")
        if torch.compiler.is_compiling() or under_autocast(x):
            return
        first: Any = next((module for module in self.modules() if isinstance(module, nn.Conv2d)), None)
        weight = None if first is None else first._parameters.get("weight")
        # Wrappers that hook layers or shard weights may convert them to the image's type later.
        if weight is not None and weight.dtype != x.dtype and weight.ndim == 4 and as_built(first, CONVOLUTIONS):
            advice = "convert one of them, or use torch.autocast"
            raise TypeError(f"x must have the model's dtype, {weight.dtype}, got {x.dtype}: {advice}")
