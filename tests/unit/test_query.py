"""Every file of sql/ answers on a real cache, also in plain DuckDB, and can do no harm."""

import csv
import io
import json
import os

import duckdb
import pytest

from kdcache import format, query
from kdcache.errors import KDError

FILES = sorted(format.resource_folder("sql").glob("*.sql"))


def test_every_file_is_a_listed_view():
    assert sorted(query.VIEWS) == [f.stem for f in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_has_a_header_a_comment_and_an_example_that_runs(path, tiny_cache):
    text = path.read_text()
    lines = text.splitlines()
    assert lines[0].startswith(f"-- {path.stem}: ") and f"COMMENT ON VIEW {path.stem} IS" in text
    assert any(line.startswith("-- columns ") for line in lines)
    header = "\n".join(line.removeprefix("--") for line in lines if line.startswith("--"))
    names, _ = query.run(tiny_cache, header.partition("example")[2])
    _, rows = query.run(tiny_cache, f"SELECT * FROM {path.stem} LIMIT 5")
    assert names and rows


def test_the_files_work_in_plain_duckdb_inside_the_cache(tiny_cache, monkeypatch):
    monkeypatch.chdir(tiny_cache)
    plain = duckdb.connect()
    for name in query.VIEWS:
        plain.execute((format.resource_folder("sql") / f"{name}.sql").read_text())
    assert (
        plain.sql("SELECT count(*) FROM positions").fetchall()
        == query.run(tiny_cache, "SELECT count(*) FROM positions")[1]
    )


def test_positions_and_candidates_agree_with_the_samples(tiny_cache):
    _, [(tokens,)] = query.run(tiny_cache, "SELECT sum(completion_tokens)::BIGINT FROM samples")
    _, [(positions,)] = query.run(tiny_cache, "SELECT count(*) FROM positions")
    _, [(candidates, best)] = query.run(tiny_cache, "SELECT count(*), count(*) FILTER (candidate = 1) FROM candidates")
    assert positions == tokens == best and candidates == 8 * tokens
    _, rows = query.run(
        tiny_cache,
        "SELECT string_agg(text, '' ORDER BY position), any_value(s.completion) FROM positions p JOIN samples s USING (sample_id) "
        "WHERE sample_id = 'rows:r3:g' GROUP BY ALL",
    )
    assert rows[0][1] == "3, 3 🙂 ¡año!" and rows[0][0].endswith("año!<|im_end|>")


def test_captured_mass_grows_with_k_and_stays_below_one(tiny_cache):
    _, rows = query.run(tiny_cache, "SELECT k, mass FROM captured_mass ORDER BY k")
    masses = [mass for _, mass in rows]
    assert [k for k, _ in rows] == list(range(1, 9)) and masses == sorted(masses) and masses[-1] < 1.02


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{cache}/data/x.parquet'",
        "CREATE TABLE t AS SELECT 1",
        "ATTACH '{cache}/x.db'",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT 1; SELECT 2",
        "SET enable_external_access = true",
        "PRAGMA version; COPY (SELECT 1) TO '{cache}/x'",
        "INSTALL httpfs",
    ],
)
def test_a_query_reads_the_cache_alone_and_writes_nothing(sql, tiny_cache):
    before = sorted(os.listdir(tiny_cache)) + sorted(os.listdir(tiny_cache / "data"))
    with pytest.raises(KDError):
        query.run(tiny_cache, sql.format(cache=tiny_cache))
    assert before == sorted(os.listdir(tiny_cache)) + sorted(os.listdir(tiny_cache / "data"))


def test_output_as_json_csv_and_table(kd, tiny_cache):
    sql = "SELECT sample_id, completion_tokens AS n FROM samples ORDER BY sample_id LIMIT 2"
    as_json = [json.loads(line) for line in kd("sql", tiny_cache, sql, "--json").stdout.splitlines()]
    as_csv = list(csv.DictReader(io.StringIO(kd("sql", tiny_cache, sql, "--csv").stdout)))
    assert [r["sample_id"] for r in as_json] == [r["sample_id"] for r in as_csv] == ["rows:r0:g", "rows:r0:s0"]
    table = kd("sql", tiny_cache, sql).stdout.splitlines()
    assert table[0].split() == ["sample_id", "n"] and table[2].split() == ["rows:r0:g", str(as_json[0]["n"])]


def test_sql_errors_are_duckdbs_own_words(kd, tiny_cache):
    assert "nope" in kd("sql", tiny_cache, "SELECT nope FROM samples", code=1).stderr


def test_json_has_no_infinity(kd, tiny_cache):
    line = kd("sql", tiny_cache, "SELECT '-inf'::FLOAT AS a, ['-inf'::FLOAT, 1.5::FLOAT] AS b", "--json").stdout
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}


def test_a_damaged_shard_is_said_to_be_damaged(kd, tiny_cache, tiny_model, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    victim = sorted((copy / "data").glob("train-*"))[0]
    victim.write_bytes(victim.read_bytes()[:1000])
    for command in (
        ("sql", copy, "SELECT count(*), max(len(completion)) FROM samples"),
        ("train", "--from-cache", copy, "--student", tiny_model, "--output-dir", "o"),
    ):
        error = kd(*command, code=3).stderr
        assert victim.name in error and "--where" not in error
