"""Names, patterns and the refusals of create_model."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import models
from models import registry
from tests.models.families import FAMILIES, narrow
from tests.support import assert_close, official_state_dicts, random_tensor


def test_every_official_variant_is_listed_in_natural_order():
    assert set(models.list_models()) == set(official_state_dicts()) - {"overlock_t_dense"}
    assert models.list_models("rednet*") == ["rednet26", "rednet38", "rednet50", "rednet101", "rednet152"]
    assert models.list_models("*_reparam") == [f"overlock_{size}_reparam" for size in ("b", "s", "t", "xt")]
    assert models.list_models("RedNet*") == []


def test_create_model_is_the_entry_point():
    model: Any = models.create_model("rednet26", num_classes=7, in_chans=1)
    assert type(model) is models.rednet.RedNet
    assert model.get_classifier().out_features == 7
    assert model.get_submodule("stem.0.conv").in_channels == 1


def test_create_model_loads_a_checkpoint(tmp_path):
    model = models.create_model("rednet26", num_classes=3)
    models.save_checkpoint(model, tmp_path / "weights.pth")
    again = models.create_model("rednet26", checkpoint=tmp_path / "weights.pth", num_classes=3)
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "rednet51"}, ValueError, "name.*'rednet51'.*did you mean 'rednet50'"),
        ({"name": "zzz"}, ValueError, "known:.*rednet50"),
        ({"name": 50}, TypeError, "name.*str.*int"),
        (
            {"name": "rednet26", "pretrained": True, "checkpoint": "x.pth"},
            ValueError,
            r"pretrained.*checkpoint.*x\.pth",
        ),
        ({"name": "rednet26", "pretrained": True}, ValueError, "pretrained.*checkpoint=PATH"),
        ({"name": "rednet26", "checkpoint": "/nowhere/x.pth"}, FileNotFoundError, r"/nowhere/x\.pth"),
        ({"name": "rednet26", "window": 3}, TypeError, "window"),
    ],
)
def test_create_model_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        models.create_model(**arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_logits_in_training_leave_no_parameter_waiting(family):
    """What scripts that know only logits need: one tensor, and a gradient wherever one is required."""
    model = narrow(family, drop_path_rate=0.1).train()
    model.return_plain_logits()
    model.reset_classifier(3)
    logits = model(random_tensor(2, 3, 64, 64, device="cpu"))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in model.get_classifier().parameters())


FUNCTIONS = {"overlock": "overlock_xt", "rednet": "rednet26", "volo": "volo_d1"}
WRONG = (
    "x",
    1.5,
    -1,
    10**9,
    None,
    [],
    (1.5,),
    ("a", "b"),
    {},
    object(),
    float("nan"),
    True,
    (1, 2, 3, 4, 5),
    np.float32(0.5),
)
ACCEPTED = {  # what of this fits, argument by argument
    "out_indices": (None,),
    "drop_path_rate": (np.float32(0.5),),
    "mlp_ratio": (1.5, np.float32(0.5)),
    **dict.fromkeys(("pretrained", "features_only", "reparam", "return_dense", "mix_token", "context_skip"), (True,)),
}


def arguments_of(name: str) -> list[str]:
    family = {"overlock": models.overlock.OverLoCK, "rednet": models.rednet.RedNet, "volo": models.volo.VOLO}[name]
    return ["pretrained", *(argument for argument in inspect.signature(family).parameters if argument != "self")]


@pytest.mark.parametrize(
    ("family", "argument"), [(family, argument) for family in FAMILIES for argument in arguments_of(family)]
)
def test_every_argument_is_refused_by_name(family, argument):
    """Values of another type or out of range, before anything is built."""
    features = {"features_only": True} if argument in ("out_indices", "context_skip") else {}
    for value in WRONG:
        if repr(value) in map(repr, ACCEPTED.get(argument, ())):
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b"):
            models.create_model(FUNCTIONS[family], **{**features, argument: value})


@pytest.mark.parametrize("name", ["overlock_t", "rednet50", "volo_d1"])
def test_arguments_that_do_not_go_together(name):
    create: Any = models.create_model
    for options in ({"out_indices": (0, 1)}, {"features_only": True, "out_indices": (0, 4)}):
        with pytest.raises(ValueError, match="out_indices"):
            create(name, **options)
    for option in ("img_size", "window") if name != "volo_d1" else ("window",):
        with pytest.raises(TypeError, match=option):
            create(name, **{option: 224})
    if name == "overlock_t":
        with pytest.raises(ValueError, match="context_skip=False needs features_only=True"):
            models.create_model(name, context_skip=False)
        with pytest.raises(ValueError, match=r"embed_dim\[2\] must be a multiple of 4·sub_num_heads\[0\]"):
            models.create_model(name, sub_num_heads=(5, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_other_libraries_are_numbers(family):
    options: dict[str, Any] = {
        "features_only": np.bool_(True),
        "out_indices": np.array([0, 2]),
        "in_chans": np.int32(1),
    }
    if family == "volo":
        options["img_size"] = np.int64(96)
    model = narrow(family, **options)
    assert model.out_indices == [0, 2]
    assert len(model(torch.zeros(1, 1, 64, 64))) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_refuse_by_name(family):
    model, x = narrow(family), torch.zeros(1, 3, 64, 64)
    for wrong in (None, "x", [x], x.to_sparse(), x.to(torch.complex64)):
        with pytest.raises((TypeError, ValueError), match=r"^x must be"):
            model(wrong)
    shapes = ((3, 64, 64), (1, 4, 64, 64), (1, 3, 64, 31))
    for wrong, kind in [(torch.zeros(s), ValueError) for s in shapes] + [(x.to(torch.uint8), TypeError)]:
        for training in (False, True):
            with pytest.raises(kind, match=r"^x must"):
                model.train(training)(wrong)
    assert model.eval()(x[:0]).shape == (0, 5)
    for name, wrong in (("indices", "x"), ("indices", (1.5,)), ("indices", [9]), ("stop_early", "no"), ("norm", 3)):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
            model.forward_intermediates(x, **{name: wrong})
    for wrong in ("x", 1.5, -1, None, True):
        with pytest.raises((TypeError, ValueError), match=r"^num_classes must be"):
            model.reset_classifier(wrong)
    with pytest.raises(TypeError, match=r"^enable must be True or False"):
        model.set_grad_checkpointing("yes")


# ---- timm's contract; with timm itself: test_timm.py


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_global_pool_is_obeyed_or_refused(family):
    model, x = narrow(family), random_tensor(2, 3, 64, 96, device="cpu")
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    with pytest.raises(ValueError, match=r"^global_pool '' .* needs num_classes=0"):
        model.reset_classifier(3, "")
    with pytest.raises(ValueError, match=r"^global_pool must be one of"):
        model.reset_classifier(3, "max")
    assert model.num_classes == 5
    model.reset_classifier(0, "")
    unpooled = model(x)
    if family == "volo":
        assert torch.equal(unpooled, features)
        model.reset_classifier(0, "avg")
        assert_close(model(x), features.mean(1), 1e-6)
        model.reset_classifier(0, "token")
    else:
        assert_close(unpooled.mean((2, 3)), pooled, 1e-6)
        model.reset_classifier(0, "avg")
    assert torch.equal(model(x), pooled)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_list_models_wants_a_string():
    with pytest.raises(TypeError, match=r"pattern.*str.*list"):
        models.list_models(["rednet*"])  # pyright: ignore[reportArgumentType]


def test_a_name_is_registered_once():
    def rednet50(pretrained: bool = False):
        return torch.nn.Identity()

    with pytest.raises(ValueError, match=r"'rednet50' is already registered by models\.rednet"):
        registry.register_model(rednet50)
