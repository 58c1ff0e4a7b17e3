"""What kd compare refuses, and evaluations from before a metric was added."""

import json

import pyarrow.parquet as pq
import pytest

from kdcache.errors import KDError
from trainer.evaluate import compare
from trainer.evaluate.answers import ANSWERS
from trainer.evaluate.folder import TEACHER
from trainer.evaluate.positions import FORCED


def evaluation(folder, version, dropped=()):
    """Write an evaluation of one answer by the teacher, without the columns ``dropped``."""
    row = dict.fromkeys(ANSWERS.names) | {"prompt_id": "p", "group_id": "g", "temperature": 0.0, "seed": 0}
    answers = ANSWERS.empty_table().from_pylist([row | {"answer": "a", "rougeL": 0.5, "chrF": 0.25}], ANSWERS)
    (folder / "t").mkdir(parents=True)
    pq.write_table(answers.drop_columns(list(dropped)), folder / "t/answers.parquet")
    pq.write_table(FORCED.empty_table(), folder / "t/forced.parquet")
    entries = [{"label": TEACHER, "model": "cache", "folder": "t"}]
    (folder / "evaluation.json").write_text(json.dumps({"settings": {"measures": version}, "entries": entries}))
    return folder


def test_evaluations_of_two_versions_of_the_measures_are_not_mixed(tmp_path):
    old, new = evaluation(tmp_path / "old", 4, ["chrF"]), evaluation(tmp_path / "new", 5)
    with pytest.raises(KDError, match=r"measures differ\), so they cannot be compared"):
        compare.rows([new, old])


def test_an_evaluation_from_before_a_metric_shows_the_others(tmp_path):
    rows = compare.rows([evaluation(tmp_path, 4, ["chrF"])])
    assert {row.metric: row.value.value for row in rows} == {"rougeL": 0.5}


def test_a_damaged_evaluation_is_one_sentence(tmp_path):
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(KDError, match=r"evaluation\.json is damaged"):
        compare.rows([tmp_path])
