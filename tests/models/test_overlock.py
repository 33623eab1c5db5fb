"""OverLoCK against the official goldens, and everything else that a user of the family relies on."""

from __future__ import annotations

import copy
import inspect
import json
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from models import _contract, overlock
from models.checkpoints import load_checkpoint, save_checkpoint
from models.layers import DropPath
from models.overlock import OverLoCK
from models.registry import create_model, list_models
from tests.support import assert_close, golden, golden_fill, official_state_dicts, random_tensor, triton_device

NAMES = [f"overlock_{size}{form}" for size in ("xt", "t", "s", "b") for form in ("", "_reparam")]


def small(**overrides) -> Any:
    """Every kind of block, at a few thousand parameters."""
    structure = {
        "depth": (1, 1, 1, 1),
        "sub_depth": (2, 1),
        "embed_dim": (8, 8, 16, 16),
        "sub_num_heads": (1, 2),
        "num_classes": 5,
    }
    return OverLoCK(**{**structure, **overrides})


with torch.device("meta"):  # PyTorch remembers here what creates tensors: before the tests' own torch.empty is in place
    torch.empty(0)


def on_meta(name: str, **kwargs) -> Any:
    """Shapes only: no memory, no random numbers."""
    with torch.device("meta"):
        return getattr(overlock, name)(**kwargs)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def fill(model: nn.Module) -> Any:
    return golden_fill().fill_(model).eval()


def image(*size: int) -> torch.Tensor:
    return random_tensor(*size, device="cpu")


