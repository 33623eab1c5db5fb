"""``python -m autotune bench``: operators and models are checked before they are timed."""

import dataclasses

import pytest
import torch
from torch import nn

import autotune
import kernels
from autotune import bench, networks, operators, timing, workloads
from autotune.__main__ import main
from autotune.measure import DisagreementError, Settings
from autotune.networks import measure_model
from autotune.operators import measure_operator
from kernels import tolerances
from tests.support import DEVICE

HERE = torch.device(DEVICE)
CEILINGS = {"copy_bytes_per_second": 1e9, "bf16_operations_per_second": 1e12, "fp32_operations_per_second": 1e11}
SETTINGS = Settings(HERE, torch.float32, seconds=0.001, min_runs=2, thorough=True, compiler="eager", ceilings=CEILINGS)
TINY = {workload.operator: workload for workload in workloads.benchmark_workloads(quick=True)}


def damaged(monkeypatch, name, damage):
    """Makes an operator wrong on every path but the naive one."""
    correct = getattr(kernels, name)

    def broken(*arguments, **options):
        out = correct(*arguments, **options)
        return out if kernels.get_backend() == "reference" else damage(out)

    monkeypatch.setattr(kernels, name, broken)


class Halved(torch.autograd.Function):
    """The right output, and half of its gradient."""

    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


# ---- operators


def test_an_operator_meets_everything_that_stands_in_for_it():
    row = measure_operator(TINY["contmix2d"], SETTINGS, backward=True)
    assert row["relative_error"] <= row["tolerance"] == 1e-5
    assert (row["against"], row["left_out"]) == ("reference", {})
    assert list(row["contenders"]) == ["ours", "naive", "unfused", "compiled"]
    for found in row["contenders"].values():
        assert 0 < found["p20_ms"] <= found["p50_ms"] <= found["p80_ms"]
        assert found["peak_bytes"] > 0
    floor, best = row["floor"], {name: found["p50_ms"] for name, found in row.get("graph", row["contenders"]).items()}
    assert floor["memory_ms"] == pytest.approx(1000 * floor["bytes"] / 1e9)
    assert floor["operations_ms"] == pytest.approx(1000 * floor["operations"] / 1e12)
    assert floor["ms"] == max(floor["memory_ms"], floor["operations_ms"])
    assert floor["fraction"] == pytest.approx(floor["ms"] / best["ours"])
    assert row["speed_up"]["naive"] == pytest.approx(best["naive"] / best["ours"])
    assert "channels_first" in measure_operator(TINY["depthwise_conv2d"], SETTINGS)["speed_up"]
    assert "unfused" in measure_operator(TINY["involution2d_generate"], SETTINGS)["speed_up"]


