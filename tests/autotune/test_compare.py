"""``autotune.compare``, ``sweep``, ``roofline`` and ``%profile``: what they check, what they refuse, what they show."""

import dataclasses
import itertools
import json
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import nn

import autotune
import kernels
from autotune import roofs, sweeps
from models.rednet import Involution2d
from tests.autotune.test_bench import Halved
from tests.support import DEVICE, unchanged

QUICK = {"seconds": 0.01, "min_runs": 2}


@pytest.fixture
def x():
    return torch.randn(1, 16, 8, 8)


@pytest.fixture
def layer():
    return Involution2d(16, 3)


def test_a_layer_on_every_backend_beside_others(layer, x):
    others = {
        "same": lambda x: layer(x) * 1,
        "convolution": nn.Conv2d(16, 16, 3, padding=1),
        "broken": lambda x: x.nope,
    }
    found = autotune.compare(layer, x, against=others, backward=True, backends=["eager", "reference"], **QUICK)
    assert [row["name"] for row in found.timed] == ["eager", "naive", "same"]
    for row in found.timed:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["runs"] >= 2
        assert row["peak_bytes"] >= x.nbytes
        assert 0 <= row["relative_error"] <= found.tolerance
        assert row["speed_up"] == pytest.approx(found.row("naive")["p50_ms"] / row["p50_ms"])
        assert row["of_floor"] == pytest.approx(found.floor_ms / row["p50_ms"])
    assert "relative error" in found.row("convolution")["message"]
    assert "nope" in found.row("broken")["message"]
    # Input, weights and output, read and written as Workload.floor_bytes counts them.
    weights = sum(weight.nbytes for weight in layer.parameters())
    assert found.floor_bytes == 3 * (x.nbytes + weights) + 2 * x.nbytes

    page, text = found._repr_html_(), str(found)
    for shown in ("eager", "naive", "p20 to p80", "speed-up", "peak, MB", "of floor", "convolution was left out"):
        assert shown in page
        assert shown in text
    assert found.machine["device"] in page
    labels = [text.get_text() for text in found.plot().findobj(Text)]
    assert {"eager", "naive", "same"} <= set(labels)
    assert not {"convolution", "broken"} & set(labels)


def test_operations_are_those_of_the_formula(x):
    weight = torch.randn(1, 1, 3, 3, 8, 8)
    found = autotune.compare(kernels.involution2d, x, weight, backends=["eager"], **QUICK)
    assert found.operations == 2 * x.numel() * 9
    assert found.floor_bytes == 2 * x.nbytes + weight.nbytes


def test_wrong_gradients_of_another_are_seen(layer, x):
    x.requires_grad_()
    others = {"halved": lambda x: Halved.apply(layer(x))}
    forward = autotune.compare(layer, x, against=others, backends=["eager"], **QUICK)
    both = autotune.compare(layer, x, against=others, backends=["eager"], backward=True, **QUICK)
    assert forward.row("halved")["status"] == "ok"
    assert "relative error" in both.row("halved")["message"]


def test_others_are_told_apart_and_need_not_compute_the_same(layer, x):
    functions = [nn.ReLU(), nn.ReLU(), nn.ReLU()]
    found = autotune.compare(functions[0], x, against=functions[1:], **QUICK)
    assert [row["name"] for row in found.timed] == ["ReLU", "ReLU (2)", "ReLU (3)"]
    other = nn.Conv2d(16, 16, 3, padding=1)
    found = autotune.compare(layer, x, against=other, same=False, backends=["eager"], **QUICK)
    assert found.row("Conv2d")["relative_error"] is None
    assert "Conv2d (not compared)" in str(found)


def test_half_precision_is_held_against_float32(layer, x):
    found = autotune.compare(layer.bfloat16(), x.bfloat16(), backends=["eager", "reference"], **QUICK)
    assert found.dtype == "bfloat16"
    assert 1e-4 < found.row("naive")["relative_error"] < found.tolerance < 0.1


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_not_ours_is_one_line(x, backward):
    found = autotune.compare(nn.Conv2d(16, 16, 3), x, backward=backward, **QUICK)
    assert [row["name"] for row in found.rows] == [found.baseline] == ["Conv2d"]
    assert found.row("Conv2d")["speed_up"] == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="it stands in for a GPU")
