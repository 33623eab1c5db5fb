"""Everything wrong is refused before anything runs, by a message that names the argument and what came."""

import os
import subprocess
import sys

import pytest
import torch

import kernels


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


# argument -> good value, per operator; each bad case replaces some of them.
GOOD = {
    "involution2d": {"x": zeros(2, 6, 5, 4), "weight": zeros(2, 3, 3, 3, 5, 4)},
    "involution2d_generate": {
        "x": zeros(2, 6, 5, 4),
        "features": zeros(2, 3, 5, 4),
        "weight": zeros(27, 3),
        "bias": zeros(27),
        "kernel_size": 3,
        "groups": 3,
    },
    "na2d_av": {"attn": zeros(2, 3, 5, 4, 9), "value": zeros(2, 3, 5, 4, 7), "kernel_size": 3},
    "na2d_qk": {"query": zeros(2, 3, 5, 4, 7), "key": zeros(2, 3, 5, 4, 7), "kernel_size": 3},
    "na2d_softmax_av": {
        "logits": zeros(2, 3, 5, 4, 9),
        "value": zeros(2, 3, 5, 4, 7),
        "kernel_size": 3,
        "rpb": zeros(3, 5, 5),
    },
    "contmix2d": {
        "query": zeros(2, 3, 4, 6, 5),
        "key": zeros(2, 3, 4, 8),
        "value": zeros(2, 2, 3, 7, 6, 5),
        "proj_weight": zeros(34, 8),
        "proj_bias": zeros(34),
        "rpb": [zeros(3, 5, 5), zeros(3, 9, 9)],
        "kernel_sizes": (3, 5),
    },
    "outlook_attention2d": {"logits": zeros(2, 3, 2, 2, 9, 9), "value": zeros(2, 5, 4, 6), "stride": 2},
    "depthwise_conv2d": {"x": zeros(2, 6, 5, 4), "weight": zeros(6, 1, 3, 3), "bias": zeros(6)},
}

