"""Objects in a bucket: read and written in parallel, updated without losing another update; any failure is a BucketError."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.buckets import Bucket, BucketError, is_url
from pallas_kernels.ragged_attention import measured_tiles
from pallas_kernels.ragged_attention.measured_tiles import Shape
from pallas_kernels.ragged_attention.tpu.tile_sizes import choose, modeled
from tests.bucket_server import bucket_server


@pytest.fixture
def server(monkeypatch):
    with bucket_server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def test_objects_are_listed_read_and_replaced_below_the_url(server) -> None:
    bucket = Bucket("gs://bucket/a")
    assert bucket.names() == []
    bucket.write({"x": b"1", "deep/y": b"2"})
    Bucket("gs://bucket/ab").write({"z": b"other"})
    assert sorted(bucket.names()) == ["deep/y", "x"]
    bucket.write({"x": b"3"})
    assert bucket.read(["x", "deep/y", "missing"]) == {"x": b"3", "deep/y": b"2"}


def test_an_update_is_repeated_with_the_contents_that_another_process_wrote_meanwhile(server) -> None:
    bucket = Bucket("gs://bucket/a")
    seen: list[bytes | None] = []

    def change(contents: bytes | None) -> bytes:
        seen.append(contents)
        if len(seen) == 1:
            bucket.write({"x": b"theirs"})
        return (contents or b"") + b" and ours"

    bucket.update("x", change)
    assert seen == [None, b"theirs"]
    assert bucket.read(["x"]) == {"x": b"theirs and ours"}


@pytest.mark.parametrize("kind", ["list", "read", "write"])
def test_refused_requests_are_errors(server, kind) -> None:
    bucket = Bucket("gs://bucket/a")
    server.refuse.update(list=100, read=100) if kind == "list" else server.refuse.update({kind: 100})
    with pytest.raises(BucketError, match=r"gs://bucket/a/: PERMISSION_DENIED: access denied"):
        {"list": bucket.names, "read": lambda: bucket.read(["x"]), "write": lambda: bucket.write({"x": b""})}[kind]()


@pytest.mark.slow
def test_an_unreachable_server_is_an_error(monkeypatch, server) -> None:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    with pytest.raises(BucketError, match="Could not connect"):
        Bucket("gs://bucket").names()


def test_only_gs_is_a_bucket() -> None:
    assert is_url("gs://bucket/a")
    assert not is_url("/folder")
    with pytest.raises(ValueError, match="'s3://bucket' is a URL with an unsupported scheme; use gs://bucket/prefix, or a"):
        is_url("s3://bucket")


def test_tiles_measured_on_one_machine_are_used_by_another(server, monkeypatch, caplog) -> None:
    monkeypatch.setenv("PALLAS_KERNELS_TILES", "gs://bucket/tuned/tiles.json")
    call = Shape(
        num_heads=32, num_kv_heads=8, head_dim=128, block_size=32, num_tokens=64, num_sequences=64, dtype="bfloat16"
    )
    best = modeled(call, "v5e")
    assert choose(call, "v5e") == best
    measured_tiles.save(call, "v6e", modeled(call, "v6e"), seconds=1.0)
    best = dataclasses.replace(best, queries=2 * best.queries)
    measured_tiles.save(call, "v5e", best, seconds=1e-3)
    measured_tiles.entries.cache_clear()  # another process
    assert choose(call, "v5e") == best
    assert len(measured_tiles.entries("gs://bucket/tuned/tiles.json")) == 2
    server.refuse["read"] = 100
    measured_tiles.entries.cache_clear()
    assert choose(call, "v5e") == modeled(call, "v5e")
    assert "access denied" in caplog.text
    measured_tiles.entries.cache_clear()
