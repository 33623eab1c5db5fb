"""Rules for every family: one test per rule, run over the table in ``families``.

What a family does beyond them is tested in its own file; PyTorch's tools, timm's calls and refusals have files, too.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import kernels
from models import optimize_for_inference
from models.checkpoints import load_checkpoint, save_checkpoint
from models.layers import DropPath
from models.registry import create_model, list_models
from tests.models.families import (
    FAMILY,
    by_family,
    deep,
    fill,
    images,
    loss_of,
    narrow,
    official_name,
    on_meta,
    outputs,
    shapes,
)
from tests.support import (
    DEVICE,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    INTERPRETED,
    assert_close,
    golden,
    golden_fill,
    official_state_dicts,
    triton_device,
)

# ---- the official facts


@pytest.mark.parametrize("name", list_models())
def test_state_dict_names_and_shapes(name):
    model = on_meta(name)
    assert shapes(model) == official_state_dicts()[name]
    if f"{name}_reparam" in list_models():
        assert shapes(model.reparam()) == official_state_dicts()[f"{name}_reparam"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [golden for family in FAMILY.values() for golden in family.goldens])
def test_golden_logits_and_gradient_norms(name, backend):
    device = triton_device() if backend == "triton" else DEVICE
    expected = golden(name)
    variant, size = name.rsplit("_", 1)
    model = fill(create_model(variant)).to(device)
    x = golden_fill().image(2, *map(int, size.split("x"))).to(device)
    # In the interpreter gradients would take too long; test_backends_compute_the_definition checks them.
    interpreted = backend == "triton" and INTERPRETED
    with_gradients = "grad_names" in expected and backend != "inference" and not interpreted
    if backend == "inference":
        model, backend = optimize_for_inference(model), "auto"
    if interpreted:
        x = x[:1]
    with kernels.use_backend(backend), torch.set_grad_enabled(with_gradients):
        logits = model(x.requires_grad_(with_gradients))
        reference = torch.from_numpy(expected["logits"])[: len(x)]
        assert (logits.cpu() - reference).abs().max() <= 1e-4 * reference.abs().max()
        if not with_gradients:
            return
        logits.square().mean().backward()
    norms = {official_name(model, n): p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == set(expected["grad_names"])
    for parameter, norm in zip(expected["grad_names"], expected["grad_norms"], strict=True):
        assert norms[parameter] == pytest.approx(norm, rel=1e-3), parameter
    assert x.grad is not None
    assert x.grad.norm().item() == pytest.approx(float(expected["input_grad_norm"]), rel=1e-3)


# ---- every backend, every size


def assert_gradients(gradients: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Compares by relative norm; gradients that cancel, as of a bias before a batch norm, relative to the largest."""
    expected = list(expected)
    largest = max(float(gradient.norm()) for gradient in expected)
    for ours, right in zip(gradients, expected, strict=True):
        assert float((ours - right).norm()) <= tolerance * max(float(right.norm()), 1e-6 * largest)


