"""Names, patterns and loading by ``create_model``; every argument that a model refuses, by its name."""

import functools
import inspect

import numpy as np
import pytest
import torch

import models
from models import registry
from tests.models.families import FAMILIES, FAMILY, by_family, narrow
from tests.support import in_a_process, official_state_dicts


def test_every_official_variant_is_listed_in_natural_order():
    assert set(models.list_models()) == set(official_state_dicts()) - {"overlock_t_dense"}
    numbers = [int(name.removeprefix("rednet")) for name in models.list_models("rednet*")]
    assert numbers == sorted({26, 38, 50, 101, 152, *numbers})
    assert models.list_models("RedNet*") == []
    assert models.rednet.rednet50.__module__ == "models.rednet"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "rednet51"}, ValueError, "^name: no model is named 'rednet51'; did you mean 'rednet50'"),
        ({"name": "VOLO_D1"}, ValueError, "did you mean 'volo_d1'"),
        ({"name": "zzz"}, ValueError, "known:.*rednet50"),
        ({"name": 50}, TypeError, "name.*str.*int"),
        ({"name": "rednet26", "pretrained": True, "checkpoint": "x.pth"}, ValueError, r"pretrained and checkpoint"),
        ({"name": "rednet26", "pretrained": True}, ValueError, "pretrained.*file as checkpoint"),
        ({"name": "rednet26", "checkpoint": "/nowhere/x.pth"}, FileNotFoundError, r"/nowhere/x\.pth"),
        ({"name": "rednet26", "window": 3}, TypeError, "window"),
        ({"name": "rednet26", "img_size": 224}, TypeError, "img_size"),
        ({"name": "overlock_t", "context_skip": False}, ValueError, "context_skip=False needs features_only=True"),
        ({"name": "overlock_t", "sub_num_heads": (5, 8)}, ValueError, r"embed_dim\[2\] must .* 4·sub_num_heads\[0\]"),
        ({"name": "volo_d1", "layers": (1, 1, 1)}, ValueError, "layers"),
        ({"name": "volo_d1", "num_heads": (3, 5)}, ValueError, "num_heads"),
        *(
            ({"name": name, **options}, ValueError, "out_indices")
            for name in ("overlock_t", "rednet50", "volo_d1")
            for options in ({"out_indices": (0, 1)}, {"features_only": True, "out_indices": (0, 4)})
        ),
    ],
)  # fmt: skip
def test_create_model_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        models.create_model(**arguments)


WRONG = (
    "x", 1.5, -1, 10**9, None, [], (1.5,), ("a", "b"), {}, object(), float("nan"), True, (1, 2, 3, 4, 5),
    np.float32(0.5),
)  # fmt: skip
ACCEPTED = {  # values among these that an argument accepts
    "out_indices": (None,),
    "drop_path_rate": (np.float32(0.5),),
    "mlp_ratio": (1.5, np.float32(0.5)),
    **dict.fromkeys(("pretrained", "features_only", "reparam", "return_dense", "mix_token", "context_skip"), (True,)),
}


def arguments_of(family: str) -> list[str]:
    member = type(FAMILY[family].build())
    return ["pretrained", *(argument for argument in inspect.signature(member).parameters if argument != "self")]


@pytest.mark.parametrize(
    ("family", "argument"), [(family, argument) for family in FAMILIES for argument in arguments_of(family)]
)
def test_every_argument_is_refused_by_name(family, argument):
    """Values of another type or out of range are refused before anything is built."""
    features = {"features_only": True} if argument in ("out_indices", "context_skip") else {}
    for value in WRONG:
        if repr(value) in map(repr, ACCEPTED.get(argument, ())):
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b"):
            models.create_model(FAMILY[family].smallest, **{**features, argument: value})


@by_family
def test_numbers_of_other_libraries_are_numbers(family):
    options = {"features_only": np.bool_(True), "out_indices": np.array([0, 2]), "in_chans": np.int32(1)}
    model = narrow(family, **options, **({"img_size": np.int64(96)} if family == "volo" else {}))
    assert model.out_indices == [0, 2]
    assert len(model(torch.zeros(1, 1, 64, 64))) == 2


@by_family
def test_calls_refuse_by_name(family):
    model, x = narrow(family), torch.zeros(1, 3, 64, 64)
    for wrong in (None, "x", [x], x.to_sparse(), x.to(torch.complex64)):
        with pytest.raises((TypeError, ValueError), match=r"^x must be"):
            model(wrong)
    shapes = ((3, 64, 64), (1, 4, 64, 64), (1, 3, 64, 31))
    for wrong, kind in [(torch.zeros(s), ValueError) for s in shapes] + [(x.to(torch.uint8), TypeError)]:
        for training in (False, True):
            with pytest.raises(kind, match=r"^x must"):
                model.train(training)(wrong)
    with pytest.raises(ValueError, match=r"^x must have shape \[B, 3, H, W\], got \[1, 4, 64, 64\]$"):
        model(torch.zeros(1, 4, 64, 64))
    assert model.eval()(x[:0]).shape == (0, 5)
    intermediates = functools.partial(model.forward_intermediates, x)
    for call, name, values in (
        (intermediates, "indices", ("x", (1.5,), [9])),
        (intermediates, "stop_early", ("no",)),
        (intermediates, "norm", (3,)),
        (model.reset_classifier, "num_classes", ("x", 1.5, -1, None, True)),
        (model.set_grad_checkpointing, "enable", ("yes",)),
    ):
        for wrong in values:
            with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
                call(**{name: wrong})
    with pytest.raises(TypeError, match=r"pattern.*str.*list"):
        models.list_models(["rednet*"])  # pyright: ignore[reportArgumentType]


def test_a_name_is_registered_once():
    def rednet50(pretrained: bool = False):
        return torch.nn.Identity()

    with pytest.raises(ValueError, match=r"'rednet50' is already registered by models\.rednet"):
        registry.register_model(rednet50)


def test_a_package_that_brings_nothing_yet_knows_all_its_names():
    """Whatever is asked for first, its modules too, and a family's name is taken before the family is imported."""
    assert set(models.__all__) <= set(dir(models))
    assert all(callable(getattr(models, name)) for name in models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = models.nothing
    code = """
import sys, models
assert "torch" not in sys.modules
def rednet50(): ...
for first in ("from models.registry import register_model; register_model(rednet50)", "models.volo.volo_d1(depth=1)"):
    try:
        exec(first)
    except (TypeError, ValueError) as error:
        print(error)
print(len(models.list_models()))
"""
    done = in_a_process("-c", code)
    assert done.returncode == 0, done.stderr
    refused, unknown, number = done.stdout.splitlines()
    assert refused == "register_model: 'rednet50' is already registered by models.rednet"
    assert "depth" in unknown
    assert int(number) == len(models.list_models())
