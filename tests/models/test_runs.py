"""A finetune's folder: what its weights say of themselves, who may write there, damaged states and full disks."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import models
from kernels.files import WriteError, locked
from models import registry
from models.__main__ import main
from models.commands import finetune as command
from models.commands.files import read_state, write_state
from tests.models.test_commands import CLASSES, finetune, refused, tiny_volo

COLOURS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setitem(registry._entry_points, "tiny_volo", tiny_volo)
    monkeypatch.setattr(command, "LOCK_SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (70, 70), colour).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of 64 pixels, for a model whose default is 32."""
    output = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._entry_points, "tiny_volo", tiny_volo)
        arguments = ["--size", 64, "--crop-pct", 0.75, "--interpolation", "bilinear", "--drop-path", 0.1]
        assert main(finetune(images, output, *arguments, "--epochs", 1)) == 0
    return output


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def again(images: Path, output: Path, *arguments: object) -> list[str]:
    options = ["--size", 64, "--crop-pct", 0.75, "--interpolation", "bilinear", "--drop-path", 0.1, "--epochs", 1]
    return finetune(images, output, *options, *arguments)


def test_weights_say_what_they_are_of(finished):
    for name in ("best", "last"):
        path = finished / f"{name}.safetensors"
        assert path.stat().st_mode & 0o777 == (finished / "log.jsonl").stat().st_mode & 0o777
        with safe_open(path, "pt") as file:
            said = {key: value if key == "format" else json.loads(value) for key, value in file.metadata().items()}
        assert said["model"] == "tiny_volo"
        assert said["size"] == [64, 64]
        assert said["crop_pct"] == 0.75
        assert said["classes"] == list(CLASSES)
        assert said["model_args"] == {"img_size": [64, 64]}
    model: Any = models.create_model("tiny_volo", checkpoint=finished / "best.safetensors")
    assert (model.num_classes, model.img_size) == (3, (64, 64))
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("named", [True, False])
def test_classify_and_evaluate_take_a_run_as_it_was_trained(named, finished, images, tmp_path, capsys):
    weights = ["--model", "tiny_volo", "--checkpoint", finished / "best.safetensors"] if named else ["--run", finished]
    picture = images / "val" / "bee" / "0.png"
    arguments = ["classify", picture, *weights, "--device", "cpu", "--output", tmp_path / "a.png", "--json"]
    assert main([*map(str, arguments)]) == 0
    told = capsys.readouterr()
    assert "best.safetensors was trained as tiny_volo, 64×64 pixels, crop 0.75, bilinear, 3 classes" in told.err
    report = json.loads(told.out)
    assert report["model"] == "tiny_volo"
    assert sorted(guess["name"] for guess in report["images"][0]["guesses"]) == sorted(CLASSES)

    arguments = ["evaluate", images / "val", *weights, "--device", "cpu", "--workers", 0, "--json"]
    assert main([*map(str, arguments)]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert result["top1"] == pytest.approx(scores[-1]["best_top1"])
    assert (result["size"], result["crop_pct"], result["interpolation"]) == ([64, 64], 0.75, "bilinear")
    assert main([*map(str, [*arguments, "--size", 32, "--crop-pct", 1])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["size"], result["crop_pct"], result["interpolation"]) == ([32, 32], 1, "bilinear")


def test_what_a_run_cannot_tell_is_asked_for(finished, images, tmp_path, capsys):
    tail = ["--device", "cpu", "--workers", "0"]
    state = ["--checkpoint", finished / "state.pt"]
    assert "--model is needed" in refused(capsys, "evaluate", images / "val", *state, *tail)
    assert "--model is needed" in refused(capsys, "finetune", images, "--output", tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["evaluate", str(images / "val"), "--run", str(images)])
    assert "must be a finetune's --output with best.safetensors in it" in capsys.readouterr().err
    renamed = shutil.copytree(images / "val", tmp_path / "val")
    (renamed / "cat").rename(renamed / "dog")
    assert main(["evaluate", *map(str, (renamed, "--run", finished, *tail))]) == 0
    assert "other classes than the folders of DIR; only one has cat, dog" in " ".join(capsys.readouterr().err.split())
    bare = ["--model", "tiny_volo", "--size", "64", *state]
    assert main(["evaluate", *map(str, (images / "val", *bare, *tail))]) == 0
    assert "holds averaged weights ('average') beside the last ones" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", *map(str, (images / "val", *bare, "--no-ema", *tail))]) == 0
    assert "averaged" not in capsys.readouterr().err


def test_a_run_starts_from_another(finished, images, tmp_path, capsys):
    arguments = ["finetune", images, "--run", finished, "--output", tmp_path / "next", "--epochs", 1, "--batch", 4]
    assert main([*map(str, [*arguments, "--workers", 0, "--device", "cpu"])]) == 0
    assert "was trained as tiny_volo, 64×64 pixels" in capsys.readouterr().err
    assert json.loads((tmp_path / "next" / "settings.json").read_text())["size"] == [64, 64]


def test_a_folder_is_one_runs_at_a_time(run, images, capsys):
    before = (run / "state.pt").read_bytes()
    with locked(run / ".lock", 0):
        assert f"another finetune is at work in {run}" in refused(capsys, *again(images, run))
        assert f"another finetune is at work in {run}" in refused(capsys, *again(images, run, "--restart"))
    assert (run / "state.pt").read_bytes() == before
    assert main(again(images, run)) == 0
    assert "already finished" in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: b"", "state.pt is damaged"),
        (lambda state: b"nonsense", "state.pt is damaged"),
        (lambda state: {**state, "settings": Hostile()}, "asks to call exec"),
        (lambda state: {"step": 1}, "is not a training state"),
        (lambda state: {**state, "settings": [1]}, "is not a state of this run"),
        (lambda state: {**state, "optimizer": {}}, "is not a state of this run (KeyError"),
        (lambda state: {**state, "model": {}}, "is not a state of this run (RuntimeError"),
        (lambda state: {**state, "average": None}, "is not a state of this run"),
        (lambda state: {**state, "step": 10**9}, "is of step 1000000000"),
        (lambda state: {**state, "step": "3"}, "is of step '3'"),
    ],
)
def test_a_damaged_state_is_refused_with_good_advice(damage, told, run, images, capsys):
    content = damage(torch.load(run / "state.pt", weights_only=True))
    if isinstance(content, bytes):
        (run / "state.pt").write_bytes(content)
    else:
        torch.save(content, run / "state.pt")
    files = {path: path.read_bytes() for path in run.iterdir()}
    message = refused(capsys, *again(images, run))
    assert told in message
    assert "--restart begins anew" in message
    assert "weights_only" not in message
    assert files == {path: path.read_bytes() for path in run.iterdir()}


