"""Layouts of official files, averaged weights, wrapped models; and what does not fit, which changes nothing."""

import argparse
import copy
import datetime
import decimal
import sys
import types
import warnings
from collections import defaultdict, deque
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import models
from models.rednet import RedNet
from tests.support import equal_entries, unchanged


def fresh(**options) -> Any:
    return RedNet(**{"depths": (1, 1, 0, 0), "num_classes": 5, **options})


@pytest.fixture(scope="module")
def source():
    """A RedNet whose every entry differs from a fresh one's."""
    torch.manual_seed(1)
    model = fresh()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape).mul(10).to(tensor.dtype))
    return model


def loaded(content: Any, folder: Path, model: Any = None, **options: Any) -> Any:
    """``model``, or a fresh one, which has loaded what ``torch.save`` wrote of ``content``."""
    torch.save(content, folder / "file.pth")
    model = fresh() if model is None else model
    models.load_checkpoint(model, folder / "file.pth", **options)
    return model


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


class HistoryBuffer(types.SimpleNamespace):
    """What MMEngine's checkpoints hold beside the weights, under its name there."""


UTC = datetime.timezone.utc
BESIDE = {
    "numpy": [np.float64(0.5), np.arange(6).reshape(2, 3), np.dtype("int64"), np.bool_(True), np.array(["a"], object)],
    "paths": [Path("runs/1"), PurePosixPath("/data"), PureWindowsPath("C:\\data")],
    "arguments": [argparse.Namespace(lr=np.float32(0.1)), types.SimpleNamespace(a=1), defaultdict(list, a=[1])],
    "dates": [datetime.datetime(2024, 1, 2, tzinfo=UTC), datetime.timedelta(3), datetime.date(2024, 1, 2)],
    "others": [deque([1, 2]), frozenset({1}), range(3), slice(2), decimal.Decimal("0.1"), torch.__version__],
    "message_hub": {"loss": HistoryBuffer(history=np.arange(3.0))},
    "dtypes": [torch.float16, torch.device("cpu"), torch.Size([1]), {1, 2}, complex(1), b"bytes"],
}

