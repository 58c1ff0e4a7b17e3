"""Damage is reported as one sentence that blames the right file, and no reader ever returns a wrong number."""

import json
import os
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import ROOT, capture_plan
from kdcache.cache import documents, integrity, manifest, query, reader, writer
from kdcache.cache.format import SCHEMA, SPLITS, parquet_options
from kdcache.capture import run as capture
from kdcache.errors import KDError
from kdcache.judge import rewards_file as judging
from kdcache.printable import printable
from kdcache.storage import digests, seal
from trainer.data.select import select
from trainer.evaluate import setup as evaluate
from trainer.evaluate.config import EvaluateConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
import flips

ALL = "SELECT * EXCLUDE (file_row_number) FROM samples ORDER BY sample_id"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Keep what is remembered of these caches apart from the user's own."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def copy(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache, tmp_path / "copy")


@pytest.fixture
def old(copy):
    """Return a cache as it was written before files had checksums of their own."""
    for path in copy.rglob("*.parquet"):
        data = path.read_bytes()
        start = data.rindex(seal.MAGIC)
        path.write_bytes(data[:start] + data[start + seal.SEAL_BYTES :])
    plan, recorded = (json.loads((copy / name).read_text()) for name in ("plan.json", "manifest.json"))
    for shard in recorded["shards"]:
        status = (copy / shard["name"]).stat()
        shard |= {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        shard["sha256"] = seal.digest(copy / shard["name"]).sha256
    for name, content in (("plan.json", plan), ("manifest.json", recorded)):
        entries = {key: value for key, value in content.items() if key in documents._ENTRIES_BEFORE_CHECKSUMS[name]}
        (copy / name).write_text(json.dumps(entries))
    return copy


def shards_of(cache, split="train"):
    return sorted((cache / "data").glob(f"{split}-*"))


def forge(shard, change):
    """Change the table of a shard, keep its metadata, and seal it as if it had been written like this."""
    table = pq.read_table(shard)
    with open(shard, "w+b") as file:
        with pq.ParquetWriter(file, table.schema, **parquet_options("q8")) as sink:
            sink.write_table(change(table))
        seal.seal(file)


def same_command(model, rows, cache):
    return capture.run(capture_plan(model, rows, cache))


def read_everything(cache):
    """Return what each command calls to read the shards."""
    return {
        "sql": lambda: query.run(cache, ALL),
        "train": lambda: select([reader.Cache(cache)], "train"),
        "train --where": lambda: select([reader.Cache(cache)], "train", "true"),
        "evaluate": lambda: evaluate.groups_of(
            EvaluateConfig((), (cache,), cache, split="train"), [reader.Cache(cache)]
        ),
        "info": lambda: manifest.summary(cache),
    }


COMMANDS = ("sql", "train", "train --where", "evaluate")


# --- single bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flips_of_each_file", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_found_blamed_on_its_file_and_never_another_number(
    flips_of_each_file, tiny_model, rows_file, tmp_path
):
    cache = tmp_path / "cache"
    capture.run(capture_plan(tiny_model, rows_file, cache, sparsify="threshold:0.05", limit=20))
    chosen = flips.plan_flips(cache, 0, seed=flips_of_each_file, least=flips_of_each_file)
    assert [(o.flip, o.bad) for o in flips.campaign(cache, chosen) if o.bad] == []


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_no_bit_of_a_small_file_can_flip_and_still_be_read_as_something_else(name, copy):
    """Flip every bit of the file's start, and of the name and first digits of its checksum."""
    whole = (copy / name).read_bytes()
    content = json.loads(whole)
    end = whole.rindex(b'"checksum"')
    other = []
    for place in [*range(0, 60), *range(end, end + 20)]:
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            (copy / name).write_bytes(data)
            try:
                read = documents.read_plan(copy) if name == "plan.json" else documents.read_manifest(copy)
            except KDError:
                continue
            if read != content:
                other.append((place, bit))
    assert other == []


# --- shards that are others -------------------------------------------------------------------------------------------


def swap(cache):
    first, second = shards_of(cache)[:2]
    first.rename(cache / "aside")
    second.rename(first)
    (cache / "aside").rename(second)


def drop_row(cache):
    forge(shards_of(cache)[0], lambda table: table.slice(1))


