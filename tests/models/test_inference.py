"""The inference form computes what the model computes, fused or not, and is still a model of its family."""

import copy
import functools
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
import models
from models.inference import _fold, fold_sequence
from models.layers import DropPath, LayerScale, PointwiseConv2d, ResidualDepthwiseConv2d
from models.layers.rednet_inference import FoldedBottleneck, PoolThenReLU
from models.layers.sequence import FusedSequential, feed_forward
from models.rednet import Bottleneck, RedNet
from models.volo import VOLO
from tests.models.families import FAMILIES, FAMILY, fill, images, narrow, on_meta
from tests.support import (
    DEVICE,
    assert_close,
    channels_last,
    equal_entries,
    names_of,
    random_tensor,
    randomise,
    triton_device,
    watching,
)

EXACT = 1e-12  # folding is algebra: in float64 only the order of the roundings differs


SHALLOW = {"depth": (1, 1, 1, 1), "sub_depth": (2, 2)}
DEPTHS: dict[str, Any] = {"overlock": SHALLOW, "rednet": {"depths": (1, 2, 1, 1)}}
# At the least possible width, the heads of a large variant.
OVERLOCK_B = {"embed_dim": (8, 8, 24, 36), "sub_num_heads": (6, 9)}
VOLO_D5 = {"embed_dims": (24, 32), "num_heads": (12, 16), "mlp_ratio": 4.0, "stem_dim": 32}


def build(name: str, **options: Any) -> Any:
    """A narrow member in float64."""
    return narrow(name, **{"num_classes": 7, **DEPTHS.get(name, {}), **options}).double().to(DEVICE)


@pytest.fixture(params=FAMILIES)
def family(request):
    return lambda **options: build(request.param, **options)


def image(*size: int) -> Tensor:
    return images(*size, dtype=torch.float64)


# ---- the same numbers


def turned_over(model: Any) -> None:
    """Batch norms may turn a channel over or switch it off; so may layer scales."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | LayerScale):
            module.weight.data[::3] *= -1
            module.weight.data[1::3] = 0


def one_and_a_half(module: nn.Module, inputs: Any, out: Any) -> Tensor:
    return 1.5 * out


def hooked_or_wrapped(first: int, model: Any) -> None:
    """One layer in three, which then stays as it is."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    for index, module in enumerate(convolutions[first::3]):
        if index % 2 and isinstance(module, nn.Conv2d):
            nn.utils.parametrizations.weight_norm(module)
        else:
            module.register_forward_hook(one_and_a_half)


CHANGES: tuple[Any, ...] = (turned_over, *(functools.partial(hooked_or_wrapped, first) for first in range(3)))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_classes": 0, "in_chans": 1},
    {"in_chans": 5, "num_classes": 2, "drop_path_rate": 0.5},
    {"features_only": True, "out_indices": (0, 2)},
    {"features_only": True, "in_chans": 2},
)


@pytest.mark.parametrize(
    ("name", "options", "change"),
    [
        *((name, options, None) for name in FAMILIES for options in OPTIONS),
        *((name, {}, change) for name in FAMILIES for change in CHANGES),
        ("overlock", {"reparam": True}, None),
        ("overlock", OVERLOCK_B, None),
        ("volo", VOLO_D5, None),
    ],
)
def test_the_same_numbers(name, options, change):
    """Logits and maps, on the eager path and on the naive one, and the gradients of the image: nothing that the
    backward pass reads is overwritten in place."""
    model = build(name, **options)
    if change is not None:
        change(model)
    optimised, x = models.optimize_for_inference(model.eval()), image(2, model.in_chans, 45, 64).requires_grad_()
    for backend in ("auto", "reference"):
        with kernels.use_backend(backend):
            found, expected = optimised(x), model(x)
            assert_close(found, expected, EXACT)
    losses = (torch.stack([part.square().mean() for part in out]).sum() for out in (found, expected))
    (ours,), (right,) = (torch.autograd.grad(loss, x) for loss in losses)
    assert_close(ours, right, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_rounded_once(dtype):
    """They are the exact product of what was folded, rounded once, however many steps folding takes."""
    model = build("overlock").to(dtype)
    optimised = models.optimize_for_inference(model)
    assert {p.dtype for p in optimised.parameters()} == {dtype}
    _, conv, norm = copy.deepcopy(model.sub_blocks3[0].weight_key).double()
    exact = nn.utils.fuse_conv_bn_eval(conv, norm)
    info = torch.finfo(dtype)
    folded = optimised.sub_blocks3[0].weight_key[1]
    for tensor, expected in ((folded.weight, exact.weight), (folded.bias, exact.bias)):
        expected = expected * model.sub_blocks3[0].scale
        error = (tensor.double() - expected).abs()
        assert (error <= 0.501 * info.eps * expected.abs().clamp_min(info.tiny)).all()


# ---- the same interface


def test_interface(family):
    model, x = family(), image(2, 3, 64, 64)
    optimised = models.optimize_for_inference(model)
    assert isinstance(optimised, type(model))
    early = {"indices": [0, 2], "stop_early": True, "intermediates_only": True}
    with torch.no_grad():
        features = model.forward_features(x)
        for call in (
            lambda model: model.forward_features(x),
            lambda model: model.forward_head(features),
            lambda model: model.forward_head(features, pre_logits=True),
            lambda model: model.forward_intermediates(x),
            lambda model: model.forward_intermediates(x, **early),
        ):
            assert_close(call(optimised), call(model), EXACT)
    assert optimised.get_classifier().weight.shape == model.get_classifier().weight.shape
    assert optimised.feature_info == model.feature_info
    optimised.reset_classifier(3)
    assert optimised(x).shape == (2, 3)


def test_the_given_model_is_left_as_it_is(family):
    model = family()
    before = copy.deepcopy(model)
    optimised = models.optimize_for_inference(model)
    assert equal_entries(model, before)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in optimised.state_dict().values())
    model.train()(image(2, 3, 64, 64))  # with its batch norms and its second output


