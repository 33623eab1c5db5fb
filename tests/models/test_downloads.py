"""Downloads against a server on this machine that stalls, truncates and lies."""

import hashlib
import http.server
import os
import pickle
import pwd
import resource
import threading

import pytest
import torch
from torch import nn

import models
from kernels.files import WriteError
from models.checkpoints import read_state_dict
from models.downloads import fetch

MODEL = nn.Linear(300, 300)


class Handler(http.server.BaseHTTPRequestHandler):
    """Plays one act of ``server.script`` a request, then serves whole files."""

    def log_message(self, format, *args):
        pass

    def send(self, status, body, sent=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.close_connection = True

    def do_GET(self):
        server: Server = self.server  # pyright: ignore[reportAssignmentType]
        position = self.headers["Range"]
        server.requests.append(position)
        act = server.script.pop(0) if server.script else "whole"
        body, half = server.body, len(server.body) // 2
        etag = None if act.startswith("anonymous") else server.etag
        if act == "html":
            self.send(200, b"<!DOCTYPE html><title>Log in to the airport</title>")
        elif act == "absent":
            self.send(404, b"no")
        elif act == "busy":
            self.send(503, b"later")
        elif act.endswith("truncate"):
            self.send(200, body, half, ETag=etag)
        elif act == "stall":
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", server.etag)
            self.end_headers()
            self.wfile.write(body[:half])
            self.wfile.flush()
            server.over.wait(20)
        elif act == "other range":
            self.send(206, body[10:], ETag=etag, Content_Range=f"bytes 10-{len(body) - 1}/{len(body)}")
        elif act == "another version":  # although If-Range named the one before
            start = int((position or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            self.send(206, body[start:], ETag='"two"', Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        elif act == "short range":
            self.send(206, body[half:-9], ETag=etag, Content_Range=f"bytes {half}-{len(body) - 10}/{len(body)}")
        elif act.startswith("to "):
            self.send(302, b"", Location=act.removeprefix("to "))
        elif act == "refused range":
            self.send(416 if position else 200, body)
        elif position and self.headers["If-Range"] == server.etag:
            start = int(position.removeprefix("bytes=").removesuffix("-"))
            self.send(206, body[start:], ETag=etag, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send(200, body, ETag=etag)


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.script, self.requests, self.over = body, '"one"', [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1/weights.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    models.save_checkpoint(MODEL, path)
    return path.read_bytes()


@pytest.fixture
def server(weights):
    with Server(weights) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "hub" / "checkpoints"


def get(server, **kwargs):
    return fetch(kwargs.pop("url", server.url), **({"check": read_state_dict, "timeout": 0.5, "pause": 0.001} | kwargs))


def kept(cache):
    return sorted(name for name in os.listdir(cache) if not name.endswith(".lock"))


def test_load_checkpoint_downloads_once_and_pins(server, cache, weights):
    model = nn.Linear(300, 300)
    for _ in range(2):
        models.load_checkpoint(model, server.url + "?token=secret")
        assert torch.equal(model.weight, MODEL.weight)
    assert server.requests == [None]
    assert kept(cache) == ["weights.pth", "weights.pth.sha256"]
    digest = hashlib.sha256(weights).hexdigest()
    assert (cache / "weights.pth.sha256").read_text() == f"# {server.url}\n{digest}  weights.pth\n"


@pytest.mark.parametrize("act", ["truncate", "stall"])
def test_a_broken_transfer_is_resumed(act, server, weights):
    server.script = [act]
    assert get(server).read_bytes() == weights
    assert server.requests == [None, f"bytes={len(weights) // 2}-"]


@pytest.mark.parametrize(
    ("script", "resumed"),
    [
        (["anonymous truncate"], [False]),  # no ETag: nothing vouches for the rest
        (["truncate", "other range"], [True, False]),
        (["truncate", "another version"], [True, False]),
        (["truncate", "short range"], [True, False]),
        (["truncate", "refused range"], [True, False]),
        (["busy", "busy"], [False, False]),
    ],
)
def test_a_broken_transfer_is_restarted_where_it_cannot_be_resumed(script, resumed, server, weights):
    server.script = script
    assert get(server).read_bytes() == weights
    assert [position is not None for position in server.requests[1:]] == resumed


def test_a_file_that_changed_meanwhile_is_taken_afresh(server, weights, tmp_path):
    other = nn.Linear(300, 300)
    models.save_checkpoint(other, tmp_path / "other.pth")
    server.script = ["truncate"]
    original = server.process_request

    def changes(request, address):
        if server.requests:
            server.body, server.etag = (tmp_path / "other.pth").read_bytes(), '"two"'
        original(request, address)

    server.process_request = changes
    assert torch.equal(read_state_dict(get(server))["weight"], other.weight)


def test_a_server_that_never_sends_it_all(server, cache):
    server.script = ["truncate"] + ["anonymous truncate"] * 10
    with pytest.raises(ConnectionError, match=rf"{server.url}.* broke off .*put it at {cache}/weights\.pth"):
        get(server, attempts=3)
    assert len(server.requests) == 3
    assert kept(cache) == []


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/weights.pth", "file:///etc/passwd", "data:,x"])
def test_redirections_to_other_protocols_are_not_followed(address, server, cache):
    server.script = [f"to {address}"]
    with pytest.raises(ConnectionError, match=rf"could not download {server.url}.*(not followed|not allowed)"):
        get(server)
    assert len(server.requests) == 1
    server.script = ["to /v2/weights.pth"]
    get(server)


def test_nothing_is_written_through_links(server, cache, tmp_path, weights):
    cache.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    (cache / "incomplete-weights.pth").symlink_to(outside)
    assert get(server).read_bytes() == weights
    (cache / "weights.pth").unlink()
    (cache / "weights.pth.sha256").unlink()
    (cache / "weights.pth.sha256").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"weights\.pth\.sha256 is damaged, or a link; delete it"):
        get(server)
    assert outside.read_text() == "untouched"
    assert not (tmp_path / "absent").exists()


def test_a_full_disk_is_said_and_nothing_is_left(server, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(WriteError, match=rf"cannot write {cache}/incomplete-weights\.pth: File too large"):
            get(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(server.requests) == 1
    assert kept(cache) == []


def test_names_in_other_scripts_and_with_markup(server, weights):
    for name in ("权重 [bold].pth", "%E6%9D%83.pth", "[red].pth"):
        path = get(server, url=server.url.replace("weights.pth", name) + "?kind=é")
        assert path.read_bytes() == weights
    assert path.name == "[red].pth"


def test_without_a_home_directory_it_says_what_to_set(monkeypatch):
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(ValueError, match=r"no home directory .*; set TORCH_HOME"):
        fetch("http://127.0.0.1:9/weights.pth")


def test_an_absent_file_is_asked_for_once(server, cache):
    server.script = ["absent"]
    with pytest.raises(ConnectionError, match=rf"{server.url}.*404.*put it at {cache}/weights\.pth"):
        get(server)
    assert len(server.requests) == 1


def test_offline_then_a_file_put_there_by_hand(cache, weights):
    with Server(weights) as server:
        pass  # closed: nobody listens
    with pytest.raises(ConnectionError, match=rf"could not download {server.url}.*put it at {cache}/weights\.pth"):
        get(server)
    (cache / "weights.pth").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="web page"):
        get(server)
    (cache / "weights.pth").write_bytes(weights)
    assert torch.equal(read_state_dict(get(server))["weight"], MODEL.weight)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>Log in to the airport", "web page"),
        (pickle.dumps(Hostile(), protocol=2), r"refused: it asks to call \w+\.mkdir"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_weight_file_is_neither_kept_nor_run(body, reason, server, cache, tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.body = body
    with pytest.raises(ValueError, match=rf"{server.url} gave no weight file.*{reason}"):
        get(server)
    assert kept(cache) == []
    assert not (tmp_path / "was_run").exists()
    server.body = weights
    assert get(server).read_bytes() == weights


def test_a_shortened_length_is_noticed(server, cache, weights):
    server.body = weights[: len(weights) // 3]  # all that the stated Content-Length promises
    with pytest.raises(ValueError, match="damaged, truncated"):
        get(server)
    assert kept(cache) == []


def test_the_pinned_checksum_is_kept(server, cache, weights, tmp_path):
    path = get(server)
    path.write_bytes(weights[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"{path} has the SHA-256 \w+, expected .*changed or damaged.*{server.url}"):
        get(server)
    path.unlink()
    models.save_checkpoint(nn.Linear(300, 300), tmp_path / "other.pth")
    server.body = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(ValueError, match=rf"{server.url} gave .* expected .*delete {path}\.sha256"):
        get(server)
    assert not path.exists()
    path.with_name("weights.pth.sha256").unlink()
    assert get(server).read_bytes() == server.body


def test_a_published_checksum_is_checked(server, cache, weights):
    with pytest.raises(ValueError, match="expected 0000"):
        get(server, sha256="0" * 64)
    assert kept(cache) == []
    assert get(server, sha256=hashlib.sha256(weights).hexdigest().upper()).read_bytes() == weights


def test_two_addresses_do_not_share_a_file(server):
    get(server)
    with pytest.raises(ValueError, match=rf"url: .*weights\.pth came from {server.url}"):
        fetch(server.url.replace("v1", "v2"))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/file.pth",
        "http://host/",
        "https:///file.pth",
        "http://host/a/..",
        "file",
        "http://host:port/file.pth",
        "http://host/%00",
        "http://host/a%1b[2J",
        f"http://host/{'a' * 201}",
        f"http://host/{'权' * 80}.pth",
        "http://host/weights.pth.sha256",
        "http://host/weights.pth.lock",
        "http://host/incomplete-weights.pth",
    ],
)
def test_an_address_without_a_file_is_refused(url):
    with pytest.raises(ValueError, match=r"^url(:| must be http)"):
        fetch(url)
