"""What tests of commands and of training share: a tiny model, its weights, and folders of photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from models import registry
from tests.models.running import CLASSES, tiny_volo


@pytest.fixture
def one_thread():
    """Tiny maps gain nothing from a second one, and sums in another order would round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch, one_thread):
    """A model that trains a step in milliseconds is in the registry."""
    monkeypatch.setitem(registry.entry_points, "tiny_volo", tiny_volo)
    monkeypatch.setattr("models.commands.finetune.LOCK_SECONDS", 0.0)


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
