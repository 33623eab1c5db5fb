"""``python -m autotune compile``: build every kernel ahead of time for a named architecture, without a GPU.

Each kernel is launched on meta tensors at a model's own shape; the launch is recorded instead of run, its arguments
give the signature and its compile-time constants, and Triton's compiler does the rest. The cubin then says what a
launch would cost: registers, stack (spills), shared memory, width of the global loads, tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from kernels.launch import Launch, record_launches
from kernels.windows import Window

__all__ = ["ARCHITECTURES", "Report", "add_arguments", "cases", "compile_launch", "run"]

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


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
    load_bits: int | None = None  # widest global load
    tensor_core: int | None = None
    shuffles: int | None = None
    fma: int | None = None


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _algebra(dtype: torch.dtype, channels_last: bool) -> Iterator[Callable[[], object]]:
    from kernels.aggregation import triton_kernels as kernels

    # RedNet-50's second stage: 128 channels in 8 groups at 28x28, K = 7.
    window = Window((7, 7), padding=(3, 3))
    weight = _meta(128, 8 * 49, 28, 28, dtype=dtype)
    x = _meta(128, 128, 28, 28, dtype=dtype)
    if channels_last:
        weight, x = weight.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    weight, x = weight.unflatten(1, (8, 7, 7)), x.unflatten(1, (8, 16))
    yield lambda: kernels.aggregate(weight, x, window)
    yield lambda: kernels.correlate(x, x, window)
    yield lambda: kernels.transpose(weight, x, (28, 28), window)


def _generate(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    from kernels.involution import triton_kernels as kernels

    # RedNet-50's second stage: kernels of 128 channels from 32 features.
    window = Window((7, 7), padding=(3, 3))
    x = _meta(128, 8, 16, 28, 28, dtype=dtype)
    features, weight = _meta(128, 32, 28, 28, dtype=dtype), _meta(8 * 49, 32, dtype=dtype)
    yield lambda: kernels.involution_generate(x, features, weight, weight[:, 0].contiguous(), window)


def _neighborhood(
    dtype: torch.dtype, length: int, kernel_size: int, dilation: int = 1
) -> Iterator[Callable[[], object]]:
    from kernels.aggregation import triton_kernels as algebra
    from kernels.neighborhood import triton_kernels as kernels

    # OverLoCK-T: 16 value channels a head.
    window = Window.neighborhood((kernel_size, kernel_size), (dilation, dilation))
    logits = _meta(128, 8, length, length, kernel_size, kernel_size, dtype=dtype).permute(0, 1, 4, 5, 2, 3)
    value = _meta(128, 8, 16, length, length, dtype=dtype)
    rpb = _meta(8, 2 * kernel_size - 1, 2 * kernel_size - 1, dtype=dtype)
    statistics = _meta(128, 8, length, length, dtype=torch.float32)
    heads_last = _meta(128, 8, length, length, 16, dtype=dtype).permute(0, 1, 4, 2, 3)
    yield lambda: kernels.softmax_aggregate(logits, value, rpb, window)
    yield lambda: kernels.softmax_aggregate_backward(value, logits, value, rpb, value, statistics, window)
    yield lambda: algebra.aggregate(logits, heads_last, window)
    yield lambda: algebra.correlate(heads_last, heads_last, window)
    yield lambda: algebra.transpose(logits, heads_last, (length, length), window)


def _contmix(dtype: torch.dtype, length: int, kernel_size: int) -> Iterator[Callable[[], object]]:
    from kernels.contmix import triton_kernels as kernels

    # OverLoCK-T: 8 heads of 16 query and 16 value channels.
    features = _meta(128, 8, 16, length, length, dtype=dtype)
    projected = _meta(128, 8, 16, kernel_size**2, dtype=dtype)
    bias = _meta(kernel_size**2, dtype=dtype)
    rpb = _meta(8, 2 * kernel_size - 1, 2 * kernel_size - 1, dtype=dtype)
    statistics = _meta(128, 8, length, length, dtype=torch.float32)
    yield lambda: kernels.contmix_one_size(features, projected, bias, rpb, features, features, statistics)


def _outlook(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    from kernels.outlook import triton_kernels as kernels

    # VOLO-D1: 6 heads of 32 channels.
    logits, value = _meta(128, 14, 14, 6, 9, 9, dtype=dtype), _meta(128, 28, 28, 192, dtype=dtype)
    yield lambda: kernels.outlook(logits, value, 3, 2, 1, 32**-0.5)
    yield lambda: kernels.outlook_backward(value, logits, value, 3, 2, 1, 32**-0.5)


def _depthwise(
    dtype: torch.dtype, channels: int, length: int, kernel_size: int, channels_last: bool = False
) -> Iterator[Callable[[], object]]:
    from kernels.depthwise import triton_kernels as kernels

    x, weight = (
        _meta(128, channels, length, length, dtype=dtype),
        _meta(channels, 1, kernel_size, kernel_size, dtype=dtype),
    )
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    yield lambda: kernels.convolve(x, weight, weight[:, 0, 0, 0].contiguous())
    yield lambda: kernels.weight_gradient(x, x, kernel_size)


def cases(dtype: torch.dtype) -> dict[str, Iterator[Callable[[], object]]]:
    """Launcher calls at the models' own shapes, by name."""
    return {
        "involution 128@28 K=7, channels first": _algebra(dtype, channels_last=False),
        "involution 128@28 K=7, channels last": _algebra(dtype, channels_last=True),
        "involution, kernels generated, 128@28 K=7": _generate(dtype),
        "neighborhood 8x16@14 K=13": _neighborhood(dtype, 14, 13),
        "neighborhood 8x16@56 K=7 d=2": _neighborhood(dtype, 56, 7, dilation=2),
        "outlook 6x32@28 K=3 s=2": _outlook(dtype),
        "depthwise 64@56 K=17": _depthwise(dtype, 64, 56, 17),
        "depthwise 256@14 K=13, channels last": _depthwise(dtype, 256, 14, 13, channels_last=True),
        "contmix 8x16@14 K=5": _contmix(dtype, 14, 5),
        "contmix 8x16@14 K=13": _contmix(dtype, 14, 13),
    }


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and divisibility of a launch, specialised as Triton specialises them at run time."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (not isinstance(value, Tensor) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPE_NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _nvidia_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [_nvidia_tool("cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {usage!r}")
    loads = re.findall(r"\bLDG(?:\.[A-Z0-9]+)*", code)
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


