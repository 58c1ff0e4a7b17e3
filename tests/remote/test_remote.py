"""A cache in a bucket gives the same commands the same rows; and a server that fails is reported or retried."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from helpers import ROOT, capture_plan, history
from kdcache import paths, storage
from kdcache.cache import documents, integrity, manifest, query, reader
from kdcache.capture import run as capture
from kdcache.errors import KDError, UsageError
from kdcache.storage import diskcache
from remote.conftest import KEY, SECRET, free_port, objects, put

ALL = "SELECT * EXCLUDE (file_row_number) FROM samples ORDER BY sample_id"


def without_secrets(process: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """Return a finished command, after checking that it printed no secret."""
    assert SECRET not in process.stdout + process.stderr and KEY not in process.stdout + process.stderr
    return process


def capture_to(where, model, rows, **changes):
    return capture.run(capture_plan(model, rows, storage.location(where), **changes))


# --- the same commands ------------------------------------------------------------------------------------------------


def test_a_cache_in_a_bucket_equals_that_in_a_folder(kd, s3, buckets, tiny_model, rows_file, tiny_cache):
    """One command captures it and the others read it: everything but the location equals the folder."""
    cache = "s3://bucket/whole"
    options = "--engine transformers --dtype float32 --mode both --temperature 0.8 --max-tokens 12 --sparsify topk:8"
    options += " --rows-per-shard 16 --split-ratios 0.6,0.2,0.2"
    command = ["cache-teacher", "--teacher", tiny_model, "--examples", rows_file, "--out", cache, *options.split()]
    captured = json.loads(without_secrets(kd(*command, "--json")).stdout)
    local = documents.read_plan(tiny_cache)
    assert captured["fingerprint"] == local["fingerprint"] and captured["samples"] == 78
    assert sorted(objects(buckets, "whole")) == sorted(str(p.relative_to(tiny_cache)) for p in tiny_cache.rglob("*.*"))
    assert not any(SECRET.encode() in data or KEY.encode() in data for data in objects(buckets, "whole").values())

    info = json.loads(without_secrets(kd("cache", "info", cache, "--json")).stdout)
    assert info["complete"] and info["samples"] == 78 and info["cache"] == cache
    verified = json.loads(without_secrets(kd("cache", "verify", cache, "--json")).stdout)
    assert verified["sound"] and verified["unvouched"] == 0 and verified["samples"] == 78
    assert without_secrets(kd("sql", cache, ALL, "--json")).stdout == kd("sql", tiny_cache, ALL, "--json").stdout
    assert without_secrets(kd("sql", cache, "SELECT count(*) AS n FROM vocab", "--json")).stdout == '{"n": 49152}\n'
    judged = json.loads(without_secrets(kd("verify-answers", cache, "--json")).stdout)
    assert judged["judged"] == 0 and judged["cache"] == cache

    s3.requests.clear()
    again = without_secrets(kd(*command, "--json"))
    assert json.loads(again.stdout)["fingerprint"] == captured["fingerprint"]
    assert not [path for method, path in s3.requests if method == "PUT" and "data/" in path], (
        "no shard is written again"
    )


def test_a_damaged_object_is_found_set_aside_and_written_again(kd, s3, buckets, tiny_cache, tiny_model, rows_file):
    cache = put(buckets, tiny_cache, "damaged")
    name = min(n for n in objects(buckets, "damaged") if n.startswith("data/train"))
    shard = objects(buckets, "damaged")[name]
    buckets.put_object(Bucket="bucket", Key=f"damaged/{name}", Body=shard[:3000] + bytes(9) + shard[3009:])
    report = json.loads(without_secrets(kd("cache", "verify", cache, "--json", code=3)).stdout)
    assert list(report["problems"]) == [name] and "sha256" in report["problems"][name][0]
    without_secrets(kd("cache", "verify", cache, "--repair", code=3))
    remaining = objects(buckets, "damaged")
    assert name not in remaining and f"set-aside/{name.removeprefix('data/')}" in remaining
    assert capture_to(cache, tiny_model, rows_file)["complete"]
    assert integrity.verify(storage.location(cache)).sound
    assert query.run(storage.location(cache), ALL) == query.run(tiny_cache, ALL)


def test_sql_reads_only_that_cache_and_writes_nothing(kd, s3, buckets, tiny_cache):
    cache = put(buckets, tiny_cache, "locked")
    put(buckets, tiny_cache, "beside")
    before = objects(buckets, "locked")
    reads = "SELECT * FROM read_csv('{}')"
    for place in (
        *("s3://other/secret.csv", "s3://bucket/beside/plan.json", "/etc/passwd", "http://127.0.0.1/x.csv"),
        *(
            "kdcache://other/secret.csv",
            "kdcache://cache/../other/secret.csv",
            "kdcache://cache/../../other/secret.csv",
        ),
        "kdcache://cache/../beside/plan.json",
    ):
        with pytest.raises(KDError):
            query.run(storage.location(cache), reads.format(place))
    process = without_secrets(kd("sql", cache, reads.format("s3://other/secret.csv"), code=1))
    assert "disabled by configuration" in process.stderr and not process.stdout
    connection = query.connect(storage.location(cache))
    for target in ("kdcache://cache/x.csv", "kdcache://cache/plan.json", "s3://bucket/x.csv", "/tmp/kdcache-x.csv"):
        with pytest.raises(Exception, match=r"never written|disabled by configuration"):
            connection.execute(f"COPY (SELECT 1) TO '{target}'")
    for text in ("COPY (SELECT 1) TO 'kdcache://cache/x.csv'", "WITH x AS (SELECT 1) INSERT INTO vocab FROM x"):
        with pytest.raises(KDError):
            query.stream(connection, text)
    assert objects(buckets, "locked") == before


def test_a_location_with_credentials_is_refused_without_repeating_them(kd, s3):
    for url in (f"s3://{KEY}:{SECRET}@bucket/cache", f"s3://bucket/cache?X-Amz-Signature={SECRET}"):
        for command in (("sql", url, "SELECT 1"), ("cache-teacher", "--out", url)):
            assert "holds no credentials" in without_secrets(kd(*command, code=2)).stderr
    with pytest.raises(UsageError, match="expected a location"):
        storage.location("s3://bucket/../other")


def test_a_bucket_that_does_not_exist_is_reported(kd, s3, tiny_model, rows_file):
    assert "no such folder" in without_secrets(kd("cache", "info", "s3://nowhere/cache", code=1)).stderr
    with pytest.raises(KDError, match=r"no such bucket|could not be"):
        capture_to("s3://nowhere/cache", tiny_model, rows_file, limit=2)


def test_other_file_systems_of_fsspec_work_as_well(tiny_model, rows_file, tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path))
    where = storage.location("memory://caches/tiny")
    capture.run(capture_plan(tiny_model, rows_file, where))
    assert integrity.verify(where).sound and manifest.summary(where)["complete"]
    assert query.run(where, ALL) == query.run(tiny_cache, ALL)
    name = sorted((where / "data").glob("train-*"), key=str)[0].name
    remote, local = (reader.Cache(place).read(name, 0, [0, 1]) for place in (where, tiny_cache))
    assert [s.sample_id for s in remote] == [s.sample_id for s in local]
    capture.run(capture_plan(tiny_model, rows_file, where, overwrite=True, limit=2))
    assert manifest.summary(where)["samples"] == 4, "--overwrite deleted the rest"
    (where / "notes.txt").upload(rows_file)
    with pytest.raises(KDError, match=r"would delete memory://caches/tiny/notes.txt, which kdcache did not write"):
        capture.run(capture_plan(tiny_model, rows_file, where, overwrite=True))


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("503", "too busy or failed"),
        ("403", "access was refused. Check the credentials"),
        ("hold", "no answer within 1 s"),
    ],
)
def test_a_server_that_keeps_failing_ends_the_command_with_a_sentence(kd, s3, buckets, tiny_cache, fault, sentence):
    cache = put(buckets, tiny_cache, "failing")
    s3.fault = lambda method, path: fault
    process = without_secrets(kd("cache", "info", cache, code=1, env={"KDCACHE_REMOTE_TIMEOUT": "1"}))
    assert process.stderr.startswith(f"Error: {cache}") and sentence in process.stderr and not process.stdout
    assert len(s3.requests) <= 4, "the retries are bounded"


def test_a_refused_connection_ends_the_command_with_a_sentence(kd, s3):
    process = without_secrets(
        kd("cache", "info", "s3://bucket/c", code=1, env={"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"})
    )
    assert "the connection was refused" in process.stderr and "s3://bucket/c" in process.stderr


def test_missing_credentials_are_reported(kd, s3, tmp_path):
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    nothing |= {"AWS_CONFIG_FILE": str(tmp_path / "no"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no")}
    assert "Check the credentials" in without_secrets(kd("cache", "info", "s3://bucket/c", code=1, env=nothing)).stderr


def test_requests_to_a_busy_server_are_retried(s3, buckets, tiny_cache):
    cache = storage.location(put(buckets, tiny_cache, "busy"))
    failures = {}

    def busy(method, path):
        failures[method, path] = failures.get((method, path), 0) + 1
        return "503" if failures[method, path] <= 2 else None

    s3.fault = busy
    assert documents.read_plan(cache) == documents.read_plan(tiny_cache) and max(failures.values()) == 3


def test_a_truncated_answer_is_retried_a_few_times(s3, buckets, tiny_cache):
    cache = storage.location(put(buckets, tiny_cache, "truncated"))
    truncated = []

    def twice(method, path):
        if method == "GET" and "plan.json" in path:
            truncated.append(path)
            return "truncate" if len(truncated) <= 2 else None
        return None

    s3.fault = twice
    assert documents.read_plan(cache) == documents.read_plan(tiny_cache) and len(truncated) == 3
    s3.fault = lambda method, path: "truncate" if method == "GET" and "plan.json" in path else None
    with pytest.raises(KDError, match=r"plan\.json could not be read: the connection was refused or broke off"):
        documents.read_plan(cache)


def test_an_error_in_the_middle_of_a_query_is_reported_in_a_sentence(s3, buckets, tiny_cache):
    cache = storage.location(put(buckets, tiny_cache, "midway"))
    connection = query.connect(cache)
    s3.fault = lambda method, path: "403" if "data/" in path else None
    diskcache.evict(0)
    with pytest.raises(KDError, match=r"^s3://bucket/midway/data/\S+ could not be read: access was refused"):
        _names, rows = query.stream(connection, "SELECT sum(len(candidate_ids)) FROM samples")
        list(rows)


def test_a_network_error_is_not_reported_as_damage(s3, buckets, tiny_cache):
    cache = storage.location(put(buckets, tiny_cache, "unreachable"))
    s3.fault = lambda method, path: "403" if "data/train" in path else None
    with pytest.raises(KDError, match="access was refused"):
        integrity.verify(cache)


def test_a_read_only_cache_can_be_read(kd, s3, buckets, tiny_cache):
    cache = put(buckets, tiny_cache, "read-only")
    s3.fault = lambda method, path: "403" if method != "GET" and method != "HEAD" else None
    assert json.loads(kd("cache", "info", cache, "--json").stdout)["complete"]
    assert json.loads(kd("cache", "verify", cache, "--json").stdout)["sound"]


def test_an_upload_cut_in_the_middle_leaves_nothing_and_the_command_can_be_resumed(
    s3, buckets, tiny_cache, tiny_model, rows_file
):
    s3.fault = lambda method, path: "cut" if method == "PUT" and "train-00001" in path else None
    with pytest.raises(KDError, match=r"train-00001\.parquet could not be written: the connection"):
        capture_to("s3://bucket/cut", tiny_model, rows_file)
    uploaded = objects(buckets, "cut")
    assert "data/train-00000.parquet" in uploaded and "data/train-00001.parquet" not in uploaded
    assert "manifest.json" not in uploaded and not buckets.list_multipart_uploads(Bucket="bucket").get("Uploads")
    s3.reset()
    assert capture_to("s3://bucket/cut", tiny_model, rows_file)["complete"]
    assert objects(buckets, "cut")["data/train-00000.parquet"] == uploaded["data/train-00000.parquet"]
    assert query.run(storage.location("s3://bucket/cut"), ALL) == query.run(tiny_cache, ALL)


def test_an_upload_that_is_cut_once_is_retried(s3, buckets, tiny_model, rows_file):
    cuts = []

    def once(method, path):
        if method == "PUT" and "train-00001" in path and not cuts:
            cuts.append(path)
            return "cut"
        return None

    s3.fault = once
    assert capture_to("s3://bucket/cut-once", tiny_model, rows_file)["complete"] and cuts
    assert integrity.verify(storage.location("s3://bucket/cut-once")).sound


def test_of_two_writers_of_one_shard_the_first_wins(s3, buckets, tmp_path):
    where = storage.location("s3://bucket/race/data/train-00000.parquet")
    for number, first in enumerate((True, False)):
        (tmp_path / "shard").write_bytes(b"shard %d" % number)
        assert where.upload(tmp_path / "shard", create=True) is first
    assert objects(buckets, "race") == {"data/train-00000.parquet": b"shard 0"}


def test_writing_works_on_a_server_without_conditional_writes(s3, buckets, tmp_path):
    where = storage.location("s3://bucket/unconditional/shard")
    (tmp_path / "shard").write_bytes(b"shard")
    refused = []

    def first(method, path):
        if method == "PUT" and not refused:
            refused.append(path)
            return "501"
        return None

    s3.fault = first
    assert where.upload(tmp_path / "shard", create=True)
    refused.clear()
    assert not where.upload(tmp_path / "shard", create=True)
    assert objects(buckets, "unconditional") == {"shard": b"shard"}


@pytest.mark.slow
def test_a_large_upload_in_parts_is_visible_only_when_it_is_complete(s3, buckets, tmp_path):
    where = storage.location("s3://bucket/large/shard")
    with open(tmp_path / "shard", "wb") as file:
        file.truncate(120 * 2**20)
    s3.fault = lambda method, path: "cut" if "partNumber=2" in path else None
    with pytest.raises(KDError, match="could not be written: the connection"):
        where.upload(tmp_path / "shard", create=True)
    assert not objects(buckets, "large") and not buckets.list_multipart_uploads(Bucket="bucket").get("Uploads")
    s3.fault = lambda method, path: None
    assert where.upload(tmp_path / "shard", create=True) and not where.upload(tmp_path / "shard", create=True)
    assert where.with_info().size == 120 * 2**20


@pytest.mark.slow
def test_a_process_killed_during_an_upload_leaves_no_partial_object(s3, buckets, tiny_model, rows_file):
    s3.fault = lambda method, path: "hold" if method == "PUT" and "train-00001" in path else None
    command = [sys.executable, "-m", "kdcache", "cache-teacher", "--teacher", tiny_model, "--examples", rows_file]
    command += ["--out", "s3://bucket/killed", "--engine", "transformers", "--sparsify", "topk:8"]
    command += ["--rows-per-shard", "8"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert s3.held.wait(120), process.stdout.read().decode()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    s3.release.set()
    uploaded = objects(buckets, "killed")
    assert "data/train-00000.parquet" in uploaded and "data/train-00001.parquet" not in uploaded
    s3.reset()
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    assert integrity.verify(storage.location("s3://bucket/killed")).sound
    assert objects(buckets, "killed")["data/train-00000.parquet"] == uploaded["data/train-00000.parquet"]


# --- reading for a trainer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_cache(tiny_model, tmp_path_factory):
    """Two shards with 4 and 2 row groups of training samples, which are large compared with the footers."""
    folder = tmp_path_factory.mktemp("wide")
    rows = folder / "rows.jsonl"
    numbers = "".join(
        json.dumps({"id": f"r{i}", "prompt": f"Count {i}.", "completion": f"{i} {i * 7} " * 3}) + "\n"
        for i in range(760)
    )
    rows.write_text(numbers)
    changes = {"mode": "score", "sparsify": "topk:64", "split_ratios": (0.98, 0.02, 0.0), "rows_per_shard": 512}
    capture.run(capture_plan(tiny_model, rows, folder / "cache", near_duplicates="keep", **changes))
    return folder / "cache"


def shard_bytes_sent(proxy, app=""):
    """Return how many bytes of training shards the server sent to a client."""
    return sum(n for (who, path), n in proxy.sent.items() if who == app and "/data/train" in path)


def test_each_of_two_nodes_fetches_its_share_and_the_steps_are_those_of_one(
    s3, buckets, wide_cache, tmp_path, monkeypatch
):
    import numpy as np

    from trainer.data.select import select
    from trainer.data.stream import Stream

    where = storage.location(put(buckets, wide_cache, "shared"))
    size = sum(path.stat().st_size for path in (wide_cache / "data").glob("train*"))

    def epoch(cache, rank=0, ranks=1):
        """Return the token ids of a rank's part of each step, and how many bytes it fetched."""
        monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path / f"{rank} of {ranks}"))
        s3.sent.clear()
        stream = Stream(select([reader.Cache(cache)], "train"), 49152, 16, parts=2, rank=rank, ranks=ranks)
        return [batch["input_ids"][0].tolist() for batch in stream], shard_bytes_sent(s3)

    def tokens_of_steps(*parts):
        return [sorted(itertools.chain(*step)) for step in zip(*parts)]

    local, _ = epoch(wide_cache)
    alone, all_bytes = epoch(where)
    assert alone == local, "the same micro-batches, from the bucket and from the folder"
    (first, few), (second, rest) = epoch(where, 0, 2), epoch(where, 1, 2)
    assert tokens_of_steps(first, second) == tokens_of_steps(local[::2], local[1::2])
    assert 0.9 * size < all_bytes < 1.05 * size
    index = all_bytes * 0.06  # footers and the columns with the lengths of samples
    assert max(few, rest) < 0.5 * size + index + size / 6 * 0.2, (few / size, rest / size)
    assert np.isclose(few + rest, all_bytes, rtol=0.1)