def repeat_row(cache):
    forge(shards_of(cache)[0], lambda table: pa.concat_tables([table, table.slice(0, 1)]))


def forged(cache):
    forge(shards_of(cache)[0], lambda table: table.take(list(reversed(range(len(table))))))


def rewritten(cache):
    pq.write_table(pq.read_table(shards_of(cache)[0]), shards_of(cache)[0])


def gone(cache):
    shards_of(cache)[0].unlink()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", [swap, drop_row, repeat_row, forged, rewritten, gone])
def test_shards_that_are_not_those_of_the_manifest_are_refused(change, command, copy):
    change(copy)
    with pytest.raises(KDError, match="train-0000"):
        read_everything(copy)[command]()


@pytest.mark.parametrize("change", [swap, rewritten])
def test_without_a_manifest_a_shard_still_says_what_it_is(change, copy):
    (copy / "manifest.json").unlink()
    change(copy)
    with pytest.raises(KDError, match=r"under another name|carries no seal"):
        query.run(copy, ALL)


def test_a_shard_that_is_not_captured_yet_is_just_not_there(copy):
    (copy / "manifest.json").unlink()
    gone(copy)
    [(rows,)] = query.run(copy, "SELECT count(*) FROM samples")[1]
    assert 0 < rows < 78


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_under_a_name_that_is_not_planned_is_not_read(command, copy, tiny_cache):
    def numbers(cache):
        result = read_everything(cache)[command]()
        return len(result) if command.startswith("train") else result

    shutil.copy(shards_of(copy)[0], copy / "data/train-00099.parquet")
    assert numbers(copy) == numbers(tiny_cache)


def test_kd_sql_says_what_it_does_not_read(kd, copy):
    shutil.copy(shards_of(copy)[0], copy / "data/train-00099.parquet")
    assert "(the first is data/train-00099.parquet)" in kd("sql", copy, "SELECT 1").stderr


def test_a_flipped_bit_in_a_shards_name_is_mended_without_capturing_the_rest(copy, tiny_cache, tiny_model, rows_file):
    shard = shards_of(copy)[1]
    strange = os.fsencode(shard).replace(b"train", b"tr\xe1in")
    os.rename(shard, strange)
    with pytest.raises(KDError, match=r"train-00001.parquet is gone, .*data/tr\\udce1in-00001.parquet"):
        query.run(copy, ALL)
    report = integrity.verify(copy)
    assert list(map(printable, report.problems)) == [r"data/tr\udce1in-00001.parquet"]
    integrity.repair(report)
    same_command(tiny_model, rows_file, copy)
    assert integrity.verify(copy).sound and query.run(copy, ALL) == query.run(tiny_cache, ALL)


def test_a_folder_in_data_is_left_where_it_is(copy):
    (copy / "data/notes").mkdir()
    (copy / "data/notes/thesis.txt").write_text("years of work")
    report = integrity.verify(copy)
    integrity.repair(report)
    assert report.sound and (copy / "data/notes/thesis.txt").read_text() == "years of work"


