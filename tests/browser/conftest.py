"""A real headless Chromium whose pages are watched: they may raise no error, and send no request to another machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Visit:
    """A page, and what it did. A test that expects an error removes it from ``errors``."""

    page: Page
    errors: list[str] = field(default_factory=list)  # on the console, or thrown
    requests: list[str] = field(default_factory=list)  # addresses, without data: and blob:


Visiting = Callable[..., Visit]


# For this package and not for the session: its event loop runs as long as it lives, and other tests could not start theirs.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "these tests look at pages in Chromium: apt install chromium"
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=as_root)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visiting]:
    """``visit(url, color_scheme="dark", viewport=...)``: a page in a context of its own (for file:// too)."""
    visits = []

    def go(url: str, **options: Any) -> Visit:
        page = chromium.new_context(**options).new_page()
        page.set_default_timeout(15_000)
        visited = Visit(page)
        visits.append(visited)
        page.on("console", lambda m: visited.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: visited.errors.append(str(error)))
        page.on("dialog", lambda dialog: (visited.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.context.on("request", lambda request: visited.requests.append(request.url))
        page.goto(url)
        return visited

    yield go
    for visited in visits:
        visited.page.context.close()
        foreign = [r for r in visited.requests if not is_local(r)]
        assert not foreign, f"the page sent requests to other machines: {foreign}"
        assert not visited.errors, visited.errors


def is_local(address: str) -> bool:
    url = urlsplit(address)
    return url.scheme in ("file", "data", "blob") or url.hostname == "127.0.0.1"
