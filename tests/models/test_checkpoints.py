"""Official layouts in, both formats out, and everything that must be refused without touching the model."""

import argparse
import os
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import models
from models.checkpoints import read_state_dict


@pytest.fixture(scope="module")
def source():
    """A RedNet-26 whose every entry differs from a fresh one's."""
    torch.manual_seed(1)
    model = models.create_model("rednet26", num_classes=5)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape).mul(10).to(tensor.dtype))
    return model


def fresh(**kwargs) -> Any:
    arguments: dict[str, Any] = {"num_classes": 5} | kwargs
    return models.create_model("rednet26", **arguments)


def equal(a: Any, b: Any) -> bool:
    a, b = (module.state_dict() if isinstance(module, nn.Module) else module for module in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def mmcls(state):
    return {("" if name.startswith("head") else "backbone.") + name: tensor for name, tensor in state.items()}


LAYOUTS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model, timm": lambda state: {"model": prefixed(state, "module."), "args": argparse.Namespace(lr=0.1)},
    "compiled and distributed": lambda state: prefixed(state, "module._orig_mod."),
    "mmcls": lambda state: {"meta": {"CLASSES": ("a", "b")}, "state_dict": mmcls(state), "optimizer": {"state": {}}},
    "segmenter": lambda state: {"state_dict": mmcls(state) | {"decode_head.conv.weight": torch.ones(3)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_layouts_load(layout, source, tmp_path):
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "file.pth")
    model = fresh()
    models.load_checkpoint(model, tmp_path / "file.pth")
    assert equal(model, source)


def test_a_model_with_a_backbone_of_its_own_keeps_the_prefix(source, tmp_path):
    torch.save(prefixed(source.state_dict(), "backbone."), tmp_path / "file.pth")
    detector = nn.ModuleDict({"backbone": fresh()})
    models.load_checkpoint(detector, tmp_path / "file.pth")
    assert equal(detector["backbone"], source)


@pytest.mark.parametrize("name", ["file.pth", "file.pt", "file.safetensors"])
def test_save_checkpoint_round_trip(name, source, tmp_path):
    (tmp_path / name).write_bytes(b"an older file")
    models.save_checkpoint(source.to(memory_format=torch.channels_last), tmp_path / name)
    model = fresh()
    models.load_checkpoint(model, str(tmp_path / name))
    assert equal(model, source)
    assert os.listdir(tmp_path) == [name], "a temporary file was left behind"


def test_a_failed_save_leaves_the_old_file(source, tmp_path, monkeypatch):
    def fails(state, file):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    path = tmp_path / "file.pth"
    path.write_bytes(b"an older file")
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        models.save_checkpoint(source, path)
    assert path.read_bytes() == b"an older file"
    assert os.listdir(tmp_path) == [path.name]


def test_save_checkpoint_refuses_other_endings_and_folders(source, tmp_path):
    with pytest.raises(ValueError, match=r"path.*\.safetensors, \.pth or \.pt.*file\.onnx"):
        models.save_checkpoint(source, tmp_path / "file.onnx")
    with pytest.raises(FileNotFoundError, match="absent"):
        models.save_checkpoint(source, tmp_path / "absent" / "file.pth")


# ---- mismatches


def changed(state, **entries):
    return {name: tensor for name, tensor in (state | entries).items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem.2.weight": None}, "1 missing from the file: stem.2.weight$"),
        ({"extra.weight": torch.ones(1)}, "1 unexpected in the file: extra.weight$"),
        (
            {"stem.2.weight": torch.ones(7)},
            r"1 of another shape or type: stem.2.weight \(expected \[32\], got \[7\]\)$",
        ),
        (
            {"stem.2.weight": torch.ones(32, dtype=torch.int8)},
            r"stem.2.weight \(expected torch.float32, got torch.int8\)",
        ),
        ({"head.fc.weight": torch.ones(5, 3)}, r"head.fc.weight \(expected \[5, 2048\], got \[5, 3\]\)"),
        ({"head.fc.weight": torch.ones(6, 2048)}, r"head.fc.weight \(expected \[5, 2048\], got \[6, 2048\]\)"),
        ({"stem.0.conv.weight": torch.ones(32, 3, 5, 5)}, r"stem.0.conv.weight \(expected \[32, 3, 3, 3\]"),
    ],
)
def test_a_mismatch_lists_the_names_and_changes_nothing(change, message, source, tmp_path):
    torch.save(changed(source.state_dict(), **change), tmp_path / "file.pth")
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"file\.pth does not fit RedNet\n  .*" + message):
        models.load_checkpoint(model, tmp_path / "file.pth")
    assert equal(model, before)