def _read_amdgcn(assembly: str) -> dict[str, int]:
    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"\.vgpr_count:\s*(\d+)"),
        "spilled_bytes": 4 * number(r"\.vgpr_spill_count:\s*(\d+)"),
    }


def compile_launch(case: str, launch: Launch, architecture: str) -> Report:
    """Compile one recorded launch for ``architecture``. Needs neither a GPU nor its driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget(*ARCHITECTURES[architecture]), options=dict(launch.options))
    if architecture.startswith("sm_"):
        usage = _read_cubin(compiled.asm["cubin"])
    else:
        usage = _read_amdgcn(compiled.asm["amdgcn"])
    dtype = next(TYPE_NAMES[value.dtype] for value in launch.arguments.values() if isinstance(value, Tensor))
    return Report(
        case=case,
        kernel=launch.kernel.__name__.strip("_"),
        architecture=architecture,
        dtype=dtype,
        num_warps=launch.options["num_warps"],
        shared_bytes=compiled.metadata.shared,
        **usage,
    )


def _parse_list(known: dict[str, Any], what: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{what} must be among {', '.join(known)}; got {name!r}")
        return names

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=_parse_list(ARCHITECTURES, "architecture"),
        default=["sm_90"],
        metavar="NAME[,NAME]",
        help=f"architectures to build for: {', '.join(ARCHITECTURES)} (default: sm_90)",
    )
    parser.add_argument(
        "--dtype",
        type=_parse_list(DTYPES, "dtype"),
        default=["bf16"],
        metavar="NAME[,NAME]",
        help=f"element types: {', '.join(DTYPES)} (default: bf16)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Compile, report, and return 1 if a kernel does not build or spills on sm_90."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("compile needs Triton's compiler: unset TRITON_INTERPRET")
    console = Console(stderr=arguments.json)
    console.width = max(console.width, 150)  # a table cut short says less than one a narrow terminal wraps
    work = [
        (name, launch, architecture)
        for dtype in arguments.dtype
        for name, calls in cases(DTYPES[dtype]).items()
        if arguments.only in name
        for call in calls
        for launch in _recorded(call)
        for architecture in arguments.arch
    ]
    if not work:
        raise SystemExit(f"--only: no case contains {arguments.only!r}; there are: {', '.join(cases(torch.float16))}")
    reports, failures = [], []
    for name, launch, architecture in track(work, "Compiling", console=console, transient=True):
        try:
            reports.append(compile_launch(name, launch, architecture))
        except Exception as error:  # the table must show every kernel, whatever the compiler raised for one
            failures.append(f"{name}, {launch.kernel.__name__} for {architecture}: {type(error).__name__}: {error}")
    if arguments.json:
        print(json.dumps({"reports": [asdict(report) for report in reports], "failures": failures}, indent=1))
    else:
        console.print(_table(reports))
        for failure in failures:
            console.print(f"[red]failed[/] {failure}")
    spills = any(report.spilled_bytes for report in reports if report.architecture == "sm_90")
    return 1 if failures or spills else 0


def _recorded(call: Callable[[], object]) -> list[Launch]:
    with record_launches() as launches:
        call()
    return launches


def _table(reports: list[Report]) -> Table:
    table = Table(title="Kernels compiled ahead of time")
    for column in ("case", "kernel", "arch", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("warps", "registers", "spilled B", "shared B", "load bits", "tensor core", "shuffles", "FMA"):
        table.add_column(column, justify="right", no_wrap=True)
    for report in reports:
        values = list(asdict(report).values())
        table.add_row(*["-" if value is None else str(value) for value in values])
    return table