def test_a_second_epoch_fetches_nothing(s3, buckets, wide_cache):
    from trainer.data.select import select
    from trainer.data.stream import Stream, in_order

    where = storage.location(put(buckets, wide_cache, "again"))
    selection = select([reader.Cache(where)], "train")
    stream = Stream(selection, 49152, 16)
    list(stream)
    s3.sent.clear()
    list(stream), list(in_order(selection, 49152, 16))
    assert shard_bytes_sent(s3) == 0


#: A rank as torchrun starts it, which the proxy knows by name. With NODES, each rank is a node with a disk of its own.
RANK = """
import os
rank = os.environ.get("RANK", "0")
os.environ["AWS_SDK_UA_APP_ID"] = f"rank{rank}"
os.environ["KDCACHE_DISK_CACHE"] += os.environ["RUN_NAME"]
if "NODES" in os.environ:
    os.environ["KDCACHE_DISK_CACHE"] += f"/{rank}"
    os.environ["LOCAL_WORLD_SIZE"] = "1"
import cli
cli.main()
"""


@pytest.mark.slow
def test_training_from_a_bucket_has_the_losses_of_the_folder_with_one_rank_two_ranks_and_two_nodes(
    kd, s3, buckets, wide_cache, tiny_model, tmp_path
):
    where = put(buckets, wide_cache, "trained")
    size = sum(path.stat().st_size for path in (wide_cache / "data").glob("train*"))
    options = ["--student", tiny_model, "--learning-rate", "1e-3", "--num-train-epochs", "1", "--logging-steps", "4"]
    options += ["--use-cpu", "--seed", "0", "--evals-per-epoch", "1"]

    def train(cache, name, ranks, **environment):
        s3.sent.clear()
        arguments = ["--from-cache", cache, "--output-dir", name, *options]
        arguments += ["--per-device-train-batch-size", str(16 // ranks)]
        if ranks == 1:
            without_secrets(kd("train", *arguments))
        else:
            (tmp_path / "rank.py").write_text(RANK)
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*launcher, "rank.py", "train", *arguments]
            environment |= os.environ | {"PYTHONPATH": str(ROOT), "RUN_NAME": name}
            process = subprocess.run(
                list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert process.returncode == 0, process.stderr
        return history(tmp_path / name, "step", "loss"), history(tmp_path / name, "step", "eval_kl")

    local = train(wide_cache, "local", 1)
    assert train(where, "remote", 1) == local
    for name, environment in (("two ranks", {}), ("two nodes", {"NODES": "2"})):
        two = train(where, name, 2, **environment)
        for one_run, other in zip(local, two):
            assert [step for step, _ in one_run] == [step for step, _ in other]
            assert [v for _, v in other] == pytest.approx([v for _, v in one_run], rel=2e-3)
        shares = [shard_bytes_sent(s3, f"rank{rank}") / size for rank in (0, 1)]
        print(f"{name}: shares of the training shards' bytes", shares)
        assert 0.95 < sum(shares) < 1.15, shares
        assert max(shares) < 0.6, shares


# --- the disk cache ---------------------------------------------------------------------------------------------------


def test_the_disk_cache_evicts_the_least_recently_used_pieces(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path))
    monkeypatch.setenv("KDCACHE_DISK_CACHE_GB", "0.0001")  # 100 kB
    for number in range(40):
        diskcache.get(f"piece {number}", lambda: b"x" * 10_000)
        os.utime(paths.disk_cache_folder() / os.listdir(tmp_path)[0])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 110_000
    assert diskcache.get("piece 39", lambda: b"fetched") == b"x" * 10_000
    assert diskcache.get("piece 0", lambda: b"fetched") == b"fetched"


def test_a_piece_damaged_on_the_disk_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path))
    diskcache.get("piece", lambda: b"right")
    (path,) = tmp_path.glob("[!.]*")
    path.write_bytes(b"wrong" + path.read_bytes()[5:])
    assert diskcache.get("piece", lambda: b"right again") == b"right again"
    assert diskcache.get("piece", lambda: b"not fetched") == b"right again"


