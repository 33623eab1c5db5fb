"""What scripts written for timm call and look up on a model, for every family; timm itself is not needed."""

import re

import pytest
import torch

from models import registry
from tests.models.families import FAMILY, by_family, deep, images, on_meta
from tests.support import assert_close


@by_family
@torch.no_grad()
def test_global_pool_is_obeyed_or_refused(family):
    model, x = deep(family), images(2, 3, 64, 96, device="cpu")
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    for wrong, message in (("", "global_pool '' .* needs num_classes=0"), ("max", "global_pool must be one of")):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(3, wrong)
    assert model.num_classes == 5
    model.reset_classifier(0, "")
    unpooled = model(x)
    model.reset_classifier(0, "avg")
    if family == "volo":
        assert torch.equal(unpooled, features)
        assert_close(model(x), features.mean(1), 1e-6)
        model.reset_classifier(0, "token")
    else:
        assert_close(unpooled.mean((2, 3)), pooled, 1e-6)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


@by_family
@pytest.mark.parametrize("indices", [1, [0], [1], (0, 2)])
@torch.no_grad()
def test_pruned_stages_are_gone_and_the_rest_is_as_before(family, indices):
    model, x = deep(family), images(1, 3, 64, 96, device="cpu")
    expected = model.forward_intermediates(x, indices, intermediates_only=True)
    parameters = sum(p.numel() for p in model.parameters())
    kept = model.prune_intermediate_layers(indices)
    assert kept == [i % 4 for i in ([-1] if indices == 1 else indices)]
    assert sum(p.numel() for p in model.parameters()) < parameters
    assert all(map(torch.equal, model.forward_intermediates(x, kept, intermediates_only=True), expected))
    assert torch.equal(model(x), model.forward_features(x))
    assert model.num_features == model.feature_info.channels()[-1]


@by_family
@pytest.mark.parametrize("coarse", [True, False])
def test_group_matcher_orders_all_parameters_by_depth(family, coarse):
    """By timm's rules: the first match decides; its key is (position in the dict, captured numbers, suffix)."""
    model = on_meta(FAMILY[family].smallest)
    rules = []
    for ordinal, specification in enumerate(model.group_matcher(coarse).values()):
        rows = [(specification, None)] if isinstance(specification, str) else specification
        rules += [(re.compile(pattern), ordinal, suffix or ()) for pattern, suffix in rows]

    def key(name: str) -> tuple[float, ...]:
        for pattern, ordinal, suffix in rules:
            if match := pattern.match(name):
                return (ordinal, *map(float, match.groups()), *suffix)
        return (float("inf"),)

    keys = {name: key(name) for name, _ in model.named_parameters()}
    assert {name.split(".")[0] for name, k in keys.items() if k[0] == float("inf")} <= {"head", "aux_head"}
    depths = [next(k for name, k in keys.items() if name.startswith(prefix)) for prefix in FAMILY[family].groups]
    assert depths == sorted(depths)
    assert len(set(keys.values())) == FAMILY[family].group_counts[0 if coarse else 1] + 1


@by_family
def test_no_weight_decay(family):
    model = on_meta(FAMILY[family].smallest)
    kept, names = model.no_weight_decay(), {name for name, _ in model.named_parameters()}
    assert set(FAMILY[family].undecayed) <= kept <= names
    assert not any(model.get_parameter(name).dim() == 2 for name in kept)
    assert family == "overlock" or kept == set(FAMILY[family].undecayed)
    assert not any(name.endswith("lk_origin.weight") for name in kept)


@by_family
def test_pretrained_configuration(family, monkeypatch):
    model = on_meta(FAMILY[family].smallest)
    config = model.default_cfg
    assert config is model.pretrained_cfg
    assert config["input_size"] == (3, 224, 224)
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    classifiers = config["classifier"]
    for name in (classifiers,) if isinstance(classifiers, str) else classifiers:
        assert model.get_submodule(name).weight.shape[0] == 1000
    loaded = []
    monkeypatch.setattr(registry, "load_checkpoint", lambda model, url: loaded.append(url))
    for (variant, size), address in FAMILY[family].addresses.items():
        assert on_meta(variant, **({} if size is None else {"img_size": size})).default_cfg["url"] == address
        if size is None:
            on_meta(variant, pretrained=True)
            assert loaded.pop() == address
