"""PyTorch's own tools on every family: compilation, precision, copies, torch.func, changed layers, CUDA graphs."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import models
from tests.models.families import SHALLOW, by_family, images, in_training, loss_of, narrow, with_fixed_statistics
from tests.support import DEVICE, assert_close, random_tensor


def prepared(family: str, **options: Any) -> Any:
    return narrow(family, **options).to(DEVICE)


# ---- torch.compile


@pytest.mark.slow
@by_family
@torch.no_grad()
def test_one_graph_serves_every_batch_and_size(family):
    """At these sizes OverLoCK's maps hold its largest kernels; smaller ones are enlarged, in a graph of their own."""
    torch.compiler.reset()
    model = prepared(family, features_only=True, out_indices=(2,) if family == "overlock" else (1,))
    graphs = []

    def counted(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counted, fullgraph=True, dynamic=True)
    larger = 128 if family == "overlock" else 0
    for batch, height, width in ((2, 96, 112), (3, 128, 96), (5, 112, 144)):
        x = images(batch, 3, height + larger, width + larger)
        assert_close(compiled(x)[0], model(x)[0], 1e-5, f"{list(x.shape)}")
    assert len(graphs) == 1


@pytest.mark.slow
@by_family
def test_training_compiles_in_one_graph(family):
    torch.compiler.reset()
    model, x = in_training(family, **SHALLOW.get(family, {})).to(DEVICE), images(2, 3, 40, 64)
    backend = "aot_eager" if family == "rednet" else "eager"  # the former takes half a minute for OverLoCK
    expected, loss = loss_of(model, x), loss_of(torch.compile(model, fullgraph=True, backend=backend), x)
    assert_close(loss, expected, 1e-5)
    gradients, ours = (torch.autograd.grad(value, list(model.parameters())) for value in (expected, loss))
    for (name, _), grad, other in zip(model.named_parameters(), ours, gradients, strict=True):
        assert float((grad - other).norm()) <= 1e-4 * float(other.norm()) + 1e-6, name


# ---- what leaves a model as it is


def synchronised(model: Any) -> Any:
    converted: Any = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert {type(module) for module in converted.modules()}.isdisjoint({nn.BatchNorm2d})
    return converted


SAME: dict[str, Any] = {
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "channels-last": lambda model: model.to(memory_format=torch.channels_last),
    "checkpointed": lambda model: model.set_grad_checkpointing() or model,
    "synchronised": synchronised,
}


@by_family
@pytest.mark.parametrize("change", SAME)
def test_a_model_computes_the_same(family, change):
    model = in_training(family) if change == "checkpointed" else narrow(family)
    other = SAME[change](copy.deepcopy(model).to(DEVICE))
    assert other.feature_info.channels() == model.feature_info.channels()
    x, found = images(2, 3, 64, 96), []
    for tried, memory in ((model.to(DEVICE), torch.contiguous_format), (other, torch.channels_last)):
        image = x.clone(memory_format=memory).requires_grad_()
        loss = loss_of(tried, image)
        loss.backward()
        gradients = [p.grad for p in tried.parameters()] if change == "checkpointed" else []
        found.append((loss, image.grad, *gradients))
    for index, (expected, ours) in enumerate(zip(*found, strict=True)):
        assert_close(ours, expected, 1e-5 if index == 0 else 1e-4)


@by_family
@pytest.mark.parametrize("form", ["training", "evaluation", "features", "inference"])
def test_symbolic_tracing(family, form):
    """``torch.fx``, and so torchvision's ``create_feature_extractor``: one graph that serves any size."""
    model = in_training(family) if form == "training" else narrow(family, features_only=form == "features")
    model = models.optimize_for_inference(model) if form == "inference" else model
    graph = torch.fx.symbolic_trace(model)
    for size in ((2, 3, 64, 96), (1, 3, 40, 40)):
        x = random_tensor(*size, device="cpu")
        assert_close(loss_of(graph, x), loss_of(model, x), 1e-6)


@by_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast(family, dtype, tolerance):
    """Each of about thirty layers rounds by 2⁻⁹ in bfloat16; in training every gradient is finite."""
    model, x = prepared(family), images(2, 3, 64, 96)
    with torch.autocast(DEVICE, dtype):
        out = model(x)
    assert out.dtype == dtype
    assert_close(out, model(x), tolerance)
    with torch.autocast(DEVICE, dtype):
        loss = loss_of(model.train(), x)
    loss.float().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- torch.func


