"""What ``torch.save`` wrote, read without ever running code from the file."""

from __future__ import annotations

import collections
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_safely", "reason_of"]


class _Bystander:
    """What stands beside the weights in a file, as a date or a path: read past, whatever it was, and never used."""

    def __new__(cls, *_: Any) -> _Bystander:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _table(*_: Any) -> dict[Any, Any]:
    return {}


def _list(*_: Any) -> list[Any]:
    return []


# What files may ask for -> what is made of it. None of these names is ever looked up, so none of their code runs.
STAND_INS: dict[Any, str] = {
    _Bystander: """
        argparse.Namespace types.SimpleNamespace decimal.Decimal fractions.Fraction uuid.UUID typing.Any
        builtins.frozenset builtins.slice builtins.range builtins.int builtins.float builtins.str builtins.bool
        builtins.list builtins.dict builtins.tuple builtins.object builtins.type
        datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone zoneinfo.ZoneInfo._unpickle
        pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath
        pathlib.PureWindowsPath pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath
        pathlib._local.PurePath pathlib._local.PurePosixPath pathlib._local.PureWindowsPath
        numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar
        numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct numpy.core.numeric._frombuffer
        numpy._core.numeric._frombuffer numpy.bool numpy.bool_ numpy.int32 numpy.int64 numpy.uint8 numpy.float16
        numpy.float32 numpy.float64 numpy.str_ numpy.ma.core._mareconstruct numpy.ma.core.MaskedArray
        numpy.random._pickle.__randomstate_ctor numpy.random._pickle.__generator_ctor
        numpy.random._pickle.__bit_generator_ctor numpy.random._mt19937.MT19937 numpy.random._pcg64.PCG64
        torch.torch_version.TorchVersion mmengine.logging.history_buffer.HistoryBuffer mmengine.config.config.Config
        mmcv.utils.config.Config mmengine.logging.message_hub.MessageHub
        omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata
        omegaconf.base.Metadata omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode omegaconf.nodes.BytesNode
        omegaconf.nodes.EnumNode omegaconf.nodes.FloatNode omegaconf.nodes.IntegerNode omegaconf.nodes.PathNode
        omegaconf.nodes.StringNode omegaconf.nodes.ValueNode
        pytorch_lightning.callbacks.early_stopping.EarlyStopping lightning.pytorch.callbacks.EarlyStopping
        pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
        lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint
    """,
    _table: "collections.defaultdict collections.ChainMap",
    _list: "collections.deque",
    collections.OrderedDict: """
        addict.addict.Dict yacs.config.CfgNode detectron2.config.config.CfgNode fvcore.common.config.CfgNode
        easydict.EasyDict box.box.Box ml_collections.config_dict.config_dict.ConfigDict
        mmengine.config.config.ConfigDict mmcv.utils.config.ConfigDict
        pytorch_lightning.utilities.parsing.AttributeDict lightning_fabric.utilities.data.AttributeDict
        lightning.fabric.utilities.data.AttributeDict
    """,
}
ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (stand_in, name) for stand_in, names in STAND_INS.items() for name in names.split()
]

_reading = threading.Lock()


def read_safely(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU; anything but tensors and plain values is refused or read past."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums; 0 means "not computed"
            checked = any(member.CRC for member in archive.infolist())
            if checked and (damaged := archive.testzip()):
                raise zipfile.BadZipFile(f"{damaged} does not have the checksum it should have")
    # What is allowed is the process's: without the lock, a thread that is done would forbid it to another.
    with _reading, warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True)


def reason_of(error: Exception) -> str:
    """What is wrong with a file that cannot be read, without PyTorch's advice to read it unsafely."""
    message = str(error)
    if refused := re.search(r"GLOBAL (\S+)", message):
        return f"was refused: it asks to call {refused[1]}, and only tensors and plain values are read"
    if "TorchScript" in message:
        return "is a TorchScript program, not a state dict"
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    message = detail[1] if detail else re.split(r"\.\s|\n", message)[0]
    return f"is damaged, truncated or holds more than tensors and plain values ({type(error).__name__}: {message})"
