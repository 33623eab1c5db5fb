"""Every notebook runs from top to bottom in a fresh kernel, shows its figures, and leaves the checkout as it was."""

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from autotune import execute, timing
from autotune.notebooks.session import CHECKPOINTS_VARIABLE

nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat")
pytest.importorskip("ipykernel", reason="notebooks need ipykernel")
CellExecutionError = pytest.importorskip("nbclient.exceptions", reason="notebooks need nbclient").CellExecutionError

ROOT = Path(__file__).parents[2]
FIGURES = {  # at least so many
    "00_from_convolution_to_contmix": 4,
    "01_operators": 7,
    "02_roofline": 3,
    "03_models": 2,
    "04_dynamic_kernels": 4,
    "05_autotune": 2,
}
SEVERAL_COLOURS = 20
DEVICE = timing.device_name(timing.best_device())


def _files():
    """Every file that a run could have changed, with its time of modification; tests and caches write elsewhere."""
    folders = [ROOT / name for name in ("autotune", "kernels", "models", "notebooks")]
    paths = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in [*paths, *ROOT.glob("*")] if path.is_file()}


def _outputs(notebook, mime):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[mime] for output in outputs if mime in output.get("data", {})]


def _printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_all_notebooks_are_known():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_notebook(name, tmp_path, monkeypatch):
    copy = tmp_path / f"{name}.ipynb"
    copy.write_bytes((ROOT / "notebooks" / f"{name}.ipynb").read_bytes())
    if name.startswith("04"):
        checkpoint = tmp_path / "weights_of_mine.pth"
        torch.save(models.create_model("rednet26").state_dict(), checkpoint)
        monkeypatch.setenv(CHECKPOINTS_VARIABLE, f"rednet26={checkpoint}")
    before = _files()
    notebook = execute.execute(copy)
    assert _files() == before

    errors = [output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert errors == []
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in _outputs(notebook, "image/png")]
    assert len(pictures) >= FIGURES[name]
    for picture in pictures:
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > SEVERAL_COLOURS
    printed = _printed(notebook)
    if name.startswith("04"):
        assert "rednet26, weights of weights_of_mine.pth" in printed
        assert "volo_d1, random weights" in printed
    if name.startswith("00"):
        table = _outputs(notebook, "text/markdown")[0]
        assert table.count("| equal |") == 6
        assert "differ" not in table
    if name.startswith("05"):
        assert "registers a thread, none spilled" in _outputs(notebook, "text/markdown")[0]
    if name.startswith(("01", "02", "03")):
        assert DEVICE in printed


@pytest.mark.parametrize("name", FIGURES)
def test_committed_outputs(name):
    """Committed with outputs, small, and without a word of the machine's paths."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(_outputs(notebook, "image/png")) >= FIGURES[name]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(cell.metadata for cell in notebook.cells)


def _notebook(path, *sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbformat.write(notebook, path)
    return path


def test_command_writes_tidy_outputs(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    path = _notebook(tmp_path / "notebooks" / "a.ipynb", f"print({str(tmp_path)!r} + '/data')", "2 + 2")
    monkeypatch.setattr(execute.timing, "repository_root", lambda: tmp_path)
    from autotune.__main__ import main

    before = path.read_bytes()
    assert main(["notebooks", "--check"]) == 0
    assert path.read_bytes() == before
    assert main(["notebooks", "a"]) == 0
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].outputs[0].text == "./data\n"
    assert notebook.cells[1].outputs[0].data["text/plain"] == "4"
    assert notebook.metadata["language_info"] == {"name": "python"}

    assert main(["notebooks", "no such notebook"]) == 2
    assert "NAME must match" in " ".join(capsys.readouterr().out.split())


def test_failing_cell_keeps_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    path = _notebook(tmp_path / "notebooks" / "a.ipynb", "raise ValueError('no such map')")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="no such map"):
        execute.execute(path)
    monkeypatch.setattr(execute.timing, "repository_root", lambda: tmp_path)
    from autotune.__main__ import main

    assert main(["notebooks"]) == 1
    assert path.read_bytes() == before
    assert "no such map" in capsys.readouterr().out
