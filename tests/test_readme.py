"""Every block of the README runs when it is pasted alone, every command exists, every link leads somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from autotune.__main__ import COMMANDS as AUTOTUNE
from models.__main__ import COMMANDS as MODELS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "notebooks/README.md", "notebooks/results/README.md")]
README = PAGES[0].read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {index + 1}" for index in range(len(BLOCKS))])
def test_a_block_runs_alone(block, tmp_path, monkeypatch):
    if "import timm" in block:
        try:
            importlib.import_module("timm")
        except Exception as error:  # torchvision beside another torch raises RuntimeError
            pytest.skip(f"timm cannot be imported: {error}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_links_exist(page):
    text = page.read_text()
    for package, name in re.findall(r"python -m (models|autotune) ([a-z]+)", text):
        assert name in (MODELS if package == "models" else AUTOTUNE), f"python -m {package} {name}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`?\bmake ([a-z]+)\b(?=[` ])(?! sure)", " ".join(re.findall(r"`[^`]+`", text))):
        assert target in targets, f"make {target}"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_options_of_the_commands_exist(capsys):
    """Each command line of the README parses as far as its options' names."""
    from models.__main__ import main

    for line in re.findall(r"^(?:torchrun \S+ \S+ )?(?:python )?-m models (.*)$", README, re.MULTILINE):
        command, *rest = shlex.split(line)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = capsys.readouterr().out
        for option in (word for word in rest if word.startswith("--")):
            assert option in known, f"{command} {option}"
