"""Layers in sequence that kernels compute together, in Triton's interpreter, against PyTorch's layers."""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import tolerances
from models.inference import fold_sequence, optimize_for_inference
from models.layers import GELU2d
from models.layers.overlock_blocks import DynamicConvBlock, RepConvBlock
from models.layers.sequence import FusedSequential, feed_forward
from tests.models.families import images, narrow
from tests.support import (
    DEVICE,
    assert_close,
    channels_last,
    equal_entries,
    names_of,
    random_tensor,
    randomise,
    trained,
    triton_device,
    watching,
)

# ---- a batch norm and GELU, as one step of compiled training


@pytest.fixture
def compiling(monkeypatch):
    """What a compiler would trace is run, in float32 on any device."""
    importlib.import_module("torch._dynamo")  # which looks up as it is imported what is replaced here
    monkeypatch.setattr("models.layers.sequence.in_16_bits_on_gpu", lambda _: True)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)


def pair(norm: nn.Module | None = None) -> tuple[Any, Any]:
    """The same layers, as one step and one by one."""
    layers = nn.Conv2d(3, 6, 3, bias=False), norm or nn.BatchNorm2d(6), GELU2d(), nn.Conv2d(6, 2, 1)
    fused = randomise(FusedSequential(*layers), torch.float32).to(triton_device(), memory_format=torch.channels_last)
    return fused, nn.Sequential(*copy.deepcopy(fused))


def step(layers: nn.Module) -> list[torch.Tensor]:
    x, grad = channels_last(random_tensor(4, 3, 7, 6, seed=1)), random_tensor(4, 2, 5, 4, seed=2)
    return trained(layers, x, grad, "triton")


