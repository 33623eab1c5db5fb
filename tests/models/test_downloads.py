"""Downloads against a server on this machine that stalls, truncates, redirects and lies."""

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
from tests.support import Hostile

MODEL = nn.Linear(300, 300)
STALL: dict[str, str] = {}
WHOLE, HALF, STALLED = (200, 1.0, {}), (200, 0.5, {}), (200, 0.5, STALL)  # status, share of the body sent, headers
BUSY, LOST = (503, 1.0, {}), (404, 1.0, {})


class Handler(http.server.BaseHTTPRequestHandler):
    """Plays one act of ``server.script`` per request, then serves whole files."""

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        server: Server = self.server  # pyright: ignore[reportAssignmentType]
        server.requests.append(self.path)
        status, share, headers = server.script.pop(0) if server.script else WHOLE
        self.send_response(status)
        for name, value in {"Content-Length": str(len(server.body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(server.body[: int(share * len(server.body))])
        self.wfile.flush()
        if headers is STALL:
            server.over.wait(20)
        self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.script, self.requests, self.over = body, [], [], threading.Event()
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
    monkeypatch.setattr("models.downloads.TIMEOUT", 0.5)
    return tmp_path / "hub" / "checkpoints"


def get(server, url=None):
    return fetch(url or server.url, check=read_state_dict)


def kept(cache):
    return sorted(name for name in os.listdir(cache) if not name.endswith(".lock"))


def test_load_checkpoint_downloads_once_and_pins(server, cache, weights, tmp_path):
    model = nn.Linear(300, 300)
    for _ in range(2):
        models.load_checkpoint(model, server.url + "?token=secret")
        assert torch.equal(model.weight, MODEL.weight)
    assert server.requests == ["/v1/weights.pth?token=secret"]
    assert kept(cache) == ["weights.pth", "weights.pth.sha256"]
    path, digest = cache / "weights.pth", hashlib.sha256(weights).hexdigest()
    assert (cache / "weights.pth.sha256").read_text() == f"# {server.url}\n{digest}  weights.pth\n"
    with pytest.raises(ValueError, match=rf"url: .*weights\.pth came from {server.url}, not from .*v2"):
        fetch(server.url.replace("v1", "v2"))
    path.write_bytes(weights[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"SHA-256 \w+ here, expected {digest}: {path} was changed or damaged"):
        get(server)
    path.unlink()
    models.save_checkpoint(nn.Linear(300, 300), tmp_path / "other.pth")
    server.body = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(ValueError, match=rf"expected {digest}: if that is meant, delete {path}\.sha256"):
        get(server)
    assert not path.exists()
    path.with_name("weights.pth.sha256").unlink()
    assert get(server).read_bytes() == server.body


@pytest.mark.parametrize("script", [[HALF], [STALLED, HALF], [BUSY] * 2])
def test_a_broken_transfer_is_started_afresh(script, server, weights):
    server.script = [*script]
    assert get(server).read_bytes() == weights
    assert len(server.requests) == len(script) + 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([LOST], "404"),
        ([BUSY] * 3, "503"),
        ([HALF] * 3, r"broke off \d+ bytes before its end"),
        ([(302, 1.0, {"Location": "ftp://127.0.0.1/weights.pth"})], "not followed"),
        ([(302, 1.0, {"Location": "file:///etc/passwd"})], "not (followed|allowed)"),
    ],
)
def test_a_failed_download_says_where_to_put_the_file(script, message, server, cache, weights):
    server.script = [*script]
    with pytest.raises(ConnectionError, match=rf"could not download {server.url}.*{message}.*put it at {cache}/wei"):
        get(server)
    assert kept(cache) == []
    (cache / "weights.pth").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="web page"):
        get(server)
    (cache / "weights.pth").write_bytes(weights)
    assert torch.equal(read_state_dict(get(server))["weight"], MODEL.weight)
    assert len(server.requests) == len(script)


def test_nothing_is_written_through_links(server, cache, tmp_path, weights):
    cache.mkdir(parents=True)
    outside, pin = tmp_path / "outside", cache / "weights.pth.sha256"
    outside.write_text("untouched")
    (cache / "incomplete-weights.pth").symlink_to(outside)
    assert get(server).read_bytes() == weights
    pin.unlink()
    pin.symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"weights\.pth\.sha256 is damaged, or a link; delete it"):
        get(server)
    assert outside.read_text() == "untouched"
    assert not (tmp_path / "absent").exists()


def test_a_server_that_does_not_answer(cache, weights):
    with Server(weights) as server:
        pass
    with pytest.raises(ConnectionError, match=rf"could not download {server.url}.*put it at {cache}/weights\.pth"):
        get(server)


@pytest.mark.parametrize(
    ("body", "act", "reason"),
    [
        (b"<html>Log in to the airport", WHOLE, "web page"),
        (pickle.dumps(Hostile(), protocol=2), WHOLE, r"refused: it asks to call \w+\.mkdir"),
        (b"", WHOLE, "is empty"),
        (None, (200, 0.3, {"Content-Length": None}), "damaged, truncated"),  # the length is a lie, too
    ],
)
def test_other_files_are_neither_kept_nor_run(body, act, reason, server, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, server.script = server.body, [act]
    server.body = whole if body is None else body
    with pytest.raises(ValueError, match=rf"{server.url} gave no weight file.*{reason}"):
        get(server)
    assert kept(cache) == []
    assert not (tmp_path / "was_run").exists()
    server.body = whole
    assert get(server).read_bytes() == whole


def test_a_full_disk_is_said_and_nothing_is_left(server, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(WriteError, match=rf"cannot write {cache}/incomplete-weights\.pth: File too large"):
            get(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept(cache) == []


def test_names_in_other_scripts(server, weights):
    for name in ("权重 [bold].pth", "%E6%9D%83.pth"):
        assert get(server, server.url.replace("weights.pth", name) + "?kind=é").read_bytes() == weights


def test_without_a_home_directory_it_says_what_to_set(monkeypatch):
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(ValueError, match=r"no home directory .*; set TORCH_HOME"):
        fetch("http://127.0.0.1:9/weights.pth")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/file.pth", "http://host/", "https:///file.pth", "http://host/a/..", "file",
        "http://host:port/file.pth", f"http://host/{'权' * 80}.pth", "http://host/%00", "http://host/a%1b[2J", "http://host/weights.pth.sha256",
        "http://host/weights.pth.lock", "http://host/incomplete-weights.pth",
    ],
)  # fmt: skip
def test_an_address_without_a_file_is_refused(url):
    with pytest.raises(ValueError, match=r"^url(:| must be http)"):
        fetch(url)
