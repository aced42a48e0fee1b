"""Converters against plain loops, and independence of chunks and shards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from trainer.compat.bank.boundary import BoundaryRule
from trainer.compat.bank.center_bank import BankInfo, CenterBank
from trainer.compat.bank.class_map import ClassMap
from trainer.compat.bank.convert import bank_from_embeddings, bank_from_rows
from trainer.compat.bank.matrices import Rows
from trainer.errors import CenterBankError

INFO = BankInfo()


def labelled(classes: int = 23, dim: int = 8) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings of 0 … 9 images a class (class 3 has none, 4 one, 5 two), some unused, in random order."""
    generator = np.random.default_rng(5)
    counts = generator.integers(1, 10, classes)
    counts[3:6] = 0, 1, 2
    labels = np.concatenate([np.repeat(np.arange(classes), counts), [-1, -1]])
    centers = generator.normal(size=(classes, dim)) * 2
    vectors = centers[labels] + generator.normal(size=(len(labels), dim))
    order = generator.permutation(len(labels))
    return torch.from_numpy(vectors[order].astype(np.float32)), labels[order].astype(np.int64)


def reference(vectors: torch.Tensor, labels: np.ndarray, j: int, rule: BoundaryRule) -> tuple[np.ndarray, float]:
    """Class j's centre and boundary in plain numpy."""
    own = vectors.double().numpy()[labels == j]
    own = own / np.linalg.norm(own, axis=1, keepdims=True)
    center = own.mean(0) / np.linalg.norm(own.mean(0))
    cosines = own @ center
    if rule.outliers == "iqr":
        angles = np.arccos(np.clip(cosines, -1, 1))
        q1, q3 = np.quantile(angles, [0.25, 0.75])
        cosines = cosines[angles <= q3 + 1.5 * (q3 - q1) + 1e-9]
    if rule.outliers == "nearest":
        cosines = np.sort(cosines)[::-1][: int(np.ceil(rule.nearest_share * len(cosines)))]
    return center, float(np.quantile(cosines, rule.quantile))


RULES = [
    BoundaryRule(),
    BoundaryRule(quantile=0.2),
    BoundaryRule(outliers="iqr"),
    BoundaryRule(outliers="nearest", nearest_share=0.7, quantile=0.1, single=0.25),
]


@pytest.mark.parametrize("rule", RULES, ids=BoundaryRule.text)
@pytest.mark.parametrize("parts", [1, 3])
def test_from_embeddings_against_a_loop_over_classes(tmp_path: Path, rule: BoundaryRule, parts: int) -> None:
    vectors, labels = labelled()
    pieces = vectors.tensor_split(parts)
    rows = Rows(pieces, [f"file{i}" for i in range(parts)])
    bank = bank_from_embeddings(rows, labels, 23, tmp_path / "bank", INFO, rule=rule, chunk_bytes=12 * 8 * 4)
    got = bank.rows(0, 23)
    expected = {j: reference(vectors, labels, j, rule) for j in range(23) if (labels == j).any()}
    single = rule.single
    if single is None:
        single = float(np.median([b for j, (_, b) in expected.items() if (labels == j).sum() > 1]))
    for j in range(23):
        count = int((labels == j).sum())
        assert got.counts[j] == count
        assert bool(got.mask[j]) == (count > 0)
        if not count:
            assert got.boundaries[j] == -1
            assert not got.centers[j].any()
            continue
        center, boundary = expected[j]
        np.testing.assert_allclose(got.centers[j], center, atol=1e-6)
        assert got.boundaries[j] == pytest.approx(boundary if count > 1 else single, abs=2e-6)


def test_chunks_and_parts_do_not_change_a_bit(tmp_path: Path) -> None:
    vectors, labels = labelled()
    whole = bank_from_embeddings(Rows([vectors], ["a"]), labels, 23, tmp_path / "a", INFO)
    cut = bank_from_embeddings(
        Rows(vectors.split(7), list("abcdefghijklmnopqrstuvwxyz")[: len(vectors.split(7))]),
        labels,
        23,
        tmp_path / "b",
        INFO,
        chunk_bytes=64,
    )
    for name in ("centers", "boundaries", "mask", "counts"):
        assert torch.equal(getattr(whole.rows(0, 23), name), getattr(cut.rows(0, 23), name))


