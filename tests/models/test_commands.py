"""``python -m models`` list, classify and evaluate: what each prints and writes, refuses, and continues with."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models.commands import classify
from models.commands.folders import EvaluationImages, ImageFolder
from models.commands.images import Preprocessing, read_image
from tests.models.running import CLASSES, evaluate, launch, refused, run, tiny_volo

pytestmark = pytest.mark.usefixtures("tiny")


def test_list_counts_parameters_and_knows_the_papers_accuracies(capsys):
    assert run("list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == models.list_models()
    assert rows["overlock_t"]["top1"] == rows["overlock_t_reparam"]["top1"] == 84.2
    assert round(rows["overlock_t_reparam"]["parameters"] / 1e6) == 33  # without the auxiliary classifier
    assert rows["rednet50"]["weights"] is None
    assert rows["volo_d1"]["weights"].startswith("https://")
    assert all(75 < row["top1"] < 87 for row in rows.values() if row["top1"] is not None)

    assert run("list", "rednet*") == 0
    table = capsys.readouterr().out
    assert [text in table for text in ("rednet152", "33.98", "volo")] == [True, True, False]
    assert "PATTERN: no model is named 'resnet*'; did you mean 'rednet" in refused(capsys, "list", "resnet*")


# ---- classify


def test_classify_names_probabilities_and_draws_them(tmp_path, photographs, weights, capsys):
    names, picture = tmp_path / "names.txt", tmp_path / "bars.png"
    names.write_text("".join(f"the {name}\n" for name in CLASSES))
    given = [photographs / "val" / name / "0.png" for name in CLASSES[:2]]
    arguments = ["--model", "tiny_volo", "--checkpoint", weights, "--device", "cpu", "--output", picture]
    assert run("classify", *given, *arguments, "--classes", names, "--json") == 0
    captured = capsys.readouterr()
    assert "RANDOM" not in captured.err
    model = models.create_model("tiny_volo", checkpoint=weights, num_classes=3).eval()
    preprocessing = Preprocessing.of(model)  # pyright: ignore[reportArgumentType]
    for photograph, row in zip(given, json.loads(captured.out)["images"], strict=True):
        with torch.no_grad():
            expected = model(preprocessing(read_image(photograph))[None])[0].softmax(0)
        assert row["image"] == str(photograph)
        assert sorted(guess["name"] for guess in row["guesses"]) == [f"the {name}" for name in CLASSES]
        for guess in row["guesses"]:
            assert guess["probability"] == pytest.approx(expected[guess["class"]].item(), rel=1e-5)
    with Image.open(picture) as drawn:
        assert drawn.width > 600
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 100  # not a blank

    assert run("classify", given[0], "--model", "tiny_volo", "--output", picture) == 0
    captured = capsys.readouterr()
    assert "RANDOM WEIGHTS" in captured.err
    names = classify.imagenet_classes()
    assert any(line.split("%")[-1].strip() in names for line in captured.out.splitlines()[1:])
    assert len(names) == len(set(names)) == 1000
    assert [names[label] for label in (0, 207, 281, 999)] == ["tench", "golden retriever", "tabby", "toilet tissue"]


def test_classify_refuses_before_anything_is_written(tmp_path, photographs, weights, capsys):
    photograph, text, absent = photographs / "val" / "ant" / "0.png", tmp_path / "text.png", tmp_path / "none"
    text.write_text("no image")
    for arguments, told in (
        ([photograph, text], str(text)),
        ([photograph, "--model", "tiny_vol"], "--model: no model is named 'tiny_vol'; did you mean 'tiny_volo'"),
        ([photograph, "--checkpoint", weights, "--classes", text], "3 classes"),
        (
            [photograph, "--checkpoint", weights, "--classes", absent],
            "--classes must be a file that can be read",
        ),
        ([photograph, "--checkpoint", absent / "w.pth"], "no file"),
        ([photograph, "--output", absent / "bars.png"], "--output: there is no folder"),
        ([photograph, "--output", tmp_path / "picture.txt"], "--output must end in .png"),
        ([photograph, "--model-kwargs", "num_classes=0"], "num_classes=0 leaves no class"),
    ):
        defaults = ["--model", "tiny_volo", "--output", tmp_path / "bars.png"]
        assert told in refused(capsys, "classify", *defaults, *arguments)
    assert not (tmp_path / "bars.png").exists()


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["$x_{1}$^_\\frac", "caf\udce9", "100 % & #"]
    rows = [{"image": name, "guesses": [{"name": other, "probability": 1 / 3} for other in names]} for name in names]
    for suffix, start in ((".jpg", b"\xff\xd8"), (".pdf", b"%PDF")):
        path = tmp_path / f"picture{suffix}"
        classify.draw([Image.new("RGB", (8, 8))] * 3, rows, names[0], path, warn=False)
        assert path.read_bytes().startswith(start)


# ---- evaluate


@pytest.mark.slow
def test_evaluate_counts_and_continues_after_a_kill(tmp_path, photographs, weights, capsys):
    model = tiny_volo(num_classes=3).eval()
    models.load_checkpoint(model, weights)
    folder = ImageFolder(photographs / "val")
    assert folder.classes == list(CLASSES)
    dataset = EvaluationImages(folder.samples, Preprocessing.of(model))
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    with torch.no_grad():
        best = model(torch.stack(images)).argmax(1)
    expected = 100 * (best == torch.tensor(labels)).float().mean().item()

    state, output = tmp_path / "count.json", tmp_path / "result.json"
    arguments = evaluate(photographs / "val", "--model", "tiny_volo", "--checkpoint", weights, "--resume", state)
    killed = launch(tmp_path, *arguments, "--save-every", 2, "--workers", 0, kill_at=3)
    assert killed.returncode == -9
    assert json.loads(state.read_text())["position"] == 8  # twice two batches of two

    assert run(*arguments, "--workers", 0, "--output", output, "--json") == 0
    captured = capsys.readouterr()
    assert "continues after 8 of 15" in captured.err
    result = json.loads(output.read_text())
    assert json.loads(captured.out) == result
    assert result["top1"] == pytest.approx(expected)
    assert (result["top5"], result["images"]) == (100, 15)  # of three classes
    assert result["images_per_second"] > 0
    whole = json.loads(state.read_text())

    state.unlink()
    assert run(*arguments, "--workers", 2, "--inference") == 0
    assert f"top-1 {expected:.3f} %" in capsys.readouterr().out
    unbroken = json.loads(state.read_text())
    assert {**unbroken, "settings": 0, "seconds": 0} == {**whole, "settings": 0, "seconds": 0}
    assert "counts with other inference" in refused(capsys, *arguments)  # in another form: the two do not mix
    for impossible in (
        {"position": -5, "top5": -5}, {"top1": 9, "top5": 8}, {"top5": 16}, {"position": 16}, {"position": 3.0},
        {"seconds": float("nan")}, {"skipped": [1]},
    ):  # fmt: skip
        state.write_text(json.dumps(unbroken | impossible))
        assert f"{state} holds numbers that no count" in refused(capsys, *arguments, "--inference")
    state.write_text("[]")
    assert f"{state} is not a count" in refused(capsys, *arguments)


def test_evaluate_names_what_it_cannot_use(tmp_path, photographs, weights, capsys, monkeypatch):
    folder = shutil.copytree(photographs / "val", tmp_path / "damaged")
    damaged, output = folder / "bee" / "1.png", tmp_path / "result.json"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    loaded = ["--model", "tiny_volo", "--checkpoint", weights]
    arguments = evaluate(folder, *loaded, "--output", output, "--workers", 1)
    assert str(damaged) in refused(capsys, *arguments)
    assert not output.exists()
    assert run(*arguments, "--skip-unreadable") == 0
    result = json.loads(output.read_text())
    assert (result["images"], result["skipped"]) == (14, [str(damaged)])

    (tmp_path / "empty" / "dog").mkdir(parents=True)
    for arguments, told in (
        ([folder, "--model", "tiny_volo"], "random weights"),
        ([tmp_path / "none", *loaded], "no folder"),
        ([photographs, *loaded], f"did you mean {photographs / 'train'} or {photographs / 'val'}?"),
        ([folder, "--model", "tiny_volo", "--pretrained"], "1000 classes"),
        ([tmp_path / "empty", *loaded], "dog holds no image"),
        ([folder, "--model", "rednet2", "--checkpoint", weights], "rednet26"),
        ([folder, *loaded, "--resume", "/dev/full"], "--resume must be a regular file"),
    ):
        assert told in refused(capsys, *evaluate(*arguments))
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    assert "torchrun is for finetune" in refused(capsys, *evaluate(folder, *loaded))
