"""The template protocols on a small synthetic copy of the published file layout, against plain loops."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.samples import unit
from trainer.errors import DataError
from trainer.evaluation.chain import carried
from trainer.evaluation.compatibility import Spaces
from trainer.evaluation.embeddings import pool_spaces
from trainer.evaluation.pairs import pair_cosines
from trainer.evaluation.templates import POINTS_112, AlignedImages, align, measure_templates, pool, read_templates


@pytest.fixture
def folder(tmp_path):
    """Subjects 0–2 in gallery G1, 3–4 in G2, 5 in neither; two templates each (2 media, 3 images), one a probe."""
    meta = tmp_path / "meta"
    meta.mkdir()
    (tmp_path / "loose_crop").mkdir()
    faces, marks, number = [], [], 0
    for subject in range(6):
        for part in range(2):
            for medium in (0, 0, 1):
                name = f"{number}.jpg"
                Image.new("RGB", (60, 70), (40 * subject, 20 * part, 10 * number % 256)).save(
                    tmp_path / "loose_crop" / name
                )
                points = POINTS_112 / 2 + number % 3
                faces.append(f"{name} {100 + 10 * subject + part} {1000 + 10 * subject + 2 * part + medium}")
                marks.append(f"{name} {' '.join(f'{v:.3f}' for v in points.ravel())} {0.5 + number % 5 / 10:.2f}")
                number += 1
    (meta / "ijbt_face_tid_mid.txt").write_text("\n".join(faces) + "\n")
    (meta / "ijbt_name_5pts_score.txt").write_text("\n".join(reversed(marks)) + "\n")  # in another order
    pairs = [f"{100 + 10 * a} {101 + 10 * b} {int(a == b)}" for a in range(6) for b in range(6)]
    (meta / "ijbt_template_pair_label.txt").write_text("\n".join(pairs) + "\n")
    head = "TEMPLATE_ID,SUBJECT_ID,FILENAME"
    for gallery, subjects in (("G1", (0, 1, 2)), ("G2", (3, 4))):
        rows = [f"{100 + 10 * s},{s},img/{i}.jpg" for s in subjects for i in range(3)]
        (meta / f"ijbt_1N_gallery_{gallery}.csv").write_text("\n".join([head, *rows]) + "\n")
    rows = [f"{101 + 10 * s},{s},img/{i}.jpg" for s in range(5) for i in range(2)]
    (meta / "ijbt_1N_probe_mixed.csv").write_text("\n".join([head, *rows]) + "\n")
    return tmp_path


def test_the_layout_is_read(folder):
    protocol = read_templates(folder)
    assert len(protocol.names) == 36
    assert protocol.points.shape == (36, 5, 2)
    assert protocol.score[3] == pytest.approx(0.8)
    assert protocol.points[4] == pytest.approx(POINTS_112 / 2 + 1, abs=1e-3)
    assert protocol.pairs.shape == (36, 2)
    assert protocol.genuine.sum() == 6
    assert [list(g.subjects) for g in protocol.galleries] == [[0, 1, 2], [3, 4]]
    assert list(protocol.probes.templates) == [101, 111, 121, 131, 141]


def plain_pool(x, template, media, weights):
    out = {}
    for t in sorted(set(template)):
        total = 0
        for m in sorted(set(media[template == t])):
            rows = (template == t) & (media == m)
            total = total + (x[rows] * weights[rows, None]).sum(0) / rows.sum()
        out[t] = total / np.linalg.norm(total)
    return np.array(list(out)), np.array(list(out.values()))


@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_agrees_with_a_loop(weighted):
    generator = np.random.default_rng(0)
    x = unit(generator.normal(size=(200, 6)))
    template, media = generator.integers(0, 20, 200) * 3, generator.integers(0, 4, 200)
    weights = generator.uniform(0.1, 1, 200) if weighted else np.ones(200)
    numbers, pooled = pool(x, template, media, weights if weighted else None)
    expected_numbers, expected = plain_pool(x, template, media, weights)
    assert list(numbers) == list(expected_numbers)
    assert pooled == pytest.approx(expected, abs=1e-5)
    assert pooled.dtype == np.float32


@pytest.mark.parametrize("by_score", [False, True])
def test_images_are_weighed_by_score_and_by_each_models_own_norms(folder, by_score):
    protocol = read_templates(folder)
    generator = np.random.default_rng(0)
    native = {role: unit(generator.normal(size=(36, 8))) for role in ("old", "new")}
    norms = {role: generator.uniform(5, 30, 36) for role in native}
    models = {role: SimpleNamespace(hash=role, card=SimpleNamespace(transforms={}, compatible_with_hash=None))
              for role in native}  # fmt: skip
    numbers, pooled = pool_spaces(Spaces(native, carried(models, native), norms), protocol, models, by_score)
    for role in native:
        weights = norms[role] * (protocol.score if by_score else 1)
        expected_numbers, expected = plain_pool(native[role], protocol.template, protocol.media, weights)
        assert list(numbers) == list(expected_numbers)
        assert pooled.native[role] == pytest.approx(expected, abs=1e-5)
    assert pooled.view("new", "old")[2] == "direct"


def test_both_protocols_by_hand(folder):
    protocol = read_templates(folder)
    subject, part = (protocol.template - 100) // 10, protocol.template % 10
    vectors = unit(np.eye(6)[subject] + 0.1)
    probe_of_2 = (subject == 2) & (part == 1)
    vectors[probe_of_2] = unit(np.array([[0, 3, 2, 0, 0, 0]]))  # looks like subject 1
    numbers, templates = pool(vectors, protocol.template, protocol.media)
    measured = measure_templates(
        protocol, Spaces({"old": templates, "new": templates}), numbers, (0.03, 0.04), 20, 0, fpirs=(0.5,)
    )
    cell = measured["cells"]["new->old"]
    assert (measured["templates"], measured["images"]) == (12, 36)
    # The best of 30 impostor pairs is (1, the probe of 2): it may pass at the second FAR, not at the first.
    assert [entry["value"] for entry in cell["verification"]["tar"]] == pytest.approx([5 / 6, 1.0])
    one_to_n = cell["identification"]
    assert one_to_n["rank"][1] == pytest.approx(4 / 5)
    assert one_to_n["rank"][5] == 1.0
    assert (one_to_n["enrolled"], one_to_n["probes"]) == (5, 5)
    # G1: subjects 0 and 1 found, 2 wrong; G2: both found; strangers score low in both.
    assert one_to_n["tpir"][0.5] == pytest.approx((2 / 3 + 1) / 2)


def test_alignment_brings_the_points_to_their_place():
    generator = np.random.default_rng(0)
    turn, scale, shift = 0.3, 1.4, np.array([20, 35])
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = POINTS_112 @ rotation.T + shift
    picture = np.zeros((260, 260, 3), np.uint8)
    for (x, y), value in zip(points, (50, 100, 150, 200, 250), strict=True):
        picture[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] = value
    aligned = np.asarray(align(Image.fromarray(picture), points))
    for (x, y), value in zip(POINTS_112, (50, 100, 150, 200, 250), strict=True):
        assert abs(int(aligned[round(y), round(x), 0]) - value) <= 2
    noisy = align(Image.fromarray(picture), points + generator.normal(0, 0.1, points.shape))
    assert np.abs(np.asarray(noisy).astype(int) - aligned.astype(int)).mean() < 2


def test_images_are_aligned_when_read(folder):
    images = AlignedImages(read_templates(folder), (112, 112))
    assert len(images) == 36
    pixels = images.decode(35)
    assert pixels.shape == (112, 112, 3)
    assert abs(int(pixels[60, 60, 0]) - 200) < 6
    moved = read_templates(folder)
    moved = replace(moved, points=moved.points + 30)
    beginnings = {AlignedImages(one, (112, 112)).fingerprint[:16] for one in (moved, read_templates(folder))}
    assert len(beginnings) == 2  # the same files, seen elsewhere; a cache's names have the beginning
    assert images.fingerprint[:16] in beginnings
    (folder / "loose_crop" / "7.jpg").write_bytes(b"no picture")
    beginnings.add(AlignedImages(read_templates(folder), (112, 112)).fingerprint[:16])
    assert len(beginnings) == 3  # another file
    with pytest.raises(DataError, match=r"7\.jpg does not decode"):
        images.decode(7)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ijbt_face_tid_mid.txt", None, r"no \*_face_tid_mid.txt"),
        ("ijbt_face_tid_mid.txt", "0.jpg 100\n", "line 1: expected 3 columns"),
        ("ijbt_face_tid_mid.txt", "0.jpg 100 x\n", "is no number"),
        ("ijbt_name_5pts_score.txt", "9.jpg 1 2 3 4 5 6 7 8 9 10 0.5\n", "0.jpg is in the template list"),
        ("ijbt_template_pair_label.txt", "100 101\n", "expected three columns"),
        ("ijbt_template_pair_label.txt", "100 a 1\n", "ijbt_template_pair_label.txt"),
        ("ijbt_1N_gallery_G1.csv", "TEMPLATE_ID\n100\n", "expected template and subject"),
    ],
)
def test_damaged_protocols_are_refused(folder, file, text, message):
    path = folder / "meta" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_templates(folder)


@pytest.mark.parametrize(
    ("column", "text", "weighted", "message"),
    [
        (11, "nan", True, "it must be finite and above 0"),
        (11, "0", True, "it must be finite and above 0"),
        (11, "-0.5", True, "it must be finite and above 0"),
        (11, "-0.5", False, None),  # not asked for
        (11, "high", False, "is no number"),
        (3, "inf", False, "five points are not all finite"),
    ],
)
def test_points_and_scores_that_are_no_use_are_named(folder, column, text, weighted, message):
    path = folder / "meta" / "ijbt_name_5pts_score.txt"
    lines = path.read_text().splitlines()
    words = lines[4].split()
    words[column] = text
    lines[4] = "\n" + " ".join(words)  # an empty line before it counts
    path.write_text("\n".join(lines))
    if message is None:
        assert read_templates(folder, weighted).score.min() < 0
        return
    with pytest.raises(DataError, match=rf"ijbt_name_5pts_score\.txt: line 6: {words[0]}: .*{message}"):
        read_templates(folder, weighted)


def test_a_protocol_in_another_encoding_is_refused(folder):
    for file in ("ijbt_face_tid_mid.txt", "ijbt_template_pair_label.txt", "ijbt_1N_gallery_G1.csv"):
        path = folder / "meta" / file
        whole = path.read_bytes()
        path.write_bytes(b"\xff\xfe" + whole)
        with pytest.raises(DataError, match=file):
            read_templates(folder)
        path.write_bytes(whole)


def test_templates_are_unit_or_refused():
    x = unit(np.array([[1, 0], [-1, 0], [0, 1]]))
    template, media = np.array([4, 4, 7]), np.array([0, 1, 0])
    with pytest.raises(DataError, match=r"template 4: .* no direction"):
        pool(x, template, media)
    assert pool(x, template, media, np.array([0.5, 1, 1]))[1][0] == pytest.approx([-1, 0])
    for weight in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(DataError, match=r"template 4: image 1 weighs .*; weights must be finite and above 0"):
            pool(x, template, media, np.array([1, weight, 1]))


def test_a_template_without_images_is_named(folder):
    (folder / "meta" / "ijbt_template_pair_label.txt").write_text("100 999 0\n100 101 1\n")
    protocol = read_templates(folder)
    numbers, templates = pool(unit(np.ones((36, 4))), protocol.template, protocol.media)
    with pytest.raises(DataError, match="template 999 is asked for but has no images"):
        measure_templates(protocol, Spaces({"old": templates, "new": templates}), numbers, (0.1,), 5, 0)


def test_a_million_pairs_take_about_a_second():
    generator = np.random.default_rng(0)
    left, right = unit(generator.normal(size=(230, 512))), unit(generator.normal(size=(20_000, 512)))
    first, second = np.repeat(np.arange(230), 4400), generator.integers(0, 20_000, 230 * 4400)
    start = time.process_time()
    cosines = pair_cosines(left, right, first, second)
    assert time.process_time() - start < 10  # about 1 alone; 15.6 times as many are IJB-C's
    at = generator.integers(0, len(first), 20)
    assert cosines[at] == pytest.approx(np.einsum("nd,nd->n", left[first[at]], right[second[at]]), abs=1e-5)
