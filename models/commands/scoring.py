"""Top-1 and top-5 of a model on batches of labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.commands.folders import Batch, collate

__all__ = ["count_correct", "loader", "predict"]


def loader(dataset: Dataset[Any], device: torch.device, workers: int, **options: Any) -> DataLoader[Any]:
    """Batches as ``collate`` makes them, loaded by ``workers`` processes (0: by this one)."""
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        **options,
    )


def count_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many of [B, classes] have their label first, and among the first five; of fewer classes, among all."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return hits[:, 0].sum(), hits.sum()


@torch.no_grad()
def predict(
    model: nn.Module, batches: DataLoader[Any], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Each batch with its logits in float32 and its labels, both on ``device``. ``model`` is in evaluation mode."""
    for batch in batches:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.labels))
        if len(labels) == 0:
            yield batch, torch.empty(0, 1, device=device), labels
            continue
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        yield batch, logits.float(), labels
