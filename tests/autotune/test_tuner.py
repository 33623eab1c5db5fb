"""Finding configs: candidates must agree before they are timed, and the fastest is kept."""

import pytest
import torch

import autotune
from autotune.tuner import disagreement, measure_candidates, tune
from kernels.tuning import choose
from kernels.tuning.choose import Request, key_of, look_up
from kernels.tuning.store import Store, user_folder
from tests.kernels.toy import BLOCKS, CPU, GPU, TOY, Config, Problem

pytestmark = pytest.mark.usefixtures("store_folders")


def _request(pixels=100, **keywords):
    x = torch.ones(pixels)
    return Request(TOY, Problem(pixels), CPU, (x,), keywords)


def _clock(fastest):
    """Stands in for a clock: times follow from the config, so that the test does not depend on the machine."""

    def time_call(call):
        return 1.0 + abs(call.__defaults__[0].block - fastest)

    return time_call


def test_the_fastest_right_candidate_wins_and_is_kept():
    outcomes = tune(_request(), _clock(fastest=32))
    assert outcomes[0].config.block == 32
    assert {outcome.config.block for outcome in outcomes} == {8, 16, 32, 64}  # 128 is not valid here
    assert look_up(TOY, Problem(100), GPU) == (Config(32), "store")
    choose.forget()  # as a new process would
    assert look_up(TOY, Problem(100), GPU) == (Config(32), "store")
    entry = Store(user_folder(), GPU).read()[key_of(TOY, Problem(100))]
    assert entry["milliseconds"] == 1.0
    assert entry["heuristic_milliseconds"] == 17.0


def test_a_wrong_or_failing_candidate_is_never_chosen():
    outcomes = measure_candidates(_request(wrong=(32,), broken=(64,)), _clock(fastest=32))
    assert outcomes[0].config.block == 16
    reasons = {o.config.block: o.rejected for o in outcomes if o.rejected}
    assert set(reasons) == {32, 64}
    assert "off by 1.0e+00" in str(reasons[32])
    assert "out of resource" in str(reasons[64])


def test_nan_never_agrees():
    assert disagreement(torch.tensor([1.0, float("nan")]), torch.ones(2))
    assert disagreement([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.full((2,), 1.001)])
    assert disagreement(torch.ones(2), torch.ones(2)) is None


def test_nothing_is_kept_when_every_candidate_is_wrong():
    with pytest.warns(RuntimeWarning, match="no config of toy pixels=100"):
        outcomes = tune(_request(wrong=BLOCKS), _clock(8))
    assert outcomes[0].config == Config(16)  # the heuristic's
    assert look_up(TOY, Problem(100), GPU).source == "heuristic"


def test_nothing_is_tuned_unasked_nor_without_a_gpu():
    x = torch.ones(100)
    assert TOY.choose(x, broken=BLOCKS) == Config(16)
    with autotune.tuning():
        assert TOY.choose(x, broken=BLOCKS) == Config(16)


def test_inside_tuning_a_problem_without_an_entry_is_tuned(monkeypatch):
    """On a GPU a problem is tuned when it is met inside, though not while a graph is captured."""
    device, capturing = torch.device("cuda", 0), [False]
    monkeypatch.setattr(choose, "gpu_name", lambda device: "GPU")
    monkeypatch.setattr(choose, "_device_of", lambda arguments: device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr("autotune.tuner.gpu_name", lambda device: "GPU")
    monkeypatch.setattr("autotune.tuner.tune", lambda request: tune(request, _clock(fastest=64)))
    assert TOY.choose(torch.ones(100)) == Config(16)
    with autotune.tuning():
        capturing[0] = True
        assert TOY.choose(torch.ones(100)) == Config(16)
        capturing[0] = False
        assert TOY.choose(torch.ones(100)) == Config(64)
    assert TOY.choose(torch.ones(100)) == Config(64)
    assert TOY.choose(torch.ones(90)) == Config(16)
