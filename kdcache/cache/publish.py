"""Upload a cache or a student to the Hugging Face Hub, with its card.

    kd push data/qwen my-name/qwen-cache --dry-run

Invariant: only files on a list of names are uploaded, so checkpoints, optimizer states, locks and files that were set
aside stay on this machine.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from kdcache import storage
from kdcache.cache import documents, manifest
from kdcache.cache.layout import (
    CARD_FILE,
    DATA_FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    REJECTED_FILE,
    REWARDS_FILE,
    VOCAB_FILE,
)
from kdcache.errors import KDError, first_line

#: What is uploaded of a cache, besides the shards of its plan.
CACHE_FILES: tuple[str, ...] = (CARD_FILE, PLAN_FILE, MANIFEST_FILE, REJECTED_FILE, VOCAB_FILE, REWARDS_FILE)

#: What is uploaded of a student: patterns of names in its folder.
STUDENT_FILES: tuple[str, ...] = (
    *("README.md", "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("kdcache.json", "run.yaml", "trainer_state.json", "quantization.json", "quantization.csv"),
)


@dataclass(frozen=True)
class Push:
    """An upload that was prepared."""

    folder: Path
    repo_id: str  # owner/name
    repo_type: str  # dataset: a cache; model: a student
    private: bool
    files: dict[str, int]  # bytes by name in the folder


def prepare(folder: Path, repo_id: str, private: bool = True) -> Push:
    """Choose the files to upload. KDError for a folder that is neither a cache nor a student, is incomplete, or holds a
    link that leads out of it.
    """
    if (folder / PLAN_FILE).is_file():
        summary = manifest.summary(folder)  # brings manifest and card up to date
        if not summary["complete"]:
            raise KDError(
                f"{folder} is not complete ({summary['shards']} shards); run the same kd cache-teacher command to the "
                "end"
            )
        repo_type, patterns = "dataset", CACHE_FILES
        shards = {shard["name"] for shard in documents.read_plan(folder)["shards"]}
    elif (folder / "config.json").is_file():
        repo_type, patterns, shards = "model", STUDENT_FILES, set()
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
    for name in (DATA_FOLDER, *files):
        storage.real_file(folder / name, folder)
    return Push(folder, repo_id, repo_type, private, files)


def push(upload: Push) -> str:
    """Upload the files as one commit and return the repository's address. KDError in a sentence if the Hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    api = HfApi()
    kind = "the cache" if upload.repo_type == "dataset" else "the student"
    try:
        url = api.create_repo(upload.repo_id, repo_type=upload.repo_type, private=upload.private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type=upload.repo_type,
            folder_path=upload.folder,
            allow_patterns=list(upload.files),
            commit_message=f"Upload {kind} {upload.folder.resolve().name}",
        )
    except HFValidationError as error:
        raise KDError(f"{upload.repo_id}: {first_line(error)}", 2) from None
    except LocalTokenNotFoundError:
        raise KDError("the Hub does not know who you are: run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        way_out = ": run `hf auth login`, or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        raise KDError(f"the Hub refused {upload.repo_id} ({first_line(error)}){way_out}") from None
    except (HTTPError, OSError) as error:
        raise KDError(f"the Hub could not be reached ({first_line(error)}); run the same command again") from None
    return str(url)
