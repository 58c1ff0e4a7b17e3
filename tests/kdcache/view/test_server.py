"""Whom the server of kd view answers, and what."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from urllib.parse import quote

import pytest

from kdcache.errors import KDError
from kdcache.view.server import Server


@pytest.fixture
def server(viewed):
    with Server(viewed, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, path, method="GET", root=None, **headers):
    """Return status, headers and body of the answer to a path below ``root``, by default the server's secret one."""
    root = server.root if root is None else root
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, root + path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_it_listens_only_on_this_machine(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1.evil.example:{port}", "localhost:1", ""])
def test_it_answers_only_to_its_own_name(server, host):
    for path in ("/", "/api/about"):
        assert get(server, path, Host=host.format(port=server.server_port))[0] == 421
    assert get(server, "/api/about", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("root", ["", "/guessed", "/" + "A" * 22])
def test_nothing_is_answered_without_the_secret_path(server, root):
    for path in ("/", "/view.js", "/api/about", "/api/samples"):
        status, _, body = get(server, path, root=root)
        assert status == 404 and "the whole address that kd view printed" in json.loads(body)["error"]
    assert server.url == f"http://127.0.0.1:{server.server_port}{server.root}/" and len(server.root) > 20


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_it_answers_only_get(server, method):
    assert get(server, "/api/about", method)[0] == 405


def test_a_page_of_another_site_may_link_to_it_but_not_send_questions(server):
    assert get(server, "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert get(server, "/api/about", **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert get(server, "/api/about", **{"Sec-Fetch-Site": "same-site"})[0] == 403
    assert get(server, "/api/about", **{"Sec-Fetch-Site": "same-origin"})[0] == 200


@pytest.mark.parametrize(
    "path", ["/../serve.py", "/%2e%2e/serve.py", "//etc/passwd", "//[", "/view.js/..", "/plan.json", "/api/"]
)
def test_it_serves_only_its_own_files(server, path):
    assert get(server, path)[0] == 404


def test_every_answer_forbids_the_page_what_it_does_not_need(server):
    for path in ("/", "/view.js", "/base.css", "/api/about", "/nowhere"):
        _, headers, _ = get(server, path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("/api/sample?id=rows:r7", "has no sample rows:r7; there is rows:r7:g, rows:r7:s0"),
        ("/api/sample", "has no sample"),
        ("/api/samples?sort=best", "expected one of cache, uncertain"),
        ("/api/samples?split=dev", "expected one of train"),
        ("/api/samples?offset=-1", "expected a whole number"),
        ("/api/candidates?id=rows:r7:g&first=²", "expected a whole number"),
        ("/api/opinion?id=rows:r7:g", "start kd view with --student"),
    ],
)
def test_a_wrong_question_is_answered_with_a_sentence(server, path, sentence):
    status, _, body = get(server, quote(path, safe="/?&=:"))
    assert status == 400 and sentence in json.loads(body)["error"]


def test_a_page_beyond_the_end_is_empty(server):
    assert json.loads(get(server, "/api/samples?offset=999999999")[2]) == {"total": 78, "offset": 999999999, "rows": []}
    assert json.loads(get(server, "/api/candidates?id=rows:r7:g&first=5000")[2])["positions"] == []


def test_a_port_that_is_taken_is_refused_if_named_and_replaced_otherwise(viewed, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(KDError, match=f"--port {port}: .* in use; use another"):
            Server(viewed, port=port)
        monkeypatch.setattr("kdcache.view.server.PORT", port)
        with Server(viewed) as other:
            assert other.server_port not in (port, 0)