def test_once_more_changes_nothing_and_copies_are_equal(family):
    once, x, file = models.optimize_for_inference(family()), image(1, 3, 64, 64), io.BytesIO()
    twice = models.optimize_for_inference(once)
    assert twice is not once
    assert equal_entries(twice, once)
    torch.save(once, file)
    file.seek(0)
    with torch.no_grad():
        expected = once(x)
        for other in (twice, copy.deepcopy(once), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected)


@pytest.mark.parametrize("name", [*models.list_models("*[!m]"), "overlock_xt_reparam"])
def test_every_variant_folds_completely(name):
    model: Any = models.optimize_for_inference(on_meta(name).eval())
    norms = [key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    kept = next(FAMILY[family].norms for family in FAMILIES if name.startswith(family))
    assert [key for key in norms if not re.fullmatch(kept, key)] == []
    if isinstance(model, RedNet):  # norms after an involution are scales and shifts in the blocks
        blocks = [module for module in model.modules() if isinstance(module, FoldedBottleneck)]
        assert all(isinstance(block.norm, LayerScale) and block.first[0].relu for block in blocks)
        assert blocks
        assert isinstance(model.maxpool, PoolThenReLU)
    assert not any(isinstance(module, DropPath | ResidualDepthwiseConv2d) for module in model.modules())
    scales = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if getattr(module, "bias", None) is not None and isinstance(module, LayerScale)
    }
    assert scales <= {"x_scale", "norm"}  # whose shift no convolution stands beside to take
    assert not any("dil_" in name for name, _ in model.named_modules())
    assert hasattr(model, "aux_head") == isinstance(model, VOLO)  # where it is part of the logits
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    if name == "overlock_xt":
        dense: Any = models.optimize_for_inference(on_meta(name, features_only=True).eval())
        assert isinstance(dense.h_proj[1], nn.Identity)


def test_create_model_from_a_checkpoint(tmp_path):
    options: dict[str, Any] = {"features_only": True, "out_indices": [0]}
    model = fill(models.create_model("volo_d1", **options))
    models.save_checkpoint(model, tmp_path / "weights.pth")
    optimised = models.create_model("volo_d1", checkpoint=tmp_path / "weights.pth", inference=True, **options)
    x = random_tensor(1, 3, 64, 64, device="cpu")
    with torch.inference_mode():
        assert_close(optimised(x), model(x), 1e-5)
    with pytest.raises(ValueError, match="does not fit"):  # too late: there is nowhere for the batch norms to go
        models.load_checkpoint(optimised, tmp_path / "weights.pth")


# ---- refusals


