"""A row's type and the schema of a shard name the same columns."""

from dataclasses import fields

from kdcache.cache.format import SCHEMA, CacheRow


def test_the_fields_of_a_row_are_the_columns_of_the_schema():
    names = {field.name for field in fields(CacheRow)} - {"candidates"} | {
        "candidate_ids",
        "candidate_logprobs",
        "tail_logprobs",
    }
    counted = {name for name, value in vars(CacheRow).items() if isinstance(value, property)}
    assert names | counted == set(SCHEMA.names) and not names & counted
