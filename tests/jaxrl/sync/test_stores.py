"""Every store keeps the same promises."""

import errno
import os
from pathlib import Path
from typing import ClassVar

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl import sync


class Bucket(fsspec.AbstractFileSystem):
    """An object store: keys without folders, and errors of its own kind."""

    protocol = "bucket"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    broken: ClassVar[Exception | None] = None

    def _guard(self):
        if self.broken is not None:
            raise self.broken

    def makedirs(self, path, exist_ok=False):
        """There are no folders to make."""

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._guard()
        self.objects[self._strip_protocol(path)] = bytes(value)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._guard()
        key = self._strip_protocol(path)
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key][start:end]

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        self._guard()
        prefix = self._strip_protocol(path)
        # By the beginning of the key, as object stores list: "run" also finds "runner".
        return [key for key in self.objects if key.startswith(prefix)]

    def rm_file(self, path):
        self._guard()
        self.objects.pop(self._strip_protocol(path), None)


fsspec.register_implementation("bucket", Bucket, clobber=True)


class ServiceError(Exception):
    """What a client of an object store raises: no OSError."""


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(Bucket, "objects", {})
    monkeypatch.setattr(Bucket, "broken", None)
    return sync.FsspecStore("bucket://name/runs")


@pytest.fixture(params=["memory", "folder", "memory://", "bucket", "tcp", "paced"])
def store(request, tmp_path, secret):
    match request.param:
        case "bucket":
            yield request.getfixturevalue("bucket")
        case "memory":
            yield sync.MemoryStore()
        case "folder":
            yield sync.FsspecStore(tmp_path / "made" / "when missing")
        case "memory://":
            yield sync.FsspecStore(f"memory://{tmp_path.name}")
        case "paced":
            yield sync.PacedStore(sync.MemoryStore(), sync.Link.parse("1tbit,0s"))
        case "tcp":
            with (
                sync.StoreServer(sync.MemoryStore(), secret=secret) as server,
                sync.TcpStore(server.address, secret=secret) as client,
            ):
                yield client


def test_blobs_are_what_was_put_last(store):
    assert store.keys("") == []
    store.put("run/a", b"one")
    store.put("run/b/c", b"")
    store.put("run/a", b"two")
    store.put("runner", b"x")
    assert store.get("run/a") == b"two"
    assert store.get("run/b/c") == b""
    assert store.keys("run/") == ["run/a", "run/b/c"]
    assert store.keys("") == ["run/a", "run/b/c", "runner"]
    store.delete("run/a")
    store.delete("run/a")
    assert store.keys("run/") == ["run/b/c"]
    with pytest.raises(KeyError, match="no blob 'run/a'"):
        store.get("run/a")


def test_ranges_are_parts_of_what_was_put(store):
    assert isinstance(store, sync.RangeStore)
    blob = bytes(range(200))
    store.put("run/a", blob)
    for start, stop in ((0, 200), (0, 1), (7, 9), (150, 250), (200, 300), (5, 5)):
        assert store.get_range("run/a", start, stop) == blob[start:stop]
    with pytest.raises(KeyError, match="no blob 'run/b'"):
        store.get_range("run/b", 0, 1)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a b", "a/", "é"])
def test_keys_that_could_leave_the_store_are_refused(store, key):
    for act in (store.get, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(ValueError, match="a key is at most 512"):
            act(key)
    with pytest.raises(ValueError, match="ends with '/'"):
        store.keys("run")


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.tuples(st.sampled_from("pd"), st.sampled_from(["a", "b/a", "b/c"]), st.binary()),
        max_size=12,
    )
)
def test_any_sequence_of_requests_acts_as_on_a_dictionary(store, requests):
    for key in store.keys(""):
        store.delete(key)
    expected: dict[str, bytes] = {}
    for what, key, data in requests:
        if what == "p":
            store.put(key, data)
            expected[key] = data
        else:
            store.delete(key)
            expected.pop(key, None)
        assert {k: store.get(k) for k in store.keys("")} == expected