# (operator, replaced arguments, error, what the message must name)
BAD = [
    ("involution2d", {"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
    ("involution2d", {"x": zeros(6, 5, 4)}, ValueError, "x must have shape"),
    ("involution2d", {"x": zeros(2, 6, 5, 4, dtype=torch.int64)}, TypeError, "x must be float16"),
    ("involution2d", {"x": zeros(2, 6, 5, 4, dtype=torch.complex64)}, TypeError, "x must be float16"),
    ("involution2d", {"weight": zeros(2, 3, 3, 3, 5, 4).half()}, TypeError, "weight must have the dtype of x"),
    ("involution2d", {"weight": zeros(2, 3, 3, 3, 5, 4, device="meta")}, ValueError, "weight must be on the device"),
    ("involution2d", {"weight": zeros(2, 4, 3, 3, 5, 4)}, ValueError, "weight has 4 groups"),
    ("involution2d", {"weight": zeros(2, 3, 3, 3, 4, 4)}, ValueError, "weight must have shape"),
    ("involution2d", {"weight": zeros(1, 3, 3, 3, 5, 4)}, ValueError, "weight must have shape"),
    ("involution2d", {"stride": 0}, ValueError, "stride must be at least 1"),
    ("involution2d", {"stride": 1.5}, TypeError, "stride must be an int"),
    ("involution2d", {"stride": True}, TypeError, "stride must be an int"),
    ("involution2d", {"dilation": -1}, ValueError, "dilation must be at least 1"),
    ("involution2d", {"padding": -1}, ValueError, "padding must be at least 0"),
    ("involution2d", {"padding": 0, "dilation": 3}, ValueError, "does not fit x"),
    ("involution2d_generate", {"groups": 4}, ValueError, "groups must be at least 1 and divide the 6 channels"),
    ("involution2d_generate", {"features": zeros(2, 3, 4, 4)}, ValueError, "features must have shape"),
    ("involution2d_generate", {"weight": zeros(26, 3)}, ValueError, "weight must have shape"),
    ("involution2d_generate", {"bias": zeros(26)}, ValueError, "bias must have shape"),
    ("na2d_av", {"kernel_size": 4}, ValueError, "kernel_size must be odd"),
    ("na2d_av", {"kernel_size": 5, "attn": zeros(2, 3, 5, 4, 25)}, ValueError, "needs a map of width at least 5"),
    ("na2d_av", {"dilation": 2}, ValueError, "kernel_size 3 with dilation 2 needs a map"),
    ("na2d_av", {"attn": zeros(2, 3, 5, 4, 8)}, ValueError, "attn must have shape"),
    ("na2d_av", {"value": zeros(2, 5, 4, 7)}, ValueError, "value must have shape"),
    ("na2d_qk", {"key": zeros(2, 3, 5, 4, 6)}, ValueError, "key must have shape"),
    ("na2d_qk", {"rpb": zeros(3, 5, 4)}, ValueError, "rpb must have shape"),
    ("na2d_qk", {"dilation": 0}, ValueError, "dilation must be at least 1"),
    ("na2d_softmax_av", {"rpb": zeros(2, 5, 5)}, ValueError, "rpb must have shape"),
    ("na2d_softmax_av", {"rpb": zeros(3, 5, 5).double()}, TypeError, "rpb must have the dtype of logits"),
    ("na2d_softmax_av", {"logits": zeros(2, 3, 5, 4, 25)}, ValueError, "logits must have shape"),
    ("contmix2d", {"kernel_sizes": (3, 4)}, ValueError, r"kernel_sizes\[1\] must be odd"),
    ("contmix2d", {"kernel_sizes": 3}, TypeError, "kernel_sizes must be a non-empty sequence"),
    ("contmix2d", {"rpb": zeros(3, 5, 5)}, TypeError, "rpb must be a sequence"),
    ("contmix2d", {"rpb": [zeros(3, 5, 5)]}, ValueError, "rpb must hold one tensor per kernel size"),
    ("contmix2d", {"rpb": [zeros(3, 5, 5), zeros(3, 5, 5)]}, ValueError, r"rpb\[1\] must have shape"),
    ("contmix2d", {"proj_weight": zeros(33, 8)}, ValueError, "proj_weight must have shape"),
    ("contmix2d", {"proj_bias": zeros(33)}, ValueError, "proj_bias must have shape"),
    ("contmix2d", {"key": zeros(2, 3, 5, 8)}, ValueError, "key must have shape"),
    ("contmix2d", {"value": zeros(2, 1, 3, 7, 6, 5)}, ValueError, "value must have shape"),
    ("outlook_attention2d", {"logits": zeros(2, 2, 2, 2, 9, 9)}, ValueError, "logits must have shape"),
    ("outlook_attention2d", {"logits": zeros(2, 3, 2, 4, 9, 9)}, ValueError, "heads"),
    ("outlook_attention2d", {"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
    ("outlook_attention2d", {"stride": 0}, ValueError, "stride must be at least 1"),
    ("outlook_attention2d", {"scale": "1"}, TypeError, "scale must be"),
    ("depthwise_conv2d", {"weight": zeros(6, 1, 4, 4)}, ValueError, "odd"),
    ("depthwise_conv2d", {"weight": zeros(6, 2, 3, 3)}, ValueError, "weight must have shape"),
    ("depthwise_conv2d", {"bias": zeros(5)}, ValueError, "bias must have shape"),
]


@pytest.mark.parametrize(("operator", "replaced", "error", "message"), BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD])
def test_refused(operator, replaced, error, message):
    with pytest.raises(error, match=message):
        getattr(kernels, operator)(**(GOOD[operator] | replaced))


@pytest.mark.parametrize("operator", GOOD)
def test_the_good_arguments_are_good(operator):
    out = getattr(kernels, operator)(**GOOD[operator])
    assert not out.any()  # zeros in, zeros out: shape alone would say little


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, eager, reference; got 'cuda'"):
        kernels.set_backend("cuda")
    with pytest.raises(ValueError, match="got 'natten'"), kernels.use_backend("natten"):
        pass
    assert kernels.get_backend() == "auto"


def test_backend_is_restored_after_an_error():
    def fail():
        assert kernels.get_backend() == "reference"
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), kernels.use_backend("reference"):
        fail()
    assert kernels.get_backend() == "auto"


def _python(code, **environment):
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_presets_the_backend():
    code = "import kernels; print(kernels.get_backend())"
    assert _python(code, DYNAMIC_KERNELS_BACKEND="eager").stdout.strip() == "eager"
    refused = _python(code, DYNAMIC_KERNELS_BACKEND="fast")
    assert refused.returncode != 0
    assert "DYNAMIC_KERNELS_BACKEND must be one of" in refused.stderr


def test_triton_on_a_cpu_tensor_without_the_interpreter():
    code = (
        "import torch, kernels\n"
        "kernels.set_backend('triton')\n"
        "kernels.involution2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1, 1, 3, 3))"
    )
    refused = _python(code)
    assert "ValueError: backend 'triton' needs tensors on a GPU, got device cpu" in refused.stderr


def test_importing_loads_no_triton_kernel_and_no_model():
    """PyTorch's own FLOP counter imports triton where it is installed; ours must not be why."""
    code = (
        "import sys, kernels\n"
        "print([m for m in sys.modules if m.endswith('triton_kernels') or m in ('models', 'matplotlib')])"
    )
    assert _python(code).stdout.strip() == "[]"


def test_works_where_triton_is_not_installed():
    code = (
        "import sys, torch, kernels\n"
        "sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.split('.')[0] == 'triton' else find(name, *a)\n"
        "x = torch.randn(1, 4, 6, 6, requires_grad=True)\n"
        "kernels.involution2d(x, torch.randn(1, 2, 3, 3, 6, 6)).sum().backward(); print(x.grad.shape)\n"
        "kernels.set_backend('triton')\n"
        "try: kernels.involution2d(x, torch.randn(1, 2, 3, 3, 6, 6))\n"
        "except ValueError as error: print(error)\n"
    )
    done = _python(code)
    assert "torch.Size([1, 4, 6, 6])" in done.stdout, done.stderr
    assert "the package triton is not installed" in done.stdout
