"""What training minimises, and how a step's rates follow from its number: nothing here has a state to be saved."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from models._contract import BackboneContract
from models.commands.augmentation import timm_part

TOKEN_WEIGHT = 0.5  # of VOLO's token labels


def training_loss(
    output: Tensor | dict[str, Tensor] | tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    label_smoothing: float = 0.0,
    auxiliary_weight: float = 0.4,
) -> Tensor:
    """Cross entropy with label smoothing, in float32, of whatever a family returns in training.

    * logits [B, classes]: CE(logits, y).
    * OverLoCK's dict: CE(main, y) + w·CE(aux, y), with w = 0.4 in the official training.
    * VOLO's triple (class logits, token logits, box): with λ the box's share of the tokens,
      (1 − λ)·CE(class, y) + λ·CE(class, y of the opposite image) + ½·mean over tokens of CE(token, y), which is token
      labelling (arXiv 2104.10858, eq. 3) where every token's label is the image's.

    ``labels`` are [B] int64, or the shares [B, classes].
    """

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    if isinstance(output, Tensor):
        return cross_entropy(output, labels)
    if isinstance(output, dict):
        return cross_entropy(output["main"], labels) + auxiliary_weight * cross_entropy(output["aux"], labels)
    class_logits, token_logits, box = output
    tokens = token_logits.shape[1]
    top, left, bottom, right = box.unbind()
    mixed = (bottom - top) * (right - left) / tokens
    own, opposite = (cross_entropy(class_logits, y) for y in (labels, labels.flip(0)))
    token_loss = cross_entropy(token_logits.flatten(0, 1), labels.repeat_interleave(tokens, 0))
    return (1 - mixed) * own + mixed * opposite + TOKEN_WEIGHT * token_loss


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


def parameter_groups(
    model: BackboneContract, weight_decay: float, decay_vectors: bool = False, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters that decay, then those that do not: what ``no_weight_decay`` names and, by default, vectors.

    ``layer_decay`` below 1 gives timm's groups, whose ``lr_scale`` is that factor to the power of a layer's distance
    from the last; there vectors never decay. Frozen parameters are in no group.
    """
    spared = model.no_weight_decay()
    if layer_decay < 1:
        by_layer = timm_part("optim", "param_groups_layer_decay", "--layer-decay")
        return by_layer(model, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay)
    groups = [{"params": [], "weight_decay": rate} for rate in (weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = (decay_vectors or parameter.ndim > 1) and name not in spared
            groups[0 if decays else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]
