"""What the three families share: the methods that training scripts written for timm call on a backbone.

A family derives from ``BackboneContract`` and provides

* ``classifiers``: module name of each classifier -> its number of input features, the main one first;
* ``feature_info``: a ``FeatureInfo`` of its feature maps;
* ``_forward_stages(x, last)`` and ``forward_head(x, pre_logits=False)``;
* ``group_matcher`` and, where it has any, ``no_weight_decay``;
* ``adapt_state_dict`` where a published file's entries are not quite the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "BackboneContract", "FeatureInfo", "pretrained_config"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


class FeatureInfo(list[dict[str, Any]]):
    """What is known of every feature map, in depth order, with timm's accessors for those that a model returns.

    Args:
        maps: ``dict(num_chs=…, reduction=…, module=…)`` for each map.
        out_indices: which of them the model returns; None all.
    """

    def __init__(self, maps: Iterable[dict[str, Any]], out_indices: Sequence[int] | None = None) -> None:
        super().__init__(maps)
        self.out_indices = tuple(range(len(self)) if out_indices is None else out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """One entry of the returned maps (None), of the map ``idx``, or of several maps."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of the returned maps, as for ``get``."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Pixels of the image per position of the map, a side, as for ``get``."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """The module after which the map is taken, as for ``get``."""
        return self.get("module", idx)

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The returned maps' dicts, or ``keys`` of them."""
        return [dict(self[i]) if keys is None else {key: self[i][key] for key in keys} for i in self.out_indices]


class BackboneContract(nn.Module):
    """Classifier, features and training switches under the names timm gives them."""

    num_classes: int
    in_chans: int
    num_features: int  # channels of forward_features' output
    head_hidden_size: int  # features of forward_head(…, pre_logits=True)
    feature_info: FeatureInfo
    classifiers: dict[str, int]
    pretrained_cfg: dict[str, Any]
    minimum_size: int = 32  # smallest image side, in pixels

    def __init__(self, *, num_classes: int, in_chans: int, drop_path_rate: float) -> None:
        """Raises ValueError for a negative ``num_classes``, an ``in_chans`` below 1, a rate outside [0, 1)."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be >= 0 (0: no classifier), got {num_classes}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be >= 1, got {in_chans}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.classifiers = {}
        self.grad_checkpointing = False
        self.pretrained_cfg = pretrained_config()

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    # ---- what a family provides

    def _forward_stages(self, x: Tensor, last: int) -> tuple[Tensor, list[Tensor]]:
        """Runs up to and including feature map ``last``.

        Returns the features as they stand then (after the last map: what ``forward_features`` returns) and the
        feature maps 0..last, each [B, C, H, W].
        """
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameter names by depth, for layer-wise learning rates."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay although they are no vectors."""
        return set()

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries of a weight file as ``load_checkpoint`` is to compare them with the model's own."""
        return state

    @staticmethod
    def make_classifier(in_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(in_features, num_classes)

    # ---- what every family has from here

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
        """Feature maps, with or without the final features.

        Args:
            x: image [B, in_chans, H, W].
            indices: which of ``feature_info``; a number means the last so many, None all.
            norm: accepted for timm's sake; the maps are as they are.
            stop_early: do not run past the last wanted map.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", got {output_fmt!r}')
        chosen = self.resolve_indices(indices)
        stop = max(chosen) if stop_early or intermediates_only else len(self.feature_info) - 1
        features, maps = self._forward_stages(x, stop)
        intermediates = [maps[i] for i in chosen]
        return intermediates if intermediates_only else (features, intermediates)

    def resolve_indices(self, indices: int | Sequence[int] | None, argument: str = "indices") -> list[int]:
        """Indices into ``feature_info``, ascending; ValueError names ``argument`` where there is no such map."""
        count = len(self.feature_info)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"{argument} must ask for 1 to {count} feature maps, got {indices}")
            return list(range(count - indices, count))
        if not indices or any(not -count <= i < count for i in indices):
            raise ValueError(f"{argument} must be drawn from {-count}..{count - 1}, got {tuple(indices)}")
        return sorted({i % count for i in indices})

    def get_classifier(self) -> nn.Module:
        """The main classifier; an ``nn.Identity`` where the model has none."""
        return self.get_submodule(next(iter(self.classifiers))) if self.classifiers else nn.Identity()

    def reset_classifier(self, num_classes: int) -> None:
        """Puts fresh classifiers of ``num_classes`` outputs (0: none) in place of all the present ones."""
        if not self.classifiers:
            raise ValueError("a features_only model has no classifier to reset")
        if num_classes < 0:
            raise ValueError(f"num_classes must be >= 0, got {num_classes}")
        self.num_classes = num_classes
        for name, in_features in self.classifiers.items():
            old = self.get_submodule(name)
            like = next(old.parameters(), next(self.parameters()))
            new = self.make_classifier(in_features, num_classes) if num_classes else nn.Identity()
            for parameter_name, parameter in new.named_parameters():
                if parameter_name == "bias":
                    nn.init.zeros_(parameter)
                else:
                    nn.init.trunc_normal_(parameter, std=0.02)
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, new.to(device=like.device, dtype=like.dtype).train(old.training))

    def return_plain_logits(self) -> None:
        """Training returns logits alone, as evaluation does: for scripts that know of no other targets."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory in training: a block's activations are computed again in the backward pass.

        Batch norms then see every batch twice, so their running statistics move at twice the usual pace.
        """
        self.grad_checkpointing = enable

    def _run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """``block(*inputs)``, checkpointed when that is switched on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _check_image(self, x: Tensor) -> None:
        """ValueError or TypeError naming ``x`` unless it is a floating-point [B, in_chans, H, W] of sufficient size."""
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point image batch, got {x.dtype}")
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must have shape [B, {self.in_chans}, H, W], got {tuple(x.shape)}")
        if min(x.shape[2:]) < self.minimum_size:
            raise ValueError(f"x must be at least {self.minimum_size} pixels high and wide, got {tuple(x.shape[2:])}")