@by_family
def test_functional_call_and_gradients_per_image(family):
    model, x = prepared(family), images(3, 3, 32, 48)
    parameters = dict(model.named_parameters())
    halved = {name: 0.5 * parameter for name, parameter in parameters.items()}
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(0.5)
    assert_close(torch.func.functional_call(model, halved, (x,)), changed(x), 1e-6)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    per_image = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index in (0, 2):
        expected = torch.autograd.grad(loss(parameters, x[index]), list(parameters.values()), allow_unused=True)
        reached = {name: grad for name, grad in zip(parameters, expected, strict=True) if grad is not None}
        ours = torch.cat([per_image[name][index].flatten() for name in reached])
        assert_close(ours, torch.cat([grad.flatten() for grad in reached.values()]), 1e-4)


@by_family
def test_forward_mode(family):
    """The change of a sum along a direction is what its gradient says."""
    model, x = narrow(family).double().to(DEVICE), images(1, 3, 32, 48, dtype=torch.float64)
    direction = x.flip(3)
    change = torch.func.jvp(lambda x: model(x).square().sum(), (x,), (direction,))[1]
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)
    assert_close(change, (gradient * direction).sum(), 1e-9)


# ---- children that others change: hooks, wrappers, parametrisations


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Every module with parameters of its own."""
    return {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}


@by_family
@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_every_module_fire_and_change_nothing(family, training):
    model, x = in_training(family).train(training).to(DEVICE), images(2, 3, 64, 96)
    hooked, called, kept = copy.deepcopy(model), set(), {}

    def after_forward(name: str, out: Any) -> None:
        called.add(name)
        if isinstance(out, Tensor):
            kept[name] = (out, out.detach().clone())

    for name, module in hooked.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda module, inputs, out, name=name: after_forward(name, out))
    for name, module in leaves(hooked).items():
        module.register_full_backward_hook(lambda module, grads, outs, name=name: called.add(f"{name} backward"))
    expected, loss = loss_of(model, x), loss_of(hooked, x)
    assert_close(loss, expected, 1e-5)
    loss.backward()
    for name, (out, copied) in kept.items():
        assert torch.equal(out, copied), f"the output of {name} was overwritten"
    unused = ("extra_norm",) if training or family != "overlock" else ("extra_norm", "aux_head")
    modules = {name for name, module in hooked.named_modules() if not isinstance(module, nn.ModuleList)}
    expected_calls = modules | {f"{name} backward" for name in leaves(hooked)}
    assert {name for name in expected_calls - called if not name.startswith(unused)} == set()


@by_family
@pytest.mark.parametrize("training", [False, True])
def test_no_two_parameters_share_gradient_memory(family, training):
    """Batch norms use their running statistics in training too, as where detectors are trained."""
    for batch in (1, 2):
        model = with_fixed_statistics(prepared(family).train(training))
        x = images(batch, 3, 64, 96)
        loss_of(model, x).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        once = {name: grad.clone() for name, grad in grads.items()}
        storages = [grad.untyped_storage().data_ptr() for grad in grads.values()]
        assert len(set(storages)) == len(storages)
        loss_of(model, x).backward()
        for name, grad in grads.items():
            assert all(stride > 0 for stride, size in zip(grad.stride(), grad.shape, strict=True) if size > 1), name
            assert_close(grad, 2 * once[name], 1e-5, name)


class Adapted(nn.Module):
    """Adds a trained change to the output of a layer, as low-rank adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.change = nn.Parameter(torch.zeros((), device=DEVICE))

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.base(*inputs)
        return out + self.change * out


LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
CHANGED = {  # what is put in a layer's place or around its weight, and the parameter to be trained then
    "adapter": (Adapted, LAYERS, "change"),
    "parametrized": (nn.utils.parametrizations.weight_norm, nn.Conv2d, "weight.original0"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), nn.Conv2d, "weight_orig"),
}


@by_family
@pytest.mark.parametrize("change", CHANGED)
def test_changed_layers_take_effect_and_train(family, change):
    function, kinds, part = CHANGED[change]
    model, x = in_training(family).to(DEVICE), images(1, 3, 64, 64)
    expected = loss_of(model, x)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and not n.startswith("aux_head")]
    for name, module in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, function(module))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        if step == 0 and change != "pruned":
            assert_close(loss, expected, 1e-5)
        optimizer.step()
    trained = {name: p.grad for name, p in model.named_parameters() if name.endswith(part)}
    assert len(trained) == len(layers)
    assert all(grad is not None and grad.any() for grad in trained.values())


# ---- CUDA graphs


@by_family
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_cuda_graphs(family):
    model, static, other = prepared(family), images(2, 3, 64, 96), images(2, 3, 64, 96) + 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)
    for x in (other, images(2, 3, 64, 96)):
        static.copy_(x)
        graph.replay()
        assert_close(out, model(x), 1e-6)
