"""Chains of models: through which maps the embeddings of one reach the space of another, and the criterion on all."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.samples import identities, unit
from tests.evaluation.test_verdict import OPTIONS
from tools.evaluate_tables import parts
from trainer.errors import ModelError
from trainer.evaluation.chain import anchors, carried, check_links
from trainer.evaluation.compatibility import Spaces, cell_pairs, class_centres
from trainer.evaluation.report import write_report
from trainer.evaluation.results import NamedSet, measure_sets

OLD, LABELS = identities(60, 5, noise=1.6, seed=1)
GENERATOR = np.random.default_rng(3)
TURNS = {k: np.linalg.qr(GENERATOR.normal(size=(32, 32)))[0].astype(np.float32) for k in (2, 3)}


class Model:
    """Stands for a model with maps by rotation: ``into`` its anchor's space (T₂₁) and out ``of`` it (T₁₂)."""

    def __init__(self, name, turn=None, maps=(), anchor=None, dim=32, left_out=()):
        self.path, self.hash, self.dim, self._turn = name, name, dim, turn
        parts = {m: SimpleNamespace(dim_in=32, dim_out=32) for m in maps}
        self.card = SimpleNamespace(transforms=parts, compatible_with_hash=anchor, left_out=left_out)

    def transform(self, direction, vectors):
        assert direction in self.card.transforms
        return vectors @ (self._turn.T if direction == "t21" else self._turn)


def better(x, share):
    """Each embedding nearer to its class's centre."""
    index = np.unique(LABELS, return_inverse=True)[1]
    return unit(x + share * class_centres(OLD, index)[index])


def chain_of(second, third):
    """Three models in spaces of their own (turned), with maps of these kinds back to the one before."""
    models = {
        "old": Model("1"),
        "v2": Model("2", TURNS[2], second),
        "new": Model("3", TURNS[3], third),
    }
    space = {"old": np.eye(32, dtype=np.float32)}
    space["v2"] = TURNS[2] if second else space["old"]
    space["new"] = space["v2"] @ TURNS[3] if third else space["v2"]
    native = {role: better(OLD, s) @ space[role] for role, s in (("old", 0), ("v2", 0.6), ("new", 1.5))}
    return models, native


@pytest.mark.parametrize(
    ("second", "third", "how"),
    [
        ((), (), "direct"),
        (("t21",), ("t21",), "t21"),
        (("t12",), ("t12",), "t12"),
        ((), ("t21",), "t21"),
        (("t12",), (), "t12"),
        (("t12",), ("t21",), "in v2"),  # the new one maps down, the old one up
        (("t21", "t12"), ("t21", "t12"), "t21"),
    ],
)
def test_three_models_meet_through_the_maps_of_every_step(second, third, how):
    models, native = chain_of(second, third)
    spaces = Spaces(native, carried(models, native))
    left, right, said = spaces.view("new", "old")
    assert said == how
    expected = better(OLD, 1.5) @ OLD.T  # in one space, whichever
    assert left @ right.T == pytest.approx(expected, abs=1e-4)
    left, right, _ = spaces.view("new", "v2")
    assert left @ right.T == pytest.approx(better(OLD, 1.5) @ better(OLD, 0.6).T, abs=1e-4)


def test_models_that_never_meet_are_of_other_dimensions_or_not_compared():
    models, native = chain_of(("t21",), ("t12",))  # both maps lead away from the one between
    found = carried(models, native)
    assert ("new", "old") not in found
    assert ("old", "new") not in found


def test_a_model_is_held_to_the_one_that_its_card_names():
    models = {"old": Model("1"), "v2": Model("2"), "new": Model("3", anchor="1"), "paragon": Model("4")}
    assert anchors(models) == {"v2": "old", "new": "old"}
    models["new"] = Model("3", anchor="unknown")
    assert anchors(models)["new"] == "v2"
    models["v2"] = Model("2", anchor="3")  # a later one is no anchor
    assert anchors(models)["v2"] == "old"
    models["v2"] = Model("2", dim=16)
    with pytest.raises(ModelError, match="2: dimension 16 against 32 of 1"):
        check_links(models)
    models["v2"] = Model("2", maps=("t21",), dim=16)
    with pytest.raises(ModelError, match="t21 maps dimension 32 to 32, needed is 16 to 32"):
        check_links(models)