def test_triton_is_a_backend_of_its_own(x, monkeypatch):
    monkeypatch.setattr("autotune.contenders.interpreting", lambda: False)
    weight = torch.randn(1, 1, 3, 3, 8, 8)
    found = autotune.compare(kernels.involution2d, x, weight, seconds=0, min_runs=1, backward=True)
    assert {row["name"]: row["kind"] for row in found.timed} == {"triton": "ours", "eager": "ours", "naive": "naive"}
    # On a CPU the eager depthwise convolution is PyTorch's own, as the definition is.
    found = autotune.compare(kernels.depthwise_conv2d, x, torch.randn(16, 1, 3, 3), seconds=0, min_runs=1)
    assert [row["name"] for row in found.timed] == ["triton", "naive"]


def test_compiling_takes_part_where_it_is_asked_for(x, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    found = autotune.compare(nn.ReLU(), x, compiled=True, **QUICK)
    assert [row["name"] for row in found.timed] == ["ReLU", "compiled"]


def test_the_module_is_afterwards_as_it_was(layer, x):
    model = nn.Sequential(nn.BatchNorm2d(16), nn.Dropout(0.5), layer)
    state = torch.random.get_rng_state()
    with unchanged(model):
        autotune.compare(model, x, backward=True, backends=["eager", "reference"], **QUICK)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": 3}, "function must be a module or another callable, got int"),
        ({"against": "conv"}, "against must be a callable, several, or name -> callable"),
        ({"against": [3]}, "against must be a callable|against must hold callables, got int"),
        ({"against": {"eager": abs}}, "against must not use the name 'eager'"),
        ({"against": {"ReLU": abs}}, "against must not use the name 'ReLU'"),
        ({"backends": "eager"}, "backends must be some of triton, eager, reference, got 'eager'"),
        ({"seconds": -1}, "seconds must be a finite number of at least 0, got -1"),
        ({"min_runs": 0}, "min_runs must be an integer of at least 1, got 0"),
        ({"inputs": ()}, "inputs must hold a tensor"),
        ({"inputs": (torch.ones(1, device="meta"),)}, "inputs and weights must be on one device"),
        ({"inputs": (torch.ones(1, dtype=torch.long),)}, "inputs must hold a tensor of float64"),
        ({"function": lambda x: 3}, "function must return a floating-point tensor"),
        ({"function": lambda x: x.detach(), "backward": True}, "backward needs an input or a weight"),
    ],
)
def test_bad_arguments_are_named(arguments, message, x, monkeypatch):
    monkeypatch.setattr("autotune.contenders.time_and_memory", lambda *_: pytest.fail("it was timed"))
    given = {"function": nn.ReLU(), "inputs": (x,)} | arguments
    function, inputs = given.pop("function"), given.pop("inputs")
    with pytest.raises((TypeError, ValueError), match=message):
        autotune.compare(function, *inputs, **given)


def test_records_leave_as_json_and_as_a_data_frame(x, tmp_path, monkeypatch):
    found = autotune.compare(nn.ReLU(), x, **QUICK)
    assert json.loads(found.to_json(tmp_path / "found.json")) == json.loads((tmp_path / "found.json").read_text())
    assert json.loads(found.to_json())["rows"] == found.rows

    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    assert found.to_pandas() == found.rows
    monkeypatch.setitem(sys.modules, "pandas", None)  # not installed
    with pytest.raises(ImportError, match="to_pandas needs the package pandas"):
        found.to_pandas()


def test_a_sweep_along_any_axis(monkeypatch):
    measured = mock.Mock(wraps=sweeps.measure_operator)
    monkeypatch.setattr(sweeps, "measure_operator", measured)
    found = autotune.sweep("na2d_av", {"size": [5, 7], "kernel_size": [3]}, size=7, kernel_size=3, channels=16, **QUICK)
    assert [(row["axis"], row["size"]) for row in found.rows] == [("size", 5), ("size", 7), ("kernel_size", 7)]
    assert [call.args[0].shape for call in measured.mock_calls] == ["1×16@5² K=3", "1×16@7² K=3"], "each shape once"
    figure = found.plot()
    assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["side of the map, pixels", "kernel size K, pixels"]
    held = [f"{text}, 16 channels, batch 1" for text in ("K = 3", "7²")]
    assert [axis.get_title("left") for axis in figure.axes[:2]] == held
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in figure.axes)
    assert json.loads(found.to_json())["rows"] == found.rows
    for shown in ("size = 5", "kernel_size = 3", "of floor"):
        assert shown in found._repr_html_()
        assert shown in repr(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "nothing"}, "operator must be one of involution2d"),
        ({"over": {}}, "over must map some of size, kernel_size, channels, batch"),
        ({"over": {"heads": [1]}}, "over must map some of size"),
        ({"over": {"size": []}}, "over must have a value for size"),
        ({"over": {"size": 7}}, "over must map some of size, kernel_size, channels, batch to lists of values"),
        ({"over": {"kernel_size": [3, 4]}}, "kernel_size 4 at size 28² does not suit na2d_av"),
        ({"channels": 24}, "channels must be a multiple of 16 for na2d_av, got 24"),
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"backend": "magic"}, "backend must be one of"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_is_measured(arguments, message, monkeypatch):
    monkeypatch.setattr("autotune.sweeps.measure_operator", lambda *_, **__: pytest.fail("it was measured"))
    given = {"operator": "na2d_av", "over": {"kernel_size": [3]}} | arguments
    with pytest.raises(ValueError, match=message):
        autotune.sweep(**given)