LAYOUTS = {
    "plain": lambda state: state,
    "net": lambda state: {"net": prefixed(state, "net."), "acc": 93.1},
    "student alone": lambda state: {"student": prefixed(state, "module.backbone."), "teacher": {"a": torch.ones(1)}},
    "averaged alone": lambda state: {"state_dict_ema": state},
    "containers in containers": lambda state: {"model": {"state_dict": {"module": prefixed(state, "module.")}}},
    "module, model, net": lambda state: prefixed(state, "module.model._orig_mod.net."),
    "Lightning": lambda state: {"state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(5)}},
    "no counters, as of old": lambda state: without(state, "num_batches_tracked"),
    "thop's counters": lambda state: state | {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)},
    "plain values among the entries": lambda state: state | {"best": np.float64(0.5), "names": ["a"], 7: None},
    "counters as floats": lambda state: {n: t.float() if n.endswith("tracked") else t for n, t in state.items()},
    "no head's wrapper": lambda state: {"state_dict": prefixed(mmcls(state), "module.")},
    "inside itself": holding_itself,
    "beside other things": lambda state: {"state_dict": state, **BESIDE},
    "model, timm": lambda state: {"model": prefixed(state, "module._orig_mod."), "args": argparse.Namespace(lr=0.1)},
    "mmcls": lambda state: {"meta": {"CLASSES": ("a", "b")}, "state_dict": mmcls(state), "optimizer": {"state": {}}},
    "segmenter": lambda state: {"state_dict": mmcls(state) | {"decode_head.conv.weight": torch.ones(3)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("error", "ignore:left out of .*criterion")
def test_official_layouts_load(layout, source, tmp_path, monkeypatch):
    name = "mmengine.logging.history_buffer"
    monkeypatch.setattr(HistoryBuffer, "__module__", name)
    for parent in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(HistoryBuffer=HistoryBuffer))
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save(LAYOUTS[layout](source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    theirs = source.state_dict()
    for path in tmp_path.iterdir():
        models.load_checkpoint(model := fresh(), path)
        ours = model.state_dict()
        if "counters as" in layout or "no counters" in layout:  # those start anew
            ours, theirs = (without(state, "num_batches_tracked") for state in (ours, theirs))
        assert equal_entries(ours, theirs)


# ---- averaged weights


PARAMETERS = [name for name, _ in fresh().named_parameters()]
PREFERRED = r"file\.pth holds averaged weights .* beside the last ones: the averaged"
AVERAGED = {
    "timm": lambda last, ema: {"state_dict": last, "state_dict_ema": ema, "arch": "rednet26"},
    "timm's old scripts": lambda last, ema: {"model": last, "model_ema": prefixed(ema, "module."), "epoch": 3},
    "a table of averages": lambda last, ema: {"model": last, "ema": {"decay": 0.9, "shadow": ema}},
    "a module in an average": lambda last, ema: {"params": last, "params_ema": {"module": ema, "n": 3}},
    "an average's wrapper in an average": lambda last, ema: {"model": last, "model_ema": prefixed(ema, "ema.module.")},
    "finetune's state": lambda last, ema: {"step": 3, "model": last, "average": prefixed(ema, "module.")},
    "Lightning": lambda last, ema: {"state_dict": prefixed(last, "model.") | prefixed(ema, "ema_model.module.")},
    "parameters alone": lambda last, ema: {"state_dict": last, "state_dict_ema": {n: ema[n] for n in PARAMETERS}},
}


@pytest.mark.parametrize("layout", AVERAGED)
def test_averaged_weights_are_preferred_with_a_word(layout, source, tmp_path):
    last = source.state_dict()
    averaged = {name: tensor + 1 for name, tensor in last.items()}
    content = AVERAGED[layout](last, averaged)
    if layout == "parameters alone":  # the buffers are the last ones
        averaged |= {name: last[name] for name in last if name not in PARAMETERS}
    with pytest.warns(UserWarning, match=PREFERRED):
        assert equal_entries(loaded(content, tmp_path), averaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal_entries(loaded(content, tmp_path, use_ema=False), last)


def test_averages_that_are_exchanged_or_of_another_model(source, tmp_path, recwarn):
    state, other = source.state_dict(), {"0": torch.ones(1)}
    as_by_mmengine = {"state_dict": state, "ema_state_dict": other, "message_hub": {}}
    assert equal_entries(loaded(as_by_mmengine, tmp_path), state)
    assert not recwarn
    with pytest.warns(UserWarning, match="that are not this model's"):
        assert equal_entries(loaded({"model": state, "ema": other}, tmp_path), state)


# ---- wrapped models, and models without memory


@pytest.mark.parametrize(
    "wrap",
    [
        AveragedModel,
        lambda model: nn.DataParallel(torch.compile(model)),  # pyright: ignore[reportArgumentType]
        lambda model: model.layer1.compile() or model,
        lambda model: setattr(model, "layer2", torch.compile(model.layer2)) or model,
    ],
    ids=["AveragedModel", "DataParallel of a compiled model", "a stage compiled in place", "a compiled stage"],
)
@pytest.mark.filterwarnings("error:left out of")
def test_wrapped_models_load(wrap, source, tmp_path):
    models.save_checkpoint(source, tmp_path / "file.safetensors")
    models.load_checkpoint(wrapped := wrap(fresh()), tmp_path / "file.safetensors")
    expected = list(source.state_dict().values())
    assert all(map(torch.equal, list(wrapped.state_dict().values())[-len(expected) :], expected))
    models.save_checkpoint(wrapped, tmp_path / "wrapped.pth")
    models.load_checkpoint(model := fresh(), tmp_path / "wrapped.pth")
    assert equal_entries(model, source)


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_model_on_the_meta_device_gets_the_tensors(name, source, tmp_path):
    models.save_checkpoint(source, tmp_path / name)
    with torch.device("meta"):
        model = fresh().half()
        other = fresh(num_classes=9)
    model.layer1.requires_grad_(False)
    models.load_checkpoint(model, tmp_path / name)
    assert equal_entries(model, copy.deepcopy(source).half())
    assert not model.layer1[0].conv1.weight.requires_grad
    assert model.layer2[0].conv1.weight.requires_grad
    with pytest.raises(ValueError, match=r"neither in the file nor in a model on the meta device: head\.fc"):
        models.load_checkpoint(other, tmp_path / name)
    assert all(tensor.is_meta for tensor in other.state_dict().values())


def test_entries_that_share_memory_do_not_share_it_in_a_model(tmp_path):
    shared, model = torch.arange(4.0), nn.ModuleDict({name: nn.Linear(2, 2, False, device="meta") for name in "ab"})
    loaded({"a.weight": shared.view(2, 2), "b.weight": shared.view(2, 2)}, tmp_path, model)
    nn.init.zeros_(model["a"].get_parameter("weight"))
    assert model["b"].get_parameter("weight").sum() == 6


def test_models_that_no_file_can_fill_are_refused_and_unchanged(tmp_path):
    with torch.inference_mode():
        frozen = nn.Linear(3, 3)
    expanded, on_meta = nn.Linear(3, 3), nn.Linear(3, 3, device="meta")
    expanded.weight = nn.Parameter(torch.ones(1, 3).expand(3, 3))
    on_meta.register_buffer("grid", torch.zeros(2, device="meta"), persistent=False)
    cannot = r"^model: \d of its tensors cannot take .*: weight"
    for model, message in ((frozen, cannot), (expanded, cannot), (on_meta, "in no file.*grid")):
        before = model.bias.clone()
        with pytest.raises(ValueError, match=message):
            loaded(nn.Linear(3, 3).state_dict(), tmp_path, model)
        assert model.bias.is_meta or torch.equal(model.bias, before)


def test_a_model_with_a_backbone_of_its_own_keeps_the_prefix(source, tmp_path):
    state = prefixed(source.state_dict(), "backbone.")
    assert equal_entries(loaded(state, tmp_path, nn.ModuleDict({"backbone": fresh()})), state)


# ---- mismatches


NORM = "layer1.0.bn1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem.2.weight": None}, "1 missing from the file: stem.2.weight$"),
        ({"extra.weight": torch.ones(1)}, "1 unexpected in the file: extra.weight$"),
        ({"stem.2.weight": torch.ones(7)}, r"of another shape or type: stem.2.weight \(expected \[32\], got \[7\]\)$"),
        ({"stem.2.weight": torch.ones(32).char()}, r"stem.2.weight \(expected torch.float32, got torch.int8\)"),
        ({"head.fc.weight": torch.ones(5, 3)}, r"head.fc.weight \(expected \[5, 512\], got \[5, 3\]\)"),
        ({"head.fc.weight": torch.ones(6, 512)}, r"head.fc.weight \(expected \[5, 512\], got \[6, 512\]\)"),
        ({NORM: torch.ones(64).to_sparse()}, r"\(sparse, meta, …\): layer1\.0\.bn1\.weight$"),
        ({NORM: torch.ones(64, device="meta")}, r"\(sparse, meta, …\): layer1\.0\.bn1\.weight$"),
        ({NORM: torch.ones(64, dtype=torch.complex64)}, r"got torch\.complex64"),
        ({NORM: [1.0] * 64}, "1 missing from the file: layer1.0.bn1.weight$"),
        ({"head.fc.bias": None}, "1 missing from the file: head.fc.bias$"),
        ({"stem.0.conv.weight": torch.ones(32, 3, 5, 5)}, r"stem.0.conv.weight \(expected \[32, 3, 3, 3\]"),
    ],
)
def test_a_mismatch_lists_the_names_and_changes_nothing(change, message, source, tmp_path):
    content, model = {n: t for n, t in (source.state_dict() | change).items() if t is not None}, fresh()
    refused = pytest.raises(ValueError, match=r"(?s)file\.pth (does not fit RedNet\n  |holds tensors).*" + message)
    with unchanged(model), refused:
        loaded(content, tmp_path, model)


def test_a_long_list_of_names_is_cut(source, tmp_path):
    with pytest.raises(ValueError, match=r"25 missing from the file: layer1\.1.conv1\.weight.*and 15 more") as caught:
        loaded(source.state_dict(), tmp_path, fresh(depths=(2, 1, 0, 0)))
    assert len(str(caught.value)) < 1000


def test_a_model_twice_in_a_file_is_refused(source, tmp_path):
    state = source.state_dict()
    with pytest.raises(ValueError, match=r"holds the model twice, behind 'model\.' and behind 'student\.'"):
        loaded(prefixed(state, "student.") | prefixed(state, "model."), tmp_path)


# ---- models that differ from the file on purpose


@pytest.mark.parametrize(
    ("absent", "classes", "message"),
    [
        ((), 9, r"head\.fc keeps its own values: the file has 5 classes, the model 9"),
        (("head.fc.weight", "head.fc.bias"), 5, "^head keeps its own values: the file has none"),
    ],
)
def test_a_classifier_that_the_file_has_not_keeps_its_values(absent, classes, message, source, tmp_path):
    model = fresh(num_classes=classes)
    with pytest.warns(UserWarning, match=message), unchanged(model.head):
        loaded(without(source.state_dict(), *absent) if absent else source.state_dict(), tmp_path, model)
    models.load_checkpoint(headless := fresh(num_classes=0), tmp_path / "file.pth")
    for other in (model, headless):
        assert equal_entries(other.layer2, source.layer2)


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_another_number_of_channels_sums_or_tiles_the_first_convolution(in_chans, source, tmp_path):
    """So that the response to grey keeps its size."""
    ours = loaded(source.state_dict(), tmp_path, fresh(in_chans=in_chans)).stem[0].conv.weight
    original = source.stem[0].conv.weight
    tiled = torch.stack([original[:, channel % 3] for channel in range(in_chans)], 1) * (3 / in_chans)
    torch.testing.assert_close(ours, original.sum(1, keepdim=True) if in_chans == 1 else tiled)