@by_family
@pytest.mark.parametrize(("backend", "training"), [("eager", False), ("eager", True), ("triton", False)])
def test_backends_compute_the_definition(family, backend, training):
    """What a model returns and the gradients of the image and of every parameter are those of the reference.

    In training, where batch norms of few numbers enlarge what rounding does, in float64.
    """
    device, results = triton_device() if backend == "triton" else DEVICE, []
    for name, dtype in ((backend, torch.float64 if training else torch.float32), ("reference", torch.float64)):
        model = narrow(family).to(device, dtype).train(training)
        x = images(2 if training else 1, 3, 33, 40, device=device).to(dtype).requires_grad_()
        with kernels.use_backend(name):
            outs = [out for out in outputs(model(x)) if out.is_floating_point()]
            torch.stack([out.square().mean() for out in outs]).sum().backward()
        results.append((outs, {"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (outs, gradients), (expected_outs, expected) = results
    assert_close(outs, expected_outs, 1e-10 if training else 1e-5)
    assert gradients.keys() == expected.keys()
    tolerance = 1e-8 if training else 10 * GRADIENT_TOLERANCE[torch.float32]
    assert_gradients(gradients.values(), expected.values(), tolerance)


@by_family
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (72, 40), (65, 129), (97, 224), (32, 320)])
@torch.no_grad()
def test_any_size_from_32_pixels(family, size):
    """Odd sides of maps round up; VOLO pads the image to whole patches of 8 pixels."""
    classifier, backbone = deep(family).to(DEVICE), deep(family, features_only=True).to(DEVICE)
    x = images(2, 3, *size)
    logits, maps = classifier(x), backbone(x)
    with kernels.use_backend("reference"):
        expected, expected_maps = classifier(x), backbone(x)
    assert logits.shape == (2, 5)
    assert_close(logits, expected, 1e-5)
    for info, ours, right in zip(backbone.feature_info, maps, expected_maps, strict=True):
        by = info["reduction"]
        sides = [-(-side // 8) * 8 // by if family == "volo" else -(-side // by) for side in size]
        assert ours.shape == (2, info["num_chs"], *sides)
        assert_close(ours, right, 1e-5)


# ---- features


@by_family
@pytest.mark.parametrize("indices", [None, (0,), (1,), (3,), (0, 2), (1, 2), 2, (-1, 0)])
def test_chosen_maps_build_what_they_need_and_no_more(family, indices, tmp_path):
    """The maps are those of a model with all four, and every parameter has a gradient, for which DDP waits."""
    complete = deep(family, features_only=True)
    save_checkpoint(complete, tmp_path / "complete.pth")
    model = deep(family, features_only=True, out_indices=indices)
    for tensor in model.state_dict().values():
        tensor.zero_()
    load_checkpoint(model, tmp_path / "complete.pth")
    x = images(2, 3, 64, 80, device="cpu")
    with torch.no_grad():
        expected, maps = complete(x), model(x)
    assert len(maps) == len(model.out_indices)
    assert all(torch.equal(ours, expected[index]) for index, ours in zip(model.out_indices, maps, strict=True))
    info, last = model.feature_info, model.out_indices[-1]
    assert info.channels() == [m.shape[1] for m in maps]
    assert info.get_dicts(["num_chs"]) == [{"num_chs": channels} for channels in info.channels()]
    assert info.reduction() == [64 // m.shape[2] for m in maps]
    assert [type(model.get_submodule(module)) for module in info.module_name()]
    assert (info.channels(last), info.reduction([last])) == (info[last]["num_chs"], [info[last]["reduction"]])
    loss_of(model.train(), x).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if family != "overlock":  # whose backbone has norms of its own for its maps
        classifier = deep(family)
        of_classifier = classifier.forward_intermediates(x, indices=indices, intermediates_only=True)
        save_checkpoint(classifier, tmp_path / "classifier.pth")
        load_checkpoint(model.eval(), tmp_path / "classifier.pth")
        with torch.no_grad():
            assert all(map(torch.equal, model(x), of_classifier))
    missing = [i for i in range(4) if i not in model.out_indices]
    if missing and (family == "overlock" or missing[-1] > max(model.out_indices)):
        with pytest.raises(ValueError, match="indices"):  # it was not built
            model.forward_intermediates(x, indices=missing[-1:])


@by_family
@torch.no_grad()
def test_intermediates(family):
    """The last map is the features; stages after the last wanted map do not run."""
    model, x, stages = deep(family), images(2, 3, 64, 64, device="cpu"), []
    model.get_submodule(model.stages[-2][-1])[0].register_forward_hook(lambda *_: stages.append(True))
    features, maps = model.forward_intermediates(x)
    assert len(maps) == 4
    assert stages
    if family == "volo":  # features are tokens there, behind the class token
        assert torch.equal(model.forward_head(features), model(x))
    else:
        assert torch.equal(features, maps[-1])
    assert all(map(torch.equal, model.forward_intermediates(x, indices=2)[1], maps[-2:]))
    stages.clear()
    early = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
    assert torch.equal(early[0], maps[0])
    assert not stages
    for options, message in (({"indices": [4]}, "indices"), ({"output_fmt": "NLC"}, "output_fmt")):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x, **options)


@by_family
@torch.no_grad()
def test_an_image_of_another_type(family):
    """It is refused before anything runs, except under autocast, which converts; compiled, PyTorch refuses it."""
    model, x = narrow(family), images(2, 3, 64, 64, device="cpu")
    for other in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match=f"x must have the model's dtype, torch.float32, got {other}"):
            model(x.to(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(x.bfloat16()), model(x), 2e-2)
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))  # as layerwise casting does
    assert_close(model(x.half()), model(x), 2e-2)


# ---- the classifier


@by_family
@torch.no_grad()
def test_features_head_and_classifier(family):
    model, x = deep(family), images(3, 3, 64, 64, device="cpu")
    features, logits = model.forward_features(x), model(x)
    assert torch.equal(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, model.head_hidden_size)
    classifier = model.get_classifier()
    by_hand = pooled @ classifier.weight.flatten(1).t() + classifier.bias
    if family == "volo":
        by_hand = by_hand + 0.5 * model.aux_head(features[:, 1:]).max(1).values
    assert_close(logits, by_hand, FORWARD_TOLERANCE[torch.float32])
    assert torch.equal(deep(family, num_classes=0)(x), pooled)
    for num_classes in (7, 0, 9):
        model.reset_classifier(num_classes)
        assert model(x).shape == (3, num_classes or model.head_hidden_size)
        assert model.num_classes == num_classes
        assert num_classes or torch.equal(model(x), pooled)
    assert model.get_classifier().weight.std() > 0.001
    with pytest.raises(ValueError, match="features_only"):
        FAMILY[family].build(features_only=True).reset_classifier(3)


@by_family
def test_training_reaches_every_parameter(family):
    """What it returns depends on each of them: OverLoCK's two logits, VOLO's class logits, token logits and box."""
    x = images(3, 3, 64, 96, device="cpu")
    for number, num_classes in enumerate((5, 0)):
        model = deep(family, num_classes=num_classes).train()
        expected = (FAMILY[family].returned or ([(3, 5)], [(3, model.num_features)]))[number]
        assert [tuple(out.shape) for out in outputs(model(x))] == expected
    model = deep(family).train()
    loss_of(model, x).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < parameter.grad.norm() < float("inf"), name


@by_family
def test_plain_logits_in_training_leave_no_parameter_waiting(family):
    """Scripts that know only logits get one tensor, and a gradient wherever one is required."""
    model = deep(family, drop_path_rate=0.1).train()
    model.return_plain_logits()
    model.reset_classifier(3)
    logits = model(images(2, 3, 64, 64, device="cpu"))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in model.get_classifier().parameters())