def test_a_write_that_dies_leaves_the_old_blob_and_no_litter(tmp_path, monkeypatch):
    store = sync.FsspecStore(tmp_path)
    store.put("a/b", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(sync.StoreFull, match=r"no room in .* for the 3 bytes of 'a/b'.*free some"):
        store.put("a/b", b"new")
    assert store.get("a/b") == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    sync.FsspecStore(tmp_path).put("a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_writer_leaves_is_no_blob(tmp_path):
    store = sync.FsspecStore(tmp_path)
    store.put("a/b", b"old")
    (tmp_path / "a" / ".b.x7f").write_bytes(b"hal")
    assert store.keys("") == ["a/b"]


def test_what_a_killed_writer_leaves_is_removed_once_nobody_can_still_be_writing_it(tmp_path):
    store = sync.FsspecStore(tmp_path)
    store.put("a/b", b"old")
    dead, alive, other = (
        tmp_path / "a" / name for name in (".b.0123456789abcdef", ".c.fedcba9876543210", ".hidden")
    )
    for path in (dead, alive, other):
        path.write_bytes(b"hal")
    for path in (dead, other):
        os.utime(path, (0, 0))
    store.put("a/b", b"new")
    assert not dead.exists()
    assert alive.exists()  # may be another writer's that is not done
    assert other.exists()  # is none of ours
    assert store.keys("") == ["a/b"]
    assert store.get("a/b") == b"new"


def test_what_an_object_store_raises_is_a_failure_of_the_store(bucket, monkeypatch):
    bucket.put("run/a", b"one")
    monkeypatch.setattr(Bucket, "broken", ServiceError("503 slow down"))
    for what, act in (
        ("write", lambda: bucket.put("run/a", b"two")),
        ("read", lambda: bucket.get("run/a")),
        ("read", lambda: bucket.get_range("run/a", 0, 1)),
        ("list", lambda: bucket.keys("run/")),
        ("delete", lambda: bucket.delete("run/a")),
    ):
        with pytest.raises(sync.StoreError, match=f"cannot {what} 'run/.*503 slow down"):
            act()
    monkeypatch.setattr(Bucket, "broken", None)
    assert bucket.get("run/a") == b"one"


def test_versions_travel_through_an_object_store(bucket, monkeypatch):
    publisher = sync.Publisher(bucket, run_id="r")
    params = {"w": jnp.arange(64.0)}
    publisher.publish(params, 0)
    actor = sync.Subscriber(bucket, run_id="r", like=params)
    assert actor.prepare()
    assert actor.flip().version == 0
    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "broken", ServiceError("503 slow down"))
        with pytest.raises(sync.StoreError, match="503 slow down"):
            publisher.publish({"w": params["w"] + 1}, 1)
        assert not actor.prepare()
        assert "503 slow down" in actor.problem
    publisher.publish({"w": params["w"] + 2}, 2)
    assert actor.prepare()
    assert actor.flip().version == 2
    np.testing.assert_array_equal(actor.params["w"], np.arange(64.0) + 2)


def test_a_file_where_a_folder_should_be_says_so(tmp_path):
    Path(tmp_path / "a").write_bytes(b"")
    with pytest.raises(sync.StoreError, match="cannot write 'a/b'"):
        sync.FsspecStore(tmp_path).put("a/b", b"")


def test_an_unknown_protocol_says_so():
    with pytest.raises(ValueError, match="nonsense"):
        sync.FsspecStore("nonsense://bucket")


def test_the_server_passes_on_that_its_disk_is_full(secret):
    class Full(sync.MemoryStore):
        def put(self, key: str, data: bytes) -> None:
            raise sync.StoreFull(f"no room for {key}")

    with (
        sync.StoreServer(Full(), secret=secret) as server,
        sync.TcpStore(server.address, secret=secret) as client,
        pytest.raises(sync.StoreFull, match="no room for a"),
    ):
        client.put("a", b"")
