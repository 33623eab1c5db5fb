"""Write what the emulator predicts for the public operators to a file beside this one, named after the Triton at hand.

    python -m notebooks.results.predicted.collect FOLDER_OF_THE_EMULATOR [CASE ...]

from the repository's root; the folder holds ``predict.py``. Cases that begin with a name replace those of the file, the
others stay. Takes minutes. Times are sums over a case's launches, in microseconds.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from autotune.workloads import Workload
from notebooks.results.predicted.measure import parts


def _case(workload: Workload) -> tuple[Any, list[Any], dict[str, Any]]:
    """Function, tensors and options, as the emulator's own cases give them."""
    return workload.function, [*workload.draw_inputs(torch.bfloat16, torch.device("cpu")).values()], {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER_OF_THE_EMULATOR")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    given = parser.parse_args()
    sys.path.insert(0, given.folder)
    import predict  # pyright: ignore[reportMissingImports]

    others = parts()
    predict.CASES.update({name: (_case, [workload]) for name, workload in others.items()})
    path = Path(__file__).with_name(f"triton_{triton.__version__}.json")
    rows = {(row["case"], row["pass"]): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    order = [name for name in predict.CASES if not given.cases or name.startswith(tuple(given.cases))]
    for name, kind in itertools.product(order, ("forward", "backward")):
        if kind == "backward" and name in others and not others[name].trained:
            continue
        launches = predict.run_case(predict.CASES[name], backward=kind == "backward")
        found = [predict.predict(launch) for launch in launches]
        if not found:
            continue
        longest = max(found, key=lambda launch: launch["predicted"])
        rows[name, kind] = {
            "case": name,
            "pass": kind,
            "launches": len(found),
            "floor_microseconds": round(sum(launch["floor"] for launch in found), 2),
            "microseconds": round(sum(launch["predicted"] for launch in found), 2),
            "bound_by": f"{longest['kernel']}: {longest['bound']}",
            "spilled_bytes": sum(launch["spilled"] for launch in found),
        }
        print(rows[name, kind], flush=True)
        cases = list(predict.CASES)
        ordered = sorted(rows.values(), key=lambda row: (cases.index(row["case"]), row["pass"] == "backward"))
        record = {"triton": triton.__version__, "architecture": "sm_90", "rows": ordered}
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
