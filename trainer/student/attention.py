"""Run a student's layers over packed samples so that no sample sees another, in the fastest way that is right for it.

A packed row holds S samples of L tokens in all, one after the other. Its layers can be run in four ways, from the
fastest to the slowest:

* ``per sample``: attention is computed within each sample, between the offsets that travel with the batch. There is no
  mask, so that time and memory grow with the lengths of the samples and not with the square of the row's.
* ``by positions``: the model itself keeps samples apart, because their position ids start again at 0. Under sdpa,
  transformers does so with one mask of L x L.
* ``padded``: the samples become the rows of a padded batch. A causal layer cannot look ahead, so that padding after a
  sample does not change it. Convolutions and recurrent states need this way, and so does ALiBi.
* ``one by one``: each sample is a forward of its own.

``layers_of`` tries them in this order on a few random tokens, and takes the first one that gives each sample the hidden
states that it has alone. No family of models is known by its name. What begins later than the few tokens cannot show: a
model that computes its positions anew for rows beyond a length (Phi-3's longrope) does so for all samples of such a row.

    layers = layers_of(student)
    hidden = layers(batch["input_ids"], batch["offsets"])  # (L, D)

Shapes: L tokens of a row, S samples, B rows, H heads of queries, G heads of keys and values, E size of a head, D hidden
size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: What transformers calls the attention below in ``config._attn_implementation``. A saved config does not name it.
IMPLEMENTATION = "kdcache_per_sample"

PER_SAMPLE, BY_POSITIONS, PADDED, ONE_BY_ONE = WAYS = ("per sample", "by positions", "padded", "one by one")

#: What the user is told about each way.
NOTES = {
    PER_SAMPLE: "samples are packed, with attention within each sample",
    BY_POSITIONS: "samples are packed and kept apart by one mask per row: attention costs the square of the row's length",
    PADDED: "samples are padded and not packed, because this student does not keep packed samples apart",
    ONE_BY_ONE: "samples are run one by one, because this student does not keep packed or padded samples apart: this is slow",
}

#: Lengths of the random samples that the ways are tried on.
PROBE_LENGTHS = (7, 19, 3, 12)
#: How far a token's hidden state may be from the one that it has alone, relative to its norm. This is a multiple of
#: rounding. The first token of a sample that sees its neighbour is off by far more, as alone it sees only itself.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Layers:
    """A student's layers over packed rows, in one of ``WAYS``."""

    student: Any
    way: str

    @property
    def note(self) -> str:
        """What the user is told about this way."""
        return f"packing: {NOTES[self.way]}"

    def __call__(self, input_ids: Tensor, offsets: Tensor) -> Tensor:
        """Return the last hidden states (L, D) of a packed row.

        Args:
            input_ids: (1, L) int64
            offsets: (S + 1,) int32, where each sample begins in the row; the last one is L
        """
        layers, device = self.student.base_model, input_ids.device
        offsets = offsets.cpu()  # one wait for a GPU, instead of one per layer
        lengths = offsets.diff()
        if self.way == PADDED:
            is_token = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)  # (S, longest)
            padded = input_ids.new_zeros(is_token.shape).masked_scatter(is_token, input_ids[0])
            return layers(input_ids=padded, attention_mask=is_token.long(), use_cache=False)[0][is_token]
        if self.way == ONE_BY_ONE:
            samples = input_ids.split(lengths.tolist(), dim=1)
            return torch.cat([layers(input_ids=ids, use_cache=False)[0][0] for ids in samples])
        # There must be no attention mask and no cache: with either, transformers does not look for packed samples.
        positions = torch.arange(input_ids.shape[1]) - offsets[:-1].repeat_interleave(lengths)
        positions = positions.to(device)[None]  # (1, L), counted from 0 in each sample
        options = {"cu_seq_lens_q": offsets} if self.way == PER_SAMPLE else {}
        return layers(input_ids=input_ids, position_ids=positions, use_cache=False, **options)[0][0]


# --- choosing a way ---------------------------------------------------------------------------------------------------


def layers_of(student: Any) -> Layers:
    """Return a transformers model's layers, in the fastest way that keeps the samples of a packed row apart.

    The student's attention implementation is set accordingly. It stays so, because gradient checkpointing runs the
    layers again in the backward pass. Generation and padded batches are computed as before.
    """
    before = student.config._attn_implementation
    expected = _alone(student, before)
    for way in WAYS[:-1]:
        if way in (PER_SAMPLE, BY_POSITIONS) and _has_chunks(student):
            continue
        # A model may not take offsets or position ids, or may need a mask; then the next way is tried.
        with contextlib.suppress(Exception):
            _set_attention(student, IMPLEMENTATION if way == PER_SAMPLE else before)
            is_set = student.config._attn_implementation == IMPLEMENTATION  # not all models let it be chosen
            if is_set == (way == PER_SAMPLE) and _is_apart(Layers(student, way), expected):
                return Layers(student, way)
    _set_attention(student, before)
    return Layers(student, ONE_BY_ONE)


def _set_attention(student: Any, implementation: str) -> None:
    if student._can_set_attn_implementation():  # else transformers warns, and changes nothing
        student.set_attn_implementation(implementation)


