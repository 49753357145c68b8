"""The journal keeps what it acknowledged, whatever happens to its last bytes."""

import errno
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.actors import Journal, JournalError

ENTRIES = [({"item": i, "name": "ü" * i}, bytes(range(i % 256)) * i) for i in range(7)]


def written(folder, entries=ENTRIES, **options):
    with Journal(folder, **options) as journal:
        for header, body in entries:
            journal.append(header, body)
    return folder


def read(folder):
    return [(record.header, record.body) for record in Journal(folder).records()]


@pytest.mark.parametrize("segment_bytes", [1, 100, 1 << 20])
def test_what_was_appended_is_read_back_in_order_by_any_later_process(tmp_path, segment_bytes):
    written(tmp_path, ENTRIES[:4], segment_bytes=segment_bytes)
    written(tmp_path, ENTRIES[4:], segment_bytes=segment_bytes)
    assert read(tmp_path) == ENTRIES
    assert len(list(tmp_path.iterdir())) == {1: 7, 100: 4, 1 << 20: 2}[segment_bytes]


@given(st.data())
def test_a_tail_that_was_cut_takes_only_the_records_that_it_touches(tmp_path_factory, data):
    folder = written(tmp_path_factory.mktemp("journal"))
    (segment,) = folder.iterdir()
    whole = segment.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    segment.write_bytes(whole[:size])
    found = read(folder)
    ends = [len(read_size) for read_size in _prefixes(whole)]
    assert found == ENTRIES[: sum(end <= size for end in ends)]
    written(folder, [({"item": 99}, b"new")])  # never after the torn bytes
    assert read(folder) == [*found, ({"item": 99}, b"new")]


def _prefixes(whole):
    """The journal after each record, from the sizes in the heads alone."""
    offset, found = 0, []
    while offset < len(whole):
        header = int.from_bytes(whole[offset + 4 : offset + 8], "little")
        body = int.from_bytes(whole[offset + 8 : offset + 16], "little")
        offset += 20 + header + body + 4
        found.append(whole[:offset])
    return found


@given(st.data())
def test_a_flipped_bit_never_gives_another_record(tmp_path_factory, data):
    folder = written(tmp_path_factory.mktemp("journal"))
    (segment,) = folder.iterdir()
    damaged = bytearray(segment.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    segment.write_bytes(damaged)
    found = read(folder)
    assert all(entry in ENTRIES for entry in found)
    touched = sum(len(prefix) <= bit // 8 for prefix in _prefixes(_undamaged(damaged, bit)))
    assert found[:touched] == ENTRIES[:touched]
    assert ENTRIES[touched] not in found


def _undamaged(damaged, bit):
    whole = bytearray(damaged)
    whole[bit // 8] ^= 1 << bit % 8
    return bytes(whole)


def test_damage_inside_a_record_costs_that_record_only(tmp_path, caplog):
    (segment,) = written(tmp_path).iterdir()
    data = bytearray(segment.read_bytes())
    data[len(_prefixes(bytes(data))[3]) - 6] ^= 4  # in the body of record 3
    segment.write_bytes(data)
    assert read(tmp_path) == [*ENTRIES[:3], *ENTRIES[4:]]
    assert "damaged record" in caplog.text


def test_whole_segments_are_collected_up_to_the_first_that_is_needed(tmp_path):
    with Journal(tmp_path, segment_bytes=1) as journal:
        for header, body in ENTRIES:
            journal.append(header, body)
        assert journal.collect(lambda header: header["item"] in (3, 5)) == 3
        assert [record.header["item"] for record in journal.records()] == [3, 4, 5, 6]
        assert journal.collect(lambda header: False) == 4
        journal.append({"item": 7})
    assert [record.header["item"] for record in Journal(tmp_path).records()] == [7]


def test_the_open_segment_is_never_collected(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append({"item": 0})
        assert journal.collect(lambda header: False) == 0
        journal.append({"item": 1})
    assert len(read(tmp_path)) == 2


def test_a_full_disk_refuses_the_record_and_keeps_the_others(tmp_path):
    """A limit on the size of files stands for the disk: the system refuses in the same place."""
    script = f"""
import resource
from jaxrl.actors import Journal, JournalError
journal = Journal({str(tmp_path)!r})
journal.append({{"item": 0}}, b"x" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    journal.append({{"item": 1}}, b"y" * 5000)
except JournalError as error:
    print(error.errno, error)
journal.append({{"item": 2}}, b"z" * 1000)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert "nothing is lost, free some space" in done.stdout
    assert read(tmp_path) == [({"item": 0}, b"x" * 1000), ({"item": 2}, b"z" * 1000)]


def test_a_disk_that_fails_to_flush_acknowledges_nothing(tmp_path, monkeypatch):
    with Journal(tmp_path) as journal:
        journal.append({"item": 0})

        def failing(handle):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", failing)
            with pytest.raises(JournalError, match=r"Input/output error.*look at the disk"):
                journal.append({"item": 1})
        journal.append({"item": 2})
    assert [header["item"] for header, _ in read(tmp_path)] == [0, 2]


def test_sizes_are_checked(tmp_path):
    with pytest.raises(ValueError, match="segment_bytes must be ≥ 1, got 0"):
        Journal(tmp_path, segment_bytes=0)


def test_a_flush_that_fails_at_the_end_of_a_segment_adds_nothing(tmp_path, monkeypatch):
    """The record is not durable by itself, the segment that it fills is."""

    def failing(handle):
        raise OSError(errno.EIO, "Input/output error")

    with Journal(tmp_path, segment_bytes=1) as journal:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", lambda handle: None)
            journal.append({"item": 0})
            journal._begin()
            broken.setattr(os, "fsync", failing)
            with pytest.raises(JournalError, match="nothing is lost"):
                journal.append({"item": 1}, durable=False)
        journal.append({"item": 1}, durable=False)
    assert [header["item"] for header, _ in read(tmp_path)] == [0, 1]
