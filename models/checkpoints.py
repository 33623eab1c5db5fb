"""Weight files in and out: checked as a whole before the model changes, and never running code from a file."""

from __future__ import annotations

import argparse
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.downloads import fetch

__all__ = ["load_checkpoint", "load_pretrained", "read_state_dict", "save_checkpoint"]

PathLike = str | os.PathLike[str]

_CONTAINERS = ("state_dict", "model")  # where training scripts put the state dict, outermost first
_PREFIXES = ("module.", "_orig_mod.", "backbone.")  # DistributedDataParallel, torch.compile, OpenMMLab
_LISTED_NAMES = 10


def load_checkpoint(model: nn.Module, path_or_url: PathLike) -> None:
    """Copies the weights of a file into ``model``; either all of them fit and are copied, or nothing changes.

    Takes a plain state dict, one under ``"state_dict"`` or ``"model"``, and names that start with ``module.``,
    ``_orig_mod.`` or ``backbone.``. Of a detector or segmenter it takes the backbone. Where the model was built with
    another ``num_classes`` its own classifier stays (with a warning); with another ``in_chans`` the first convolution
    is summed (1 channel) or tiled; a ``pos_embed`` of another size is resized.

    Args:
        model: one of ``models``; another ``nn.Module`` works as long as names and shapes agree.
        path_or_url: a ``torch.save`` or ``.safetensors`` file, or its http(s) address, see ``downloads.fetch``.

    Raises:
        FileNotFoundError: no such file.
        ConnectionError: the address cannot be reached and nothing is cached.
        ValueError: the file holds code, is damaged, is no weight file, or does not fit; the message lists the names.
    """
    _load(model, path_or_url)


def load_pretrained(model: nn.Module, url: str, sha256: str | None = None) -> None:
    """``load_checkpoint`` for the official weights at ``url``, whose checksum may be published.

    Raises:
        ValueError: as ``load_checkpoint``, or ``url`` is empty: nobody publishes weights that can be downloaded.
    """
    if not url:
        raise ValueError(
            f"pretrained: no official weights of this {type(model).__name__} can be downloaded; "
            "get the file by hand and pass checkpoint=PATH"
        )
    _load(model, url, sha256)


def _load(model: nn.Module, path_or_url: PathLike, sha256: str | None = None) -> None:
    if not isinstance(path_or_url, str | os.PathLike):
        raise TypeError(f"path_or_url must be a str or a path, got {type(path_or_url).__name__}")
    if isinstance(path_or_url, str) and path_or_url.startswith(("http://", "https://")):
        path = fetch(path_or_url, sha256=sha256, check=read_state_dict)
    else:
        path = Path(path_or_url)
    state = _without_prefixes(read_state_dict(path), model)
    adapt_state_dict = getattr(model, "adapt_state_dict", None)
    if adapt_state_dict is not None:
        state = adapt_state_dict(state)
    if getattr(model, "features_only", False):  # neither the classifier nor the stages after the last wanted map
        own_parts = {_part(name) for name in model.state_dict()}
        state = {name: tensor for name, tensor in state.items() if _part(name) in own_parts}
    state = _adapted_shapes(state, model)
    _check_fit(state, model, path)
    model.load_state_dict(state)


def save_checkpoint(model: nn.Module, path: PathLike) -> None:
    """Writes the state dict of ``model``; a reader finds the old file or the new one, never half of one.

    Args:
        model: any module.
        path: ending in ``.safetensors``, or in ``.pth`` or ``.pt`` for ``torch.save``'s format.

    Raises:
        ValueError: another ending.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"path must end in .safetensors, .pth or .pt, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no folder {path.parent}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            _safetensors().save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state_dict(path: PathLike) -> dict[str, Tensor]:
    """Entry name -> tensor (on the CPU) as the file has them, out of whatever container a training script used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds code, is damaged, or is no weight file; the message says which.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    if not path.is_file():
        raise ValueError(f"checkpoint: {path} is not a file")
    with open(path, "rb") as file:
        start = file.read(512)
    if foreign := _foreign_content(start):
        raise ValueError(f"checkpoint: {path} is {foreign}")
    try:
        content = _safetensors().load_file(path) if path.suffix == ".safetensors" else _unpickle(path, start)
    except ImportError:
        raise
    except Exception as error:  # a malformed file can make the readers fail in any way
        raise ValueError(f"checkpoint: {path} {_reason(error)}") from error
    return _state_dict_in(content, path)


def _foreign_content(start: bytes) -> str | None:
    if not start:
        return "empty"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        return "a web page (HTML), not a weight file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weight file itself"
    return None


