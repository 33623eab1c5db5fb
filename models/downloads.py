"""Weight files from the web, into the folder that ``torch.hub`` keeps them in."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from kernels.files import WriteError, atomic_write, locked, writing

__all__ = ["fetch"]

_BROKEN_TRANSFER = (OSError, http.client.HTTPException)
_RETRIED_STATUS = (408, 416, 429, 500, 502, 503, 504)
_LONGEST_NAME = 200  # bytes; file systems take 255, and the files beside it have longer names


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
        kernels.files.WriteError: the file or the folder cannot be written.
    """
    try:
        parts = urlsplit(url)
        name = unquote(parts.path).rpartition("/")[2]
        named = parts.hostname and parts.port != 0 and name not in ("", ".", "..") and name.isprintable()
    except ValueError:  # a port that is no number
        named = False
    if not named or parts.scheme not in ("http", "https"):
        raise ValueError(f"url must be http(s)://HOST/…/FILE, got {url!r}")
    if len(os.fsencode(name)) > _LONGEST_NAME or re.search(r"^incomplete-|\.(lock|sha256)$", name):
        raise ValueError(f"url: {name!r} cannot be the name of a file here; download it by hand and pass its path")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if folder.parts[0].startswith("~"):
        raise ValueError("url: there is no home directory to keep downloads in; set TORCH_HOME to a folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path, pin = folder / name, folder / f"{name}.sha256"
    source = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()  # without secrets
    with locked(folder / f"{name}.lock", -1):
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
            except WriteError:
                raise
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
    atomic_write(pin, f"# {source}\n{digest}  {path.name}\n")
    with writing(path):
        os.replace(file, path)


def _read_pin(pin: Path) -> tuple[str | None, str | None]:
    """(SHA-256, source) as ``_accept`` wrote them, in the format that ``sha256sum --check`` reads."""
    if not os.path.lexists(pin):
        return None, None
    lines = [] if pin.is_symlink() or not pin.is_file() else pin.read_text("utf-8", "replace").splitlines()
    if len(lines) != 2 or not lines[0].startswith("# ") or len(lines[1].split()) < 2:
        raise ValueError(f"{pin} is damaged, or a link; delete it")
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
    with writing(path):
        path.unlink(missing_ok=True)  # what is there may be a link to somewhere else
        new = open(path, "xb", buffering=0)  # noqa: SIM115
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress, new as file:
        task = progress.add_task(escape(path.name.removeprefix("incomplete-")), total=None)
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
                        _write(file, block, path)
                        progress.update(task, completed=file.tell())
                if length is not None and file.tell() != length:
                    raise ConnectionError(f"the transfer broke off after {file.tell()} of {length} bytes")
                file.truncate()
                return
            except WriteError:
                raise
            except _BROKEN_TRANSFER as error:
                if isinstance(error, HTTPError):
                    etag = None
                    if error.code not in _RETRIED_STATUS:
                        raise
                if attempt + 1 == attempts:
                    raise


def _write(file: io.FileIO, block: bytes, path: Path) -> None:
    with writing(path):
        rest = memoryview(block)
        while rest:
            rest = rest[file.write(rest) :]


class _Redirects(HTTPRedirectHandler):
    """Follows to other http addresses, from https to https alone; Python by itself follows to ftp as well."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and scheme != req.type:
            raise HTTPError(newurl, code, f"a redirection from {req.type} to {scheme} is not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, file: io.FileIO, etag: str | None, timeout: float) -> http.client.HTTPResponse:
    """Asks for what ``file`` lacks where ``etag`` can vouch for the rest, and winds it back if all of it comes."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "dynamic-kernels"}
    if etag and not etag.startswith("W/") and file.tell():
        headers |= {"Range": f"bytes={file.tell()}-", "If-Range": etag}
    response = build_opener(_Redirects).open(Request(_in_ascii(url), headers=headers), timeout=timeout)
    if response.status == 206:
        content_range = response.headers.get("Content-Range", "")
        found = re.fullmatch(rf"bytes {file.tell()}-(\d+)/(\d+|\*)", content_range)
        to_the_end = found and found[2] in ("*", str(int(found[1]) + 1))
        if not to_the_end or response.headers.get("ETag") != etag:  # some servers do not look at If-Range
            response.close()
            file.seek(0)  # the next attempt then asks for all of it
            what = "part of another version" if to_the_end else f"another range, {content_range!r}"
            raise ConnectionError(f"the server answered with {what}")
    else:
        file.seek(0)
        file.truncate()
    return response


def _in_ascii(url: str) -> str:
    """``url`` as it is sent: other scripts in the path as %XX, in the host's name as IDNA has it."""
    parts = urlsplit(url)
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    safe = "!#$%&'()*+,/:;=?@[]~"
    path, query = quote(parts.path, safe), quote(parts.query, safe)
    return parts._replace(netloc=netloc, path=path, query=query, fragment="").geturl()
