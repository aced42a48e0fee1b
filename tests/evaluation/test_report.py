"""The report's contents: what to do now, the head, escaping, dashes in place of wild gains, the printed PDF."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from tests.evaluation.test_verdict import OPTIONS, upgrade
from tools import evaluate_tables
from trainer.errors import DataError
from trainer.evaluation import pdf
from trainer.evaluation.compatibility import Spaces
from trainer.evaluation.next_steps import next_steps
from trainer.evaluation.report import RunRecord, write_report
from trainer.evaluation.report_sections import _gain, _matrix, table
from trainer.evaluation.results import Options, measure_sets

ROOT = Path(__file__).parents[2]
FEW = dataclasses.replace(OPTIONS, replicates=50)


def report(result, tmp_path, **more):
    write_report(tmp_path / "report.html", result, **more)
    return (tmp_path / "report.html").read_text()


def test_a_safe_upgrade_is_deployed_with_a_threshold_that_keeps_the_far(tmp_path):
    result = measure_sets([upgrade(1.0)], OPTIONS)
    first, second, _ = result["verdict"]["next"]
    assert first == "Deploy the new model for queries; the gallery stays as it is."
    point = result["sets"]["unseen"]["operating_point"]["new->old"]
    assert f"Set the threshold {point['restored']:.4f}: on unseen it gives FAR 1e-3" in second
    page = report(result, tmp_path)
    assert page.index("<p>The new model may query the old gallery.</p>") < page.index(first) < page.index("<table>")


def test_an_unsafe_upgrade_is_re_encoded_first_or_not_at_all():
    worse = upgrade(1.0)
    native = worse.spaces.native | {"new": -worse.spaces.native["new"]}  # as good alone, and opposed to the old
    opposed = dataclasses.replace(worse, spaces=dataclasses.replace(worse.spaces, native=native))
    steps = measure_sets([opposed], OPTIONS)["verdict"]["next"]
    assert "re-encode the whole gallery from its images first" in steps[1]
    native = native | {"new": native["new"][::-1].copy()}  # of other people: good for nothing
    useless = dataclasses.replace(worse, spaces=dataclasses.replace(worse.spaces, native=native))
    result = measure_sets([useless], OPTIONS)
    assert "Do not re-encode either" in result["verdict"]["next"][1]
    (alone,) = (entry for entry in result["sets"]["unseen"]["deployments"] if entry["way"] == "new → new")
    assert alone["answer"] == "NOT SAFE"
    alone["answer"] = "NOT ENOUGH DATA"  # as on a set that is too small or too easy
    steps = next_steps(result["verdict"], result["sets"], result["options"]["rules"])
    assert "Whether to re-encode is open" in steps[1]


def test_too_few_identities_are_counted():
    result = measure_sets([upgrade(1.0, classes=12)], Options(fars=(1e-2,), replicates=200, backfill_images=0))
    assert result["verdict"]["answer"] == "NOT ENOUGH DATA"
    assert "collect about 8 more identities (it has 12)" in result["verdict"]["next"][1]
    assert "--data" in measure_sets([], OPTIONS)["verdict"]["next"][1]


def test_names_are_escaped_everywhere(tmp_path):
    case = dataclasses.replace(upgrade(0.5), name="<script>alert(1)</script>")
    result = measure_sets([case], OPTIONS)
    result["models"] = {role: {"path": f"runs/{role}<b>&"} for role in ("old", "new")}
    page = report(result, tmp_path, runs=[RunRecord("<i>", {}, "key: </pre><script>")])
    assert "<script" not in page
    assert "<b>&" not in page
    assert "<i>" not in page
    assert "<h1>May new&lt;b&gt;&amp; query the gallery of old&lt;b&gt;&amp;?</h1>" in page


def test_every_entry_of_the_contents_leads_somewhere(tmp_path):
    page = report(measure_sets([upgrade(0.5), dataclasses.replace(upgrade(0.5), name="more")], OPTIONS), tmp_path)
    for target in ("next", "why", "set-1", "set-2", "glossary", "made"):
        assert page.count(f'href="#{target}"') == page.count(f'id="{target}"') == 1


def test_a_gain_that_says_nothing_is_a_dash_and_a_sentence():
    def shown(value, low, high, room=0.1):
        interval, headroom = {"value": value, "low": low, "high": high}, {"value": 0.2, "low": room, "high": 0.3}
        gain = {"update_gain": interval, "cost": interval, "headroom": headroom}
        found, sentences = _gain({"gain": {"rank-1": gain, "TAR": None}})
        return found.rows[0][1].text, " ".join(sentences)

    assert shown(0.5, 0.4, 0.6) == ("0.500", "")
    assert shown(-2.378, -36.275, -0.466) == (
        "–", "No gain by rank-1: new → old is below old → old, so that users would lose."
    )  # fmt: skip
    assert shown(0.5, -9.0, 30.0)[0] == shown(None, None, None)[0] == "–"
    assert "not clearly better" in shown(0.5, -9.0, 30.0)[1]
    assert shown(1.6, 1.2, 2.0) == ("1.600", "")
    wild = shown(
        1.6, 1.2, 2.0, room=-0.01
    )  # of the replicates with a paragon below the old model none is in the interval
    assert wild == ("–", "No gain by rank-1: the paragon is not clearly better than the old model on these identities.")


def test_a_paragon_like_the_old_model_gives_no_gain_but_a_sentence():
    case = upgrade(1.0, classes=20)
    native = case.spaces.native | {"paragon": upgrade(0.005, classes=20).spaces.native["new"]}
    one = measure_sets([dataclasses.replace(case, spaces=dataclasses.replace(case.spaces, native=native))], FEW)
    one |= {"pair_sets": {}, "template_sets": {}}
    gain = one["sets"]["unseen"]["gain"]["TAR@FAR=1e-3"]
    assert gain["headroom"]["low"] <= 0
    assert gain["update_gain"]["value"] is None or gain["update_gain"]["value"] > 1  # positive, and wild
    found, sentences = _gain(one["sets"]["unseen"])
    assert [row[1].text for row in found.rows] == ["–"] * 3
    assert len(sentences) == 3
    printed = [part for part in evaluate_tables.parts(one) if isinstance(part, str)]
    assert printed == sentences
    for metric, value in one["sets"]["unseen"]["gain"].items():
        assert f"No gain by {metric}: {value['no_gain']}." in sentences
    clear = measure_sets([upgrade(0.5)], FEW)["sets"]["unseen"]["gain"]["rank-1"]
    assert clear["update_gain"]["value"] > 0
    assert clear["no_gain"] == ""


def test_old_queries_in_a_new_gallery_are_never_called_backward():
    case = upgrade(1.0, classes=10, images=3)
    old, new = case.spaces.native["old"], case.spaces.native["new"]
    down, up = {("new", "old"): new.copy()}, {("old", "new"): old.copy()}
    for maps in (down, down | up):
        spaces = Spaces({"old": old, "new": new}, maps)
        result = measure_sets([dataclasses.replace(case, spaces=spaces)], FEW)
        assert "backward" not in json.dumps(result)
        assert "backward" not in str(_matrix(result["sets"]["unseen"]))
        how = {row[0].text: row[1].text for row in _matrix(result["sets"]["unseen"]).rows}
        end = "t12" if ("old", "new") in maps else "t21"
        title = {"t12": "T₁₂(old) → new", "t21": "old → T₂₁(new)"}[end]
        assert how[title] == {"t12": "T₁₂", "t21": "T₂₁"}[end]


def test_columns_of_numbers_are_set_to_the_right():
    found = table("t", ["name", "rate", "mixed"], [["a", "0.5", "1"], ["1e", "–", "own"]])
    assert found.numeric == [False, True, False]


def test_without_chromium_a_pdf_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="no Chromium is installed") as refused:
        pdf.chromium()
    assert "\n" not in str(refused.value)


def test_a_pdf_that_was_not_printed_is_an_error_and_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf.shutil, "which", lambda name: "/bin/false")
    (tmp_path / "report.html").write_text("<p>x")
    with pytest.raises(DataError, match="printed no PDF"):
        pdf.print_pdf(tmp_path / "report.html", tmp_path / "report.pdf")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_templates_and_style_are_part_of_the_distribution():
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "evaluation/pages/*" in package_data["trainer"]
    assert {p.name for p in (ROOT / "trainer/evaluation/pages").iterdir()} == {
        "labelled.html", "parts.html", "report.css", "report.html",
    }  # fmt: skip
