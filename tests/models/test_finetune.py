"""``python -m models finetune``: the path after a kill, processes, damaged states, recipes, timm."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import kernels.files
import models
from kernels.files import WriteError, locked
from models import registry
from models.commands import recipe, training
from models.commands.files import read_state
from models.commands.recipe import PUBLISHED, Recipe
from tests.models.running import CLASSES, ROOT, evaluate, finetune, launch, log_of, refused, run, tiny_volo
from tests.models.test_timm import TORCHVISION

pytestmark = pytest.mark.usefixtures("tiny")


# Files are put in place in this order: settings, classes and log; states of the steps 2 and 4; last and best weights
# and state of 6; states of 8 and 10; weights and state of 12.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kill_at", [5, 10], ids=["while writing the state of step 4", "while writing the state of step 10"]
)
def test_finetune_takes_the_same_path_after_a_kill(tmp_path, photographs, weights, kill_at, capsys):
    options = ["--log-every", 3, "--save-every", 2, "--checkpoint", weights, "--model-kwargs", "return_dense=True"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*finetune(photographs, whole, *options)) == 0
    log = log_of(whole)
    assert [row["step"] for row in log] == [3, 6, 6, 9, 12, 12]
    assert len({row["loss"] for row in log if "loss" in row}) == 4

    assert launch(tmp_path, *finetune(photographs, broken, *options), kill_at=kill_at).returncode == -9
    assert len(log_of(broken)) < len(log)
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # as a kill while a row is written leaves it
    capsys.readouterr()
    assert run(*finetune(photographs, broken, *options)) == 0
    assert "continues after step" in capsys.readouterr().err
    assert log_of(broken) == log
    for name in ("last", "best"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (broken, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[entry], theirs[entry]) for entry in ours)
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
    """Without batch norms, whose statistics are each process's own, and without dropped paths."""
    options = ["--epochs", 1, "--log-every", 2, "--ema", 0.9, "--drop-path", 0, "--model-kwargs", "batch_norm=False"]
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
    assert max(errors.values()) < 1e-4, errors  # a tenth of the learning rate


def test_finetune_refuses_before_anything_is_written(tmp_path, photographs, weights, capsys):
    output = tmp_path / "run"
    for arguments, told in (
        (finetune(photographs, output, "--min-lr", 1), "--min-lr must be at most the peak of 0.001"),
        (finetune(photographs, output, "--warmup-epochs", 5), "--warmup-epochs must be below the 2 epochs"),
        (finetune(photographs, output, "--batch", 500), "there are only 24"),
        (finetune(photographs, output, "--val", photographs / "val" / ".."), "same class folders"),
        (finetune(tmp_path / "none", output), "no folder"),
        (finetune(photographs, output, "--checkpoint", photographs / "val" / "ant" / "0.png"), "0.png"),
        (finetune(photographs, output, "--model-kwargs", "num_classes=7"), "num_classes must be 3"),
        (finetune(photographs, output, "--model-kwargs", "depth=7"), "depth"),
        (finetune(photographs, weights), "--output must be a folder"),
        (["finetune", photographs, "--output", output], "--model is needed"),
    ):
        assert told in refused(capsys, *arguments)
    assert not output.exists()


# ---- a finished run


SIZED = ["--size", 64, "--crop-pct", 0.75, "--interpolation", "bilinear", "--drop-path", 0.1, "--epochs", 1]


@pytest.fixture(scope="module")
def finished(photographs, tmp_path_factory) -> Path:
    """A run of 64 pixels, for a model whose default is 32."""
    output = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.entry_points, "tiny_volo", tiny_volo)
        assert run(*finetune(photographs, output, *SIZED)) == 0
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_weights_say_what_they_are_of(finished):
    for name in ("best", "last"):
        path = finished / f"{name}.safetensors"
        assert path.stat().st_mode & 0o777 == (finished / "log.jsonl").stat().st_mode & 0o777
        with safe_open(path, "pt") as file:
            said = {key: value if key == "format" else json.loads(value) for key, value in file.metadata().items()}
        expected = {"model": "tiny_volo", "size": [64, 64], "crop_pct": 0.75, "classes": list(CLASSES)}
        assert {**said, **expected, "model_args": {"img_size": [64, 64]}} == said
    model: Any = models.create_model("tiny_volo", checkpoint=finished / "best.safetensors")
    assert (model.num_classes, model.img_size) == (3, (64, 64))
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)


def test_the_other_commands_take_a_run_as_it_was_trained(finished, photographs, tmp_path, capsys):
    best = str(finished / "best.safetensors")
    picture = photographs / "val" / "bee" / "0.png"
    for weights in (["--model", "tiny_volo", "--checkpoint", best], ["--run", finished]):
        arguments = ["--device", "cpu", "--output", tmp_path / "a.png", "--json"]
        assert run("classify", picture, *weights, *arguments) == 0
        told = capsys.readouterr()
        assert f"{best} was trained as tiny_volo, 64×64 pixels, crop 0.75, bilinear, 3 classes" in told.err
        report = json.loads(told.out)
        assert report["model"] == "tiny_volo"
        assert sorted(guess["name"] for guess in report["images"][0]["guesses"]) == sorted(CLASSES)
    for options, seen in (
        ([], ([64, 64], 0.75, "bilinear")),
        (["--size", 32, "--crop-pct", 1], ([32, 32], 1, "bilinear")),
    ):
        assert run(*evaluate(photographs / "val", "--run", finished, "--workers", 0, "--json", *options)) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["size"], result["crop_pct"], result["interpolation"]) == seen
        assert options or result["top1"] == pytest.approx(log_of(finished)[-1]["best_top1"])
    assert run("finetune", photographs, "--run", finished, *finetune(photographs, tmp_path / "next")[2:4],
               "--epochs", 1, "--batch", 4, "--workers", 0, "--device", "cpu") == 0  # fmt: skip
    assert json.loads((tmp_path / "next" / "settings.json").read_text())["size"] == [64, 64]


