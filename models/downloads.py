"""Weight files from the web, into the folder that ``torch.hub`` keeps them in."""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit

import torch

from kernels.files import WriteError, atomic_write, locked, writing

NETWORK_ERRORS = (URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def fetch(url: str, check: Callable[[Path], object] | None = None) -> Path:
    """Path of the file behind ``url`` in ``torch.hub.get_dir()/checkpoints``, downloaded unless it lies there.

    The file appears under its name only when it is complete and ``check`` accepts it. NAME.url beside it says where it
    came from, so that two addresses never share a file. A file that was put there by hand is taken as it is.

    Args:
        url: http(s) address; its last component names the file.
        check: called with the path of the downloaded file; raises ValueError to refuse it.

    Raises:
        ConnectionError: the file could not be had; the message names ``url`` and where to put the file by hand.
        ValueError: ``url`` names no file, ``check`` refused the file, or the one there came from elsewhere.
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
    if name.startswith("incomplete-") or name.endswith((".lock", ".url")):
        raise ValueError(f"url: {name!r} cannot be the name of a file here; download it by hand and pass its path")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if folder.parts[0].startswith("~"):
        raise ValueError("url: there is no home directory to keep downloads in; set TORCH_HOME to a folder")
    path, origin, incomplete = folder / name, folder / f"{name}.url", folder / f"incomplete-{name}"
    source = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()  # without secrets
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{name}.lock", -1):
        if path.exists():
            known = origin.read_text("utf-8", "replace").strip() if origin.is_file() else source
            if known != source:
                raise ValueError(
                    f"url: {path} came from {known}, not from {url}; delete it, or download the file yourself and "
                    "pass its path"
                )
            return path
        try:
            address = quote(url, "!#$%&'()*+,/:;=?@[]~")  # other scripts as %XX
            torch.hub.download_url_to_file(address, str(incomplete), progress=sys.stderr.isatty())
            if check is not None:
                check(incomplete)
            atomic_write(origin, f"{source}\n")
            os.replace(incomplete, path)
        except NETWORK_ERRORS as error:
            raise ConnectionError(
                f"could not download {url}: {error}. Get the file by other means and put it at {path}"
            ) from error
        except WriteError:
            raise
        except OSError as error:
            raise WriteError(error.errno, error.strerror or str(error), str(incomplete)) from error
        except ValueError as error:
            raise ValueError(f"{source} gave no weight file: {error}") from error
        finally:
            incomplete.unlink(missing_ok=True)
    return path
