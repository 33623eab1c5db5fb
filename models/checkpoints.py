"""Loads weight files into models, which change only if the whole file fits, and writes them."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kernels.files import atomic_write
from models.checks import flag
from models.downloads import fetch
from models.layers.tokens import resize_position_embedding
from models.metadata import Metadata, read_metadata
from models.weight_files import entries_for, is_bookkeeping, listed, part_of, read_state_dict, unwrapped_name

PathLike = str | os.PathLike[str]


def load_checkpoint(model: nn.Module, path_or_url: PathLike, *, use_ema: bool = True) -> None:
    """Copies the weights of a file into ``model``; either all of them fit and are copied, or nothing changes.

    It takes what training scripts write: a plain state dict or one inside a container such as ``"state_dict"``; names
    behind ``module.``, ``model.``, ``backbone.`` and the like, in any order; counters beside the weights. From a
    detector or segmenter it takes the backbone. A warning says so where averaged weights (EMA) are preferred to the
    last ones, and where a classifier is kept because the file has none or one for another number of classes. For
    another ``in_chans`` the first convolution is summed (1 channel) or tiled; a ``pos_embed`` of another size is
    resized. What the file says of its images (see ``models.metadata``) goes into ``model.pretrained_cfg``.

    Args:
        model: one of ``models``, also compiled, wrapped for training, or on the meta device, where it gets the file's
            tensors; any other ``nn.Module`` whose names and shapes agree.
        path_or_url: a ``torch.save`` or ``.safetensors`` file, or its http(s) address, see ``downloads.fetch``.
        use_ema: take the averaged weights if the file has both, as timm does.

    Raises:
        FileNotFoundError: no such file.
        ConnectionError: the file is not cached and cannot be downloaded.
        ValueError: the file holds code, is damaged, is not a weight file, or does not fit; the message lists the names.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    flag("use_ema", use_ema)
    path = local_file(path_or_url)
    model = _unwrapped(model)
    names = {unwrapped_name(name): name for name in model.state_dict()}
    own = dict(zip(names, model.state_dict().values(), strict=True))
    _check_loadable(model, own)
    heads = {part_of(name) for name in getattr(model, "classifiers", {})}
    parameters = {unwrapped_name(name) for name, _ in model.named_parameters()}
    state, notes = entries_for(own.keys(), parameters, heads, path, use_ema)
    metadata = read_metadata(path)
    if unlike := [name for name, tensor in state.items() if not _plain(tensor)]:
        raise ValueError(f"checkpoint: {path} holds tensors without plain values (sparse, meta, …): {listed(unlike)}")
    state = _with_counters(state)
    adapt: Any = getattr(model, "adapt_state_dict", dict)
    state = adapt(state)
    state = {name: tensor for name, tensor in state.items() if name in own or not is_bookkeeping(name)}
    state = _adapted_shapes(_with_classifiers(state, model, own, notes), model, own)
    _check_fit(state, own, type(model).__name__, path)
    on_meta = any(tensor.is_meta for tensor in own.values())
    if on_meta:  # new memory in the model's dtype and layout: tensors of the file may share theirs
        state = {name: torch.empty_like(own[name], device=t.device).copy_(t) for name, t in state.items()}
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()}, assign=on_meta)
    if metadata is not None and hasattr(model, "pretrained_cfg"):
        metadata.apply_to(model)
    for note in notes:
        warnings.warn(note, stacklevel=2)


def local_file(path_or_url: PathLike) -> Path:
    """The path of the file, which is downloaded if given by its address. Errors as for ``load_checkpoint``."""
    if not isinstance(path_or_url, str | os.PathLike):
        raise TypeError(f"path_or_url must be a str or a path, got {type(path_or_url).__name__}")
    if isinstance(path_or_url, str) and path_or_url.lower().startswith(("http://", "https://")):
        return fetch(path_or_url, check=read_state_dict)
    return Path(path_or_url)


def save_checkpoint(model: nn.Module, path: PathLike, metadata: Metadata | None = None) -> None:
    """Writes the state dict of ``model`` atomically: a reader finds the old file or the new one.

    Args:
        model: any module.
        path: ending in ``.safetensors``, or in ``.pth`` or ``.pt`` for ``torch.save``'s format.
        metadata: what the file says of itself; for ``.safetensors`` only.

    Raises:
        ValueError: another ending.
        FileNotFoundError: the folder does not exist.
        kernels.files.WriteError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"path must end in .safetensors, .pth or .pt, got {str(path)!r}")
    if metadata is not None and path.suffix != ".safetensors":
        raise ValueError(f"metadata needs a path that ends in .safetensors, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no folder {path.parent}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        header = {"format": "pt"} | ({} if metadata is None else metadata.header())
        atomic_write(path, safetensors.torch.save(state, metadata=header))
    else:
        atomic_write(path, lambda file: torch.save(state, file))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, (Distributed)DataParallel, AveragedModel and other wrappers' single child."""
    while [name for name, _ in model.named_children()] in (["_orig_mod"], ["module"], ["_forward_module"]):
        model = next(model.children())
    return model


