"""Make a student: a checkpoint as it is, or some of the teacher's own layers, saved as a Hugging Face folder.

kd init-student --from embedded --keep-layers 20 --out data/student
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache import __version__
from kdcache.errors import KDError, UsageError
from kdcache.storage import atomic, folders
from trainer.student.load import load_student


def init_student(base: str, out: Path, keep_layers: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Save a student to ``out`` and return facts about it.

    Args:
        base: a Hub id, a model folder or ``embedded``.
        keep_layers: as in ``parse_layers``; None keeps all layers.
        overwrite: replace a student that this function saved to ``out`` before.

    Raises:
        KDError: ``out`` is not empty, or the layers of ``base`` cannot be taken out.
        UsageError: ``keep_layers`` names layers that ``base`` does not have.
    """
    with folders.held(out, folders.STUDENT):
        if overwrite:
            folders.check_deletable(out, folders.STUDENT, reads=[base])
        elif not folders.is_empty(out):
            raise KDError(f"--out {out} is not empty; use another, or --overwrite")
        model, tokenizer = load_student(base, "auto")
        depth = model.config.get_text_config().num_hidden_layers
        kept = list(range(depth))
        if keep_layers is not None:
            kept = parse_layers(keep_layers, depth)
            _keep(model, kept)
        with folders.replacing(out, folders.STUDENT) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            record = {"kdcache": __version__, "from": base, "kept": kept, "of": depth}
            atomic.write_json(scratch / folders.STUDENT.marker, record)
    return {
        "student": str(out),
        "layers": f"{len(kept)} of {depth}",
        "kept": ",".join(map(str, kept)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def parse_layers(spec: str, depth: int) -> list[int]:
    """Return the layers to keep, ascending, of a model with ``depth`` layers.

    ``20`` keeps so many layers, evenly spread, among them the first and the last. ``0-4,6,8-29`` keeps the layers named.
    """
    if spec.isdigit():
        count = int(spec)
        if not 1 <= count <= depth:
            raise UsageError(f"--keep-layers {spec}: the model has {depth} layers")
        return [round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)]
    kept: set[int] = set()
    try:
        for part in spec.split(","):
            first, _, last = part.partition("-")
            kept.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise UsageError(f"--keep-layers {spec}: expected a number of layers, or layers like 0-4,6,8-29") from None
    if not kept or max(kept) >= depth:
        raise UsageError(f"--keep-layers {spec}: the model's layers are 0 to {depth - 1}")
    return sorted(kept)


def _keep(model: Any, kept: Sequence[int]) -> None:
    """Remove all other layers from a model, and from what its configuration says about layers."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise KDError(f"{type(model).__name__} has no list of layers that kd can find; leave --keep-layers out")
    model.base_model.layers = torch.nn.ModuleList([layers[i] for i in kept])
    for index, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where a layer finds its part of the key-value cache
                module.layer_idx = index
    config = model.config.get_text_config()
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
