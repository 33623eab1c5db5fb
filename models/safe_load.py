"""Reading what ``torch.save`` wrote without ever running code from it."""

import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

# Dates, paths, configurations and the like beside the weights. These names are never looked up.
HARMLESS = re.compile(
    r"(argparse|types|decimal|fractions|uuid|typing|datetime|zoneinfo|pathlib|numpy|collections|torch\.torch_version"
    r"|mmengine|mmcv|omegaconf|pytorch_lightning|lightning|lightning_fabric|addict|yacs|detectron2|fvcore|easydict|box"
    r"|ml_collections)\."
    r"|builtins\.(frozenset|slice|range|int|float|str|bool|list|dict|tuple|object|type)$"
)
MOST_STAND_INS = 100
TABLES = re.compile(r"\.(defaultdict|ChainMap|Dict|CfgNode|EasyDict|Box|ConfigDict|AttributeDict)$")
_reading = threading.Lock()


class Bystander:
    """Stands in for an object beside the weights, which is skipped and never used."""

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class Table(Bystander):
    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class Row(Bystander):
    def __new__(cls, *_: Any) -> Any:
        return []


def read_safely(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors and plain values; stand-ins for ``HARMLESS`` objects beside them.

    Raises:
        pickle.UnpicklingError: the file asks for anything else, which is refused and not run.
        Exception: of any kind, for a damaged file.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        with zipfile.ZipFile(path) as archive:  # torch.load ignores the checksums; 0 means "not computed"
            checked = any(member.CRC for member in archive.infolist())
            if checked and (damaged := archive.testzip()):
                raise zipfile.BadZipFile(f"{damaged} does not have the checksum it should have")
    stand_ins: dict[str, type] = {}
    while True:
        try:
            # safe_globals acts on the whole process: a thread that leaves it would take it from another.
            with _reading, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                    return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            name = refused_name(error)
            if name is None or name in stand_ins or not HARMLESS.match(name) or len(stand_ins) == MOST_STAND_INS:
                raise
            stand_ins[name] = Row if name == "collections.deque" else Table if TABLES.search(name) else Bystander


def refused_name(error: Exception) -> str | None:
    """The name that a file asked for and that was refused, as MODULE.NAME."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    return None if refused is None else refused[1] if "." in refused[1] else f"builtins.{refused[1]}"


def reason_of(error: Exception) -> str:
    """What is wrong with a file that cannot be read, without PyTorch's advice to read it unsafely."""
    message = str(error)
    if refused := refused_name(error):
        name = refused.removeprefix("builtins.")
        return f"was refused: it asks to call {name}, and only tensors and plain values are read"
    if "TorchScript" in message:
        return "is a TorchScript program, not a state dict"
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    message = detail[1] if detail else re.split(r"\.\s|\n", message)[0]
    return f"is damaged, truncated or holds more than tensors and plain values ({type(error).__name__}: {message})"
