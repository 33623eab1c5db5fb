"""Official layouts in, both formats out, and everything that must be refused without touching the model."""

import argparse
import copy
import datetime
import decimal
import os
import pickle
import sys
import types
import warnings
from collections import defaultdict, deque
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import models
from models.checkpoints import read_state_dict
from models.metadata import Metadata, read_metadata


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


def loaded(content: Any, folder: Path, model: Any = None, **options: Any) -> Any:
    """``model``, or a fresh one, with what ``torch.save`` wrote of ``content``."""
    torch.save(content, folder / "file.pth")
    model = fresh() if model is None else model
    models.load_checkpoint(model, folder / "file.pth", **options)
    return model


def equal(a: Any, b: Any) -> bool:
    a, b = (module.state_dict() if isinstance(module, nn.Module) else module for module in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def mmcls(state):
    return {("" if name.startswith("head") else "backbone.") + name: tensor for name, tensor in state.items()}


def without(state, *endings):
    return {name: tensor for name, tensor in state.items() if not name.endswith(endings)}


def holding_itself(state):
    content = {"epoch": 3}
    content |= {"model": content, "net": {"state_dict": content, "weights": state}}
    return content


class HistoryBuffer:
    """What MMEngine's checkpoints hold beside the weights, under its name there."""

    def __init__(self):
        self.history = np.arange(3.0)


UTC = datetime.timezone.utc
BESIDE = {
    "numpy": [np.float64(0.5), np.arange(6).reshape(2, 3), np.dtype("int64"), np.bool_(True), np.array(["a"], object)],
    "paths": [Path("runs/1"), PurePosixPath("/data"), PureWindowsPath("C:\\data")],
    "arguments": [argparse.Namespace(lr=np.float32(0.1)), types.SimpleNamespace(a=1), defaultdict(list, a=[1])],
    "dates": [datetime.datetime(2024, 1, 2, tzinfo=UTC), datetime.timedelta(3), datetime.date(2024, 1, 2)],
    "others": [deque([1, 2]), frozenset({1}), range(3), slice(2), decimal.Decimal("0.1"), torch.__version__],
    "message_hub": {"loss": HistoryBuffer()},
    "dtypes": [torch.float16, torch.device("cpu"), torch.Size([1]), {1, 2}, complex(1), b"bytes"],
}

LAYOUTS = {
    "plain": lambda state: state,
    "net": lambda state: {"net": prefixed(state, "net."), "acc": 93.1},
    "params": lambda state: {"params": state, "params_ema": None},
    "student alone": lambda state: {"student": prefixed(state, "module.backbone."), "teacher": {"a": torch.ones(1)}},
    "averaged alone": lambda state: {"state_dict_ema": state},
    "containers in containers": lambda state: {"model": {"state_dict": {"module": prefixed(state, "module.")}}},
    "module, model, net": lambda state: prefixed(state, "module.model._orig_mod.net."),
    "compiled inside": lambda state: {name.replace("layer2.", "layer2._orig_mod."): t for name, t in state.items()},
    "Lightning": lambda state: {
        "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": {"path": Path("x")},
        "pytorch-lightning_version": "2.5",
    },
    "average of weights": lambda state: prefixed(state, "module.") | {"n_averaged": torch.tensor(3)},
    "no counters, as of old": lambda state: without(state, "num_batches_tracked"),
    "thop's counters": lambda state: state | {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)},
    "plain values among the entries": lambda state: (
        state | {"epoch": 3, "best": np.float64(0.5), "names": ["a"], 7: None}
    ),
    "counters as floats": lambda state: {
        name: t.float() if name.endswith("num_batches_tracked") and "layer1" in name else t for name, t in state.items()
    },
    "no head's wrapper": lambda state: {"state_dict": prefixed(mmcls(state), "module.")},
    "inside itself": holding_itself,
    **{f"beside {name}": (lambda state, name=name: {"state_dict": state, name: BESIDE[name]}) for name in BESIDE},
    "model, timm": lambda state: {"model": prefixed(state, "module._orig_mod."), "args": argparse.Namespace(lr=0.1)},
    "mmcls": lambda state: {"meta": {"CLASSES": ("a", "b")}, "state_dict": mmcls(state), "optimizer": {"state": {}}},
    "segmenter": lambda state: {"state_dict": mmcls(state) | {"decode_head.conv.weight": torch.ones(3)}},
}


