"""``python -m models``: what each command prints and writes, what it refuses, and what a kill -9 leaves behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import models
from models import registry
from models.__main__ import main
from models._contract import BackboneContract, pretrained_config
from models.commands.classify import imagenet_classes
from models.commands.folders import EvaluationImages, ImageFolder, TrainingImages
from models.commands.images import Augmentation, Preprocessing, read_image
from models.commands.optimisation import Objective, cosine_with_warmup, layer_numbers, parameter_groups
from models.volo import VOLO

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")


def tiny_volo(pretrained: bool = False, batch_norm: bool = True, **options) -> VOLO:
    """In the registry for these tests: a VOLO that trains a step in milliseconds."""
    model = VOLO((1, 1, 1, 1), (16, 32), (2, 2), stem_dim=8, **{"img_size": 32, "drop_path_rate": 0.2, **options})
    if not batch_norm:
        for index in (1, 4, 7):
            model.patch_embed.conv[index] = nn.Identity()
    model.pretrained_cfg = pretrained_config(input_size=(3, *model.img_size), crop_pct=0.875)
    return model


# A process of its own, which kills itself, as kill -9 does, when it is about to put the Nth file in place.
LAUNCHER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from models import registry
from models.__main__ import main
from tests.models.test_commands import tiny_volo
registry.register_model(tiny_volo)
left, replace = int(sys.argv[1]), os.replace
def killed(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def _tiny_volo_registered(monkeypatch):
    """And one thread, as in the processes that are killed: sums in another order round differently."""
    monkeypatch.setitem(registry._entry_points, "tiny_volo", tiny_volo)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(3)
    model = tiny_volo(num_classes=3)
    nn.init.normal_(model.get_classifier().get_parameter("weight"))  # so that the classes differ
    models.save_checkpoint(model, path)
    return path


def launch(folder: Path, *arguments: object, kill_at: int = 0, processes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = folder / "launcher.py"
    script.write_text(LAUNCHER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), str(kill_at), *map(str, arguments)]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=240)


def refused(capsys, *arguments: object) -> str:
    """The single line that a command answers; the command itself must have ended with 2."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1]
    return lines[-1]


# ---- list


def test_list_counts_parameters_and_knows_the_papers_accuracies(capsys):
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == models.list_models()
    assert rows["overlock_t"]["top1"] == rows["overlock_t_reparam"]["top1"] == 84.2
    assert round(rows["overlock_t_reparam"]["parameters"] / 1e6) == 33  # without the auxiliary classifier
    assert rows["rednet50"]["weights"] is None
    assert rows["volo_d1"]["weights"].startswith("https://")
    published = [row for name, row in rows.items() if name != "tiny_volo"]
    assert all(75 < row["top1"] < 87 for row in published)

    assert main(["list", "rednet*"]) == 0
    table = capsys.readouterr().out
    assert "rednet152" in table
    assert "33.98" in table
    assert "volo" not in table
    assert "'resnet*'" in refused(capsys, "list", "resnet*")


def test_imagenet_has_a_thousand_names_in_the_published_order():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    assert [names[label] for label in (0, 207, 281, 817, 999)] == [
        "tench",
        "golden retriever",
        "tabby",
        "sports car",
        "toilet tissue",
    ]


# ---- images