@by_family
def test_keyword_arguments(family):
    model, x = deep(family, num_classes=7, in_chans=1, drop_path_rate=0.5), images(8, 1, 64, 64, device="cpu")
    assert max((module.rate for module in model.modules() if isinstance(module, DropPath)), default=0) == 0.5
    with torch.no_grad():  # which only acts in training
        expected = deep(family, num_classes=7, in_chans=1)(x)
        assert expected.shape == (8, 7)
        assert torch.equal(model(x), expected)
        for module in model.modules():
            if isinstance(module, DropPath):
                module.train()
        assert not torch.equal(model(x), expected)


OVERLOCK_DEPTHS = {"xt": (0.1, 17), "t": (0.15, 30), "s": (0.4, 42), "b_reparam": (0.5, 54)}  # rate, blocks


@pytest.mark.parametrize(
    ("name", "options", "rates"),
    [
        *((f"overlock_{v}", {}, torch.linspace(0, rate, n).tolist()) for v, (rate, n) in OVERLOCK_DEPTHS.items()),
        ("overlock_xt", {"drop_path_rate": 0.0}, [0] * 17),
        ("rednet26", {"drop_path_rate": 0.7}, torch.linspace(0, 0.7, 8).tolist()),
        # Neither Outlookers nor class blocks are dropped.
        ("volo_d1", {"drop_path_rate": 0.5}, [0] * 4 + torch.linspace(0, 0.5, 18).tolist()[4:] + [0, 0]),
    ],
    ids=str,
)
def test_drop_path_rises_linearly_with_depth(name, options, rates):
    model, order = on_meta(name, **options), ("blocks1", "blocks2", "blocks3", "blocks4", "sub_blocks3", "sub_blocks4")
    stages = [model.get_submodule(stage) for stage in order] if name.startswith("overlock") else [model]
    assert [m.rate for stage in stages for m in stage.modules() if isinstance(m, DropPath)] == pytest.approx(rates)