def test_refusals(family):
    model, x = family(), image(1, 3, 64, 64)
    optimised = models.optimize_for_inference(model).train()
    with pytest.raises(ValueError, match=r"optimised for inference.*call model\.eval\(\)"):
        optimised(x)
    with pytest.raises(ValueError, match=r"model must be in evaluation mode.*root.*call model\.eval\(\)"):
        models.optimize_for_inference(model.train())
    name, norm = next((n, m) for n, m in model.eval().named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.train()
    with pytest.raises(ValueError, match=rf"model must be in evaluation mode, but its {name} is"):
        models.optimize_for_inference(model)
    norm.eval().float()
    with pytest.raises(ValueError, match=r"model must have entries of one floating type, got .*float32.*float64"):
        models.optimize_for_inference(model)
    for other in (nn.Identity(), "rednet50", None):
        with pytest.raises(TypeError, match=rf"model must be one that .* builds, got {type(other).__name__}"):
            models.optimize_for_inference(other)  # pyright: ignore[reportArgumentType]


# ---- what a GPU runs in fewer passes: here in Triton's interpreter, in float16, against the layers by themselves


def test_a_bottleneck_whose_parameters_learn_again():
    """The kernel of its end has no gradients."""
    block: Any = randomise(Bottleneck(64, 16), torch.float32).eval().to(triton_device()).requires_grad_(False)
    block: Any = _fold(block).half()
    x = channels_last(random_tensor(2, 64, 5, 4).half())
    for parameters in (block.last.parameters(), block.norm.parameters(), block.first.parameters()):
        parameters = [parameter.requires_grad_() for parameter in parameters]
        with kernels.use_backend("triton"):
            grads = torch.autograd.grad(block(x).float().sum(), parameters)
        assert all(grad.abs().sum() > 0 for grad in grads)
        block.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.stem.register_forward_hook(one_and_a_half),
        lambda model: model.stem[-1].register_forward_hook(one_and_a_half),
        lambda model: model.stem.append(nn.Sequential()),
        lambda model: model.stem.append(nn.Hardtanh()),
        lambda model: model.stem.__setitem__(4, nn.Conv2d(32, 64, 1, dtype=torch.float64)),
    ],
)
def test_a_stem_that_was_changed(change):
    """Only its last convolution, if nobody looks at what it gives, leaves bias and ReLU to the pool."""
    model = build("rednet")
    change(model)
    optimised, x = models.optimize_for_inference(model.eval()), image(1, 3, 33, 40)
    for layers, pool in ((optimised.stem, optimised.maxpool), (model.stem, model.maxpool)):
        assert_close(pool(layers(x)), model.maxpool(model.stem(x)), EXACT)


def test_a_shortcut_by_a_pool():
    """It is one layer, as a convolution would be, whose stride is a number."""
    block: Any = Bottleneck(64, 16, stride=2)
    block.downsample = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True))
    block = randomise(block, torch.float32).eval().requires_grad_(False).to(triton_device())
    fused, x = _fold(copy.deepcopy(block)), channels_last(random_tensor(1, 64, 6, 8))
    with kernels.use_backend("triton"):
        assert_close(fused.half()(x.half()), block(x), 5e-3)


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (64, 1), (32, 2)])
def test_end_of_a_bottleneck(in_channels, stride):
    plain: Any = randomise(Bottleneck(in_channels, 16, stride, 0.5), torch.float32).eval().to(triton_device())
    for conv in (plain.conv1, plain.conv3):
        nn.init.kaiming_normal_(conv.weight)
    fused: Any = _fold(copy.deepcopy(plain).requires_grad_(False))
    x = channels_last(random_tensor(2, in_channels, 9, 8))
    with torch.no_grad():
        expected = plain(x)
        assert_close(fused(x), expected, 1e-5)  # float32: PyTorch's layers
        half = copy.deepcopy(fused).half()
        with kernels.use_backend("triton"), watching() as launched:
            out = half(x.half())
            assert names_of(launched)["residual_kernel"] == 1
            half.last[0].register_forward_hook(one_and_a_half)
            hooked = half(x.half())
            assert names_of(launched)["residual_kernel"] == 1
        fused.last[0].register_forward_hook(one_and_a_half)
        assert_close(hooked, fused(x), 5e-3)
    assert_close(out, expected, 5e-3)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", ["feed forward", "shortcut"])
def test_a_relu_that_was_added_stays(part):
    """Its convolution takes it, whose weights a kernel of more layers then must not read alone."""
    if part == "shortcut":
        layers: Any = Bottleneck(32, 16)
        changed, channels = nn.Sequential(PointwiseConv2d(32, 64, bias=False)), 32
        layers.downsample = changed
        layers = _fold(randomise(layers, torch.float32).eval().requires_grad_(False))
    else:
        layers = randomise(FusedSequential(*feed_forward(12, 24)), torch.float32).requires_grad_(False)
        changed, channels = layers, 12
    changed.append(nn.ReLU())
    layers, x = layers.to(triton_device()), channels_last(random_tensor(2, channels, 9, 8))
    expected = layers(x)
    fold_sequence(changed)
    assert isinstance(changed[-1], nn.Identity)
    with kernels.use_backend("triton"):
        assert_close(layers.half()(x.half()), expected, 5e-3)
