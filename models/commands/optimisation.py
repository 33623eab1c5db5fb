"""What training minimises, and how a step's rates follow from its number: nothing here has a state to be saved."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models._contract import BackboneContract


class Objective:
    """Cross entropy with label smoothing, of whatever a family returns in training.

    * logits [B, classes]: CE(logits, y).
    * OverLoCK's dict: CE(main, y) + w·CE(aux, y), with w = 0.4 in the official training.
    * VOLO's triple (class logits, token logits, box): with λ the box's share of the tokens,
      (1 − λ)·CE(class, y) + λ·CE(class, y of the opposite image) + ½·mean over tokens of CE(token, y), which is token
      labelling (arXiv 2104.10858, eq. 3) where every token's label is the image's.
    """

    TOKEN_WEIGHT = 0.5

    def __init__(self, label_smoothing: float = 0.0, auxiliary_weight: float = 0.4) -> None:
        self.label_smoothing = label_smoothing
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, output: Tensor | dict[str, Tensor] | tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
        """The loss in float32, a scalar; labels [B] int64, or [B, classes] of shares."""
        if isinstance(output, Tensor):
            return self._cross_entropy(output, labels)
        if isinstance(output, dict):
            auxiliary = self._cross_entropy(output["aux"], labels)
            return self._cross_entropy(output["main"], labels) + self.auxiliary_weight * auxiliary
        class_logits, token_logits, box = output
        tokens = token_logits.shape[1]
        top, left, bottom, right = box.unbind()
        mixed = (bottom - top) * (right - left) / tokens
        own, opposite = (self._cross_entropy(class_logits, y) for y in (labels, labels.flip(0)))
        token_loss = self._cross_entropy(token_logits.flatten(0, 1), labels.repeat_interleave(tokens, 0))
        return (1 - mixed) * own + mixed * opposite + self.TOKEN_WEIGHT * token_loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


def cosine_with_warmup(
    step: int, total: int, warmup: int, peak: float, final: float, first: float | None = None
) -> float:
    """Learning rate of step 0..total − 1: linear up to ``peak`` at step ``warmup``, then half a cosine to ``final``.

    The line begins at ``first``, or so that step −1 would have 0.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1) if first is None else first + (peak - first) * step / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmed_up_ema(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """For ``AveragedModel``: update n decays by min(decay, (1 + n) / (10 + n)): a short run forgets its start."""

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(list(averaged), list(current), count)

    return update


def parameter_groups(
    model: BackboneContract, weight_decay: float, layer_decay: float = 1.0, decay_vectors: bool = False
) -> list[dict[str, Any]]:
    """Groups for an optimiser: vectors (without ``decay_vectors``) and what ``no_weight_decay`` names do not decay.

    Each group's ``rate_scale`` is ``layer_decay`` to the power of its distance from the last layer; frozen parameters
    are in none.
    """
    spared = model.no_weight_decay()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = layer_numbers(model, list(named)) if layer_decay < 1 else dict.fromkeys(named, 0)
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        decays = (decay_vectors or parameter.ndim > 1) and name not in spared
        scale = layer_decay ** (last - layers[name])
        fresh = {"params": [], "weight_decay": weight_decay if decays else 0.0, "rate_scale": scale}
        groups.setdefault((layers[name], decays), fresh)["params"].append(parameter)
    return list(groups.values())


def layer_numbers(model: BackboneContract, names: Sequence[str]) -> dict[str, int]:
    """Parameter name -> depth of its layer, from 0, by the model's ``group_matcher``; what it leaves out is deepest."""
    patterns = [
        (rank, re.compile(pattern), tuple(suffix or ()))
        for rank, matchers in enumerate(model.group_matcher().values())
        for pattern, suffix in ([(matchers, None)] if isinstance(matchers, str) else matchers)
    ]

    def place(name: str) -> tuple[float, ...]:
        for rank, pattern, suffix in patterns:
            if match := pattern.match(name):
                return (rank, *(int(group) for group in match.groups() if group is not None), *suffix)
        return (math.inf,)

    places = {name: place(name) for name in names}
    numbers = {found: number for number, found in enumerate(sorted(set(places.values())))}
    return {name: numbers[found] for name, found in places.items()}