def test_a_long_list_of_names_is_cut(source, tmp_path):
    models.save_checkpoint(source, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"100 missing from the file: layer1\.1.conv1\.weight.*and 90 more") as caught:
        models.load_checkpoint(models.create_model("rednet38", num_classes=5), tmp_path / "file.pth")
    assert len(str(caught.value)) < 1000


# ---- files that are no weight files


class Hostile:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


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
    ],
)
def test_a_file_without_a_state_dict_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "file.pth")


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "absent.pth")):
        models.load_checkpoint(nn.Linear(2, 2), tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="not a file"):
        models.load_checkpoint(nn.Linear(2, 2), tmp_path)
    with pytest.raises(TypeError, match="path_or_url must be a str or a path, got dict"):
        models.load_checkpoint(nn.Linear(2, 2), {})  # pyright: ignore[reportArgumentType]


# ---- models that differ from the file on purpose


def test_another_number_of_classes_keeps_the_fresh_classifier(source, tmp_path):
    models.save_checkpoint(source, tmp_path / "file.pth")
    model = fresh(num_classes=9)
    classifier = model.get_classifier().weight.clone()
    with pytest.warns(UserWarning, match=r"head\.fc keeps its own values: the file has 5 classes, the model 9"):
        models.load_checkpoint(model, tmp_path / "file.pth")
    assert torch.equal(model.get_classifier().weight, classifier)
    assert torch.equal(model.layer4[0].conv1.weight, source.layer4[0].conv1.weight)

    without = fresh(num_classes=0)
    models.load_checkpoint(without, tmp_path / "file.pth")
    assert equal(without.layer4, source.layer4)


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_another_number_of_channels_sums_or_tiles_the_first_convolution(in_chans, source, tmp_path):
    models.save_checkpoint(source, tmp_path / "file.pth")
    model = fresh(in_chans=in_chans)
    models.load_checkpoint(model, tmp_path / "file.pth")
    ours, original = model.stem[0].conv, source.stem[0].conv
    if in_chans != 4:  # then the response to grey is the same
        grey = torch.rand(1, 1, 16, 16)
        answer, expected = ours(grey.expand(-1, in_chans, -1, -1)), original(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(answer, expected)
    if in_chans > 1:
        tiled = torch.stack([original.weight[:, channel % 3] for channel in range(in_chans)], 1)
        torch.testing.assert_close(ours.weight, tiled * (3 / in_chans))


def test_features_only_takes_the_stages_it_has(source, tmp_path):
    torch.save(mmcls(source.state_dict()), tmp_path / "file.pth")
    model = fresh(features_only=True, out_indices=(0, 1))
    models.load_checkpoint(model, tmp_path / "file.pth")
    assert equal(model.layer2, source.layer2)


class Positions(nn.Module):
    def __init__(self, height, width):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, height, width, 4))


def test_a_position_embedding_is_resized(tmp_path):
    small, large = Positions(4, 4), Positions(9, 6)
    rows = torch.linspace(-1, 1, 4)
    small.pos_embed.data[:] = rows[None, :, None, None] * torch.arange(1, 5)
    models.save_checkpoint(small, tmp_path / "file.pth")
    models.load_checkpoint(large, tmp_path / "file.pth")
    resized = large.pos_embed.detach()
    torch.testing.assert_close(resized, resized[:, :, :1].expand_as(resized))  # constant rows stay constant
    torch.testing.assert_close(resized, -resized.flip(1))
    torch.testing.assert_close(resized[..., 3], 4 * resized[..., 0])
    assert (resized[0, 1:, 0, 0] > resized[0, :-1, 0, 0]).all()


def test_a_family_may_adapt_the_state_itself(source, tmp_path):
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))

        def adapt_state_dict(self, state):
            return {"scale": state["gamma"]}

    torch.save({"gamma": torch.arange(3.0)}, tmp_path / "file.pth")
    model = Renamed()
    models.load_checkpoint(model, tmp_path / "file.pth")
    assert torch.equal(model.scale, torch.arange(3.0))