def _unpickle(path: Path, start: bytes) -> Any:
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums; 0 means "not computed"
            checked = any(member.CRC for member in archive.infolist())
            if checked and (damaged := archive.testzip()):
                raise zipfile.BadZipFile(f"{damaged} does not have the checksum it should have")
    # timm's training script stores its parsed arguments; a Namespace only carries plain values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    message = str(error)
    if refused := re.search(r"GLOBAL (\S+)", message):
        return f"was refused: it asks to call {refused[1]}, and only tensors and plain values are read"
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    message = detail[1] if detail else re.split(r"\.\s|\n", message)[0]  # not torch's advice to read it unsafely
    return f"is damaged, truncated or holds more than tensors and plain values ({type(error).__name__}: {message})"


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"checkpoint: {path} holds no state dict but {_described(content)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"checkpoint: {path} holds no state dict: expected tensors by name, got {name!r}: {_described(value)}"
            )
    return dict(content)


def _described(value: Any) -> str:
    return f"an empty {type(value).__name__}" if isinstance(value, Mapping) and not value else type(value).__name__


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("reading and writing .safetensors needs the safetensors package") from error
    return safetensors.torch


def _without_prefixes(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Strips the wrappers' prefixes; of a larger model's file, keeps what can belong to the backbone."""
    own_names = model.state_dict().keys()
    own_parts = {_part(name) for name in own_names}
    for prefix in _PREFIXES:
        prefixed = {name for name in state if name.startswith(prefix)}
        if not prefixed or any(name.startswith(prefix) for name in own_names):
            continue
        if prefix == "backbone.":
            # neck, decode_head, roi_head, ... of a detector or segmenter; a classifier's own "head" stays.
            state = {name: tensor for name, tensor in state.items() if name in prefixed or _part(name) in own_parts}
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _part(name: str) -> str:
    return name.partition(".")[0]


def _adapted_shapes(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` with classifier, first convolution and position embedding brought to the model's shapes."""
    state, own = dict(state), model.state_dict()
    for classifier in getattr(model, "classifiers", {}):
        entries = (f"{classifier}.weight", f"{classifier}.bias")
        found = [state[entry] for entry in entries if entry in state]
        rows = {len(tensor) for tensor in found if tensor.ndim > 0}
        if len(found) < 2 or len(rows) != 1:
            continue
        if entries[0] not in own:  # num_classes = 0
            del state[entries[0]], state[entries[1]]
        elif own[entries[0]].shape[1:] == found[0].shape[1:] and len(own[entries[0]]) not in rows:
            warnings.warn(
                f"{classifier} keeps its own values: the file has {rows.pop()} classes, "
                f"the model {len(own[entries[0]])}",
                stacklevel=4,
            )
            state.update((entry, own[entry].clone()) for entry in entries)
    for name, tensor in state.items():
        if name not in own or tensor.shape == own[name].shape or tensor.ndim != 4 or own[name].ndim != 4:
            continue
        shape = own[name].shape
        if tensor.shape[0] == shape[0] and tensor.shape[2:] == shape[2:] and shape[1] == getattr(model, "in_chans", 0):
            state[name] = _adapted_channels(tensor, shape[1])
        elif name.endswith("pos_embed") and tensor.shape[0] == shape[0] and tensor.shape[3] == shape[3]:
            state[name] = _resized_positions(tensor, (shape[1], shape[2]))
    return state


def _adapted_channels(weight: Tensor, in_chans: int) -> Tensor:
    """First convolution [O, I, K, K] -> [O, in_chans, K, K] keeping the size of the response."""
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    repeats = -(-in_chans // weight.shape[1])
    return weight.repeat(1, repeats, 1, 1)[:, :in_chans] * (weight.shape[1] / in_chans)


def _resized_positions(pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, h, w, C] -> [1, *size, C], bicubic."""
    grid = pos_embed.float().permute(0, 3, 1, 2)
    return F.interpolate(grid, size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).to(pos_embed.dtype)


def _check_fit(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    own = model.state_dict()
    unlike = [
        f"{name} (expected {list(tensor.shape)}, got {list(state[name].shape)})"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    unlike += [
        f"{name} (expected {tensor.dtype}, got {state[name].dtype})"
        for name, tensor in own.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    ]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (
            ("missing from the file", [name for name in own if name not in state]),
            ("unexpected in the file", [name for name in state if name not in own]),
            ("of another shape or type", unlike),
        )
        if names
    ]
    if problems:
        raise ValueError(f"checkpoint: {path} does not fit {type(model).__name__}\n  " + "\n  ".join(problems))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more
