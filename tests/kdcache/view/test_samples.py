"""What kd view says of a cache and a student, and whom its server answers. The page itself is tested in tests/browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import threading
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pytest

from helpers import capture_plan
from kdcache.cache import query, writer
from kdcache.cache.layout import REWARDS_FILE
from kdcache.capture import run as capture
from kdcache.errors import KDError
from kdcache.view import view
from kdcache.view.server import Server
from kdcache.view.view import View


@pytest.fixture(scope="module")
def threshold_cache(tiny_model, rows_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "threshold"
    capture.run(capture_plan(tiny_model, rows_file, out, sparsify="threshold:0.05", capture_k=32))
    return out


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory) -> str:
    """The first of the teacher's two layers."""
    from trainer.student.load import init_student

    out = tmp_path_factory.mktemp("students") / "half"
    init_student(tiny_model, out, "1")
    return str(out)


@pytest.fixture
def viewed(tiny_cache):
    with contextlib.closing(View(tiny_cache)) as made:
        yield made


def everything(viewed, **asked):
    """The ids of all pages, once what they are sorted by is measured."""
    ids, total = [], 1
    while len(ids) < total:
        page = viewed.page(offset=len(ids), **asked)
        if "measuring" not in page:
            ids, total = ids + [row["id"] for row in page["rows"]], page["total"]
            if not page["rows"]:
                break
    return ids


def asked(cache, order, where="true"):
    _, rows = query.run(cache, f"SELECT sample_id FROM samples WHERE {where} ORDER BY {order}")
    return [sample_id for (sample_id,) in rows]


IN_ORDER = "list_position(['train', 'validation', 'test'], split), file, file_row_number"


# --- lists ------------------------------------------------------------------------------------------------------------


def test_every_sample_is_listed_once_train_first(viewed, tiny_cache):
    assert everything(viewed) == asked(tiny_cache, IN_ORDER)


@pytest.mark.parametrize(
    "sort, order",
    [
        ("uncertain", "list_avg(entropies) DESC"),
        ("worst", "list_avg(token_logprobs)"),
        ("longest", "completion_tokens DESC"),
        ("failed", "reward NULLS LAST"),
    ],
)
def test_sorts_are_those_of_sql(viewed, tiny_cache, sort, order):
    assert everything(viewed, sort=sort) == asked(tiny_cache, f"{order}, {IN_ORDER}")
    assert everything(viewed, sort=sort, split="test", search="RowS:") == asked(
        tiny_cache, f"{order}, {IN_ORDER}", "split = 'test'"
    )


@pytest.mark.parametrize("text", ["number 1", "🙂 ¡AÑO", ":s0", "100%", "_", "'", "\\", "no text holds this"])
def test_search_takes_text_as_it_is(viewed, tiny_cache, text):
    where = " OR ".join(
        f"position(lower('{text.replace(chr(39), chr(39) * 2)}') IN lower({column})) > 0"
        for column in ("sample_id", "prompt", "completion")
    )
    assert everything(viewed, search=text) == asked(tiny_cache, IN_ORDER, where)