@pytest.mark.parametrize(
    ("layout", "zipped"), [(name, zip) for name in LAYOUTS for zip in (True, False) if zip or name.startswith("beside")]
)
@pytest.mark.filterwarnings("ignore:left out of .*criterion")
def test_official_layouts_load(layout, zipped, source, tmp_path, monkeypatch):
    monkeypatch.setattr(HistoryBuffer, "__module__", "mmengine.logging.history_buffer")
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer  # pyright: ignore[reportAttributeAccessIssue]
    content = LAYOUTS[layout](source.state_dict())
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    model = fresh()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?!left out of .*criterion)")
        models.load_checkpoint(model, tmp_path / "file.pth")
    ours, theirs = model.state_dict(), source.state_dict()
    if "counters as" in layout or "no counters" in layout:  # those start anew
        ours, theirs = (without(state, "num_batches_tracked") for state in (ours, theirs))
    assert equal(ours, theirs)


# ---- averaged weights


def moved(state):
    return {name: tensor + 1 for name, tensor in state.items()}


PARAMETERS = [name for name, _ in models.create_model("rednet26", num_classes=5).named_parameters()]
PREFERRED, UNUSABLE = (
    r"file\.pth holds averaged weights .* beside the last ones: the averaged",
    "that are not this model's",
)
AVERAGED = {  # name -> content, and the warning
    "timm": (lambda last, ema: {"state_dict": last, "state_dict_ema": ema, "arch": "rednet26"}, PREFERRED),
    "timm's old scripts": (
        lambda last, ema: {"model": last, "model_ema": prefixed(ema, "module."), "epoch": 3},
        PREFERRED,
    ),
    "a table of averages": (lambda last, ema: {"model": last, "ema": {"decay": 0.9, "shadow": ema}}, PREFERRED),
    "a module in an average": (lambda last, ema: {"params": last, "params_ema": {"module": ema, "n": 3}}, PREFERRED),
    "finetune's state": (
        lambda last, ema: {
            "settings": {},
            "step": 3,
            "model": last,
            "average": {"n_averaged": torch.tensor(2), **prefixed(ema, "module.")},
        },
        PREFERRED,
    ),
    "Lightning": (
        lambda last, ema: {"state_dict": prefixed(last, "model.") | prefixed(ema, "ema_model.module.")},
        PREFERRED,
    ),
    "parameters alone": (
        lambda last, ema: {"state_dict": last, "state_dict_ema": {name: ema[name] for name in PARAMETERS}},
        PREFERRED,
    ),
    "MMEngine, which exchanges them": (
        lambda last, ema: {"state_dict": ema, "ema_state_dict": last, "message_hub": {}},
        None,
    ),
    "of something else": (lambda last, ema: {"model": last, "ema": {"0": torch.ones(1)}}, UNUSABLE),
}


@pytest.mark.parametrize("layout", AVERAGED)
def test_averaged_weights_are_preferred_with_a_word(layout, source, tmp_path):
    last, averaged = source.state_dict(), moved(source.state_dict())
    content, warning = AVERAGED[layout]
    content = content(last, averaged)
    with pytest.warns(UserWarning, match=warning) if warning else warnings.catch_warnings():
        model = loaded(content, tmp_path)
    if layout == "parameters alone":  # the buffers are the last ones
        averaged |= {name: last[name] for name in last if name not in PARAMETERS}
    assert equal(model, last if warning == UNUSABLE else averaged)
    if warning == PREFERRED:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert equal(loaded(content, tmp_path, use_ema=False), last)
            options = {"num_classes": 5, "checkpoint": tmp_path / "file.pth", "use_ema": False}
            assert equal(models.create_model("rednet26", **options), last)


