"""OverLoCK beyond the rules for every family: dense prediction, two outputs in training, the merged form."""

import copy
import json
import re
import traceback
from typing import Any

import pytest
import torch
from torch import nn

import kernels
from kernels.launch import record_launches
from models.checkpoints import load_checkpoint, save_checkpoint
from models.registry import create_model
from tests.models.families import FAMILY, fill, images, on_meta, shapes, with_fixed_statistics
from tests.support import ROOT, assert_close, equal_entries, golden, golden_fill, official_state_dicts, unchanged


def small(**overrides) -> Any:
    """A model of a few thousand parameters with every kind of block, as it is initialised."""
    return FAMILY["overlock"].build(**{"depth": (1, 1, 1, 1), "sub_depth": (2, 1), "num_classes": 5, **overrides})


def test_dense_state_dict_names_and_shapes():
    assert shapes(on_meta("overlock_t", features_only=True)) == official_state_dicts()["overlock_t_dense"]


def test_initial_values():
    model = small(features_only=True)
    block = model.sub_blocks3[1]
    assert 0.015 < block.proj[1].weight.std() < 0.025
    assert block.proj[1].weight.abs().max() <= 2
    for zero in (block.proj[1].bias, block.rpb1, block.rpb2, block.mlp[3].gamma, block.ls1.bias):
        assert not zero.any()
    for one in (block.ls1.weight, block.ls2.weight, block.x_scale.weight, block.h_scale.weight):
        assert (one == 1).all()
    assert torch.allclose(model.h_proj[1].weight, torch.tensor(1e-5))


def test_the_path_to_a_launch_is_the_one_that_contributing_tells(monkeypatch):
    """Nine hops from OverLoCK's forward pass to a launch, beside what decorates them."""
    pytest.importorskip("triton")
    decorating = ("registration.py", "choose.py", "repeat.py", "tracing.py")

    def stop(*_, **__):
        found = traceback.extract_stack()
        ours = [frame for frame in found if frame.filename.startswith((f"{ROOT}/kernels", f"{ROOT}/models"))]
        raise InterruptedError([frame.name for frame in ours if not frame.filename.endswith(decorating)])

    monkeypatch.setattr("kernels.contmix.arguments.launch", stop)
    with pytest.raises(InterruptedError) as path, record_launches(), kernels.use_backend("triton"), torch.no_grad():
        on_meta("overlock_xt").eval()(torch.empty(1, 3, 224, 224, device="meta"))
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("x of OverLoCK")[2].partition("launches")[0]
    names = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", told) if not name.endswith(".py")]
    assert path.value.args[0] == names
    assert len(names) == 1 + 9


# ---- dense prediction

FORMS: dict[str, dict[str, Any]] = {
    "classifier": {},
    "detection": {"features_only": True},
    "segmentation": {"features_only": True, "context_skip": False},
}


@pytest.mark.parametrize(("form", "backend"), [("detection", "eager"), ("segmentation", "reference")])
@torch.no_grad()
def test_dense_golden(form, backend):
    expected = golden(f"dense/{form}_overlock_xt_256x320")
    model = fill(create_model("overlock_xt", **FORMS[form]))
    sizes = {name: json.loads(shape) for name, shape in zip(expected["names"], expected["shapes"], strict=True)}
    assert shapes(model) == sizes
    with kernels.use_backend(backend):
        maps = model(golden_fill().image(1, 256, 320))
    for level, ours in enumerate(maps):
        assert list(ours.shape) == expected[f"shape{level}"].tolist()
        every_97th = torch.from_numpy(expected[f"f{level}"])  # of the flattened map
        assert (ours.flatten()[::97] - every_97th).abs().max() <= 1e-4 * every_97th.abs().max()


