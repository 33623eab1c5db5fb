"""The table of families: a narrow member of each, and what is known of the published ones. A new family is one row."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models import create_model
from models.overlock import OverLoCK
from models.rednet import RedNet
from models.volo import VOLO
from tests.support import DEVICE, golden_fill, random_tensor


class Family(NamedTuple):
    """What the tests know of a family; ``build`` makes a member with one block of every kind."""

    build: Callable[..., Any]
    smallest: str  # of the published variants
    operator: str  # of this package, that its inference form exports
    goldens: tuple[tuple[str, str], ...]  # file, and backend or "inference" for that form
    groups: tuple[str, ...]  # beginnings of parameters' names, in order of depth
    group_counts: tuple[int, int]  # coarse and fine groups, without the classifier's
    undecayed: tuple[str, ...] = ()
    addresses: dict[tuple[str, Any], str] = {}  # noqa: RUF012  (variant, image size -> address of the weights)
    deep: dict[str, Any] = {}  # noqa: RUF012  (options with which a member has all four stages)
    # In training, of 3 images of 64x96 pixels, with 5 classes and with none; where there is more than logits.
    returned: tuple[list[tuple[int, ...]], ...] = ()
    norms: str = ""  # pattern for the names of batch norms that the inference form keeps


def _overlock(**options: Any) -> OverLoCK:
    structure = {"depth": (1, 0, 0, 1), "sub_depth": (1, 1), "embed_dim": (8, 8, 16, 16), "sub_num_heads": (1, 2)}
    return OverLoCK(**{**structure, **options})


def _volo(**options: Any) -> VOLO:
    structure = {"layers": (1, 1, 1, 1), "embed_dims": (12, 24), "num_heads": (3, 4), "stem_dim": 8, "img_size": 64}
    return VOLO(**{**structure, "mix_token": False, **options})


OVERLOCK = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"
VOLOS = "https://github.com/sail-sg/volo/releases/download/volo_1/"

FAMILY = {
    "overlock": Family(
        _overlock,
        "overlock_xt",
        "contmix",
        (
            ("overlock_xt_224x224", "eager"),
            ("overlock_xt_256x192", "eager"),
            ("overlock_xt_256x192", "triton"),
            ("overlock_xt_256x192", "inference"),
            ("overlock_xt_reparam_224x224", "eager"),
            ("overlock_xt_reparam_224x224", "reference"),
        ),
        (
            "patch_embed1.0.weight", "patch_embed2.0.weight", "blocks2.1.dwconv.weight", "patch_embed3.0.weight",
            "blocks3.2.ls.bias", "patch_embed4.0.weight", "high_level_proj.weight", "sub_blocks3.5.rpb1",
            "patch_embedx.x_proj.0.weight", "sub_blocks4.1.rpb2", "head.0.weight",
        ),
        (7, 18),
        ("sub_blocks3.0.rpb1", "blocks3.0.ls.weight", "blocks1.0.proj.7.gamma", "sub_blocks4.1.ls2.weight"),
        {
            ("overlock_xt", None): OVERLOCK + "overlock_xt_in1k_224.pth",
            ("overlock_s_reparam", None): OVERLOCK + "overlock_s_in1k_224_reparam.pth",
        },
        returned=([(3, 5), (3, 5)], [(3, 1024), (3, 16)]),
    ),
    "rednet": Family(
        lambda **options: RedNet(**{"depths": (1, 1, 0, 0), **options}),
        "rednet26",
        "involution_generate",
        tuple(("rednet26_224x224", backend) for backend in ("auto", "reference", "triton", "inference")),
        ("stem.0.conv.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer2.1.conv1.weight", "head."),
        (5, 9),
        deep={"depths": (1, 1, 1, 1)},
        norms=r"stem\.2",  # after an involution
    ),
    "volo": Family(
        _volo,
        "volo_d1",
        "outlook",
        tuple(("volo_d1_224x224", backend) for backend in ("auto", "reference", "triton", "inference")),
        (
            "patch_embed.", "network.0.0.", "network.0.1.", "network.1.", "network.2.0.", "network.3.0.",
            "network.4.0.", "post_network.0.", "post_network.1.", "norm.", "head.",
        ),
        (8, 23),
        ("pos_embed", "cls_token"),
        {
            ("volo_d1", None): VOLOS + "d1_224_84.2.pth.tar",
            ("volo_d5", 512): VOLOS + "d5_512_87.07.pth.tar",
            ("volo_d4", (448, 320)): VOLOS + "d4_224_85.7.pth.tar",
        },
        returned=([(3, 5), (3, 24, 5), (4,)], [(3, 24), (3, 24, 24), (4,)]),
    ),
}  # fmt: skip
FAMILIES = tuple(FAMILY)
by_family = pytest.mark.parametrize("family", FAMILIES)
SHALLOW = {"overlock": {"depth": (1, 0, 0, 0), "sub_depth": (1, 0)}, "rednet": {"depths": (1, 0, 0, 0)}}


def official_name(model: object, name: str) -> str:
    """The entry's name in the official files, from which the golden parameters are made."""
    return f"backbone.{name}" if isinstance(model, RedNet) and not name.startswith("head.") else name


def fill(model: Any) -> Any:
    """The model in evaluation mode with parameters like trained ones, so that nothing is symmetric by accident."""
    return golden_fill().fill_(model, lambda name: official_name(model, name)).eval()


_members: dict[str, Any] = {}


def narrow(family: str, **options: Any) -> Any:
    """A narrow member of the family with every kind of block that it has; built once, a copy for each caller."""
    key = f"{family} {options!r}"
    if key not in _members:
        with torch.random.fork_rng():  # the first caller draws what the others do
            _members[key] = fill(FAMILY[family].build(**{"num_classes": 5, **options}))
    return copy.deepcopy(_members[key])


def deep(family: str, **options: Any) -> Any:
    """A narrow member with all four stages."""
    return narrow(family, **FAMILY[family].deep, **options)


def on_meta(name: str, **options: Any) -> Any:
    """The model on the meta device: shapes without memory or random numbers."""
    with torch.device("meta"):
        return create_model(name, **options)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every entry, by its official name."""
    return {official_name(model, name): list(tensor.shape) for name, tensor in model.state_dict().items()}


def images(*size: int, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images; equal sizes get equal numbers."""
    return random_tensor(*size, seed=sum(size), device=device, dtype=dtype)


def outputs(out: Any) -> list[Tensor]:
    """Everything that a model returned, in training or not."""
    return list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, tuple | list) else [out]


def loss_of(model: Any, x: Tensor) -> Tensor:
    """One number that depends on everything that a model returns."""
    return torch.stack([out.square().mean() for out in outputs(model(x)) if out.is_floating_point()]).sum()


def with_fixed_statistics(model: Any) -> Any:
    """Lets batch norms use their running statistics: in each of two processes they would see half a batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def in_training(family: str, **options: Any) -> Any:
    return with_fixed_statistics(narrow(family, **options).train())