def test_test_crop_is_resize_then_centre_crop(tmp_path):
    preprocessing = Preprocessing((224, 224), 0.875, "bilinear", (0.0,) * 3, (1.0,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    # torchvision: the shorter side becomes 256, the longer int(256 · 401 / 300) = 342; crop from (16, 59)
    expected = image.resize((342, 256), Image.Resampling.BILINEAR).crop((59, 16, 283, 240))
    assert torch.equal(preprocessing(image), torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)

    framed = Preprocessing((224, 224), 1.15, "bicubic", (0.5,) * 3, (0.5,) * 3)(image)  # resized to 194: a black frame
    assert framed.shape == (3, 224, 224)
    assert (framed[:, :15] == -1).all()
    assert (framed[:, 15:209, 15:209] > -1).any()

    grey = tmp_path / "grey.png"
    Image.fromarray(pixels[..., 0]).save(grey)
    assert read_image(grey).mode == "RGB"
    wide = Preprocessing((64, 128), 1.0, "bicubic", (0.0,), (1.0,))
    assert wide(read_image(grey, 1)).shape == (1, 64, 128)


def test_augmentation_depends_on_seed_epoch_and_index_alone(images):
    folder = ImageFolder(images / "train")
    augmentation = Augmentation(Preprocessing((32, 32), 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3))
    ours, again, other = (TrainingImages(folder.samples, augmentation, seed) for seed in (0, 0, 1))
    first = ours[0, 3]
    ours[0, 4]
    assert isinstance(first, tuple)
    assert torch.equal(first[0], again[0, 3][0])  # pyright: ignore[reportIndexIssue]
    for changed in (ours[1, 3], other[0, 3]):
        assert not torch.equal(first[0], changed[0])  # pyright: ignore[reportIndexIssue]
    generator = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = augmentation.box(48, 40, generator)
        assert 0 <= left < right <= 48
        assert 0 <= top < bottom <= 40
        assert (right - left) * (bottom - top) >= 0.07 * 48 * 40


# ---- classify


def test_classify_names_probabilities_and_draws_them(tmp_path, images, weights, capsys):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"the {name}\n" for name in CLASSES))
    photographs = [images / "val" / name / "0.png" for name in CLASSES[:2]]
    picture = tmp_path / "bars.png"
    arguments = ["--model", "tiny_volo", "--checkpoint", weights, "--device", "cpu", "--output", picture]
    assert main([*map(str, ["classify", *photographs, *arguments, "--classes", names, "--json"])]) == 0
    captured = capsys.readouterr()
    assert "RANDOM" not in captured.err
    report = json.loads(captured.out)
    model = models.create_model("tiny_volo", checkpoint=weights, num_classes=3).eval()
    preprocessing = Preprocessing.of(model)  # pyright: ignore[reportArgumentType]
    for photograph, row in zip(photographs, report["images"], strict=True):
        with torch.no_grad():
            expected = model(preprocessing(read_image(photograph))[None])[0].softmax(0)
        assert row["image"] == str(photograph)
        assert sorted(guess["name"] for guess in row["guesses"]) == [f"the {name}" for name in CLASSES]
        for guess in row["guesses"]:
            assert guess["probability"] == pytest.approx(expected[guess["class"]].item(), rel=1e-5)
    with Image.open(picture) as drawn:
        assert drawn.width > 600
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 100  # photographs and bars, not a blank

    assert main([*map(str, ["classify", photographs[0], "--model", "tiny_volo", "--output", picture])]) == 0
    captured = capsys.readouterr()
    assert "RANDOM WEIGHTS" in captured.err
    assert any(line.split("%")[-1].strip() in imagenet_classes() for line in captured.out.splitlines()[1:])


def test_classify_refuses_before_anything_is_written(tmp_path, images, weights, capsys):
    photograph, picture = images / "val" / "ant" / "0.png", tmp_path / "bars.png"
    text = tmp_path / "text.png"
    text.write_text("no image")
    tail = ["--model", "tiny_volo", "--output", picture]
    assert str(text) in refused(capsys, "classify", photograph, text, *tail)
    assert "did you mean" in refused(capsys, "classify", photograph, "--model", "tiny_vol", "--output", picture)
    assert "3 classes" in refused(capsys, "classify", photograph, *tail, "--checkpoint", weights, "--classes", text)
    assert "no file" in refused(capsys, "classify", photograph, *tail, "--checkpoint", tmp_path / "none.pth")
    assert "--output" in refused(capsys, "classify", photograph, *tail[:3], tmp_path / "none" / "bars.png")
    assert not picture.exists()


# ---- evaluate


def evaluate(*arguments: object) -> list[str]:
    return [*map(str, ["evaluate", *arguments, "--model", "tiny_volo", "--device", "cpu", "--batch", 2])]


