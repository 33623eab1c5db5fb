"""The training from scratch on ImageNet-1k that each family's authors published, as a ``Recipe``.

What a recipe cannot say differs: learning rates here follow the step and not the epoch, crops are resized with the
model's own interpolation, and batch norms are not synchronised between processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from models.commands.recipe import Recipe

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True)
class Published:
    """A paper's training.

    Args:
        source: where it is published.
        images: per step, in all processes together.
        settings: fields of ``Recipe``; what is not named keeps ``Recipe``'s default.
        options: of the model.
        variants: model -> what it has of its own, fields or options; None: one training for all models.
    """

    source: str
    images: int
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] | None = None

    def of(self, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of the recipe and options of the model. ValueError for a model that was not trained so."""
        if self.variants is not None and model not in self.variants:
            raise ValueError(f"--recipe: {self.source} trains {', '.join(self.variants)}, not {model}")
        own = (self.variants or {}).get(model, {})
        names = {known.name for known in fields(Recipe)}
        settings = self.settings | {name: value for name, value in own.items() if name in names}
        return settings, self.options | {name: value for name, value in own.items() if name not in names}


CHANGES = {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "label_smoothing": 0.1, "least_area": 0.08}

PUBLISHED = {
    # Stochastic depth is the models' own. The authors' rate is 1e-3 per 1,024 images, and they took 2,048.
    "overlock": Published(
        source="arXiv 2502.20087 and github.com/LMMMEng/OverLoCK",
        images=2048,
        settings={
            "epochs": 300,
            "learning_rate": 2e-3,
            "final_learning_rate": 1e-5,
            "first_learning_rate": 1e-6,
            "warmup_epochs": 5,
            "weight_decay": 0.05,
            "clip_norm": 5.0,
            "ema_decay": 0.9999,
            "auxiliary_weight": 0.4,
            "mixup": 0.8,
            "cutmix": 1.0,
            **CHANGES,
        },
    ),
    "rednet": Published(
        source="arXiv 2103.06255 and github.com/d-li14/involution",
        images=2048,
        settings={
            "epochs": 130,
            "optimizer": "sgd",
            "learning_rate": 0.8,
            "final_learning_rate": 0.0,
            "first_learning_rate": 0.2,
            "warmup_epochs": 5,
            "weight_decay": 1e-4,
            "decay_vectors": True,
            "label_smoothing": 0.1,
            "clip_norm": 0.0,
            "ema_decay": 0.0,
        },
    ),
    # The authors' token labels come from a larger network; here each token has its image's label.
    "volo": Published(
        source="arXiv 2106.13112 and github.com/sail-sg/volo",
        images=1024,
        settings={
            "epochs": 300,
            "final_learning_rate": 1e-5,
            "first_learning_rate": 1e-6,
            "warmup_epochs": 20,
            "weight_decay": 0.05,
            "clip_norm": 0.0,
            "ema_decay": 0.0,
            **CHANGES,
        },
        options={"return_dense": True},
        variants={
            "volo_d1": {"learning_rate": 1.6e-3, "drop_path_rate": 0.1},
            "volo_d2": {"learning_rate": 1e-3, "drop_path_rate": 0.2},
            "volo_d3": {"learning_rate": 1e-3, "drop_path_rate": 0.5},
        },
    ),
}