def test_anything_goes_under_the_roof(layer, x, monkeypatch):
    threads = []
    ceilings = roofs.Ceilings(1e10, 1e11, 2e10)
    monkeypatch.setattr(roofs, "measure_ceilings", lambda *_: threads.append(torch.get_num_threads()) or ceilings)
    shapes = {"size": 7, "kernel_size": 3, "channels": 16, "device": "cpu"}
    swept = autotune.sweep("involution2d", {"batch": [1, 2]}, **shapes, **QUICK)
    compared = autotune.compare(layer, x, backends=["eager", "reference"], **QUICK)
    figure = autotune.roofline(compared, swept)
    (axis,) = figure.axes
    lines = [np.array(line.get_data()) for line in axis.lines]
    points = {tuple(line[:, 0].tolist()) for line in lines if line.shape == (2, 1)}
    (fastest,) = (row for row in compared.timed if row["kind"] == "ours")
    rate = compared.operations / fastest["p50_ms"] / 1e6
    intensity = compared.operations / compared.floor_bytes
    assert any(point == pytest.approx((intensity, rate)) for point in points)
    assert len(points) == 2 * 3
    with pytest.raises(ValueError, match="what must name some of involution2d"):
        autotune.roofline("nothing")
    with pytest.raises(TypeError, match="what must be results"):
        autotune.roofline(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="what must be of one device, precision and number of threads"):
        autotune.roofline(compared, autotune.compare(nn.ReLU(), x.bfloat16(), **QUICK))
    # The ceilings are measured with the threads that the results had, whatever PyTorch uses by now.
    machine = compared.machine | {"cpu_threads": 3}
    autotune.roofline(dataclasses.replace(compared, machine=machine))
    assert threads == [torch.get_num_threads(), 3]


def test_equal_intensities_are_drawn_side_by_side():
    values = [4.9, 6.5, 4.9, 60.0, 4.9, 4.9]
    drawn = roofs._side_by_side(values)
    assert drawn[3] == pytest.approx(60)
    ordered = sorted(drawn)
    assert min(b / a for a, b in itertools.pairwise(ordered)) >= roofs.APART - 1e-9
    assert sorted(drawn[i] for i in (0, 2, 4, 5)) == [drawn[i] for i in (0, 2, 4, 5)]


def test_profile_magic(layer, x):
    testing = pytest.importorskip("IPython.testing.globalipapp")
    shell = testing.start_ipython() or testing.get_ipython()
    shell.run_line_magic("load_ext", "autotune")
    shell.user_ns |= {"layer": layer, "x": x, "double": lambda x, by: x * by, "conv": nn.Conv2d(16, 16, 3, padding=1)}
    found = shell.run_line_magic("profile", "--seconds=0.01 double(x[:, :4].relu(), by=(1 + 1))")
    assert [row["name"] for row in found.rows] == ["function"]
    assert found.floor_bytes == 2 * x[:, :4].nbytes
    found = shell.run_line_magic("profile", "--backward --different --against=[conv] --seconds=0.01 layer(*[x])")
    assert found.backward
    assert [row["name"] for row in found.timed] == ["eager", "naive", "Conv2d"]
    from IPython.core.error import UsageError

    for line in ("", "layer", "layer(x", "--seconds 1 layer(x)", "--backwards layer(x)"):
        with pytest.raises(UsageError, match="--seconds=VALUE, and not" if line.startswith("--") else "takes a call"):
            shell.run_line_magic("profile", line)
