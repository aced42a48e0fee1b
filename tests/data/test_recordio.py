"""RecordIO: our reader and writer against files that MXNet wrote, and against each other."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.samples import MXNET, mxnet_copy
from trainer.data import recordio
from trainer.errors import DataError

EXPECTED = json.loads((MXNET / "expected.json").read_text())
NAMES = ("plain", "insightface", "recbuilder", "face2rec2", "vector", "magic")
MAGIC = struct.pack("<I", recordio.MAGIC)


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_mxnet_wrote(name: str) -> None:
    raw = (MXNET / name / "train.rec").read_bytes()
    at = 0
    for expected in EXPECTED[name]:
        data, at = recordio.unframe(raw, at)
        record = recordio.decode_record(data)
        label = expected["label"]
        assert record.labels == (tuple(label) if isinstance(label, list) else (label,))
        assert record.flag == (len(label) if isinstance(label, list) else 0)
        assert record.id == expected["key"]
        assert hashlib.sha256(record.image).hexdigest() == expected["sha256"]
    assert at == len(raw)


@pytest.mark.parametrize("name", NAMES)
def test_writes_what_mxnet_writes(name: str, tmp_path: Path) -> None:
    raw = (MXNET / name / "train.rec").read_bytes()
    writer = recordio.RecordWriter(tmp_path / "train.rec")
    at = 0
    while at < len(raw):
        data, at = recordio.unframe(raw, at)
        record = recordio.decode_record(data)
        label = record.labels if record.flag else record.label
        writer.write(record.id, recordio.encode_record(record.image, label, record.id, record.id2))
    assert not list(tmp_path.glob("train.*"))  # nothing appears before it is complete
    writer.close()
    assert (tmp_path / "train.rec").read_bytes() == raw
    assert (tmp_path / "train.idx").read_text() == (MXNET / name / "train.idx").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_scan_finds_what_the_index_says(name: str) -> None:
    keys, offsets = recordio.read_index(MXNET / name / "train.idx")
    assert list(recordio.scan(MXNET / name / "train.rec")) == offsets.tolist()
    assert keys.tolist() == [expected["key"] for expected in EXPECTED[name]]


pieces = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9)), max_size=8).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=4))
def test_any_data_comes_back(records: list[bytes]) -> None:
    framed = b"".join(recordio.frame(data) for data in records)
    at, back = 0, []
    while at < len(framed):
        assert at % 4 == 0
        data, at = recordio.unframe(framed, at)
        back.append(data)
    assert back == records


def test_label_vectors_and_ids_come_back() -> None:
    record = recordio.decode_record(recordio.encode_record(b"image", (1.0, 2.5), 2**40, 7))
    assert (record.labels, record.id, record.id2, record.image) == ((1.0, 2.5), 2**40, 7, b"image")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends inside"),
        (b"\0" * 16, "where a record's magic"),
        (struct.pack("<II", recordio.MAGIC, 9) + b"short", "ends inside"),
        (struct.pack("<II", recordio.MAGIC, 2 << 29), "part of kind 2 where the first"),
        (struct.pack("<II", recordio.MAGIC, 1 << 29) + recordio.frame(b"whole"), "part of kind 0 where the next"),
    ],
)
def test_damaged_frames_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recordio.unframe(data)


def test_short_headers_are_named() -> None:
    with pytest.raises(ValueError, match="too few for a record header"):
        recordio.decode_record(b"short")
    with pytest.raises(ValueError, match="promises 9 labels"):
        recordio.decode_record(struct.pack("<IfQQ", 9, 0, 0, 0) + b"1234")


def test_a_cut_file_is_named_by_the_scan(tmp_path: Path) -> None:
    rec = mxnet_copy("plain", tmp_path) / "train.rec"
    whole = rec.read_bytes()
    for cut in (1, 4, 100, len(whole) - 6):
        rec.write_bytes(whole[: len(whole) - cut])
        with pytest.raises(DataError, match=r"train\.rec: .*cut short"):
            list(recordio.scan(rec))


@pytest.mark.parametrize("text", ["0\t0\n1\tx\n", "0\t0\n1\n", "0 0 0\n", "0\t-8\n"])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    idx = tmp_path / "train.idx"
    idx.write_text(text)
    with pytest.raises(DataError, match=r"train\.idx"):
        recordio.read_index(idx)


def test_index_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordio, "_INDEX_BYTES", 50)
    idx = tmp_path / "train.idx"
    idx.write_text("".join(f"{k}\t{1000 * k}\n" for k in range(500)))
    keys, offsets = recordio.read_index(idx)
    assert np.array_equal(keys, np.arange(500))
    assert np.array_equal(offsets, 1000 * np.arange(500))
