"""The page of kd view in a real browser, served by the real command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from helpers import ROOT
from kdcache.cache import query, writer
from kdcache.cache.format import CacheRow
from kdcache.cache.layout import shard_name
from kdcache.cache.sparsify import parse
from kdcache.storage import atomic, seal

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&amp;"
BIDI = "a \u202egnihtemos\u202c \u2066b\u2069 \u200fc\u200e"
LONG = "word" * 25_000
HOSTILE = {
    "script": (f"Say {SCRIPT}", SCRIPT),
    "bidi": (f"Turn {BIDI}", BIDI),
    "long": (f"Repeat {LONG}", LONG[:4000]),
    "line": ("Two lines,\n\tand a tab", "one\n\n\ttwo \r three 🙂🙂 año \x00 שלום ‌x"),
    "<b>'\"&#/?%": ("An id", "that is hostile"),
    "thousands": ("Count", "one two three four five " * 1000),
}


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    """Start the real `kd view`, yield its address, and end it with Ctrl-C, which must give exit status 0."""
    command = [sys.executable, "-m", "kdcache", "view", *map(str, arguments), "--no-browser", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{22}/", address)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def address(tiny_cache, tiny_model) -> Iterator[str]:
    with served(tiny_cache, "--student", tiny_model) as address:
        yield address


@pytest.fixture(scope="module")
def hostile(tiny_cache, smollm, tmp_path_factory) -> Iterator[str]:
    cache = tmp_path_factory.mktemp("caches") / "hostile"
    make_hostile(cache, tiny_cache, smollm)
    with served(cache) as address:
        yield address


def make_hostile(folder: Path, like: Path, tokenizer: str) -> None:
    """Write a cache of the texts in HOSTILE with random candidates; everything else is copied from ``like``."""
    from transformers import AutoTokenizer

    encode: Callable[..., Any] = AutoTokenizer.from_pretrained(tokenizer).encode
    random, sparsifier = np.random.default_rng(0), parse("topk:8")
    plan = json.loads((like / "plan.json").read_text())
    plan["shards"] = [{"name": shard_name("train", 0), "examples": len(HOSTILE)}]
    (folder / "data").mkdir(parents=True)
    atomic.write_json(folder / "plan.json", seal.with_checksum(plan))
    (folder / "vocab.parquet").write_bytes((like / "vocab.parquet").read_bytes())
    rows = []
    for name, (prompt, completion) in HOSTILE.items():
        ids = encode(completion, add_special_tokens=False)
        logits = -np.sort(-random.normal(0, 2, (len(ids), 8)), axis=1)
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) - 0.2
        candidates = random.permuted(np.tile(np.arange(49152), (1, 1)), axis=1)[0, :8] + np.zeros((len(ids), 1), int)
        candidates[:, 0] = ids
        row = CacheRow(
            sample_id=name,
            split="train",
            source=SCRIPT,
            origin="given",
            group_id=name,
            prompt=prompt,
            completion=completion,
            reference=SCRIPT,
            prompt_ids=encode(prompt[:2000]),
            completion_ids=ids,
            token_logprobs=np.full(len(ids), -1, np.float32),
            token_ranks=np.ones(len(ids), np.int32),
            entropies=np.full(len(ids), 2, np.float32),
            candidates=sparsifier(candidates.astype(np.int32), logprobs.astype(np.float32)),
        )
        rows.append(row)
    meta = {"format_version": 1, "fingerprint": plan["fingerprint"], "rejected": []}
    writer.write_shard(folder / plan["shards"][0]["name"], rows, "q8", meta)


def rows_of(page: Any) -> list[str]:
    return [button.get_attribute("data-id") for button in page.locator("#rows button").all()]


def tokens_of(page: Any, sample_id: str) -> Any:
    """Wait until a sample is on the page, and return its tokens."""
    expect(page.locator("#reader h2")).to_have_text(sample_id)
    return page.locator("#tokens .token")


# --- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_has_every_sample_and_the_first_is_open(visit, address, tiny_cache):
    page = visit(address).page
    expect(page.locator("#range")).to_have_text("1–50 of 78")
    expect(page.locator("#facts")).to_contain_text("78 samples")
    first = rows_of(page)
    assert len(first) == 50
    tokens_of(page, first[0])
    page.click("#next")
    expect(page.locator("#range")).to_have_text("51–78 of 78")
    assert len(set(first + rows_of(page))) == 78
    assert page.locator("#next").is_disabled()


@pytest.mark.parametrize(
    "sort, order",
    [
        ("uncertain", "list_avg(entropies) DESC"),
        ("worst", "list_avg(token_logprobs)"),
        ("longest", "completion_tokens DESC"),
    ],
)
def test_a_sorted_list_equals_that_of_sql(visit, address, tiny_cache, sort, order):
    page = visit(address).page
    page.select_option("#split", "test")
    page.select_option("#sort", sort)
    figures = {"uncertain": "list_avg(entropies)", "worst": "-list_avg(token_logprobs)", "longest": "completion_tokens"}
    _, rows = query.run(tiny_cache, f"SELECT {figures[sort]} FROM samples WHERE split = 'test' ORDER BY {order}")
    expect(page.locator(".figure").first).to_contain_text("tokens" if sort == "longest" else "nats")
    expect(page.locator("#list")).to_have_attribute("aria-busy", "false")
    shown = [float(re.findall(r"[\d.]+", text)[-1]) for text in page.locator(".figure").all_inner_texts()]
    assert shown == pytest.approx([value for (value,) in rows], abs=0.006)


def test_search_ignores_case_and_says_if_nothing_matches(visit, address):
    page = visit(address).page
    page.fill("#search", "say THE number 7 ")
    expect(page.locator("#range")).to_have_text("1–2 of 2")
    assert rows_of(page) == ["rows:r7:g", "rows:r7:s0"]
    page.fill("#search", "nothing holds this")
    expect(page.locator("#note")).to_have_text("No sample contains this text.")
    page.fill("#search", "")
    expect(page.locator("#range")).to_have_text("1–50 of 78")


# --- a sample ---------------------------------------------------------------------------------------------------------


def test_the_tokens_of_the_completion_are_shaded(visit, address, tiny_cache):
    page = visit(f"{address}#rows:r7:g").page
    tokens = tokens_of(page, "rows:r7:g")
    assert page.locator("#tokens").inner_text().startswith("7, 7 🙂")
    _, rows = query.run(tiny_cache, "SELECT entropy FROM positions WHERE sample_id = 'rows:r7:g' ORDER BY position")
    page.get_by_role("button", name="Teacher's entropy").click()
    shades = [int(token.get_attribute("data-shade")) for token in tokens.all()]
    assert shades == [sum(value >= edge for edge in (0.25, 0.75, 1.5, 2.5, 3.5, 5)) for (value,) in rows]
    assert tokens.first.evaluate("node => getComputedStyle(node).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_pointing_at_a_token_shows_its_candidates_and_the_tail(visit, address, tiny_cache):
    page = visit(f"{address}#rows:r7:g").page
    tokens_of(page, "rows:r7:g").nth(2).hover()
    expect(page.locator("#panel")).to_contain_text("Token 3 of ")
    expect(page.locator(".candidate.tail")).to_contain_text("all others")
    _, rows = query.run(
        tiny_cache,
        "SELECT probability FROM candidates WHERE sample_id = 'rows:r7:g' AND position = 3 ORDER BY candidate",
    )
    shares = [
        float(bar.evaluate("bar => bar.style.getPropertyValue('--share')"))
        for bar in page.locator(".candidate:not(.outside) .bar.teacher").all()
    ]
    assert len(shares) == 9 and sum(shares) == pytest.approx(1, abs=1e-3)
    assert shares[:8] == pytest.approx([p for (p,) in rows], rel=0.03)
    page.locator("#reader h2").hover()
    expect(page.locator("#panel")).to_contain_text("Point at a token")


def test_arrow_keys_move_through_the_tokens(visit, address):
    page = visit(f"{address}#rows:r7:g").page
    tokens_of(page, "rows:r7:g")
    page.locator("#tokens .token[tabindex='0']").focus()
    expect(page.locator("#panel")).to_contain_text("Token 1 of ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel")).to_contain_text("Token 3 of ")
    expect(page.locator(".token[aria-selected='true']")).to_have_count(1)
    page.keyboard.press("End")
    expect(page.locator("#panel h2")).to_have_text("<|im_end|>")
    page.keyboard.press("Home")
    expect(page.locator("#panel")).to_contain_text("Token 1 of ")
    assert page.locator(".token:focus").evaluate("node => getComputedStyle(node).outlineStyle") != "none"
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_contain_text("Point at a token")
    page.locator("#rows button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    tokens_of(page, rows_of(page)[1])


def test_the_student_stands_beside_the_teacher(visit, address):
    page = visit(f"{address}#rows:r7:g").page
    tokens = tokens_of(page, "rows:r7:g")
    expect(page.locator("#about")).to_contain_text("student's KL")
    shades = page.locator("#tokens .token").evaluate_all("all => all.map(t => t.dataset.shade)")
    assert set(shades) == {"0"}  # the student is the teacher itself
    tokens.nth(1).click()
    expect(page.locator(".candidate.tail")).to_be_attached()
    expect(page.locator(".candidate .bar.student")).to_have_count(page.locator(".candidate .bar.teacher").count())
    pairs = page.locator(".candidate").evaluate_all(
        "all => all.map(c => [...c.querySelectorAll('.bar')].map(b => Number(b.style.getPropertyValue('--share'))))"
    )
    assert all(teacher == pytest.approx(student, abs=0.02) for teacher, student in pairs)


def test_a_phone_shows_list_sample_and_token_one_after_the_other(visit, address):
    page = visit(address, **PHONE).page
    expect(page.locator("#rows button")).to_have_count(50)
    expect(page.locator("#reader")).to_be_hidden()
    page.locator("#rows button").nth(3).tap()
    tokens = tokens_of(page, rows_of(page)[3])
    expect(page.locator("#list")).to_be_hidden()
    tokens.nth(1).tap()
    expect(page.locator(".candidate.tail")).to_be_attached()
    sheet, token = page.locator("#panel").bounding_box(), tokens.nth(1).bounding_box()
    assert token["y"] + token["height"] <= sheet["y"]  # the panel does not cover the token
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Close").tap()
    expect(page.locator("#panel")).to_be_hidden()
    page.get_by_role("button", name="← Samples").tap()
    expect(page.locator("#rows button").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_shade(visit, address, scheme):
    page = visit(address, color_scheme=scheme).page
    contrast = """() => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
            const parts = style.getPropertyValue(name).match(/[0-9a-f]{2}/g).map((x) => parseInt(x, 16) / 255);
            const linear = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const of = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
        const text = ["--paper", "--panel", ...[1, 2, 3, 4, 5, 6].flatMap((i) => [`--shade-${i}`, `--warm-${i}`])];
        const series = [1, 2, 3, 4, 5, 6, 7, 8].map((i) => of(`--series-${i}`, "--paper"));
        return { text: Math.min(...text.map((n) => of("--ink", n))), muted: of("--ink-muted", "--panel"), series: Math.min(...series) };
    }"""
    contrasts = page.evaluate(contrast)
    assert contrasts["text"] >= 4.5 and contrasts["muted"] >= 4.5 and contrasts["series"] >= 3


# --- hostile texts ----------------------------------------------------------------------------------------------------


def test_markup_is_shown_as_text(visit, hostile):
    page = visit(f"{hostile}#script").page
    tokens_of(page, "script").nth(1).click()
    expect(page.locator(".candidate.tail")).to_be_visible()
    assert page.locator("#tokens").inner_text() == SCRIPT
    assert page.locator("#prompt").inner_text() == f"Say {SCRIPT}"
    assert SCRIPT in page.locator("#about").inner_text()
    assert page.locator("main script, main img").count() == 0
    assert page.evaluate("window.hacked") is None
    page.fill("#search", "<SCRIPT>")
    expect(page.locator("#range")).to_have_text("1–1 of 1")


def test_an_id_may_contain_any_character(visit, hostile):
    page = visit(hostile).page
    page.locator("#rows button").nth(4).click()
    tokens_of(page, "<b>'\"&#/?%")
    page.reload()
    tokens_of(page, "<b>'\"&#/?%")


def test_marks_of_text_direction_are_shown_and_have_no_effect(visit, hostile):
    page = visit(f"{hostile}#bidi").page
    tokens_of(page, "bidi")
    for place in ("#prompt", "#tokens"):
        shown = page.locator(place).inner_text()
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f]", shown) and "U+202E" in shown
    assert "U+202E" in page.locator("#rows").inner_text()


def test_invisible_characters_are_shown_and_split_ones_joined(visit, hostile):
    page = visit(f"{hostile}#line").page
    tokens_of(page, "line")
    shown = page.locator("#tokens").inner_text()
    assert "🙂🙂 año U+0000 שלום" in shown and "U+000D" in shown and "\ufffd" not in shown
    assert page.locator("#tokens .break").count() == 2 and page.locator("#tokens .tab").count() == 1
    page.locator(".token.continued").first.click()
    expect(page.locator("#panel h2")).to_contain_text("\\x")


def test_the_middle_of_a_long_line_is_shown_on_request(visit, hostile):
    page = visit(f"{hostile}#long").page
    tokens_of(page, "long")
    assert len(page.locator("#prompt").inner_text()) < 4000
    page.locator("#prompt").get_by_role("button", name="Show the").click()
    assert page.locator("#prompt").inner_text() == f"Repeat {LONG}"
    assert page.locator("#prompt").evaluate("node => node.scrollWidth <= node.clientWidth")
    assert max(len(text) for text in page.locator("#rows .prompt").all_inner_texts()) <= 170


def test_more_tokens_of_a_long_completion_are_shown_on_request(visit, hostile):
    page = visit(f"{hostile}#thousands").page
    tokens = tokens_of(page, "thousands")
    expect(tokens).to_have_count(1500)
    page.locator("#tokens .token[tabindex='0']").focus()
    page.keyboard.press("End")
    expect(page.locator("#panel")).to_contain_text("Token 1,500 of 5,001")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel")).to_contain_text("Token 1,501 of 5,001")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#panel")).not_to_contain_text("Token 1,501 of")
    page.get_by_role("button", name="Show all 5,001").click()
    expect(tokens).to_have_count(5001)


def test_an_unknown_sample_id_is_reported(visit, hostile):
    visited = visit(f"{hostile}#nowhere")
    expect(visited.page.locator("#reader [role=alert]")).to_contain_text("has no sample nowhere")
    assert "400" in visited.errors.pop()  # Chromium logs every answer of status 400