def test_a_contender_that_cannot_run_is_left_out_with_the_reason(monkeypatch):
    def raising(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(operators, "UNFUSED", {"contmix2d": raising})
    row = measure_operator(TINY["contmix2d"], SETTINGS)
    assert row["left_out"] == {"unfused": "OutOfMemoryError: CUDA out of memory"}
    assert "naive" in row["speed_up"]

    monkeypatch.setattr(kernels.reference, "na2d_qk", raising)
    row = measure_operator(TINY["na2d_qk"], SETTINGS, backward=True)
    assert row["against"] == "eager"
    assert list(row["contenders"]) == ["ours"]
    assert row["left_out"] == dict.fromkeys(("naive", "compiled"), "the definition does not fit in the GPU's memory")


# ---- models


ONCE = dataclasses.replace(SETTINGS, seconds=0.0)


def _model(**options):
    return networks.settled_model("tiny_rednet", networks.random_images(2, (64, 64)), **options).to(HERE)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_meets_the_naive_path_a_compiler_and_its_peer(training):
    """Dropped paths are not drawn alike in two precisions: they are held while results are compared."""
    model, images = _model(drop_path_rate=0.9), networks.random_images(3, (32, 32)).to(HERE)
    row = measure_model(model, images, ONCE, training=training, compiled=True, peer=_model())
    assert row["relative_error"] <= row["tolerance"]
    assert row["tolerance"] == (tolerances.MODEL_GRADIENT if training else tolerances.LOGITS)
    times = {name: found["p50_ms"] for name, found in row["contenders"].items()}
    assert list(times) == ["ours", "naive", "peer", "compiled", "peer_compiled"]
    assert row["contenders"]["ours"]["images_per_second"] == pytest.approx(3000 / times["ours"])
    assert row["speed_up"]["compiled"] == pytest.approx(times["compiled"] / times["ours"])
    assert row["speed_up"]["peer"] == pytest.approx(times["peer"] / times["ours"])
    assert row["speed_up"]["peer_compiled"] == pytest.approx(times["peer_compiled"] / times["compiled"])
    assert row["left_out"] == {}
    assert all(part.training == training for part in model.modules())


def test_a_compiled_peer_that_computes_something_else_is_left_out():
    class Other(nn.Module):
        def forward(self, images):
            return torch.full((images.shape[0], 10), 1.0 + torch.compiler.is_compiling(), device=images.device)

    images = networks.random_images(2, (32, 32)).to(HERE)
    row = measure_model(_model(), images, ONCE, training=False, compiled=True, peer=Other())
    assert "peer" in row["contenders"]
    assert list(row["left_out"]) == ["peer_compiled"]


def test_other_precisions_round_no_more_than_the_naive_path():
    settings = dataclasses.replace(ONCE, dtype=torch.bfloat16)
    row = measure_model(_model(), networks.random_images(2, (64, 64)).to(HERE), settings, training=False)
    assert row["relative_error"] <= row["tolerance"] == tolerances.LOGITS
    assert 1e-3 < row["rounding"] < 0.5, "bfloat16 rounds: about 1 %"


def _operator_row(backward):
    return measure_operator(TINY["na2d_av"], SETTINGS, backward=backward)


def _model_row(training):
    return measure_model(_model(), networks.random_images(2, (32, 32)).to(HERE), SETTINGS, training=training)


def _compared(backward):
    inputs = torch.randn(1, 2, 8, 8, 9), torch.randn(1, 2, 8, 8, 4)
    options = {"backward": backward, "backends": ["eager", "reference"], "seconds": 0.01, "min_runs": 2}
    return autotune.compare(kernels.na2d_av, *inputs, 3, **options).row("eager")


@pytest.mark.parametrize(
    ("operator", "measured", "backward", "damage", "message"),
    [
        ("na2d_av", _compared, False, lambda out: out * 1.001, "outputs on eager: relative error"),
        ("na2d_av", _compared, False, lambda out: out * float("nan"), "outputs on eager: relative error nan"),
        ("na2d_av", _compared, True, Halved.apply, "outputs and gradients on eager: relative error"),
        ("na2d_av", _operator_row, False, lambda out: out * 1.001, r"output: relative error 1\.0e-03"),
        ("na2d_av", _operator_row, False, lambda out: out * float("nan"), "output: relative error nan"),
        ("na2d_av", _operator_row, True, Halved.apply, r"output and gradients: relative error 5\.0e-01"),
        ("involution2d_generate", _model_row, False, lambda out: out * 1.01, "logits in float32"),
        ("involution2d_generate", _model_row, True, Halved.apply, "logits and gradients in float32"),
    ],
)
def test_what_is_wrong_is_never_timed(monkeypatch, operator, measured, backward, damage, message):
    damaged(monkeypatch, operator, damage)
    if backward:  # the output is right, which is all that the forward pass has
        assert measured(False)["relative_error"] < 1e-4
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(DisagreementError, match=message):
        measured(backward)


# ---- the command


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}', '{"rows": [{}]}', "\0"])
@pytest.mark.parametrize("file", ["bench.json", "environment.json"])
def test_a_damaged_file_is_named_before_anything_is_measured(tmp_path, capsys, content, file):
    (tmp_path / file).write_text(content)
    code = main(["bench", "--operator", "na2d_qk", "--quick", "--no-compile", "--resume", "--out", str(tmp_path)])
    assert code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{tmp_path / file} cannot be read as a result" in told
    assert (tmp_path / file).read_text() == content


def test_compile_only_times_nothing(tmp_path, monkeypatch):
    compiled = []

    def compiling(function, **options):
        return lambda *arguments, **keywords: compiled.append(options["backend"]) or function(*arguments, **keywords)

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(bench, "_known_ceilings", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "--operator", "na2d_av", "--quick", "--compile-only", "--out", str(tmp_path)]) == 0
    assert compiled == ["eager", "eager"]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_named_twice_is_measured_once(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(bench, "run_cases", lambda cases, *_, **__: measured.extend(case.name for case in cases) or 0)
    assert main(["bench", "--quick", "--model", "tiny_rednet", "tiny_rednet", "--out", str(tmp_path)]) == 0
    assert measured == ["tiny_rednet inference", "tiny_rednet training"]


def test_what_takes_long_is_said_before_it_begins(tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_, **__: told.append(capsys.readouterr().err) or CEILINGS)
    monkeypatch.setattr(bench, "operator_cases", lambda *_: [])
    for what in (["--environment"], ["--operator", "na2d_av"]):
        assert main(["bench", "--quick", *what, "--out", str(tmp_path / what[0])]) == 0
    assert ["ceilings" in line for line in told] == [True, True]
