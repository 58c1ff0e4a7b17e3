"""Every file of sql/ runs on real caches, also in plain DuckDB, and no query can change a cache."""

import csv
import io
import json
import math
import os
import pty
import re
import select
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import ROOT, capture_plan
from kdcache.cache import publish, query
from kdcache.cache.format import SPLITS
from kdcache.cache.query import views
from kdcache.cache.query.document import document
from kdcache.cache.reader import Cache
from kdcache.capture import run as capture
from kdcache.commands.console import print_table
from kdcache.errors import KDError
from kdcache.judge import rewards_file as judging
from kdcache.paths import resource_folder
from kdcache.storage import atomic, seal
from trainer.data.select import select as select_samples
from trainer.evaluate import setup as evaluate
from trainer.evaluate.config import EvaluateConfig
from trainer.grpo import plan as grpo

FILES = sorted(resource_folder("sql").glob("*.sql"))
MACROS = {"captured_mass": "captured_mass(4)", "sample": "sample('rows:r3:g')"}


@pytest.fixture(scope="module")
def threshold_cache(tiny_model, rows_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "threshold"
    capture.run(capture_plan(tiny_model, rows_file, out, sparsify="threshold:0.05"))
    return out


@pytest.fixture(params=["topk", "threshold"])
def cache(request):
    """Return a cache with 8 candidates per position, and one whose positions have different numbers of them."""
    return request.getfixturevalue("tiny_cache" if request.param == "topk" else "threshold_cache")


@pytest.fixture
def copy(tiny_cache, tmp_path):
    """Return a cache that the test may change."""
    return shutil.copytree(tiny_cache, tmp_path / "copy")


def ask(cache, sql):
    """Return all rows as dicts."""
    names, rows = query.run(cache, sql)
    return [dict(zip(names, row)) for row in rows]


def samples_of(cache):
    """Return all rows of the shards, read without DuckDB."""
    return [row for path in sorted((cache / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def texts_of(cache):
    return dict(query.run(cache, "SELECT token_id, text FROM vocab")[1])


def grouped(items):
    """Return {key: values} of (key, value) pairs."""
    groups = defaultdict(list)
    for key, value in items:
        groups[key].append(value)
    return groups


def quantile(values, q):
    return sorted(values)[math.ceil(q * len(values)) - 1]


# --- the files --------------------------------------------------------------------------------------------------------


def test_every_file_is_a_listed_view(kd):
    assert sorted(query.VIEWS) == [f.stem for f in FILES]
    lines = kd("sql", "--list").stdout.splitlines()[2:]
    assert [re.match(r"\w+", line)[0] for line in lines] == list(query.VIEWS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_has_a_header_a_comment_and_an_example_that_runs(path, cache):
    name, text = path.stem, path.read_text()
    assert text.startswith(f"-- {name}: ") and not text.splitlines()[1].strip("- ")
    parts = views.header(name)
    assert {"answers", "columns", "example"} <= parts.keys() <= {"answers", "columns", "example", "parameters", "note"}
    assert ("parameters" in parts) == (name in MACROS) == ("MACRO" in text)
    names, _ = query.run(cache, parts["example"])
    _, rows = query.run(cache, f"FROM {MACROS.get(name, name)} LIMIT 5")
    assert names and (rows or name in ("duplicates", "rewards"))
    comments = "SELECT comment FROM duckdb_views() WHERE view_name = '{0}' UNION ALL SELECT comment FROM duckdb_functions() WHERE function_name = '{0}' AND function_type = 'table_macro'"  # fmt: skip
    [(comment,)] = query.run(cache, comments.format(name))[1]
    assert comment and comment.replace("'", "''") in text


def test_every_column_of_every_view_is_in_its_header(cache):
    for name in query.VIEWS:
        names, _ = query.run(cache, f"FROM {MACROS.get(name, name)} LIMIT 0")
        if name != "samples":  # that is docs/format.md's
            assert [n for n in names if not re.search(rf"\b{n}\b", views.header(name)["columns"])] == [], name


def test_the_page_about_sql_is_made_of_the_files():
    made = subprocess.run(
        [sys.executable, "-m", "kdcache.cache.query"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (ROOT / "docs/sql.md").read_text() == made.stdout == document()
    assert all(f"## {views.signature(name)}\n" in made.stdout for name in query.VIEWS)


def test_the_files_answer_the_same_in_plain_duckdb_inside_the_cache(cache, monkeypatch):
    monkeypatch.chdir(cache)
    plain = duckdb.connect()
    for path in query.VIEWS:
        plain.execute(views.source(path))
    for name in query.VIEWS:
        sql = f"FROM {MACROS.get(name, name)}"
        assert sorted(map(repr, plain.execute(sql).fetchall())) == sorted(map(repr, query.run(cache, sql)[1])), name


# --- their numbers ----------------------------------------------------------------------------------------------------


def test_positions_and_candidates_agree_with_the_samples(cache):
    rows = samples_of(cache)
    [(tokens,)] = query.run(cache, "SELECT count(*) FROM positions")[1]
    [(candidates, best)] = query.run(cache, "SELECT count(*), count(*) FILTER (candidate = 1) FROM candidates")[1]
    assert tokens == best == sum(row["completion_tokens"] for row in rows)
    assert candidates == sum(len(ids) for row in rows for ids in row["candidate_ids"])
    _, rows = query.run(
        cache,
        "SELECT string_agg(text, '' ORDER BY position), any_value(s.completion) "
        "FROM positions p JOIN samples s USING (sample_id) WHERE sample_id = 'rows:r3:g' GROUP BY ALL",
    )
    assert rows[0][1] == "3, 3 🙂 ¡año!" and rows[0][0].endswith("año!<|im_end|>")


def test_a_threshold_cache_has_few_and_many_candidates(threshold_cache):
    counts = {len(ids) for row in samples_of(threshold_cache) for ids in row["candidate_ids"]}
    assert min(counts) < 8 < max(counts)


@pytest.mark.parametrize("k", [1, 3, 8, 1000])
def test_captured_mass_is_that_of_the_k_best_candidates(k, cache):
    positions = [logprobs for row in samples_of(cache) for logprobs in row["candidate_logprobs"]]
    masses = [sum(math.exp(logprob) for logprob in logprobs[:k]) for logprobs in positions]
    assert ask(cache, f"FROM captured_mass({k})") == [
        {
            "k": k,
            "mass": pytest.approx(statistics.fmean(masses), abs=6e-5),
            "worst_percentile": pytest.approx(quantile(masses, 0.01), abs=6e-5),
            "positions": len(positions),
        }
    ]


def test_the_curve_of_captured_mass_ends_at_the_most_candidates(cache):
    rows = ask(cache, "FROM captured_mass_curve")
    most = max(len(ids) for row in samples_of(cache) for ids in row["candidate_ids"])
    assert [row["k"] for row in rows] == [2**step for step in range(20) if 2**step < most] + [most]
    assert rows == [ask(cache, f"FROM captured_mass({row['k']})")[0] for row in rows]
    assert rows == sorted(rows, key=lambda row: row["mass"]) and rows[-1]["mass"] < 1.03


def test_disagreements_are_the_positions_whose_best_token_is_another(cache):
    texts = texts_of(cache)
    expected = {}
    for row in samples_of(cache):
        given = row["completion_ids"]
        for i, (ids, logprobs) in enumerate(zip(row["candidate_ids"], row["candidate_logprobs"])):
            if ids[0] != given[i]:
                before = "".join(texts[token] for token in given[max(i - 5, 0) : i]) or None
                expected[row["sample_id"], i + 1] = {
                    **{name: row[name] for name in ("source", "split", "task", "origin")},
                    **{"before": before, "text": texts[given[i]], "best": texts[ids[0]]},
                    "probability": pytest.approx(math.exp(row["token_logprobs"][i])),
                    "best_probability": pytest.approx(math.exp(logprobs[0])),
                }
    rows = ask(cache, "FROM disagreements")
    assert expected and {(row.pop("sample_id"), row.pop("position")): row for row in rows} == expected
    sure = [row["best_probability"] for row in rows]
    assert sure == sorted(sure, reverse=True)


def test_calibration_compares_how_sure_the_teacher_is_with_how_often_it_is_right(cache):
    bins = grouped(
        ((row["origin"], min(int(math.exp(logprobs[0]) * 10), 9)), (math.exp(logprobs[0]), ids[0] == given))
        for row in samples_of(cache)
        for given, ids, logprobs in zip(row["completion_ids"], row["candidate_ids"], row["candidate_logprobs"])
    )
    rows = ask(cache, "FROM calibration")
    assert [(row["origin"], row["bin"]) for row in rows] == [
        (origin, f"{low / 10:.1f}-{(low + 1) / 10:.1f}") for origin, low in sorted(bins)
    ]
    for row, (_, values) in zip(rows, sorted(bins.items())):
        probability, agreement = (statistics.fmean(column) for column in zip(*values))
        assert row["positions"] == len(values)
        assert row["probability"] == pytest.approx(probability, abs=6e-5)
        assert row["agreement"] == pytest.approx(agreement, abs=6e-5)
        assert row["gap"] == pytest.approx(agreement - probability, abs=6e-5)


def test_near_deterministic_share_counts_positions_above_each_bar(cache):
    groups = grouped(
        ((row["source"], row["task"], row["origin"]), (math.exp(logprobs[0]), entropy))
        for row in samples_of(cache)
        for logprobs, entropy in zip(row["candidate_logprobs"], row["entropies"])
    )
    rows = ask(cache, "FROM near_deterministic_share")
    assert [(row["source"], row["task"], row["origin"]) for row in rows] == sorted(groups)
    for row, (_, values) in zip(rows, sorted(groups.items())):
        best, entropies = zip(*values)
        shares = [statistics.fmean(p > bar for p in best) for bar in (0.5, 0.9, 0.99)]
        assert row["positions"] == len(values)
        assert [row["over_50"], row["over_90"], row["over_99"]] == pytest.approx(shares, abs=6e-5)
        assert row["entropy"] == pytest.approx(statistics.fmean(entropies), abs=6e-4)


def test_lengths_are_quantiles_of_tokens(cache):
    parts = grouped(
        ((row["source"], row["origin"], part), tokens)
        for row in samples_of(cache)
        for part, tokens in {
            "prompt": len(row["prompt_ids"]),
            "completion": len(row["completion_ids"]),
            "sample": len(row["prompt_ids"]) + len(row["completion_ids"]),
        }.items()
    )
    rows = ask(cache, "FROM lengths")
    assert [row["part"] for row in rows] == ["prompt", "completion", "sample"] * 2
    assert {(row.pop("source"), row.pop("origin"), row.pop("part")): row for row in rows} == {
        key: {
            **{"samples": len(tokens), "least": min(tokens), "most": max(tokens), "total": sum(tokens)},
            **{f"p{percent}": quantile(tokens, percent / 100) for percent in (50, 90, 99)},
        }
        for key, tokens in parts.items()
    }


def test_sample_lays_one_sample_out_token_by_token(cache):
    texts = texts_of(cache)
    [row] = [row for row in samples_of(cache) if row["sample_id"] == "rows:r3:s0"]
    rows = ask(cache, "FROM sample('rows:r3:s0')")
    assert [r["position"] for r in rows] == list(range(1, row["completion_tokens"] + 1))
    assert [r["text"] for r in rows] == [texts[token] for token in row["completion_ids"]]
    for name, column in (("logprob", "token_logprobs"), ("rank", "token_ranks"), ("entropy", "entropies")):
        assert [r[name] for r in rows] == row[column]
    assert [r["tail_mass"] for r in rows] == pytest.approx([math.exp(tail) for tail in row["tail_logprobs"]])
    for r, ids, logprobs in zip(rows, row["candidate_ids"], row["candidate_logprobs"]):
        assert r["candidates"] == [
            {"candidate": i + 1, "token_id": token, "text": texts[token], "logprob": logprob}
            for i, (token, logprob) in enumerate(zip(ids, logprobs))
        ]
        assert r["choices"] == " | ".join(f"{texts[t]} {math.exp(p):.2f}" for t, p in list(zip(ids, logprobs))[:5])
    assert ask(cache, "FROM sample('nobody')") == []


def test_duplicates_are_what_counts_twice_or_leaks(copy):
    assert ask(copy, "FROM duplicates") == []
    train = sorted((copy / "data").glob("train-*.parquet"))[0]
    table = pq.read_table(train)
    by_id = {row["sample_id"]: row for row in table.to_pylist()}
    twice, leak, regrouped = [row for row in by_id.values() if row["origin"] == "given"][:3]
    other = {"completion_ids": twice["completion_ids"][::-1]}
    added = [
        twice | {"sample_id": "twice"},
        leak | other | {"sample_id": "leak", "split": "test"},
        regrouped | other | {"sample_id": "regrouped", "group_id": "another"},
    ]
    plan = json.loads((copy / "plan.json").read_text())
    plan["shards"].append({"name": "data/train-00099.parquet", "examples": 3})
    atomic.write_json(copy / "plan.json", seal.with_checksum(plan))
    (copy / "manifest.json").unlink()
    schema = table.schema.with_metadata({b"kdcache": json.dumps({"fingerprint": plan["fingerprint"]}).encode()})
    with open(train.with_name("train-00099.parquet"), "w+b") as file:
        with pq.ParquetWriter(file, schema) as sink:
            sink.write_table(pa.Table.from_pylist(added, schema=schema))
        seal.seal(file)

    def family(row, *more):
        return sorted([r["sample_id"] for r in by_id.values() if r["prompt_id"] == row["prompt_id"]] + [*more])

    expected = [
        ("completion", sorted([twice["sample_id"], "twice"])),
        ("group", family(regrouped, "regrouped")),
        ("split", family(leak, "leak")),
    ]
    assert ask(copy, "FROM duplicates") == [{"kind": k, "n": len(ids), "sample_ids": ids} for k, ids in expected]


# --- what a query may do ----------------------------------------------------------------------------------------------

SERIALIZED_COPY = "WITH t AS (COPY (SELECT 1) TO '{cache}/x') SELECT 1"
HARMFUL = [
    "COPY (SELECT 1) TO '{cache}/data/x.parquet'",
    "WITH t AS (COPY (SELECT 1) TO '{cache}/x') SELECT 1",
    "WITH t AS MATERIALIZED (COPY (SELECT 1) TO '{cache}/x') FROM t",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{cache}/x'",
    "explain /* a */ analyze -- b\n COPY (SELECT 1) TO '{cache}/x'",
    "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{cache}/x'",
    "EXPLAIN ANALYZE WITH t AS (COPY (SELECT 1) TO '{cache}/x') SELECT 1",
    "/* /* */ EXPLAIN SELECT 1 -- */ EXPLAIN ANALYZE COPY (SELECT 1) TO '{cache}/x'",
    "FROM json_execute_serialized_sql('{serialized}')",
    "SELECT * FROM (FROM system.main.\"JSON_execute_serialized_sql\"('{serialized}'))",
    "FROM query('FROM json_execute_serialized_sql(''{{}}'')')",
    "EXPORT DATABASE '{cache}/x'",
    "ATTACH '{cache}/x.db'",
    "CREATE TABLE t AS SELECT 1",
    "WITH t AS (DELETE FROM samples) SELECT 1",
    "SELECT * FROM read_text('/etc/hostname')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT 1; SELECT 2",
    "SET enable_external_access = true",
    "SELECT * FROM enable_profiling(save_location = '{cache}/x')",
    "PRAGMA version; COPY (SELECT 1) TO '{cache}/x'",
    "INSTALL httpfs",
]


def files_of(cache):
    return sorted(cache.rglob("*"))


@pytest.mark.parametrize("sql", HARMFUL)
def test_a_query_reads_the_cache_alone_and_writes_nothing(sql, copy):
    before = files_of(copy)
    copying = SERIALIZED_COPY.format(cache=copy)
    [(serialized,)] = duckdb.execute("SELECT json_serialize_sql(?::VARCHAR)", [copying]).fetchall()
    with pytest.raises(KDError):
        query.run(copy, sql.format(cache=copy, serialized=serialized.replace("'", "''")))
    assert before == files_of(copy)


def test_it_is_the_look_at_the_statement_that_keeps_the_cache_from_being_written(copy):
    for sql, made in (("COPY (SELECT 1) TO '{}'", "x.parquet"), (HARMFUL[1], "x"), ("ATTACH '{}' AS a", "x.db")):
        sql = sql.format(copy / made, cache=copy)
        with pytest.raises(KDError, match="only SELECT and EXPLAIN are run"):
            query.run(copy, sql)
        assert not (copy / made).exists()
        query.connect(copy).execute(sql)  # DuckDB itself would: the folder is allowed
        assert (copy / made).exists()
    with pytest.raises(duckdb.PermissionException):
        query.connect(copy).execute(f"COPY (SELECT 1) TO '{copy.parent}/x.parquet'")


@pytest.mark.parametrize(
    "sql",
    [
        "-- é\nSELECT 'é'; -- done",
        "EXPLAIN SELECT 1",
        "/* /* a */ b */ explain analyze -- ü\n SELECT count(*) FROM samples;",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 3) FROM t",
        "SELECT 'query' AS copy, 'COPY (SELECT 1) TO x' UNION SELECT 'a', 'b'",
        "DESCRIBE samples",
        "SUMMARIZE positions",
        "PIVOT samples ON origin IN ('given', 'sampled') USING count(*)",
        "FROM samples WHERE " + " OR ".join(["sample_id = 'a'"] * 900) + " OR true",
    ],
)
def test_whatever_only_reads_is_run(sql, tiny_cache):
    assert query.run(tiny_cache, sql)[1]


def test_a_query_too_deep_to_be_looked_at_is_refused(tiny_cache):
    with pytest.raises(KDError, match="too deeply"):
        query.run(tiny_cache, "SELECT " + "||".join(["'a'"] * 900))


def test_a_connection_takes_the_next_query_when_the_rows_of_one_were_left(tiny_cache):
    connection = query.connect(tiny_cache)
    _, rows = query.stream(connection, "FROM range(1000000)")
    assert next(rows) == (0,)
    rows.close()
    assert list(query.stream(connection, "SELECT 1")[1]) == [(1,)]


def test_only_the_views_asked_for_are_made(tiny_cache):
    connection = query.connect(tiny_cache, views=("rewards", "samples"))
    assert connection.execute("SHOW TABLES").fetchall() == [("rewards",), ("samples",)]


# --- where the files are ---------------------------------------------------------------------------------------------


def chooses_and_reads(cache):
    """Return how many samples SQL counts, training chooses, and the reader returns."""
    [(counted,)] = query.run(cache, "SELECT count(*) FROM samples JOIN shards USING (file) WHERE tokens > 0")[1]
    selections = [select_samples([Cache(cache)], split) for split in SPLITS]
    loaded = sum(len(selection.load(np.arange(len(selection)))) for selection in selections)
    return counted, sum(map(len, selections)), loaded


@pytest.mark.parametrize("name", ["a[b]c", "a[", "a*c", "a?c", "[!a]", "it's", "two words", "*", "a\\c", "%41{x}"])
def test_a_folder_may_have_any_name(name, tiny_cache, tmp_path):
    for sibling in ("abc", "a[[]", "other"):
        shutil.copytree(tiny_cache, tmp_path / sibling)
    shutil.copytree(tiny_cache, tmp_path / name)
    assert chooses_and_reads(tmp_path / name) == (78, 78, 78)


def test_data_may_be_a_link_to_another_disk(copy, tmp_path):
    (copy / "data").rename(tmp_path / "elsewhere")
    (copy / "data").symlink_to(tmp_path / "elsewhere")
    assert chooses_and_reads(copy) == (78, 78, 78)


@pytest.fixture
def snapshot(tiny_cache, tmp_path):
    """Return a cache as the Hub's snapshot_download leaves it."""
    repository = tmp_path / "datasets--me--cache"
    folder = repository / "snapshots" / "0123abcd"
    (folder / "data").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(path for path in sorted(tiny_cache.rglob("*")) if path.is_file()):
        blob = shutil.copy(path, repository / "blobs" / f"{number:040x}")
        link = folder / path.relative_to(tiny_cache)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_a_snapshot_of_the_hub_is_a_cache(snapshot):
    assert chooses_and_reads(snapshot) == (78, 78, 78)
    assert len(query.run(snapshot, "FROM vocab LIMIT 3")[1]) == 3
    assert len(publish.prepare(snapshot, "me/again").files) > 5


def test_a_snapshot_lets_no_query_read_what_else_is_in_the_blobs(snapshot):
    other = snapshot.parent.parent / "blobs" / "other"
    other.write_text("private")
    with pytest.raises(KDError, match="disabled by configuration"):
        query.run(snapshot, f"FROM read_text('{other}')")


@pytest.mark.parametrize("read", [query.connect, Cache, lambda cache: publish.prepare(cache, "me/it")])
@pytest.mark.parametrize("name", ["vocab.parquet", "plan.json", "data/train-00000.parquet"])
def test_a_link_that_leads_elsewhere_is_refused_by_name(name, read, copy, snapshot, tmp_path):
    for cache in (copy, snapshot):
        target = (cache / name).resolve().rename(tmp_path / "elsewhere")
        (cache / name).unlink(missing_ok=True)
        (cache / name).symlink_to(target)
        with pytest.raises(KDError, match=rf"{name} is a link to {target}, which is outside"):
            read(cache)


def test_a_linked_data_folder_is_not_pushed(copy, tmp_path):
    (copy / "data").rename(tmp_path / "elsewhere")
    (copy / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KDError, match="data is a link to"):
        publish.prepare(copy, "me/it")


# --- choosing samples -------------------------------------------------------------------------------------------------


def chosen(cache, where, split="train"):
    files, table = query.select_samples(cache, where, split)
    assert table.dtype == np.int64 and table.shape[1:] == (4,) and files == sorted(set(files))
    assert [files[i] for i in np.unique(table[:, 0])] == files
    return [(files[file], *rest) for file, *rest in table.tolist()]


def test_chosen_samples_are_named_by_file_and_row_in_order(cache):
    for origin in ("given", "sampled"):
        expected = [
            (path.name, i, len(row["prompt_ids"]), len(row["completion_ids"]))
            for path in sorted((cache / "data").glob("train-*.parquet"))
            for i, row in enumerate(pq.read_table(path).to_pylist())
            if row["origin"] == origin
        ]
        assert chosen(cache, f"origin = '{origin}' -- only these") == expected


def test_a_condition_may_use_the_other_views_or_find_nothing(tiny_cache):
    most = "sample_id IN (SELECT sample_id FROM hardest_samples WHERE tokens > 3)"
    assert 0 < len(chosen(tiny_cache, most)) <= len(chosen(tiny_cache, None))
    assert chosen(tiny_cache, "false") == [] == chosen(tiny_cache, None, split="elsewhere")


HOSTILE = [
    "true) OR (true",
    "true) UNION SELECT file, file_row_number, 1, 1 FROM samples WHERE (true",
    "true); COPY (SELECT 1) TO '{cache}/x'; SELECT (1",
    "true; COPY (SELECT 1) TO '{cache}/x'",
    "true) OR (split = 'test') -- ",
    "true /*",
    "*/ true /*",
    "true) OR (true /* ",
    "true\x00) OR (true",
    "true\n) OR (\ntrue",
    "1) OR split IN ('test', 'validation'",
    "'a' = 'a'' OR ''a' OR split = 'test') OR ('",
    "$$ true",
    "",
    " \n",
    "-- nothing",
    "true, false",
    "true ORDER BY split",
    "true LIMIT 1",
    "true GROUP BY ALL",
    "true QUALIFY true",
    "true FROM samples",
    "true UNION ALL SELECT true",
    "SELECT true",
    "true AS yes",
    "origin = 'given' language",
    "*",
    "? = 1",
    "$split = split",
    "count(*) > 0",
    "row_number() OVER () > 1",
    "unnest([true])",
    "random() < 2",
    "sample_id IN (SELECT sample_id FROM samples USING SAMPLE 1)",
    "setseed(0.5) IS NULL",
    "write_log('x') IS NULL OR true",
    "error('x') IS NULL",
    "EXISTS (WITH t AS (COPY (SELECT 1) TO '{cache}/x') FROM t)",
    "EXISTS (FROM query('FROM samples'))",
    "EXISTS (FROM json_execute_serialized_sql('{{}}'))",
    "EXISTS (FROM enable_profiling(save_location = '{cache}/x'))",
    "EXISTS (FROM read_text('/etc/hostname'))",
    "EXISTS (FROM HOSTILE)",
]


@pytest.mark.parametrize("where", HOSTILE)
def test_what_is_not_one_condition_that_reads_is_refused_and_runs_nothing(where, copy):
    before = files_of(copy)
    with pytest.raises(KDError, match="--where") as refusal:
        query.select_samples(copy, where.format(cache=copy), "train")
    assert (refusal.value.exit_code, files_of(copy)) == (2, before)


@pytest.mark.parametrize(
    "where",
    [
        "true OR split = 'test'",
        "split <> 'train' OR true",
        "sample_id IN (SELECT sample_id FROM samples WHERE split = 'test') OR true",
        "samples.split = 'test' OR samples.split = 'train'",
        "(true) OR (true) -- ) OR (true",
        "/* ( */ true",
        "EXISTS (SELECT 1 FROM positions WHERE positions.sample_id = samples.sample_id)",
    ],
)
def test_a_condition_chooses_all_of_its_split_and_nothing_of_another(where, tiny_cache):
    assert chosen(tiny_cache, where) == chosen(tiny_cache, None) != []


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("orign = 'given'", "there is no column orign (is origin meant?); the view samples has sample_id, "),
        ("count(*) > 1", "it holds no aggregate and no window function"),
        ("lag(reward) OVER () = 1", "it holds no aggregate and no window function"),
        ("reward = ?", "a condition has no parameters"),
        ("origin = 'given' language", "more follows it (language)"),
        ("true) OR (true", "expected one condition, as in "),
        ("random() < 0.1", "random gives another answer each time; hash(sample_id) % 10 = 0 always draws"),
        ("origin > 3", "Cannot compare values of type VARCHAR"),
    ],
)
def test_a_condition_that_cannot_be_asked_is_explained_in_a_sentence(where, sentence, tiny_cache):
    with pytest.raises(KDError) as refusal:
        query.select_samples(tiny_cache, where, "train")
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


ASKING = {
    "train": lambda cache, where: select_samples([Cache(cache)], "train", where),
    "the student's card": lambda cache, where: query.sources(cache, where),
    "evaluate": lambda cache, where: evaluate.prompts_of(EvaluateConfig((), (cache,), cache, where=where)),
    "grpo": lambda cache, where: grpo._choose(cache, Cache(cache).plan, where),
    "verify-answers": lambda cache, where: judging.verify_answers(cache, where=where),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_condition_is_one_condition_wherever_it_is_taken(ask, copy):
    with pytest.raises(KDError, match="expected one condition"):
        ask(copy, "true) OR (true")


# --- kd sql -----------------------------------------------------------------------------------------------------------


def test_output_as_json_csv_and_table(kd, tiny_cache):
    sql = "SELECT sample_id, completion_tokens AS n FROM samples ORDER BY sample_id LIMIT 2"
    as_json = [json.loads(line) for line in kd("sql", tiny_cache, sql, "--json").stdout.splitlines()]
    as_csv = list(csv.DictReader(io.StringIO(kd("sql", tiny_cache, sql, "--csv").stdout)))
    assert [r["sample_id"] for r in as_json] == [r["sample_id"] for r in as_csv] == ["rows:r0:g", "rows:r0:s0"]
    table = kd("sql", tiny_cache, sql).stdout.splitlines()
    assert table[0].split() == ["sample_id", "n"] and table[2].split() == ["rows:r0:g", str(as_json[0]["n"])]


def test_a_query_is_an_argument_a_file_or_stdin(kd, tiny_cache, tmp_path):
    sql = "-- how many?\nSELECT count(*) AS n, 'ñ;' AS s -- ;\nFROM samples; -- that is all\n"
    (tmp_path / "q.sql").write_text("\ufeff" + sql, encoding="utf-8")
    for done in (
        kd("sql", tiny_cache, sql, "--json"),
        kd("sql", tiny_cache, "--file", "q.sql", "--json"),
        kd("sql", tiny_cache, "--json", input=sql),
    ):
        assert json.loads(done.stdout) == {"n": 78, "s": "ñ;"} and not done.stderr


def test_wrong_usage_is_said_and_exits_2(kd, tiny_cache, tmp_path):
    (tmp_path / "latin.sql").write_bytes("SELECT 'ñ'".encode("latin-1"))
    (tmp_path / "q.sql").write_text("SELECT 1")
    assert "CACHE" in kd("sql", code=2).stderr
    assert "--file" in kd("sql", tiny_cache, code=2, stdin=subprocess.DEVNULL).stderr
    assert "not both" in kd("sql", tiny_cache, "SELECT 1", "--file", "q.sql", code=2).stderr
    assert "UTF-8" in kd("sql", tiny_cache, "--file", "latin.sql", code=2).stderr
    assert "nowhere.sql" in kd("sql", tiny_cache, "--file", "nowhere.sql", code=2).stderr
    assert "found 2" in kd("sql", tiny_cache, "SELECT 1; SELECT 2", code=2).stderr


def test_the_views_are_listed_without_a_cache(kd):
    assert kd("sql", "nowhere", "--list").stdout == kd("sql", "--list").stdout


def test_sql_errors_are_duckdbs_own_words(kd, tiny_cache):
    assert "nope" in kd("sql", tiny_cache, "SELECT nope FROM samples", code=1).stderr
    assert "enough" in kd("sql", tiny_cache, "SELECT error('enough')", code=1).stderr


def test_json_has_no_infinity(kd, tiny_cache):
    line = kd("sql", tiny_cache, "SELECT '-inf'::FLOAT AS a, ['-inf'::FLOAT, 1.5::FLOAT] AS b", "--json").stdout
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}


def test_a_name_that_stands_twice_gets_a_number_as_in_a_table_of_the_query(kd, tiny_cache):
    sql = "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS b, 5 AS a"
    assert json.loads(kd("sql", tiny_cache, sql, "--json").stdout) == {"a": 1, "a_2": 2, "a_1": 3, "b": 4, "a_3": 5}


def test_a_table_is_printed_while_its_rows_come(capsys):
    printed = []

    def rows():
        for number in range(3000):
            if number == 2000:
                printed.append(len(capsys.readouterr().out.splitlines()))
            yield (number,)

    print_table(["n"], rows())
    assert printed[0] > 1000


def command(*arguments):
    return [sys.executable, "-m", "kdcache", *map(str, arguments)]


@pytest.mark.parametrize("how", ["--json", "--csv", None])
def test_a_reader_that_leaves_early_is_no_error(how, tiny_cache):
    arguments = command("sql", tiny_cache, "FROM candidates", *([how] if how else []))
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_query_without_all_shards_says_so(kd, copy):
    first = f"data/{min((copy / 'data').iterdir()).name}"
    (copy / "manifest.json").unlink()  # as before the end of a capture
    (copy / first).unlink()
    assert kd("sql", copy, "SELECT 1 AS one").stderr == (
        f"warning: 1 shard is missing (the first is {first}); the answers leave them out\n"
    )


def test_a_damaged_shard_is_said_to_be_damaged(kd, copy, tiny_model):
    victim = sorted((copy / "data").glob("train-*"))[0]
    victim.write_bytes(victim.read_bytes()[:1000])
    for arguments in (
        ("sql", copy, "SELECT count(*), max(len(completion)) FROM samples"),
        ("train", "--from-cache", copy, "--student", tiny_model, "--output-dir", "o"),
    ):
        error = kd(*arguments, code=3).stderr
        assert victim.name in error and "--where" not in error


# --- the prompt -------------------------------------------------------------------------------------------------------


class Terminal:
    """`kd sql CACHE` on its own terminal."""

    def __init__(self, cache: Path):
        # Not pty.fork: in a test process with threads, what it runs before exec may wait for ever.
        self.terminal, theirs = pty.openpty()
        become = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", become, *command("sql", cache)],
            **{"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True},
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(theirs)
        self.seen = b""

    def until(self, text: str, again: str = "") -> None:
        """Read until ``text`` was printed; type ``again`` whenever nothing was printed for a second."""
        for _ in range(60):
            if text.encode() in self.seen:
                self.seen = self.seen.partition(text.encode())[2]
                return
            if select.select([self.terminal], [], [], 1)[0]:
                self.seen += os.read(self.terminal, 10_000)
            else:
                self.type(again)
        pytest.fail(f"waited for {text!r}, have {self.seen!r}")

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())


def test_the_prompt_takes_queries_until_ctrl_d(tiny_cache):
    kd = Terminal(tiny_cache)
    kd.until("kd> ")
    kd.type("SELECT 40 +\n")
    kd.until("...> ")
    kd.type("2 AS answer; -- done;\n")
    kd.until("\n    42\r\nkd> ")
    kd.type("SELECT nope;\n")
    kd.until('Binder Error: Referenced column "nope"')
    kd.until("kd> ")
    kd.type("DROP VIEW samples;\n")
    kd.until("only SELECT and EXPLAIN are run")
    kd.until("kd> ")
    kd.type("\n")
    kd.until(".views lists")
    kd.until("kd> ")
    kd.type(".views\n")
    kd.until("\nuncertain_tokens ")
    kd.until("kd> ")
    kd.type("SELECT 'lost;\n")
    kd.until("...> ")
    kd.until("kd> ", again="\x03")  # Python may miss a Ctrl-C in the moment before it waits for a key
    kd.type("SELECT count(*) AS n FROM samples;\n")
    kd.until("\n78\r\nkd> ")
    pytest.importorskip("readline")
    kd.type("\x10\n")  # Ctrl-P: the line before
    kd.until("\n78\r\nkd> ")
    kd.type("SELECT sum(a.range * b.range) FROM range(100000000) AS a, range(100000000) AS b;\n")
    kd.until("b;\r\n")
    kd.until("kd> ", again="\x03")
    kd.type("\x04")
    assert kd.process.wait(60) == 0


def test_ctrl_c_ends_a_query_that_does_not_react_to_it(tiny_cache):
    kd = Terminal(tiny_cache)
    kd.until("kd> ")
    kd.type("SELECT levenshtein(repeat('a', 400000), repeat('b', 400000)) AS b;\n")
    kd.until("AS b;\r\n")
    kd.until("kd ends without waiting", again="\x03")
    assert kd.process.wait(60) == 130


def test_a_prompt_keeps_the_verifier_that_one_of_its_rows_names(tiny_model, tmp_path):
    rows = [{"id": "a", "prompt": "6 x 7?", "completion": "42"}]
    rows.append(rows[0] | {"id": "b", "reference": "42", "verifier": "numeric"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"mode": "score", "split_ratios": (1.0, 0.0, 0.0), "verify": False}
    capture.run(capture_plan(tiny_model, tmp_path / "rows.jsonl", tmp_path / "cache", **changes))
    [prompt] = ask(tmp_path / "cache", "SELECT verifier, reference FROM prompts")
    assert prompt == {"verifier": "numeric", "reference": "42"}
