"""Batch norm and GELU as one step of compiled training, in Triton's interpreter, against PyTorch's layers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from models.layers import GELU2d
from models.layers.normed import NormedSequential
from tests.support import assert_close, channels_last, equal_entries, random_tensor, randomise, trained, triton_device


@pytest.fixture
def compiling(monkeypatch):
    """What a compiler would trace is run, in float32 on any device."""
    monkeypatch.setattr("models.layers.normed.in_16_bits_on_gpu", lambda _: True)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)


def pair(norm: nn.Module | None = None) -> tuple[Any, Any]:
    """The same layers, as one step and one by one."""
    layers = nn.Conv2d(3, 6, 3, bias=False), norm or nn.BatchNorm2d(6), GELU2d(), nn.Conv2d(6, 2, 1)
    fused = randomise(NormedSequential(*layers), torch.float32).to(triton_device(), memory_format=torch.channels_last)
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
    monkeypatch.setattr("models.layers.normed._NormedGELU.apply", None)
    fused, plain = pair()
    for layers in (fused, plain):
        change(layers)
        layers.to(triton_device())
    assert all(map(torch.equal, step(fused), step(plain)))
    assert equal_entries(fused, plain)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Any tensor is taken for one that a GPU multiplies in 16 bits."""
    monkeypatch.setattr("models.layers.normed.in_16_bits_on_gpu", lambda _: True)
    monkeypatch.setattr("models.layers.normed.runs_triton", lambda _: True)


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


def test_inference_has_plain_sequences():
    fused, plain = pair()
    folded = fused.eval().folded()
    assert type(folded) is nn.Sequential
    assert not folded.training
    assert equal_entries(folded, plain)
    fused.register_forward_hook(lambda *_: None)
    assert fused.folded() is fused