@pytest.mark.parametrize("momentum", [0.1, 0.25])
def test_one_step_trains_as_layers_do(momentum, compiling):
    fused, plain = pair(nn.BatchNorm2d(6, eps=1e-3, momentum=momentum))
    for _ in range(2):
        assert_close(step(fused), step(plain), 1e-5)
    assert fused[1].num_batches_tracked == plain[1].num_batches_tracked == 2
    for name in ("running_mean", "running_var"):
        assert_close(getattr(fused[1], name), getattr(plain[1], name), 1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers.eval(),
        lambda layers: layers[1].register_forward_hook(lambda _module, _inputs, out: 2 * out),
        lambda layers: layers[2].register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],)),
        lambda layers: setattr(layers[1], "momentum", None),
        lambda layers: layers.__setitem__(1, nn.BatchNorm2d(6, affine=False)),
        lambda layers: layers.__setitem__(1, nn.BatchNorm2d(6, track_running_stats=False)),
        lambda layers: layers.__setitem__(2, GELU2d("tanh")),
        lambda layers: layers.__setitem__(2, nn.SiLU()),
    ],
)
def test_other_layers_run_one_by_one(change, compiling, monkeypatch):
    monkeypatch.setattr("models.layers.sequence._NormedGELU.apply", None)
    fused, plain = pair()
    for layers in (fused, plain):
        change(layers)
        layers.to(triton_device())
    assert all(map(torch.equal, step(fused), step(plain)))
    assert equal_entries(fused, plain)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Any tensor is taken for one that a GPU multiplies in 16 bits."""
    monkeypatch.setattr("models.layers.sequence.in_16_bits_on_gpu", lambda _: True)
    monkeypatch.setattr("models.layers.sequence.runs_triton", lambda _: True)


def test_compiled_code_takes_the_step(on_a_gpu, monkeypatch):
    """Dynamo follows it, forward and backward; not into kernels that the interpreter runs."""

    def backward(grad: Any, x: Any, weight: Any, *_: Any) -> list[Any]:
        return [grad * x, weight + 1, weight + 2]

    monkeypatch.setattr("kernels.normed.normed_gelu_backward", backward)
    fused, plain = pair()
    x = random_tensor(2, 3, 6, 6, seed=2)
    out = torch.compile(fused, backend="aot_eager", fullgraph=True)(x)
    assert_close(out, plain(x), 1e-5)
    assert_close(fused[1].running_var, plain[1].running_var, 1e-6)
    assert fused[1].num_batches_tracked == 1
    assert torch.equal(torch.autograd.grad(out.sum(), fused[1].bias)[0], fused[1].weight + 2)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_code_runs_the_layers(strict, on_a_gpu):
    fused, _ = pair()
    program = torch.export.export(fused, (random_tensor(2, 3, 6, 6),), strict=strict)
    assert "batch_norm" in str(program.graph)


# ---- hidden layers, in 16 bits


@pytest.mark.parametrize("side", [3, 9])  # the norm scales the map, or the projection's weights
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("expanded", [False, True])  # from the 1×1 convolution on, as large maps are
def test_feed_forward(side, folded, expanded, monkeypatch):
    monkeypatch.setattr("kernels.depthwise.expanded.FEW", 0 if expanded else 100)
    layers: Any = FusedSequential(*feed_forward(12, 24))
    layers = randomise(layers, torch.float32).requires_grad_(False).to(triton_device())
    if folded:
        layers[2] = layers[2].folded()
        fold_sequence(layers)
        assert layers[3].beta is None
    x = channels_last(random_tensor(2, 12, side, side))
    expected = layers(x)  # float32: PyTorch's layers
    with kernels.use_backend("triton"), watching() as launched:
        out = layers.half()(x.half())
        layers[1] = GELU2d("tanh")  # not the kernel's
        layers(x.half())
    first, *rest = launched
    assert first.kernel.__name__ == ("expanded_kernel" if expanded else "sliding_kernel")
    assert not any(made.arguments["GELU"] for made in rest)
    assert_close(out, expected, 3e-3)
    assert out.is_contiguous(memory_format=torch.channels_last)
    layers[1] = GELU2d()
    with kernels.use_backend("triton"), watching() as launched:
        layers(x.half().requires_grad_())  # by a kernel that has a derivative
    assert launched[0].kernel.__name__ == "sliding_kernel"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, kernels.use_backend("triton"):
        assert layers(mode.from_tensor(x.half())).stride() == out.stride()


@pytest.mark.parametrize("side", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_of_a_feed_forward(side, dtype):
    """Output and gradients, without and under autocast, against float64; a channel of zeros has a gradient, too."""
    exact: Any = randomise(FusedSequential(*feed_forward(12, 24)), torch.float64).to(triton_device())
    with torch.no_grad():
        exact[0].weight[3], exact[0].bias[3], exact[2].bias[3] = 0, 0, 0
    x = channels_last(random_tensor(2, 12, side, side))
    grad = channels_last(random_tensor(2, 12, side, side))
    expected = trained(exact, x.double(), grad)
    found = trained(copy.deepcopy(exact).to(dtype), x.to(dtype), grad, "triton")
    assert_close(found, expected, tolerances.GRADIENT[dtype] * 3)
    with torch.autocast(DEVICE, dtype), watching() as launched:  # what comes may be float32, as from a layer norm
        found = trained(copy.deepcopy(exact).float(), x, grad, "triton")
    assert names_of(launched)["sliding_kernel"] == 2
    assert_close(found, expected, tolerances.GRADIENT[dtype] * 3)


def test_a_feed_forward_of_other_channels_launches_nothing():
    """A kernel would read beside the weights, where PyTorch has an error."""
    layers = FusedSequential(*feed_forward(12, 24)[1:]).to(triton_device()).half()
    x = channels_last(random_tensor(1, 32, 9, 9).half())
    refused = pytest.raises((RuntimeError, ValueError), match=r"channels|weight must have shape")
    with kernels.use_backend("triton"), watching() as launched, refused:
        layers(x)
    assert not launched


def test_a_whole_model_is_fused():
    triton_device()
    model, x = narrow("overlock"), images(1, 3, 64, 64)
    fused = optimize_for_inference(model).half()
    with torch.no_grad(), kernels.use_backend("triton"), watching() as launched:
        out = fused(x.half())
    assert_close(out, model(x), 1e-2)
    parts = sum(isinstance(block, RepConvBlock | DynamicConvBlock) for block in fused.modules())
    assert [made.arguments.get("GELU") for made in launched].count(True) == parts > 0
