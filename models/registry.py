"""Names of all models, and the one function that builds any of them."""

import difflib
import fnmatch
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from models._contract import BackboneContract
from models.checkpoints import load_checkpoint, local_file
from models.checks import flag
from models.inference import optimize_for_inference
from models.metadata import read_metadata

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])
Model = TypeVar("Model", bound=BackboneContract)


class Published(NamedTuple):
    """What a paper says of a model: millions of parameters, G multiply-adds at 224², % top-1 on ImageNet-1k."""

    parameters_m: float
    multiply_adds_g: float | None
    top1: float

    def __str__(self) -> str:
        work = "" if self.multiply_adds_g is None else f"{self.multiply_adds_g:g} G multiply-adds at 224², "
        return f"{self.parameters_m:g} M parameters, {work}{self.top1:g} % top-1 on ImageNet"


entry_points: dict[str, Callable[..., nn.Module]] = {}


def all_models() -> dict[str, Callable[..., nn.Module]]:
    """Name -> entry point of every model, the families' own and those that somebody registered besides."""
    from models import overlock, rednet, volo  # noqa: F401  (register their entry points)

    return entry_points


def families() -> dict[str, list[Any]]:
    """Class name of each family, in alphabetical order -> the functions of its variants, the smallest first."""
    found: dict[str, list[Any]] = {}
    for build in all_models().values():
        if hasattr(build, "family"):
            found.setdefault(build.family.__name__, []).append(build)
    return dict(sorted(found.items()))


def _enter(build: EntryPoint) -> EntryPoint:
    name = build.__name__
    if name in entry_points:
        raise ValueError(f"register_model: {name!r} is already registered by {entry_points[name].__module__}")
    entry_points[name] = build
    return build


def register_model(build: EntryPoint) -> EntryPoint:
    """Adds a function to the registry under its own name and returns it unchanged. ValueError: the name is taken."""
    all_models()  # whose names are taken, imported yet or not
    return _enter(build)


def variant(
    family: type[Model],
    name: str,
    title: str,
    options: dict[str, Any],
    config: dict[str, Any],
    config_of: Callable[[Model], dict[str, Any]] | None = None,
    published: Published | None = None,
) -> Callable[..., Model]:
    """Registers and returns the function ``name(pretrained=False, **kwargs)``: ``family(**options | kwargs)``.

    ``config``, or what ``config_of`` makes of the model, is its ``pretrained_cfg``; with ``pretrained`` its weights are
    loaded. The family's module keeps ``config`` in ``default_cfgs``, where timm looks for it; the function itself knows
    its ``family``, ``title`` and what is ``published``, of which README and ``python -m models list`` tell.
    """

    def build(pretrained: bool = False, **kwargs: Any) -> Model:
        flag("pretrained", pretrained)
        model = family(**{**options, **kwargs})
        model.pretrained_cfg = dict(config if config_of is None else config_of(model))
        if pretrained and not model.pretrained_cfg["url"]:
            raise ValueError(f"pretrained: {name} has no official weights to download; give their file as checkpoint")
        if pretrained:
            load_checkpoint(model, model.pretrained_cfg["url"])
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__, build.__doc__ = family.__module__, f"{title}{'' if published is None else f': {published}'}."
    vars(build).update(family=family, title=title, published=published)
    vars(sys.modules[family.__module__]).setdefault("default_cfgs", {})[name] = config
    return _enter(build)


def entry_point(name: str, argument: str = "name") -> Callable[..., nn.Module]:
    """The function that builds the model of this name. The error, which names ``argument``, offers close names."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a str such as 'rednet50', got {type(name).__name__}")
    known = all_models()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(list_models())}"
        raise ValueError(f"{argument}: no model is named {name!r}; {hint}")
    return known[name]


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell pattern, in natural order (``rednet50`` before ``rednet101``).

    Args:
        pattern: as in ``fnmatch``, for example ``"overlock_*_reparam"``; case matters.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: expected a str such as 'rednet*', got {type(pattern).__name__}")
    names = (name for name in all_models() if fnmatch.fnmatchcase(name, pattern))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    inference: bool = False,
    use_ema: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model by name.

    Args:
        name: one of ``list_models()``.
        pretrained: load the official ImageNet weights, where they can be downloaded.
        checkpoint: a weight file (path or URL) to load instead, see ``load_checkpoint``. What the file says of its
            model, such as its number of classes, replaces keyword arguments that are not given.
        inference: return the model's inference form, see ``optimize_for_inference``.
        use_ema: take the checkpoint's averaged weights where it has both, see ``load_checkpoint``.
        **kwargs: passed on to the entry point: num_classes, in_chans, drop_path_rate, features_only, out_indices, ...

    Raises:
        ValueError: an unknown name (the message offers close ones), or pretrained and checkpoint both given.
    """
    build = entry_point(name)
    flag("inference", inference)
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint must be a str or a path, got {checkpoint!r}")
    if flag("pretrained", pretrained) and checkpoint is not None:
        raise ValueError(f"pretrained and checkpoint: expected at most one, got pretrained=True and {checkpoint!r}")
    if checkpoint is not None:
        checkpoint = local_file(checkpoint)
        metadata = read_metadata(checkpoint)
        kwargs = ({} if metadata is None else metadata.options()) | kwargs
    model = build(pretrained=pretrained, **kwargs)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, use_ema=use_ema)
    return optimize_for_inference(model.eval()) if inference else model