def _check_loadable(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    fixed = [name for name, tensor in own.items() if not _writable(tensor)]
    if fixed:
        raise ValueError(
            f"model: {len(fixed)} of its tensors cannot take a file's values: they are sharded, quantised, expanded or "
            f"made in inference mode; load before that: {listed(fixed)}"
        )
    unsaved = [name for name, b in model.named_buffers() if b.is_meta and unwrapped_name(name) not in own]
    if unsaved:
        raise ValueError(
            f"model: it was built on the meta device, and these buffers are in no file; build it elsewhere or give it "
            f"memory with to_empty(device=…): {listed(unsaved)}"
        )


def _writable(tensor: Tensor) -> bool:
    if is_traceable_wrapper_subclass(tensor) or not (tensor.is_meta or _plain(tensor)):
        return False
    expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not expanded and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _with_classifiers(
    state: Mapping[str, Tensor], model: nn.Module, own: Mapping[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """``state`` with the model's own classifier if the file has none, or one for another number of classes."""
    state = dict(state)
    for classifier in getattr(model, "classifiers", {}):
        weight, bias = entries = f"{classifier}.weight", f"{classifier}.bias"
        if weight not in state and bias not in state:
            head = f"{part_of(classifier)}."
            if any(name.startswith(head) for name in state):  # the file has the layers before the classifier
                head = f"{classifier}."
            kept = [name for name in own if name.startswith(head)]
            state.update((name, own[name].clone()) for name in kept)
            if kept:
                notes.append(f"{head.rstrip('.')} keeps its own values: the file has none")
        elif weight in state and bias in state and weight not in own:  # num_classes = 0
            del state[weight], state[bias]
        elif all(entry in table for entry in entries for table in (state, own)):
            rows, classes = state[bias].shape, own[bias].shape
            if state[weight].shape == rows + own[weight].shape[1:] and rows != classes:
                what = f"the file has {rows[0]} classes, the model {classes[0]}"
                notes.append(f"{classifier} keeps its own values: {what}")
                state.update((entry, own[entry].clone()) for entry in entries)
    return state


def _adapted_shapes(state: dict[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with its first convolution and position embedding in the model's shapes."""
    state = dict(state)
    for name, tensor in state.items():
        if name not in own or tensor.shape == own[name].shape or tensor.ndim != 4 or own[name].ndim != 4:
            continue
        size, channels = own[name].shape, own[name].shape[1]
        if tensor.shape[0] == size[0] and tensor.shape[2:] == size[2:] and channels == getattr(model, "in_chans", 0):
            # [O, I, K, K] -> [O, in_chans, K, K], keeping the size of the response.
            tiled = tensor.repeat(1, -(-channels // tensor.shape[1]), 1, 1)[:, :channels]
            state[name] = tensor.sum(1, keepdim=True) if channels == 1 else tiled * (tensor.shape[1] / channels)
        elif name.endswith("pos_embed") and tensor.shape[0] == size[0] and tensor.shape[3] == size[3]:
            state[name] = resize_position_embedding(tensor.float(), (size[1], size[2])).to(tensor.dtype)
    return state


def _with_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with a counter of 0 for every batch norm that has none (old files) or an average of several."""
    state = dict(state)
    for name in [name for name in state if name.endswith("running_mean")]:
        counter = f"{name.removesuffix('running_mean')}num_batches_tracked"
        if counter not in state or state[counter].dtype != torch.int64 or state[counter].ndim:
            state[counter] = torch.zeros((), dtype=torch.int64)
    return state


def _check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], model: str, path: Path) -> None:
    both = [(name, state[name], tensor) for name, tensor in own.items() if name in state]
    unlike = [f"{n} (expected {list(o.shape)}, got {list(t.shape)})" for n, t, o in both if t.shape != o.shape]
    kinds = [(n, t.dtype, o.dtype) for n, t, o in both if t.is_floating_point() != o.is_floating_point()]
    unlike += [f"{name} (expected {expected}, got {got})" for name, got, expected in kinds]
    problems = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (
            ("missing from the file", [name for name in own if name not in state]),
            ("unexpected in the file", [name for name in state if name not in own]),
            ("of another shape or type", unlike),
            ("neither in the file nor in a model on the meta device", [n for n, t in state.items() if t.is_meta]),
        )
        if names
    ]
    if problems:
        raise ValueError(f"checkpoint: {path} does not fit {model}\n  " + "\n  ".join(problems))