def test_processes_share_a_disk_cache_that_is_too_small_for_them(tmp_path, monkeypatch):
    """Each process reads all pieces several times while all of them evict. Every read returns the right piece."""
    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path))
    monkeypatch.setenv("KDCACHE_DISK_CACHE_GB", "0.0001")
    program = """
from kdcache.storage import diskcache
for _ in range(5):
    for number in range(40):
        assert diskcache.get(f"piece {number}", lambda: bytes([number]) * 10_000) == bytes([number]) * 10_000
"""
    running = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(4)]
    assert [process.wait(120) for process in running] == [0, 0, 0, 0]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 140_000
    assert not [path for path in tmp_path.glob(".*") if not path.name.startswith(".lock-")]


def test_only_one_of_several_processes_fetches_a_piece(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path / "pieces"))
    program = """
import sys
from kdcache.storage import diskcache
def fetch(number):
    print(number)
    return b"piece"
for number in range(50):
    diskcache.get(f"piece {number}", lambda: fetch(number))
"""
    running = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(4)]
    fetched = [int(line) for process in running for line in process.communicate(timeout=120)[0].split()]
    assert sorted(fetched) == list(range(50))


def test_a_process_waits_for_another_to_fetch_and_in_vain_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path / "pieces"))
    monkeypatch.setattr(diskcache, "_patience_seconds", 60.0)
    program = """
import sys, time
from kdcache.storage import diskcache
sys.stdin.readline()
diskcache.get("piece", lambda: b"fetched by another")
"""
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE)
    threading.Timer(0.5, lambda: other.communicate(b"\n")).start()
    diskcache.wait("piece")
    assert diskcache.get("piece", lambda: b"fetched twice") == b"fetched by another"
    monkeypatch.setattr(diskcache, "_patience_seconds", 0.1)
    diskcache.wait("nobody's")
    assert diskcache._patience_seconds == 0
    diskcache.wait("nobody's either")
    monkeypatch.setattr(diskcache, "_patience_seconds", 60.0)
    monkeypatch.setenv("KDCACHE_DISK_CACHE_GB", "0")  # nothing is kept, so waiting is pointless
    diskcache.wait("nothing")


def test_reading_works_without_a_writable_disk_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path / "file"))
    assert diskcache.get("piece", lambda: b"fetched") == b"fetched"
