"""Every notebook runs from top to bottom in a fresh kernel, shows its figures, and leaves the checkout as it was."""

import base64
import importlib.util
import io
import os
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from autotune import timing

nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat")
pytest.importorskip("ipykernel", reason="notebooks need ipykernel")
nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient")
traitlets_config = pytest.importorskip("traitlets.config", reason="notebooks need nbclient")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
FIGURES = {  # the least number per notebook
    "00_from_convolution_to_contmix": 5,
    "01_operators": 8,
    "02_roofline": 3,
    "03_models": 2,
    "04_dynamic_kernels": 4,
    "05_autotune": 2,
    "06_your_own": 3,
}
SEVERAL_COLOURS = 20
# All is run, and nothing often: these runs say nothing about a speed.
FEW_RUNS = """
from autotune import timing
timing.measure = lambda calls, device, measure=timing.measure, **_: measure(calls, device, seconds=0.0, min_runs=2)
timing.ceiling_seconds = lambda parts, device, _, ceiling=timing.ceiling_seconds: ceiling(parts, device, 0.01)
"""


def _files():
    """Every file that a run could have changed, with its time of modification; tests and caches write elsewhere."""
    folders = [ROOT / name for name in ("autotune", "kernels", "models", "notebooks")]
    paths = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in [*paths, *ROOT.glob("*")] if path.is_file()}


def _outputs(notebook, *mimes):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[mime] for output in outputs for mime in mimes if mime in output.get("data", {})]


def _printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_all_notebooks_are_known():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(FIGURES)


@pytest.fixture
def sockets():
    """A folder of a short name: that of a socket has at most 100 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.mark.parametrize("name", FIGURES)
def test_notebook(name, tmp_path, sockets):
    environment = os.environ | {
        "IPYTHONDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if not name.startswith("05"):  # which compiles and measures nothing, and must import Triton itself
        startup = tmp_path / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "few_runs.py").write_text(FEW_RUNS)
    if name.startswith("04"):
        checkpoint = tmp_path / "weights_of_mine.pth"
        torch.save(models.create_model("rednet26").state_dict(), checkpoint)
        environment["DYNAMIC_KERNELS_CHECKPOINTS"] = f"rednet26={checkpoint}"
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    before = _files()
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        startup_timeout=300,
        resources={"metadata": {"path": NOTEBOOKS}},
        extra_arguments=["--log-level=ERROR"],  # not the warning that a loopback connection is not encrypted
        # Two kernels that start at the same time may be given the same port, and wait for ever (jupyter_client#487).
        config=traitlets_config.Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
    )
    client.execute(env=environment)
    assert _files() == before

    pictures = [Image.open(io.BytesIO(base64.b64decode(d))) for d in _outputs(notebook, "image/png", "image/jpeg")]
    assert len(pictures) >= FIGURES[name]
    for picture in pictures:
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > SEVERAL_COLOURS
    printed, tables = _printed(notebook), _outputs(notebook, "text/html")
    if name.startswith("00"):
        assert tables[0].count("<td>equal</td>") == 6
        assert "differ" not in tables[0]
    if name.startswith(("01", "02", "03", "06")):
        assert timing.device_name(timing.best_device()) in printed
    if name.startswith("04"):
        assert "rednet26, weights of weights_of_mine.pth" in printed
        assert "volo_d1, random weights" in printed
    if name.startswith("05"):
        assert "registers per thread, no bytes spilled" in tables[0]
    if name.startswith("06"):
        widgets = _outputs(notebook, "application/vnd.jupyter.widget-view+json")
        assert len(widgets) == (importlib.util.find_spec("ipywidgets") is not None)
        assert ("pip install ipywidgets" in printed) == (not widgets)
        assert ["Conv2d (not compared)" in table for table in tables] == [False, True]


@pytest.mark.parametrize("name", FIGURES)
def test_committed_outputs(name):
    """Committed with outputs, small, and without a word of the machine's paths, warnings or times."""
    path = NOTEBOOKS / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(_outputs(notebook, "image/png", "image/jpeg")) >= FIGURES[name]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(cell.metadata for cell in notebook.cells)
    assert not any(output.get("name") == "stderr" for cell in notebook.cells for output in cell.get("outputs", ()))
