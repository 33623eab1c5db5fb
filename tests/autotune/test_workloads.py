"""Shapes, floors and operation counts against numbers worked out by hand; images and models to measure with."""

import pytest
import torch
from PIL import Image

import kernels
from autotune import kernel_cases, networks, passes, workloads

CPU = torch.device("cpu")


def by_name(batch=1, image=(224, 224)):
    return {workload.name: workload for workload in workloads.operator_workloads(batch, image)}


def test_every_public_operator_runs_at_the_published_shapes():
    """A benchmark adds images of 800×1280 to those of 224²; each involution also generates its kernels inside."""
    names = [f"{workload.output[0]} {workload.name}" for workload in workloads.benchmark_workloads()]
    assert len(set(names)) == len(names)
    generated = {name for name in names if "_generate" in name}
    assert [f"128 {name}" for name in by_name()] == [name for name in names if name.startswith("128")]
    assert {name.replace("_generate", "") for name in generated} == {name for name in names if "involution2d " in name}
    operators = set(kernels.__all__) & set(dir(kernels.reference))
    assert {name.split()[1] for name in names} == set(workloads.OPERATORS) == operators
    built = kernel_cases.cases().items()  # compile --only OPERATOR finds its cases
    assert {name.partition(" ")[0] for name, case in built if case.part is None} == operators
    assert "2 involution2d RedNet-50 64@200×320 K=7" in names


def test_shapes_follow_the_image():
    large = by_name(2, (800, 1280))
    assert large["involution2d RedNet-50 64@200×320 K=7"].output == (2, 64, 200, 320)
    logits = large["outlook_attention2d VOLO-D1 6×32@100×160 K=3 s=2"].inputs["logits"]
    assert logits == workloads.Input((2, 50, 80, 6, 9, 9))
    small = by_name(1, (64, 96))  # maps of 4×6 and 2×3, too small for windows of 13 and 7
    assert "contmix2d OverLoCK-T 8×16@13² K=5,13" in small
    assert "na2d_softmax_av OverLoCK-T 16×16@7² K=7" in small


@pytest.mark.parametrize(
    ("name", "inputs", "output", "multiply_adds"),
    [
        # x 2·64·56², weight 2·4·49·56²
        ("involution2d RedNet-50 64@56² K=7", 401408 + 1229312, 401408, 401408 * 49),
        # attn 2·8·14²·169, value 2·8·14²·16
        ("na2d_av OverLoCK-T 8×16@14² K=13", 529984 + 50176, 50176, 529984 * 16),
        # logits 2·16·7²·49, value 2·16·7²·16, rpb 16·13²
        ("na2d_softmax_av OverLoCK-T 16×16@7² K=7", 76832 + 25088 + 2704, 25088, 76832 * 16),
        # query 2·8·16·14², key 2·8·16·49, value twice the query, projection 194·49 + 194, rpb 8·(9² + 25²);
        # keys projected 2·8·16·49·194, logits and mixing 2·8·16·14²·194 each
        ("contmix2d OverLoCK-T 8×16@14² K=5,13", 50176 + 12544 + 100352 + 9700 + 5648, 100352, 2433536 + 2 * 9734144),
        # logits 2·14²·6·81, value 2·28²·192
        ("outlook_attention2d VOLO-D1 6×32@28² K=3 s=2", 190512 + 301056, 301056, 190512 * 32),
        # x 2·64·56², weight 64·17², bias 64
        ("depthwise_conv2d OverLoCK-T 64@56² K=17", 401408 + 18496 + 64, 401408, 401408 * 289),
    ],
)
def test_floors_by_hand(name, inputs, output, multiply_adds):
    workload = by_name(2)[name]
    assert workload.floor_bytes(torch.float32) == 4 * (inputs + output)
    assert workload.floor_bytes(torch.bfloat16) == 2 * (inputs + output)
    # Backward: inputs and the output's gradient are read, the inputs' gradients written.
    assert workload.floor_bytes(torch.float32, backward=True) == 4 * (inputs + output + inputs + output + inputs)
    assert workload.operations() == 2 * multiply_adds
    assert workload.operations(backward=True) == 6 * multiply_adds


def test_workloads_of_small_images_are_valid_calls():
    """Their bytes are those of what is drawn and returned."""
    for workload in by_name(2, (32, 64)).values():
        inputs, gradient = workload.draw_inputs(torch.float64, CPU), workload.draw_gradient(torch.float64, CPU)
        with kernels.use_backend("reference"):
            out, *gradients = workload.run(inputs, gradient)
        assert out.shape == workload.output
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
        assert workload.floor_bytes(torch.float64) == 8 * sum(tensor.numel() for tensor in (out, *gradients))


def test_inputs_are_reproducible_and_in_the_models_memory_format():
    workload = by_name()["depthwise_conv2d OverLoCK-T 512@7² K=7"]
    x, again = (workload.draw_inputs(torch.bfloat16, CPU)["x"] for _ in range(2))
    assert torch.equal(x, again)
    assert x.dtype == torch.bfloat16
    value = by_name()["contmix2d OverLoCK-T 16×16@7² K=5,7"].draw_inputs(torch.float32, CPU)["value"]
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in (x, value.flatten(1, 3)))


def test_upcast_is_float32_at_least():
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    up = passes.upcast({"half": half, "pair": (torch.ones(2), torch.ones(2, dtype=torch.float64))})
    assert up["half"].dtype == torch.float32
    assert up["half"].requires_grad
    assert [tensor.dtype for tensor in up["pair"]] == [torch.float32, torch.float64]


def test_image_batch_crops_the_centre_and_normalises():
    photo = Image.new("RGB", (300, 100), (0, 0, 0))
    photo.paste((255, 51, 102), (90, 0, 210, 100))
    images = networks.image_batch(photo, (32, 32), 3, torch.float64, CPU)
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((torch.tensor([1.0, 0.2, 0.4]) - mean) / std).double().view(1, 3, 1, 1)
    assert torch.allclose(images, expected.expand_as(images), atol=1e-5)
    assert networks.image_batch(photo, (64, 32), 1, torch.float32, CPU).shape == (1, 3, 64, 32)


def test_random_models_leave_no_branch_out():
    model, again = (networks.random_model("rednet26", num_classes=3) for _ in range(2))
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert parameter.any(), name
        assert torch.equal(parameter, other), name


@torch.no_grad()
def test_deep_random_models_compute_numbers():
    """With fresh batch norms RedNet-50's activations square themselves from block to block into infinity."""
    images = torch.randn(4, 3, 64, 64)
    model = networks.random_model("rednet50", num_classes=7)
    assert not model.eval()(images).isfinite().all()
    model = networks.settled_model("rednet50", images[:2], num_classes=7)
    assert not model.training
    logits = model(images[2:])
    assert 0.01 < logits.abs().mean() < 100
    assert all(norm.momentum == 0.1 for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d))
