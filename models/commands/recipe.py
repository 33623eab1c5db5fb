"""How to train: the settings on which a run depends, what follows from them, and those of each family's authors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models._contract import BackboneContract
from models.commands.augmentation import timm_part
from models.commands.types import DTYPES, FRACTION, Number, positive

TOKEN_WEIGHT = 0.5  # of VOLO's token labels
ANY = Number(at_least=0)
BELOW_ONE = Number(at_least=0, below=1)
SHARE = Number(above=0, at_most=1)


def _option(default: Any, flag: str, kind: Any, text: str) -> Any:
    """A field that the command line sets by ``flag``; ``kind`` is a Number, the values it may have, bool or str."""
    return field(default=default, metadata={"flag": flag, "kind": kind, "help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train. The result depends on these settings, the model and the data alone.

    Each field's metadata holds its option on the command line, its permitted values, and its meaning.
    """

    epochs: int = _option(10, "--epochs", positive, "passes over the training images")
    batch: int = _option(64, "--batch", positive, "images at a time, in each process")
    accumulate: int = _option(1, "--accumulate", positive, "batches per step, whose gradients are averaged")
    optimizer: str = _option("adamw", "--optimizer", ("adamw", "sgd"), "sgd: with Nesterov's momentum of 0.9")
    learning_rate: float = _option(1e-4, "--lr", Number(above=0), "peak of the learning rate, after the warm-up")
    final_learning_rate: float = _option(1e-6, "--min-lr", ANY, "learning rate of the last step")
    warmup_epochs: float | None = _option(None, "--warmup-epochs", ANY, "linear warm-up (a tenth of the epochs)")
    first_learning_rate: float | None = _option(None, "--warmup-lr", ANY, "where the warm-up begins (one step above 0)")
    weight_decay: float = _option(0.05, "--weight-decay", ANY, "for matrices and kernels")
    layer_decay: float = _option(1.0, "--layer-decay", SHARE, "factor of the rate per layer, from the last (timm's)")
    decay_vectors: bool = _option(False, "--decay-vectors", bool, "biases and scales decay too")
    label_smoothing: float = _option(0.1, "--label-smoothing", BELOW_ONE, "share of the label that all classes get")
    auxiliary_weight: float = _option(0.4, "--aux-weight", ANY, "weight of OverLoCK's auxiliary loss")
    clip_norm: float = _option(5.0, "--clip", ANY, "largest norm of the gradient (0: unlimited)")
    ema_decay: float = _option(0.999, "--ema", BELOW_ONE, "decay of the averaged weights, 0: none")
    least_area: float = _option(0.08, "--least-area", SHARE, "smallest crop, as a share of the image's area")
    flip: float = _option(0.5, "--flip", FRACTION, "chance of mirroring")
    mixup: float = _option(0.0, "--mixup", ANY, "alpha of mixup, 0: none")
    cutmix: float = _option(0.0, "--cutmix", ANY, "alpha of CutMix, 0: none; with mixup, each half of the time")
    rand_augment: str = _option("", "--rand-augment", str, "RandAugment, as in rand-m9-mstd0.5-inc1")
    erasing: float = _option(0.0, "--erasing", FRACTION, "chance of erasing a random part of an image")
    repeats: int = _option(1, "--repeats", positive, "repeated augmentation: copies of an image per epoch")
    freeze_backbone: bool = _option(False, "--freeze-backbone", bool, "train nothing but the classifier")
    dtype: str = _option("fp32", "--dtype", tuple(DTYPES), "bf16 and fp16 by autocast, fp16 with scaled gradients")
    seed: int = _option(0, "--seed", Number(at_least=0, at_most=2**62, whole=True), "of everything random")

    def __post_init__(self) -> None:
        """ValueError, which begins with an option, unless the settings go together; the parser checked each of them."""
        for option, rate in (("--warmup-lr", self.first_learning_rate), ("--min-lr", self.final_learning_rate)):
            if (rate or 0) > self.learning_rate:
                raise ValueError(f"{option} must be at most the peak of {self.learning_rate}, got {rate}")
        if self.warmup >= self.epochs:
            raise ValueError(f"--warmup-epochs must be below the {self.epochs} epochs, got {self.warmup_epochs}")
        if self.layer_decay < 1 and self.decay_vectors:
            raise ValueError("--layer-decay cannot go with --decay-vectors: timm's groups by layer leave vectors alone")
        if self.batch % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"--batch must be even to be mixed, got {self.batch}")

    @property
    def warmup(self) -> float:
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of step 0, 1, …: linear up to the peak at the warm-up's end, then half a cosine to the last.

        The line begins at ``first_learning_rate``, or so that step −1 would have 0.
        """
        total, warmup = self.epochs * steps_per_epoch, round(self.warmup * steps_per_epoch)
        peak, first, final = self.learning_rate, self.first_learning_rate, self.final_learning_rate
        if step < warmup:
            return peak * (step + 1) / (warmup + 1) if first is None else first + (peak - first) * step / warmup
        progress = (step - warmup) / max(1, total - 1 - warmup)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))

    def optimizer_of(self, model: BackboneContract) -> torch.optim.Optimizer:
        groups = self.parameter_groups(model)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def parameter_groups(self, model: BackboneContract) -> list[dict[str, Any]]:
        """Parameters that decay, then those that do not: what ``no_weight_decay`` names and, by default, vectors.

        ``layer_decay`` below 1 gives timm's groups, whose ``lr_scale`` is that factor to the power of a layer's
        distance from the last; there vectors never decay. Frozen parameters are in no group.
        """
        spared = model.no_weight_decay()
        if self.layer_decay < 1:
            by_layer = timm_part("optim", "param_groups_layer_decay", "--layer-decay")
            return by_layer(model, self.weight_decay, no_weight_decay_list=spared, layer_decay=self.layer_decay)
        groups = [{"params": [], "weight_decay": rate} for rate in (self.weight_decay, 0.0)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decays = (self.decay_vectors or parameter.ndim > 1) and name not in spared
                groups[0 if decays else 1]["params"].append(parameter)
        return [group for group in groups if group["params"]]

    def mixing(self, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """(images, labels [B]) -> images mixed with each other, labels [B, num_classes]: mixup (arXiv 1710.09412),
        CutMix (arXiv 1905.04899), or one of them per batch, as their alphas are above 0. They are timm's.
        """
        if not self.mixup and not self.cutmix:
            return None
        mix = timm_part("data.mixup", "Mixup", "--mixup or --cutmix")
        return mix(mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, label_smoothing=0.0, num_classes=num_classes)

    def loss(self, output: Tensor | dict[str, Tensor] | tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
        """Cross entropy with label smoothing, in float32, of whatever a family returns in training.

        * logits [B, classes]: CE(logits, y).
        * OverLoCK's dict: CE(main, y) + w·CE(aux, y), with w = 0.4 in the official training.
        * VOLO's triple (class logits, token logits, box): with λ the box's share of the tokens,
          (1 − λ)·CE(class, y) + λ·CE(class, y of the opposite image) + ½·mean over tokens of CE(token, y), which is
          token labelling (arXiv 2104.10858, eq. 3) where every token's label is the image's.

        ``labels`` are [B] int64, or the shares [B, classes].
        """

        def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

        if isinstance(output, Tensor):
            return cross_entropy(output, labels)
        if isinstance(output, dict):
            return cross_entropy(output["main"], labels) + self.auxiliary_weight * cross_entropy(output["aux"], labels)
        class_logits, token_logits, box = output
        tokens = token_logits.shape[1]
        top, left, bottom, right = box.unbind()
        mixed = (bottom - top) * (right - left) / tokens
        own, opposite = (cross_entropy(class_logits, y) for y in (labels, labels.flip(0)))
        token_loss = cross_entropy(token_logits.flatten(0, 1), labels.repeat_interleave(tokens, 0))
        return (1 - mixed) * own + mixed * opposite + TOKEN_WEIGHT * token_loss


OPTIONS = {known.name: known.metadata["flag"] for known in fields(Recipe)}  # field -> option of the command line


@dataclass(frozen=True)
class Published:
    """The training from scratch on ImageNet-1k that a family's authors published.

    Three things differ that a recipe cannot say: learning rates follow the step here and not the epoch, crops are
    resized with the model's own interpolation, and batch norms are not synchronised between processes.

    Args:
        images: per step, in all processes together.
        settings: fields of ``Recipe``; what is not named keeps ``Recipe``'s default.
        options: of the model.
        variants: model -> its own learning rate and drop path rate; None: one training for all models.
    """

    images: int
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, tuple[float, float]] | None = None

    def of(self, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of the recipe and options of the model. ValueError for a model that was not trained so."""
        if self.variants is None:
            return self.settings, self.options
        if model not in self.variants:
            raise ValueError(f"--recipe: it was published for {', '.join(self.variants)}, not for {model}")
        learning_rate, drop_path_rate = self.variants[model]
        return self.settings | {"learning_rate": learning_rate}, self.options | {"drop_path_rate": drop_path_rate}