# ---- wrapped models, and models without memory


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        AveragedModel,
        lambda model: nn.DataParallel(torch.compile(model)),  # pyright: ignore[reportArgumentType]
        lambda model: model.layer1.compile() or model,
        lambda model: setattr(model, "layer2", torch.compile(model.layer2)) or model,
    ],
    ids=["DataParallel", "compiled", "AveragedModel", "both", "a stage compiled in place", "a compiled stage"],
)
def test_wrapped_models_load(wrap, source, tmp_path):
    models.save_checkpoint(source, tmp_path / "file.safetensors")
    wrapped = wrap(fresh())
    models.load_checkpoint(wrapped, tmp_path / "file.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(list(wrapped.state_dict().values())[-251:], source.state_dict().values(), strict=True)
    )
    models.save_checkpoint(wrapped, tmp_path / "wrapped.pth")
    model = fresh()
    models.load_checkpoint(model, tmp_path / "wrapped.pth")
    assert equal(model, source)


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_model_on_the_meta_device_gets_the_tensors(name, source, tmp_path):
    models.save_checkpoint(source, tmp_path / name)
    with torch.device("meta"):
        model = fresh().half()
        other = fresh(num_classes=9)
    model.layer1.requires_grad_(False)
    models.load_checkpoint(model, tmp_path / name)
    assert equal(model, copy.deepcopy(source).half())
    assert not model.layer1[0].conv1.weight.requires_grad
    assert model.layer2[0].conv1.weight.requires_grad
    with pytest.raises(ValueError, match=r"neither in the file nor in a model on the meta device: head\.fc"):
        models.load_checkpoint(other, tmp_path / name)
    assert all(tensor.is_meta for tensor in other.state_dict().values())


def test_entries_that_share_memory_do_not_share_it_in_a_model(tmp_path):
    shared = torch.arange(4.0)
    with torch.device("meta"):
        a, b = (nn.Linear(2, 2, bias=False) for _ in "ab")
    content = {"a.weight": shared.view(2, 2), "b.weight": shared.view(2, 2)}
    loaded(content, tmp_path, nn.ModuleDict({"a": a, "b": b}))
    with torch.no_grad():
        a.weight.zero_()
    assert b.weight.sum() == 6


def test_tensors_that_cannot_be_written_are_named_and_nothing_changes(tmp_path):
    models.save_checkpoint(nn.Linear(3, 3), tmp_path / "file.pth")
    with torch.inference_mode():
        frozen = nn.Linear(3, 3)
    expanded = nn.Linear(3, 3)
    expanded.weight = nn.Parameter(torch.ones(1, 3).expand(3, 3))
    for model in (frozen, expanded):
        before = model.bias.clone()
        with pytest.raises(ValueError, match=r"^model: \d of its tensors cannot take .*: weight"):
            models.load_checkpoint(model, tmp_path / "file.pth")
        assert torch.equal(model.bias, before)


