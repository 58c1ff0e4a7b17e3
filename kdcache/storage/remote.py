"""A cache on an object store: the few operations of ``pathlib.Path`` that this house uses, over fsspec.

An object appears whole or not at all: it is one PUT (of a large one, the parts' completion), made of a local file that
is complete. Retries are bounded, and whatever goes wrong is a KDError that names the location, never a credential.
Credentials come from where each store's tools look (environment, profile, metadata service) and are refused in a URL.
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

#: Objects that this process wrote, with their sha256: what need not be read back to be known.
_written: dict[str, str] = {}


class WriteError(KDError):
    """Something could not be written: no obstacle where writing was a courtesy."""


@dataclass(frozen=True)
class RemotePath:
    """``scheme://bucket/key``. One that comes from a listing knows size, version (an ETag, or a time) and time of change."""

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

    # --- what is there

    def info(self) -> dict[str, Any]:
        with self._speaking("looked at"):
            return _filesystem(self.url).info(self.url)

    def listing(self) -> list[RemotePath]:
        """The objects of this folder, in order; none if there is no such folder."""
        with self._speaking("listed"):
            try:
                found = _filesystem(self.url).ls(self.url, detail=True)
            except FileNotFoundError:
                return []
        names = {i["name"].rstrip("/").rpartition("/")[2]: i for i in found if i["type"] == "file"}
        return [
            RemotePath(f"{self.url}/{n}", i["size"], _version(i), _mtime_ns(i)) for n, i in sorted(names.items()) if n
        ]

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        return (path for path in self.listing() if fnmatch.fnmatchcase(path.name, pattern))

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in this folder, objects and folders."""
        with self._speaking("listed"):
            found = _filesystem(self.url).ls(self.url, detail=False)
        names = (name.rstrip("/").rpartition("/")[2] for name in found if not name.endswith(f"/{self.name}/"))
        return (self / name for name in names)

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
        """``st_size`` and ``st_mtime_ns``, as far as the store tells them."""
        known = self.with_info()
        return SimpleNamespace(st_size=known.size, st_mtime_ns=known.mtime_ns)

    def with_info(self) -> RemotePath:
        """The same path, knowing its size and version."""
        if self.size is not None:
            return self
        info = self.info()
        return RemotePath(self.url, info["size"], _version(info), _mtime_ns(info))

    # --- reading

    def read_bytes(self) -> bytes:
        with self._speaking("read"):
            return self._get()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, end: int) -> bytes:
        with self._speaking("read"):
            found = self._get(start=start, end=end) if end > start else b""
        if len(found) != end - start:
            raise KDError(f"{self}: asked for {end - start} bytes at {start}, got {len(found)}; was it replaced?", 3)
        return found

    def _get(self, **bounds: int) -> bytes:
        """Its bytes. Stores' clients ask again for an answer that fails, not for one that breaks off in its middle: this does."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _filesystem(self.url).cat_file(self.url, **bounds)
            except Exception as error:
                if attempt == ATTEMPTS or not _classes(error) & BROKEN_OFF:
                    raise
        raise AssertionError

    # --- writing

    def upload(self, source: Path, create: bool = False) -> bool:
        """Make ``source`` this object, whole. With ``create`` it must not be there yet: False if it was."""
        filesystem = _filesystem(self.url)
        with open(source, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            with self._speaking("written"):
                # S3 itself compares (If-None-Match); for other stores there is an instant in which two may both write.
                conditional = create and self.url.startswith("s3://")
                try:
                    if conditional:
                        filesystem.put_file(str(source), self.url, mode="create")
                except OSError as error:
                    if error.errno != errno.ENOSYS:
                        raise
                    conditional = False  # a server that knows no such condition
                if not conditional:
                    if create and self.exists():
                        return False
                    filesystem.put_file(str(source), self.url)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise WriteError(
                f"{self} could not be written: there is no such bucket; make it, or use another --out"
            ) from None
        _written[self.url] = sha256
        return True

    def sha256(self) -> str:
        """Of its bytes: known where this process wrote them (the upload itself is checksummed), else they are read."""
        known = _written.get(self.url)
        return known or hashlib.sha256(self.read_bytes()).hexdigest()

    def unlink(self, missing_ok: bool = False) -> None:
        _written.pop(self.url, None)
        with self._speaking("deleted"):
            try:
                _filesystem(self.url).rm_file(self.url)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rename(self, target: Any) -> None:
        """Copy, then delete: interrupted between the two, both are there."""
        with self._speaking("moved"):
            _filesystem(self.url).cp_file(self.url, target.url)
        self.unlink()

    def below(self) -> list[RemotePath]:
        """Every object below this folder."""
        with self._speaking("listed"):
            paths = _filesystem(self.url).find(self.url)
        scheme = self.url.partition("://")[0]
        return [RemotePath(f"{scheme}://{path.lstrip('/')}") for path in paths]

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object store has no folders."""

    # --- errors

    @contextlib.contextmanager
    def _speaking(self, done: str) -> Iterator[None]:
        """Anything but "not found" and "exists already" becomes a sentence without the library's own words' secrets."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, KDError):
            raise
        except Exception as error:
            kind = WriteError if done == "written" else KDError
            raise kind(f"{self} could not be {done}: {_why(error, self.url)}") from None


def parse(text: str) -> RemotePath:
    """The location of a URL; UsageError for one that holds credentials, which would end in manifests and logs."""
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
    """``text`` without user:password@, query strings and the values of credentials that are in the environment."""
    text = re.sub(r"(\w://)[^/\s@]*@", r"\1", text)
    text = re.sub(r"\?[^\s'\"]*", "", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", name):
            text = text.replace(value, "***")
    return text


#: Classes of errors by name, as their packages need not be there.
BROKEN_OFF = {"ClientPayloadError", "IncompleteRead", "ResponseStreamingError", "ConnectionClosedError"}


def _classes(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth",
    "hf": "HF_TOKEN, hf auth login",
}


def _why(error: BaseException, url: str) -> str:
    """What went wrong and what to try, from the error's class: libraries' messages may quote what must not be shown."""
    scheme = url.partition("://")[0]
    names = _classes(error)
    if isinstance(error, PermissionError) or names & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "TokenRetrievalError",
    }:
        where = _CREDENTIALS.get(scheme, "the store's own settings")
        return f"access was refused. Check the credentials ({where}), and that they may do this there"
    if names & {"ReadTimeoutError", "ConnectTimeoutError", "TimeoutError", "FSTimeoutError"}:
        return (
            f"no answer within {remote_timeout_seconds():g} s, {ATTEMPTS} times. Run the same command again later, "
            "or raise KDCACHE_REMOTE_TIMEOUT"
        )
    if names & (BROKEN_OFF | {"EndpointConnectionError", "ConnectionError", "HTTPClientError", "ClientConnectorError"}):
        return "the connection was refused or broke off. Check the network and the endpoint (AWS_ENDPOINT_URL)"
    if isinstance(error, OSError) and error.errno in (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), errno.EIO):
        return f"the server was too busy or failed, {ATTEMPTS} times. Run the same command again later"
    return f"{type(error).__name__}: {redacted(first_line(error))}"


# --- fsspec -----------------------------------------------------------------------------------------------------------


def _filesystem(url: str) -> Any:
    return _opened(url.partition("://")[0], os.getpid(), remote_timeout_seconds())


@functools.cache
def _opened(scheme: str, process: int, timeout: float) -> Any:
    """fsspec's file system, once a process (its event loop does not survive a fork), with bounded retries."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            "connect_timeout": min(timeout, 10),
            "read_timeout": timeout,
        }
    try:
        import fsspec

        made = fsspec.filesystem(scheme, **options)
    except ImportError:
        package = _PACKAGES.get(scheme, "fsspec")
        raise KDError(f"{scheme}://: {extras.missing(package)}") from None
    except ValueError as error:
        raise UsageError(f"{scheme}://: {first_line(error)}") from None
    made.retries = 1 if scheme == "s3" else getattr(made, "retries", 1)  # the client below retries; twice multiplies
    return made


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
