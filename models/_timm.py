"""timm's registry, where timm is in use: every model of this package under its own name, by ``timm.create_model``.

Importing timm takes seconds and torchvision, so it is left to those who use it: the names enter its registry once
``timm.models`` has been imported, before this package or after it. A name that timm has itself stays timm's.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from models.checkpoints import load_checkpoint
from models.registry import entry_points

__all__ = ["register_with_timm"]

TIMM = "timm.models"
SOURCES = ("file", "hf_hub_id", "state_dict", "url")  # entries of a configuration that say where weights are


def register_with_timm() -> None:
    """Registers all models with timm: at once where it is imported already, else when that happens."""
    if TIMM in sys.modules:
        _register(sys.modules[TIMM])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Finds ``timm.models`` as Python would, and registers after its code has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == TIMM else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def _register(timm_models: ModuleType) -> None:
    for name, entry_point in entry_points().items():
        if not timm_models.is_model(name):
            timm_models.register_model(_as_timm_calls_it(timm_models, entry_point))


def _as_timm_calls_it(timm_models: ModuleType, entry_point: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``entry_point`` with the keyword arguments that timm's ``create_model`` and its scripts pass to every model."""
    name = entry_point.__name__

    @functools.wraps(entry_point)
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> nn.Module:
        if drop_rate:
            raise ValueError(f"drop_rate must be 0, got {drop_rate}: {name} has no dropout, only drop_path_rate")
        if global_pool not in ("", "avg"):
            raise ValueError(f"global_pool must be 'avg' for {name}, got {global_pool!r}")
        if isinstance(pretrained_cfg, str):
            raise ValueError(f"pretrained_cfg: {name} has no weights tagged {pretrained_cfg!r}, only the official ones")
        overrides = {**_overrides(timm_models, name, pretrained_cfg), **(pretrained_cfg_overlay or {})}
        elsewhere = any(overrides.get(source) for source in SOURCES)
        if pretrained and not elsewhere and cache_dir is not None:
            raise ValueError(f"cache_dir: {name} keeps official weights in torch.hub's folder; set TORCH_HOME instead")
        model: Any = entry_point(pretrained=pretrained and not elsewhere, **kwargs)
        model.return_plain_logits()  # all that timm's losses take
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": name, **overrides}
        if pretrained and overrides.get("file"):
            load_checkpoint(model, overrides["file"])
        elif pretrained and elsewhere:
            timm_models.load_pretrained(
                model,
                num_classes=model.num_classes,
                in_chans=model.in_chans,
                filter_fn=lambda state, model: model.adapt_state_dict(state),
                **({} if cache_dir is None else {"cache_dir": cache_dir}),
            )
        return model

    return create


def _overrides(timm_models: ModuleType, name: str, pretrained_cfg: Any) -> dict[str, Any]:
    """Entries of a given configuration that are not those registered: scripts pass the registered one back."""
    if pretrained_cfg is None:
        return {}
    given = pretrained_cfg if isinstance(pretrained_cfg, dict) else pretrained_cfg.to_dict()
    registered = timm_models.get_pretrained_cfg(name).to_dict(remove_null=False)
    return {key: value for key, value in given.items() if value != registered.get(key)}
