"""Launches made again with the arguments of an earlier one: other pointers, and what is not repeated."""

import textwrap

import pytest
import torch

import kernels
from kernels.tuning import choose, repeat
from tests.kernels.rules import BY_NAME, check
from tests.support import assert_close, in_a_process, random_tensor

# Launchers that make more than one launch and are never repeated.
NEVER = {"depthwise", "depthwise_weight_gradient"}


@pytest.fixture
def watched(monkeypatch):
    """The repeats, empty at first; filling outputs with NaN, as the tests do, does not prevent them."""
    monkeypatch.setattr(repeat, "HARMLESS", {torch.ops.aten.fill_.Scalar})
    monkeypatch.setattr(choose, "_repeats", {})
    return choose._repeats


@BY_NAME
def test_other_tensors_in_the_places_of_the_first(operator, watched):
    dtype = torch.float32
    if operator.name == "contmix2d":  # of whose kernels others leave a product to PyTorch
        operator, dtype = operator.at(operator.cases["own windows"]), torch.float16
    for _ in range(3):
        check(operator, operator.tensors(2, dtype), "triton")
    assert {key[0] for key, made in watched.items() if made is None} <= NEVER
    assert operator.name == "depthwise_conv2d" or any(watched.values())
    if operator.name == "contmix2d":  # what lies between the launches of a pass is released before its end
        assert any(step.released for made in watched.values() if made for step in made.steps[:-1])


def test_shapes_strides_types_and_alignment_are_told_apart(watched):
    x, weight = random_tensor(1, 2, 5, 4), random_tensor(1, 1, 3, 3, 5, 4)
    shifted = torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape)
    calls = [
        (x, weight),
        (x, weight),
        (x.to(memory_format=torch.channels_last), weight),
        (x.double(), weight.double()),
        (x[..., :3], weight[..., :3]),
        (shifted, weight),
    ]
    with kernels.use_backend("triton"):
        for features, kernel in calls:
            expected = kernels.reference.involution2d(features.double(), kernel.double())
            assert_close(kernels.involution2d(features, kernel), expected, 2e-6)
    assert len(watched) == len(calls) - 1


def test_overlapping_tensors_are_not_repeated(watched):
    """Two arguments that begin at one address could not be told apart the next time."""
    x = random_tensor(1, 1, 4, 5, 8)
    with kernels.use_backend("triton"):
        kernels.na2d_qk(x, x, 3)
        assert list(watched.values()) == [None]
        other = random_tensor(1, 1, 4, 5, 8)
        expected = kernels.reference.na2d_qk(x.double(), other.double(), 3)
        assert_close(kernels.na2d_qk(x, other, 3), expected, 2e-6)


def test_the_first_launch_does_not_wait_for_dynamo():
    """Importing that takes two seconds."""
    code = "kernels.set_backend('triton'); kernels.na2d_qk(*torch.ones(2, 1, 1, 4, 5, 8), 3)"
    code = f"import sys, torch, kernels; {code}; print('torch._dynamo' in sys.modules)"
    done = in_a_process("-c", code, TRITON_INTERPRET="1")
    assert done.stdout == "False\n", done.stderr


def test_nothing_is_remembered_while_tuning(watched):
    x, weight = random_tensor(1, 2, 5, 4), random_tensor(1, 1, 3, 3, 5, 4)
    with kernels.use_backend("triton"):
        kernels.involution2d(x, weight)
        assert watched
        with choose.observing(lambda request: None):
            kernels.involution2d(x, weight)
            assert not watched


def test_triton_is_given_what_it_gives_itself():
    """A stand-in for the driver records what would reach the compiled code: first from Triton, then from a repeat."""
    code = """
        import torch, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime import driver
        from autotune.precompile import absent_device
        from kernels.aggregation.rows import aggregate
        from kernels.tuning import choose
        from kernels.windows import Window
        import kernels.launch

        calls = []
        driver.set_active(absent_device(GPUTarget("cuda", 90, 32)))
        CompiledKernel._init_handles = lambda self: None
        CompiledKernel.function, CompiledKernel.packed_metadata = 11, (4, 1)
        CompiledKernel.run = property(lambda self: lambda *arguments: calls.append(arguments))
        torch.cuda.current_device = lambda: None  # the index of a CPU's device

        def call():
            weight, x = torch.randn(2, 1, 3, 3, 8, 8), torch.randn(2, 1, 16, 8, 8)
            return aggregate(weight, x, Window((3, 3), padding=(1, 1))), weight, x

        first, second = call(), call()
        assert any(choose._repeats.values()) and len(calls) == 2
        address = {t.data_ptr(): i for made in (first, second) for i, t in enumerate(made)}
        def told(value):
            if isinstance(value, torch.Tensor): value = value.data_ptr()
            if type(value).__name__ == "LazyDict": return value.data
            if isinstance(value, tuple): return tuple(map(told, value))
            return ("tensor", address[value]) if value in address else value
        ours, theirs = ([told(value) for value in made] for made in calls)
        assert ours == theirs, [(a, b) for a, b in zip(ours, theirs) if a != b]
        print("same", len(ours))
    """
    if not repeat.ends_as_known():
        pytest.skip("this Triton is launched as it launches itself")
    done = in_a_process("-c", textwrap.dedent(code), TRITON_INTERPRET="")
    assert done.stdout.startswith("same"), done.stderr
