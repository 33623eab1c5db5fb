"""RedNet: official numbers and names, the ceil rule on odd sizes, training, features, contract."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
import models
from models.rednet import Bottleneck, Involution2d, InvolutionFPN, RedNet, rednet26
from tests.support import (
    DEVICE,
    GRADIENT_TOLERANCE,
    assert_close,
    golden,
    golden_fill,
    official_state_dicts,
    random_tensor,
    triton_device,
)

# parameters in M, multiply-adds in G at 224²
PUBLISHED = {
    "rednet26": (9.23, 1.73),
    "rednet38": (12.39, 2.22),
    "rednet50": (15.54, 2.71),
    "rednet101": (25.65, 4.74),
    "rednet152": (33.98, 6.79),
}


def official_name(name):
    return name if name.startswith("head.") else f"backbone.{name}"


def filled(**kwargs) -> Any:
    return golden_fill().fill_(rednet26(**kwargs), official_name).eval().to(DEVICE)


def small(**kwargs) -> Any:
    """One block a stage, with trained-like statistics: quick enough for any check that needs no golden."""
    return golden_fill().fill_(RedNet((1, 1, 1, 1), **{"num_classes": 10, **kwargs}), official_name).eval().to(DEVICE)


# ---- official


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_parameters_and_multiply_adds_are_the_published_ones(name):
    model = models.create_model(name).eval().to("meta")
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert {official_name(key): list(tensor.shape) for key, tensor in model.state_dict().items()} == (
        official_state_dicts()[name]
    )
    parameters, multiply_adds = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.05)


def test_an_involution_counts_its_multiply_adds():
    x, weight = torch.empty(2, 32, 9, 7, device="meta"), torch.empty(2, 2, 7, 7, 9, 7, device="meta")
    with FlopCounterMode(display=False) as counter:
        kernels.involution2d(x, weight)
    assert counter.get_total_flops() == 2 * 49 * x.numel()


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_golden_logits_and_gradient_norms(backend):
    expected = golden("rednet26_224x224")
    if backend == "triton":
        triton_device()
    model = filled()
    image = golden_fill().image(2, 224, 224).to(DEVICE).requires_grad_()
    with kernels.use_backend(backend):
        logits = model(image)
        logits.square().mean().backward()
    assert np.abs(logits.detach().cpu().numpy() - expected["logits"]).max() <= 1e-4 * np.abs(expected["logits"]).max()
    norms = {official_name(name): p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == set(expected["grad_names"])
    for name, norm in zip(expected["grad_names"], expected["grad_norms"], strict=True):
        assert norms[name] == pytest.approx(norm, rel=1e-3), name
    assert image.grad.norm().item() == pytest.approx(expected["input_grad_norm"], rel=1e-3)


# ---- the neck


def pyramid_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Sizes that halve to the next integer above."""
    return [random_tensor(2, c, h, w, dtype=dtype) for c, h, w in ((8, 13, 18), (12, 7, 9), (20, 4, 5))]


def test_involution_fpn_follows_its_definition():
    neck: Any = InvolutionFPN((8, 12, 20), 16, num_outs=5, group_channels=4).double().eval().to(DEVICE)
    golden_fill().fill_(neck)
    maps = [x.requires_grad_() for x in pyramid_inputs(torch.float64)]
    outs = neck(maps)
    assert [tuple(out.shape) for out in outs] == [(2, 16, *size) for size in ((13, 18), (7, 9), (4, 5), (2, 3), (1, 2))]
    merged = None
    for level in (2, 1, 0):
        conv, involution = neck.lateral_convs[level], neck.fpn_convs[level]
        lateral = F.conv2d(maps[level], conv.weight, conv.bias)
        if merged is not None:  # pixel i looks at pixel ⌊i · coarse / fine⌋
            (h, w), (coarse_h, coarse_w) = lateral.shape[2:], merged.shape[2:]
            rows, columns = torch.arange(h) * coarse_h // h, torch.arange(w) * coarse_w // w
            lateral = lateral + merged[:, :, rows[:, None], columns]
        merged = lateral
        weight = involution.conv2(involution.conv1(merged)).unflatten(1, (4, 7, 7))
        assert_close(outs[level], kernels.reference.involution2d(merged, weight), 1e-12, f"level {level}")
    assert torch.equal(outs[3], outs[2][:, :, ::2, ::2])
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])

    tensors = [*maps, *neck.parameters()]
    grads = torch.autograd.grad(torch.cat([out.flatten() for out in outs]).square().sum(), tensors)
    with kernels.use_backend("reference"):
        outs = neck(maps)
    expected = torch.autograd.grad(torch.cat([out.flatten() for out in outs]).square().sum(), tensors)
    for ours, other in zip(grads, expected, strict=True):
        assert other.norm() > 0
        assert_close(ours, other, GRADIENT_TOLERANCE[torch.float64])


