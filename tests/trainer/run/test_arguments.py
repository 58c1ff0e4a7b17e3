"""Options that are passed on to TrainingArguments and GRPOConfig: every field with absurd values, before anything is written."""

import dataclasses
import math

import pytest
from transformers import TrainingArguments

from kdcache.errors import KDError, UsageError
from trainer.distill import plan as run
from trainer.distill.config import TrainConfig
from trainer.grpo import arguments as grpo
from trainer.grpo.config import GrpoConfig
from trainer.run import inputs, refused, values

NOT_FINITE = (math.nan, math.inf, -math.inf, [math.nan], {"x": math.nan})
ABSURD = (
    *("bogus", "", "nan", -1, -7, 0, 1.5, 1e300, 10**30, True, False, None, [], {}, {"bogus": 1}, (1,)),
    *NOT_FINITE,
)


@pytest.fixture(scope="module")
def check_training(tiny_cache, tiny_model, tmp_path_factory):
    """Return a function that checks options as ``kd train`` does, without choosing samples again."""
    folder = tmp_path_factory.mktemp("runs") / "none"
    plain = run.prepare(TrainConfig(from_cache=(tiny_cache,), student=tiny_model, output_dir=folder))

    def check(**given):
        options = values.check_values(given, refused.REFUSED_BY_TRAIN)
        run.pop_compile(options)
        made = run.training_arguments(dataclasses.replace(plain, arguments=options))
        assert not folder.exists()
        return made

    return check


@pytest.fixture(scope="module")
def check_grpo(tiny_model, tmp_path_factory):
    """Return a function that checks options as ``kd grpo`` does, for ten prompts."""
    pytest.importorskip("trl")
    config = GrpoConfig(from_cache=(), student=tiny_model, output_dir=tmp_path_factory.mktemp("runs") / "none")

    def check(**given):
        small = {"num_generations": 2, "max_completion_length": 8}
        made = grpo.grpo_arguments(config, grpo.check_options(small | given), prompts=10)
        assert not config.output_dir.exists()
        return made

    return check


@pytest.fixture(scope="module", params=["train", "grpo"])
def answers(request):
    """Return the error of each option for each absurd value, or None if it is accepted. Anything but a KDError fails here."""
    check = request.getfixturevalue("check_training" if request.param == "train" else "check_grpo")
    names = run.training_argument_names() if request.param == "train" else grpo.argument_names()
    said = {}
    for name in names:
        for number, value in enumerate(ABSURD):
            try:
                check(**{name: value})
                said[name, number] = None
            except KDError as error:
                said[name, number] = str(error)
    return said


def test_absurd_values_are_accepted_or_refused_in_one_sentence(answers):
    assert [said for said in answers.values() if said is not None and (len(said) > 400 or "\n" in said)] == []


def test_no_option_accepts_a_number_that_is_not_finite(answers):
    first = len(ABSURD) - len(NOT_FINITE)
    assert [name for (name, number), said in answers.items() if number >= first and said is None] == []


@pytest.mark.parametrize(
    "given, says",
    [
        ({"seed": -1}, "--seed -1: expected 0 to"),
        ({"learning_rate": -1}, "--learning-rate -1: expected 0 to"),
        ({"per_device_train_batch_size": 1.5}, "expected a whole number"),
        ({"per_device_train_batch_size": 0}, "expected 1 to"),
        ({"num_train_epochs": "abc"}, "expected a number"),
        ({"max_steps": "8,"}, "expected a whole number"),
        ({"report_to": "bogus"}, "bogus is not supported"),
        ({"report_to": "swanlab"}, "requires swanlab to be installed"),
        ({"push_to_hub": True}, "kd push"),
        ({"torch_compile_backend": "bogus"}, "expected one of .*inductor"),
        ({"torch_compile_backend": "cudagraphs", "torch_compile_mode": "default"}, "is inductor's"),
        ({"label_smoothing_factor": 0.1}, "not used here"),
        ({"eval_strategy": "epoch"}, "--evals-per-epoch"),
        ({"optim": "bogus"}, "expected a name such as"),
        ({"optim": "lomo"}, "--optim lomo"),
        ({"optim_args": "bogus"}, "expected name=value"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"bogus": 1}}, "bogus"),
        ({"lr_scheduler_kwargs": "{'bogus'"}, "not JSON"),
        ({"gradient_accumulation_steps": 1_000_000}, "more parts than there are samples"),
        ({"metric_for_best_model": "rouge"}, "expected one of eval_kl"),
        ({"fsdp": "full_shard"}, "expected true or false"),
        ({"fsdp_config": {"version": 1}}, "not used here"),
        ({"fsdp": True, "optim": "adafactor"}, "cannot be used with --fsdp"),
    ],
)
def test_wrong_training_options_are_refused_by_name(check_training, given, says):
    with pytest.raises(UsageError, match=says):
        check_training(**given)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"reward_weights": [0, 1]}, "never gets as much as one that is right"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "never gets as much as one that is right"),
        ({"num_generations": 1}, "--num-generations 1: expected 2 to"),
        ({"num_generations": 3}, "must be divisible"),
        ({"loss_type": "bogus"}, "expected one of grpo"),
        ({"temperature": 0}, "more than 0"),
        ({"cache_implementation": "quantized"}, "expected one of dynamic, static"),
        ({"eval_strategy": "steps"}, "use kd evaluate"),
        ({"per_device_train_batch_size": 64}, "answers 32 prompts"),
        ({"max_completion_length": 100_000}, "the student knows 512 positions"),
        ({"sync_ref_model": True}, "--beta"),
        ({"router_aux_loss_coef": 1.0}, "mixture of experts"),
    ],
)
def test_wrong_grpo_options_are_refused_by_name(check_grpo, given, says):
    with pytest.raises(UsageError, match=says):
        check_grpo(**given)


def test_the_best_agreement_is_the_highest(check_training):
    assert check_training(metric_for_best_model="eval_agreement").greater_is_better
    assert not check_training(metric_for_best_model=None, greater_is_better=None).greater_is_better


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"lora_r": 100_000}, "--lora-r 100000: expected at most 32"),
        ({"lora_r": 33}, "expected at most 32"),
        ({"lora_r": 4, "lora_dropout": math.nan}, "expected 0 to less than 1"),
        ({"lora_r": 4, "lora_alpha": 10**30}, "--lora-alpha"),
        ({"lora_r": 4, "lora_target_modules": "bogus"}, "--lora-target-modules bogus"),
    ],
)
def test_wrong_numbers_of_lora_are_refused(tiny_model, tmp_path, changes, says):
    config = TrainConfig(from_cache=(), student=tiny_model, output_dir=tmp_path / "none", **changes)
    with pytest.raises(UsageError, match=says):
        inputs.check_lora(config)


def test_the_largest_rank_of_lora_is_allowed(tiny_model, tmp_path):
    inputs.check_lora(TrainConfig(from_cache=(), student=tiny_model, output_dir=tmp_path / "none", lora_r=32))


def test_whole_numbers_reach_generation_as_it_takes_them(check_grpo):
    made = check_grpo(temperature=1, repetition_penalty=2)
    assert isinstance(made.temperature, float) and isinstance(made.repetition_penalty, float)


def test_every_refused_option_is_one_that_the_library_has():
    from trl import GRPOConfig

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert refused.REFUSED_BY_TRAIN.keys() <= names
    assert refused.REFUSED_BY_GRPO.keys() | values.RANGES.keys() | values.CHOICES.keys() <= names | {
        f.name for f in dataclasses.fields(GRPOConfig)
    }
