"""The verdict on constructed safe, unsafe and undecided upgrades, and on sets that cannot carry one."""

import dataclasses
import json

import numpy as np
import pytest

from tests.evaluation.samples import identities, unit
from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import class_index
from trainer.evaluation.compatibility import Cell, Spaces, class_centres
from trainer.evaluation.report import write_report
from trainer.evaluation.results import NamedSet, Options, measure_sets
from trainer.evaluation.verdict import Rules, decide, judge_set
from trainer.evaluation.verification import score_pairs

OPTIONS = Options(fars=(1e-3, 1e-2), replicates=200, backfill_images=0)


def upgrade(toward: float, noise: float = 0.0, classes: int = 60, images: int = 5, spread: float = 1.6) -> NamedSet:
    """Old embeddings, and new ones moved ``toward`` their old class centres, with ``noise`` of their own."""
    old, labels = identities(classes, images, noise=spread, seed=1)
    index = class_index(labels, "test")
    generator = np.random.default_rng(2)
    new = unit(old + toward * class_centres(old, index)[index] + noise * generator.normal(size=old.shape) / np.sqrt(32))
    paragon = unit((old + 2 * class_centres(old, index)[index]) @ np.linalg.qr(generator.normal(size=(32, 32)))[0])
    return NamedSet("unseen", Spaces({"old": old, "new": new, "paragon": paragon}), labels, np.arange(len(labels)))


def answer(*sets: NamedSet, options: Options = OPTIONS):
    return measure_sets(sets, options)["verdict"]


def test_a_clear_improvement_is_safe():
    verdict = answer(upgrade(1.0))
    assert verdict["answer"] == "SAFE"
    assert [f["outcome"] for f in verdict["sets"][0]["findings"]] == ["better", "better"]
    assert verdict["paragraph"].startswith("SAFE")
    for part in (
        "60 identities",
        "TAR@FAR=1e-3",
        "rank-1",
        "95 % interval",
        "threshold",
        "nearest to their own old class",
    ):
        assert part in verdict["paragraph"]


def test_a_clear_loss_is_not_safe():
    verdict = answer(upgrade(0.0, noise=1.5))
    assert verdict["answer"] == "NOT SAFE"
    assert "worse than the old model" in verdict["paragraph"]


def test_an_independent_model_is_not_safe():
    case = upgrade(1.0)
    spaces = Spaces({"old": case.spaces.native["old"], "new": case.spaces.native["paragon"]})
    verdict = answer(NamedSet("unseen", spaces, case.labels, case.records))
    assert verdict["answer"] == "NOT SAFE"
    assert verdict["sets"][0]["findings"][1]["new"]["value"] < 0.2


def test_the_same_quality_is_not_decided():
    verdict = answer(upgrade(0.1, noise=0.35))
    assert verdict["answer"] == "NOT ENOUGH DATA"
    assert "holds zero" in verdict["paragraph"]


def test_the_model_itself_is_not_an_improvement():
    verdict = answer(upgrade(0.0))
    assert verdict["answer"] == "NOT ENOUGH DATA"
    assert "no metric tells the models apart" in verdict["paragraph"] or "holds zero" in verdict["paragraph"]


def test_one_bad_set_among_good_ones_is_not_safe():
    good, bad = upgrade(1.0), upgrade(0.0, noise=1.5)
    verdict = answer(good, NamedSet("other", bad.spaces, bad.labels, bad.records))
    assert [s["answer"] for s in verdict["sets"]] == ["SAFE", "NOT SAFE"]
    assert verdict["answer"] == "NOT SAFE"


def test_few_identities_never_make_safe_but_can_make_not_safe():
    assert answer(upgrade(2.0, classes=12, images=8))["answer"] == "NOT ENOUGH DATA"
    assert answer(upgrade(0.0, noise=4.0, classes=12, images=8))["answer"] == "NOT SAFE"
    assert answer(upgrade(0.0, noise=4.0, classes=4, images=8))["answer"] == "NOT ENOUGH DATA"


def test_a_false_accept_rate_below_what_the_set_resolves_is_said():
    verdict = answer(upgrade(1.0), options=Options(fars=(1e-7,), replicates=50, backfill_images=0))
    assert verdict["answer"] == "NOT ENOUGH DATA"
    assert "resolve no FAR below" in verdict["paragraph"]


def cells(old: list[float], new: list[float]) -> tuple[Cell, Cell]:
    """Two cells with these replicates of rank-1 and of the TAR at 1e-2."""
    none = score_pairs(*identities(5, 2, seed=1))

    def cell(query: str, values: list[float]) -> Cell:
        names = ("rank-1", "TAR@FAR=1e-2")
        value, replicates = dict.fromkeys(names, float(np.mean(values))), dict.fromkeys(names, np.array(values))
        return Cell(query, "old", "direct", none, None, value, replicates)

    return cell("old", old), cell("new", new)


@pytest.mark.parametrize(
    ("loss", "tolerance", "outcome"),
    [
        (0.020, 0.0, "worse"),
        (0.020, 0.005, "worse"),
        (0.020, 0.015, "unclear"),  # the interval is 0.01 to 0.03 and holds the tolerance
        (0.020, 0.031, "level"),
        (0.000, 0.0, "unclear"),
        (0.000, 0.011, "level"),
        (-0.02, 0.0, "better"),
        (-0.02, 0.5, "better"),
    ],
)
def test_a_tolerated_loss_counts_as_level(loss: float, tolerance: float, outcome: str) -> None:
    spread = np.linspace(-0.01, 0.01, 101)
    old, new = cells([0.9] * 101, (0.9 - loss + spread).tolist())
    judged = judge_set("t", old, new, (50, 100), (), Rules(tolerance=tolerance, level=1.0))
    assert [finding.outcome for finding in judged.findings] == [outcome]
    assert (judged.answer == "NOT SAFE") == (outcome == "worse")


