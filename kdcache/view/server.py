"""The page of `kd view` and its answers over HTTP, on this machine alone.

    kd view data/cache --student data/kd

What a cache holds is anybody's text, and any page in the same browser, and any user of the same machine, can send
requests here. So: it listens on 127.0.0.1, answers GET alone, to its own name (no DNS rebinding) and its own page,
below a path that only those know who were told the address; serves four files and five questions, and nothing else by
path; and forbids the page to load or run anything that is not one of them.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

import numpy as np

from kdcache.cache.reader import Sample
from kdcache.errors import KDError, UsageError, first_line
from kdcache.view.view import View, escape, number, numbers

ADDRESS = "127.0.0.1"
PORT = 8470  # unless it is taken
POSITIONS = 256  # whose candidates are sent at once, at most
PAGES = Path(__file__).parent / "page"
FILES = {
    "/": ("view.html", "text/html; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/view.css": ("view.css", "text/css; charset=utf-8"),
    "/base.css": ("base.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Question = dict[str, str]


class Forced(Protocol):
    """What a student says of a sample with T positions and N candidates in all."""

    probabilities: np.ndarray  # [N] of the teacher's candidates
    tails: np.ndarray  # [T] the student's mass outside them
    kl: np.ndarray  # [T] nats
    logprobs: np.ndarray  # [T] nats, of the completion's own tokens
    ranks: np.ndarray  # [T] of them
    best: np.ndarray  # [T] ids of the student's best tokens


class Student(Protocol):
    """Reads a sample that has its entropies. The trainer has one; it brings torch along."""

    name: str

    def __call__(self, sample: Sample) -> Forced: ...


class Server(ThreadingHTTPServer):
    """Listens from the start. ``serve_forever`` answers, and raises KDError if the cache cannot be indexed."""

    daemon_threads = True

    def __init__(self, view: View, student: Student | None = None, port: int | None = None, sample: str | None = None):
        """``port``: this one (KDError if it is taken); None: PORT, else a free one. ``sample``: the one to open first."""
        self.view, self.student, self.first_sample = view, student, sample
        self.root = f"/{secrets.token_urlsafe(16)}"
        self._forced: tuple[str, Forced] | None = None
        self._reading = threading.Lock()
        try:
            super().__init__((ADDRESS, PORT if port is None else port), Handler)
        except OSError as error:
            if port is not None:
                raise KDError(f"--port {port}: {error.strerror}; use another, or leave it out for a free one") from None
            super().__init__((ADDRESS, 0), Handler)

    def service_actions(self) -> None:
        """Called by ``serve_forever`` all the while: what the indexing raises ends it."""
        if self.view.indexing.done():
            self.view.indexing.result()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a page that was left is no news
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}{self.root}/"

    def about(self, _: Question) -> dict[str, Any]:
        student = self.student.name if self.student else None
        if student and Path(student).is_dir():
            student = Path(student).resolve().name
        return {**self.view.about(), "student": student, "sample": self.first_sample}

    def samples(self, asked: Question) -> dict[str, Any]:
        return self.view.page(
            asked.get("search", ""), asked.get("sort", "cache"), asked.get("split", ""), whole(asked, "offset")
        )

    def sample(self, asked: Question) -> dict[str, Any]:
        return self.view.sample(asked.get("id", ""))

    def candidates(self, asked: Question) -> dict[str, Any]:
        """Of up to POSITIONS positions; the student's beside them, where it has read the sample."""
        first = whole(asked, "first")
        found = self.view.candidates(asked.get("id", ""), first, first + POSITIONS)
        read = self._forced
        if read and read[0] == asked.get("id"):
            counts = self.view.shown(read[0]).sample.candidates.counts
            start = int(counts[:first].sum())
            for position, told in enumerate(found, first):
                end = start + int(counts[position])
                told["student"] = numbers(read[1].probabilities[start:end])
                told["student_tail"] = number(read[1].tails[position])
                start = end
        return {"first": first, "positions": found}

    def opinion(self, asked: Question) -> dict[str, Any]:
        """The student reads the sample: its KL at each token, and what it thinks of the token itself."""
        if self.student is None:
            raise UsageError("there is no student; start kd view with --student")
        shown = self.view.shown(asked.get("id", ""))
        with self._reading:
            if self._forced is None or self._forced[0] != shown.sample.sample_id:
                self._forced = shown.sample.sample_id, self.student(shown.sample)
            found = self._forced[1]
        return {
            "kl": numbers(found.kl),
            "logprobs": numbers(found.logprobs),
            "ranks": found.ranks.tolist(),
            "best": [escape(token) for token in self.view.bytes_of(found.best)],
        }


QUESTIONS: dict[str, Callable[[Server, Question], dict[str, Any]]] = {
    "/api/about": Server.about,
    "/api/samples": Server.samples,
    "/api/sample": Server.sample,
    "/api/candidates": Server.candidates,
    "/api/opinion": Server.opinion,
}


def whole(asked: Question, name: str) -> int:
    """A number from 0 on; 0 where it is not given."""
    text = asked.get(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"{name}={text[:20]}: expected a whole number")
    return int(text)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "kd", ""
    timeout = 60

    def do_GET(self) -> None:
        whole_path, _, asked = self.path.partition("?")
        root, path = whole_path[: len(self.server.root)], whole_path[len(self.server.root) :]
        if self.headers.get("Host") not in [f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")]:
            self._error(421, f"this server is {ADDRESS}:{self.server.server_port} and answers to no other name")
        elif not secrets.compare_digest(root.encode(), self.server.root.encode()):
            self._error(404, "there is nothing here; open the whole address that kd view printed")
        elif path in FILES:
            name, kind = FILES[path]
            self._send(200, kind, (PAGES / name).read_bytes())
        elif path not in QUESTIONS:
            self._error(404, "there is nothing here")
        elif self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            self._error(403, "only this server's own page may ask")
        else:
            self._answer(QUESTIONS[path], {name: values[-1] for name, values in parse_qs(asked).items()})

    def _answer(self, question: Callable[[Server, Question], dict[str, Any]], asked: Question) -> None:
        try:
            found = question(self.server, asked)
        except KDError as error:
            self._error(400 if error.exit_code == 2 else 500, str(error))
        except Exception as error:  # of one answer: the page says it, and the server goes on
            self._error(500, f"{type(error).__name__}: {first_line(error)}")
        else:
            self._json(200, found)

    def _refuse(self) -> None:
        self.close_connection = True  # a body that was sent is not read
        self._error(405, "only GET is answered")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _error(self, status: int, sentence: str) -> None:
        self._json(status, {"error": sentence})

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._send(status, "application/json; charset=utf-8", body.encode("utf-8", "replace"))

    def _send(self, status: int, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except ConnectionError:  # the page was left
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Silence: requests are no news."""
