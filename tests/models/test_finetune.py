"""``python -m models finetune``: the path after a kill, processes, recipes, TensorBoard, timm."""

import dataclasses
import importlib.util
import json
import shutil
import sys
import types
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import models
from models.commands import recipe
from models.commands.progress import note
from models.commands.recipe import PUBLISHED, Recipe
from tests.models.running import CLASSES, evaluate, finetune, launch, log_of, refused, run
from tests.models.test_timm import TORCHVISION
from tests.support import equal_entries, in_a_process

pytestmark = pytest.mark.usefixtures("tiny")


# The run puts files in place in this order: settings, classes and log; the states of steps 2 and 4; last and best
# weights and the state of step 6; the states of steps 8 and 10; weights and state of step 12.
@pytest.mark.slow
def test_finetune_takes_the_same_path_after_a_kill(tmp_path, photographs, weights, capsys):
    options = ["--log-every", 3, "--save-every", 2, "--checkpoint", weights, "--model-kwargs", "return_dense=True"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*finetune(photographs, whole, *options)) == 0
    log = log_of(whole)
    assert [row["step"] for row in log] == [3, 6, 6, 9, 12, 12]
    assert len({row["loss"] for row in log if "loss" in row}) == 4

    for kill_at in (5, 10):  # while the state of step 4 is written, or that of step 10
        shutil.rmtree(broken, ignore_errors=True)
        assert launch(tmp_path, *finetune(photographs, broken, *options), kill_at=kill_at).returncode == -9
        assert len(log_of(broken)) < len(log)
        with open(broken / "log.jsonl", "a") as file:
            file.write('{"step": 5, "lo')  # as a kill while a row is written leaves it
        capsys.readouterr()
        assert run(*finetune(photographs, broken, *options)) == 0
        assert "continues after step" in capsys.readouterr().err
        assert log_of(broken) == log
        for name in ("last", "best"):
            assert equal_entries(*(load_file(folder / f"{name}.safetensors") for folder in (broken, whole)))
    assert (broken / "classes.txt").read_text().split() == list(CLASSES)
    # What was kept is what was measured.
    assert run(*evaluate(photographs / "val", "--run", broken, "--json", "--workers", 0)) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(log[-1]["best_top1"])

    assert "--batch was 4, is 6" in refused(capsys, *finetune(photographs, broken, *options, "--batch", 6))
    longer = refused(capsys, *finetune(photographs, broken, *options, "--epochs", 3))
    assert "--epochs was 2, is 3" in longer
    assert f"--checkpoint {broken / 'last.safetensors'}" in longer
    assert log_of(broken) == log


@pytest.mark.slow
def test_torchrun_equals_one_process_with_as_many_images(tmp_path, photographs):
    """The model has no batch norms, whose statistics each process would have for itself, and drops no paths.

    AdamW would take whole steps along gradients of which rounding decides the sign.
    """
    options = ["--epochs", 1, "--log-every", 2, "--ema", 0.9, "--drop-path", 0, "--model-kwargs", "batch_norm=False"]
    options += ["--optimizer", "sgd", "--lr", 0.1]
    alone, together = tmp_path / "alone", tmp_path / "together"
    ran = launch(tmp_path, *finetune(photographs, together, *options, "--batch", 2), processes=2)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((together / "settings.json").read_text())["processes"] == 2
    assert run(*finetune(photographs, alone, *options, "--batch", 4)) == 0
    ours, theirs = log_of(together), log_of(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [2, 4, 6, 6]
    assert [row["loss"] for row in ours[:-1]] == pytest.approx([row["loss"] for row in theirs[:-1]], rel=1e-4)
    assert ours[-1] == pytest.approx(theirs[-1])  # each image of val counted once, 8 here and 7 there
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (together, alone))
    errors = {name: (ours[name] - theirs[name]).abs().max().item() for name in theirs}
    assert max(errors.values()) < 1e-6, errors


def test_finetune_refuses_before_anything_is_written(tmp_path, photographs, weights, capsys):
    output = tmp_path / "run"
    shutil.copytree(photographs / "val" / "ant", tmp_path / "other" / "ant")
    for part in ("training", "validation"):
        shutil.copytree(photographs / "val", tmp_path / "parts" / part)
    for arguments, told in (
        (finetune(photographs, output, "--min-lr", 1), "--min-lr must be at most the peak of 0.001"),
        (finetune(photographs, output, "--warmup-epochs", 5), "--warmup-epochs must be below the 2 epochs"),
        (finetune(photographs, output, "--batch", 500), "there are only 24"),
        (finetune(photographs, output, "--val", tmp_path / "other"), "same class folders; only one has bee, cat"),
        (finetune(tmp_path / "parts", output), f"did you mean {tmp_path / 'parts' / 'training'} or"),
        (finetune(tmp_path / "none", output), "no folder"),
        (finetune(photographs, output, "--checkpoint", photographs / "val" / "ant" / "0.png"), "0.png"),
        (finetune(photographs, output, "--model-kwargs", "num_classes=7"), "num_classes must be 3"),
        (finetune(photographs, output, "--model-kwargs", "depth=7"), "--model or --model-kwargs: "),
        (finetune(photographs, weights), "--output must be a folder"),
        (["finetune", photographs, "--output", output], "--model NAME is needed; python -m models list"),
    ):
        assert told in refused(capsys, *arguments)
    assert not output.exists()