@pytest.mark.parametrize(
    ("count", "found"), [(5, "NOT ENOUGH DATA"), (19, "NOT ENOUGH DATA"), (20, "SAFE"), (21, "SAFE")]
)
def test_twenty_identities_are_enough(count: int, found: str) -> None:
    old, new = cells([0.8] * 50, [0.9] * 50)
    assert judge_set("t", old, new, (count, 100), (1e-2,), Rules(min_false_accepts=0)).answer == found


@pytest.mark.parametrize(("count", "found"), [(4, "NOT ENOUGH DATA"), (5, "NOT SAFE")])
def test_five_identities_can_make_not_safe(count: int, found: str) -> None:
    old, new = cells([0.9] * 50, [0.8] * 50)
    assert judge_set("t", old, new, (count, 100), (), Rules()).answer == found


def test_the_level_of_the_intervals_is_the_rules_and_is_said() -> None:
    spread = (np.arange(1001) / 1000).tolist()
    old, new = cells([0.0] * 1001, spread)
    for level, low, high in ((0.95, 0.025, 0.975), (0.9, 0.05, 0.95)):
        judged = judge_set("t", old, new, (50, 100), (), Rules(level=level))
        (finding,) = judged.findings
        for measured in (finding.new, finding.difference):
            assert (measured.low, measured.high) == (pytest.approx(low), pytest.approx(high))
        assert f"{level * 100:g} % interval +{low:.3f} to +{high:.3f}" in decide([judged], {}, {}, level).paragraph
    verdict = answer(upgrade(1.0), options=dataclasses.replace(OPTIONS, rules=Rules(level=0.8)))
    assert "80 % interval" in verdict["paragraph"]


def test_the_reason_is_the_rule_that_decided():
    from trainer.evaluation.verdict import Rules

    def judged(tolerance):
        options = Options(fars=(1e-2,), replicates=200, backfill_images=0, rules=Rules(tolerance=tolerance))
        return answer(upgrade(0.0, noise=1.5), options=options)["sets"][0]

    tolerated = judged(0.9)
    assert tolerated["answer"] == "NOT ENOUGH DATA"
    assert all(f["difference"]["high"] < 0 for f in tolerated["findings"])
    assert "is worse by no more than the tolerance of 0.9, which counts as level" in tolerated["reason"]
    middle = -tolerated["findings"][-1]["difference"]["value"]
    unclear = judged(middle)["reason"]
    assert "holds zero" not in unclear
    assert f"whether by more than the tolerance of {middle:g} is not shown" in unclear


def test_the_result_is_plain_and_complete():
    result = measure_sets([upgrade(1.0)], dataclasses.replace(OPTIONS, backfill_images=5000))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    one = result["sets"]["unseen"]
    assert set(one["cells"]) == {"old->old", "new->old", "new->new", "old->new", "paragon->paragon", "paragon->old"}
    cell = one["cells"]["new->old"]
    assert cell["how"] == "direct"
    tar = cell["tar"][0]
    assert tar["low"] <= tar["value"] <= tar["high"]
    assert len(cell["roc"]["far"]) == len(cell["roc"]["tar"]) > 20
    assert one["gain"]["rank-1"]["update_gain"]["value"] > 0
    assert {curve["order"] for curve in one["backfill"]} == {"random", "confidence", "class"}
    assert one["operating_point"]["new->old"]["far"] == one["far"] == 1e-3
    assert {"accepted", "missed"} <= {e["kind"] for e in one["examples"]}


def test_sets_whose_names_differ_in_signs_alone_keep_their_own_plots(tmp_path):
    case = upgrade(0.5, classes=30)
    result = measure_sets(
        [dataclasses.replace(case, name=name) for name in ("ä", "ö")], Options(replicates=20, backfill_images=0)
    )
    written = write_report(tmp_path / "report.html", result)
    assert len({path.name.lower() for path in written}) == len(written) == 2 + 2 * 2
    assert {"_-roc.png", "_-roc-2.png"} <= {path.name for path in written}


def test_unusable_embeddings_are_refused():
    case = upgrade(1.0)
    broken = case.spaces.native["new"].copy()
    broken[7, 3] = np.nan
    with pytest.raises(
        ModelError, match=r"unseen, new model: 1 of 300 embeddings are not finite, the first is image 7"
    ):
        measure_sets(
            [NamedSet("unseen", Spaces({"old": case.spaces.native["old"], "new": broken}), case.labels, case.records)],
            OPTIONS,
        )
    with pytest.raises(ModelError, match="norm 2, not 1"):
        measure_sets(
            [NamedSet("unseen", Spaces({"old": case.spaces.native["old"] * 2}), case.labels, case.records)], OPTIONS
        )
    short = unit(np.random.default_rng(0).normal(size=(300, 8)))
    with pytest.raises(ModelError, match="no transformation between them"):
        measure_sets(
            [NamedSet("unseen", Spaces({"old": case.spaces.native["old"], "new": short}), case.labels, case.records)],
            OPTIONS,
        )
    with pytest.raises(DataError, match="FARs"):
        Options(fars=(0.0,))
