"""Every kernel builds ahead of time for every supported architecture, and none spills. Needs no GPU."""

import json
import re

import pytest
import torch
import triton

from autotune import workloads
from autotune.compile import ARCHITECTURES, _launches
from kernels.backend import use_backend
from kernels.launch import record_launches
from kernels.tuning.choose import Request, observing
from tests.support import ROOT, in_a_process


def _compile(*arguments):
    """The command in a process of its own: this one has the interpreter switched on."""
    return in_a_process("-m", "autotune", "compile", *arguments, TRITON_INTERPRET="")


def _kernel_names():
    """Every kernel this repository launches, read from the source."""
    sources = "\n".join(path.read_text() for path in ROOT.glob("kernels/**/*.py"))
    return {name.strip("_") for name in re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\(", sources)}


# What a program may have, of shared memory, in KB; the smallest of GPUs has 99.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}

# The most bytes on the stack that a kernel may take, by dtype. Kernels that hold many sums at once are quicker with a
# few of them there than with smaller tiles; kernels that are not named here take none.
SPILLS = {
    "bf16": {
        "forward_shared_kernel": 24,
        "forward_band_kernel": 112,  # for sm_100
        "grad_logits_band_kernel": 456,  # for sm_80, where a launch takes half the tiles; 120 for sm_90
        "grad_value_band_kernel": 8,  # for sm_80
        "grad_parameters_band_kernel": 80,  # for sm_100
        "backward_shared_kernel": 208,  # for sm_80
        "weighted_sum_kernel": 48,  # for sm_80
        "weight_gradient_kernel": 104,  # for sm_80, where a launch takes half the rows
        "convolution_kernel": 16,  # for sm_100, where it adds to what other branches gave
    },
    "fp32": {
        "forward_shared_kernel": 64,
        "backward_shared_kernel": 32,
        "mix_kernel": 8,
        "weighted_sum_kernel": 16,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dtype"), [*((name, "bf16") for name in ARCHITECTURES), ("sm_90", "fp32")])
def test_every_kernel_builds_and_none_spills(architecture, dtype):
    done = _compile("--arch", architecture, "--json", "--dtype", dtype, "--resources-only")
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    of_16_bits = ("_band_", "bands_kernel", "residual_kernel", "image_kernel", "expanded_kernel")
    narrow = {name for name in _kernel_names() if dtype == "fp32" and any(part in name for part in of_16_bits)}
    assert {report["kernel"] for report in result["reports"]} == _kernel_names() - narrow
    assert all(0 < report["registers"] <= 512 for report in result["reports"])
    # Without a GPU they are built as for Hopper; launches elsewhere take smaller blocks.
    hopper = ("grad_logits_band_kernel", "grad_parameters_band_kernel", "residual_kernel")
    hopper = () if architecture in ("sm_90", "sm_100") else hopper
    assert all(
        report["shared_bytes"] <= 2**10 * SHARED[architecture] or report["kernel"] in hopper
        for report in result["reports"]
    )
    # A build for AMD's GPUs made here has loads ahead, in registers, or other blocks, that a launch there is without.
    on_amd = {"weighted_sum_kernel": 608, "backward_shared_kernel": 600}
    on_amd |= {"grad_logits_band_kernel": 2400, "grad_parameters_band_kernel": 2644, "residual_kernel": 264}
    on_amd["small_map_gradient_kernel"] = 4
    known = on_amd if architecture.startswith("gfx") else SPILLS[dtype]
    if not triton.__version__.startswith("3.7."):  # the numbers are 3.7's: 3.6 spills up to 944 bytes more
        known = {name: 1024 + known.get(name, 0) for name in _kernel_names()}
    spilled = [report for report in result["reports"] if report["spilled_bytes"] > known.get(report["kernel"], 0)]
    assert {f"{report['case']}, {report['kernel']}": report["spilled_bytes"] for report in spilled} == {}
    assert done.returncode == int(any(report["spilled_bytes"] for report in result["reports"]))
    # A sum over 49 positions of a kernel, 16 channels at a time: kernel and features read once, the sum written.
    sums = [r for r in result["reports"] if r["case"].startswith("involution2d ") and "sum" in r["kernel"]]
    width = {"bf16": 2, "fp32": 4}[dtype]
    assert {report["bytes_per_output"] for report in sums} == {width * (49 / 16 + 2)}


@pytest.mark.slow
def test_instructions_are_counted():
    reports = json.loads(_compile("--only", "involution2d ", "--json").stdout)["reports"]
    assert {report["load_bits"] for report in reports} <= {16, 32, 64, 128}
    by_kernel = {report["kernel"]: report for report in reports}
    assert by_kernel["bands_kernel"]["tensor_core"] > 0
    assert by_kernel["weighted_sum_kernel"]["fma"] > 0


def test_what_is_held_in_shared_memory_fits_the_gpu():
    """Features, while taps are generated from them, of which many leave room for fewer pixels; and loads of bands, of
    two steps at a time where channels are few, while those of many take twice the room."""
    code = """if True:
        import torch
        from autotune.compile import _launches, compile_launch
        from autotune.workloads import contmix
        from kernels.involution.forward import involution_generate, involution_generate_transpose
        from kernels.launch import record_launches
        from kernels.windows import Window

        def last(channels):
            return torch.empty(1, 9, 9, channels, device="meta").permute(0, 3, 1, 2)

        x, seen, window = last(2)[:, None], last(64), Window((3, 3), padding=(1, 1))
        weight = torch.empty(9, 64, device="meta")
        with record_launches() as launches:
            involution_generate(x, seen, weight, None, window)
            involution_generate_transpose(x, x, seen, weight, None, window._replace(padding=(5, 5), dilation=(5, 5)))
        found = [(launch, "sm_80") for launch in launches]
        for size, channels, architecture in ((9, 32, "sm_90"), (7, 64, "sm_80")):
            workload = contmix("", 2, 2, channels, (2 * size, 2 * size), (size,), context=9)
            launches = [launch for launch, _ in _launches(workload, torch.bfloat16)]
            found += [(launch, architecture) for launch in launches if "grad_logits_band" in launch.kernel.__name__]
        print(*[compile_launch("", *each, instructions=False).shared_bytes for each in found])
    """
    done = in_a_process("-c", code, TRITON_INTERPRET="")
    shared, most = [int(number) for number in done.stdout.split()], (99, 99, SHARED["sm_90"], SHARED["sm_80"])
    assert len(shared) == len(most), done.stderr
    assert all(found <= kilobytes * 2**10 for found, kilobytes in zip(shared, most, strict=True))


def test_every_config_is_what_tuning_may_choose():
    workload, met = workloads.involution("", 2, 64, (14, 14), 7, 16), list[Request]()
    with use_backend("triton"), observing(met.append), record_launches() as own:
        workload.call(torch.bfloat16, torch.device("meta"))()
    launches = _launches(workload, torch.bfloat16, every_config=True)
    configs = [config for request in met for config in request.launcher.candidates(request.problem)]
    assert len(configs) > 2
    for (launch, told), config in zip(launches[len(own) :], configs, strict=True):
        assert launch.options["num_warps"] == config.num_warps
        assert told.startswith(f"rows={config.rows} ")