def _has_chunks(student: Any) -> bool:
    """Return whether attention ends at fixed places of the row (Llama 4), which are longer apart than the probe."""
    return getattr(student.config.get_text_config(), "attention_chunk_size", None) is not None


def _probe(student: Any) -> tuple[Tensor, Tensor]:
    """Return a packed row of random tokens: input_ids (1, L) and offsets (S + 1,)."""
    embeddings = student.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, embeddings.shape[0], (1, sum(PROBE_LENGTHS)), generator=generator)
    offsets = torch.tensor([0, *itertools.accumulate(PROBE_LENGTHS)], dtype=torch.int32)
    return input_ids.to(embeddings.device), offsets


def _alone(student: Any, before: str) -> Tensor:
    """Return the hidden states (L, D) of each sample of the probe alone, with the attention that leaves nothing out.

    That is transformers' "eager": its sdpa ignores softcaps. Models without "eager" keep their own.
    """
    with contextlib.suppress(ValueError):
        _set_attention(student, "eager")
    try:
        with _evaluating(student):
            return Layers(student, ONE_BY_ONE)(*_probe(student))
    finally:
        _set_attention(student, before)


def _is_apart(layers: Layers, expected: Tensor) -> bool:
    """Return whether each token of the packed probe has the hidden state ``expected`` (L, D)."""
    with _evaluating(layers.student):
        hidden = layers(*_probe(layers.student))
    tolerance = TOLERANCES.get(hidden.dtype, max(TOLERANCES.values()))
    differences = (hidden - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)  # (L,)
    return bool((differences <= tolerance).all())  # False for NaN


@contextlib.contextmanager
def _evaluating(student: Any) -> Iterator[None]:
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(was_training)


# --- attention within each sample, as transformers calls it -----------------------------------------------------------


@torch.compiler.disable  # the offsets differ from row to row, and a compiled loop would be compiled again for each row
def attend(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, L, E)
    key: Tensor,  # (B, G, L, E)
    value: Tensor,  # (B, G, L, E)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within each sample (B, L, H, E), and no attention weights.

    Args:
        attention_mask: as ``_mask`` makes it: None for causal attention, an empty tensor for causal attention within a
            window, else the whole mask
        softcap: bounds the scores (Gemma 2)
        s_aux: (H,) attention sinks (gpt-oss)
        cu_seq_lens_q: (S + 1,) the samples' offsets, on the CPU; None if each row is one sample
    """
    window = None
    if attention_mask is not None and attention_mask.numel() == 0:
        window, attention_mask = attention_mask.shape[1], None
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and queries == keys:
        offsets = [0, queries] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        pieces = []
        for start, end in itertools.pairwise(offsets):
            q, k, v = (states[:, :, start:end] for states in (query, key, value))
            pieces.append(_causal(q, k, v, window, scaling, softcap, s_aux, dropout))
        output = torch.cat(pieces, dim=2)
    elif softcap is None and s_aux is None:  # a padded batch, or a token that is generated
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    else:
        mask = _visible(queries, keys, None, query.device) if attention_mask is None else attention_mask
        output = _by_scores(query, key, value, mask, scaling, softcap, s_aux, dropout)
    return output.transpose(1, 2).contiguous(), None


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Return causal attention (B, H, L, E) of one sample per row, by the fastest kernel that there is for it."""
    length = q.shape[2]
    if softcap is not None or sinks is not None:
        return _by_scores(q, k, v, _visible(length, length, window, q.device), scaling, softcap, sinks, dropout)
    is_causal = window is None or window >= length
    # On CUDA only the flash kernel takes grouped heads as they are, and it has neither masks nor float32.
    grouped = use_gqa_in_sdpa(None, k, v) and (q.device.type == "cpu" or q.dtype != torch.float32)
    if is_causal and grouped:
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
    k, v = (repeat_kv(states, q.shape[1] // states.shape[1]) for states in (k, v))
    if is_causal:
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
    return scaled_dot_product_attention(q, k, v, _visible(length, length, window, q.device), dropout, scale=scaling)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return (queries, keys) bool: which keys each query sees, where the last query is at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Return attention (B, H, L, E) with its scores written out, for softcaps and sinks: torch's kernels have neither.

    ``mask`` is bool (true where a key is seen) or is added to the scores.
    """
    k, v = (repeat_kv(states, q.shape[1] // states.shape[1]) for states in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)  # (B, H, queries, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    if sinks is not None:  # one more key per head, which has a score and no value
        sink_scores = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return drop(weights[..., : k.shape[2]], dropout, training=dropout > 0) @ v


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what ``attend`` needs to know of a mask, and build the mask only where that is not enough.

    None stands for causal attention, and an empty tensor of the shape (1, window, 0, 0) for a sliding window. The window
    travels in the mask because there it reaches the layers that have one, and no others.
    """
    is_window = local_size is not None and local_size == getattr(config, "sliding_window", None)
    # ``use_vmap`` says that a model adds a pattern of its own; a local size that is no window is one of chunks (Llama 4).
    if batch_size == 1 and q_length == kv_length and attention_mask is None and not use_vmap:
        if local_size is None:
            return None
        if is_window:
            return torch.empty((1, local_size, 0, 0), dtype=torch.bool, device=kwargs.get("device"))
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
