"""What ``python -m models`` and ``python -m autotune`` share: numbers, terminals, and errors as one line."""

import io
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import autotune.__main__
import models.__main__
from models.commands.dispatch import run_command
from models.commands.types import LARGEST, Number, device, dtype, image_size, natural, positive
from tests.support import in_a_process

PACKAGES = {"models": models.__main__.main, "autotune": autotune.__main__.main}
INTEGER, NUMBER = ["-1", "1.5", "x", "", "nan", "1e3", str(10**10), "9" * 5000], ["inf", "-inf", "nan", "1e400", "x"]


FINETUNE, EVALUATE, CLASSIFY = "finetune D --model M --output O", "evaluate D --model M", "classify I --model M"


@pytest.mark.parametrize(
    ("command", "values"),
    [
        *((f"models {FINETUNE} {option}", [*INTEGER, "0"])
          for option in ("--epochs", "--batch", "--accumulate", "--repeats", "--log-every")),
        *((f"models {FINETUNE} {option}", INTEGER) for option in ("--workers", "--save-every")),
        (f"models {FINETUNE} --seed", ["-1", "nan", str(10**30)]),
        *((f"models {FINETUNE} {option}", [*NUMBER, "-1"])
          for option in ("--lr", "--min-lr", "--warmup-epochs", "--warmup-lr", "--weight-decay", "--aux-weight",
                         "--clip", "--mixup", "--cutmix")),
        *((f"models {FINETUNE} {option}", [*NUMBER, "-0.1", "1.1"])
          for option in ("--label-smoothing", "--ema", "--drop-path", "--layer-decay", "--least-area", "--flip",
                         "--erasing")),
        (f"models {EVALUATE} --batch", [*INTEGER, "0"]),
        (f"models {EVALUATE} --save-every", [*INTEGER, "0"]),
        (f"models {EVALUATE} --workers", [*INTEGER, "5000"]),
        (f"models {CLASSIFY} --crop-pct", [*NUMBER, "0", "1e-300", "3"]),
        (f"models {CLASSIFY} --size", ["31", "x", "64x", "1x1", "-64", "9" * 5000, "20000", "64.5"]),
        ("autotune bench --size", ["31", "9" * 5000, "20000"]),
        *((f"{command} --device", ["meta", "abacus", "cuda:99", ""])
          for command in (f"models {CLASSIFY}", f"models {EVALUATE}", f"models {FINETUNE}", "autotune profile",
                          "autotune bench", "autotune tune --all")),
        *((f"autotune {command}", [*INTEGER, "0"])
          for command in ("profile --batch", "bench --batch", "tune --all --batch", "tune --all --candidates")),
        *((f"autotune {command}", [*NUMBER, "0", "-1"]) for command in ("bench --seconds", "tune --all --seconds")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_number_is_bounded_and_refused_by_its_option(capsys, command, values):
    package, *arguments, option = command.split()
    for value in values:
        with pytest.raises(SystemExit) as ended:
            PACKAGES[package]([*arguments, f"{option}={value}"])
        assert ended.value.code == 2
        assert f"argument {option}: must be " in capsys.readouterr().err


@pytest.mark.parametrize("package", PACKAGES)
def test_help_shows_every_command_and_brings_no_torch(package):
    """Importing PyTorch takes seconds, which nobody waits for the names of commands."""
    code = "import atexit, sys\natexit.register(lambda: print({'torch', 'IPython', 'triton'} & set(sys.modules)))\n"
    done = in_a_process("-c", f"{code}from {package}.__main__ import main\nmain(['--help'])")
    assert done.returncode == 0
    *shown, imported = done.stdout.splitlines()
    assert imported == "set()"
    commands = (models if package == "models" else autotune).__main__.COMMANDS
    assert all(f" {command} " in " ".join(shown) for command in commands)


def test_help_is_plain_text(capsys):
    with pytest.raises(SystemExit):
        PACKAGES["autotune"](["profile", "--help"])
    assert "`" not in capsys.readouterr().out


def test_a_number_says_what_it_must_be(monkeypatch):
    assert str(positive) == "an integer of at least 1"
    assert str(Number(above=0, at_most=2)) == "a finite number above 0 and of at most 2"
    assert [natural.holds(value) for value in (0, 3, LARGEST, -1, 1.0, "1", None)] == [True] * 3 + [False] * 4
    assert not Number().holds(float("inf"))
    assert image_size("64x96") == (64, 96)
    assert str(device("cpu")) == "cpu"
    assert dtype("bf16") == dtype("bfloat16")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(0))  # as on a machine with GPUs
    assert device("cuda").index is None  # each of torchrun's processes takes its own


# ---- terminals


def speak(monkeypatch, stream, error: Exception | None = None) -> int:
    """Runs a command that prints, or raises."""

    def run(_arguments) -> int:
        if error is not None:
            raise error
        print("224×224 ½ \udce9 λ")
        return 0

    command = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "speaking", command)
    monkeypatch.setattr(sys, "stdout", stream)
    return run_command("models", "", {"say": ("speaking", "")}, ["say"])


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", rb"224\xd7224 \xbd \udce9 \u03bb"), ("latin-1", b"224\xd7224 \xbd \\udce9 \\u03bb")],
)
def test_a_terminal_may_lack_characters(monkeypatch, encoding, expected):
    written = io.BytesIO()
    assert speak(monkeypatch, io.TextIOWrapper(written, encoding=encoding)) == 0
    assert written.getvalue() == expected + b"\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_one_line(monkeypatch, capsys):
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115  (closing it would fail again)
    assert speak(monkeypatch, stream) == 2
    stream.close()
    assert capsys.readouterr().err == (
        "python -m models say: error: standard output cannot be written: No space left on device\n"
    )


def test_a_reader_may_leave_early(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        assert speak(monkeypatch, stream) == 141
    assert capsys.readouterr().err == ""


OUT_OF_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 B")
DISK_FULL = OSError(28, "No space left on device", "/run/state.pt")


@pytest.mark.parametrize(("error", "told"), [(OUT_OF_MEMORY, "not enough memory"), (DISK_FULL, "No space left on")])
def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys, error, told):
    assert speak(monkeypatch, io.StringIO(), error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    with pytest.raises(RuntimeError, match="a fault of ours"):
        speak(monkeypatch, io.StringIO(), RuntimeError("a fault of ours"))


def test_a_wrong_backend_in_the_environment_is_one_line():
    done = in_a_process("-m", "models", "list", DYNAMIC_KERNELS_BACKEND="fast")
    assert done.returncode == 2
    assert done.stderr.startswith("python -m models list: error: DYNAMIC_KERNELS_BACKEND must be one of")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
def test_an_interrupt_while_a_command_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "PIL.py").write_text("raise KeyboardInterrupt")  # whether or not signals are ignored where tests run
    done = in_a_process("-m", "models", "classify", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (130, "python -m models classify: interrupted\n")
