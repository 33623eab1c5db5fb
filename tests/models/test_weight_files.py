"""Files of weights: what is written is read whatever its name, what says something of itself, what is refused."""

import os
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from models.checkpoints import read_state_dict
from models.metadata import Metadata, read_metadata
from tests.support import Hostile, equal_entries, unchanged


@pytest.mark.parametrize("name", ["file.pth", "file.pt", "file.safetensors"])
def test_save_checkpoint_round_trip(name, tmp_path):
    source, model = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    source.weight.data = source.weight.data.contiguous(memory_format=torch.channels_last)
    (tmp_path / name).write_bytes(b"an older file")
    models.save_checkpoint(source, tmp_path / name)
    assert os.listdir(tmp_path) == [name], "a temporary file was left behind"
    models.load_checkpoint(model, str(tmp_path / name))
    for other in ("weights", "model.bin", "a.pth"):  # formats are told by content
        os.replace(tmp_path / name, tmp_path / other)
        assert torch.equal(read_state_dict(tmp_path / other)["weight"], source.weight)
        os.replace(tmp_path / other, tmp_path / name)
    assert torch.equal(model.weight, source.weight)


def test_save_checkpoint_refuses_other_endings_and_folders(tmp_path):
    for error, path in ((ValueError, "file.onnx"), (FileNotFoundError, "absent/file.pth")):
        with pytest.raises(error, match=rf"^path.*{path.partition('/')[0]}"):
            models.save_checkpoint(nn.Linear(2, 2), tmp_path / path)


HOLDING_ITSELF: dict[str, Any] = {}
HOLDING_ITSELF |= {"model": HOLDING_ITSELF, "net": {"state_dict": HOLDING_ITSELF}}


def damaged_archive(whole):
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("file.pth", lambda whole: whole[: len(whole) // 2], "is damaged, truncated"),
        ("file.pth", lambda whole: whole[:-1], "is damaged, truncated"),
        ("file.pth", damaged_archive, "checksum"),
        ("file.pth", lambda whole: b"", "is empty"),
        ("file.pth", lambda whole: b"\n<!DOCTYPE html><title>Log in</title>", "web page"),
        ("file.pth", lambda whole: b'{"message": "rate limit"}', "is damaged, truncated or holds more than tensors"),
        ("file.pth", lambda whole: b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("file.safetensors", lambda whole: whole[: len(whole) // 2], "is damaged, truncated"),
        ("file.safetensors", lambda whole: b"<html>", "web page"),
    ],
)
def test_a_damaged_file_is_refused(name, damage, reason, tmp_path):
    path, model = tmp_path / name, nn.Linear(50, 50)
    models.save_checkpoint(model, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
        models.load_checkpoint(model, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_and_not_run(zipped, tmp_path):
    path, flag = tmp_path / "file.pth", tmp_path / "was_run"
    torch.save({"state_dict": Hostile(flag)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"file\.pth was refused: it asks to call \w+\.mkdir"):
        models.load_checkpoint(nn.Linear(2, 2), path)
    path.write_bytes(pickle.dumps(Hostile(flag)))
    with pytest.raises(ValueError, match=r"file\.pth .* more than tensors and plain values"):
        models.load_checkpoint(nn.Linear(2, 2), path)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "no state dict but list"),
        ({}, "no state dict but an empty dict"),
        ({"state_dict": {}}, "no state dict but an empty dict"),
        ({"epoch": 3}, "expected tensors by name, got 'epoch': int"),
        ({3: torch.ones(1)}, "expected tensors by name, got 3: Tensor"),
        (HOLDING_ITSELF, "no state dict"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "file.pth")


def test_only_files_are_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "absent.pth")):
        models.load_checkpoint(nn.Linear(2, 2), tmp_path / "absent.pth")
    for path in ("a" * 300, "权" * 200, "a\0b"):
        with pytest.raises(FileNotFoundError, match="checkpoint: no file"):
            models.create_model("rednet26", checkpoint=path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="not a file"):
            models.load_checkpoint(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="path_or_url must be a str or a path, got dict"):
        models.load_checkpoint(nn.Linear(2, 2), {})  # pyright: ignore[reportArgumentType]


# ---- what a file says of itself


METADATA = Metadata((64, 96), 0.9, "bilinear", (0.5,), (0.25,), "rednet26", {"in_chans": 1}, ("ant", "bee", "猫"))


def test_a_file_says_how_its_model_is_built_and_fed(tmp_path):
    model = models.create_model("rednet26", num_classes=3, in_chans=1)
    models.save_checkpoint(model, tmp_path / "file.safetensors", METADATA)
    assert read_metadata(tmp_path / "file.safetensors") == METADATA
    again: Any = models.create_model("rednet26", checkpoint=tmp_path / "file.safetensors")
    assert equal_entries(again, model)
    expected = {"input_size": (1, 64, 96), "crop_pct": 0.9, "interpolation": "bilinear", "mean": (0.5,), "std": (0.25,)}
    assert {**again.pretrained_cfg, **expected, "label_names": ["ant", "bee", "猫"]} == again.pretrained_cfg
    with pytest.warns(UserWarning, match="3 classes, the model 9"):
        other: Any = models.create_model("rednet26", checkpoint=tmp_path / "file.safetensors", num_classes=9)
    assert "label_names" not in other.pretrained_cfg
    with pytest.raises(ValueError, match=r"metadata needs a path that ends in \.safetensors"):
        models.save_checkpoint(model, tmp_path / "file.pth", METADATA)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("size", "[1e9, 3]"), ("size", "[true, true]"), ("mean", "[NaN]"), ("std", "[0.0]"), ("std", "[1.0, 1.0, 1.0]"),
        ("crop_pct", "0"), ("interpolation", '"lanczos"'), ("classes", "[1, 2]"), ("classes", "[" * 100_000),
        ("model_args", "[]"), ("model", None), ("dynamic_kernels", "99"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused_and_nothing_changes(entry, value, tmp_path):
    header = {name: text for name, text in (METADATA.header() | {entry: value}).items() if text is not None}
    source = nn.Linear(2, 2)
    save_file(source.state_dict(), tmp_path / "file.safetensors", metadata=header)
    model, message = nn.Linear(2, 2), r"checkpoint: the header of .*file\.safetensors is (damaged|of version)"
    with unchanged(model), pytest.raises(ValueError, match=message):
        models.load_checkpoint(model, tmp_path / "file.safetensors")
