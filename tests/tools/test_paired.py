"""Paired intervals of two methods, room for an update gain, and how results of two runs are joined."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from tools.output import write_json
from tools.results import compat, results
from tools.results.paired import difference, over_runs, room

METRIC = compat.CRITERION
GENERATOR = np.random.default_rng(1)
SHARED = GENERATOR.normal(0, 0.03, (3, 400))  # what an identity adds to every method


def seeds(
    tar: float, count: int = 3, old: float = 0.4, paragon: float = 0.8, own: float = 0.002
) -> list[dict[str, Any]]:
    """What a method with this TAR found with so many seeds; ``own``: the deviation that it shares with no other."""
    out = []
    for seed in range(count):
        around = SHARED[seed] + GENERATOR.normal(0, own, 400)
        cells = {"old->old": old, "paragon->paragon": paragon, "new->old": tar, "new->new": tar}
        replicates = {metric: (tar + around).round(4).tolist() for metric in compat.METRICS}
        cell = {name: dict.fromkeys(compat.METRICS, value) for name, value in cells.items()}
        gain = {"update_gain": {METRIC: (tar - old) / (paragon - old)}, "cost": {METRIC: paragon - tar}}
        out.append({"seed": seed, "cells": cell, **gain, "replicates": {"new->old": replicates}})
    return out


def method(title: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": title, "weight": 2.0, "seeds": found, "spread": compat.spreads(found), "trials": [], "problems": [],
    }  # fmt: skip


def figures(methods: dict[str, list[dict[str, Any]]], **more: Any) -> dict[str, Any]:
    found = next(iter(methods.values()))
    cells = [{"cells": {**one["cells"], "centre->old": one["cells"]["old->old"]}} for one in found]
    base = {k: v for k, v in compat.spreads(cells).items() if k in ("old->old", "centre->old", "paragon->paragon")}
    made = {"machine": "a machine", "commit": "abc", "chosen_by": "an earlier run", "data": "hangul", "trials": 4}
    sizes = {"classes": 9772, "old_classes": 1222, "steps": 9000, "old_steps": 3000, "seeds": len(found)}
    titles = {"lce": "LCE, direct", "bct": "BCT", "advbct": "AdvBCT"}
    named = {name: method(titles[name], one) for name, one in methods.items()}
    return {**sizes, **made, "overrides": [], "base": base, "methods": named, **more}


def test_what_identities_add_to_both_methods_falls_away() -> None:
    ours, theirs = seeds(0.61, 1), seeds(0.60, 1)
    found = difference(ours, theirs, METRIC)
    assert found is not None
    apart = np.subtract(*(one[0]["replicates"]["new->old"][METRIC] for one in (ours, theirs)))
    assert (found.low, found.high) == pytest.approx(np.quantile(apart, [0.025, 0.975]))
    assert found.value == pytest.approx(0.01)
    assert found.low > 0  # each one's own interval is ± 0.06
    of_three = difference(seeds(0.61), seeds(0.60), METRIC)
    assert of_three is not None
    assert of_three.high - of_three.low < found.high - found.low  # three seeds' own noise, averaged
    late = [{**one, "seed": one["seed"] + 1} for one in seeds(0.7)]
    common = difference(seeds(0.61), late, METRIC)
    assert common is not None
    assert common.value == pytest.approx(-0.09)


def test_seeds_that_disagree_widen_the_interval() -> None:
    ours = seeds(0.61)
    for one, apart in zip(ours, (-0.1, 0.0, 0.1), strict=True):
        cell = one["replicates"]["new->old"]
        cell[METRIC] = [value + apart for value in cell[METRIC]]
        one["cells"]["new->old"][METRIC] += apart
    found = difference(ours, seeds(0.60), METRIC)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.01 - 4.30 * 0.1 / 3**0.5, 0.01 + 4.30 * 0.1 / 3**0.5), abs=1e-3)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("own", "of_runs"), [(0.1, 0.05), (0.1, 0.01), (0.3, 0.0)])
def test_the_interval_covers_the_true_difference(count: int, own: float, of_runs: float) -> None:
    """One of 100 identities differs by ``own`` from the truth, 0.02, and a training run by ``of_runs``."""
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        draws = generator.multinomial(100, np.full(100, 0.01), 100)  # the same of every seed
        of_identities = 0.02 + generator.normal(0, own, 100)
        values = of_identities + generator.normal(0, of_runs, (count, 1)) + generator.normal(0, own / 4, (count, 100))
        ours, theirs = (
            [
                {
                    "seed": seed,
                    "cells": {"new->old": {METRIC: float(scale * value.mean())}},
                    "replicates": {"new->old": {METRIC: (scale * draws @ value / 100).tolist()}},
                }
                for seed, value in enumerate(values)
            ]
            for scale in (1, 0)
        )
        found = difference(ours, theirs, METRIC)
        assert found is not None
        covered += found.low <= 0.02 <= found.high
    assert covered / 400 >= 0.93


def test_older_figures_have_an_interval_over_training_runs_alone() -> None:
    old = [{key: value for key, value in one.items() if key != "replicates"} for one in seeds(0.6)]
    assert difference(old, seeds(0.5), METRIC) is None
    assert difference([], seeds(0.5), METRIC) is None
    fewer = copy.deepcopy(seeds(0.6))
    fewer[1]["replicates"]["new->old"][METRIC].pop()  # other draws
    assert difference(fewer, seeds(0.5), METRIC) is None
    text = compat.markdown(figures({"lce": old, "bct": seeds(0.5)}))
    assert "LCE less each other method, new → old, on the same identities; 95 % intervals, paired over seeds:" in text
    assert "LCE less each other method" not in compat.markdown(figures({"lce": old[:1], "bct": seeds(0.5, 1)}))
    for one, value in zip(old, (0.60, 0.63, 0.66), strict=True):
        one["cells"] = {"new->old": {METRIC: value}}
    found = over_runs(old, [{**one, "cells": {"new->old": {METRIC: 0.5}}} for one in old], METRIC)
    assert found is not None
    assert (found.value, found.high - found.value) == pytest.approx((0.13, 4.30 * 0.03 / 3**0.5))
    assert over_runs(old[:1], old, METRIC) is None


def test_the_table_holds_lces_lead_over_each_method() -> None:
    text = compat.markdown(figures({"lce": seeds(0.61), "bct": seeds(0.60)}))
    assert "95 % intervals, paired over identities and seeds:" in text
    assert text.count("| BCT | +0.010 [+0.00") == 1
    methods = {"lce": seeds(0.61), "bct": seeds(0.60), "advbct": seeds(0.60, 1)}
    text = compat.markdown(figures(methods))
    assert "| LCE − | TAR | rank-1 | over |" in text
    line = next(line for line in text.splitlines() if line.startswith("| AdvBCT | +0.010 [+0.00"))
    assert line.endswith("| identities |")
    assert "paired over identities:" in compat.markdown(figures({name: methods[name] for name in ("lce", "advbct")}))
    assert "| BCT | 2 | 0.600 ± 0.000 | 0.600 ± 0.000 | 0.600 ± 0.000 | 0.600 ± 0.000 | 0.500 ± 0.000 |" in text


def test_a_gain_over_nearly_nothing_is_a_dash_and_a_sentence() -> None:
    found = seeds(0.6)
    for one, paragon in zip(found, (0.41, 0.45, 0.39), strict=True):
        one["cells"]["paragon->paragon"] = dict.fromkeys(compat.METRICS, paragon)
        one["update_gain"] = {METRIC: 0.2 / (paragon - 0.4)}
    wild = figures({"lce": found})
    assert wild["methods"]["lce"]["spread"]["update_gain"][METRIC]["mean"] > 1
    text = compat.markdown(wild)
    line = next(line for line in text.splitlines() if line.startswith("| LCE"))
    assert [cell.strip() for cell in line.split("|")][7] == "–"
    assert "No update gain by TAR: paragon − old is +0.017 [-0.0" in text
    alone = {"old->old": {METRIC: [0.40, 0.41, 0.39]}, "paragon->paragon": {METRIC: [0.41, 0.40, 0.40]}}
    one = figures({"lce": found[:1]}, alone=[{"seed": 0, "replicates": alone}])
    spread = room(one, METRIC)
    assert spread is not None
    assert spread.low < 0 < spread.high
    assert compat.no_gain(one)
    assert not compat.no_gain(figures({"lce": seeds(0.6)}))
    assert room(figures({"lce": seeds(0.6, 1)}), METRIC) is None  # one seed without replicates: nothing is known


def test_the_headline_goes_by_the_paired_interval_and_joins_two_runs() -> None:
    long = figures({"lce": seeds(0.61)})
    rivals = figures({"bct": seeds(0.60, 2)})
    known: dict[str, Any] = dict.fromkeys(one.file for one in results.SECTIONS)
    known |= {results.LONG_RUN: long, "compat-hangul-rivals.json": rivals}
    text = results.headline(known)
    assert "clearly ahead in TAR with 9,772 identities after 9,000 updates (0.610 against BCT's 0.600: +0.0" in text
    assert "by the 95 % interval of the difference (over training runs and, where" in text
    page = results.page(known, [])
    assert "The old models of these seeds are those of the run above" in page
    other = copy.deepcopy(rivals)
    other["methods"]["bct"]["seeds"][0]["cells"]["old->old"][METRIC] = 0.42
    assert results.same_old(other, long) is False
    assert "compare figures within this section only" in results.page({**known, "compat-hangul-rivals.json": other}, [])
    assert results.headline({**known, "compat-hangul-rivals.json": other}) == ""  # LCE was measured on other galleries
    assert results.same_old({**rivals, "old_steps": 1}, long) is None
    assert results.same_old({**rivals, "steps": 1500}, long) is None  # figures after other updates
    assert results.headline({**known, "compat-hangul-rivals.json": {**rivals, "steps": 1500}}) == ""
    alone = results.headline({**known, "compat-hangul-rivals.json": figures({"bct": seeds(0.50, 1)})})
    assert "clearly ahead in none;\n- about level in TAR with 9,772 identities" in alone
    assert "(0.610 against BCT's 0.500: +0.110 [+0.10" in alone
    assert alone.count("over identities alone; one training run each: no verdict)") == 2
    level = figures({"bct": seeds(0.61)})
    text = results.headline({**known, "compat-hangul-rivals.json": level})
    assert "ahead in none;\n- about level in TAR with 9,772 identities after 9,000" in text


def test_a_list_of_numbers_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": [1, -2.5, 1e-09], "b": [], "c": ["1,\n 2"], "d": [[1], [2, 3]], "e": [1, None]}
    write_json(value, "-")
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert '"a": [1, -2.5, 1e-09],\n' in out
