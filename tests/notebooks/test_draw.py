"""What the notebooks draw is right: kernels taken from models and put in their place, and committed results."""

import ast
import functools
import json
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kernels
from autotune import roofs
from kernels.windows import Window
from models.layers import ContMix
from models.rednet import Involution2d
from models.volo import OutlookAttention
from tests.notebooks.test_notebooks import NOTEBOOKS, nbformat
from tests.support import random_tensor, relative_error

pytest.importorskip("IPython", reason="notebooks need IPython")
from notebooks import draw


@functools.cache
def defined(notebook: str) -> types.SimpleNamespace:
    """The functions and the constants in capitals that the cells of a notebook define."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code").replace("%matplotlib inline", "")

    def kept(node: ast.stmt) -> bool:
        constant = isinstance(node, ast.Assign) and all(ast.unparse(name).isupper() for name in node.targets)
        return constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))

    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(NOTEBOOKS)  # a notebook's kernel runs in its folder
        exec(compile(ast.Module([*filter(kept, ast.parse(code).body)], []), notebook, "exec"), names)
    return types.SimpleNamespace(**names)


@pytest.fixture
def cells():
    """What notebook 04 defines."""
    return defined("04_dynamic_kernels")


def _call(cells, module, *inputs):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad(), cells.recorded() as calls:
        module.eval()(*inputs)
    (call,) = calls
    return call


def test_contmix_kernels_are_those_that_mix(cells):
    call = _call(cells, ContMix(32, 8, 13, 4), random_tensor(2, 32, 15, 16), random_tensor(2, 40, 15, 16))
    affinity, weights = cells.contmix_kernels(call)
    assert affinity.shape == (2, 4, 15, 16, 49)
    assert [weight.shape for weight in weights] == [(2, 4, 15, 16, 5, 5), (2, 4, 15, 16, 13, 13)]
    value = call.arguments["value"]
    for index, weight in enumerate(weights):
        assert weight.std((-2, -1)).min() > 0
        mixed = kernels.reference.na2d_av(weight.flatten(-2), value[:, index].movedim(2, -1), weight.shape[-1])
        assert relative_error(call.output[:, index], mixed.movedim(-1, 2)) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_involution_kernels_are_those_that_mix(stride, cells):
    call = _call(cells, Involution2d(32, 7, stride), random_tensor(2, 32, 12, 11))
    assert call.operator == "involution2d_generate"
    weight = cells.involution_kernels(call)
    assert weight.shape == (2, 2, 7, 7, math.ceil(12 / stride), math.ceil(11 / stride))
    expected = kernels.reference.involution2d(call.arguments["x"], weight, stride=stride)
    assert relative_error(call.output, expected) < 1e-5
    with cells.recorded() as given:
        kernels.involution2d(call.arguments["x"], weight, stride=stride)
    assert cells.involution_kernels(given[0]) is weight


@pytest.mark.parametrize(("position", "count"), [((4, 4), 1), ((4, 5), 2), ((5, 3), 4), ((0, 0), 1), ((8, 9), 1)])
def test_outlook_kernel_is_what_the_token_takes(position, count, cells):
    call = _call(cells, OutlookAttention(32, 2), random_tensor(2, 9, 10, 32))
    kernel, windows = cells.outlook_kernel(call, *position)
    value = call.arguments["value"].unflatten(-1, (2, 16))
    taken = torch.einsum("bhij,bijhc->bhc", kernel, value).flatten(1)
    assert relative_error(taken, call.output[:, position[0], position[1]]) < 1e-5
    assert windows == count
    assert (kernel.sum((-2, -1)) <= windows + 1e-5).all()


def test_recording_puts_the_operators_back(cells):
    originals = [getattr(kernels, name) for name in kernels.__all__]
    with pytest.raises(ValueError, match="x must have shape"), cells.recorded() as calls:
        kernels.involution2d(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3, 3, 2, 3))
    assert [getattr(kernels, name) for name in kernels.__all__] == originals
    assert calls == []


def test_clamped_windows_slide_inward_and_padded_ones_are_cut(cells):
    kernel = torch.arange(9.0).view(3, 3)
    clamped = cells.in_place(kernel, Window.neighborhood((3, 3)), (0, 4), (5, 5))
    np.testing.assert_array_equal(clamped[:3, 2:], kernel.numpy())
    assert np.ma.count(clamped) == 9
    padded = cells.in_place(kernel, Window((3, 3), padding=(1, 1)), (0, 4), (5, 5))
    np.testing.assert_array_equal(padded[:2, 3:], kernel[1:, :2].numpy())
    assert np.ma.count(padded) == 4
    assert not padded.data[padded.mask].any()  # matplotlib multiplies masked numbers, too, and warns of large ones


@pytest.mark.parametrize("reach", [None, 2])
def test_marks_stand_in_the_entry_whose_kernel_is_drawn(reach, cells):
    pixels, size = np.full((56, 56, 3), 0.5, dtype=np.float32), (7, 7)
    places = cells.positions(size)
    maps = [cells.in_place(torch.ones(1, 1), Window((1, 1)), place, size) for place in places]
    figure = cells.points_figure(pixels, size, [("one", maps, "weight")], "title", "note", reach=reach)
    panels = [axis for axis in figure.axes if axis.images][: 2 * len(places)]
    assert len(panels) == 2 * len(places)
    for index, axis in enumerate(panels):
        right, down = np.asarray(axis.lines[0].get_xydata())[0]
        assert (int(down * 7 / 56), int(right * 7 / 56)) == places[index // 2]
    if reach is not None:
        left, right = panels[1].get_xlim()
        assert right - left == pytest.approx(5 * 8)


def _record(kind, rows, **facts):
    machine = {"device_type": kind, "device": "NVIDIA H200", "date": "2030-01-02T03:04:05"}
    return {"machine": machine, "settings": {"dtype": "bfloat16"}, "rows": rows, **facts}


def test_committed_results_of_gpus(tmp_path):
    for folder, kind in (("cpu_X", "cpu"), ("NVIDIA_H200", "cuda")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "bench.json").write_text(json.dumps(_record(kind, [])))
    assert draw.committed("bench.json", tmp_path) == [_record("cuda", [])]
    assert draw.committed("models.json", tmp_path) == draw.committed("bench.json", tmp_path / "none") == []


def test_rows_of_a_bench_under_the_roof():
    row = {"operator": "involution2d", "model": "RedNet-50", "shape": "64@56² K=7"}
    row |= {"floor": {"bytes": 4_000_000, "operations": 8_000_000}, "contenders": {"ours": {"p50_ms": 2.0}}}
    both = {"ours": {"p50_ms": 0.5}, "naive": {"p50_ms": 16.0}, "compiled": {"p50_ms": 4.0}}
    measured = [roofs.from_row(row | changes) for changes in ({}, {"contenders": both}, {"graph": both})]
    fast = {"ours": 0.0005, "naive": 0.016}  # the time of the graph where a call was captured
    assert [entry.seconds for entry in measured] == [{"ours": 0.002}, fast, fast]
    assert [entry.intensity for entry in measured] == [2, 2, 2]
    assert roofs.Ceilings(4e9, 8e11).balance == 200
    roof = roofs.roofline_figure(measured, roofs.Ceilings(4e9, 1e9), "NVIDIA H200")
    assert "NVIDIA H200" in roof.get_supxlabel()
    assert roof.axes[0].get_ylim()[1] > 16  # 10⁹ operations/s, above the roof


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "threads"),
    [(32, 0, 4, 2048), (64, 0, 1, 1024), (255, 0, 8, 256), (16, 100 * 1024, 4, 256), (33, 0, 4, 1536)],
)
def test_resident_threads(registers, shared, warps, threads):
    assert defined("05_autotune").resident_threads(registers, shared, warps) == threads