# ---- recipes, timm


@pytest.mark.parametrize(
    ("name", "trained", "expected"),
    [
        ("overlock", ["overlock_xt", "overlock_b"], (2048, 300, 2e-3)),
        ("rednet", ["rednet50"], (2048, 130, 0.8)),
        ("volo", ["volo_d1", "volo_d2", "volo_d3"], (1024, 300, 1e-3)),
    ],
)
def test_published_recipes_are_ones_that_models_take(name, trained, expected):
    for model in trained:
        settings, options = PUBLISHED[name].of(model)
        last = Recipe(batch=PUBLISHED[name].images, **settings)
        with torch.device("meta"):
            models.create_model(model, **options)
    assert (last.batch, last.epochs, last.learning_rate) == expected


def test_a_recipe_is_shared_among_batches_and_changed_by_options(tmp_path, photographs, monkeypatch, capsys):
    monkeypatch.setitem(recipe.PUBLISHED, "rednet", dataclasses.replace(PUBLISHED["rednet"], images=8))
    base = ["finetune", photographs, "--output", tmp_path / "run", "--model", "tiny_volo", "--recipe", "rednet"]
    base += ["--workers", 0, "--device", "cpu", "--drop-path", 0]
    assert "8 images per step, which 3 batches" in refused(capsys, *base, "--accumulate", 3)
    assert "--warmup-epochs must be below the 2 epochs" in refused(capsys, *base, "--epochs", 2)
    assert "volo_d1, volo_d2, volo_d3, not for tiny_volo" in refused(capsys, *base, "--recipe", "volo")
    assert not (tmp_path / "run").exists()
    changed = [*base, "--accumulate", 2, "--epochs", 1, "--warmup-epochs", 0.5, "--lr", 0.01, "--warmup-lr", 0]
    assert run(*changed) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    expected = {"batch": 4, "optimizer": "sgd", "weight_decay": 1e-4, "decay_vectors": True, "ema_decay": 0}
    assert {**settings, **expected} == settings
    assert settings["options"]["drop_path_rate"] == 0
    assert "note" not in capsys.readouterr().err
    assert run(*changed, "--batch", 2, "--restart") == 0
    assert "published for 8 images per step, not 4" in capsys.readouterr().err
    monkeypatch.setattr("models.commands.distributed.rank", lambda: 1)
    note("it stands in the first process's output")
    assert not capsys.readouterr().err


def test_events_are_written_where_tensorboard_is(tmp_path, photographs, monkeypatch):
    writer = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    assert run(*finetune(photographs, tmp_path, "--epochs", 1, "--log-every", 3)) == 0
    writer.assert_called_once_with(str(tmp_path / "tensorboard"), purge_step=1)
    written = [call.args for call in writer.return_value.add_scalar.call_args_list]
    losses = [("loss", row["loss"], row["step"]) for row in log_of(tmp_path) if "loss" in row]
    assert [scalar for scalar in written if scalar[0] == "loss"] == losses
    assert "top1" in [scalar[0] for scalar in written]
    writer.return_value.close.assert_called_once_with()


PARTS = {"--mixup": 0.8, "--cutmix": 1, "--rand-augment": "rand-m9-mstd0.5", "--erasing": 1, "--repeats": 3}


@pytest.mark.parametrize(("option", "value"), (PARTS | {"--layer-decay": 0.9}).items())
def test_without_timm_its_parts_are_refused(tmp_path, photographs, monkeypatch, capsys, option, value):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    told = refused(capsys, *finetune(photographs, tmp_path / "run", option, value))
    assert option in told
    assert "pip install timm" in told
    assert not (tmp_path / "run").exists()


USE = """
import json, os, sys
import torch
torch.set_num_threads(1)
from models import registry
from pathlib import Path
from tests.models.running import finetune, log_of, run, tiny_volo
registry.register_model(tiny_volo)
images, folder, PARTS = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def train(output, *options):
    every = ["--batch", 2, "--log-every", 1, "--save-every", 2]
    return run(*finetune(images, folder / output, *every, *options))

every = [part for option in PARTS.items() for part in option] + ["--accumulate", 2]
assert train("whole", *every) == 0
replace, left = os.replace, [8]
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
for name, options in {"plain": [], **{name: [name, value] for name, value in PARTS.items()}}.items():
    assert train(name, "--epochs", 1, *options) == 0
    first[name] = log_of(folder / name)[0]["loss"]
assert len(set(first.values())) == len(first), first  # each does something
assert train("bad", "--rand-augment", "rand-q9") == 2
assert train("grey", "--epochs", 1, "--model-kwargs", "in_chans=1", "--rand-augment", "rand-m9-inc1") == 0

from models.commands.recipe import Recipe
from models.commands.folders import TrainingBatches
keys = [key for batch in TrainingBatches(range(24), Recipe(epochs=2, batch=4, repeats=3)) for key in batch]
assert len(keys) == len(set(keys)) == 48  # each copy of an image once
assert len({index for draw, index in keys if draw < 3}) == 8
"""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timms_augmentations_continue_to_the_bit(tmp_path, photographs):
    done = in_a_process("-c", TORCHVISION + USE, photographs, tmp_path, json.dumps(PARTS))
    assert done.returncode == 0, done.stderr[-3000:]
