"""Tuned configs on disk: one readable JSON file per GPU, shared by any number of processes.

A user's entries lie under the platform's cache directory (or DYNAMIC_KERNELS_STORE, a folder); entries that ship with
the package lie in kernels/tuning/configs. An entry is only used for the exact key it was tuned for, by the Triton
version and the kernel's code it was tuned with. Nothing a file can contain stops a run: what cannot be read or written
costs one warning, and the heuristics serve instead.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernels.files import atomic_write, locked

SCHEMA = 1
UNREADABLE = (OSError, ValueError, RecursionError)
NOWHERE = Path(os.devnull, "dynamic-kernels")  # no file can lie there
LOCK_SECONDS = 60  # how long to wait for other processes' writes, each of which takes milliseconds


def gpu_name(device: torch.device) -> str:
    """Name under which configs of a device are kept; CPU tensors run in the interpreter, where nothing is timed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def user_folder() -> Path:
    """Where tuning writes: DYNAMIC_KERNELS_STORE, or the platform's cache directory.

    Nothing is kept where the system knows no home directory of this user, as in some containers.
    """
    chosen = os.environ.get("DYNAMIC_KERNELS_STORE")
    if chosen:
        return Path(chosen)
    try:
        folder = _cache_folder()
    except RuntimeError:
        return NOWHERE
    return folder / "configs" if folder.is_absolute() else NOWHERE  # older platformdirs leave "~" as it is


def _cache_folder() -> Path:
    try:
        import platformdirs
    except ImportError:  # a checkout run where only torch and triton are installed: what platformdirs says on Linux
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamic-kernels"
    return Path(platformdirs.user_cache_dir("dynamic-kernels", appauthor=False))


def shipped_folder() -> Path:
    """The tuned configs that come with the package."""
    return Path(__file__).parent / "configs"


class Store:
    """The entries of one GPU: key -> {"config": {...}, "triton": version, "source": hash, ...}."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self.gpu = gpu
        self.path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', gpu)[:100]}.json"
        self._warned = False

    def _warn(self, action: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"cannot {action} tuned configs at {self.path} ({type(error).__name__}: {error}); "
                "heuristic configs are used instead",
                RuntimeWarning,
                stacklevel=3,
            )

    def read(self) -> dict[str, dict[str, Any]]:
        """All entries; none where the file is missing, and none with one warning where it is not what it should be."""
        try:
            return self._load()
        except UNREADABLE as error:
            self._warn("read", error)
            return {}

    def _load(self) -> dict[str, dict[str, Any]]:
        if self.path.exists() and not self.path.is_file():
            raise ValueError("not a file")  # a pipe would be waited for
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"not a store of schema {SCHEMA}")
        if not isinstance(content.get("entries"), dict):
            raise ValueError("no table of entries")
        return {key: entry for key, entry in content["entries"].items() if isinstance(entry, dict)}

    def update(self, entries: Mapping[str, Mapping[str, Any]]) -> bool:
        """Merge ``entries`` into the file under its lock; False, with one warning, where that cannot be done.

        A file that cannot be understood is kept beside the new one under the ending ``.broken``: it may be somebody's.
        """
        try:
            if self.path.parent == NOWHERE:
                raise OSError("this user has no home directory; set DYNAMIC_KERNELS_STORE to a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(f"{self.path}.lock", LOCK_SECONDS):
                try:
                    merged = self._load()
                except UNREADABLE:
                    os.replace(self.path, self.path.with_suffix(".json.broken"))
                    merged = {}
                merged.update({key: dict(entry) for key, entry in entries.items()})
                content = {"schema": SCHEMA, "gpu": self.gpu, "entries": dict(sorted(merged.items()))}
                atomic_write(self.path, json.dumps(content, indent=1) + "\n")
            return True
        except OSError as error:
            self._warn("write", error)
            return False


@functools.cache
def opened(folder: Path, gpu: str) -> tuple[Store, dict[str, dict[str, Any]]]:
    """A file and its entries, read once per process; ``choose.remember`` adds to the user's."""
    store = Store(folder, gpu)
    return store, store.read()
