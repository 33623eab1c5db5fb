"""Weight files from the web, into the folder that ``torch.hub`` keeps them in."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

__all__ = ["fetch"]

_BROKEN_TRANSFER = (URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError)
_RETRIED_STATUS = (408, 416, 429, 500, 502, 503, 504)


def fetch(
    url: str,
    *,
    sha256: str | None = None,
    check: Callable[[Path], object] | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
    pause: float = 0.5,
) -> Path:
    """Path of the file behind ``url`` in ``torch.hub.get_dir()/checkpoints``, downloaded unless it lies there.

    A broken transfer is resumed where the server can prove (by its ETag) that the file is still the same, else
    started afresh. The file appears under its name only when it is complete, ``check`` accepts it and its SHA-256 is
    the expected one: ``sha256``, or what was seen on first use and is kept beside it in NAME.sha256.

    Args:
        url: http(s) address; its last component names the file.
        sha256: published checksum, in hexadecimal.
        check: called with the path of a file not seen before; raises ValueError to refuse it.
        timeout: seconds without a byte after which a transfer counts as broken.
        attempts: transfers tried in all.
        pause: seconds before the second attempt, doubled for each further one.

    Raises:
        ConnectionError: the file could not be had; the message names ``url`` and where to put the file by hand.
        ValueError: ``url`` names no file, ``check`` refused the file, or its checksum is another.
    """
    parts = urlsplit(url)
    name = unquote(parts.path).rpartition("/")[2]
    if parts.scheme not in ("http", "https") or not parts.hostname or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"url must be http(s)://HOST/…/FILE, got {url!r}")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path, pin = folder / name, folder / f"{name}.sha256"
    source = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()  # without secrets
    with FileLock(folder / f"{name}.lock"):
        pinned, pinned_source = _read_pin(pin)
        if pinned_source not in (None, source):
            raise ValueError(
                f"url: {path} came from {pinned_source}, not from {url}; delete it and {pin.name}, "
                "or download the file yourself and pass its path"
            )
        expected = (sha256 or pinned or "").lower()
        if path.exists():
            digest = _sha256(path)
            if expected not in ("", digest):
                raise ValueError(
                    f"{path} has the SHA-256 {digest}, expected {expected}: it was changed or damaged; delete it to "
                    f"download it again from {url}"
                )
            if pinned is None:
                _accept(path, path, digest, check, pin, source)
            return path
        incomplete = folder / f"incomplete-{name}"
        try:
            try:
                _download(url, incomplete, timeout, attempts, pause)
            except _BROKEN_TRANSFER as error:
                raise ConnectionError(
                    f"could not download {url}: {error}. Get the file by other means and put it at {path}"
                ) from error
            digest = _sha256(incomplete)
            if expected not in ("", digest):
                raise ValueError(
                    f"{url} gave a file with the SHA-256 {digest}, expected {expected}; "
                    + ("" if sha256 else f"if that is meant, delete {pin}")
                )
            _accept(incomplete, path, digest, check, pin, source)
        finally:
            incomplete.unlink(missing_ok=True)
    return path


def _accept(
    file: Path, path: Path, digest: str, check: Callable[[Path], object] | None, pin: Path, source: str
) -> None:
    if check is not None:
        try:
            check(file)
        except ValueError as error:
            raise ValueError(f"{source} gave no weight file: {error}") from error
    pin.write_text(f"# {source}\n{digest}  {path.name}\n", encoding="utf-8")
    os.replace(file, path)


def _read_pin(pin: Path) -> tuple[str | None, str | None]:
    """(SHA-256, source) as ``_accept`` wrote them, in the format that ``sha256sum --check`` reads."""
    if not pin.exists():
        return None, None
    lines = pin.read_text(encoding="utf-8").splitlines()
    if len(lines) != 2 or not lines[0].startswith("# ") or len(lines[1].split()) < 2:
        raise ValueError(f"{pin} is damaged; delete it")
    return lines[1].split()[0], lines[0].removeprefix("# ")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(url: str, path: Path, timeout: float, attempts: int, pause: float) -> None:
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    shown = console.is_terminal or console.is_jupyter
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress, open(path, "wb") as file:
        task = progress.add_task(path.name.removeprefix("incomplete-"), total=None)
        etag = None
        for attempt in range(attempts):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1))
            try:
                with _open(url, file, etag, timeout) as response:
                    etag = response.headers.get("ETag")
                    length = None if response.length is None else file.tell() + response.length
                    progress.update(task, total=length)
                    while block := response.read1(1 << 18):
                        file.write(block)
                        progress.update(task, completed=file.tell())
                if length is not None and file.tell() != length:
                    raise ConnectionError(f"the transfer broke off after {file.tell()} of {length} bytes")
                return
            except _BROKEN_TRANSFER as error:
                if isinstance(error, HTTPError):
                    etag = None
                    if error.code not in _RETRIED_STATUS:
                        raise
                if attempt + 1 == attempts:
                    raise


def _open(url: str, file: BinaryIO, etag: str | None, timeout: float) -> http.client.HTTPResponse:
    """Asks for what ``file`` lacks where ``etag`` can vouch for the rest, and winds it back if all of it comes."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "dynamic-kernels"}
    if etag and not etag.startswith("W/") and file.tell():
        headers |= {"Range": f"bytes={file.tell()}-", "If-Range": etag}
    response = urlopen(Request(url, headers=headers), timeout=timeout)
    if response.status == 206:
        content_range = response.headers.get("Content-Range", "")
        if not content_range.startswith(f"bytes {file.tell()}-"):
            response.close()
            file.seek(0)  # the next attempt then asks for all of it
            raise ConnectionError(f"the server answered with another range, {content_range!r}")
    else:
        file.seek(0)
        file.truncate()
    return response
