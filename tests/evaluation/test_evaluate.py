"""The command on real files: two small models, pictures in folders, verdict, JSON, report, cache, refusals."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests import forked
from tests.evaluation.samples import identities
from tests.sections import variant
from tools import cli
from trainer.evaluation.templates import POINTS_112
from trainer.models.card import ModelCard, TransformCard
from trainer.models.folder import save_model
from trainer.models.onnx_export import export_onnx
from trainer.models.open import load_model
from trainer.networks import build_backbone
from trainer.networks.config import AnyTransform, BackboneConfig
from trainer.networks.transform import build_transform


def pictures(folder, classes, images, seed, size=32):
    """A folder per identity with noisy copies of a random smooth pattern."""
    generator = np.random.default_rng(seed)
    for c in range(classes):
        pattern = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        (folder / f"person-{c}").mkdir(parents=True)
        for i in range(images):
            noisy = np.asarray(pattern, np.float64) + generator.normal(0, 40, (size, size, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"person-{c}" / f"{i}.png")
    return folder


def model(folder, seed, dim=16, size=32, transforms=None):
    """A small network with random weights as a model folder."""
    torch.manual_seed(seed)
    config = BackboneConfig(name="small", dim=dim)
    cards = {
        d: TransformCard(config=variant(AnyTransform, name="linear"), dim_in=i, dim_out=o)
        for d, (i, o) in (transforms or {}).items()
    }
    modules = {d: build_transform(c.config, c.dim_in, c.dim_out) for d, c in cards.items()}
    card = ModelCard(backbone=config, dim=dim, image_size=(size, size), transforms=cards)
    save_model(folder, build_backbone(config, (size, size)), card, modules)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    pictures(folder / "unseen", 24, 4, seed=1)
    pictures(folder / "seen", 8, 3, seed=2)
    for name, seed in (("old", 1), ("other", 2)):
        model(folder / name, seed)
    model(folder / "wide", 3, dim=24)
    model(folder / "mapped", 3, dim=24, transforms={"t21": (24, 16), "t12": (16, 24)})
    model(folder / "mapped2", 4, dim=20, transforms={"t21": (20, 24)})
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run:\n  seed: 5\n")
    lines = [{"step": s, "loss": 9 / (s + 1), "alignment": 1 / (s + 1), "lr": 0.1} for s in range(30)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def this_command_alone(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", ("evaluate",))


def evaluate(place, *extra, old="old", new="other", data=("unseen",)):
    sets = [f"{name}={place / name}" for name in data]
    fixed = ["--fars", "1e-2,1e-1", "--replicates", "100", "--cache", str(place / "cache"), "--device", "cpu"]
    models = ["--old", str(place / old), "--new", str(place / new)]
    return cli.main(["evaluate", *models, *(["--data", *sets] if sets else []), *fixed, *extra])


def test_the_whole_command(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report, result = place / "out.html", place / "out.json"
    models = ["--paragon", str(place / "other"), "--runs", str(place / "run")]
    status = evaluate(
        place,
        *models,
        "--report",
        str(report),
        "--pictures",
        "--json",
        str(result),
        "--fail-unsafe",
        data=("unseen", "seen"),
    )
    assert status == 1  # independent networks
    found = json.loads(result.read_text())
    assert found["verdict"]["answer"] == "NOT SAFE"
    assert set(found["sets"]) == {"unseen", "seen"}
    assert found["models"]["old"]["dimension"] == 16
    assert found["provenance"]["lce-trainer"]
    assert found["sets"]["unseen"]["flips"]["worst_identities"][0]["lost"] > 0
    centre = found["sets"]["unseen"]["centre->old"]
    assert centre["rank-1"] > found["sets"]["unseen"]["cells"]["old->old"]["rank"]["1"]["value"]
    page = report.read_text()
    assert "NOT SAFE" in page
    assert f"(made of the images that are not searched for) has TAR@FAR={next(iter(centre)).partition('=')[2]}" in page
    assert f"rank-1 {centre['rank-1']:.3f}. That is where LCE pulls new embeddings. It is no upper bound" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)  # nothing is loaded from elsewhere
    assert "<h1>May other query the gallery of old?</h1>" in page
    assert f"<dd>{found['provenance']['date']}</dd>" in page
    assert "This file holds pictures of the data sets." in page
    assert page.count('class="plot"') == 1 + 2 * 3 + 2  # criterion; ROC, scores, backfill a set; loss and alignment
    assert "seed: 5" in page
    assert page.count("data:image/png;base64") > 20  # the pictures are small: PNG
    plots = sorted(p.name for p in (place / "out-plots").iterdir())
    assert len(plots) == 9
    assert "unseen-roc.png" in plots
    printed = capsys.readouterr().out
    assert "NOT SAFE" in printed
    assert "new → old" in printed
    assert "update gain" in printed
    assert "TAR@FAR=0.1" in printed
    assert "…" not in printed  # nothing is cut at 80 columns
    assert f"report: {report}; its plots as files: {report.with_suffix('')}-plots\n" in printed
    assert f"→ {found['verdict']['next'][0]}" in printed
    assert evaluate(place, "--report", str(report)) == 0
    page = report.read_text()
    assert "data:image/png" not in page  # faces are not mailed around unasked
    assert "holds pictures" not in page


def test_json_to_standard_output_is_all_there_is_on_it(place, capsys):
    assert evaluate(place, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["answer"] == "NOT SAFE"


def test_the_cache_is_used_and_a_damaged_entry_is_replaced(place, monkeypatch, capsys):
    import trainer.evaluation.embeddings as sources

    assert evaluate(place) == 0
    calls = []
    embed = sources.embed_dataset
    monkeypatch.setattr(sources, "embed_dataset", lambda *a, **k: calls.append(a) or embed(*a, **k))
    assert evaluate(place) == 0
    assert calls == []
    for file in (place / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert evaluate(place) == 0
    assert len(calls) == 2
    assert evaluate(place, "--flip") == 0  # other embeddings
    assert len(calls) == 4
    capsys.readouterr()


def test_a_transformation_is_applied_where_it_belongs(place, capsys):
    assert evaluate(place, "--json", "-", new="mapped") == 0
    cells = json.loads(capsys.readouterr().out)["sets"]["unseen"]["cells"]
    assert cells["new->old"]["how"] == "t21"
    assert cells["old->new"]["how"] == "t12"  # T₁₂ carries old queries into the new space
    assert cells["old->new"]["title"] == "T₁₂(old) → new"


def test_the_converted_gallery_has_its_own_row_threshold_and_verdict(place, capsys, monkeypatch):
    assert evaluate(place, "--json", "-", "--gallery", "pooled", new="mapped") == 0
    one = json.loads(capsys.readouterr().out)["sets"]["unseen"]
    rows = {row["way"]: row for row in one["deployments"]}
    assert list(rows) == [
        "old → old", "T₂₁(new) → old", "new → T₁₂(old)", "new → new", "new → mixed, one threshold",
        "new → mixed, two thresholds", "T₂₁(new) → old, expanded",
    ]  # fmt: skip
    converted = rows["new → T₁₂(old)"]
    assert converted["answer"] == "NOT SAFE"  # maps with random weights
    assert [row["name"] for row in one["pooled"]] == ["old → old", "T₂₁(new) → old", "new → T₁₂(old)", "new → new"]
    monkeypatch.setenv("COLUMNS", "200")
    assert evaluate(place, "--report", str(place / "ways.html"), new="mapped") == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "new → T₁₂(old)" in line)
    assert f"{converted['thresholds']['all']:.4f}" in line  # what docs/gallery-upgrade.md asks for
    assert "NOT SAFE" in line
    assert "Do not convert the gallery by T₁₂" in printed.replace("\n", " ")
    page = (place / "ways.html").read_text()
    assert "Ways of deploying" in page
    assert "pooled by identity" not in page


def test_of_embeddings_on_disk_only_a_declaration_tells_who_was_trained_on(tmp_path, capsys):
    old, labels = identities(24, 3, noise=1.6, seed=1)
    centres = np.stack([old[labels == label].mean(0) for label in labels])
    rows = {"old_embeddings": old, "new_embeddings": 2 * (old + 2 * centres), "labels": labels}
    given = ["evaluate", "--fars", "1e-2", "--replicates", "100", "--json", "-"]
    for name, values in rows.items():
        np.save(tmp_path / f"{name}.npy", values)
        given += [f"--{name.replace('_', '-')}", str(tmp_path / f"{name}.npy")]

    def verdict(*declared):
        assert cli.main([*given, *declared]) == 0
        return json.loads(capsys.readouterr().out)["verdict"]

    silent = verdict()
    assert silent["answer"] == "SAFE"
    assert silent["caveats"] == [
        "Not known is whether identities were trained on: embeddings (declare the set seen or unseen)."
    ]
    fresh = verdict("--unseen", "embeddings")
    assert fresh["answer"] == "SAFE"
    assert fresh["caveats"] == ["Declared to be identities that nobody was trained on: embeddings."]
    known = verdict("--seen", "embeddings")
    assert known["answer"] == "NOT ENOUGH DATA"
    assert known["caveats"][0] == "No set of identities that nobody was trained on was given."
    for wrong, reason in (
        (["--seen", "others"], "--seen others: no labelled set has this name; there are: embeddings"),
        (["--flip"], "--flip: not with embeddings on disk, which are evaluated as they are; leave it out"),
        (["--norm-weights"], "--norm-weights: not with"),
        (["--score-weights"], "--score-weights: not with"),
        (["--pictures", "--report", str(tmp_path / "r.html")], "--pictures: not with"),
        (["--cache", str(tmp_path / "cache")], "--cache: not with"),
        (["--no-colour-check"], "--no-colour-check: not with"),
        (["--mean", "0"], "--mean: not with"),
    ):
        assert cli.main([*given, *wrong]) == 2
        assert reason in capsys.readouterr().err


def test_pair_lists_and_templates_stand_beside_the_labelled_sets(place, capsys, monkeypatch):
    files = sorted((place / "unseen").glob("*/*.png"))
    pairs = [(a, b) for a in files[:40] for b in files[:40] if a < b]
    same = [a.parent == b.parent for a, b in pairs]
    images = [file.read_bytes() for pair in pairs for file in pair]
    (place / "lfw.bin").write_bytes(pickle.dumps((images, same)))
    lines = [
        f"{a.relative_to(place / 'unseen')} {b.relative_to(place / 'unseen')} {int(s)}"
        for (a, b), s in zip(pairs, same, strict=True)
    ]
    (place / "pairs.txt").write_text("\n".join(lines))
    write_templates(place / "ijb", files)
    lists = [f"lfw={place / 'lfw.bin'}", f"listed={place / 'pairs.txt'}@{place / 'unseen'}"]
    more = ["--pairs", *lists, "--templates", f"ijb={place / 'ijb'}", "--score-weights"]
    assert evaluate(place, *more, "--json", "-", "--report", str(place / "more.html"), new="mapped", data=()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["answer"] == "NOT ENOUGH DATA"  # none of these knows identities
    lfw, listed = (found["pair_sets"][name]["cells"]["old->old"] for name in ("lfw", "listed"))
    assert lfw["accuracy"] == listed["accuracy"]
    assert lfw["accuracy"]["mean"] > 0.9
    assert found["pair_sets"]["lfw"]["cells"]["new->old"]["how"] == "t21"
    cell = found["template_sets"]["ijb"]["cells"]["old->old"]
    assert cell["verification"]["tar"][-1]["value"] > 0.5
    assert cell["identification"]["enrolled"] == 20
    page = (place / "more.html").read_text()
    assert "Pair lists" in page
    assert "Template sets" in page
    assert page.count('class="plot"') == 3  # a ROC each
    assert sorted(p.name for p in (place / "more-plots").iterdir()) == [
        "pairs_lfw-roc.png", "pairs_listed-roc.png", "templates_ijb-roc.png",
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    assert evaluate(place, *more, new="mapped", data=()) == 0
    printed = capsys.readouterr().out
    assert f"{lfw['accuracy']['mean']:.4f}" in printed
    assert f"{lfw['tar'][0]['value']:.3f}" in printed
    assert "48 templates of 96 images" in printed
    for name in ("accuracy", "1:1", "1:N", "TPIR@FPIR 1e-2", "new → old", "NOT ENOUGH DATA"):
        assert name in printed
    only = more[3:]
    assert evaluate(place, *only, "--norm-weights", "--json", "-", new="mapped", data=()) == 0
    weighed = json.loads(capsys.readouterr().out)
    assert weighed["settings"]["norm_weights"] is True
    assert weighed["template_sets"] != found["template_sets"]
    export_onnx(load_model(place / "old"), place / "old.onnx", np.zeros((1, 32, 32, 3), np.uint8))
    assert evaluate(place, *only, "--norm-weights", old="old.onnx", data=()) == 2  # unit embeddings have no norms
    assert "gives unit embeddings" in capsys.readouterr().err
    assert evaluate(place, *only, "--json", "-", old="old.onnx", new="mapped", data=()) == 0
    again = json.loads(capsys.readouterr().out)["template_sets"]["ijb"]["cells"]
    same = found["template_sets"]["ijb"]["cells"]["new->old"]["identification"]["rank"]
    assert again["new->old"]["identification"]["rank"] == pytest.approx(same, abs=0.06)


def test_several_ranks_share_the_work_and_find_the_same(place, capsys):
    words = ["--fars", "1e-2", "--replicates", "100", "--cache", "none", "--fail-unsafe", "--json"]
    assert evaluate(place, *words, str(place / "one.json"), new="mapped") == 1  # not safe
    alone = capsys.readouterr().out
    models = ["--old", str(place / "old"), "--new", str(place / "mapped"), "--data", f"unseen={place / 'unseen'}"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tools.cli"]
    command = [*start, "evaluate", *models, "--device", "cpu", *words, str(place / "two.json")]
    done = forked.run(command)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "SIG" not in done.stderr, done.stderr[-4000:]
    assert "→" in alone
    assert done.stdout.count("NOT SAFE") == alone.count("NOT SAFE")  # one rank alone speaks
    one, two = (json.loads((place / f"{n}.json").read_text())["sets"]["unseen"]["cells"] for n in ("one", "two"))
    for name, cell in one.items():
        for metric in ("eer", "auc"):
            assert two[name][metric] == pytest.approx(cell[metric], abs=1e-3)


def test_a_chain_of_models(place, capsys):
    between = ["--between", f"v2={place / 'mapped'}"]
    assert evaluate(place, *between, "--json", "-", new="mapped2") == 0
    found = json.loads(capsys.readouterr().out)
    cells = found["sets"]["unseen"]["cells"]
    assert len(cells) == 9
    assert cells["new->old"]["how"] == "t21"  # by two maps, 20 → 24 → 16
    assert [s["gallery"] for s in found["verdict"]["sets"]] == ["old", "v2"]
    assert {(c["query"], c["gallery"]) for c in found["sets"]["unseen"]["chain"]} == {
        ("v2", "old"), ("new", "old"), ("new", "v2"),
    }  # fmt: skip
    assert evaluate(place, *between) == 2  # "other" has no map to the 24 dimensions of v2
    assert "dimension 16 against 24" in capsys.readouterr().err
    assert evaluate(place, "--between", f"new={place / 'mapped'}", new="mapped2") == 2
    assert "this name is taken" in capsys.readouterr().err


def test_a_wrong_colour_order_is_refused(place, capsys):
    generator = np.random.default_rng(0)
    for c in range(20):
        (place / "blue" / f"{c}").mkdir(parents=True)
        pattern = generator.integers(0, 256, (32, 32))
        for i in range(3):
            noise = generator.integers(0, 256, (32, 32))
            image = np.stack([noise, noise, pattern], 2).astype(np.uint8)  # who it is stands in the blue
            Image.fromarray(image).save(place / "blue" / f"{c}" / f"{i}.png")
    torch.manual_seed(0)
    config = BackboneConfig(name="small", dim=16)
    network = build_backbone(config, (32, 32))
    first = next(p for p in network.parameters() if p.ndim == 4)
    with torch.no_grad():
        first[:, 1:] = 0  # sees the red alone
    save_model(place / "red", network, ModelCard(backbone=config, dim=16, image_size=(32, 32)))
    assert evaluate(place, old="red", new="old", data=("blue",)) == 2
    error = capsys.readouterr().err
    assert "better with red and blue swapped" in error
    assert len(error.strip().splitlines()) == 1
    assert evaluate(place, "--no-colour-check", old="red", new="old", data=("blue",)) == 0
    card = ModelCard(backbone=config, dim=16, image_size=(32, 32), color="BGR")
    save_model(place / "red", network, card)
    assert evaluate(place, old="red", new="red", data=("blue",)) == 0
    capsys.readouterr()


def test_embeddings_that_are_no_numbers_are_refused_on_every_kind_of_set(place, capsys):
    torch.manual_seed(0)
    config = BackboneConfig(name="small", dim=16)
    network = build_backbone(config, (32, 32))
    with torch.no_grad():
        next(p for p in network.parameters() if p.ndim == 4)[:] = float("nan")
    save_model(place / "nan", network, ModelCard(backbone=config, dim=16, image_size=(32, 32)))
    (place / "few.txt").write_text("0 1 1\n0 4 0\n" * 10)
    pairs = ["--pairs", f"few={place / 'few.txt'}@{place / 'unseen'}"]
    for words, data in (([], ("unseen",)), (pairs, ())):
        assert evaluate(place, *words, new="nan", data=data) == 2
        assert "embeddings are not finite" in capsys.readouterr().err


def write_templates(folder, files):
    """The pictures as a template protocol: each identity's first two images enrolled, the others probed."""
    (folder / "loose_crop").mkdir(parents=True)
    (folder / "meta").mkdir()
    faces, marks = [], []
    people = sorted({file.parent.name for file in files})
    for number, file in enumerate(files):
        (folder / "loose_crop" / f"{number}.png").write_bytes(file.read_bytes())
        person, image = people.index(file.parent.name), int(file.stem)
        faces.append(f"{number}.png {2 * person + image // 2} {number}")
        marks.append(f"{number}.png {' '.join(f'{v:.2f}' for v in (POINTS_112 * 32 / 112).ravel())} 0.9")
    (folder / "meta" / "t_face_tid_mid.txt").write_text("\n".join(faces))
    (folder / "meta" / "t_name_5pts_score.txt").write_text("\n".join(marks))
    every = [f"{2 * a} {2 * b + 1} {int(a == b)}" for a in range(len(people)) for b in range(len(people))]
    (folder / "meta" / "t_template_pair_label.txt").write_text("\n".join(every))
    for name, chosen in (("G1", range(10)), ("G2", range(10, 20))):
        rows = ["TEMPLATE_ID,SUBJECT_ID", *(f"{2 * p},{p}" for p in chosen)]
        (folder / "meta" / f"t_1N_gallery_{name}.csv").write_text("\n".join(rows))
    rows = ["TEMPLATE_ID,SUBJECT_ID", *(f"{2 * p + 1},{p}" for p in range(20))]
    (folder / "meta" / "t_1N_probe_mixed.csv").write_text("\n".join(rows))


