"""What the notebooks show is right: counts, receptive fields, kernels taken from models, waste and occupancy."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import kernels
import models
from autotune import workloads
from autotune.notebooks import (
    breakdown,
    complexity,
    equivariance,
    kernels_view,
    landscape,
    receptive_field,
    recording,
    roofline,
    session,
    subject,
    sweeps,
)
from kernels.tuning import choose
from kernels.tuning.store import Store, user_folder
from kernels.windows import Window
from models.layers import ContMix
from models.rednet import Involution2d
from models.volo import OutlookAttention
from tests.support import random_tensor, relative_error

ON_CPU = session.Session(torch.device("cpu"), torch.float32, full=False)


@pytest.mark.parametrize("layer", complexity.LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize(("channels", "side"), [(192, 28), (64, 14)])
def test_counts_equal_closed_formulas(layer, channels, side):
    expected = layer.parameters(channels), layer.multiply_adds(channels, side**2)
    assert complexity.count(layer, channels, side) == expected


def test_effective_receptive_field_of_a_known_model():
    class Blur(nn.Module):
        """One 5×5 mean: the centre of its map sees 25 pixels, all the same."""

        def forward_intermediates(self, x, indices, intermediates_only):
            return [nn.functional.conv2d(x, torch.full((1, 3, 5, 5), 0.04), padding=2)]

    field = receptive_field.effective_receptive_field(Blur(), torch.rand(2, 3, 21, 21))
    expected = torch.zeros(21, 21)
    expected[8:13, 8:13] = 1 / 25
    torch.testing.assert_close(field, expected)
    assert receptive_field.centre_of(field) == (10, 10)
    assert [receptive_field.side_of_share(field, share) for share in (0.02, 0.3, 0.5, 1.0)] == [1, 3, 5, 5]


def test_effective_receptive_field_of_a_model_is_normalised():
    model = session.load("rednet26").module
    field = receptive_field.effective_receptive_field(model, receptive_field.photographs(2, 64))
    assert field.shape == (64, 64)
    assert field.min() >= 0
    assert field.sum().item() == pytest.approx(1, abs=1e-5)
    assert receptive_field.side_of_share(field, 0.5) < receptive_field.side_of_share(field, 0.9)


def _calls(module, *inputs):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad(), recording.recorded_calls() as calls:
        module.eval()(*inputs)
    (call,) = calls
    return call


def test_contmix_kernels_are_those_that_mix():
    call = _calls(ContMix(32, 8, 13, 4), random_tensor(2, 32, 15, 16), random_tensor(2, 40, 15, 16))
    small, large = recording.contmix_kernels(call)
    assert small.shape == (2, 4, 15, 16, 5, 5)
    assert large.shape == (2, 4, 15, 16, 13, 13)
    for kernel in (small, large):
        torch.testing.assert_close(kernel.sum((-2, -1)), torch.ones(2, 4, 15, 16), atol=1e-5, rtol=0)
        assert kernel.std((-2, -1)).min() > 0
    assert recording.contmix_error(call) < 1e-5
    assert recording.contmix_affinity(call).shape == (2, 4, 15, 16, 7, 7)


@pytest.mark.parametrize("stride", [1, 2])
def test_involution_kernels_are_those_that_mix(stride):
    call = _calls(Involution2d(32, 7, stride), random_tensor(2, 32, 12, 11))
    weight = recording.involution_kernels(call)
    assert weight.shape == (2, 2, 7, 7, math.ceil(12 / stride), math.ceil(11 / stride))
    expected = kernels.reference.involution2d(call.arguments["x"], weight, stride=stride)
    assert relative_error(call.output, expected) < 1e-5


def test_generated_involution_kernels_are_those_that_mix():
    x, features = random_tensor(2, 32, 9, 9), random_tensor(2, 8, 9, 9)
    with recording.recorded_calls() as calls:
        out = kernels.involution2d_generate(
            x, features, random_tensor(98, 8), random_tensor(98), kernel_size=7, groups=2
        )
    expected = kernels.reference.involution2d(x, recording.involution_kernels(calls[0]))
    assert relative_error(out, expected) < 1e-5
    assert recording.involution_window(calls[0]) == Window((7, 7), padding=(3, 3))


@pytest.mark.parametrize(("position", "windows"), [((4, 4), 1), ((4, 5), 2), ((5, 3), 4), ((0, 0), 1), ((8, 9), 1)])
def test_outlook_kernel_is_what_the_token_takes(position, windows):
    module = OutlookAttention(32, 2)
    call = _calls(module, random_tensor(2, 9, 10, 32))
    kernel = recording.outlook_kernel(call, *position)
    value = call.arguments["value"].unflatten(-1, (2, 16))
    taken = torch.einsum("bhij,bijhc->bhc", kernel, value).flatten(1)
    assert relative_error(taken, call.output[:, position[0], position[1]]) < 1e-5
    assert len(recording.covering_windows(call, *position)) == windows
    assert (kernel.sum((-2, -1)) <= windows + 1e-5).all()


def test_recording_puts_the_operators_back():
    originals = [getattr(kernels, name) for name in recording.OPERATORS]
    with pytest.raises(ValueError, match="x must have shape"), recording.recorded_calls() as calls:
        kernels.involution2d(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3, 3, 2, 3))
    assert [getattr(kernels, name) for name in recording.OPERATORS] == originals
    assert calls == []


def test_place_slides_clamped_windows_inward_and_cuts_padded_ones():
    kernel = torch.arange(9.0).view(3, 3)
    clamped = kernels_view.place(kernel, Window.neighborhood((3, 3)), (0, 4), (5, 5))
    np.testing.assert_array_equal(clamped[:3, 2:], kernel.numpy())
    assert np.ma.count(clamped) == 9
    padded = kernels_view.place(kernel, Window((3, 3), padding=(1, 1)), (0, 4), (5, 5))
    np.testing.assert_array_equal(padded[:2, 3:], kernel[1:, :2].numpy())
    assert np.ma.count(padded) == 4


def test_convolution_ignores_place_and_involution_channel():
    wide, weight, span = torch.randn(1, 3, 40, 40), torch.randn(3, 1, 7, 7), torch.randn(49, 3)

    def generate(x):
        return torch.einsum("kc,bchw->bkhw", span, x).unflatten(1, (1, 7, 7))

    held = generate(wide[..., :32, :32])
    found = {
        name: equivariance.check_invariance(layer, wide, offset=8, margin=4)
        for name, layer in {
            "convolution": lambda x: kernels.depthwise_conv2d(x, weight),
            "held": lambda x: kernels.involution2d(x, held),
            "generated": lambda x: kernels.involution2d(x, generate(x)),
        }.items()
    }
    unchanged = {name: (f.shift.max().item() < 1e-4, f.swap.max().item() < 1e-4) for name, f in found.items()}
    assert unchanged == {"convolution": (True, False), "held": (False, True), "generated": (True, False)}


def test_sources_of_kernels():
    tokens = random_tensor(1, 64, 14, 14)
    sources = equivariance.kernel_sources(tokens, (5, 8))
    where = {name: source.nonzero().tolist() for name, source in sources.items()}
    assert where["convolution"] == []
    assert where["involution"] == [[5, 8]]
    assert where["outlook attention"] == [[4, 8], [4, 9], [5, 8], [5, 9]]
    assert len(where["ContMix"]) == len(where["self-attention"]) == 14 * 14
    # 7×7 regions of 2×2 tokens: within one that does not hold the position, all count the same.
    region = sources["ContMix"][:2, :2]
    torch.testing.assert_close(region, region[0, 0].expand(2, 2))


def test_sweep(monkeypatch):
    values = {"size": (6, 8), "kernel_size": (3, 5), "channels": (16, 32), "batch": (1, 2)}
    operator = sweeps.OPERATORS["involution2d"]
    small = sweeps.Operator(sweeps.Shape(8, 3, 16, 1), values, operator.full_base, operator.full_values)
    monkeypatch.setitem(sweeps.OPERATORS, "involution2d", small)
    found = sweeps.sweep("involution2d", ON_CPU, seconds=0.001, min_runs=1)
    assert {axis: [getattr(point.shape, axis) for point in points] for axis, points in found.items()} == {
        axis: list(numbers) for axis, numbers in values.items()
    }
    base = found["size"][1]
    assert base is found["batch"][0]  # measured once
    assert base.pixels == 64
    assert base.output_bytes == 64 * 16 * 4
    assert min(base.ours_seconds, base.naive_seconds, base.floor_seconds) > 0
    # The naive path unfolds x to nine times its size, and multiplies.
    assert base.naive_bytes is not None
    assert base.naive_bytes >= 2 * 9 * base.output_bytes
    figure = sweeps.sweep_figure("involution2d", found, ON_CPU)
    assert len(figure.axes) == 8
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in figure.axes)
    assert [axis.get_xlabel() for axis in figure.axes[4:]] == list(sweeps.AXES.values())
    assert ON_CPU.device_name in figure.get_supxlabel()
    speed_ups = [p.naive_seconds / p.ours_seconds for points in found.values() for p in points]
    assert f"{sweeps.number(max(speed_ups))}×" in repr(sweeps.summary({"involution2d": found}))


def test_unfused_chain_is_contmix():
    workload = workloads.contmix("", 2, 2, 4, (7, 8), (3, 5))
    inputs = workload.draw_inputs(torch.float64, torch.device("cpu"))
    chain = roofline.contmix_chain(**inputs, kernel_sizes=(3, 5))
    assert relative_error(chain, workload.forward(inputs)[0]) < 1e-12


def _committed(kind, rows, **facts):
    machine = {"device_type": kind, "device": "NVIDIA H200", "date": "2030-01-02T03:04:05"}
    return {"machine": machine, "settings": {"dtype": "bfloat16"}, "rows": rows, **facts}


def test_committed_gpu_records(tmp_path):
    for folder, kind in (("cpu_X", "cpu"), ("NVIDIA_H200", "cuda")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "bench.json").write_text(json.dumps(_committed(kind, [])))
    assert session.committed_gpu_records("bench.json", tmp_path) == [_committed("cuda", [])]
    assert session.committed_gpu_records("models.json", tmp_path) == []
    assert session.committed_gpu_records("bench.json", tmp_path / "none") == []


def test_figures_of_a_committed_bench():
    row = {"status": "ok", "operator": "involution2d", "model": "RedNet-50", "shape": "64@56² K=7", "batch": 128}
    row |= {"pass": "forward", "floor": {"bytes": 4_000_000, "operations": 8_000_000}}
    contenders = {"ours": {"p50_ms": 2.0}, "naive": {"p50_ms": 20.0}, "compiled": {"p50_ms": 4.0}}
    rows = [
        row | {"contenders": contenders},
        row | {"contenders": {"ours": {"p50_ms": 1.0}}},  # the naive path did not fit
        row | {"pass": "forward+backward"},
        row | {"status": "failed"},
        row | {"batch": 2},
    ]
    ceilings = {"copy_bytes_per_second": 4e9, "bf16_operations_per_second": 8e11}
    record = _committed("cuda", rows, ceilings=ceilings)
    measured, found = roofline.from_record(record)
    assert [entry.seconds for entry in measured] == [{"ours": 0.002, "naive": 0.02}, {"ours": 0.001}]
    assert [entry.intensity for entry in measured] == [2, 2]
    assert found.balance == 200
    roof, achieved = roofline.committed_figures(record)
    assert "NVIDIA H200 · bfloat16 · 2030-01-02" in roof.get_supxlabel()
    assert [text.get_text() for text in achieved.axes[0].texts] == ["50%", "100%"]  # 2 and 4 of 4 GB/s
    assert roofline.committed_figures(record | {"rows": []}) == []


def test_figure_of_committed_models():
    timed = {"p50_ms": 64.0, "peak_bytes": 10**9}
    row = {"status": "ok", "model": "rednet50", "peer": "torchvision resnet50", "batch": 128, "pass": "inference"}
    rows = [row | {"contenders": dict.fromkeys(("ours", "naive", "compiled", "peer", "peer_compiled"), timed)}]
    record = _committed("cuda", [*rows, row | {"pass": "training"}, row | {"status": "failed"}])
    measured = breakdown.from_record(record)
    assert [(entry.model, entry.contender, entry.images_per_second) for entry in measured] == [
        ("rednet50", "ours", 2000),
        ("rednet50", "naive", 2000),
        ("torchvision resnet50", "peer", 2000),
    ]
    figure = breakdown.committed_figure(record)
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["rednet50", "torchvision resnet50"]
    assert figure.get_supxlabel() == f"batch 128 · {session.record_label(record)}"
    assert "NVIDIA H200" in figure.get_supxlabel()
    assert breakdown.committed_figure(record | {"rows": []}) is None


@pytest.mark.parametrize(
    ("name", "ancestors", "expected"),
    [
        ("aten::mul", ("kernels.involution2d",), "dynamic kernels"),
        ("kernels.depthwise_conv2d", (), "large depthwise"),
        ("aten::mkldnn_convolution", ("aten::conv2d",), "other convolutions, matrix products"),
        ("aten::_scaled_dot_product_attention_math", (), "other convolutions, matrix products"),
        ("aten::native_layer_norm", (), "normalisation"),
        ("aten::copy_", ("aten::contiguous",), "copies, layout"),
        ("aten::gelu", (), "element-wise, pooling, rest"),
    ],
)
def test_category_of_an_operation(name, ancestors, expected):
    assert breakdown.category_of(name, ancestors) == expected


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_breakdown_tells_both_paths_apart_alike(backend):
    originals = [getattr(kernels, name) for name in kernels.__all__]
    model = session.load("rednet26").module
    parts = breakdown.breakdown(model, "RedNet-26", torch.randn(1, 3, 64, 64), backend, runs=1)
    assert set(parts.milliseconds) == set(breakdown.CATEGORIES)
    assert parts.milliseconds["dynamic kernels"] > 0
    assert parts.milliseconds["other convolutions, matrix products"] > 0
    assert parts.milliseconds["large depthwise"] == 0
    assert parts.total == pytest.approx(sum(parts.milliseconds.values()))
    assert [getattr(kernels, name) for name in kernels.__all__] == originals


def test_tile_waste():
    assert landscape.tile_waste(28, 7) == 0
    assert landscape.tile_waste(14, 8) == pytest.approx(1 / 8)
    assert landscape.tile_waste(7, 4) == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "threads"),
    [
        (32, 0, 4, 2048),
        (64, 0, 4, 1024),
        (64, 0, 1, 1024),
        (255, 0, 8, 256),
        (16, 100 * 1024, 4, 256),
        (33, 0, 4, 1536),
    ],
)
def test_resident_threads(registers, shared, warps, threads):
    assert landscape.resident_threads(subject.Known(registers, 0, shared), warps) == threads


def test_survey_and_stored_times(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(tmp_path))
    choose.forget()
    tunable, problem = subject.subject()
    found = landscape.survey_in_processes("Some GPU", architecture=None, processes=1)
    assert found.source == "heuristic"
    assert found.candidates[0].chosen
    assert all(c.config in tunable.configs and c.config.valid(problem) for c in found.candidates)
    assert [c.chosen for c in found.candidates].count(True) == 1

    slowest = found.candidates[-1].config
    entry = {
        "config": dataclasses.asdict(slowest),
        "triton": choose.triton_version(),
        "source": tunable.source,
        "milliseconds": 0.25,
        "heuristic_milliseconds": 0.5,
    }
    Store(user_folder(), "Some GPU").update({found.key: entry})
    tuned = landscape.survey_in_processes("Some GPU", architecture=None, processes=2)
    assert tuned.source == "store"
    assert [c.config for c in tuned.candidates if c.chosen] == [slowest]
    assert {c.config for c in tuned.candidates} == {c.config for c in found.candidates}
    assert landscape.stored_times()["Some_GPU"] == (entry["config"], 0.25, 0.5)
    text = repr(landscape.reasons(tuned))
    assert "in the user's store" in text
    assert "0.250 ms" in text
    choose.forget()


def test_checkpoints_from_the_environment(monkeypatch):
    defaults = {"rednet26": None, "volo_d1": None}
    assert session.chosen_checkpoints(defaults) == defaults
    monkeypatch.setenv(session.CHECKPOINTS_VARIABLE, "rednet50=/data/a.pth, overlock_t_reparam=/data/b.pth")
    assert session.chosen_checkpoints(defaults) == {
        "volo_d1": None,
        "rednet50": "/data/a.pth",
        "overlock_t_reparam": "/data/b.pth",
    }
    monkeypatch.setenv(session.CHECKPOINTS_VARIABLE, "/data/a.pth")
    with pytest.raises(ValueError, match="must read NAME=FILE"):
        session.chosen_checkpoints(defaults)


def test_a_checkpoint_is_loaded_and_named(tmp_path):
    torch.manual_seed(1)
    original = models.create_model("rednet26")
    torch.save(original.state_dict(), tmp_path / "mine.pth")
    loaded = session.load("rednet26", str(tmp_path / "mine.pth"))
    assert loaded.title == "rednet26, weights of mine.pth"
    assert all(torch.equal(loaded.module.state_dict()[name], tensor) for name, tensor in original.state_dict().items())
    assert session.load("rednet26").title == "rednet26, random weights"


def test_table_aligns_numbers_to_the_right():
    text = repr(session.Table(("name", "size"), [("a", "1.5"), ("b", "–")], "in MB"))
    assert text.splitlines()[:3] == ["| name | size |", "| --- | ---: |", "| a | 1.5 |"]
    assert text.endswith("in MB")