def test_a_damaged_log_is_named(run, images, capsys):
    with open(run / "log.jsonl", "a") as file:
        file.write("[1]\n")
    assert "log.jsonl is damaged in line" in refused(capsys, *again(images, run))


def test_a_full_disk_ends_a_run_in_a_sentence_and_keeps_its_state(images, tmp_path, capsys, monkeypatch):
    run, written = tmp_path / "run", []

    def until_full(path, state):
        if len(written) == 2:
            raise WriteError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write_state(path, state)

    monkeypatch.setattr("models.commands.training.write_state", until_full)
    message = refused(capsys, *again(images, run, "--save-every", 1))
    assert f"cannot write {run}/state.pt: No space left on device; the same command continues" in message
    assert read_state(run / "state.pt")["step"] == 2
    monkeypatch.undo()
    monkeypatch.setitem(registry._entry_points, "tiny_volo", tiny_volo)
    assert main(again(images, run, "--save-every", 1)) == 0
    assert "continues after step 2 of 3" in capsys.readouterr().err
    assert read_state(run / "state.pt")["step"] == 3


def test_a_full_disk_costs_no_result(finished, images, capsys):
    evaluate = ["evaluate", images / "val", "--run", finished, "--device", "cpu", "--workers", 0]
    assert "--resume must be a regular file" in refused(capsys, *evaluate, "--resume", "/dev/full")
    assert main([*map(str, [*evaluate, "--output", "/dev/full"])]) == 2
    told = capsys.readouterr()
    assert told.out.startswith("top-1 ")
    assert told.err.strip().endswith("error: cannot write /dev/full: No space left on device")
