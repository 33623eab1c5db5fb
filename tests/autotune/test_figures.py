"""The README's numbers come from committed files, and are those files' numbers."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from autotune import report
from autotune.figures import PUBLISHED, _predicted, count_model, sections, updated

ROOT = Path(__file__).parents[2]


def test_the_pages_are_up_to_date():
    for page, content in sections(ROOT / "notebooks" / "results").items():
        text = page.read_text()
        assert updated(text, content) == text, f"{page}: run `make figures`"


def shown_numbers(figure):
    """What a figure of the pages was drawn from."""
    if figure.name == "predicted.png":
        predicted = _predicted(ROOT / "notebooks" / "results")[0]
        return {"measured": json.loads(figure.with_name("kernels.json").read_text()), "predicted": predicted}
    return json.loads(figure.with_name("bench.json" if figure.name == "operators.png" else "profile.json").read_text())


def test_every_figure_of_the_pages_shows_the_committed_numbers():
    drawn = 0
    for page in (ROOT / "README.md", ROOT / "notebooks" / "results" / "README.md"):
        for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            path = page.parent / figure
            if path.name == "windows.png":  # shows no numbers
                assert path.exists()
                continue
            with Image.open(path) as picture:
                assert picture.info["Source"] == report.fingerprint(shown_numbers(path)), (
                    f"{figure}: run `make figures`"
                )
            drawn += 1
    assert drawn >= 5


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="section 'models' once, found 0 times"):
        updated("no markers", {"models": "table"})


@pytest.mark.parametrize("name", ["rednet26", "overlock_xt_reparam", "volo_d1"])
def test_counts_are_near_the_published_ones(name):
    parameters, operations = PUBLISHED[name]
    counted = count_model(name)
    assert counted["parameters_m"] == pytest.approx(parameters, rel=0.03)
    assert counted["multiply_adds_g"] == pytest.approx(operations, rel=0.05)
