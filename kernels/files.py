"""Writing files: at any moment, also after a kill, a reader finds the old content or the new, never half of one."""

import contextlib
import json
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

try:
    import fcntl
except ImportError:  # Windows, where nobody can delete a file that a writer has open
    fcntl = None

PathLike = str | os.PathLike[str]


class WriteError(OSError):
    """A file that cannot be written, as on a full disk: the message is a sentence, ``errno`` is the system's."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Around writes to ``path``: the system's refusals become a ``WriteError`` that names it."""
    try:
        yield
    except filelock.Timeout:  # somebody else writes there
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def atomic_write(path: PathLike, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Puts ``content`` at ``path``, with the permissions of the file there or else of any new file.

    Missing folders are made. Where ``path`` is a link the file behind it is replaced. A path that is not a regular
    file, such as /dev/null or a pipe, or that a process has open, such as /dev/stdout, is written into.

    Args:
        path: of the file.
        content: text (in UTF-8), bytes, or a function that writes into the binary file it is given.

    Raises:
        WriteError: it cannot be written; what was there is still there.
    """
    with writing(path):
        if _is_stream(Path(path)):
            with open(path, "ab") as file:
                _fill(file, content)
            return
        target = Path(os.path.realpath(path))
        with contextlib.suppress(FileExistsError):  # it is a file: opening a path below it gives the better message
            target.parent.mkdir(parents=True, exist_ok=True)
        # One name, so that what a killed writer left is written over; short enough to leave room, in whatever script.
        temporary = target.with_name(f".{target.name[:50]}.{zlib.crc32(os.fsencode(target.name)):08x}.tmp")
        with open(_open_alone(temporary), "wb") as file:
            try:
                _fill(file, content)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave the new name with no content
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
                if fcntl is None:
                    file.close()  # Windows does not rename what is open
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def write_json(path: PathLike, value: Any) -> None:
    """``atomic_write`` of ``value`` as JSON. ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is not UTF-8 holds lone surrogates; escaped with a backslash they are JSON again.
    atomic_write(path, text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def locked(path: PathLike, seconds: float) -> Iterator[None]:
    """Holds the lock file ``path``, which is free again when its holder ends, however that happens.

    On a file system without locks there is a warning instead.

    Raises:
        filelock.Timeout: another process has held it for ``seconds``.
        WriteError: the lock file cannot be made.
    """
    lock = filelock.FileLock(path, timeout=seconds)
    with writing(path):
        try:
            lock.acquire()
        except NotImplementedError:
            warnings.warn(f"the file system of {path} has no locks: other processes are not kept out", stacklevel=3)
    try:
        yield
    finally:
        lock.release()


def _is_stream(path: Path) -> bool:
    """Whether this is not a regular file, or names a file that a process has open, as /dev/stdout may."""
    if path.exists() and not path.is_file():
        return True
    return os.path.realpath(path.parent).startswith("/proc/") or (
        path.is_symlink() and os.readlink(path).startswith("/proc/")
    )


def _fill(file: BinaryIO, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    if callable(content):
        try:
            content(file)
        except Exception as error:  # torch.save ends in another error over the system's
            refusal: BaseException | None = error
            while refusal is not None and not isinstance(refusal, OSError):
                refusal = refusal.__context__
            raise (refusal or error) from error.__cause__
    else:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def _open_alone(path: Path) -> int:
    """An empty file there, for this writer alone as long as it is open; another waits until then."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with contextlib.suppress(OSError):  # on a file system without locks
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            os.truncate(descriptor, 0)
            return descriptor
        os.close(descriptor)  # the writer that had it has put it in place by now
