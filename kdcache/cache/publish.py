"""A cache or a student -> a repository of the Hugging Face Hub, with its card, and nothing that only this machine needs.

    kd push data/qwen my-name/qwen-cache --dry-run

What goes is a list of names, not a list of exceptions: checkpoints, optimizer states, locks and set-aside shards stay.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from kdcache import storage
from kdcache.cache import manifest
from kdcache.errors import KDError, first_line

OF_A_CACHE = (
    *("README.md", "plan.json", "manifest.json", "rejected.jsonl"),
    *("vocab.parquet", "rewards.parquet"),
)  # and the shards of its plan
OF_A_STUDENT = (
    *("README.md", "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("kdcache.json", "run.yaml", "trainer_state.json", "quantization.json", "quantization.csv"),
)


@dataclass(frozen=True)
class Push:
    """What would go where."""

    folder: Path
    repo_id: str
    repo_type: str  # dataset: a cache; model: a student
    private: bool
    files: dict[str, int]  # name -> bytes


def prepare(folder: Path, repo_id: str, private: bool = True) -> Push:
    """Work out what goes. KDError for a folder that is neither, is not whole, or holds a link that leads out of it."""
    if (folder / "plan.json").is_file():
        summary = manifest.summary(folder)  # which renews manifest and card
        if not summary["complete"]:
            raise KDError(
                f"{folder} is not complete ({summary['shards']} shards); run the same kd cache-teacher command to the end"
            )
        repo_type, patterns = "dataset", list(OF_A_CACHE)
        shards = {shard["name"] for shard in manifest.read_plan(folder)["shards"]}
    elif (folder / "config.json").is_file():
        repo_type, patterns, shards = "model", list(OF_A_STUDENT), set()
        if not any(folder.glob("*.safetensors")):
            raise KDError(f"{folder} has no weights (*.safetensors): is the run finished?")
    else:
        raise KDError(f"{folder} is neither a cache (plan.json) nor a student (config.json)")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {
        name: (folder / name).stat().st_size
        for name in names
        if name in shards or ("/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    }
    for name in ("data", *files):
        storage.real_file(folder / name, folder)
    return Push(folder, repo_id, repo_type, private, files)


def push(asked: Push) -> str:
    """Upload it as one commit; returns where it is. KDError in a sentence for what the Hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        made = api.create_repo(asked.repo_id, repo_type=asked.repo_type, private=asked.private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            repo_type=asked.repo_type,
            folder_path=asked.folder,
            allow_patterns=list(asked.files),
            commit_message=f"Upload {'the cache' if asked.repo_type == 'dataset' else 'the student'} {asked.folder.resolve().name}",
        )
    except HFValidationError as error:
        raise KDError(f"{asked.repo_id}: {first_line(error)}", 2) from None
    except LocalTokenNotFoundError:
        raise KDError("the Hub does not know who you are: run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        way_out = ": run `hf auth login`, or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        raise KDError(f"the Hub refused {asked.repo_id} ({first_line(error)}){way_out}") from None
    except (HTTPError, OSError) as error:
        raise KDError(f"the Hub could not be reached ({first_line(error)}); run the same command again") from None
    return str(made)
