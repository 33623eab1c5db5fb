"""How ``finetune`` can train: accumulated batches, the papers' recipes, timm's augmentations, TensorBoard's events."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import models
from models.commands import recipe
from models.commands.optimisation import Objective, cosine_with_warmup
from models.commands.recipe import PUBLISHED, Recipe
from models.commands.sampling import TrainingBatches, seed_of, seeded
from models.commands.training import Run, Trainer
from tests.models.test_commands import (  # noqa: F401  (fixtures)
    _tiny_volo_registered,
    finetune,
    images,
    log_of,
    main,
    refused,
    tiny_volo,
)
from tests.models.test_timm import TORCHVISION
from tests.support import relative_error


class Colours(Dataset[tuple[Tensor, int]]):
    """Training images by (draw, index): a colour per class, with noise that is each image's own."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        label = key[1] % 3
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(key[1]))
        return (0.3 * noise + torch.eye(3)[label].view(3, 1, 1)).double(), label


def trained(recipe: Recipe) -> tuple[list[dict[str, float]], Tensor]:
    """The log and all parameters after it."""
    torch.manual_seed(0)
    model = tiny_volo(num_classes=3, batch_norm=False, drop_path_rate=0.0, return_dense=False).double()
    log = Trainer(model, recipe, Colours(), None, torch.device("cpu"), Run(log_every=1)).fit()
    return log, nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulated_batches_are_one_large_batch(optimizer):
    """Where nothing is random and no batch norm sees the parts."""
    common = {"epochs": 1, "learning_rate": 1e-3, "ema_decay": 0, "optimizer": optimizer}
    (whole, one), (parts, other) = (trained(Recipe(batch=8 // n, accumulate=n, **common)) for n in (1, 4))
    assert len(whole) == len(parts) == 4  # three steps and the epoch
    losses = [[row["loss"] for row in log if "loss" in row] for log in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # logits are float32
    torch.manual_seed(0)
    start = nn.utils.parameters_to_vector(tiny_volo(num_classes=3, batch_norm=False).double().parameters())
    assert relative_error(other - start, one - start) < 1e-3


def test_batches_of_a_resumed_run_are_those_left():
    recipe = Recipe(epochs=3, batch=2, accumulate=3)
    batches = list(TrainingBatches(Colours(), recipe))
    assert len(batches) == len(TrainingBatches(Colours(), recipe)) == 3 * 4 * 3
    rest = TrainingBatches(Colours(), recipe, first_step=5)
    assert len(rest) == 7 * 3
    assert list(rest) == batches[5 * 3 :]


def test_warm_up_begins_where_it_is_told():
    rates = [cosine_with_warmup(step, 20, 5, 0.8, 0.0, 0.2) for step in range(20)]
    assert rates[0] == pytest.approx(0.2)
    assert np.diff(rates[:6]) == pytest.approx(0.12)
    assert rates[5] == pytest.approx(0.8)
    assert rates[-1] == pytest.approx(0)


def test_objective_takes_shares_of_labels():
    labels = torch.tensor([0, 2, 1, 1])
    shares = torch.eye(3)[labels]
    logits, tokens = torch.randn(4, 3), torch.randn(4, 6, 3)
    objective = Objective(label_smoothing=0.1)
    for output in (logits, {"main": logits, "aux": -logits}, (logits, tokens, torch.tensor([0, 1, 1, 3]))):
        torch.testing.assert_close(objective(output, shares), objective(output, labels))


def test_random_numbers_of_others_are_left_alone():
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    others = [draw(), draw()]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert draw() == others[0]
    with seeded(seed_of(0, 7)):
        first = draw()
    assert draw() == others[1]
    with seeded(seed_of(0, 7)):
        assert draw() == first


# ---- recipes

FAMILIES = {
    "overlock": ["overlock_xt", "overlock_b"],
    "rednet": ["rednet50"],
    "volo": ["volo_d1", "volo_d2", "volo_d3"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_are_ones_that_models_take(name):
    for model in FAMILIES[name]:
        settings, options = PUBLISHED[name].of(model)
        recipe = Recipe(batch=PUBLISHED[name].images, **settings)
        with torch.device("meta"):
            models.create_model(model, **options)
    expected = {"overlock": (2048, 300, 2e-3), "rednet": (2048, 130, 0.8), "volo": (1024, 300, 1e-3)}
    assert (recipe.batch, recipe.epochs, recipe.learning_rate) == expected[name]


def test_a_recipe_is_shared_among_batches_and_changed_by_options(tmp_path, images, monkeypatch, capsys):  # noqa: F811
    small = dataclasses.replace(PUBLISHED["rednet"], images=8)
    monkeypatch.setitem(recipe.PUBLISHED, "rednet", small)
    base = ["finetune", images, "--output", tmp_path / "run", "--model", "tiny_volo", "--recipe", "rednet"]
    base += ["--workers", 0, "--device", "cpu", "--drop-path", 0]
    assert "8 images per step, which 3 batches" in refused(capsys, *base, "--accumulate", 3)
    assert "--warmup-epochs must be below the 2 epochs" in refused(capsys, *base, "--epochs", 2)
    assert "volo_d1, volo_d2, volo_d3, not tiny_volo" in refused(capsys, *base, "--recipe", "volo")
    assert not (tmp_path / "run").exists()
    changed = [*base, "--accumulate", 2, "--epochs", 1, "--warmup-epochs", 0.5, "--lr", 0.01, "--warmup-lr", 0]
    assert main([*map(str, changed)]) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["batch"] == 4
    assert settings["options"]["drop_path_rate"] == 0
    assert {name: settings[name] for name in ("optimizer", "weight_decay", "decay_vectors", "ema_decay")} == {
        "optimizer": "sgd", "weight_decay": 1e-4, "decay_vectors": True, "ema_decay": 0
    }  # fmt: skip
    assert "note" not in capsys.readouterr().err
    assert main([*map(str, [*changed, "--batch", 2, "--restart"])]) == 0
    assert "published for 8 images per step, not 4" in capsys.readouterr().err


def test_a_longer_run_is_another_run(tmp_path, images, capsys):  # noqa: F811
    assert main(finetune(images, tmp_path, "--epochs", 1)) == 0
    capsys.readouterr()
    told = refused(capsys, *finetune(images, tmp_path, "--epochs", 2))
    assert "--epochs was 1, is 2" in told
    assert f"--checkpoint {tmp_path / 'last.safetensors'}" in told


# ---- TensorBoard and timm


def test_events_are_written_where_tensorboard_is(tmp_path, images, monkeypatch):  # noqa: F811
    written: list[tuple[object, ...]] = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append(("closed",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert main(finetune(images, tmp_path, "--epochs", 1, "--log-every", 3)) == 0
    rows = [row for row in log_of(tmp_path) if "loss" in row]
    assert written[0] == ("tensorboard", 1)
    assert [scalar[1:] for scalar in written if scalar[0] == "loss"] == [(row["loss"], row["step"]) for row in rows]
    assert any(scalar[0] == "top1" for scalar in written)
    assert written[-1] == ("closed",)


@pytest.mark.parametrize(
    "option", [("--mixup", 0.8), ("--cutmix", 1), ("--rand-augment", "rand-m9"), ("--erasing", 0.2), ("--repeats", 3)]
)
def test_without_timm_its_augmentations_are_refused(tmp_path, images, monkeypatch, capsys, option):  # noqa: F811
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    told = refused(capsys, *finetune(images, tmp_path / "run", *option))
    assert option[0] in told
    assert "pip install timm" in told
    assert not (tmp_path / "run").exists()


USE = """
import os, sys
import torch
torch.set_num_threads(1)
from models import registry
from models.__main__ import main
from tests.models.test_commands import log_of, refused, tiny_volo
from pathlib import Path
registry.register_model(tiny_volo)
images, folder = Path(sys.argv[1]), Path(sys.argv[2])

def train(output, *options):
    every = ["finetune", images, "--output", folder / output, "--model", "tiny_volo", "--epochs", 2, "--batch", 2]
    every += ["--workers", 0, "--device", "cpu", "--log-every", 1, "--save-every", 2, "--lr", 1e-3, *options]
    return main([str(part) for part in every])

PARTS = {"mixup": ["--mixup", 0.8], "cutmix": ["--cutmix", 1], "rand-augment": ["--rand-augment", "rand-m9-mstd0.5"],
         "erasing": ["--erasing", 1], "repeats": ["--repeats", 3]}
every = sum(PARTS.values(), []) + ["--accumulate", 2]
assert train("whole", *every) == 0
replace, left = os.replace, [7]
def interrupted(source, target):
    left[0] -= 1
    if left[0] == 0:
        raise KeyboardInterrupt
    replace(source, target)
os.replace = interrupted
assert train("broken", *every) == 130
os.replace = replace
assert 0 < len(log_of(folder / "broken")) < len(log_of(folder / "whole"))
assert train("broken", *every) == 0
assert log_of(folder / "broken") == log_of(folder / "whole")

first = {}
for name, options in {"plain": [], **PARTS}.items():
    assert train(name, "--epochs", 1, *options) == 0
    first[name] = log_of(folder / name)[0]["loss"]
assert len(set(first.values())) == len(first), first  # each does something
assert train("bad", "--rand-augment", "rand-q9") == 2
assert train("grey", "--epochs", 1, "--model-kwargs", "in_chans=1", "--rand-augment", "rand-m9-inc1") == 0

from models.commands.folders import ImageFolder
recipe = Recipe(epochs=2, batch=4, repeats=3)
keys = [key for batch in TrainingBatches(range(24), recipe) for key in batch]
assert len(keys) == len(set(keys)) == 48  # each copy of an image once
assert len({index for draw, index in keys if draw < 3}) == 8
"""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timms_augmentations_continue_to_the_bit(tmp_path, images):  # noqa: F811
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", TORCHVISION + USE, str(images), str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
