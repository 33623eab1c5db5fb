"""The one writer of files: whole or not at all, with the permissions of any file, past links, full disks and kills."""

import errno
import json
import multiprocessing
import os
import stat
import threading
import time

import pytest

from kernels.files import WriteError, atomic_write, locked, write_json


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("content", ["é", "é".encode(), lambda file: file.write("é".encode())])
def test_text_bytes_and_functions_are_written(content, tmp_path):
    path = tmp_path / "new" / "folders" / "file"
    for _ in range(2):
        atomic_write(path, content)
        assert path.read_bytes() == "é".encode()
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_any_new_file_then_kept(umask, tmp_path):
    previous = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", "new")
        assert mode(tmp_path / "file") == 0o666 & ~umask
        (tmp_path / "file").chmod(0o604)
        atomic_write(tmp_path / "file", "again")
        assert mode(tmp_path / "file") == 0o604
    finally:
        os.umask(previous)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def disk_full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError, match=rf"^cannot write {path}: No space left on device$") as caught:
        atomic_write(path, disk_full)
    assert caught.value.errno == errno.ENOSPC

    def fails_on_top(file):  # as torch.save does
        try:
            disk_full(file)
        finally:
            raise RuntimeError("unexpected position")

    with pytest.raises(WriteError, match="No space left on device"):
        atomic_write(path, fails_on_top)
    with pytest.raises(RuntimeError, match="of its own"):
        atomic_write(path, lambda file: (_ for _ in ()).throw(RuntimeError("of its own")))
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(WriteError, match=r"cannot write .*file/below: Not a directory"):
        atomic_write(path / "below", "")
    with pytest.raises(WriteError, match=r"cannot write .*: Is a directory"):
        atomic_write(tmp_path, "")


def test_links_are_followed_and_devices_written_in_place(tmp_path):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    atomic_write(link, "through the link")
    assert link.is_symlink()
    assert target.read_text() == "through the link"
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()))
    reader.start()
    atomic_write(tmp_path / "pipe", "into the pipe")
    reader.join()
    assert received == ["into the pipe"]
    with open(tmp_path / "open", "wb", buffering=0) as file:  # as standard output sent to a file
        file.write(b"before, ")
        atomic_write(f"/proc/self/fd/{file.fileno()}", "between, ")
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")
        atomic_write(tmp_path / "stdout", "after")
    assert (tmp_path / "open").read_text() == "before, between, after"
    ours, theirs = os.pipe()
    atomic_write(f"/proc/self/fd/{theirs}", "into what is open")
    assert os.read(ours, 100) == b"into what is open"
    for descriptor in (ours, theirs):
        os.close(descriptor)
    atomic_write(os.devnull, "nowhere")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(WriteError, match="cannot write /dev/full: No space left"):
        atomic_write("/dev/full", "x")


def test_long_names_in_any_script(tmp_path):
    for name in ("a" * 255, "点" * 85, "[x]*.json"):
        atomic_write(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    with pytest.raises(WriteError, match="File name too long"):
        atomic_write(tmp_path / ("a" * 256), "")


def write_and_tell(path, pipe, seconds):
    def slowly(file):
        file.write(b"half")
        file.flush()
        pipe.send("writing")
        time.sleep(seconds)
        file.write(b", whole")

    atomic_write(path, slowly)


def test_writers_wait_for_each_other_and_remains_of_a_killed_one_are_written_over(tmp_path):
    path, fork = tmp_path / "file", multiprocessing.get_context("fork")
    for seconds, left in ((0.3, "half, whole"), (60, None)):
        ours, theirs = fork.Pipe()
        writer = fork.Process(target=write_and_tell, args=(path, theirs, seconds))
        writer.start()
        assert ours.recv() == "writing"
        if left is None:
            writer.kill()
            assert len(os.listdir(tmp_path)) == 2
        atomic_write(
            path, lambda file, old=left or "done": file.write(b"done" if path.read_text() == old else b"early")
        )
        writer.join()
        assert path.read_text() == "done"
        assert os.listdir(tmp_path) == ["file"]


def test_json_has_no_nan_and_any_file_name(tmp_path):
    value = {"name": "ü \udcff", "list": [1, None]}
    write_json(tmp_path / "file", value)
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == value
    assert "ü" in (tmp_path / "file").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", float("nan"))
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == value


def test_a_lock_keeps_others_out_and_ends_with_its_holder(tmp_path):
    with locked(tmp_path / "lock", 0), pytest.raises(TimeoutError), locked(tmp_path / "lock", 0):
        pass
    with locked(tmp_path / "lock", 0):
        pass
    with pytest.raises(WriteError, match=r"cannot write .*lock/below"), locked(tmp_path / "lock" / "below", 0):
        pass
