"""Names, patterns and the refusals of create_model."""

from typing import Any

import pytest
import torch

import models
from models import registry
from tests.models.families import FAMILIES, narrow
from tests.support import official_state_dicts, random_tensor


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


@pytest.mark.parametrize("name", ["overlock_xt", "rednet26", "volo_d1"])
def test_feature_info_answers_for_the_returned_maps(name):
    with torch.device("meta"):
        backbone: Any = models.create_model(name, features_only=True, out_indices=(0, 2)).eval()
        maps = backbone(torch.empty(1, 3, 224, 224))
    info = backbone.feature_info
    assert info.channels() == [m.shape[1] for m in maps]
    assert info.reduction() == [224 // m.shape[2] for m in maps]
    assert [type(backbone.get_submodule(module)) for module in info.module_name()]
    assert info.channels(1) == info[1]["num_chs"]
    assert info.reduction([1, 0]) == [info[1]["reduction"], info[0]["reduction"]]
    assert info.get_dicts(["num_chs"]) == [{"num_chs": channels} for channels in info.channels()]


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


def test_list_models_wants_a_string():
    with pytest.raises(TypeError, match=r"pattern.*str.*list"):
        models.list_models(["rednet*"])  # pyright: ignore[reportArgumentType]


def test_a_name_is_registered_once():
    def rednet50(pretrained: bool = False):
        return torch.nn.Identity()

    with pytest.raises(ValueError, match=r"'rednet50' is already registered by models\.rednet"):
        registry.register_model(rednet50)
