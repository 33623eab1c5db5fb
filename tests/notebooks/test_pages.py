"""What the pages show: the committed numbers, and those of a small folder of results that are easy to follow."""

import json
import re
from typing import Any

import pytest
from PIL import Image

from autotune import report
from notebooks.results import figures, pages
from notebooks.results.folder import folders
from tests.notebooks.rows import model_row, operator_row

MACHINE = {"device": "NVIDIA H200", "device_type": "cuda", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0"}
MACHINE |= {"commit": "0123456789abcdef", "date": "2030-01-02T03:04:05+00:00"}


def counter_row(time, share):
    row = {"case": "av.14", "pass": "forward", "kernel": "_mix_kernel", "microseconds": time, "registers": 254}
    row |= {"warps_per_scheduler": 1.9, "occupancy_percent": 11.9, "issue_slots_percent": share}
    return row | {"l1_percent": 40.0, "l2_percent": 30.0, "dram_percent": 10.0}


def host(*microseconds):
    return dict(zip(("direct", "configured", "tuned", "operator"), microseconds, strict=True))


SKIPPED = {"name": "x", "operator": "depthwise_conv2d", "pass": "forward", "status": "skipped", "message": "late"}
THEIRS = {"void at::native::reduce_kernel": 7.0, "sm80_xmma_gemm_kernel": 2.0, "nvjet_sm90_tst_kernel": 3.0}
LAUNCHED = {
    "forward": {"_mix_kernel": 40.0},
    "backward": {"_correlate_kernel": 60.0, **THEIRS, "Memset (Device)": 1.0},
}
TIMES = {"copy_bytes_per_second": 4.2e12, "bf16_operations_per_second": 680e12, "fp32_operations_per_second": 51e12}
OPERATORS = [
    operator_row("forward", {"ours": 0.3, "naive": 5.0}, {"ours": 0.05, "naive": 4.0, "compiled": 0.5}),
    operator_row("forward+backward", {"ours": 2.0, "naive": 16.0, "compiled": 1.0}),
    SKIPPED,
]
THEN = {("av.14", "forward"): 20.0, ("av.14", "backward"): 50.0}  # predictions for the code that was measured
KERNELS = [
    {
        "case": case,
        "pass": kind,
        "predicted_microseconds": THEN.get((case, kind)),
        "kernels": [{"kernel": name, "microseconds": time} for name, time in found.items()],
    }
    for case in ("av.14", "qk.14")
    for kind, found in LAUNCHED.items()
]
RECORDS = {
    "environment.json": {"machine": MACHINE, "ceilings": TIMES, "launch_microseconds": host(20.0, 40.0, 45.0, 90.0)},
    "bench.json": {"machine": MACHINE, "rows": OPERATORS},
    "models.json": {
        "rows": [
            model_row(ours=(1500.4, 100), naive=(500.0, 250)),
            {"name": "net", "pass": "training", "status": "skipped"},
        ]
    },
    "tests.json": {"complete": False, "counts": {"passed": 7, "failed": 1, "skipped": 2}, "failures": ["a"]},
    "kernels.json": {"rows": [*KERNELS, {"case": "contmix.7", "failed": "out of memory"}]},
    "ncu.json": {
        "machine": MACHINE | {"date": "2030-01-01T01:02:03+00:00"},
        "launch_microseconds": host(10.0, 20.0, 25.0, 70.0),
        "rows": [counter_row(39.0, 55.0), counter_row(41.0, 60.0)],
    },
}
PREDICTED_ROW = {"case": "av.14", "launches": 1, "floor_microseconds": 10.0, "bound_by": "mix_kernel: issue"}
PREDICTED = {
    "triton": "3.7.1",
    "rows": [
        PREDICTED_ROW | {"pass": kind, "microseconds": time} for kind, time in (("forward", 15.0), ("backward", 45.0))
    ],
}


@pytest.fixture
def folder(tmp_path):
    for name, record in RECORDS.items():
        path = tmp_path / "NVIDIA_H200" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    cpu = tmp_path / "cpu" / "environment.json"
    cpu.parent.mkdir()
    cpu.write_text(json.dumps({"machine": {"device_type": "cpu"}}))
    (found,) = folders(tmp_path)
    return found


def test_the_pages_are_up_to_date():
    for page, content in figures.sections().items():
        text = page.read_text()
        assert figures.updated(text, content) == text, f"{page}: run `make figures`"
    with pytest.raises(ValueError, match="section 'models' once, found 0 times"):
        figures.updated("no markers", {"models": "table"})


def shown_numbers(figure):
    """What a figure of the pages was drawn from."""
    if figure.name == "predicted.png":
        return {"measured": figures.load(figure.with_name("kernels.json")), "predicted": figures.predictions()[0]}
    return figures.load(figure.with_name("bench.json" if figure.name == "operators.png" else "profile.json"))


def test_every_figure_of_the_pages_shows_the_committed_numbers():
    drawn = 0
    for page in (figures.ROOT / "README.md", figures.RESULTS / "README.md"):
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


PUBLISHED = figures.load(figures.RESULTS / "published.json")
KNOWN: dict[str, Any] = {"overlock": {"rel": 0.05}, "rednet": {"abs": 0.005}, "volo": {"abs": 0.05}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_committed_and_the_published_ones(name):
    """Multiply-adds to 5 %, parameters as nearly as the papers say them."""
    published, counted = PUBLISHED[name], figures.count_model(name)
    assert counted == pytest.approx(figures.load(figures.RESULTS / "models.json")[name])
    known = KNOWN[re.split(r"\d|_", name)[0]]
    assert counted["parameters_m"] == pytest.approx(published["parameters_m"], **known)
    if published["multiply_adds_g"] is not None:
        assert counted["multiply_adds_g"] == pytest.approx(published["multiply_adds_g"], rel=0.05)


@pytest.mark.parametrize(
    ("section", "shown", "not_shown"),
    [
        (
            "gpu",
            [
                "**NVIDIA H200**, driver 580.1, torch 2.11.0, triton 3.6.0, commit 0123456789ab, 2030-01-02",
                "a copy moves 4.20 TB/s, a bfloat16 matrix product reaches 680 TFLOP/s and float32 arithmetic 51.0",
                "2 of 3 rows of operators and 1 of 2 rows of models",
                "it had no time to compare `depthwise_conv2d` with anything.",
                "7 passed, 1 failed, 2 skipped before their time was over",
            ],
            ["names a commit"],
        ),
        (  # the GPU's time where a call was captured, and like compared with like
            "gpu operators",
            [
                "| forward | 50.0 | 40.0 | 300 | 10.0 | 20% | 4,000 (80.0×) | 500 (10.0×) | – |",
                "| forward+backward | – | 113 | 2,000 | 10.0 | 0.50% | 16,000 (8.00×) | 1,000 (0.50×) | – |",
                "The host bounds 1 of 1 eager forward calls, which take at least 2 times as long as their work on the "
                "GPU: `na2d_av` 8×16@14² K=13.",
                "The host bounds 1 of 1 eager forward+backward calls",
            ],
            ["skipped"],
        ),
        ("gpu models", ["| `net` | 224×192 | inference | 64 | 1,500 | 500 | 3.00× | 2.50× |"], ["training"]),
        ("gpu host", ["| 2030-01-01 01:02 | 10 | 20 | 25 | 70 |\n| 2030-01-02 03:04 | 20 | 40 | 45 | 90 |"], []),
        (
            "predicted",
            [
                "Our kernels took 1.20 to 2.00 times as long as predicted, 1.60 times in the median; 1 of",
                "| av.14 | forward | mix: issue | 1 | 10.0 | 15.0 | 40.0 | 2.00 | 40.0 |",
                "| av.14 | backward | mix: issue | 1 | 10.0 | 45.0 | 60.0 | 1.20 | 73.0 |",
            ],
            ["qk.14"],
        ),
        ("gpu kernels", ["| qk.14 | 40.0 | 40.0 | 60.0 | 73.0 |"], ["av.14"]),
        (
            "gpu counters",
            [
                "| av.14 | forward | mix | 41.0 | 254 | 1.9 | 12% | 60% | 40% | 30% | 10% |",
                "with at least 200 registers per thread have 1.9 warps per scheduler",
                "issue in 55 to 60 % (av) of the cycles",
            ],
            ["39.0"],
        ),
    ],
)
def test_a_section_says_what_the_files_hold(folder, section, shown, not_shown):
    text = pages.sections([folder], [PREDICTED])[section]
    assert [line for line in shown if line not in text] == []
    assert [word for word in not_shown if word in text] == []


def test_a_call_that_keeps_the_gpu_busy_is_not_bound_by_the_host(folder):
    folder.operators = [operator_row("forward", {"ours": 0.09, "naive": 5.0}, {"ours": 0.05, "naive": 4.0})]
    assert "The host bounds" not in pages.sections([folder], [])["gpu operators"]


def test_only_a_batch_of_128_has_the_kernels_times_beside_it(folder):
    assert folder.beside(operator_row("forward", {"ours": 1.0})) == 40
    assert folder.beside(operator_row("forward", {"ours": 1.0}, batch=2)) is None
    assert folder.beside(operator_row("forward", {"ours": 1.0}, shape="8×16@50×80 K=13")) is None


def test_the_readmes_table_and_where_ours_loses(folder):
    text = pages.readme([folder])
    assert "| `na2d_av` | M 8×16@14² K=13 | 50.0 | 80.0× | 10.0× | 2.00 | 8.00× | 0.50× |" in text
    assert "At 1 of 1 shapes the eager forward+backward call is slower than the compiled form" in text
    assert "Over all 2 rows that there was time for (of 3)" in text
    assert "There was no time to compare `depthwise_conv2d` with anything." in text
    assert "`net`, inference at batch 64: 1,500 images per second, 500 on the naive path (3.00×)." in text


def test_predictions_stand_alone_where_nothing_was_measured():
    text = pages.sections([], [PREDICTED])["predicted"]
    assert "| av.14 | forward | mix: issue | 1 | 10.0 | 15.0 | – | – | – |" in text
    assert "times as long" not in text


def test_tuned_configs_beside_the_heuristics():
    def entry(heuristic, tuned):
        return {"config": {"rows": 4, "num_warps": 2}, "heuristic_milliseconds": heuristic, "milliseconds": tuned}

    entries = {"sum rows=7 dtype=bfloat16": entry(0.03, 0.02), "sum rows=14 dtype=bfloat16": entry(0.05, 0.05)}
    text = figures._tuned_table({"gpu": "G", "entries": entries | {"mix rows=7 dtype=bfloat16": entry(0.04, 0.02)}})
    for line in (
        "G: 3 problems; tuning gains 1.50× in the median and 2.00× at most, and keeps the heuristic's config in 1.",
        "| `sum` | rows=7 | rows=4 num_warps=2 | 30.0 | 20.0 | 1.50× |",
        "| `mix` | rows=7 dtype=bfloat16 | rows=4 num_warps=2 | 40.0 | 20.0 | 2.00× |",
    ):
        assert line in text


def test_figures_show_every_contender_and_name_their_numbers(folder):
    drawn = pages.figures(folder, [PREDICTED])
    assert set(drawn) == {"operators.png", "predicted.png"}
    figure, source = drawn["operators.png"]
    assert source == report.fingerprint(RECORDS["bench.json"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["memory floor", "ours", "naive", "naive, compiled"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["10×", "na2d_av"]  # 500 µs compiled against 50
    figure, _ = drawn["predicted.png"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["memory floor", "predicted", "measured"]
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["2.0×", "1.2×"]
    folder.operators = [SKIPPED]
    folder.launched.clear()
    assert pages.figures(folder, [PREDICTED]) == {}, "there is no figure of what was not measured"
