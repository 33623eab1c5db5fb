"""Running the commands: a model that trains a step in milliseconds, and processes that are killed."""

import json
import subprocess
from pathlib import Path

from torch import nn

from models.__main__ import main
from models._contract import pretrained_config
from models.volo import VOLO
from tests.support import in_a_process

CLASSES = ("ant", "bee", "cat")

# A process of its own, which kills itself, as kill -9 does, when it is about to put the Nth file in place. Threads of
# gloo that outlive the command would abort it now and then.
LAUNCHER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from models import registry
from models.__main__ import main
from tests.models.running import tiny_volo
registry.register_model(tiny_volo)
left, replace = int(sys.argv[1]), os.replace
def killed(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
status = main(sys.argv[2:])
threads = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads
sys.exit(status)
"""


def tiny_volo(pretrained: bool = False, batch_norm: bool = True, **options) -> VOLO:
    model = VOLO((1, 1, 1, 1), (16, 32), (2, 2), stem_dim=8, **{"img_size": 32, "drop_path_rate": 0.2, **options})
    if not batch_norm:
        for index in (1, 4, 7):
            model.patch_embed.conv[index] = nn.Identity()
    model.pretrained_cfg = pretrained_config(input_size=(3, *model.img_size), crop_pct=0.875)
    return model


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments: object) -> str:
    """The last line that a refused command prints; it must have ended with 2."""
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1]
    return lines[-1]


def launch(folder: Path, *arguments: object, kill_at: int = 0, processes: int = 1) -> subprocess.CompletedProcess[str]:
    script = folder / "launcher.py"
    script.write_text(LAUNCHER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    return in_a_process(*torchrun, script, kill_at, *arguments)


def evaluate(*arguments: object) -> list[object]:
    return ["evaluate", *arguments, "--device", "cpu", "--batch", 2]


def finetune(images: Path, output: Path, *arguments: object) -> list[object]:
    fixed = ["--model", "tiny_volo", "--epochs", 2, "--batch", 4, "--lr", 1e-3, "--workers", 0, "--device", "cpu"]
    return ["finetune", images, "--output", output, *fixed, *arguments]


def log_of(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]