def test_given_centers_are_kept_and_only_measured(tmp_path: Path) -> None:
    vectors, labels = labelled()
    classifier = normalize(torch.randn(23, 8, generator=torch.Generator().manual_seed(2)))
    index = np.arange(23)
    index[[4, 9]] = -1
    old = bank_from_rows(Rows([classifier], ["w"]), tmp_path / "old", INFO, class_map=ClassMap.from_index(index))
    got = bank_from_embeddings(Rows([vectors], ["e"]), labels, 23, tmp_path / "new", INFO, centers=old).rows(0, 23)
    own = [reference(vectors, labels, j, RULES[0])[0] for j in (4, 9)]
    np.testing.assert_allclose(got.centers[[4, 9]], np.stack(own), atol=1e-6)
    keep = [j for j in range(23) if j not in (4, 9)]
    assert torch.equal(got.centers[keep], old.rows(0, 23).centers[keep])
    assert bool(got.mask.all())
    assert got.boundaries[3] == -1, "a centre without images restrains nothing"
    cosines = normalize(vectors)[labels == 7] @ classifier[7]
    assert got.boundaries[7] == pytest.approx(float(cosines.min()), abs=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_from_rows_is_the_same_bits_at_any_shard_count(tmp_path: Path, shards: int) -> None:
    weight = torch.randn(103, 16, generator=torch.Generator().manual_seed(3)) * 3
    parts = weight.tensor_split(shards)
    rows = Rows(parts, [str(i) for i in range(shards)])
    bank = bank_from_rows(rows, tmp_path / "bank", INFO, chunk_bytes=10 * 16 * 4)
    whole = bank_from_rows(Rows([weight], ["w"]), tmp_path / "whole", INFO)
    assert torch.equal(bank.rows(0, 103).centers, whole.rows(0, 103).centers)
    torch.testing.assert_close(bank.rows(0, 103).centers, normalize(weight.double()).float(), atol=2e-7, rtol=0)
    assert bool((bank.rows(0, 103).boundaries == -1).all())


def test_class_maps_permute_merge_and_mask(tmp_path: Path) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    unit = normalize(weight.double())
    (tmp_path / "map.csv").write_text("new,old\n0,4\n2,1\n2,5\n\n3,4\n")
    class_map = ClassMap.from_file(tmp_path / "map.csv", None, None)
    got = bank_from_rows(Rows([weight], ["w"]), tmp_path / "bank", INFO, class_map=class_map).rows(0, 4)
    assert got.mask.tolist() == [True, False, True, True]
    assert got.class_ids.tolist() == [4, -1, 1, 4]
    np.testing.assert_allclose(got.centers[0], unit[4], atol=1e-6)
    np.testing.assert_allclose(got.centers[2], normalize(unit[1] + unit[5], dim=0), atol=1e-6)
    assert not got.centers[1].any()
    assert "3 of 4 classes have an old one, 1 of them merged" in class_map.summary


def test_class_maps_by_names_and_their_errors(tmp_path: Path) -> None:
    by_name = ClassMap.from_names(["ann", "bo", "cy"], ["cy", "ann"])
    assert by_name.first.tolist() == [1, -1, 0]
    path = tmp_path / "map.csv"
    path.write_text("bo,ann\ncy,cy\n")
    assert ClassMap.from_file(path, ["ann", "bo", "cy"], ["cy", "ann"]).first.tolist() == [-1, 1, 0]
    with pytest.raises(CenterBankError, match=r"line 1: .*'bo'"):
        ClassMap.from_file(path, None, None)
    path.write_text("bo,ann\ndee,cy\n")
    with pytest.raises(CenterBankError, match=r"line 2: no class is called 'dee'"):
        ClassMap.from_file(path, ["ann", "bo"], ["cy", "ann"])
    path.write_text("0,1\nbo,cy\n")
    by_both = ClassMap.from_file(path, ["ann", "bo", "cy"], ["cy", "ann"])
    assert by_both.first.tolist() == [1, 0, -1], "no name is a number, so numbers are meant; the last has no old class"
    with pytest.raises(CenterBankError, match=r"line 1: no class is called '0'"):
        ClassMap.from_file(path, ["1", "bo"], None)
    path.write_text("0,1\n")
    assert ClassMap.from_file(path, None, None, 3).first.tolist() == [1, -1, -1]
    np.save(tmp_path / "map.npy", np.array([0, 1]))
    with pytest.raises(CenterBankError, match="maps 2 classes, the new data set has 3"):
        ClassMap.from_file(tmp_path / "map.npy", None, None, 3)
    with pytest.raises(CenterBankError, match="no class name is in both"):
        ClassMap.from_names(["a"], ["b"])
    with pytest.raises(CenterBankError, match="entry 1 is -3"):
        ClassMap.from_index(np.array([0, -3]))
    with pytest.raises(CenterBankError, match="names old class 9, the old model has 6"):
        bank_from_rows(
            Rows([torch.randn(6, 5)], ["w"]), tmp_path / "b", INFO, class_map=ClassMap.from_index(np.array([9]))
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf])
def test_vectors_without_direction_are_named(tmp_path: Path, poison: float) -> None:
    vectors, labels = labelled()
    record = int(np.flatnonzero(labels == 7)[-1])
    vectors[record] = poison
    with pytest.raises(CenterBankError, match=f"second, row {record - 10}"):
        bank_from_embeddings(
            Rows(vectors.split([10, len(vectors) - 10]), ["first", "second"]), labels, 23, tmp_path / "b", INFO
        )
    assert not list(tmp_path.iterdir())


def test_bad_labels_are_refused(tmp_path: Path) -> None:
    vectors, labels = labelled()
    rows = Rows([vectors], ["e"])
    for wrong, reason in (
        (labels[:-1], "labels"),
        (np.full_like(labels, -1), "no labelled"),
        (np.where(labels == 22, 40, labels), "label 40"),
        (np.where(labels == 22, -2, labels), "label -2"),
    ):
        with pytest.raises(CenterBankError, match=reason):
            bank_from_embeddings(rows, wrong, 23, tmp_path / "b", INFO)
    other = bank_from_rows(Rows([torch.randn(23, 9)], ["w"]), tmp_path / "other", INFO)
    with pytest.raises(CenterBankError, match="23 classes × 9"):
        bank_from_embeddings(rows, labels, 23, tmp_path / "b", INFO, centers=other)


def test_a_negative_control_differs(tmp_path: Path) -> None:
    vectors, labels = labelled()
    first = bank_from_embeddings(Rows([vectors], ["e"]), labels, 23, tmp_path / "a", INFO)
    other = bank_from_embeddings(Rows([vectors], ["e"]), np.roll(labels, 1), 23, tmp_path / "b", INFO)
    assert isinstance(first, CenterBank)
    assert not torch.allclose(first.rows(0, 23).centers, other.rows(0, 23).centers, atol=0.1)
