"""What a run of ``finetune`` leaves: weights that say what they are of, and a state from which it continues."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import kernels.files
from kernels.files import WriteError, locked
from models import registry
from models.commands import training
from models.commands.files import read_state
from tests.models.running import CLASSES, evaluate, finetune, log_of, refused, run, tiny_volo
from tests.support import Hostile

pytestmark = pytest.mark.usefixtures("tiny")

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
    for options, seen in (([], ([64, 64], 0.75)), (["--size", 32, "--crop-pct", 1], ([32, 32], 1))):
        assert run(*evaluate(photographs / "val", "--run", finished, "--workers", 0, "--json", *options)) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["size"], result["crop_pct"], result["interpolation"]) == (*seen, "bilinear")
        assert options or result["top1"] == pytest.approx(log_of(finished)[-1]["best_top1"])
    assert run("finetune", photographs, "--run", finished, *finetune(photographs, tmp_path / "next")[2:4],
               "--epochs", 1, "--batch", 4, "--workers", 0, "--device", "cpu") == 0  # fmt: skip
    assert json.loads((tmp_path / "next" / "settings.json").read_text())["size"] == [64, 64]


def test_a_state_alone_does_not_name_the_model(finished, photographs, tmp_path, capsys):
    state = ["--checkpoint", finished / "state.pt", "--workers", 0]
    assert "--model NAME is needed: the weights do not say" in refused(capsys, *evaluate(photographs / "val", *state))
    with pytest.raises(SystemExit):
        run("evaluate", photographs / "val", "--run", photographs)
    assert "must be a finetune's --output with best.safetensors in it" in capsys.readouterr().err
    renamed = shutil.copytree(photographs / "val", tmp_path / "val")
    (renamed / "cat").rename(renamed / "dog")
    averaged = "holds averaged weights ('average') beside the last ones"
    state += ["--model", "tiny_volo", "--size", 64]
    differ = "class names of the weights and of DIR differ; only one of them has cat, dog"
    for folder, arguments, told, absent in (
        (renamed, ["--run", finished], differ, averaged),
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


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: b"nonsense", "state of this run: it is damaged"),
        (lambda state: {**state, "settings": Hostile()}, "asks to call "),
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
