"""What the notebooks draw is right: kernels taken from models and put in their place, and committed results."""

import ast
import functools
import json
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kernels
from autotune import roofs
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


@pytest.mark.parametrize("position", [(0, 0), (4, 5), (8, 9)])
def test_a_kernel_at_its_place_gives_the_output_there(position, cells):
    """What is drawn: of a channel of each group or head, the sum of kernel times features is the output."""
    row, column = position
    call = _call(cells, Involution2d(32, 7), random_tensor(2, 32, 9, 10))
    kernel = cells.kernel_at(call, "x", lambda out: out[:, ::16, row, column])[::16]
    x, out = call.arguments["x"][0, ::16].cpu(), call.output[0, ::16, row, column].cpu()
    assert relative_error((kernel * x).sum((-2, -1)), out) < 1e-5
    assert (kernel != 0).sum() == 2 * (min(row, 3) + 1 + min(8 - row, 3)) * (min(column, 3) + 1 + min(9 - column, 3))

    call = _call(cells, OutlookAttention(32, 2), random_tensor(2, 9, 10, 32))
    kernel = cells.kernel_at(call, "value", lambda out: out[:, row, column, ::16])[..., ::16]
    value, out = call.arguments["value"][0, ..., ::16].cpu(), call.output[0, row, column, ::16].cpu()
    assert relative_error((kernel * value).sum((0, 1)), out) < 1e-5

    call = _call(cells, ContMix(32, 8, 7, 4), random_tensor(2, 32, 9, 10), random_tensor(2, 40, 9, 10))
    kernel = cells.kernel_at(call, "value", lambda out: out[:, :, :, 0, row, column])[:, :, 0]
    value, out = call.arguments["value"][0, :, :, 0].cpu(), call.output[0, :, :, 0, row, column].cpu()
    assert relative_error((kernel * value).sum((-2, -1)), out) < 1e-5
    assert (kernel != 0).sum((-2, -1)).tolist() == [[25] * 4, [49] * 4], "clamped windows have all their positions"
    torch.testing.assert_close(kernel.sum((-2, -1)), torch.ones(2, 4))


def test_recording_puts_the_operators_back(cells):
    originals = [getattr(kernels, name) for name in kernels.__all__]
    with pytest.raises(ValueError, match="x must have shape"), cells.recorded() as calls:
        kernels.involution2d(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3, 3, 2, 3))
    assert [getattr(kernels, name) for name in kernels.__all__] == originals
    assert calls == []


@pytest.mark.parametrize("reach", [None, 2])
def test_marks_stand_in_the_entry_whose_kernel_is_drawn(reach, cells):
    pixels, size = np.full((56, 56, 3), 0.5, dtype=np.float32), (7, 7)
    places = cells.positions(size)
    maps = [np.eye(*size) for _ in places]
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
