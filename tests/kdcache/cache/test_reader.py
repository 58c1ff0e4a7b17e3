"""What is written is read; what is damaged or foreign is refused."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers import capture_plan
from kdcache.cache import documents, reader
from kdcache.capture import run as capture
from kdcache.errors import KDError


def first_shard(cache):
    return sorted((cache / "data").glob("train-*"))[0].name


def test_each_position_sums_to_one_minus_its_tail(tiny_cache):
    for sample in reader.Cache(tiny_cache).read(first_shard(tiny_cache), 0, range(5)):
        assert sample.candidates.counts.sum() == len(sample.candidates.ids)
        starts, candidates = sample.candidates.starts, sample.candidates
        total = np.add.reduceat(np.exp(candidates.logprobs), starts) + np.exp(candidates.tails)
        assert total == pytest.approx(np.ones(len(total)), abs=2e-6)


def test_f32_keeps_what_q8_rounds(tiny_model, rows_file, tiny_cache, tmp_path):
    capture.run(capture_plan(tiny_model, rows_file, tmp_path / "f32", precision="f32"))
    rounded = reader.Cache(tiny_cache).read(first_shard(tiny_cache), 0, range(3))
    exact = reader.Cache(tmp_path / "f32").read(first_shard(tmp_path / "f32"), 0, range(3))
    for q8, f32 in zip(rounded, exact):
        assert q8.sample_id == f32.sample_id and np.array_equal(q8.candidates.ids, f32.candidates.ids)
        assert not np.array_equal(q8.candidates.logprobs, f32.candidates.logprobs)
        assert np.exp(q8.candidates.logprobs) == pytest.approx(np.exp(f32.candidates.logprobs), abs=0.02)


def test_samples_come_in_the_order_asked_for(tiny_cache):
    cache = reader.Cache(tiny_cache)
    name = first_shard(tiny_cache)
    forward = [s.sample_id for s in cache.read(name, 0, [0, 1, 2])]
    assert [s.sample_id for s in cache.read(name, 0, [2, 0])] == [forward[2], forward[0]]


def test_a_shard_of_another_cache_is_refused(tiny_cache, tiny_model, rows_file, tmp_path):
    other = tmp_path / "other"
    capture.run(capture_plan(tiny_model, rows_file, other, seed=1))
    name = first_shard(other)
    shutil.copy(tiny_cache / "data" / first_shard(tiny_cache), other / "data" / name)
    with pytest.raises(KDError, match="belongs to another cache"):
        reader.Cache(other).read(name, 0, [0])


def test_a_flipped_byte_is_noticed(tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    path = copy / "data" / first_shard(copy)
    with pq.ParquetFile(path) as file:
        chunk = next(
            c
            for c in (file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns))
            if c.path_in_schema == "candidate_ids.list.element.list.element"
        )
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(KDError, match="damaged") as error:
        reader.Cache(copy).read(path.name, 0, [0])
    assert error.value.exit_code == 3


def test_a_missing_shard_is_named(tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    (copy / "data" / first_shard(copy)).unlink()
    with pytest.raises(KDError, match=r"1 of .* shards are missing"):
        reader.Cache(copy)


def test_a_cache_of_a_later_format_is_refused(tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    plan = (copy / "plan.json").read_text().replace('"format_version": 1', '"format_version": 9')
    (copy / "plan.json").write_text(plan)
    with pytest.raises(KDError, match="cache format 9"):
        documents.read_plan(copy)
