"""A shard is opened in one way: with page checksums on, and one sentence for whatever a damaged file raises."""

import inspect

import pytest

from kdcache.cache import shard
from kdcache.cache.integrity import row_checks
from kdcache.cache.layout import SHARD_NAME, file_of_shard, name_of_shard, shard_name, split_of_shard, stored_files


def test_a_file_that_is_no_parquet_is_one_sentence_with_a_way_out(tmp_path):
    path = tmp_path / "train-00000.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with (
        pytest.raises(shard.DamagedShard, match=r"train-00000.parquet is damaged .* --repair") as error,
        shard.opened(path),
    ):
        pass
    assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_a_shard_says_its_name_and_fingerprint(tiny_cache):
    for name, path in stored_files(tiny_cache).items():
        with shard.opened(path) as file:
            fingerprint = file.metadata["fingerprint"]
            assert file.metadata["name"] == name and sum(file.row_groups) == len(file.read(["sample_id"]))
            assert shard.misplaced(file.metadata, name, fingerprint) is None
            assert "another name" in shard.misplaced(file.metadata, "data/test-00099.parquet", fingerprint)
            assert "another cache" in shard.misplaced(file.metadata, name, "0" * 32)


def test_names_and_files_of_shards_belong_together():
    name = shard_name("validation", 7)
    assert name == name_of_shard(file_of_shard(name)) == "data/validation-00007.parquet"
    assert SHARD_NAME.fullmatch(name) and split_of_shard(name) == "validation"


def test_every_check_of_a_row_group_is_in_the_table():
    checks = [
        function
        for name, function in inspect.getmembers(row_checks, inspect.isgeneratorfunction)
        if name != "row_problems"
    ]
    assert set(checks) == set(row_checks.CHECKS) > set(row_checks.RELIED_UPON)
