"""Weight files from the web, into the folder that ``torch.hub`` keeps them in."""

import hashlib
import http.client
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import wrap_file

from kernels.files import WriteError, atomic_write, locked, writing

ATTEMPTS, TIMEOUT = 3, 30.0  # seconds without a byte after which a transfer counts as broken
LONGEST_NAME = 200  # bytes; file systems take 255, and the names of the files beside it are longer
SAFE = "!#$%&'()*+,/:;=?@[]~"  # characters of an address that are not sent as %XX


def fetch(url: str, check: Callable[[Path], object] | None = None) -> Path:
    """Path of the file behind ``url`` in ``torch.hub.get_dir()/checkpoints``, downloaded unless it lies there.

    A broken transfer starts again from the beginning. The file gets its name only when it is complete and ``check``
    accepts it. NAME.sha256 beside it records its address and pins its checksum, in the format of ``sha256sum --check``.

    Args:
        url: http(s) address; its last component names the file.
        check: called with the path of a file not seen before; raises ValueError to refuse it.

    Raises:
        ConnectionError: the download failed; the message names ``url`` and where to put the file by hand.
        ValueError: ``url`` does not name a file, ``check`` refused it, or its checksum is not the pinned one.
        kernels.files.WriteError: the file or the folder cannot be written.
    """
    try:
        parts = urlsplit(url)
        name = unquote(parts.path).rpartition("/")[2]
        named = parts.hostname and parts.port != 0 and name not in ("", ".", "..") and name.isprintable()
    except ValueError:  # the port is not a number
        named = False
    if not named or parts.scheme not in ("http", "https"):
        raise ValueError(f"url must be http(s)://HOST/…/FILE, got {url!r}")
    if len(os.fsencode(name)) > LONGEST_NAME or name.startswith("incomplete-") or name.endswith((".lock", ".sha256")):
        raise ValueError(f"url: {name!r} cannot be the name of a file here; download it by hand and pass its path")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if folder.parts[0].startswith("~"):
        raise ValueError("url: there is no home directory to keep downloads in; set TORCH_HOME to a folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path, pin, incomplete = folder / name, folder / f"{name}.sha256", folder / f"incomplete-{name}"
    source = parts._replace(
        netloc=parts.netloc.rpartition("@")[2], query="", fragment=""
    ).geturl()  # without passwords and tokens
    with locked(folder / f"{name}.lock", -1):
        known, pinned = _read_pin(pin)
        if known not in (None, source):
            raise ValueError(
                f"url: {path} came from {known}, not from {url}; delete it and {pin.name}, or download the file "
                "yourself and pass its path"
            )
        present, file = path.exists(), path if path.exists() else incomplete
        try:
            if not present:
                _download(parts, incomplete, path)
            digest = _sha256(file)
            if pinned not in (None, digest):
                what = f"{path} was changed or damaged; delete it" if present else f"if that is meant, delete {pin}"
                raise ValueError(f"{source} has the SHA-256 {digest} here, expected {pinned}: {what}")
            if pinned is None and check is not None:
                try:
                    check(file)
                except ValueError as error:
                    raise ValueError(f"{source} gave no weight file: {error}") from error
            if pinned is None:
                atomic_write(pin, f"# {source}\n{digest}  {name}\n")
            with writing(path):
                os.replace(file, path)
        finally:
            incomplete.unlink(missing_ok=True)
    return path


def _read_pin(pin: Path) -> tuple[str | None, str | None]:
    """(source, SHA-256) as ``fetch`` wrote them."""
    if not os.path.lexists(pin):
        return None, None
    lines = [] if pin.is_symlink() or not pin.is_file() else pin.read_text("utf-8", "replace").splitlines()
    if len(lines) != 2 or not lines[0].startswith("# ") or len(lines[1].split()) < 2:
        raise ValueError(f"{pin} is damaged, or a link; delete it")
    return lines[0].removeprefix("# "), lines[1].split()[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Redirects(HTTPRedirectHandler):
    """Follows redirections to http(s), from https only to https. By default Python would follow to ftp, too."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and scheme != req.type:
            raise HTTPError(newurl, code, f"a redirection from {req.type} to {scheme} is not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(parts: SplitResult, file: Path, path: Path) -> None:
    """Downloads to ``file``. ConnectionError after several attempts, or at once if the server refuses."""
    address = parts._replace(path=quote(parts.path, SAFE), query=quote(parts.query, SAFE), fragment="").geturl()
    request, console = Request(address, headers={"User-Agent": "dynamic-kernels"}), Console(stderr=True)
    told = {"description": escape(path.name), "console": console, "disable": not sys.stderr.isatty()}
    for attempt in range(1, ATTEMPTS + 1):
        with writing(file):
            file.unlink(missing_ok=True)  # it may be a link to somewhere else
            target = open(file, "xb")  # noqa: SIM115
        try:
            with target, build_opener(_Redirects).open(request, timeout=TIMEOUT) as response:
                with wrap_file(response, response.length or 0, **told) as body:
                    while block := body.read(1 << 18):
                        with writing(file):
                            target.write(block)
                            target.flush()
                if response.length:
                    raise ConnectionError(f"the transfer broke off {response.length} bytes before its end")
            return
        except WriteError:
            raise
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS or (isinstance(error, HTTPError) and error.code < 500):
                raise ConnectionError(
                    f"could not download {parts.geturl()}: {error}. Get the file by other means and put it at {path}"
                ) from error