@pytest.mark.parametrize("into", FORMS)
@pytest.mark.parametrize("file", FORMS)
def test_a_file_of_one_form_in_another(file, into, tmp_path, recwarn):
    """The file loads and a warning names what keeps its values, or it is refused and nothing changes."""
    source, model = fill(small(**FORMS[file])), small(**FORMS[into]).eval()
    before = copy.deepcopy(model.state_dict())
    as_in_mmdet = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": as_in_mmdet}, tmp_path / "file.pth")
    refused = {
        ("detection", "classifier"): r"is a dense-prediction backbone's.*features_only=True",
        ("segmentation", "classifier"): r"is a dense-prediction backbone's.*features_only=True",
        ("detection", "segmentation"): r"is a detection backbone's.*context_skip=True",
    }
    if (file, into) in refused:
        with unchanged(model), pytest.raises(ValueError, match=refused[file, into]):
            load_checkpoint(model, tmp_path / "file.pth")
        return
    load_checkpoint(model, tmp_path / "file.pth")
    said, given = " ".join(str(warning.message) for warning in recwarn), source.state_dict()
    for name, tensor in model.state_dict().items():
        known = given.get(name)
        assert torch.equal(tensor, before[name] if known is None else known), name
        assert known is not None or name.rpartition(".")[0] in said, f"{name} stays without a word"
    assert ("initial values" in said) == (file != into)


# ---- training


def test_auxiliary_logits():
    """They are BN → mean over positions → 1×1 convolution of Overview-Net's output."""
    model = with_fixed_statistics(fill(small(in_chans=1)).train())
    contexts = []
    model.blocks4[-1].register_forward_hook(lambda *call: contexts.append(call[2]))
    with torch.no_grad():
        out = model(images(2, 1, 64, 96, device="cpu"))["aux"]
    norm, _, classifier = model.aux_head
    expected = norm(contexts[0]).mean((2, 3)) @ classifier.weight.flatten(1).t() + classifier.bias
    assert_close(out, expected, 1e-6)


# ---- the inference form


def test_reparam_keeps_the_logits():
    """Also where batch norms are synchronised; the merged model can still be trained."""
    model, x = fill(small(drop_path_rate=0.5)), images(2, 3, 65, 96, device="cpu")
    with torch.no_grad():
        expected = model(x)
        synchronised: Any = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert_close(synchronised.reparam()(x), expected, 1e-5)
        assert model.reparam() is model
        assert_close(model(x), expected, 1e-5)
    model.train()(x)["main"].square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_full_checkpoint_loads_into_the_merged_form(tmp_path, dtype):
    full, x = fill(small()), images(2, 3, 65, 96, device="cpu")
    save_checkpoint(full.to(dtype), tmp_path / "full.pth")
    merged = small(reparam=True).eval()
    load_checkpoint(merged, tmp_path / "full.pth")
    with torch.no_grad():
        assert_close(merged(x), full.float()(x), 1e-5)
    save_checkpoint(merged, tmp_path / "merged.pth")
    load_checkpoint(again := small(reparam=True), tmp_path / "merged.pth")
    assert equal_entries(again, merged)


@pytest.mark.parametrize(
    ("file", "lost", "into", "missing"),
    [
        ({}, "blocks1.0.proj.1.dil_bn_k3_7.bias", {"reparam": True}, "blocks1.0.proj.1.lk_origin.bias"),
        ({"reparam": True}, "", {}, "blocks1.0.proj.1.origin_bn.weight"),  # there is no way back
        ({"features_only": True}, "extra_norm.2.weight", {"features_only": True}, "extra_norm.2.weight"),
    ],
)
def test_a_checkpoint_of_no_form_is_refused(file, lost, into, missing, tmp_path):
    model, refused = small(**into), pytest.raises(ValueError, match=f"missing from the file: {re.escape(missing)}")
    torch.save({n: t for n, t in small(**file).state_dict().items() if n != lost}, tmp_path / "file.pth")
    with unchanged(model), refused:
        load_checkpoint(model, tmp_path / "file.pth")
