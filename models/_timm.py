"""timm's registry: every model of this package under its own name, by ``timm.create_model``."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from models._contract import BackboneContract
from models.checkpoints import load_checkpoint
from models.checks import one_of
from models.registry import all_models

SOURCES = ("file", "hf_hub_id", "state_dict", "url")  # entries of a configuration that name weights


def register_with_timm() -> None:
    """Enters every model into timm's registry, except under names that timm already has.

    Importing timm takes seconds and needs torchvision, so ``import models`` does not import it. Where timm was imported
    before, ``import models`` calls this function itself.

    timm's own requirements may replace the installed torch. ``pip install --no-deps timm huggingface_hub safetensors
    pyyaml`` leaves it alone; torchvision must come from the same index as torch, or its import fails with ``operator
    torchvision::nms does not exist``.

    Raises:
        ImportError: timm, or what it needs, is not installed.
    """
    import timm.models  # pyright: ignore[reportMissingImports]

    for name, entry_point in all_models().items():
        if not timm.models.is_model(name):
            timm.models.register_model(_as_timm_calls_it(timm.models, entry_point))


def _as_timm_calls_it(timm_models: Any, entry_point: Callable[..., Any]) -> Callable[..., BackboneContract]:
    """``entry_point`` with the keyword arguments that timm's ``create_model`` and its scripts pass to every model."""
    name = entry_point.__name__

    @functools.wraps(entry_point)
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        pretrained_model_args: dict[str, Any] | None = None,
        cache_dir: Any = None,
        drop_rate: float = 0.0,
        global_pool: str | None = None,
        output_stride: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> BackboneContract:
        if drop_rate:
            raise ValueError(f"drop_rate must be 0, got {drop_rate}: {name} has no dropout, only drop_path_rate")
        if isinstance(pretrained_cfg, str):
            raise ValueError(f"pretrained_cfg: {name} has no weights tagged {pretrained_cfg!r}, only the official ones")
        given = pretrained_cfg.to_dict() if hasattr(pretrained_cfg, "to_dict") else pretrained_cfg or {}
        known = timm_models.get_pretrained_cfg(name)  # scripts pass this one back
        registered = known.to_dict(remove_null=False)
        overrides = {key: value for key, value in given.items() if value != registered.get(key)}
        overrides |= pretrained_cfg_overlay or {}
        elsewhere = any(overrides.get(source) for source in SOURCES)
        if pretrained and not elsewhere and cache_dir is not None:
            raise ValueError(f"cache_dir: {name} keeps official weights in torch.hub's folder; set TORCH_HOME instead")
        # As for timm's own models, a configuration gives the defaults of the arguments.
        if overrides.get("num_classes") is not None:
            options.setdefault("num_classes", overrides["num_classes"])
        if overrides.get("input_size") is not None:
            options.setdefault("in_chans", overrides["input_size"][0])
            if known.fixed_input_size:
                options.setdefault("img_size", tuple(overrides["input_size"][1:]))
        with contextlib.nullcontext() if device is None else torch.device(device):
            model = entry_point(pretrained=pretrained and not elsewhere, **options).to(dtype=dtype)
        if output_stride is not None:  # the families have no dilated forms
            one_of("output_stride", output_stride, (model.feature_info[-1]["reduction"],))
        pool = overrides.get("global_pool") if global_pool is None else global_pool
        if pool is not None:
            model.set_global_pool(pool)
        model.return_plain_logits()  # timm's losses take nothing else
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": name, **overrides}
        model.pretrained_model_args = pretrained_model_args or {}
        file_alone = overrides.get("source") != "local-dir" and not overrides.get("state_dict")
        if pretrained and overrides.get("file") and file_alone:
            load_checkpoint(model, overrides["file"])
            model.pretrained_cfg = {**model.pretrained_cfg, **overrides}  # overrides what the file says of itself
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
