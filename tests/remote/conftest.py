"""A real S3 server (moto, in a process of its own) on 127.0.0.1, behind a proxy that counts bytes and injects faults."""

from __future__ import annotations

import collections
import http.client
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKIDFORTESTSONLY", "a-secret-that-nobody-may-see"

#: Maps the method and path of a request to the fault that it meets; None lets it pass.
Fault = Callable[[str, str], str | None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Proxy(http.server.ThreadingHTTPServer):
    """A proxy of the server at ``port``. ``fault(method, path)`` decides what happens to a request:

    * ``cut`` closes the connection in the middle of the request's body,
    * ``truncate`` closes it in the middle of the response,
    * ``hold`` sends no response until ``release`` is set,
    * a number is returned as the status.

    ``sent`` counts the bytes of responses to GET, by the client's application id and the path.
    """

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = port
        self.reset()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reset(self) -> None:
        self.fault: Fault = lambda method, path: None
        self.held, self.release = threading.Event(), threading.Event()
        self.sent: collections.Counter[tuple[str, str]] = collections.Counter()
        self.requests: list[tuple[str, str]] = []

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that close the connection, as the tests make them do."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def pass_on(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.server.requests.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault == "hold":
            self.server.held.set()
            self.server.release.wait(60)
            self.close_connection = True
            return
        if fault is not None and fault != "truncate":
            code = {"503": "SlowDown", "403": "SignatureDoesNotMatch", "501": "NotImplemented"}[fault]
            self.answer(int(fault), {}, f"<Error><Code>{code}</Code><Message>{KEY} no</Message></Error>".encode())
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        data = response.read()
        if self.command == "GET":
            app = re.search(r"app/(\S+)", self.headers.get("User-Agent", ""))
            self.server.sent[app[1] if app else "", self.path.partition("?")[0]] += len(data)
        self.answer(response.status, dict(response.getheaders()), data, half=fault == "truncate")
        upstream.close()

    def answer(self, status: int, headers: dict[str, str], data: bytes, half: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    with open(log, "w") as sink:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def proxy(s3_port: int) -> Iterator[Proxy]:
    proxy = Proxy(s3_port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()


@pytest.fixture(scope="session")
def buckets(s3_port: int) -> Any:
    """A client that reaches the server directly, not through the proxy."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{s3_port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    for name in ("bucket", "other"):
        client.create_bucket(Bucket=name)
    client.put_object(Bucket="other", Key="secret.csv", Body=b"a\n1\n")
    return client


@pytest.fixture
def s3(proxy: Proxy, buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, which the environment names as the server. Each test has a disk cache of its own."""
    proxy.reset()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "KDCACHE_DISK_CACHE": str(tmp_path / "disk cache"),
        "KDCACHE_REMOTE_TIMEOUT": "20",
    }.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.reset()
    proxy.release.set()


def objects(buckets: Any, prefix: str) -> dict[str, bytes]:
    """Return the contents of all objects below a prefix of the bucket, by the rest of their keys."""
    listed = buckets.list_objects_v2(Bucket="bucket", Prefix=prefix + "/").get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix + "/"): buckets.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read()
        for entry in listed
    }


def put(buckets: Any, folder: Path, prefix: str) -> str:
    """Copy a local cache into the bucket, and return its location."""
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder)}"
            buckets.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())
    return f"s3://bucket/{prefix}"