def test_a_graph_without_the_map_to_its_anchor_is_not_compared_with_it():
    models = {"old": Model("1"), "new": Model("2.onnx", anchor="1", left_out=("t21",))}
    with pytest.raises(
        ModelError, match=r"2\.onnx: .* of 1 through t21, which this file does not hold; .*--transform t21"
    ):
        check_links(models)
    models["old"] = Model("2-int8.onnx", anchor="1", left_out=("t21",))  # another form of the same model
    check_links(models)
    models["new"] = Model("2.onnx", left_out=("t12",), dim=16)
    with pytest.raises(ModelError, match="through t12, which this file does not hold; give the model folder"):
        check_links(models)


def test_the_matrix_holds_every_pair():
    pairs = cell_pairs(["old", "v2", "new", "paragon"])
    chain = {(a, b) for a in ("old", "v2", "new") for b in ("old", "v2", "new")}
    assert set(pairs) == chain | {("paragon", "paragon"), ("paragon", "old")}
    assert len(pairs) == len(set(pairs))


def measured(models, native, tmp_path):
    one = NamedSet("unseen", Spaces(native, carried(models, native)), LABELS, np.arange(len(LABELS)))
    result = measure_sets([one], OPTIONS)
    write_report(tmp_path / "report.html", result)
    return result, (tmp_path / "report.html").read_text()


def test_a_chain_has_one_verdict_over_all_galleries(tmp_path):
    models, native = chain_of(("t21",), ("t21",))
    result, page = measured(models, native, tmp_path)
    assert result["verdict"]["answer"] == "SAFE"
    assert [s["gallery"] for s in result["verdict"]["sets"]] == ["old", "v2"]
    assert "where v2 has" in result["verdict"]["paragraph"]
    steps = {(c["query"], c["gallery"]): c["findings"] for c in result["sets"]["unseen"]["chain"]}
    assert set(steps) == {("v2", "old"), ("new", "old"), ("new", "v2")}
    assert all(f["outcome"] in ("better", "level") for findings in steps.values() for f in findings)
    assert all(findings[0]["outcome"] == "better" for findings in steps.values())
    assert len(result["sets"]["unseen"]["cells"]) == 9
    found = result["sets"]["unseen"]["chain_summary"]
    cells = result["sets"]["unseen"]["cells"]
    ranks = {name: cell["rank"]["1"]["value"] for name, cell in cells.items()}
    pairs = ("v2->old", "new->old", "new->v2")
    met = [ranks[pair] > ranks["->".join(2 * pair.split("->")[1:])] for pair in pairs]
    assert found["pairs"] == 3
    assert found["average_compatibility"]["rank-1"] == pytest.approx(np.mean(met))
    every = [ranks[name] for name in (*pairs, "old->old", "v2->v2", "new->new")]
    assert found["average"]["rank-1"] == pytest.approx(np.mean(every))
    cosine = np.einsum("nd,nd->n", better(OLD, 1.5), OLD).mean()  # the maps of both steps lead back exactly
    assert found["drift"]["new"] == pytest.approx(1 - cosine, abs=1e-4)
    assert 0 < found["drift"]["v2"] < found["drift"]["new"]
    assert "Average compatibility (the share of 3 pairs above the gallery" in page
    printed = [part for part in parts(result | {"pair_sets": {}, "template_sets": {}}) if isinstance(part, str)]
    assert len(printed) == 1
    assert printed[0].startswith("Average compatibility (the share of 3 pairs above the gallery's own model): ")
    assert f"rank-1 {found['average']['rank-1']:.3f}. Drift from the first gallery" in printed[0]
    assert f"v2 {found['drift']['v2']:.3f}, new {found['drift']['new']:.3f}." in printed[0]
    assert "The chain of models" in page
    assert "new → v2" in page


def test_a_new_model_that_fails_on_a_later_gallery_is_not_safe(tmp_path):
    models, native = chain_of((), ())
    native["v2"], native["new"] = better(OLD, 0.6), better(OLD, 0.3)
    result, _ = measured(models, native, tmp_path)
    assert [s["answer"] for s in result["verdict"]["sets"]] == ["SAFE", "NOT SAFE"]
    assert result["verdict"]["answer"] == "NOT SAFE"
    assert "gallery of v2" in result["verdict"]["paragraph"]
    assert "worse than v2" in result["verdict"]["paragraph"]


def test_two_models_are_no_chain():
    models, native = chain_of((), ())
    del models["v2"], native["v2"]
    one = NamedSet("unseen", Spaces(native, carried(models, native)), LABELS, np.arange(len(LABELS)))
    result = measure_sets([one], OPTIONS)
    assert result["sets"]["unseen"]["chain"] == []
    assert result["sets"]["unseen"]["chain_summary"] is None
    assert [s["name"] for s in result["verdict"]["sets"]] == ["unseen"]
