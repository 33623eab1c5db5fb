"""Which backend runs: the choice and its scope, and the conditions under which another one is in force."""

import asyncio
import operator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import backend
from kernels.backend import BACKENDS
from tests.support import in_a_process


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, eager, reference; got 'cuda'"):
        kernels.set_backend("cuda")
    with pytest.raises(ValueError, match="got 'natten'"), kernels.use_backend("natten"):
        pass


def test_a_choice_ends_with_its_block():
    """One that is made inside, too; and after an error."""
    with kernels.use_backend("eager"):
        kernels.set_backend("reference")
        assert kernels.get_backend() == "reference"
    assert kernels.get_backend() == "auto"
    with pytest.raises(RuntimeError, match="eager"), kernels.use_backend("eager"):
        raise RuntimeError(kernels.get_backend())
    assert kernels.get_backend() == "auto"


def test_a_fresh_process():
    """The environment presets the backend; importing loads no kernel, and no compiler, which takes a second; PyTorch
    knows the kernels of operators that it traces, on whose code its caches of compiled graphs depend; Triton refuses a
    CPU without its interpreter.

    PyTorch's own FLOP counter imports triton where it is installed; ours must not be why.
    """
    code = """if True:
        import sys, torch, kernels
        print(kernels.get_backend())
        loaded = [name for name, m in sys.modules.items() if name.startswith("kernels.") and hasattr(m, "tl")]
        print(loaded + [name for name in ("models", "autotune", "torch._dynamo") if name in sys.modules])
        import torch._inductor.config  # whose padding of maps, wrong before 2.14, is off
        print(torch._inductor.config.comprehensive_padding == (torch.__version__ >= "2.14"))
        from kernels import normed, pointwise
        from kernels.depthwise import sliding
        from torch._library.triton import triton_ops_to_kernels
        traced = [known for name, known in triton_ops_to_kernels.items() if name.startswith("dynamic_kernels::")]
        print(len(traced) >= 6 and all(traced))
        kernels.set_backend("triton")
        kernels.involution2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1, 1, 3, 3))
    """
    refused = in_a_process("-c", code, DYNAMIC_KERNELS_BACKEND="eager", TRITON_INTERPRET="")
    assert refused.stdout.split() == ["eager", "[]", "True", "True"]
    assert "ValueError: backend 'triton' needs tensors on a GPU, got device cpu" in refused.stderr


def test_works_where_triton_is_not_installed():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        import importlib.util as u; find = u.find_spec
        u.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else find(name, *a)
        import kernels
        x = torch.randn(1, 4, 6, 6, requires_grad=True)
        kernels.involution2d(x, torch.randn(1, 2, 3, 3, 6, 6)).sum().backward(); print(x.grad.shape)
        kernels.set_backend("triton")
        try: kernels.involution2d(x, torch.randn(1, 2, 3, 3, 6, 6))
        except ValueError as error: print(error)
    """
    done = in_a_process("-c", code, TRITON_INTERPRET="")
    assert "torch.Size([1, 4, 6, 6])" in done.stdout, done.stderr
    assert "the package triton is not installed" in done.stdout


def test_dynamo_traces_the_choice_of_a_gpu(monkeypatch):
    """OverLoCK asks inside compiled code: neither the search for Triton nor the capability may break a graph."""
    capability = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: capability)
    backend._gpu_supported.cache_clear()

    def asks(x):
        return x + (2 if backend.resolve("auto", x) == "triton" else 1)

    with FakeTensorMode(allow_non_fake_inputs=True):
        graph, _ = torch._dynamo.export(asks)(torch.empty(2, 3, 4, 4, device="cuda"))
    backend._gpu_supported.cache_clear()
    assert [node.args[1] for node in graph.graph.nodes if node.target is operator.add] == [2]


def test_a_block_holds_for_its_own_thread_and_coroutine():
    """Blocks may end in another order than they began."""
    with kernels.use_backend("eager"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(kernels.get_backend).result() == "auto"

    async def run(name, before, after):
        await before.wait()
        with kernels.use_backend(name):
            after.set()
            await asyncio.sleep(0)
            assert kernels.get_backend() == name

    async def together():
        first, second, third = asyncio.Event(), asyncio.Event(), asyncio.Event()
        first.set()
        await asyncio.gather(run("eager", first, second), run("reference", second, third))

    asyncio.run(together())
    assert kernels.get_backend() == "auto"


def test_compiled_code_follows_the_choice():
    """A change of backend compiles again, in a block around the call or inside the compiled function."""

    def name(x):
        return x + BACKENDS.index(kernels.get_backend())

    def block(x):
        with kernels.use_backend("eager"):
            inside = name(x)
        return inside, name(x)

    torch.compiler.reset()
    compiled, x = torch.compile(name, fullgraph=True, backend="eager"), torch.zeros(())
    assert compiled(x) == 0
    with kernels.use_backend("reference"):
        assert compiled(x) == 3
    assert compiled(x) == 0
    assert torch.compile(block, fullgraph=True, backend="eager")(x) == (2, 0)
    assert kernels.get_backend() == "auto"
    assert torch.compile(torch.func.grad(lambda x: x * name(x)), fullgraph=True, backend="eager")(x) == 3
