"""The page of results: written from figures that are there, says what is missing, measures what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import cli
from tools.results import results

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks"
SPREAD = {"mean": 0.5, "deviation": 0.1, "seeds": 3}


def compat_figures(classes: int) -> dict[str, object]:
    cells = {"TAR@FAR=1e-4": SPREAD, "rank-1": SPREAD}
    spread = dict.fromkeys(("new->old", "new->new", "update_gain", "cost"), cells)
    trials = [
        {"weight": w, "validation": {c: {"TAR@FAR=1e-4": w / 100, "rank-1": 0.9} for c in ("new->old", "old->old")}}
        for w in (2.0, 20.0)
    ]
    lce = {
        "title": "LCE, direct",
        "weight": 20.0,
        "trials": trials,
        "problems": [],
        "seeds": [],
        "spread": spread,
        "update_time": 1.0625,
    }
    sizes = {"classes": classes, "old_classes": 500, "steps": 800, "seeds": 3, "trials": 2}
    origin = {"machine": "a machine", "commit": "abc", "chosen_by": "validation"}
    base = {"old->old": cells, "centre->old": cells, "paragon->paragon": cells}
    return {"data": "characters", **sizes, **origin, "base": base, "methods": {"lce": lce}}


def changes_figures() -> dict[str, object]:
    cells = {cell: dict.fromkeys(("TAR@FAR=1e-4", "rank-1"), 0.5) for cell in ("old->old", "new->old")}
    lce = {"met": False, "by": {"TAR@FAR=1e-4": False, "rank-1": True}, "method": "lce-backward", "seeds": [cells]}
    bct = {"met": False, "reason": "not possible"}
    line = {"kind": "dimension", "change": "64 → 128", "dims": [64, 128], "cells": {"lce": lce, "bct": bct}}
    sizes = {"data": "characters", "classes": 4000, "old_classes": 2000, "steps": 800, "old_steps": 800, "seeds": 1}
    methods = {"methods": {"lce": "LCE", "bct": "BCT"}, "weights": {"lce": 19.0, "bct": 3.1}}
    return {**sizes, **methods, "lines": [line], "machine": "a machine", "commit": "abc"}


def test_the_page_has_tables_plots_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "figures", tmp_path / "docs" / "results.md"
    figures.mkdir()
    given = {"compat.json": 4000, "compat-hangul-long.json": 9772, "compat-both-long.json": 37321}
    given |= {f"compat-{classes}.json": classes for classes in results.FEWER_OR_MORE}
    for name, classes in given.items():
        (figures / name).write_text(json.dumps(compat_figures(classes)))
    (figures / "changes.json").write_text(json.dumps(changes_figures()))
    assert cli.main(["bench", "results", "--figures", str(figures), "--out", str(page)]) == 0
    assert "compat-both.json" in capsys.readouterr().out
    text = page.read_text()
    assert "| LCE, direct | 20 | 0.500 ± 0.100 |" in text
    assert "0.500 ± 0.100 | 1.06 |" in text
    assert text.count("Not measured yet.") == len(results.SECTIONS) - len(given) - 1
    assert "| dimension | 64 → 128 | 0.500 / 0.500 | 0.500 / 0.500 not by TAR, backward | not possible |" in text
    assert "`lce bench compat --methods" in text
    for plot in results.PLOTS:
        assert f"pictures/{plot}" in text
        assert (page.parent / "pictures" / plot).stat().st_size > 5000


@pytest.mark.parametrize("section", results.SECTIONS, ids=lambda section: section.file)
def test_json_of_another_shape_is_named(
    section: results.Section, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("{}", "[1]", '"x"'):
        (tmp_path / section.file).write_text(text)
        assert cli.main(["bench", "results", "--figures", str(tmp_path), "--out", str(tmp_path / "results.md")]) == 2
        error = capsys.readouterr().err
        assert f"{section.file}: not what its benchmark writes" in error
        assert len(error.strip().splitlines()) == 1


def test_the_committed_figures_can_be_shown(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    assert cli.main(["bench", "results", "--figures", str(COMMITTED), "--out", str(page)]) == 0
    assert "1.08" in page.read_text()  # a peak over its state, in the head's table


def test_a_run_in_which_lce_failed_is_shown(tmp_path: Path) -> None:
    for name in ("compat.json", results.LONG_RUN, *(f"compat-{classes}.json" for classes in results.FEWER_OR_MORE)):
        figures = json.loads((COMMITTED / name).read_text())
        failed = {"seeds": [], "spread": {}, "trials": [], "problems": ["lce-19, seed 0: it diverged"]}
        figures["methods"]["lce"] |= failed
        (tmp_path / name).write_text(json.dumps(figures))
        page = tmp_path / "results.md"
        assert cli.main(["bench", "results", "--figures", str(tmp_path), "--out", str(page)]) == 0
        assert "LCE, direct: lce-19, seed 0: it diverged" in page.read_text()
        assert "**LCE** takes" not in page.read_text()


def test_measuring_runs_every_command_and_goes_on_after_a_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import steps as demo_steps

    ran = []

    def run_lce(words: list[str], stdout: int | None = None) -> None:
        ran.append(words)
        if words[1] == "criterion":
            raise demo_steps.StepFailed("lce bench criterion", 1)
        if words[1] == "million":
            raise demo_steps.StepFailed("lce bench million", 70)

    monkeypatch.setattr(demo_steps, "run_lce", run_lce)
    fonts = tmp_path / "fonts"
    words = ["bench", "results", "--measure", "--figures", str(tmp_path / "f"), "--work", str(tmp_path / "w")]
    words += ["--fonts", str(fonts), "--out", str(tmp_path / "results.md")]
    assert cli.main(words) == 2  # no typefaces
    fonts.mkdir()
    assert cli.main(words) == 70
    assert [w[1] for w in ran if w[0] == "bench"] == [
        *["compat"] * 12,
        *["criterion"] * 2,
        "chain",
        "changes",
        "table",
        "head",
        "million",
    ]
    assert not any("{" in word for command in ran for word in command)


def test_the_ways_of_deploying_have_verdicts_and_pooled_galleries_none() -> None:
    found = {"value": 0.5, "low": None, "high": None}
    way = {"way": "new → old", "meaning": "as they are", "tar": found, "rank-1": found, "answer": "SAFE"}
    pooled = {"name": "new → old", "tar": [0.75, 0.8], "rank1": {"value": 0.875}, "protocol": "template protocol"}
    one = {"identities": 1000, "images": 5000, "far": 1e-4, "deployments": [way], "pooled": [pooled]}
    figures = {"sets": {"unseen": one}, "verdict": {"answer": "SAFE"}, "provenance": {"commit": "abc"}}
    text = results._deployments(figures)
    assert "| new → old | 0.500 | 0.500 | SAFE | as they are |" in text
    assert "| new → old, pooled | 0.750 | 0.875 | – | |" in text
    assert "TAR at FAR 1e-4" in text


def test_every_command_is_one_that_the_program_understands() -> None:
    parser = cli.build_parser()
    for section in results.SECTIONS:
        for command in section.commands:
            words = [w.format(json="x.json", figures="f", work="w", fonts="f") for w in command.split()]
            assert parser.parse_args(words).command == words[0]


def test_the_headline_says_where_lce_stands_and_where_it_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def method(title: str, tar: float, rank: float, deviation: float) -> dict[str, Any]:
        found = {results.METRIC: (tar, deviation), "rank-1": (rank, deviation)}
        cells = {key: {"mean": mean, "deviation": spread} for key, (mean, spread) in found.items()}
        gain = {results.METRIC: {"mean": 0.44, "deviation": None}}
        own = {cell: {results.METRIC: value} for cell, value in (("old->old", 0.3), ("paragon->paragon", 0.9))}
        seeds = [
            {"seed": seed, "cells": own | {"new->old": {m: mean + by * spread for m, (mean, spread) in found.items()}}}
            for seed, by in enumerate((-1, 0, 1))
        ]
        return {"title": title, "seeds": seeds, "spread": {"new->old": cells, "new->new": cells, "update_gain": gain}}

    def run(lce: tuple[float, float], bct: tuple[float, float], classes: int) -> dict[str, Any]:
        own = method("alone", 0.3, 0.8, 0.0)["spread"]["new->old"]
        methods = {"independent": method("independent", 0.99, 0.99, 0.0), "lce": method("LCE", *lce, 0.01)}
        methods["bct"] = method("BCT", *bct, 0.02)
        base = {"old->old": own, "paragon->paragon": own}
        return {"classes": classes, "steps": 9000, "seeds": 3, "methods": methods, "base": base}

    known: dict[str, Any] = dict.fromkeys(one.file for one in results.SECTIONS)
    assert results.headline(known) == ""
    known["compat-hangul-long.json"] = run((0.6, 0.97), (0.1, 0.1), 9772)
    known["compat.json"] = run((0.63, 0.95), (0.5, 0.94), 4000)
    known["compat-both.json"] = run((0.615, 0.9), (0.6, 0.96), 37321)
    text = results.headline(known)
    assert "from 0.300 / 0.800 (TAR at FAR 1e-4 / rank-1) to 0.600 / 0.970, 44% of the way" in text
    assert "at no cost to its own TAR (9,772 identities" in text
    ahead, level, behind = (line for line in text.splitlines() if line.startswith("- "))
    apart = "+0.130 [+0.105, +0.155]"  # ± 4.30 · 0.01 / √3, Student's t of three differences
    assert f"ahead in TAR with 4,000 identities after 9,000 updates (0.630 against BCT's 0.500: {apart})," in ahead
    assert "rank-1 with 4,000 identities after 9,000 updates (0.950 against BCT's 0.940: +0.010 [-0.015" in level
    assert "TAR with 37,321" in level
    assert "loses in rank-1 with 37,321 identities after 9,000 updates (0.900 against BCT's 0.960: -0.060" in behind
    assert "quicker learning" not in text  # all of the longest
    known["compat.json"]["steps"] = 800
    assert "Comparisons after fewer than 9,000 updates" in results.headline(known)
    lce = known["compat-hangul-long.json"]["methods"]["lce"]["spread"]
    lce["update_gain"] = {results.METRIC: None}  # the paragon is no better than the old model
    del known["compat-both.json"]
    for run_of in ("compat.json", "compat-hangul-long.json"):
        for one in ("lce", "bct"):
            methods = known[run_of]["methods"]
            methods[one]["seeds"] = methods[one]["seeds"][:1]
    text = results.headline(known)
    assert "to 0.600 / 0.970, at no cost" in text
    assert "- clearly ahead in none;" in text
    assert "(0.630 against BCT's 0.500; one training run each: no verdict)" in text


def test_the_headline_names_what_others_win_in_chains_and_under_changes() -> None:
    def chain(title: str, end: float, drift: float) -> dict[str, Any]:
        cells = {results.METRIC: end, "rank-1": 0.9}
        return {"title": title, "cells": {"2->1": cells}, "summary": {"average": cells, "drift": {"2": drift}}}

    methods = {"lce": chain("LCE", 0.6, 0.2), "bct": chain("BCT", 0.5, 0.1), "l2": chain("L2", 0.6, 0.2)}
    text = results._chain_losses({"identities": [500, 4000], "methods": methods})
    assert text == "In a chain of 2 models, one training run each, ahead of LCE: BCT in drift (0.100 against 0.200)."
    del methods["bct"]
    assert results._chain_losses({"identities": [500, 4000], "methods": methods}) == ""
    changes = changes_figures()
    assert results._change_losses(changes) == ""
    lines: Any = changes["lines"]
    cells = {"new->old": {results.METRIC: 0.6, "rank-1": 0.4}}
    lines[0]["cells"]["bct"] = {"met": True, "by": {}, "method": "bct", "seeds": [cells]}
    assert "another method has more for 64 → 128 in TAR (BCT 0.600, LCE 0.500)." in results._change_losses(changes)


def test_a_page_holds_the_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "headline", lambda known: "the sentence")
    assert "\nthe sentence\n" in results.page(dict.fromkeys(one.file for one in results.SECTIONS), [])