# --- plan.json, manifest.json -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        ("null", "found null"),
        ("[]", "found a list"),
        ('"plan"', "found a text"),
        ("{}", "cache format None"),
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "nests too deeply"),
        ('{"format_version": 1}', "fingerprint is missing"),
        ('{"format_version": 1, "fingerprint": 7}', "fingerprint is a number"),
        ('{"format_version": 1, "fingerprint": "x", "fields": []}', "fields is a list"),
    ],
)
@pytest.mark.parametrize("command", [*COMMANDS, "info"])
def test_a_plan_that_is_none_is_one_sentence_in_every_command(command, text, says, copy):
    (copy / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(KDError, match=says):
        read_everything(copy)[command]()


@pytest.mark.parametrize("text", ["null", "[]", "{", '{"format_version": 1}', '{"format_version": 1, "shards": {}}'])
def test_a_manifest_that_is_none_is_made_again_of_the_shards(text, copy, tiny_cache):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(KDError, match=r"manifest.json is damaged"):
        query.run(copy, ALL)
    report = integrity.verify(copy)
    assert list(report.problems) == ["manifest.json"]
    integrity.repair(report)
    assert integrity.verify(copy).sound and query.run(copy, ALL) == query.run(tiny_cache, ALL)


def test_a_damaged_plan_is_set_aside_and_the_same_command_writes_it_again(copy, tiny_cache, tiny_model, rows_file):
    whole = (copy / "plan.json").read_bytes()
    (copy / "plan.json").write_bytes(whole.replace(b"train-00001", b"train-00005"))
    with pytest.raises(KDError, match=r"plan.json is damaged.*run: kd cache verify --repair"):
        same_command(tiny_model, rows_file, copy)
    report = integrity.verify(copy)
    integrity.repair(report)
    assert report.set_aside == ["plan.json"]
    with pytest.raises(KDError, match="it was set aside: the same kd cache-teacher command writes it again"):
        query.run(copy, ALL)
    shards = {path: path.stat().st_mtime_ns for path in (copy / "data").iterdir()}
    same_command(tiny_model, rows_file, copy)
    assert (copy / "plan.json").read_bytes() == whole and integrity.verify(copy).sound
    assert shards == {path: path.stat().st_mtime_ns for path in (copy / "data").iterdir()}


def test_another_command_does_not_take_a_cache_whose_plan_was_set_aside(copy, tiny_model, rows_file):
    (copy / "plan.json").write_text("{")
    integrity.repair(integrity.verify(copy))
    with pytest.raises(KDError, match="holds shards of a cache made differently"):
        capture.run(capture_plan(tiny_model, rows_file, copy, seed=5))


# --- vocab.parquet, rewards.parquet -----------------------------------------------------------------------------------


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def test_damaged_rewards_are_refused_set_aside_and_can_be_made_again(copy, tiny_cache):
    damage(copy / "rewards.parquet")
    with pytest.raises(KDError, match=r"rewards.parquet is damaged.*then kd verify-answers"):
        query.run(copy, ALL)
    report = integrity.verify(copy)
    assert list(report.problems) == ["rewards.parquet"]
    integrity.repair(report)
    judging.verify_answers(copy)
    assert integrity.verify(copy).sound and query.run(copy, ALL) == query.run(tiny_cache, ALL)


def test_a_damaged_vocabulary_is_refused_and_blamed_alone(copy):
    damage(copy / "vocab.parquet")
    with pytest.raises(KDError, match=r"vocab.parquet is damaged"):
        query.run(copy, "SELECT * FROM vocab LIMIT 1")
    assert list(integrity.verify(copy).problems) == ["vocab.parquet"]


def test_of_two_rewards_of_a_sample_the_last_holds_and_no_sample_is_doubled(copy):
    rows = [{"sample_id": "rows:r3:g", "reward": reward, "reason": None} for reward in (1.0, 0.0)]
    writer.write_table(copy / "rewards.parquet", pa.Table.from_pylist(rows, judging.REWARDS))
    counts = query.run(copy, "SELECT count(*), max(reward) FROM samples")[1]
    assert counts == [(78, 0.0)] and len(select([reader.Cache(copy)], "train", "true")) == len(
        select([reader.Cache(copy)], "train")
    )


# --- from before there were checksums ---------------------------------------------------------------------------------


def test_an_old_cache_is_read_and_said_not_to_be_protected(old, tiny_cache):
    report = integrity.verify(old)
    assert report.sound and {"plan.json", "manifest.json", "vocab.parquet"} < set(report.unprotected)
    assert query.run(old, ALL) == query.run(tiny_cache, ALL)


def test_an_old_manifest_with_a_wrong_sha256_is_blamed_and_no_sound_shard(old):
    recorded = json.loads((old / "manifest.json").read_text())
    recorded["shards"][0]["sha256"] = "0" * 64
    (old / "manifest.json").write_text(json.dumps(recorded))
    report = integrity.verify(old)
    integrity.repair(report)
    assert list(report.problems) == ["manifest.json"] and not report.set_aside and integrity.verify(old).sound


def test_an_old_plan_with_another_vocabulary_is_blamed_and_no_sound_shard(old):
    plan = json.loads((old / "plan.json").read_text())
    (old / "plan.json").write_text(json.dumps(plan | {"vocab_size": 9152}))
    assert list(integrity.verify(old).problems) == ["plan.json"]


def test_an_old_shard_without_a_manifest_is_read_once_its_pages_are_checked(old):
    (old / "manifest.json").unlink()
    shard = shards_of(old)[0]
    with pq.ParquetFile(shard) as file:
        chunk = file.metadata.row_group(0).column(SCHEMA.names.index("completion"))
    data = bytearray(shard.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(KDError, match=rf"{shard.name} is damaged"):
        query.run(old, "SELECT sum(prompt_tokens) FROM samples")


# --- what is remembered -----------------------------------------------------------------------------------------------


@pytest.fixture
def settled(copy, monkeypatch):
    """Return a cache that was read, and in which nothing has changed for long."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1)
    query.run(copy, "SELECT 1")
    return copy


def reads(monkeypatch):
    """Return a list that grows by the name of each file whose bytes are read."""
    names = []
    monkeypatch.setattr(digests, "digest", lambda path: names.append(path.name) or seal.digest(path))
    return names


def test_what_was_read_once_is_not_read_again(settled, monkeypatch):
    names = reads(monkeypatch)
    query.run(settled, "SELECT 1")
    assert names == []


@pytest.mark.parametrize(
    "forget",
    [
        lambda cache, shard: os.utime(shard, ns=(0, 0)),
        lambda cache, shard: shutil.copy2(shard, shard.with_name("x")) and shard.with_name("x").rename(shard),
    ],
)
def test_a_file_that_is_another_one_is_read_again_whatever_its_size_and_time(forget, settled, monkeypatch):
    names, shard = reads(monkeypatch), shards_of(settled)[0]
    forget(settled, shard)
    query.run(settled, "SELECT 1")
    assert names == [shard.name]


def test_a_flipped_bit_under_the_old_time_of_change_is_noticed(settled):
    shard = shards_of(settled)[0]
    flips.Flip(f"data/{shard.name}", 700, 2).apply(settled)
    with pytest.raises(KDError, match="is damaged"):
        query.run(settled, "SELECT 1")


def test_nothing_is_remembered_for_ever(settled, monkeypatch):
    names = reads(monkeypatch)
    monkeypatch.setattr(digests, "DAYS", 0)
    query.run(settled, "SELECT 1")
    assert len(names) == len(os.listdir(settled / "data")) + 2


def test_a_home_that_cannot_be_written_to_costs_time_alone(copy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "file/home"))
    assert query.run(copy, "SELECT count(*) FROM samples")[1] == [(78,)]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_selecting_without_sql_finds_what_sql_finds(split, tiny_cache):
    files, table = reader.Cache(tiny_cache).lengths(split)
    of_sql = query.select_samples(tiny_cache, None, split)
    assert files == of_sql[0] and np.array_equal(table, of_sql[1])


@pytest.mark.parametrize(
    "column, value, says",
    [
        ("tail_logprobs", float("nan"), "tail that is no log-probability"),
        ("tail_logprobs", float("inf"), "tail that is no log-probability"),
        ("candidate_logprobs", float("nan"), "candidate whose log-probability is not finite"),
        ("candidate_logprobs", float("-inf"), "candidate whose log-probability is not finite"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_sample_and_position(column, value, says, copy):
    def change(table):
        place, rows = table.schema.get_field_index(column), table[column].to_pylist()
        rows[2][1] = [value] * len(rows[2][1]) if isinstance(rows[2][1], list) else value
        return table.set_column(place, table.schema.field(place), pa.array(rows, table.schema.field(place).type))

    shard = shards_of(copy)[0]
    forge(shard, change)
    (copy / "manifest.json").unlink()
    sample_id = pq.read_table(shard)["sample_id"][2].as_py()
    with pytest.raises(KDError, match=f"sample {sample_id} has, at position 1, a {says}"):
        reader.Cache(copy).read(shard.name, 0, [2])


def test_a_run_whose_loss_is_not_finite_stops_with_a_sentence(kd, tiny_cache, tiny_model):
    arguments = ("--from-cache", tiny_cache, "--student", tiny_model, "--output-dir", "run", "--max-steps", 12)
    done = kd("train", *arguments, "--learning-rate", "1e6", "--weight-decay", 1, "--report-to", "none", code=1)
    assert "so the weights are no longer numbers" in done.stderr