COMMON = {"weight_decay": 0.05, "final_learning_rate": 1e-5, "first_learning_rate": 1e-6, "label_smoothing": 0.1}
COMMON |= {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "least_area": 0.08}

PUBLISHED = {
    # arXiv 2502.20087 and github.com/LMMMEng/OverLoCK: a rate of 1e-3 per 1,024 images, and 2,048 images per step.
    "overlock": Published(
        2048,
        {"epochs": 300, "warmup_epochs": 5, "learning_rate": 2e-3, "clip_norm": 5.0, "ema_decay": 0.9999}
        | {"auxiliary_weight": 0.4, "mixup": 0.8, "cutmix": 1.0}
        | COMMON,
    ),
    # arXiv 2103.06255 and github.com/d-li14/involution
    "rednet": Published(
        2048,
        {"epochs": 130, "warmup_epochs": 5, "learning_rate": 0.8, "first_learning_rate": 0.2}
        | {"final_learning_rate": 0.0, "optimizer": "sgd", "weight_decay": 1e-4, "decay_vectors": True}
        | {"clip_norm": 0.0, "ema_decay": 0.0, "label_smoothing": 0.1},
    ),
    # arXiv 2106.13112 and github.com/sail-sg/volo
    "volo": Published(
        1024,
        {"epochs": 300, "warmup_epochs": 20, "clip_norm": 0.0, "ema_decay": 0.0} | COMMON,
        {"return_dense": True},
        {"volo_d1": (1.6e-3, 0.1), "volo_d2": (1e-3, 0.2), "volo_d3": (1e-3, 0.5)},
    ),
}