def test_a_meta_buffer_that_no_file_has_is_named(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
        model.register_buffer("grid", torch.zeros(2), persistent=False)
    models.save_checkpoint(nn.Linear(2, 2), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"in no file.*grid"):
        models.load_checkpoint(model, tmp_path / "file.pth")


def test_a_model_with_a_backbone_of_its_own_keeps_the_prefix(source, tmp_path):
    detector = nn.ModuleDict({"backbone": fresh()})
    loaded(prefixed(source.state_dict(), "backbone."), tmp_path, detector)
    assert equal(detector["backbone"], source)


@pytest.mark.parametrize("name", ["file.pth", "file.pt", "file.safetensors"])
def test_save_checkpoint_round_trip(name, source, tmp_path):
    (tmp_path / name).write_bytes(b"an older file")
    models.save_checkpoint(source.to(memory_format=torch.channels_last), tmp_path / name)
    model = fresh()
    models.load_checkpoint(model, str(tmp_path / name))
    assert equal(model, source)
    assert os.listdir(tmp_path) == [name], "a temporary file was left behind"


def test_save_checkpoint_refuses_other_endings_and_folders(source, tmp_path):
    for error, path in ((ValueError, "file.onnx"), (FileNotFoundError, "absent/file.pth")):
        with pytest.raises(error, match=rf"^path.*{path.partition('/')[0]}"):
            models.save_checkpoint(source, tmp_path / path)


# ---- mismatches


def changed(state, **entries):
    return {name: tensor for name, tensor in (state | entries).items() if tensor is not None}


NORM = "layer1.0.bn1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem.2.weight": None}, "1 missing from the file: stem.2.weight$"),
        ({"extra.weight": torch.ones(1)}, "1 unexpected in the file: extra.weight$"),
        (
            {"stem.2.weight": torch.ones(7)},
            r"1 of another shape or type: stem.2.weight \(expected \[32\], got \[7\]\)$",
        ),
        ({"stem.2.weight": torch.ones(32).char()}, r"stem.2.weight \(expected torch.float32, got torch.int8\)"),
        ({"head.fc.weight": torch.ones(5, 3)}, r"head.fc.weight \(expected \[5, 2048\], got \[5, 3\]\)"),
        ({"head.fc.weight": torch.ones(6, 2048)}, r"head.fc.weight \(expected \[5, 2048\], got \[6, 2048\]\)"),
        ({NORM: torch.ones(64).to_sparse()}, r"\(sparse, meta, …\): layer1\.0\.bn1\.weight$"),
        ({NORM: torch.ones(64, device="meta")}, r"\(sparse, meta, …\): layer1\.0\.bn1\.weight$"),
        ({NORM: torch.ones(64, dtype=torch.complex64)}, r"got torch\.complex64"),
        ({NORM: [1.0] * 64}, "1 missing from the file: layer1.0.bn1.weight$"),
        ({"head.fc.bias": None}, "1 missing from the file: head.fc.bias$"),
        ({"stem.0.conv.weight": torch.ones(32, 3, 5, 5)}, r"stem.0.conv.weight \(expected \[32, 3, 3, 3\]"),
    ],
)
def test_a_mismatch_lists_the_names_and_changes_nothing(change, message, source, tmp_path):
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)file\.pth (does not fit RedNet\n  |holds tensors).*" + message):
        loaded(changed(source.state_dict(), **change), tmp_path, model)
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
        (holding_itself({}), "no state dict"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "file.pth")


def test_what_is_no_file_is_refused(tmp_path):
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


def test_a_file_without_a_head_leaves_the_models_own(source, tmp_path):
    headless = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head.")}
    model = fresh()
    head = copy.deepcopy(model.head)
    with pytest.warns(UserWarning, match="^head keeps its own values: the file has none"):
        loaded(headless, tmp_path, model)
    assert equal(model.head, head)
    assert equal(model.layer4, source.layer4)
    models.load_checkpoint(fresh(num_classes=0), tmp_path / "file.pth")


def test_a_model_twice_in_a_file_is_refused(source, tmp_path):
    state = source.state_dict()
    with pytest.raises(ValueError, match=r"holds the model twice, behind 'model\.' and behind 'student\.'"):
        loaded(prefixed(state, "student.") | prefixed(state, "model."), tmp_path)


@pytest.mark.parametrize("name", ["weights", "model.bin", "a.pth"])
def test_formats_are_told_by_content_not_by_name(name, source, tmp_path):
    for suffix in (".pth", ".safetensors"):
        models.save_checkpoint(source, tmp_path / f"file{suffix}")
        os.replace(tmp_path / f"file{suffix}", tmp_path / name)
        assert equal(read_state_dict(tmp_path / name), source)


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


# ---- what a file says of itself


METADATA = Metadata((64, 96), 0.9, "bilinear", (0.5,), (0.25,), "rednet26", {"in_chans": 1}, ("ant", "bee", "猫"))


def test_a_file_says_how_its_model_is_built_and_fed(tmp_path):
    model = models.create_model("rednet26", num_classes=3, in_chans=1)
    models.save_checkpoint(model, tmp_path / "file.safetensors", METADATA)
    assert read_metadata(tmp_path / "file.safetensors") == METADATA
    again: Any = models.create_model("rednet26", checkpoint=tmp_path / "file.safetensors")
    assert equal(again, model)
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
    model = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint: the header of .*file\.safetensors is (damaged|of version)"):
        models.load_checkpoint(model, tmp_path / "file.safetensors")
    assert equal(model, before)
