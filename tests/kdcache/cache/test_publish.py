"""kd push uploads the right files, here to a stand-in for the Hub that speaks its protocol on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(ThreadingHTTPServer):
    """Answers the calls of an upload (create, preupload, large files by LFS, commit) and keeps what it receives."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created, self.files, self.large, self.refuses = [], {}, {}, False


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def _say(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(body).hexdigest()] = body
        self._say({})

    def do_GET(self):
        kind, _, name = self.path.split("?")[0].removeprefix("/api/").partition("/")
        self._say({"id": name.removesuffix("/revision/main"), "sha": "0" * 40, "siblings": [], "type": kind})

    def do_POST(self):
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            self._say({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            request = json.loads(body)
            self.server.created.append(request)
            kind = "datasets/" if request.get("type") == "dataset" else ""
            self._say({"url": f"{self.server.url}/{kind}me/{request['name']}", "name": f"me/{request['name']}"})
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(("parquet", "safetensors")) else "regular",
                }
                for f in files
            ]
            self._say({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            self._say({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
            self._say({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/x/commit/0"})
        else:
            self._say({"error": f"not known here: {self.path}"}, 404)

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


@pytest.fixture()
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture()
def at_hub(hub, tmp_path):
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}


def test_a_cache_goes_to_the_hub_whole_and_nothing_else_does(kd, tiny_cache, hub, at_hub, tmp_path):
    import shutil

    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    (cache / "set-aside").mkdir()
    for stray in ("set-aside/train-00000.parquet", "notes.txt", ".lock", "data/.x.tmp", "data/train-00099.parquet"):
        (cache / stray).write_bytes(b"mine")
    dry = json.loads(kd("push", cache, "me/said", "--dry-run", "--json", env=at_hub).stdout)
    assert not hub.created and dry["repository"] == "me/said (dataset, private)"
    done = json.loads(kd("push", cache, "me/said", "--json", env=at_hub).stdout)
    assert sorted(hub.files) == sorted(dry["names"]) == sorted(done["names"])
    assert "data/train-00099.parquet" not in hub.files
    assert {"README.md", "plan.json", "manifest.json", "vocab.parquet"} < set(hub.files)
    assert hub.created[0]["name"] == "said" and hub.created[0]["type"] == "dataset"
    assert "private" in json.dumps(hub.created[0])
    assert all(content == (cache / name).read_bytes() for name, content in hub.files.items())


def test_a_student_goes_without_its_checkpoints(kd, tiny_model, hub, at_hub, tmp_path):
    import shutil

    student = tmp_path / "kd"
    shutil.copytree(tiny_model, student)
    (student / "checkpoint-3").mkdir()
    for stray in ("checkpoint-3/model.safetensors", "training_args.bin", "optimizer.pt"):
        (student / stray).write_bytes(b"mine")
    listed = kd("push", student, "me/student", "--dry-run").stdout
    assert "model.safetensors" in listed and "checkpoint" not in listed and "training_args" not in listed
    kd("push", student, "me/student", "--public", env=at_hub)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert not any("checkpoint" in name or name.endswith((".bin", ".pt")) for name in hub.files)


def test_what_cannot_go_is_a_clear_sentence(kd, tiny_cache, tiny_model, hub, at_hub, tmp_path):
    assert "neither a cache" in kd("push", tmp_path, "me/x", "--dry-run", code=1).stderr
    assert "Repo id" in kd("push", tiny_model, "no spaces please", env=at_hub, code=2).stderr
    hub.refuses = True
    assert "hf auth login" in kd("push", tiny_model, "me/x", env=at_hub, code=1).stderr
    nowhere = at_hub | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "could not be reached" in kd("push", tiny_model, "me/x", env=nowhere, code=1).stderr
