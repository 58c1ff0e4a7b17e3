"""Names that an option had before, or has elsewhere, and the name that it has here.

An entry completes the sentence "no option --old-name; it is now ...". One that begins with "nothing: " says why there is none.
"""

from __future__ import annotations

#: Of ``kd train``: names from before transformers 5, and from other programs.
RENAMED_OF_TRAIN = {
    "evaluation_strategy": "--eval-strategy",
    "warmup_ratio": "--warmup-steps (below 1: a share of all steps)",
    "no_cuda": "--use-cpu",
    "use_mps_device": "nothing: the device is found by itself",
    "per_gpu_train_batch_size": "--per-device-train-batch-size",
    "per_gpu_eval_batch_size": "--per-device-eval-batch-size",
    "adafactor": "--optim adafactor",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "push_to_hub_model_id": "kd push",
    "push_to_hub_token": "kd push",
    "save_safetensors": "nothing: it is always safetensors",
    "jit_mode_eval": "--torch-compile",
    "torchdynamo": "--torch-compile-backend",
    "max_seq_length": "--max-length",
    "model_name_or_path": "--student",
    "temperature": "nothing: a divergence at another temperature needs the full vocabulary, which no cache holds",
    "loss_type": "--divergence",
    "lora_rank": "--lora-r",
    "group_by_length": "nothing: the order of batches is fixed by the seed",
    "packing": "nothing: samples are packed wherever the student keeps them apart (`packing` in kdcache.json says how)",
}

#: Of ``kd grpo``.
RENAMED_OF_GRPO = {"teacher_weight": "nothing: it brought no measurable gain and was removed (docs/findings.md)"}
