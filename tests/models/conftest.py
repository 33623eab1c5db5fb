"""Models compute in full float32 on a GPU too; a tiny model and folders of photographs for the tests of commands."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from models import registry
from tests.models.running import CLASSES, tiny_volo


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    """Convolutions there round their operands to TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def tiny(monkeypatch):
    """In the registry; and one thread, as in the processes that are killed: sums in another order round differently."""
    monkeypatch.setitem(registry.entry_points, "tiny_volo", tiny_volo)
    monkeypatch.setattr("models.commands.finetune.LOCK_SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """train and val with three classes of photographs that differ in colour."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 5)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (48, 40, 3), dtype=np.uint8)
                pixels[..., label] += 130
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(3)
    model = tiny_volo(num_classes=3)
    nn.init.normal_(model.get_classifier().get_parameter("weight"))  # so that the classes differ
    models.save_checkpoint(model, path)
    return path
