"""Text of samples and models reaches a terminal without characters that the terminal obeys."""

import csv
import io
import json
import os
import pty
import re
import sys

import pytest

import cli
from helpers import capture_plan
from kdcache.capture import run as capture
from kdcache.commands.console import ProgressLine
from kdcache.printable import json_text, printable
from kdcache.progress import Progress

OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
HOSTILE = {
    "id": "a\x1b]0;title\x07b",
    "prompt": "Clear \x1b[2J the screen \x9b2J\u202egnp.exe\u2066",
    "completion": "Done \x1b[31mred\x1b[0m.\r\x7f\x85 ñ 🙂 e\u0301",
}


@pytest.fixture(scope="module")
def hostile_cache(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "rows.jsonl").write_text(json.dumps(HOSTILE) + "\n")
    changes = {"mode": "score", "split_ratios": (1.0, 0.0, 0.0)}
    capture.run(capture_plan(tiny_model, folder / "rows.jsonl", folder / "cache", **changes))
    return folder / "cache"


@pytest.fixture
def kd_here(monkeypatch):
    """Return a function that runs `kd` in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kd", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J \x7f", "\\x9b2J \\x7f"),
        ("\u202egnp.exe\u2066\u200f", "\\u202egnp.exe\\u2066\\u200f"),
        ("a\nb\tc\rd\u2028", "a\\nb\\tc\\rd\\u2028"),
        ("half \ud83d", "half \\ud83d"),
        ("ñ 漢 🙂 👨\u200d👩 e\u0301 שלום", "ñ 漢 🙂 👨\u200d👩 e\u0301 שלום"),
    ],
)
def test_only_characters_that_a_terminal_obeys_are_escaped(text, expected):
    assert printable(text) == expected


def test_json_escapes_what_a_terminal_obeys_and_keeps_its_values():
    value = {"".join(map(chr, range(0x2100))): [HOSTILE, "\ud83d"]}
    text = json_text(value, indent=2)
    assert not OBEYED.search(text) and json.loads(text) == value


SQL = "SELECT sample_id, prompt, completion AS \"\x1b[2J\", {{'k': prompt}} AS s, MAP {{'\x9b': 1}} AS m FROM samples{}"
COMMANDS = {
    "a table": ("sql", "{cache}", SQL.format("")),
    "json": ("sql", "{cache}", SQL.format(""), "--json"),
    "a query that fails": ("sql", "{cache}", "SELECT error(sample_id) FROM samples"),
    "a query that is wrong": ("sql", "{cache}", "SELECT \x1b[2J"),
    "a view": ("sql", "{cache}", "FROM hardest_samples"),
    "facts": ("cache", "info", "{cache}"),
    "a folder that does not exist": ("cache", "verify", "no\x1b[2Jwhere"),
    "an option that does not exist": ("compare", "--\x1b[2J", "x"),
    "a condition": ("train", "--from-cache", "{cache}", "--student", "s", "--output-dir", "o", "--where", "\x1b[2J"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_output_for_people_has_no_character_that_a_terminal_obeys(arguments, hostile_cache, kd_here, capsys):
    kd_here(*(argument.replace("{cache}", str(hostile_cache)) for argument in arguments))
    out, err = capsys.readouterr()
    assert (out or err) and not OBEYED.search(out + err)


def test_csv_into_a_pipe_is_exact(hostile_cache, kd_here, capsys):
    kd_here("sql", hostile_cache, "SELECT completion FROM samples", "--csv")
    assert list(csv.reader(io.StringIO(capsys.readouterr().out, newline="")))[1:] == [[HOSTILE["completion"]]]


def test_csv_on_a_terminal_is_safe(hostile_cache, kd_here, monkeypatch):
    terminal, theirs = pty.openpty()
    with os.fdopen(terminal, "rb"), os.fdopen(theirs, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        kd_here("sql", hostile_cache, "SELECT sample_id, completion FROM samples", "--csv")
        stdout.flush()
        seen = os.read(terminal, 10_000).decode().replace("\r\n", "\n")
    assert "a\\x1b]0;title\\x07b" in seen and not OBEYED.search(seen)


def test_the_first_rejected_row_and_the_progress_are_safe(tiny_model, tmp_path, kd_here, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(HOSTILE) + "\n" + json.dumps(HOSTILE | {"prompt": None}) + "\n")
    kd_here(
        *("cache-teacher", "--teacher", tiny_model, "--engine", "transformers", "--out", tmp_path / "c\x1b[2J"),
        *("--examples", tmp_path / "rows.jsonl", "--split-ratios", "1,0,0"),
    )
    out, err = capsys.readouterr()
    assert "a\\x1b]0;title\\x07b" in err and not OBEYED.search(out + err)


def test_a_line_of_progress_is_safe(capsys):
    with ProgressLine() as line:
        line.show(Progress(1, 1, "answers", "\x1b[2Jlabel"))
    assert capsys.readouterr().err == "1/1 answers  \\x1b[2Jlabel\n"