def test_wrong_use_is_one_line_and_status_2(place, capsys):
    def refused(*extra, **kwargs):
        assert evaluate(place, *extra, **kwargs) == 2
        text = capsys.readouterr().err.strip()
        assert len(text.splitlines()) == 1
        return text

    for option in ("--score-weights", "--norm-weights"):  # of labelled sets alone they would weigh nothing
        assert f"{option}: weighs the images of templates" in refused(option, new="mapped")

    assert "dimension 24 against 16" in refused(new="wide")
    assert "no such file or folder" in refused(new="nothing")
    assert "nothing" in refused(data=("nothing",))
    assert "nothing to measure on" in refused(data=())
    assert "expected numbers" in refused("--fars", "a,b")
    assert "between 0 and 1" in refused("--fars", "2")
    assert "does not exist" in refused("--report", str(place / "no" / "such" / "report.html"))
    assert "is a folder" in refused("--report", str(place))
    assert "name it with --report" in refused("--pictures")
    assert "is a folder" in refused("--json", str(place))
    assert "log.jsonl" in refused("--runs", str(place / "old"), "--report", str(place / "r.html"))
    assert "expected NAME=PATH" in refused("--data", "unseen")
    pictures(place / "one", 1, 4, seed=3)
    assert "one identity" in refused(data=("one",))
    pictures(place / "single", 4, 1, seed=3)
    assert "single image" in refused(data=("single",))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--replicates", "99", "at least 100"),
        ("--replicates", "1e2.5", "not a number"),
        ("--seed", "-1", "at least 0"),
        ("--seed", "0.5", "whole number"),
        ("--tolerance", "nan", "at least 0"),
        ("--tolerance", "-1", "at least 0"),
        ("--min-identities", "-1", "at least 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(place, capsys, option, value, expected):
    with pytest.raises(SystemExit) as stopped:
        evaluate(place, option, value)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: {value}: " in error
    assert expected in error