@torch.no_grad()
def test_involution_fpn_stands_on_a_backbone():
    backbone = small(features_only=True, out_indices=(1, 2, 3))
    neck = InvolutionFPN([info["num_chs"] for info in backbone.feature_info[1:]]).eval().to(DEVICE)
    pyramid = neck(backbone(random_tensor(1, 3, 65, 96)))
    assert [tuple(out.shape) for out in pyramid] == [(1, 256, 9, 12), (1, 256, 5, 6), (1, 256, 3, 3)]


def test_bad_pyramids_are_named():
    for channels, options, message in (
        ((), {}, "in_channels must be positive"),
        ((8, 12), {"num_outs": 1}, "num_outs must be at least the number of maps, 2, got 1"),
        ((8, 12), {"out_channels": 24}, "group_channels must divide channels = 24"),
    ):
        with pytest.raises(ValueError, match=message):
            InvolutionFPN(channels, **options)
    with pytest.raises(ValueError, match=r"maps must be 2 of \[8, 12\] channels, got \[8, 12, 20\]"):
        InvolutionFPN((8, 12), 16).to(DEVICE)(pyramid_inputs(torch.float32))


# ---- the definition, at sizes the official code cannot run


def involution_by_definition(module: Involution2d, x: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel, for a batch of one."""
    _, channels, height, width = x.shape
    size, stride, dilation = module.kernel_size, module.stride, module.dilation
    rows, columns = -(-height // stride), -(-width // stride)
    pooled = torch.stack(
        [
            x[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].mean((2, 3))
            for i in range(rows)
            for j in range(columns)
        ],
        -1,
    ).view(1, channels, rows, columns)
    weight = module.conv2(module.conv1(pooled)).view(module.groups, size, size, rows, columns)
    out = torch.zeros(1, channels, rows, columns, dtype=x.dtype, device=x.device)
    for c in range(channels):
        for i in range(rows):
            for j in range(columns):
                for u in range(size):
                    for v in range(size):
                        y = i * stride + (u - size // 2) * dilation
                        z = j * stride + (v - size // 2) * dilation
                        if 0 <= y < height and 0 <= z < width:
                            out[0, c, i, j] += weight[c * module.groups // channels, u, v, i, j] * x[0, c, y, z]
    return out


@pytest.mark.parametrize(("stride", "dilation", "size"), [(1, 1, (5, 4)), (2, 1, (5, 7)), (3, 2, (7, 8))])
@torch.no_grad()
def test_involution_module_follows_its_definition(stride, dilation, size):
    module = Involution2d(8, 3, stride, dilation=dilation, group_channels=4, reduction=2).double().to(DEVICE)
    golden_fill().fill_(module.eval())
    x = random_tensor(1, 8, *size, dtype=torch.float64)
    assert_close(module(x), involution_by_definition(module, x), 1e-12)


def test_involution_module_differentiates():
    module = Involution2d(8, 3, 2, group_channels=4, reduction=2).double().to(DEVICE)
    x = random_tensor(2, 8, 5, 3, dtype=torch.float64).requires_grad_()
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (97, 65)])
@torch.no_grad()
def test_any_size_from_32_pixels(height, width):
    model, image = small(), random_tensor(2, 3, height, width)
    _, maps = model.forward_intermediates(image)
    for stage, feature_map in enumerate(maps):
        reduction = 4 * 2**stage
        assert feature_map.shape == (2, 256 * 2**stage, -(-height // reduction), -(-width // reduction))
    logits = model(image)
    with kernels.use_backend("reference"):
        assert_close(logits, model.double()(image.double()), 1e-5)


@torch.no_grad()
def test_triton_and_default_backends_agree():
    model, image = small(), random_tensor(1, 3, 33, 40)
    with kernels.use_backend("triton"):
        logits = model(image)
    assert_close(logits, model(image), 1e-5)


# ---- training


def test_a_fresh_block_is_its_shortcut():
    block = rednet26(num_classes=2).get_submodule("layer2.1").eval()
    x = random_tensor(1, 512, 7, 7, device="cpu").relu()
    assert torch.equal(block(x), x)


def test_training_gradients_equal_those_of_the_definition():
    model, image = small().double().train(), random_tensor(2, 3, 33, 47, dtype=torch.float64)
    again = copy.deepcopy(model)
    model(image).square().mean().backward()
    with kernels.use_backend("reference"):
        again(image).square().mean().backward()
    for (name, ours), definition in zip(model.named_parameters(), again.parameters(), strict=True):
        assert_close(ours.grad, definition.grad, 1e-8, name)
    assert_close(model.stem[0].bn.running_var, again.stem[0].bn.running_var, 1e-12)


def test_a_few_steps_learn_a_batch():
    model = RedNet((1, 1, 1, 1), num_classes=2).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    image, label = random_tensor(8, 3, 32, 32, seed=0), torch.arange(8, device=DEVICE) % 2
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(2), abs=0.3)
    assert losses[-1] < 0.1


def test_drop_path_rises_linearly_and_only_acts_in_training():
    model = small(drop_path_rate=0.6)
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0, 0.2, 0.4, 0.6])
    image = random_tensor(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image), small()(image))
        for block in blocks:
            block.drop_path.train()  # alone: batch statistics would change the logits as well
        assert not torch.equal(model(image), model(image))


# ---- features and contract


@torch.no_grad()
def test_features_only_returns_the_chosen_maps():
    image = random_tensor(1, 3, 40, 56)
    features, maps = small().forward_intermediates(image)
    assert torch.equal(features, maps[-1])
    for indices, expected in (((0, 2), [0, 2]), (2, [2, 3]), ((-1,), [3]), (None, [0, 1, 2, 3])):
        model = small(features_only=True, out_indices=indices)
        outputs = model(image)
        assert len(outputs) == len(expected)
        for output, index in zip(outputs, expected, strict=True):
            info = model.feature_info[index]
            assert output.shape[1] == info["num_chs"]
            assert -(-40 // info["reduction"]) == output.shape[2]
            assert torch.equal(output, maps[index])
    assert not hasattr(small(features_only=True, out_indices=(0, 1)), "layer3"), "unused stages cost memory"


@torch.no_grad()
def test_classifier_contract():
    model, image = small(), random_tensor(2, 3, 32, 32)
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, 1, 1)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pooled), model(image))
    model.reset_classifier(4)
    assert model(image).shape == (2, 4)
    assert model.head.fc is model.get_classifier()
    for without in (small(num_classes=0), model):
        without.reset_classifier(0)
        assert torch.equal(without(image), pooled)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 3


def test_group_matcher_sorts_every_parameter():
    model = rednet26(num_classes=2)
    for coarse, groups in ((False, 8), (True, 4)):
        matcher = model.group_matcher(coarse)
        seen = set()
        for name, _ in model.named_parameters():
            block = re.match(matcher["blocks"], name)
            assert bool(block) + bool(re.match(matcher["stem"], name)) + name.startswith("head.") == 1, name
            if block:
                seen.add(block.groups())
        assert len(seen) == groups
    assert model.no_weight_decay() == set()


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": -1}, "kernel_size must be >= 1, got -1"),
        ({"stride": 0}, "stride must be >= 1, got 0"),
        ({"dilation": 0}, "dilation must be >= 1, got 0"),
        ({"group_channels": 5}, "group_channels must divide channels = 32, got 5"),
        ({"reduction": 64}, "reduction must divide channels = 32, got 64"),
    ],
)
def test_bad_involution_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(32, **arguments)