@pytest.mark.slow
def test_evaluate_counts_and_continues_after_a_kill(tmp_path, images, weights, capsys):
    model = tiny_volo(num_classes=3).eval()
    models.load_checkpoint(model, weights)
    folder = ImageFolder(images / "val")
    assert folder.classes == list(CLASSES)
    preprocessing = Preprocessing.of(model)
    items = [EvaluationImages(folder.samples, preprocessing)[index] for index in range(len(folder.samples))]
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in items]))  # pyright: ignore[reportGeneralTypeIssues]
    labels = torch.tensor([label for _, label in items])  # pyright: ignore[reportGeneralTypeIssues]
    expected = 100 * (logits.argmax(1) == labels).float().mean().item()

    state, output = tmp_path / "count.json", tmp_path / "result.json"
    arguments = evaluate(images / "val", "--checkpoint", weights, "--resume", state, "--save-every", 2, "--workers", 0)
    killed = launch(tmp_path, *arguments, kill_at=3)
    assert killed.returncode == -9
    assert json.loads(state.read_text())["position"] == 8  # twice two batches of two

    assert main([*arguments, "--output", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    assert "continues after 8 of 15" in captured.err
    result = json.loads(output.read_text())
    assert json.loads(captured.out) == result
    assert result["top1"] == pytest.approx(expected)
    assert result["top5"] == 100  # of three classes
    assert result["images"] == 15
    assert result["images_per_second"] > 0
    whole = json.loads(state.read_text())

    state.unlink()
    parallel = [*evaluate(images / "val", "--checkpoint", weights, "--resume", state), "--workers", "2", "--inference"]
    assert main(parallel) == 0
    assert f"top-1 {expected:.3f} %" in capsys.readouterr().out
    unbroken = json.loads(state.read_text())
    assert {**unbroken, "settings": 0, "seconds": 0} == {**whole, "settings": 0, "seconds": 0}
    assert "inference" in refused(capsys, *parallel[:-1])  # counted in another form: the two do not mix
    for impossible in (
        {"position": -5, "top5": -5},
        {"top1": 9, "top5": 8},
        {"top5": 16},
        {"position": 16},
        {"seconds": float("nan")},
        {"position": 3.0},
        {"skipped": [1]},
    ):
        state.write_text(json.dumps(unbroken | impossible))
        assert f"{state} holds numbers that no count" in refused(capsys, *parallel)


def test_evaluate_names_what_it_cannot_use(tmp_path, images, weights, capsys):
    folder = tmp_path / "damaged"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for index in range(2):
            target = folder / name / f"{index}.png"
            target.write_bytes((images / "val" / name / f"{index}.png").read_bytes())
    damaged = folder / "bee" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    output = tmp_path / "result.json"
    arguments = [*evaluate(folder, "--checkpoint", weights, "--output", output), "--workers", "1"]
    assert str(damaged) in refused(capsys, *arguments)
    assert not output.exists()
    assert main([*arguments, "--skip-unreadable"]) == 0
    result = json.loads(output.read_text())
    assert result["images"] == 5
    assert str(damaged) in result["skipped"][0]

    damaged.unlink()
    assert "random weights" in refused(capsys, *evaluate(folder))
    assert "no folder" in refused(capsys, *evaluate(tmp_path / "none", "--checkpoint", weights))
    assert f"did you mean {images / 'val'}?" in refused(capsys, *evaluate(images, "--checkpoint", weights))
    assert "1000 classes" in refused(capsys, *evaluate(folder, "--pretrained"))
    (folder / "dog").mkdir()
    assert str(folder / "dog") in refused(capsys, *evaluate(folder, "--checkpoint", weights))
    count = tmp_path / "count.json"
    count.write_text("[]")
    assert str(count) in refused(capsys, *evaluate(images / "val", "--checkpoint", weights, "--resume", count))
    assert "rednet26" in refused(capsys, "evaluate", folder / "..", "--model", "rednet2", "--checkpoint", weights)


# ---- finetune


def finetune(images: Path, output: Path, *arguments: object) -> list[str]:
    fixed = ["--model", "tiny_volo", "--epochs", 2, "--batch", 4, "--lr", 1e-3, "--workers", 0, "--device", "cpu"]
    return [*map(str, ["finetune", images, "--output", output, *fixed, *arguments])]


def log_of(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


# Files are put in place in this order: settings and classes; states of the steps 2 and 4; last and best weights and
# state of 6; states of 8 and 10; weights and state of 12.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kill_at", [4, 9], ids=["while writing the state of step 4", "while writing the state of step 10"]
)
def test_finetune_takes_the_same_path_after_a_kill(tmp_path, images, weights, kill_at, capsys):
    options = ["--log-every", 3, "--save-every", 2, "--checkpoint", weights, "--model-kwargs", "return_dense=True"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(finetune(images, whole, *options)) == 0
    log = log_of(whole)
    assert [row["step"] for row in log] == [3, 6, 6, 9, 12, 12]
    assert len({row["loss"] for row in log if "loss" in row}) == 4

    assert launch(tmp_path, *finetune(images, broken, *options), kill_at=kill_at).returncode == -9
    assert len(log_of(broken)) < len(log)
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # as a kill while a row is written leaves it
    capsys.readouterr()
    assert main(finetune(images, broken, *options)) == 0
    assert "continues after step" in capsys.readouterr().err
    assert log_of(broken) == log
    for name in ("last", "best"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (broken, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[entry], theirs[entry]) for entry in ours)
    assert (broken / "classes.txt").read_text().split() == list(CLASSES)
    # What was kept is what was measured.
    assert main(evaluate(images / "val", "--checkpoint", broken / "best.safetensors", "--json", "--workers", 0)) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(log[-1]["best_top1"])

    assert "--batch was 4, is 6" in refused(capsys, *finetune(images, broken, *options, "--batch", 6))
    assert log_of(broken) == log


@pytest.mark.slow
def test_finetune_under_torchrun_equals_one_process_with_as_many_images(tmp_path, images):
    """Without batch norms, whose statistics are each process's own, and without dropped paths."""
    options = ["--epochs", 1, "--log-every", 2, "--ema", 0.9, "--drop-path", 0, "--model-kwargs", "batch_norm=False"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    ran = launch(tmp_path, *finetune(images, together, *options, "--batch", 2), processes=2)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((together / "settings.json").read_text())["processes"] == 2
    assert main(finetune(images, alone, *options, "--batch", 4)) == 0
    ours, theirs = log_of(together), log_of(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [2, 4, 6, 6]
    assert [row["loss"] for row in ours[:-1]] == pytest.approx([row["loss"] for row in theirs[:-1]], rel=1e-4)
    assert ours[-1] == pytest.approx(theirs[-1])  # each image of val counted once, 8 here and 7 there
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (together, alone))
    errors = {name: (ours[name] - theirs[name]).abs().max().item() for name in theirs}
    assert max(errors.values()) < 1e-4, errors  # a tenth of the learning rate


def test_finetune_refuses_before_anything_is_written(tmp_path, images, weights, capsys):
    output = tmp_path / "run"
    for arguments, told in (
        (finetune(images, output, "--min-lr", 1), "--min-lr must be at most the peak of 0.001"),
        (finetune(images, output, "--warmup-epochs", 5), "--warmup-epochs must be below the 2 epochs"),
        (finetune(images, output, "--batch", 500), "there are only 24"),
        (finetune(images, output, "--val", images / "val" / ".."), "same class folders"),
        (finetune(tmp_path / "none", output), "no folder"),
        (finetune(images, output, "--checkpoint", images / "val" / "ant" / "0.png"), "0.png"),
        (finetune(images, output, "--model-kwargs", "num_classes=7"), "num_classes must be 3"),
        (finetune(images, output, "--model-kwargs", "depth=7"), "depth"),
        (finetune(images, weights), "--output must be a folder"),
    ):
        assert told in refused(capsys, *arguments)
    assert not output.exists()


# ---- what the loop is made of


def test_objective_of_each_familys_training_output():
    torch.manual_seed(0)
    labels = torch.tensor([0, 2, 1, 1])
    objective = Objective(auxiliary_weight=0.4)
    main_logits, auxiliary = torch.randn(2, 4, 3).unbind()
    cross_entropy = nn.functional.cross_entropy
    expected = cross_entropy(main_logits, labels)
    assert objective(main_logits, labels) == expected
    both = objective({"main": main_logits, "aux": auxiliary}, labels)
    torch.testing.assert_close(both, expected + 0.4 * cross_entropy(auxiliary, labels))

    tokens = torch.randn(4, 6, 3)  # of a 2×3 map, of which the box covers 2
    mixed = objective((main_logits, tokens, torch.tensor([0, 1, 1, 3])), labels)
    by_token = torch.stack([cross_entropy(tokens[:, t], labels) for t in range(6)]).mean()
    opposite = cross_entropy(main_logits, labels.flip(0))
    torch.testing.assert_close(mixed, 4 / 6 * expected + 2 / 6 * opposite + 0.5 * by_token)


def test_learning_rate_rises_then_falls():
    rates = [cosine_with_warmup(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["overlock_xt", "rednet26", "volo_d1"])
def test_parameter_groups_decay_matrices_alone_and_rank_layers(name):
    with torch.device("meta"):
        model = models.create_model(name)
    assert isinstance(model, BackboneContract)
    groups = parameter_groups(model, 0.05, layer_decay=0.9)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    grouped = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert grouped.keys() == dict(model.named_parameters()).keys()
    spared = model.no_weight_decay()
    for key, parameter in model.named_parameters():
        assert (grouped[key]["weight_decay"] == 0) == (parameter.ndim <= 1 or key in spared), key

    numbers = layer_numbers(model, list(grouped))
    first = {
        "overlock_xt": "patch_embed1.0.weight",
        "rednet26": "stem.0.conv.weight",
        "volo_d1": "patch_embed.conv.0.weight",
    }
    head = f"{next(iter(model.classifiers))}.weight"
    assert numbers[first[name]] == 0
    assert numbers[head] == max(numbers.values()) > 5
    assert grouped[head]["rate_scale"] == 1
    assert grouped[first[name]]["rate_scale"] == pytest.approx(0.9 ** numbers[head])
