"""A GPU's folder of notebooks/results.

It holds what ``make gpu`` leaves, kernels.json (the time of every kernel by itself, written by predicted/measure.py),
units.json (beside these times, how long the emulator found each unit busy with the same code) and ncu.json (counters of
Nsight Compute, and the host's time of that run); each may be missing.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from autotune.passes import PASSES
from autotune.results import Row

# Names of cases in kernels.json and in the predictions, by operator, where they are not the operator's own.
CASES = {
    "involution2d": "involution.{}.last",
    "involution2d_generate": "generate.{}.last",
    "na2d_av": "av.{}",
    "na2d_qk": "qk.{}",
    "na2d_softmax_av": "softmax_av.{}",
    "contmix2d": "contmix.{}",
    "outlook_attention2d": "outlook.{}",
    "depthwise_conv2d": "depthwise.{}.last",
}


class Folder:
    """The content of a GPU's folder, with the times of kernels by case and pass, in microseconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment, self.tests = self.load("environment.json"), self.load("tests.json")
        self.operators, self.models = (self.load(name).get("rows", []) for name in ("bench.json", "models.json"))
        # They were measured in turns, so that none is left out, and are read one operator after the other.
        order = list(dict.fromkeys(row["operator"] for row in self.operators))
        self.operators.sort(key=lambda row: (-row.get("batch", 0), order.index(row["operator"])))
        self.kernels = self.load("kernels.json")
        timed = [row for row in self.kernels.get("rows", []) if "kernels" in row]
        self.launched = {(row["case"], row["pass"]): row["kernels"] for row in timed}
        self._predicted = {(row["case"], row["pass"]): row.get("predicted_microseconds") for row in timed}
        measured = {row["operator"] for row in self.timed()}
        every = dict.fromkeys(row["operator"] for row in self.operators)
        self.unreached = listed([f"`{name}`" for name in every if name not in measured])

    def load(self, name: str) -> Row:
        """A file's content, empty where it is missing."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def test_runs(self) -> list[Row]:
        """What came of the tests, at one or several states of the code."""
        return self.tests.get("runs", [self.tests] if self.tests else [])

    def timed(self, kind: str | None = None) -> list[Row]:
        return [row for row in self.operators if row["status"] == "ok" and kind in (None, row["pass"])]

    def microseconds(self, case: str, kind: str, *, own: bool = False) -> float | None:
        """Sum of what a case launches in a pass; ``own``: of this project's kernels alone."""
        if kind == PASSES[1]:
            parts = [self.microseconds(case, name, own=own) for name in ("forward", "backward")]
            return None if None in parts else math.fsum(part for part in parts if part is not None)
        if (case, kind) not in self.launched:
            return None
        return math.fsum(k["microseconds"] for k in self.launched[case, kind] if not own or _is_ours(k["kernel"]))

    def predicted(self, case: str, kind: str) -> float | None:
        """What the emulator made of the code that was measured, where it was asked: that of today may differ."""
        return self._predicted.get((case, kind))

    def beside(self, row: Row) -> float | None:
        """The sum of the kernels of a row of bench.json, where kernels.json has its shape."""
        return self.microseconds(case_of(row["operator"], row["shape"]), row["pass"]) if row["batch"] == 128 else None


def case_of(operator: str, shape: str) -> str:
    """The name of a workload's case, by the size of its map: involution.56.last, contmix.50x80."""
    return CASES.get(operator, f"{operator}.{{}}").format(
        shape.partition("@")[2].split()[0].rstrip("²").replace("×", "x")
    )


def _is_ours(kernel: str) -> bool:
    """Triton's kernels have plain names; those of PyTorch and of its libraries are C++ or name their machine code."""
    return re.fullmatch(r"\w+_kernel", kernel) is not None and not re.search("cutlass|nvjet|xmma", kernel)


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def folders(parent: Path) -> list[Folder]:
    """The folders of the GPUs that were measured."""
    found = [Folder(path.parent) for path in sorted(parent.glob("*/environment.json"))]
    return [folder for folder in found if folder.environment["machine"]["device_type"] == "cuda"]
