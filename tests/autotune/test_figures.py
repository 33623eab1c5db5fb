"""The README's numbers come from committed files, and are those files' numbers."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from autotune import report
from autotune.figures import PUBLISHED, count_model, readme_sections, updated

ROOT = Path(__file__).parents[2]


def test_the_readme_is_up_to_date():
    text = (ROOT / "README.md").read_text()
    assert updated(text, readme_sections(ROOT / "notebooks" / "results")) == text, "run `make figures`"


def test_every_figure_of_the_readme_shows_the_committed_numbers():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert figures
    for figure in figures:
        record = json.loads((ROOT / figure).with_name("profile.json").read_text())
        with Image.open(ROOT / figure) as drawn:
            assert drawn.info["Source"] == report.fingerprint(record), f"{figure}: run `make figures`"


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="section 'models' once, found 0 times"):
        updated("no markers", {"models": "table"})


@pytest.mark.parametrize("name", ["rednet26", "overlock_xt_reparam", "volo_d1"])
def test_counts_are_near_the_published_ones(name):
    parameters, operations = PUBLISHED[name]
    counted = count_model(name)
    assert counted["parameters_m"] == pytest.approx(parameters, rel=0.03)
    assert counted["multiply_adds_g"] == pytest.approx(operations, rel=0.05)
