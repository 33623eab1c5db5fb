"""Every block of the README runs when it is pasted alone, every command exists, every link leads somewhere."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import autotune.__main__
import models.__main__

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "notebooks/README.md", "notebooks/results/README.md")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PACKAGES = {"models": models.__main__, "autotune": autotune.__main__}
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
        assert name in PACKAGES[package].COMMANDS, f"python -m {package} {name}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`?\bmake ([a-z]+)\b(?=[` ])(?! sure)", " ".join(re.findall(r"`[^`]+`", text))):
        assert target in targets, f"make {target}"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_options_of_the_commands_exist(page, capsys):
    """Each command line of a page or a notebook parses as far as its options' names."""
    for package, command, rest in re.findall(r"-m (models|autotune) ([a-z]+)([^`\n\"\\]*)", page.read_text()):
        with pytest.raises(SystemExit):
            PACKAGES[package].main([command, "--help"])
        given, known = (set(re.findall(r"--[a-z-]+", text)) for text in (rest, capsys.readouterr().out))
        assert given <= known, f"{command}: {given - known}"
