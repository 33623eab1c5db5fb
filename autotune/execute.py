"""Execute the notebooks in this checkout again and write their outputs into them: ``make notebooks``.

Each runs in a fresh kernel of the running interpreter, in a temporary folder, so that nothing but the notebook itself
changes. What is written is free of timestamps and of this machine's paths. A cell that fails stops the command, and its
notebook stays as it was.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape

from autotune import timing
from autotune.arguments import matching, seconds
from kernels.files import atomic_write

__all__ = ["add_arguments", "execute", "run"]


def execute(path: Path, *, timeout: float = 600) -> Any:
    """The notebook with the outputs of a fresh run, as an nbformat node; the file stays as it is.

    Args:
        path: of the notebook; its folder is not the working directory, an empty temporary one is.
        timeout: seconds a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        ImportError: nbclient, nbformat or ipykernel is missing; ``pip install 'dynamic-kernels[notebooks]'`` has them.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from traitlets import default

    class RunningInterpreter(AsyncKernelManager):
        """Finds no kernel but ipykernel's own, which is this interpreter's, whatever else is installed as python3."""

        @default("kernel_spec_manager")
        def _only_native(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

    notebook = nbformat.read(path, as_version=4)
    package_root = str(Path(__file__).parents[1])
    search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            kernel_manager_class=RunningInterpreter,
            timeout=timeout,
            startup_timeout=300,
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # not the warning that a loopback connection is not encrypted
            resources={"metadata": {"path": folder}},
        )
        # IPython keeps its history and profile in the user's home; a run leaves nothing there.
        client.execute(env=os.environ | {"PYTHONPATH": search_path, "IPYTHONDIR": folder})
    return notebook


LARGE_IMAGE = 200_000  # characters of base64; only figures that show photographs have more


def _fewer_colours(png: str) -> str:
    """A large base64 PNG with 256 colours, chosen for it: a third of the size. A small one as it is."""
    if len(png) < LARGE_IMAGE:
        return png
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        # The octree keeps rare colours, such as those of marked points, which a median cut would merge.
        reduced = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.FLOYDSTEINBERG)
    reduced.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _tidy(notebook: Any) -> None:
    """Make outputs fit for a repository: small, and without what differs from run to run or tells of the machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    root = timing.repository_root()
    traces = {str(root): ".", os.path.expanduser("~"): "~"}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                texts, key = output, "text"
            else:
                output.metadata = {}
                texts, key = output.data, "text/plain"
                if "image/png" in output.data:
                    output.data["image/png"] = _fewer_colours(output.data["image/png"])
            for path, shown in traces.items():
                texts[key] = texts[key].replace(path, shown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("notebooks", nargs="*", metavar="NAME", help="part of a notebook's name (default: all)")
    parser.add_argument(
        "--timeout", type=seconds, default=600, metavar="S", help="seconds a cell may take (default: 600)"
    )
    parser.add_argument("--check", action="store_true", help="only execute; write nothing")


def run(arguments: argparse.Namespace) -> int:
    """0: all executed; 1: one failed; 2: bad arguments."""
    console = Console(highlight=False)
    root = timing.repository_root()
    try:
        if root is None:
            raise ValueError("notebooks needs a checkout of the repository: its notebooks are not installed")
        found = sorted((root / "notebooks").glob("*.ipynb"))
        found = matching(found, arguments.notebooks or ["*"], lambda path: path.stem, "NAME")
    except ValueError as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        return 2
    import nbformat
    from nbclient.exceptions import CellExecutionError

    failed = 0
    for path in found:
        start = time.monotonic()
        try:
            notebook = execute(path, timeout=arguments.timeout)
        except CellExecutionError as error:
            failed += 1
            console.print(f"[red]failed[/] {path.name}: {escape(str(error))}")
            continue
        if not arguments.check:
            _tidy(notebook)
            atomic_write(path, nbformat.writes(notebook).rstrip("\n") + "\n")
        console.print(f"{path.name}: {time.monotonic() - start:.0f} s")
    return int(failed > 0)
