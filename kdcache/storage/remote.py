"""A cache on an object store: those operations of ``pathlib.Path`` that this program uses, over fsspec.

Invariants:

* An object appears complete or not at all. Its source is a complete local file, which is sent in one PUT request; a
  large one is sent in parts, which the last request makes visible.
* The number of attempts is bounded, and every error is a KDError that names the location and never a credential.
* Credentials come from where each store's tools look (environment, profile, metadata service). A URL with credentials
  is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kdcache import extras
from kdcache.errors import KDError, UsageError, first_line
from kdcache.paths import remote_timeout_seconds

ATTEMPTS = 3

#: The sha256 of the objects that this process wrote, which then need not be read again.
_written: dict[str, str] = {}


class WriteError(KDError):
    """An object or file could not be written. Who writes only to save later work may ignore this."""


@dataclass(frozen=True)
class RemotePath:
    """``scheme://bucket/key``. A path from a listing has its size, version (an ETag, or a time) and time of change."""

    url: str
    size: int | None = field(default=None, compare=False)
    version: str = field(default="", compare=False)
    mtime_ns: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str | Path) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def resolve(self) -> RemotePath:
        return self

    # --- listing

    def info(self) -> dict[str, Any]:
        """Return what the store knows of this object or folder; FileNotFoundError if it does not exist."""
        with self._plain_errors("looked up"):
            return _filesystem(self.url).info(self.url)

    def listing(self) -> list[RemotePath]:
        """Return the objects in this folder, sorted by name; an empty list if there is no such folder."""
        with self._plain_errors("listed"):
            try:
                entries = _filesystem(self.url).ls(self.url, detail=True)
            except FileNotFoundError:
                return []
        objects = {_last_part(entry["name"]): entry for entry in entries if entry["type"] == "file"}
        return [
            RemotePath(f"{self.url}/{name}", entry["size"], _version(entry), _mtime_ns(entry))
            for name, entry in sorted(objects.items())
            if name
        ]

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        return (path for path in self.listing() if fnmatch.fnmatchcase(path.name, pattern))

    def iterdir(self) -> Iterator[RemotePath]:
        """Return the objects and folders in this folder."""
        with self._plain_errors("listed"):
            names = _filesystem(self.url).ls(self.url, detail=False)
        return (self / _last_part(name) for name in names if not name.endswith(f"/{self.name}/"))

    def exists(self) -> bool:
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        return self._type() == "file"

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def _type(self) -> str | None:
        try:
            return self.info()["type"]
        except FileNotFoundError:
            return None

    def stat(self) -> Any:
        """Return ``st_size``, and ``st_mtime_ns`` (0 if the store does not tell it)."""
        path = self.with_info()
        return SimpleNamespace(st_size=path.size, st_mtime_ns=path.mtime_ns)

    def with_info(self) -> RemotePath:
        """Return the same path with its size and version, which are looked up if it has none."""
        if self.size is not None:
            return self
        info = self.info()
        return RemotePath(self.url, info["size"], _version(info), _mtime_ns(info))

    # --- reading

    def read_bytes(self) -> bytes:
        with self._plain_errors("read"):
            return self._get()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end). KDError (3) if the object is shorter."""
        with self._plain_errors("read"):
            data = self._get(start=start, end=end) if end > start else b""
        if len(data) != end - start:
            raise KDError(f"{self}: asked for {end - start} bytes at {start}, got {len(data)}; was it replaced?", 3)
        return data

    def _get(self, **bounds: int) -> bytes:
        """Return its bytes. Client libraries retry failed requests, but not truncated responses; this retries both."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _filesystem(self.url).cat_file(self.url, **bounds)
            except Exception as error:
                if attempt == ATTEMPTS or not _classes(error) & TRUNCATED:
                    raise
        raise AssertionError

    # --- writing

    def upload(self, source: Path, create: bool = False) -> bool:
        """Upload a complete file as this object. With ``create``, return False and change nothing if it exists."""
        filesystem = _filesystem(self.url)
        with open(source, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            with self._plain_errors("written"):
                # S3 checks this itself (If-None-Match). On other stores two writers may both find that there is none.
                conditional = create and self.url.startswith("s3://")
                try:
                    if conditional:
                        filesystem.put_file(str(source), self.url, mode="create")
                except OSError as error:
                    if error.errno != errno.ENOSYS:
                        raise
                    conditional = False  # this server does not support the condition
                if not conditional:
                    if create and self.exists():
                        return False
                    filesystem.put_file(str(source), self.url)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise WriteError(
                f"{self} could not be written: there is no such bucket; create it, or use another --out"
            ) from None
        _written[self.url] = sha256
        return True

    def sha256(self) -> str:
        """Return the sha256 of its bytes, without reading those that this process wrote: the upload has a checksum."""
        return _written.get(self.url) or hashlib.sha256(self.read_bytes()).hexdigest()

    def unlink(self, missing_ok: bool = False) -> None:
        _written.pop(self.url, None)
        with self._plain_errors("deleted"):
            try:
                _filesystem(self.url).rm_file(self.url)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rename(self, target: Any) -> None:
        """Copy, then delete. If this is interrupted between the two, both objects exist."""
        with self._plain_errors("moved"):
            _filesystem(self.url).cp_file(self.url, target.url)
        self.unlink()

    def below(self) -> list[RemotePath]:
        """Return every object below this folder, at any depth."""
        with self._plain_errors("listed"):
            paths = _filesystem(self.url).find(self.url)
        scheme = self.url.partition("://")[0]
        return [RemotePath(f"{scheme}://{path.lstrip('/')}") for path in paths]

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: an object store has no folders."""

    # --- errors

    @contextlib.contextmanager
    def _plain_errors(self, action: str) -> Iterator[None]:
        """Turn errors into a sentence, "URL could not be ACTION: ...", except FileNotFoundError and FileExistsError."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, KDError):
            raise
        except Exception as error:
            kind = WriteError if action == "written" else KDError
            raise kind(f"{self} could not be {action}: {_why(error, self.url)}") from None


def parse(text: str) -> RemotePath:
    """Return the location of a URL. UsageError if it holds credentials, which would end up in manifests and logs."""
    scheme, _, rest = text.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise UsageError(
            f"{redacted(text)}: a location holds no credentials; put them where the store's own tools look "
            "(environment variables, a profile): docs/remote.md"
        )
    parts = [part for part in rest.split("/") if part]
    if not parts or ".." in parts:
        raise UsageError(f"{text}: expected a location like {scheme}://bucket/folder")
    return RemotePath(f"{scheme}://{'/'.join(parts)}")


def redacted(text: str) -> str:
    """Return ``text`` without user:password@, query strings, and credentials that the environment holds."""
    text = re.sub(r"(\w://)[^/\s@]*@", r"\1", text)
    text = re.sub(r"\?[^\s'\"]*", "", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", name):
            text = text.replace(value, "***")
    return text


#: Errors of truncated responses, by the names of their classes, because their packages may not be installed.
TRUNCATED = {"ClientPayloadError", "IncompleteRead", "ResponseStreamingError", "ConnectionClosedError"}


def _classes(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth",
    "hf": "HF_TOKEN, hf auth login",
}


def _why(error: BaseException, url: str) -> str:
    """Say what failed and what to try, from the class of the error: its message might quote a secret."""
    scheme = url.partition("://")[0]
    names = _classes(error)
    if isinstance(error, PermissionError) or names & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "TokenRetrievalError",
    }:
        sources = _CREDENTIALS.get(scheme, "the store's own settings")
        return f"access was refused. Check the credentials ({sources}), and what they permit"
    if names & {"ReadTimeoutError", "ConnectTimeoutError", "TimeoutError", "FSTimeoutError"}:
        return (
            f"no answer within {remote_timeout_seconds():g} s, {ATTEMPTS} times. Run the same command again later, "
            "or raise KDCACHE_REMOTE_TIMEOUT"
        )
    if names & (TRUNCATED | {"EndpointConnectionError", "ConnectionError", "HTTPClientError", "ClientConnectorError"}):
        return "the connection was refused or broke off. Check the network and the endpoint (AWS_ENDPOINT_URL)"
    if isinstance(error, OSError) and error.errno in (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), errno.EIO):
        return f"the server was too busy or failed, {ATTEMPTS} times. Run the same command again later"
    return f"{type(error).__name__}: {redacted(first_line(error))}"


# --- fsspec -----------------------------------------------------------------------------------------------------------


def _filesystem(url: str) -> Any:
    return _opened(url.partition("://")[0], os.getpid(), remote_timeout_seconds())


@functools.cache
def _opened(scheme: str, process: int, timeout: float) -> Any:
    """Return fsspec's file system, once per process, because its event loop does not survive a fork."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            "connect_timeout": min(timeout, 10),
            "read_timeout": timeout,
        }
    try:
        import fsspec

        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError:
        package = _PACKAGES.get(scheme, "fsspec")
        raise KDError(f"{scheme}://: {extras.missing(package)}") from None
    except ValueError as error:
        raise UsageError(f"{scheme}://: {first_line(error)}") from None
    if scheme == "s3":
        filesystem.retries = 1  # the client below retries, and the two numbers would multiply
    return filesystem


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _version(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "generation", "md5Hash", "oid", "sha256"):
        if info.get(name):
            return str(info[name]).strip('"')
    return str(_mtime_ns(info))


def _mtime_ns(info: dict[str, Any]) -> int:
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e9)
        if isinstance(value, int | float):
            return int(value * 1e9)
    return 0
