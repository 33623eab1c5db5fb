"""The commands of ``python -m autotune``: what they refuse, in one line and before anything is measured or written."""

import pytest
import torch

import autotune
from autotune import timing
from autotune.__main__ import COMMANDS, main

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("profile --quick --sizes 16", "--sizes: must be SIDE or HEIGHTxWIDTH, at least 32 pixels each, got '16'"),
        ("profile --quick --sizes 64x64x64", "--sizes: must be SIDE or HEIGHTxWIDTH"),
        ("profile --quick --shape 1x16x8x8", "--shape must be BATCHxCHANNELSxHEIGHTxWIDTH, of an --operator"),
        ("profile --quick --operator na2d_av --shape 1x16x8", "--shape must be BATCHxCHANNELSxHEIGHTxWIDTH"),
        ("profile --quick --operator na2d_av --shape 1x16x0x8", "--shape: must be an integer of at least 1, got '0'"),
        ("profile --quick --operator na2d_av --shape 1x16x8x8 --kernel-size 4", "kernel_size must be odd"),
        ("profile --quick --operator na2d_av --shape 1x20x8x8", "channels must be a multiple of 16"),
        ("profile --quick --operator na2d_av --shape 2x16x8x8 --batch 3", "--batch, --shape and --input must have"),
        ("profile --quick --operator na2d_av nothing", "--operator must match a name, 'nothing' does not; names begin"),
        ("profile --quick --kernel-size 3", "--kernel-size must come with --shape"),
        ("profile --quick --input 1x3x8x8", "--input must come with --module"),
        ("profile --quick --module torch.nn", "--module: must be PACKAGE.MODULE:NAME, as in mypackage.nets:Net"),
        ("profile --quick --module no_such_nets:Net", "No module named 'no_such_nets'"),
        ("profile --quick --module torch.nn:Nothing", "has no attribute 'Nothing'"),
        ("profile --quick --module torch.nn:Linear", "missing 2 required positional arguments"),
        ("profile --quick --module math:pi", "'float' object is not callable"),
        ("profile --quick --model nothing", "--model: no model is named 'nothing'"),
        ("profile --quick --image missing.jpg", "missing.jpg cannot be read as an image: No such file"),
        ("profile --quick --against missing.json", "--against must be a profile.json that can be read"),
        ("profile --quick --threshold 0", "--threshold: must be a finite number above 0"),
        ("profile --quick --backend magic", "--backend: invalid choice: 'magic'"),
        ("bench --quick --no-compile --operator nothing", "--operator must match a name, 'nothing' does not"),
        ("bench --quick --no-compile --operator na2d_av --model resnet50", "no model is named 'resnet50'"),
        ("bench --quick --no-compile --operator na2d_av --out /dev/null", "--out must be a folder, and /dev/null"),
        ("profile --quick --operator na2d_av --out /dev/null/new", "--out must be a folder, and /dev/null/new cannot"),
        ("suite --quick --out /dev/null", "--out must be a folder, and /dev/null cannot be made one: File exists"),
        ("compile --arch sm_1", "argument --arch: invalid choice: 'sm_1'"),
        ("compile --only nothing", "no case contains 'nothing'; there are: involution2d RedNet-50 128@28² K=7, "),
        pytest.param("tune --model r --quick --device cpu", "--model: no model is named 'r'", marks=without_gpu),
        ("tune --model rednet26 --all", "argument --all: not allowed with argument --model"),
        pytest.param("tune --operator nothing --quick --device cpu", "--operator must match a name", marks=without_gpu),
        pytest.param("tune --all", "tuning times kernels on a GPU, and there is none here", marks=without_gpu),
        pytest.param("suite", "the suite measures a GPU", marks=without_gpu),
    ],
)
def test_bad_arguments_are_named(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(tmp_path / "store"))
    if command.startswith("compile"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, *options = command.split()
    out = ["--out", str(tmp_path / "new")] if name in ("profile", "bench") else []
    try:
        code = main([name, *out, *options])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


PARTS = ("--quick", "--operator na2d_av", "--model rednet26")
PROFILED, BENCHED = ("", *PARTS, "--module torch.nn:Identity", "--against earlier.json"), ("", *PARTS, "--environment")


@pytest.mark.parametrize("command", [*(f"profile {part}" for part in PROFILED), *(f"bench {part}" for part in BENCHED)])
def test_a_part_never_replaces_the_committed_whole(command, tmp_path, monkeypatch, capsys):
    """By default it goes to build/results; here nothing can be written to either."""
    monkeypatch.setattr(timing, "repository_root", lambda: tmp_path)
    monkeypatch.setattr("autotune.report.earlier_rows", lambda *_: {})
    for folder in ("build", "notebooks"):
        (tmp_path / folder).touch()
    name, *part = command.split()
    assert main([name, *part]) == 2
    folder = tmp_path / ("build" if part else "notebooks") / "results" / timing.device_folder(timing.best_device())
    assert f"--out must be a folder, and {folder} cannot be made one" in capsys.readouterr().err


@without_gpu
@pytest.mark.parametrize(("command", "interpreting"), [("profile --quick --backend triton", True), ("verify", False)])
def test_kernels_in_the_interpreter_are_checked_and_never_timed(command, interpreting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("autotune.verify.interpreting", lambda: interpreting)
    monkeypatch.setattr("autotune.profile.interpreting", lambda: interpreting)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_command.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "toy", ("toy_command", "what this machine cannot run"))
    assert main(["toy"]) == 2
    assert "toy needs the package no_such_package, which is not installed here" in capsys.readouterr().err


def test_the_package_knows_its_names():
    assert set(autotune._MODULES) <= set(dir(autotune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = autotune.nothing  # pyright: ignore[reportAttributeAccessIssue]
