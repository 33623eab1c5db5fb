"""Every block of the pages runs when it is pasted alone, every command exists, every link leads somewhere."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import autotune.__main__
import kernels
import models.__main__
from tests.kernels.operators import OPERATOR

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "models", "notebooks", "notebooks/results", "notebooks/results/predicted")
NAMES = (*(f"{folder}/README.md".lstrip("/") for folder in FOLDERS), "CONTRIBUTING.md")
PAGES = [ROOT / name for name in NAMES]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PACKAGES = {"models": models.__main__, "autotune": autotune.__main__}
BLOCKS = [
    pytest.param(block, id=f"{name}, block {index}")
    for name, page in zip(NAMES, PAGES, strict=True)
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs_alone(block, tmp_path, monkeypatch):
    if "import timm" in block:
        try:
            importlib.import_module("timm")
        except Exception as error:  # torchvision beside another torch raises RuntimeError
            pytest.skip(f"timm cannot be imported: {error}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "a page", "exec"), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_their_options_and_links_exist(page, capsys):
    """Each command line of a page or a notebook parses as far as its options' names."""
    text = page.read_text()
    for package, command, rest in re.findall(r"-m (models|autotune) ([a-z]+)([^`\n\"\\]*)", text):
        with pytest.raises(SystemExit) as ended:
            PACKAGES[package].main([command, "--help"])
        assert ended.value.code == 0, f"python -m {package} {command}"
        given, known = (set(re.findall(r"--[a-z-]+", text)) for text in (rest, capsys.readouterr().out))
        assert given <= known, f"{command}: {given - known}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`?\bmake ([a-z]+)\b(?=[` ])(?! sure)", " ".join(re.findall(r"`[^`]+`", text))):
        assert target in targets, f"make {target}"
    for link, heading in re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
            titles = re.findall("^#+ (.*)$", (page.parent / link).read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], f"{link}#{heading}"


def test_the_files_that_contributing_names_exist_and_readme_has_a_row_for_every_operator():
    files = [f"/{path.relative_to(ROOT)}" for path in ROOT.glob("[!.]*/**/*") if path.suffix in (".py", ".json")]
    for name in set(re.findall(r"`([\w/]+\.(?:py|json))`", PAGES[-1].read_text())):
        assert any(file.endswith(f"/{name}") for file in files), name
    table = PAGES[0].read_text().partition("\n## Operators\n")[2].partition("\n## ")[0]
    operators = set(kernels.__all__) & set(dir(kernels.reference))
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == operators == set(OPERATOR)
