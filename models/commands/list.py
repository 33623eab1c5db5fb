"""Show every model: parameters, image size, published ImageNet-1k accuracy and whether official weights can be had.

Parameters are counted as in the papers, without the auxiliary classifier that OverLoCK has in training only. The
accuracies are the papers', at the size shown.
"""

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.commands.dispatch import input_errors
from models.registry import create_model, entry_point, list_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="a shell pattern, as in 'volo_*' (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def describe(name: str) -> dict[str, Any]:
    """What there is to know of a model, counted on the meta device: no memory is taken and nothing is computed."""
    with torch.device("meta"):
        model: Any = create_model(name)
    published = getattr(entry_point(name), "published", None)
    unused = tuple(f"{module}." for module in model.training_only)
    return {
        "name": name,
        "parameters": sum(p.numel() for key, p in model.named_parameters() if not key.startswith(unused)),
        "size": list(model.default_cfg["input_size"][1:]),
        "top1": None if published is None else published.top1,
        "weights": model.default_cfg["url"] or None,
    }


def run(arguments: argparse.Namespace) -> int:
    names = list_models(arguments.pattern)
    if not names:
        with input_errors():
            entry_point(arguments.pattern, "PATTERN")
    rows = list(map(describe, names))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = Table("name", title="Models", title_justify="left")
    for heading in ("parameters, M", "size", "top-1, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("official weights")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f}",
            "×".join(map(str, row["size"])),
            "–" if row["top1"] is None else str(row["top1"]),
            "--pretrained" if row["weights"] else "your own file",
        )
    Console(highlight=False).print(table)
    return 0