@pytest.fixture
def full_float32(monkeypatch):
    """Convolutions on a GPU round their operands to TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# ---- the official facts


def test_entry_points():
    assert sorted(list_models("overlock_*")) == sorted(NAMES)
    for name in NAMES:
        parameters = inspect.signature(getattr(overlock, name)).parameters
        assert parameters["pretrained"].default is False


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_names_and_shapes(name):
    model = on_meta(name)
    assert shapes(model) == official_state_dicts()[name]
    if not name.endswith("_reparam"):
        assert shapes(model.reparam()) == official_state_dicts()[f"{name}_reparam"]


def test_dense_state_dict_names_and_shapes():
    assert shapes(on_meta("overlock_t", features_only=True)) == official_state_dicts()["overlock_t_dense"]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("overlock_xt_224x224", "eager"),
        ("overlock_xt_256x192", "eager"),
        ("overlock_xt_256x192", "triton"),
        ("overlock_xt_reparam_224x224", "eager"),
        ("overlock_xt_reparam_224x224", "reference"),
    ],
)
def test_golden(name, backend, full_float32):
    device = triton_device() if backend == "triton" else "cpu"
    expected = golden(name)
    variant, size = name.rsplit("_", 1)
    height, width = size.split("x")
    model = fill(create_model(variant)).to(device)
    x = golden_fill().image(2, int(height), int(width)).to(device)
    if backend == "triton":
        x = x[:1]  # one image of the two: the interpreter takes its time
    with_gradients = "grad_names" in expected
    with kernels.use_backend(backend), torch.set_grad_enabled(with_gradients):
        logits = model(x.requires_grad_(with_gradients))
        reference = torch.from_numpy(expected["logits"])[: len(x)]
        assert (logits.cpu() - reference).abs().max() <= 1e-4 * reference.abs().max()
        if not with_gradients:
            return
        logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter, norm in zip(expected["grad_names"], expected["grad_norms"], strict=True):
        assert gradients[parameter].norm().item() == pytest.approx(norm, rel=1e-3), parameter
    assert x.grad is not None
    assert x.grad.norm().item() == pytest.approx(expected["input_grad_norm"].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "multiply_adds", "parameters"),
    [
        ("overlock_xt_reparam", 2.6, 16),
        ("overlock_t_reparam", 5.5, 33),
        ("overlock_s_reparam", 9.7, 56),
        ("overlock_b_reparam", 16.7, 95),
    ],
)
def test_published_multiply_adds_and_parameters(name, multiply_adds, parameters):
    model = on_meta(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.05)
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("aux_head"))
    assert count / 1e6 == pytest.approx(parameters, rel=0.05)


@pytest.mark.parametrize(
    ("name", "rate"), [("overlock_xt", 0.1), ("overlock_t", 0.15), ("overlock_s", 0.4), ("overlock_b_reparam", 0.5)]
)
def test_drop_path_grows_linearly_with_depth(name, rate):
    model = on_meta(name)
    stages = (model.blocks1, model.blocks2, model.blocks3, model.blocks4, model.sub_blocks3, model.sub_blocks4)
    rates = [module.rate for stage in stages for module in stage.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx(torch.linspace(0, rate, len(rates)).tolist())
    assert max(m.rate for m in on_meta(name, drop_path_rate=0.0).modules() if isinstance(m, DropPath)) == 0


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


# ---- inputs and outputs


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (97, 224), (32, 320)])
@pytest.mark.parametrize("features_only", [False, True])
def test_any_size(size, features_only):
    """The default path equals the definitions, whether maps are enlarged to fit the kernel or not."""
    model = fill(small(features_only=features_only))
    x = image(2, 3, *size)
    with torch.no_grad():
        out = model(x)
        with kernels.use_backend("reference"):
            expected = model(x)
    if not features_only:
        assert out.shape == (2, 5)
        assert_close(out, expected, 1e-5)
        return
    for info, feature, reference in zip(model.feature_info, out, expected, strict=True):
        assert feature.shape == (2, info["num_chs"], *(-(-side // info["reduction"]) for side in size))
        assert_close(feature, reference, 1e-5)


def test_triton_equals_the_definitions(full_float32):
    device = triton_device()
    model = fill(small(depth=(1, 0, 0, 1))).to(device)
    results = []
    for backend in ("triton", "reference"):
        x = random_tensor(1, 3, 33, 40, seed=0, device=device).requires_grad_()
        with kernels.use_backend(backend):
            logits = model(x)
            logits.square().mean().backward()
        results.append((logits, x.grad))
    assert_close(results[0][0], results[1][0], 1e-5)
    assert_close(results[0][1], results[1][1], 1e-4)


# ---- dense prediction

FORMS: dict[str, dict[str, Any]] = {
    "classifier": {},
    "detection": {"features_only": True},
    "segmentation": {"features_only": True, "context_skip": False},
}


@pytest.mark.parametrize(("form", "backend"), [("detection", "eager"), ("segmentation", "reference")])
@torch.no_grad()
def test_dense_golden(form, backend, full_float32):
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


@pytest.mark.parametrize("form", ["detection", "segmentation"])
@pytest.mark.parametrize("indices", [(0,), (1,), (3,), (0, 2), (1, 2), 2, (-1, 0)])
def test_chosen_maps_build_what_they_need_and_no_more(form, indices, tmp_path):
    """The same maps as of all four, from a file with all, and every parameter has a gradient (DDP waits for it)."""
    complete = fill(small(**FORMS[form]))
    save_checkpoint(complete, tmp_path / "complete.pth")
    model = small(**FORMS[form], out_indices=indices).eval()
    load_checkpoint(model, tmp_path / "complete.pth")
    x = image(2, 3, 64, 80)
    with torch.no_grad():
        expected = complete(x)
    maps = model(x)
    assert len(maps) == len(model.out_indices)
    for index, ours in zip(model.out_indices, maps, strict=True):
        assert torch.equal(ours, expected[index])
    assert model.feature_info.channels() == [m.shape[1] for m in maps]
    model.train()
    torch.stack([m.square().sum() for m in model(x)]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    other = next(i for i in range(4) if i not in model.out_indices)
    with pytest.raises(ValueError, match="indices"):  # its norm was not built
        model.forward_intermediates(x, indices=[other])


@pytest.mark.parametrize("into", FORMS)
@pytest.mark.parametrize("file", FORMS)
def test_a_file_of_one_form_in_another(file, into, tmp_path, recwarn):
    """Loads, says what stays, or is refused and changes nothing."""
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
        with pytest.raises(ValueError, match=refused[file, into]):
            load_checkpoint(model, tmp_path / "file.pth")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        return
    load_checkpoint(model, tmp_path / "file.pth")
    said = " ".join(str(warning.message) for warning in recwarn)
    for name, tensor in model.state_dict().items():
        known = source.state_dict().get(name)
        assert torch.equal(tensor, before[name] if known is None else known), name
        assert known is not None or name.rpartition(".")[0] in said, f"{name} stays without a word"
    assert ("initial values" in said) == (file != into)


def test_a_damaged_dense_file_is_refused(tmp_path):
    state = small(features_only=True).state_dict()
    del state["extra_norm.2.weight"]
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"missing from the file: extra_norm\.2\.weight"):
        load_checkpoint(small(features_only=True), tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["overlock_xt", "overlock_xt_reparam"])
def test_keyword_arguments(name):
    shallow = {"depth": (1, 1, 1, 1), "sub_depth": (1, 1)}
    model = on_meta(name, num_classes=7, in_chans=1, drop_path_rate=0.3, **shallow).eval()
    assert model(torch.empty(2, 1, 64, 64, device="meta")).shape == (2, 7)
    assert max(module.rate for module in model.modules() if isinstance(module, DropPath)) == pytest.approx(0.3)
    dense = on_meta(name, features_only=True, out_indices=(1, 3), **shallow).eval()
    assert [m.shape[1] for m in dense(torch.empty(2, 3, 64, 64, device="meta"))] == [112, 420]
    pooled = on_meta(name, num_classes=0, **shallow).eval()(torch.empty(2, 3, 64, 64, device="meta"))
    assert pooled.shape == (2, 1024)


# ---- training


def test_training_returns_both_logits_and_reaches_every_parameter():
    model = small(drop_path_rate=0.2, in_chans=1).train()
    out = model(image(4, 1, 64, 48))
    assert {name: tuple(logits.shape) for name, logits in out.items()} == {"main": (4, 5), "aux": (4, 5)}
    (out["main"].square().mean() + out["aux"].square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    pooled = small(num_classes=0)(image(2, 3, 64, 64))
    assert (pooled["main"].shape, pooled["aux"].shape) == ((2, 1024), (2, 16))


def test_auxiliary_logits():
    """BN → mean over positions → 1×1 convolution, on Overview-Net's output."""
    model = fill(small(in_chans=1))
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    contexts = []
    model.blocks4[-1].register_forward_hook(lambda *call: contexts.append(call[2]))
    with torch.no_grad():
        out = model(image(2, 1, 64, 96))["aux"]
    norm, _, classifier = model.aux_head
    expected = norm(contexts[0]).mean((2, 3)) @ classifier.weight.flatten(1).t() + classifier.bias
    assert_close(out, expected, 1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training):
    model, x = fill(small()).train(training), image(2, 3, 48, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    if training:
        out, expected = out["main"] + out["aux"], expected["main"] + expected["aux"]
    else:
        assert_close(out, expected, 0.1)  # about thirty layers of 2⁻⁹ each; batch statistics of few pixels add far more
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


# ---- the inference form


def test_reparam_keeps_the_logits():
    model, x = fill(small(drop_path_rate=0.5)), image(2, 3, 65, 96)
    with torch.no_grad():
        expected = model(x)
        assert any(isinstance(m, nn.Conv2d) and max(m.dilation) > 1 for m in model.modules())
        merged = copy.deepcopy(model)
        assert merged.reparam() is merged
        assert not any(isinstance(m, nn.Conv2d) and max(m.dilation) > 1 for m in merged.modules())
        assert_close(merged(x), expected, 1e-5)
        built = small(reparam=True).eval()
        built.load_state_dict(merged.state_dict())
        assert_close(built(x), expected, 1e-5)
    merged.train()(x)["main"].square().mean().backward()  # it can still be trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_full_checkpoint_loads_into_the_merged_form(tmp_path, dtype):
    full, x = fill(small()), image(2, 3, 65, 96)
    save_checkpoint(full.to(dtype), tmp_path / "full.pth")
    merged = small(reparam=True).eval()
    load_checkpoint(merged, tmp_path / "full.pth")
    with torch.no_grad():
        assert_close(merged(x), full.float()(x), 1e-5)
    save_checkpoint(merged, tmp_path / "merged.pth")
    again = small(reparam=True).eval()
    load_checkpoint(again, tmp_path / "merged.pth")
    with torch.no_grad():
        assert torch.equal(again(x), merged(x))


def test_a_checkpoint_of_neither_form_is_refused(tmp_path):
    full, merged = fill(small()), small(reparam=True)
    before = copy.deepcopy(merged.state_dict())
    state = full.state_dict()
    del state["blocks1.0.proj.1.dil_bn_k3_7.bias"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"missing from the file: blocks1\.0\.proj\.1\.lk_origin\.bias"):
        load_checkpoint(merged, tmp_path / "half.pth")
    save_checkpoint(small(reparam=True), tmp_path / "merged.pth")
    with pytest.raises(ValueError, match=r"missing from the file: blocks1\.0\.proj\.1\.origin_bn\.weight"):
        load_checkpoint(full, tmp_path / "merged.pth")  # there is no way back
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- what scripts written for timm call


def test_forward_features_and_head():
    model, x = fill(small()), image(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 2, 2)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert torch.equal(model.forward_head(features), model(x))


def test_forward_intermediates():
    model, x = fill(small()), image(2, 3, 64, 64)
    ran = []
    model.blocks4[0].register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad():
        features, maps = model.forward_intermediates(x, indices=2)
        assert [tuple(m.shape[1:]) for m in maps] == [(20, 4, 4), (20, 2, 2)]
        assert torch.equal(features, maps[-1])
        assert ran
        ran.clear()
        early = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        assert not ran
        assert torch.equal(early[1], model.forward_intermediates(x, intermediates_only=True)[1])
    with pytest.raises(ValueError, match="indices"):
        model.forward_intermediates(x, indices=[4])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_reset_classifier():
    model = small()
    assert model.get_classifier() is model.head[4]
    for num_classes in (3, 0, 9):
        model.reset_classifier(num_classes)
        out = model(image(2, 3, 64, 64))
        assert out["main"].shape == (2, num_classes or model.head_hidden_size)
        assert model.num_classes == num_classes
    assert model.get_classifier().weight.std() > 0.01
    with pytest.raises(ValueError, match="features_only"):
        small(features_only=True).reset_classifier(3)


def test_pretrained_configuration():
    model = on_meta("overlock_s_reparam")
    release = "https://github.com/LMMMEng/OverLoCK/releases/download/v1"
    assert model.default_cfg["url"] == f"{release}/overlock_s_in1k_224_reparam.pth"
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    for module in (*model.pretrained_cfg["classifier"], model.pretrained_cfg["first_conv"]):
        assert isinstance(model.get_submodule(module), nn.Conv2d)


def test_pretrained_loads_the_official_file(monkeypatch):
    loaded = []
    monkeypatch.setattr(_contract, "load_pretrained", lambda model, url: loaded.append(url))
    on_meta("overlock_xt", pretrained=True)
    assert loaded == ["https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_xt_in1k_224.pth"]


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_orders_all_parameters_by_depth(coarse):
    """By timm's rules: the first match decides; its key is (position in the dict, captured numbers, suffix)."""
    model = on_meta("overlock_xt")
    rules = []
    for ordinal, specification in enumerate(model.group_matcher(coarse).values()):
        if isinstance(specification, str):
            specification = [(specification, None)]
        rules += [(re.compile(pattern), ordinal, suffix or ()) for pattern, suffix in specification]

    def key(name: str) -> tuple[float, ...]:
        for pattern, ordinal, suffix in rules:
            if match := pattern.match(name):
                return (ordinal, *map(float, match.groups()), *suffix)
        return (float("inf"),)

    keys = {name: key(name) for name, _ in model.named_parameters()}
    assert {name.split(".")[0] for name, k in keys.items() if k[0] == float("inf")} == {"head", "aux_head"}
    order = [
        "patch_embed1.0.weight",
        "patch_embed2.0.weight",
        "blocks2.1.dwconv.weight",
        "patch_embed3.0.weight",
        "blocks3.2.ls.bias",
        "patch_embed4.0.weight",
        "high_level_proj.weight",
        "sub_blocks3.5.rpb1",
        "patch_embedx.x_proj.0.weight",
        "sub_blocks4.1.rpb2",
        "head.0.weight",
    ]
    depths = [keys[name] for name in order]
    assert depths == sorted(depths)
    assert len(set(keys.values())) == (1 + 6 + 1 if coarse else 1 + 9 + 8 + 1)


def test_no_weight_decay():
    model = on_meta("overlock_xt")
    kept = model.no_weight_decay()
    assert kept <= {name for name, _ in model.named_parameters()}
    assert {"sub_blocks3.0.rpb1", "blocks3.0.ls.weight", "blocks1.0.proj.7.gamma", "sub_blocks4.1.ls2.weight"} <= kept
    assert not any(name.endswith("lk_origin.weight") for name in kept)


# ---- PyTorch's own machinery
