"""`pyllama download` through the real huggingface_hub, against a server here that speaks the hub's protocol.

The library decides what is asked for and how often; the server answers as the hub's documentation and its headers say,
and can lose a connection in the middle of a file. Which files are chosen: tests/cli/test_download.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantize.readers import open_source
from tests import make_sources as make

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parent.parent.parent
SHARD = "model-00002-of-00002.safetensors"
WANTED = {"config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", SHARD}
RUN = """
import json, sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # it keeps whole pieces: with 10 MB, nothing of these files
from pyllama.cli.main import main
print(json.dumps([main(["download", *arguments]) for arguments in json.loads(sys.argv[1])]), file=sys.stderr)
"""


class Hub(BaseHTTPRequestHandler):
    """GET api/models/REPO[/revision/REVISION], HEAD and GET REPO/resolve/REVISION/FILE."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[tuple[str, str]]  # what was got, and from which byte on
    hidden: set[str]  # files that are listed and not there
    lose: dict[str, int]  # file -> bytes after which the connection is lost, once

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/owner/(\w+)(?:/revision/(\w+))?(?:\?.*)?", self.path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/owner/(\w+)/resolve/(\w+)/([\w.-]+)", self.path):
            self._file(*found.groups())
        else:
            self._refuse(404, "NotFound", "Sorry, we can't find the page you are looking for.")

    def _info(self, repo: str, revision: str) -> None:
        if repo == "gated":
            self._refuse(403, "GatedRepo", "Access to model owner/gated is restricted.")
        elif repo not in ("small", "asking"):
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": str(p.relative_to(self.folder)), "size": p.stat().st_size} for p in files]
            self._answer(200, json.dumps({"id": f"owner/{repo}", "sha": COMMIT, "siblings": siblings}).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        if repo == "asking":  # of such a repository the list of files is public
            self._refuse(401, "GatedRepo", "Access to model owner/asking is restricted.")
        elif revision != COMMIT or name in self.hidden:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send(name, (self.folder / name).read_bytes())

    def _send(self, name: str, data: bytes) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        is_head = self.command == "HEAD"
        if not is_head:
            self.asked.append((name, start))
        n = None if is_head else self.lose.pop(name, None)
        self._answer(206 if start else 200, data[start:], headers, n)

    def _refuse(self, code: int, kind: str, message: str) -> None:
        self._answer(code, b"", {"X-Error-Code": kind, "X-Error-Message": message})

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None, n: int | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:n])
        self.close_connection = n is not None


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A repository of a small model in every form, with code and much else beside it."""
    folder = make.write_hf_folder(tmp_path / "there", make.Shape(), make.random_weights(make.Shape()), shards=2)
    (folder / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    for name in ("pytorch_model.bin", "small-Q8_0.gguf", "modeling_small.py", "original/consolidated.00.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"GGUF")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": [], "hidden": set(), "lose": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield SimpleNamespace(folder=folder, at=f"http://127.0.0.1:{server.server_port}", handler=handler, home=tmp_path)
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: SimpleNamespace, *commands: list[str]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, what stdout says and what stderr says, of downloads one after the other in one process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = clean | {"HF_ENDPOINT": hub.at, "HF_HOME": str(hub.home / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    *said, codes = done.stderr.splitlines()
    return json.loads(codes), done.stdout.splitlines(), [line for line in said if line.startswith(("pyllama", "owner"))]


def test_a_model_and_nothing_else(hub: SimpleNamespace) -> None:
    here = hub.home / "here"
    codes, out, said = run(hub, ["owner/small", "-o", str(here)], ["owner/small", "-o", str(here)])
    assert codes == [0, 0] and out == [str(here)] * 2
    assert said[0].startswith(f"owner/small at {COMMIT[:12]}: 5 files, 0.") and len(said) == 2
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == {
        name: (hub.folder / name).read_bytes() for name in WANTED
    }
    assert sorted(hub.handler.asked) == sorted((name, 0) for name in WANTED), "each once: the second time all is there"
    assert open_source(here).config == make.Shape().config()


def test_a_revision_into_the_cache(hub: SimpleNamespace) -> None:
    codes, out, said = run(
        hub, ["owner/small", "--revision", "v1", "--include", "*.gguf"], ["owner/small", "--revision", "v9"]
    )
    assert codes == [0, 1] and hub.handler.asked == [("small-Q8_0.gguf", 0)]
    assert Path(out[0]).read_bytes() == b"GGUF" and Path(out[0]).is_relative_to(hub.home / "hf")
    assert COMMIT in out[0] and said[1:] == ["pyllama: owner/small: has no such branch, tag or commit"]


def test_a_connection_that_is_lost_goes_on_where_it_stopped(hub: SimpleNamespace) -> None:
    """By the library of 2026 in the same command, by older ones in the next."""
    hub.handler.lose[SHARD] = 5000
    codes, out, _ = run(hub, ["owner/small"], ["owner/small"])
    assert codes[-1] == 0 and [start for name, start in hub.handler.asked if name == SHARD] == [0, 5000]
    assert (Path(out[-1]) / SHARD).read_bytes() == (hub.folder / SHARD).read_bytes()
    assert open_source(out[-1]).config == make.Shape().config()


def test_what_is_there_is_not_fetched_again(hub: SimpleNamespace) -> None:
    hub.handler.hidden.add(SHARD)
    codes, out, said = run(hub, ["owner/small"])
    assert codes == [1] and out == [] and said[1].startswith(f"pyllama: owner/small: {SHARD}: ")
    assert {name for name, _ in hub.handler.asked} == WANTED - {SHARD}
    hub.handler.hidden.clear()
    hub.handler.asked.clear()
    codes, out, _ = run(hub, ["owner/small"])
    assert codes == [0] and hub.handler.asked == [(SHARD, 0)]
    assert open_source(out[0]).config == make.Shape().config()


def test_refusals_are_one_line(hub: SimpleNamespace) -> None:
    codes, out, said = run(hub, ["owner/none"], ["owner/gated"], ["owner/asking"])
    assert codes == [1, 1, 1] and out == []
    assert said[0].startswith("pyllama: owner/none: there is no such repository, or it is private: check the name")
    assert said[1].startswith("pyllama: owner/gated: is gated: accept its terms on its page there, then log in (")
    assert said[3].startswith("pyllama: owner/asking: is gated: ")  # after the line about what is fetched
    hub.at = "http://127.0.0.1:9"  # where nobody listens
    codes, _, said = run(hub, ["owner/small"])
    assert codes == [1] and said[0].startswith("pyllama: owner/small: the hub cannot be reached (")