def test_what_a_run_cannot_tell_is_asked_for(finished, photographs, tmp_path, capsys):
    state = ["--checkpoint", finished / "state.pt", "--workers", 0]
    assert "--model is needed" in refused(capsys, *evaluate(photographs / "val", *state))
    with pytest.raises(SystemExit):
        run("evaluate", photographs / "val", "--run", photographs)
    assert "must be a finetune's --output with best.safetensors in it" in capsys.readouterr().err
    renamed = shutil.copytree(photographs / "val", tmp_path / "val")
    (renamed / "cat").rename(renamed / "dog")
    averaged = "holds averaged weights ('average') beside the last ones"
    state += ["--model", "tiny_volo", "--size", 64]
    for folder, arguments, told, absent in (
        (
            renamed,
            ["--run", finished],
            "class names of the weights and of DIR differ; only one of them has cat, dog",
            averaged,
        ),
        (photographs / "val", state, averaged, "class names"),
        (photographs / "val", [*state, "--no-ema"], "", averaged),
    ):
        assert run(*evaluate(folder, *arguments)) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert told in said
        assert absent not in said


def test_a_folder_is_one_runs_at_a_time(copied, photographs, capsys):
    before = (copied / "state.pt").read_bytes()
    with locked(copied / ".lock", 0):
        for options in ([], ["--restart"]):
            told = refused(capsys, *finetune(photographs, copied, *SIZED, *options))
            assert f"another finetune is writing to {copied}" in told
    assert (copied / "state.pt").read_bytes() == before
    assert run(*finetune(photographs, copied, *SIZED)) == 0
    assert "already finished" in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: b"nonsense", "state of this run: it is damaged"),
        (lambda state: {**state, "settings": Hostile()}, "asks to call exec"),
        (lambda state: {"step": 1}, "it has no step"),
        (lambda state: {**state, "settings": [1]}, "is not a state of this run: AttributeError"),
        (lambda state: {**state, "optimizer": {}}, "is not a state of this run: KeyError"),
        (lambda state: {**state, "model": {}}, "is not a state of this run: RuntimeError"),
        (lambda state: {**state, "average": None}, "is not a state of this run: "),
        (lambda state: {**state, "step": 10**9}, "is of step 1000000000"),
        (lambda state: {**state, "step": "3"}, "is of step '3'"),
    ],
)
def test_a_damaged_state_is_refused_with_good_advice(damage, told, copied, photographs, capsys):
    content = damage(torch.load(copied / "state.pt", weights_only=True))
    if isinstance(content, bytes):
        (copied / "state.pt").write_bytes(content)
    else:
        torch.save(content, copied / "state.pt")
    files = {path: path.read_bytes() for path in copied.iterdir()}
    message = refused(capsys, *finetune(photographs, copied, *SIZED))
    assert told in message
    assert "--restart begins anew" in message
    assert "weights_only" not in message
    assert files == {path: path.read_bytes() for path in copied.iterdir()}


def test_a_full_disk_ends_a_run_in_a_sentence_and_keeps_its_state(photographs, tmp_path, capsys, monkeypatch):
    output, written = tmp_path / "run", []

    def until_full(path, content):
        written.extend([path] if path.name == "state.pt" else [])
        if len(written) == 3:
            raise WriteError(errno.ENOSPC, "No space left on device", str(path))
        kernels.files.atomic_write(path, content)

    monkeypatch.setattr(training, "atomic_write", until_full)
    message = refused(capsys, *finetune(photographs, output, *SIZED, "--save-every", 1))
    assert f"cannot write {output}/state.pt: No space left on device; the same command continues" in message
    assert read_state(output / "state.pt")["step"] == 2
    monkeypatch.setattr(training, "atomic_write", kernels.files.atomic_write)
    assert run(*finetune(photographs, output, *SIZED, "--save-every", 1)) == 0
    assert "continues after step 2 of 6" in capsys.readouterr().err
    assert read_state(output / "state.pt")["step"] == 6
    assert run(*evaluate(photographs / "val", "--run", output, "--workers", 0, "--output", "/dev/full")) == 2
    told = capsys.readouterr()
    assert told.out.splitlines()[-2].startswith("top-1 ")  # a full disk costs no result
    assert told.err.strip().endswith("error: cannot write /dev/full: No space left on device")


# ---- recipes, TensorBoard, timm


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


def test_events_are_written_where_tensorboard_is(tmp_path, photographs, monkeypatch):
    written: list[tuple[object, ...]] = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append(("closed",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert run(*finetune(photographs, tmp_path, "--epochs", 1, "--log-every", 3)) == 0
    rows = [row for row in log_of(tmp_path) if "loss" in row]
    assert written[0] == ("tensorboard", 1)
    assert [scalar[1:] for scalar in written if scalar[0] == "loss"] == [(row["loss"], row["step"]) for row in rows]
    assert any(scalar[0] == "top1" for scalar in written)
    assert written[-1] == ("closed",)


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
import os, sys
import torch
torch.set_num_threads(1)
from models import registry
from pathlib import Path
from tests.models.running import finetune, log_of, run, tiny_volo
from tests.models.test_finetune import PARTS
registry.register_model(tiny_volo)
images, folder = Path(sys.argv[1]), Path(sys.argv[2])

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
    command = [sys.executable, "-c", TORCHVISION + USE, str(photographs), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
