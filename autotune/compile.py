"""Build every kernel ahead of time for a named architecture, without a GPU.

Operators are called on meta tensors at shapes of the models, and their launches are recorded instead of run. A launch's
arguments give the signature and the compile-time constants, and Triton's compiler does the rest. The cubin then says
what a launch would cost: registers, stack (spills), shared memory, width of the global loads, tensor-core instructions.

Instructions are counted in the code, a loop's body once; MMA are those of the tensor cores. For each element that the
kernel writes, shuffles/out is how many values its threads exchange, bytes/out what must move when every tensor moves
once.

Exit code: 0 everything builds and nothing spills, 1 otherwise, 2 bad arguments.
"""

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import Tensor

from autotune.passes import tensors_in
from autotune.precompile import build, described
from autotune.tables import Table, settings_text
from autotune.workloads import Workload
from kernels.backend import triton_installed, use_backend
from kernels.launch import Launch, record_launches
from kernels.tuning.choose import Request, observing
from models.commands.dispatch import CommandError
from models.commands.types import DTYPES

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float64: "fp64"}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses. Instruction counts are static, over the whole kernel; None where unknown."""

    case: str
    kernel: str
    architecture: str
    dtype: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    bytes_per_output: float  # every tensor moved once
    config: str
    load_bits: int | None = None  # widest global load
    tensor_core: int | None = None
    shuffles: int | None = None
    fma: int | None = None
    shuffles_per_output: float | None = None


def _read_cubin(cubin: bytes, *, instructions: bool) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dump("--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reported no resource usage: {usage!r}")
        if not instructions and found[2] == "0":
            return {"registers": int(found[1]), "spilled_bytes": 0}
        code = dump("--dump-sass")
    loads = re.findall(r"\bLDG(?:STS)?(?:\.[A-Z0-9]+)*", code)  # LDGSTS: straight into shared memory
    widths = [128 if ".128" in load else 64 if ".64" in load else 16 if "16" in load else 32 for load in loads]
    return {
        "registers": int(found[1]),
        # A stack frame that no instruction stores to is a calling convention's, not a spill.
        "spilled_bytes": int(found[2]) if re.search(r"\bSTL\b", code) else 0,
        "load_bits": max(widths, default=0),
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|IMMA|DMMA)\b", code)),
        "shuffles": len(re.findall(r"\bSHFL\b", code)),
        "fma": len(re.findall(r"\b(?:FFMA2?|HFMA2)\b", code)),
    }


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return {"registers": number("vgpr_count"), "spilled_bytes": 4 * number("vgpr_spill_count")}


def compile_launch(case: str, launch: Launch, architecture: str, *, instructions: bool = True) -> Report:
    """Compile one recorded launch for ``architecture``. Needs neither a GPU nor its driver.

    Without ``instructions`` an NVIDIA kernel that uses no stack is not disassembled, which takes as long as compiling.
    """
    from triton.backends.compiler import GPUTarget

    compiled = build(described(launch), GPUTarget(*ARCHITECTURES[architecture]))
    if architecture.startswith("sm_"):
        usage = _read_cubin(compiled.asm["cubin"], instructions=instructions)
    else:
        usage = _read_amdgcn(compiled.asm["amdgcn"])
    tensors = {id(tensor): tensor for tensor in tensors_in(launch.arguments)}
    outputs = _output(launch).numel()
    if "shuffles" in usage:
        shuffled = usage["shuffles"] * 32 * launch.options["num_warps"] * math.prod(launch.grid)
        usage["shuffles_per_output"] = shuffled / outputs
    return Report(
        case=case,
        kernel=launch.kernel.__name__.strip("_"),
        architecture=architecture,
        dtype=TYPE_NAMES[next(iter(tensors.values())).dtype],
        num_warps=launch.options["num_warps"],
        shared_bytes=compiled.metadata.shared,
        bytes_per_output=sum(tensor.nbytes for tensor in tensors.values()) / outputs,
        config=" ".join(
            f"{name.lower().removeprefix('block_').removeprefix('num_')}={value}"
            for name, value in (launch.arguments | launch.options).items()
            if name.startswith(("BLOCK_", "TILE_", "num_"))
        ),
        **usage,
    )


def _output(launch: Launch) -> Tensor:
    """The tensor that a launch writes; a backward pass reads one called out."""
    found = {name.removesuffix("_ptr"): tensors_in(value) for name, value in launch.arguments.items()}
    return next((found[name][-1] for name in ("target", "partial", "out") if found.get(name)), tensors_in(found)[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    text = f"to build for: {', '.join(ARCHITECTURES)} (default: sm_90)"
    parser.add_argument("--arch", choices=ARCHITECTURES, default=["sm_90"], help=text, **several)
    text = f"of the tensors: {', '.join(DTYPES)} (default: bf16)"
    parser.add_argument("--dtype", choices=DTYPES, default=["bf16"], help=text, **several)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--resources-only", action="store_true", help="count no instructions; in half the time")
    text = "what tuning may choose, too: hundreds of builds, of a second or two each"
    parser.add_argument("--every-config", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print the reports as JSON instead of a table")


def _reports(arguments: argparse.Namespace, console: Console) -> tuple[list[Report], list[str]]:
    """The reports of all that builds, and a line for each kernel that does not."""
    from autotune.kernel_cases import cases

    if not any(arguments.only in name for name in cases()):
        raise CommandError(f"--only: no case contains {arguments.only!r}; there are: {'; '.join(cases())}")
    work = [
        (name, launch, config, architecture)
        for dtype in arguments.dtype
        for name, workload in cases(DTYPES[dtype]).items()
        if arguments.only in name
        for launch, config in _launches(workload, DTYPES[dtype], arguments.every_config)
        for architecture in arguments.arch
    ]
    reports, failures = [], []
    for name, launch, config, architecture in track(work, "Compiling", console=console, transient=True):
        try:
            report = compile_launch(name, launch, architecture, instructions=not arguments.resources_only)
            report = replace(report, config=config or report.config)
            reports += [] if report in reports else [report]  # as of a launch for every part of a batch
        except Exception as error:  # the table must show every kernel, whatever the compiler raised for one
            failures.append(f"{name}, {launch.kernel.__name__} for {architecture}: {type(error).__name__}: {error}")
    return reports, failures


def _launches(workload: Workload, dtype: torch.dtype, every_config: bool = False) -> list[tuple[Launch, str]]:
    """What the workload launches, and with ``every_config`` that with each config that tuning may choose, and which."""
    met = list[Request]()
    with use_backend("triton"), observing(met.append), record_launches() as launches:
        workload.call(dtype, torch.device("meta"))()
        configs = [""] * len(launches)
        for request in met if every_config else ():
            for config in request.launcher.candidates(request.problem):
                request.run(config)
                configs += [settings_text(asdict(config))] * (len(launches) - len(configs))
    return list(zip(launches, configs, strict=True))


def run(arguments: argparse.Namespace) -> int:
    console = Console(stderr=arguments.json, highlight=False)
    if not triton_installed() or os.environ.get("TRITON_INTERPRET") == "1":
        raise CommandError("compile needs Triton's compiler: install triton, and leave TRITON_INTERPRET unset")
    reports, failures = _reports(arguments, console)
    if arguments.json:
        print(json.dumps({"reports": [asdict(report) for report in reports], "failures": failures}, indent=1))
    else:
        _table(reports, configs=arguments.every_config).show()
        for failure in failures:
            console.print(f"[red]failed[/] {escape(failure)}")
    return int(bool(failures) or any(report.spilled_bytes for report in reports))


COLUMNS = {  # of the table: field of a report -> heading
    "num_warps": "warps",
    "registers": "registers",
    "spilled_bytes": "spilled B",
    "shared_bytes": "shared B",
    "load_bits": "load bits",
    "tensor_core": "MMA",
    "fma": "FMA",
    "shuffles": "shuffles",
    "shuffles_per_output": "shuffles/out",
    "bytes_per_output": "bytes/out",
}


def _table(reports: list[Report], *, configs: bool) -> Table:
    """A line for each build; ``configs`` tells the builds of one kernel apart."""
    words = ["case", "kernel", "architecture", "dtype", *(["config"] if configs else [])]
    rows = []
    for report in reports:
        counts = [getattr(report, name) for name in COLUMNS]
        cells = ["–" if n is None else str(n) if isinstance(n, int) else f"{n:.3g}" for n in counts]
        rows.append([*(getattr(report, name) for name in words), *cells])
    headings = ["arch" if name == "architecture" else name for name in words] + list(COLUMNS.values())
    return Table(headings, rows, len(words), "Kernels compiled ahead of time")
