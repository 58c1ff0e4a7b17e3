"""The page of `kd view` and its answers over HTTP, on this machine alone.

    kd view data/cache --student data/kd

The texts of a cache may come from anybody, and any page in the same browser, or any user of the same machine, can send
requests to this server. These rules protect it:

* It listens on 127.0.0.1, and answers only GET.
* The Host header must be its own name, against DNS rebinding; questions must come from its own page.
* All paths begin with a random name, which is part of the address that the command prints.
* It serves six files and answers five questions, and nothing else.
* Its headers forbid the page to load or run anything else.
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
from kdcache.view.samples import View
from kdcache.view.texts import escape, number, numbers

ADDRESS = "127.0.0.1"
PORT = 8470  # unless it is taken
POSITIONS = 256  # at most so many positions' candidates are in one answer
PAGES = Path(__file__).parent / "page"
FILES = {
    "/": ("view.html", "text/html; charset=utf-8"),
    "/elements.js": ("elements.js", "text/javascript; charset=utf-8"),
    "/token.js": ("token.js", "text/javascript; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/view.css": ("view.css", "text/css; charset=utf-8"),
    "/base.css": ("base.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Question = dict[str, str]  # the parameters of a request


class Reading(Protocol):
    """What a student predicts at the T positions of a sample, which have N candidates in all."""

    probabilities: np.ndarray  # [N] the student's, of the teacher's candidates
    tails: np.ndarray  # [T] the student's mass outside them
    kl: np.ndarray  # [T] nats
    logprobs: np.ndarray  # [T] nats, of the completion's own tokens
    ranks: np.ndarray  # [T] of the completion's own tokens
    best: np.ndarray  # [T] ids of the student's best tokens


class StudentReader(Protocol):
    """A student that reads samples, which have their entropies. The trainer implements it, because it needs torch."""

    name: str

    def __call__(self, sample: Sample) -> Reading: ...


class Server(ThreadingHTTPServer):
    """A server that listens from the start. ``serve_forever`` answers; KDError if the cache cannot be indexed."""

    daemon_threads = True

    def __init__(
        self, view: View, student: StudentReader | None = None, port: int | None = None, sample: str | None = None
    ):
        """``port``: KDError if it is taken; None stands for PORT, or a free one. ``sample``: the id to open first."""
        self.view, self.student, self.first_sample = view, student, sample
        self.root = f"/{secrets.token_urlsafe(16)}"
        self._last_reading: tuple[str, Reading] | None = None  # of the sample of this id
        self._student_lock = threading.Lock()
        try:
            super().__init__((ADDRESS, PORT if port is None else port), Handler)
        except OSError as error:
            if port is not None:
                raise KDError(f"--port {port}: {error.strerror}; use another, or leave it out for a free one") from None
            super().__init__((ADDRESS, 0), Handler)

    def service_actions(self) -> None:
        """Raise the error of the indexing, if there is one. ``serve_forever`` calls this again and again."""
        if self.view.catalog.indexing.done():
            self.view.catalog.indexing.result()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the user left the page
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}{self.root}/"

    def about(self, _: Question) -> dict[str, Any]:
        student = self.student.name if self.student else None
        if student and Path(student).is_dir():
            student = Path(student).resolve().name
        return {**self.view.about(), "student": student, "sample": self.first_sample}

    def samples(self, question: Question) -> dict[str, Any]:
        search, sort, split = question.get("search", ""), question.get("sort", "cache"), question.get("split", "")
        return self.view.page(search, sort, split, whole_number(question, "offset"))

    def sample(self, question: Question) -> dict[str, Any]:
        return self.view.sample(question.get("id", ""))

    def candidates(self, question: Question) -> dict[str, Any]:
        """Return the candidates of at most POSITIONS positions, and the student's if it has read the sample."""
        sample_id, first = question.get("id", ""), whole_number(question, "first")
        positions = self.view.candidates(sample_id, first, first + POSITIONS)
        reading = self._last_reading
        if reading and reading[0] == sample_id:
            counts = self.view.load(sample_id).sample.candidates.counts
            start = int(counts[:first].sum())
            for number_of_position, position in enumerate(positions, first):
                end = start + int(counts[number_of_position])
                position["student"] = numbers(reading[1].probabilities[start:end])
                position["student_tail"] = number(reading[1].tails[number_of_position])
                start = end
        return {"first": first, "positions": positions}

    def opinion(self, question: Question) -> dict[str, Any]:
        """Let the student read the sample, and return its KL at each token and what it predicts for the token."""
        if self.student is None:
            raise UsageError("there is no student; start kd view with --student")
        sample = self.view.load(question.get("id", "")).sample
        with self._student_lock:
            if self._last_reading is None or self._last_reading[0] != sample.sample_id:
                self._last_reading = sample.sample_id, self.student(sample)
            reading = self._last_reading[1]
        return {
            "kl": numbers(reading.kl),
            "logprobs": numbers(reading.logprobs),
            "ranks": reading.ranks.tolist(),
            "best": [escape(token) for token in self.view.bytes_of(reading.best)],
        }


QUESTIONS: dict[str, Callable[[Server, Question], dict[str, Any]]] = {
    "/api/about": Server.about,
    "/api/samples": Server.samples,
    "/api/sample": Server.sample,
    "/api/candidates": Server.candidates,
    "/api/opinion": Server.opinion,
}


def whole_number(question: Question, name: str) -> int:
    """Return a parameter that is a number from 0 to 999,999,999; 0 if it is not given."""
    text = question.get(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"{name}={text[:20]}: expected a whole number")
    return int(text)


class Handler(BaseHTTPRequestHandler):
    """Checks a request by the rules above, and sends a file or the answer to a question."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "kd", ""
    timeout = 60

    def do_GET(self) -> None:
        full_path, _, parameters = self.path.partition("?")
        root, path = full_path[: len(self.server.root)], full_path[len(self.server.root) :]
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
            self._answer(QUESTIONS[path], {name: values[-1] for name, values in parse_qs(parameters).items()})

    def _answer(self, answer: Callable[[Server, Question], dict[str, Any]], question: Question) -> None:
        try:
            value = answer(self.server, question)
        except KDError as error:
            self._error(400 if error.exit_code == 2 else 500, str(error))
        except Exception as error:  # the page shows it, and the server continues
            self._error(500, f"{type(error).__name__}: {first_line(error)}")
        else:
            self._json(200, value)

    def _refuse(self) -> None:
        self.close_connection = True  # the body of the request is not read
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
        except ConnectionError:  # the user left the page
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Print nothing about requests."""
