"""Where a run starts: its checkpoint is read once, by the first rank, and looked at again only if the folder has changed."""

import dataclasses
import os

import pytest

from kdcache.errors import KDError
from trainer.distill import plan
from trainer.distill import trainer as distill
from trainer.distill.config import TrainConfig
from trainer.run.checkpoints import ResumePoint
from trainer.run.folder import Start, alone

ARGUMENTS = {"max_steps": 4, "eval_steps": 1, "per_device_train_batch_size": 4, "report_to": "none"}


@pytest.fixture(scope="module")
def config(tiny_cache, tiny_model, tmp_path_factory):
    """Return the options of a run that was interrupted after its first checkpoint."""
    config = TrainConfig((tiny_cache,), tiny_model, tmp_path_factory.mktemp("runs") / "cut", arguments=ARGUMENTS)

    def interrupt(step, *_):
        if step > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill.train(plan.prepare(config), interrupt)
    return config


def found_elsewhere():
    return Start(ResumePoint())


def test_under_the_lock_an_unchanged_folder_is_not_read_again(config):
    run = plan.prepare(config)
    assert run.start.checkpoint is not None
    with alone(dataclasses.replace(run, start=dataclasses.replace(run.start, find_again=found_elsewhere))):
        pass


def test_under_the_lock_a_changed_folder_is_read_again_and_must_lead_to_the_same_start(config):
    run = plan.prepare(config)
    weights = next(config.output_dir.glob("checkpoint-*/model.safetensors"))
    os.utime(weights)
    with alone(run):
        pass
    with (
        pytest.raises(KDError, match="another process wrote to"),
        alone(dataclasses.replace(run, start=dataclasses.replace(run.start, find_again=found_elsewhere))),
    ):
        raise AssertionError("it must not train")


def test_only_the_first_rank_reads_the_checkpoint(config, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert plan.prepare(config).start == Start()