def test_a_reward_found_afterwards_counts(tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    table = pa.table(
        {"sample_id": ["rows:r5:s0", "rows:r3:g"], "reward": pa.array([1.0, 0.0], pa.float32()), "reason": ["", ""]}
    )
    writer.write_table(copy / REWARDS_FILE, table)
    with contextlib.closing(View(copy)) as viewed:
        assert viewed.about()["rewarded"]
        first, second = viewed.page(sort="failed")["rows"][:2]
    assert (first["id"], first["reward"], second["id"], second["reward"]) == ("rows:r3:g", 0, "rows:r5:s0", 1)


def test_prompts_are_listed_without_what_all_of_them_begin_and_end_with(viewed):
    row = viewed.page(search="rows:r7:g")["rows"][0]
    assert row["prompt"] == "Say the number 7 twice."
    before, own, after = viewed.sample("rows:r7:g")["prompt"]
    assert before.endswith("<|im_start|>user\n") and after.startswith("<|im_end|>") and own == row["prompt"]


def test_a_frame_ends_where_a_line_or_a_tag_does():
    assert view.common_frame(["<u>\nWhat is 1?</u>", "<u>\nWhat is 2?</u>"]) == ("<u>\n", "</u>")
    assert view.common_frame(["one", "onto"]) == ("", "")
    assert view.common_frame(["<a>", "<a>"]) == ("", "")
    assert view.common_frame([]) == ("", "")


# --- a sample ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_cache", "threshold_cache"])
def test_a_sample_is_what_sql_says_of_it(request, name):
    cache = request.getfixturevalue(name)
    with contextlib.closing(View(cache)) as viewed:
        for sample_id in ("rows:r7:g", "rows:r20:s0"):
            told, positions = viewed.sample(sample_id), viewed.candidates(sample_id, 0, 256)
            _, rows = query.run(
                cache, f"SELECT logprob, rank, entropy, tail_mass, candidates FROM sample('{sample_id}')"
            )
            logprobs, ranks, entropies, tails, candidates = map(list, zip(*rows))
            assert told["logprobs"] == pytest.approx(logprobs, rel=1e-3) and told["ranks"] == ranks
            assert told["entropies"] == pytest.approx(entropies, rel=1e-3)
            assert [p["tail"] for p in positions] == pytest.approx(tails, rel=1e-3)
            assert [p["texts"] for p in positions] == [[c["text"] for c in every] for every in candidates]
            for position in positions:
                assert sum(position["probabilities"]) + position["tail"] == pytest.approx(1, abs=1e-3)
            assert viewed.candidates(sample_id, 2, 4) == positions[2:4]


def test_drawn_candidates_are_those_stored_at_tau(threshold_cache, viewed):
    with contextlib.closing(View(threshold_cache)) as thresholded:
        positions = thresholded.candidates("rows:r7:g", 0, 256)
    drawn = [p for told in positions for p, is_drawn in zip(told["probabilities"], told["drawn"]) if is_drawn]
    kept = [p for told in positions for p, is_drawn in zip(told["probabilities"], told["drawn"]) if not is_drawn]
    assert drawn and max(drawn) < 0.06 and min(kept) > 0.04  # about 0.05: they are scaled to sum to 1 - tail
    assert not any(told["drawn"][0] for told in positions)
    assert not any(any(told["drawn"]) for told in viewed.candidates("rows:r7:g", 0, 256))


def test_parts_of_a_character_are_one_group():
    smile = "🙂".encode()
    texts, escaped = view.pieces([b"a", smile[:2], smile[2:3], smile[3:] + b"b", b" c", b"\xff", b"d", smile[:1]])
    assert texts == ["a", "🙂b", "", "", " c", "\ufffd", "d", "\ufffd"]
    assert escaped == {1: "\\xF0\\x9F", 2: "\\x99", 3: "\\x82b"}


def test_a_view_keeps_few_samples(viewed):
    for sample_id in everything(viewed)[:10]:
        viewed.sample(sample_id)
    assert len(viewed._shown) == view.KEPT
    assert all(shown.sample.candidates.ids.base is None for shown in viewed._shown.values())  # no row group behind it


# --- a student --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_cache", "threshold_cache"])
def test_a_students_kl_is_the_one_of_kd_evaluate(request, name, kd, half, tmp_path):
    from trainer.evaluate.forced import Student

    cache = request.getfixturevalue(name)
    done = kd("evaluate", half, "--from-cache", cache, "--generate", 0, "--out", tmp_path / "e", "--json")
    [evaluated] = [row["value"] for row in json.loads(done.stdout) if (row["label"], row["metric"]) == (half, "kl")]
    with contextlib.closing(View(cache)) as viewed:
        student = Student(half, viewed.cache)
        found = []
        for sample_id in everything(viewed, split="test"):
            shown = viewed.shown(sample_id)
            told = student(shown.sample)
            found.append(told.kl[shown.sample.supervised])
            ends = np.cumsum(shown.sample.candidates.counts)
            sums = np.add.reduceat(told.probabilities, ends - shown.sample.candidates.counts)
            assert sums + told.tails == pytest.approx(1, abs=1e-4)
    assert np.concatenate(found).mean() == pytest.approx(evaluated, rel=1e-4)


def test_the_teachers_own_weights_say_what_the_teacher_said(viewed, tiny_model):
    from trainer.evaluate.forced import Student

    shown = viewed.shown("rows:r7:g")
    told = Student(tiny_model, viewed.cache)(shown.sample)
    assert told.kl == pytest.approx(0, abs=2e-3)
    assert told.logprobs == pytest.approx(shown.sample.token_logprobs, abs=2e-2)
    assert (told.ranks == shown.sample.token_ranks).mean() > 0.8  # ties
    assert told.probabilities == pytest.approx(np.exp(shown.sample.candidates.logprobs), abs=1e-2)


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(viewed):
    with Server(viewed, port=0) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server, path, method="GET", root=None, **headers):
    """Status, headers and what was answered, below the server's own root."""
    root = server.root if root is None else root
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, root + path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1.evil.example:{port}", "localhost:1", ""])
def test_it_answers_to_its_own_name_alone(server, host):
    for path in ("/", "/api/about"):
        assert get(server, path, Host=host.format(port=server.server_port))[0] == 421
    assert get(server, "/api/about", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("root", ["", "/guessed", "/" + "A" * 22])
def test_who_was_not_told_the_address_is_told_nothing(server, root):
    for path in ("/", "/view.js", "/api/about", "/api/samples"):
        status, _, body = get(server, path, root=root)
        assert status == 404 and "the whole address that kd view printed" in json.loads(body)["error"]
    assert server.url == f"http://127.0.0.1:{server.server_port}{server.root}/" and len(server.root) > 20


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_it_answers_get_alone(server, method):
    assert get(server, "/api/about", method)[0] == 405


def test_another_sites_page_may_open_it_and_ask_nothing(server):
    assert get(server, "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert get(server, "/api/about", **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert get(server, "/api/about", **{"Sec-Fetch-Site": "same-site"})[0] == 403
    assert get(server, "/api/about", **{"Sec-Fetch-Site": "same-origin"})[0] == 200


@pytest.mark.parametrize(
    "path", ["/../serve.py", "/%2e%2e/serve.py", "//etc/passwd", "//[", "/view.js/..", "/plan.json", "/api/"]
)
def test_there_are_no_files_but_its_own(server, path):
    assert get(server, path)[0] == 404


def test_every_answer_forbids_what_the_page_does_not_need(server):
    for path in ("/", "/view.js", "/base.css", "/api/about", "/nowhere"):
        _, headers, _ = get(server, path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "path, says",
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
def test_what_cannot_be_answered_is_said_in_a_sentence(server, path, says):
    status, _, body = get(server, quote(path, safe="/?&=:"))
    assert status == 400 and says in json.loads(body)["error"]


def test_the_last_page_is_empty_beyond_the_end(server):
    assert json.loads(get(server, "/api/samples?offset=999999999")[2]) == {"total": 78, "offset": 999999999, "rows": []}
    assert json.loads(get(server, "/api/candidates?id=rows:r7:g&first=5000")[2])["positions"] == []


def test_a_taken_port_is_refused_if_asked_for_and_else_another(viewed, monkeypatch):
    from kdcache.view import server as serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(KDError, match=f"--port {port}: .* in use; use another"):
            Server(viewed, port=port)
        monkeypatch.setattr(serve, "PORT", port)
        with Server(viewed) as other:
            assert other.server_port not in (port, 0)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["nowhere"], 1, "no such folder"),
        (["."], 1, "not a cache"),
        (["{cache}", "--sample", "rows:r7"], 2, "there is rows:r7:g"),
        (["{cache}", "--student", "./nowhere"], 2, "no such folder"),
        (["{cache}", "--port", "99999"], 2, "--port"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_use_is_one_clear_sentence(kd, tiny_cache, arguments, code, says):
    arguments = [argument.format(cache=tiny_cache) for argument in arguments]
    assert says in kd("view", *arguments, "--no-browser", code=code).stderr


def test_damage_ends_it_with_a_sentence(kd, tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    shard = sorted((copy / "data").glob("*.parquet"))[-1]  # the first is read before the server listens
    shard.write_bytes(shard.read_bytes()[:-200])
    assert "kd cache verify" in kd("view", copy, "--no-browser", "--port", 0, code=3).stderr
