"""Pair lists: .bin files through the restricted unpickler, text lists, and their figures."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.attack import tallied
from tests.evaluation.samples import identities, unit
from trainer.data.index import open_dataset
from trainer.errors import DataError
from trainer.evaluation.compatibility import Spaces
from trainer.evaluation.pairs import measure_pairs, pair_cosines, read_bin, read_list
from trainer.evaluation.verification import fold_accuracy, resample_pairs, scores_of


def encoded(value, size=16):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bin_is_read_whatever_pickle_protocol_it_has(tmp_path, protocol):
    images = [encoded(v) for v in (10, 11, 20, 200)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, [True, False]), protocol=protocol))
    pairs = read_bin(tmp_path / "lfw.bin", (16, 16))
    assert list(pairs.genuine) == [True, False]
    assert list(pairs.first) == [0, 2]
    assert list(pairs.second) == [1, 3]
    assert pairs.dataset.decode(3).shape == (16, 16, 3)
    assert abs(int(pairs.dataset.decode(3)[0, 0, 0]) - 200) <= 1
    other = tmp_path / "other.bin"
    other.write_bytes(pickle.dumps(([*images[:3], encoded(201)], [True, False])))
    assert read_bin(other, (16, 16)).dataset.fingerprint != pairs.dataset.fingerprint  # same sizes, another picture


class Harmful:
    """Runs a command when a general unpickler reads it."""

    def __reduce__(self):
        return os.system, ("touch /tmp/lce-harmful",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((Harmful(), [True]), r"asks for (posix|nt)\.system"),
        (([b"a", b"b"], [np.True_]), r"asks for numpy"),
        (([b"a", b"b"], [2]), "not all booleans"),
        (([b"a", "b"], [True]), "image 1 is no bytes but str"),
        (([b"a"], [True]), "1 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        ([b"a"], "expected"),
    ],
)
@tallied("hostile files: pickles", "refused")
def test_anything_but_images_and_booleans_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.bin"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message) as refused:
        read_bin(file, (16, 16))
    assert str(file) in str(refused.value)


def test_damaged_and_missing_bins_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_bin(tmp_path / "none.bin", (16, 16))
    whole = pickle.dumps(([encoded(1), encoded(2)], [True]))
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"no verification \.bin"):
            read_bin(tmp_path / "cut.bin", (16, 16))
    (tmp_path / "cut.bin").write_text("where the pairs are kept")
    with pytest.raises(DataError, match=r"cut.bin: is no verification \.bin, or a damaged one$"):
        read_bin(tmp_path / "cut.bin", (16, 16))


def test_text_lists_name_records_or_files(tmp_path):
    for person in "ab":
        (tmp_path / "set" / person).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "set" / person / f"{i}.png").write_bytes(encoded(i))
    dataset = open_dataset(tmp_path / "set")
    file = tmp_path / "pairs.txt"
    file.write_text("# a comment\na/0.png a/1.png 1\n\n0 2 0  # by number\n")
    pairs = read_list(file, dataset)
    assert (list(pairs.first), list(pairs.second), list(pairs.genuine)) == ([0, 0], [1, 2], [True, False])
    for text, message in (
        ("0 9 1", "line 1: 9 is no record"),
        ("0 1 1\nc/0.png 1 1", "line 2: c/0.png is no record"),
        ("0 1", "expected two records and 1 or 0"),
        ("0 1 2", "expected two records and 1 or 0"),
        ("# nothing", "holds no pairs"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_list(file, dataset)


@pytest.mark.parametrize("dense", [True, False])
def test_pair_cosines_agree_with_a_loop(dense):
    generator = np.random.default_rng(0)
    rows = 30 if dense else 4000
    left, right = unit(generator.normal(size=(rows, 8))), unit(generator.normal(size=(rows + 5, 8)))
    first, second = generator.integers(0, rows, 700), generator.integers(0, rows + 5, 700)
    expected = [left[i] @ right[j] for i, j in zip(first, second, strict=True)]
    assert pair_cosines(left, right, first, second) == pytest.approx(np.array(expected), abs=1e-6)


def test_the_query_is_the_first_of_a_pair():
    old = unit(np.array([[1, 0], [0, 1], [1, 1], [1, -1]]))
    new = unit(np.array([[0, 1], [1, 0], [1, 0], [0, 1]]))

    class Pairs:
        first, second = np.array([10, 20] * 10), np.array([30, 40] * 10)
        genuine = np.array([True, False] * 10)

    measured = measure_pairs(Pairs(), Spaces({"old": old, "new": new}), np.array([10, 20, 30, 40]), (0.5,), 20, 0)
    assert (measured["genuine"], measured["impostor"]) == (10, 10)
    assert measured["cells"]["old->old"]["accuracy"]["mean"] == 1.0  # cos 0.71 against −0.71
    assert measured["cells"]["new->old"]["tar"][0]["threshold"] == pytest.approx(0.7071, abs=1e-4)
    assert measured["cells"]["new->old"]["accuracy"]["mean"] == 0.5  # 0.71 for both kinds


def test_pair_intervals_narrow_with_more_pairs():
    widths = []
    for images in (4, 16):
        x, y = identities(40, images, noise=1.5, seed=1)
        generator = np.random.default_rng(0)
        i, j = generator.integers(0, len(y), (2, 40 * images * 30))
        scores = scores_of(np.einsum("nd,nd->n", x[i], x[j]), y[i] == y[j])
        drawn = resample_pairs(scores, [0.01], 100, seed=0)[:, 0]
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert low <= scores.tar_at(0.01) <= high
        widths.append(high - low)
    assert widths[1] < 0.75 * widths[0]


def test_fold_accuracy_needs_enough_pairs():
    with pytest.raises(DataError, match="too few for 10 folds"):
        fold_accuracy(np.zeros(9), np.ones(9, bool))
