"""Cross-model training: both models frozen, only the maps between their spaces learn."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from tests.data.samples import packed
from tests.models.test_foreign import graph_file
from tests.ranks import run_ranks
from tests.runs import Linear, config, log_of, losses_of
from tools.cli import main
from trainer.compat.bank.center_bank import BankInfo
from trainer.compat.bank.convert import bank_from_embeddings
from trainer.compat.bank.matrices import open_rows
from trainer.compat.methods import losses
from trainer.compat.methods.config import LceCrossConfig
from trainer.compat.methods.lce import Pairs, TransformedCompat
from trainer.data import build_loader, open_dataset
from trainer.distributed import Ranks, gather_batch
from trainer.errors import CenterBankError, ConfigError, DataError, LceError, ModelError
from trainer.gallery.convert import Forward
from trainer.gallery.orders import order_rows
from trainer.models.card import ModelCard
from trainer.models.folder import save_model
from trainer.models.graph import graph_card
from trainer.models.model import TorchModel
from trainer.models.open import load_model
from trainer.networks.config import BackboneConfig
from trainer.networks.transform import build_distance_head
from trainer.run import cross_model
from trainer.run.cross_model import CrossModelTask, image_pairs_loss
from trainer.run.engine import train
from trainer.run.startup import prepare

CLASSES, IMAGES, OLD, NEW = 11, 4, 6, 9


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, ``old.npy`` (D1 = 6) and ``new.npy`` (D2 = 9), two looks at the same images, and both banks."""
    folder = tmp_path_factory.mktemp("scene")
    dataset = open_dataset(packed(folder, CLASSES, IMAGES, (8, 8)))
    labels, rng = np.asarray(dataset.labels), np.random.default_rng(0)
    hidden = rng.normal(size=(CLASSES, NEW))[labels] + 0.3 * rng.normal(size=(len(labels), NEW))
    for name, view in (("old", hidden @ rng.normal(size=(NEW, OLD))), ("new", hidden @ rng.normal(size=(NEW, NEW)))):
        unit = view / np.linalg.norm(view, axis=1, keepdims=True)
        np.save(folder / f"{name}.npy", unit.astype(np.float32))
        bank_from_embeddings(
            open_rows([folder / f"{name}.npy"]), labels, CLASSES, folder / f"{name}-bank", BankInfo(model=name)
        )
    return folder


def changes(scene: Path, *given: str, **more: Any) -> dict[str, Any]:
    """Settings of a run on the scene's files named in ``given``: new, old, bank, new_bank."""
    places = {
        "new": ("new_embeddings", "new.npy"),
        "old": ("old_embeddings", "old.npy"),
        "bank": ("bank", "old-bank"),
        "new_bank": ("new_bank", "new-bank"),
    }
    files = {f"compat__{places[name][0]}": str(scene / places[name][1]) for name in given}
    base = {"data__loader": "torch", "data__path": str(scene / "packed"), "data__batch_size": 13, "optimizer__lr": 0.05}
    method = {"compat__method": "lce", "compat__mode": "cross-model", "compat__transform": {"blocks": 1, "paths": 2}}
    return base | method | files | more


TERMS = {
    **{"compat__transform": {"name": "linear"}, "compat__contrastive_weight": 0.5, "compat__distance": True},
    **{"compat__orthogonal_weight": 0.1, "compat__orthogonal_threshold": 0.2, "compat__noise": 0.3},
}
CASES: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("new", "old", "bank"), TERMS),
    (("new", "bank", "new_bank"), {}),
    (("new", "old", "bank"), {"compat__maps": "t21"}),
    (("new", "old", "bank"), {"compat__maps": "t12"}),
    (("new", "old"), {"compat__transform": {"name": "mlp"}}),
]


def steps(ranks: Ranks, scene: str, control: bool = False) -> list[dict[str, Any]]:
    """Losses and the maps' state after four updates, for every case; ``control``: the last case alone, in which every
    rank sees only its slice."""
    torch.set_num_threads(1)
    whole, patched = gather_batch, cast(Any, cross_model)
    if control:
        patched.gather_batch = lambda rows, labels, world, capacity: whole(rows, labels, 1, capacity)
    found = []
    for given, more in CASES[-1:] if control else CASES:
        settings = config(Path(scene) / "unused", **changes(Path(scene), *given, **more))
        inputs = prepare(settings, ranks)
        task = CrossModelTask(settings, inputs, ranks)
        batches = build_loader(settings.data, settings.seed, inputs.dataset, ranks, images=False).batches()
        parameters = [p for module in task.modules().values() for p in module.parameters()]
        optimizer, values = torch.optim.SGD(parameters, 0.05), []
        for step in range(4):
            optimizer.zero_grad()
            values.append(task.compute(next(batches), step, True, torch.tensor(1.0)).report["loss"])
            optimizer.step()
        state = {f"{n}.{k}": v for n, m in task.modules().items() for k, v in m.state_dict().items()}
        found.append({"losses": torch.stack(values), **{k: v for k, v in state.items() if v.is_floating_point()}})
    patched.gather_batch = whole
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_many_ranks_are_one(scene: Path, world: int) -> None:
    alone, many = steps(Ranks(), str(scene)), run_ranks(steps, world, str(scene))
    for number, expected in enumerate(alone):
        for name, value in expected.items():
            torch.testing.assert_close(many[0][number][name], value, rtol=1e-9, atol=1e-11)
            assert all(torch.equal(one[number][name], many[0][number][name]) for one in many), (CASES[number], name)


def test_ranks_that_see_their_slice_alone_drift_apart(scene: Path) -> None:
    (one,), (other,) = run_ranks(steps, 2, str(scene), True)
    assert not torch.allclose(one["t21.0.weight"], other["t21.0.weight"], rtol=1e-3)


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("maps", ["t21", "t12", "both"])
def test_image_pairs_are_the_plain_formula(maps: Any, authors: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    compat_config = LceCrossConfig.model_validate(
        {
            "mode": "cross-model",
            "maps": maps,
            "alignment_weight": 0.7,
            "boundary_weight": 1.3,
            "bank": "old-bank",
            "transform": {"name": "linear"},
            "authors_formula": authors,
        }
    )
    compat = TransformedCompat(compat_config, OLD, NEW).double()
    for parameter in compat.parameters():
        parameter.data += 0.3 * randn(*parameter.shape)
    x, e, centers = randn(7, NEW), randn(7, OLD), normalize(randn(4, OLD))
    place, mask = np.array([0, 3, -1, 1, 2, 0, 2]), torch.tensor([True, True, False, True])
    known = torch.tensor([True, True, True, False, True, True, True])
    boundaries = torch.rand(4, generator=generator, dtype=torch.float64)
    classes = Pairs(np.arange(4), x[:4, :0], centers, boundaries, mask, place)
    got, report = image_pairs_loss(compat, x, e, np.flatnonzero(known), classes)
    every = torch.ones(int(known.sum()), dtype=torch.bool)
    maps_given = {"t21": compat.t21, "t12": compat.t12}
    a = losses.alignment(x[known], normalize(e[known]), every, authors_formula=authors, **maps_given)
    has = known & torch.from_numpy(place >= 0) & mask[place]
    unit = normalize(x)
    b = losses.boundary(unit, centers[place], boundaries[place], has, authors_formula=authors, **maps_given)
    torch.testing.assert_close(got, 0.7 * a + 1.3 * b, rtol=1e-10, atol=1e-12)
    assert b > 0
    torch.testing.assert_close(report["boundary"], b.detach(), rtol=1e-10, atol=1e-12)
    without, _ = image_pairs_loss(compat, x, e, np.flatnonzero(known), None)
    torch.testing.assert_close(without, 0.7 * a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("maps", ["t21", "t12", "both"])
def test_contrast_is_added_and_a_head_moves_no_map(maps: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    given = {"mode": "cross-model", "maps": maps, "transform": {"name": "linear"}}
    contrast = LceCrossConfig.model_validate({**given, "contrastive_weight": 0.6, "contrastive_temperature": 0.2})
    plain = TransformedCompat(LceCrossConfig.model_validate(given), OLD, NEW).double()
    compat = TransformedCompat(contrast, OLD, NEW).double()
    compat.load_state_dict(plain.state_dict())
    x, e = (torch.randn(7, dim, generator=generator, dtype=torch.float64) for dim in (NEW, OLD))
    labels, known = torch.tensor([0, 1, 0, 2, 1, 0, -1]), torch.tensor([True] * 6 + [False])
    both = np.flatnonzero(known)
    (base, _), (got, report) = (image_pairs_loss(one, x, e, both, None, labels) for one in (plain, compat))
    u, v, y = normalize(x[known]), normalize(e[known]), labels[known]
    if compat.t21 is not None:
        contrast = losses.contrastive(compat.t21(u), v, y, 0.2)
    else:
        assert compat.t12 is not None
        contrast = losses.contrastive(compat.t12(v), u, y, 0.2)
    torch.testing.assert_close(got, base + 0.6 * contrast, rtol=1e-10, atol=1e-12)
    assert report["contrastive"] > 0
    if compat.t12 is None:
        return
    head = build_distance_head(OLD).double()
    with_head, report = image_pairs_loss(compat, x, e, both, None, labels, head)
    d = 1 - losses.cosine(compat.t12(v), u)
    torch.testing.assert_close(report["distance"], losses.expected_distance(head(v)[:, 0], d).detach())
    torch.testing.assert_close(with_head, got + report["distance"])
    parameters = list(compat.parameters())
    pairs = zip(torch.autograd.grad(with_head, parameters), torch.autograd.grad(got, parameters), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("maps", ["t21", "t12", "both"])
def test_what_a_map_takes_is_noisy_and_what_it_is_compared_with_is_not(maps: Any) -> None:
    given = {"mode": "cross-model", "maps": maps, "bank": "b", "transform": {"name": "mlp"}, "noise": 0.4}
    compat = TransformedCompat(LceCrossConfig.model_validate(given), OLD, NEW).double()
    x, e = torch.randn(500, NEW, dtype=torch.float64), torch.randn(500, OLD, dtype=torch.float64)
    u, v, centers = normalize(x), normalize(e), normalize(torch.randn(4, OLD, dtype=torch.float64))
    radius, place = torch.rand(4, dtype=torch.float64), np.arange(500) % 4
    classes = Pairs(np.arange(4), x[:4, :0], centers, radius, torch.ones(4, dtype=torch.bool), place)
    got, _ = image_pairs_loss(compat, x, e, np.arange(500), classes, noise=torch.Generator().manual_seed(5))
    noise = torch.Generator().manual_seed(5)

    def noisy(unit: Tensor) -> Tensor:
        added = 0.4 / unit.shape[1] ** 0.5 * torch.randn(unit.shape, generator=noise, dtype=torch.float64)
        assert added.square().sum(1).mean().sqrt().item() == pytest.approx(0.4, rel=0.1)
        return unit + added

    terms, inside = [], None
    if compat.t21 is not None:
        mapped = compat.t21(noisy(u))
        terms.append((1 - losses.cosine(mapped, v)).mean())
        inside = losses.cosine(mapped, centers[place])
    if compat.t12 is not None:
        mapped, of_centers = compat.t12(noisy(torch.cat([v, centers]))).split([500, 4])
        terms.append((1 - losses.cosine(mapped, u)).mean())
        inside = losses.cosine(u, of_centers[place]) if inside is None else inside
    assert inside is not None
    bound = (radius[place] - inside).clamp_min(0).mean()
    expected = compat.config.alignment_weight * torch.stack(terms).mean() + compat.config.boundary_weight * bound
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_head_learns_how_far_the_map_errs_without_noise() -> None:
    given = {"mode": "cross-model", "transform": {"name": "mlp"}, "noise": 2.0}
    compat, head = TransformedCompat(LceCrossConfig.model_validate(given), OLD, NEW), build_distance_head(OLD)
    x, e = torch.randn(40, NEW), torch.randn(40, OLD)
    _, report = image_pairs_loss(compat, x, e, np.arange(40), None, None, head, torch.Generator())
    u, v = normalize(x), normalize(e)
    assert compat.t12 is not None
    clean = 1 - losses.cosine(compat.t12.eval()(v), u)
    torch.testing.assert_close(report["distance"], losses.expected_distance(head(v)[:, 0], clean).detach())


def test_noise_is_drawn_anew_for_every_part_of_every_update(scene: Path, tmp_path: Path) -> None:
    """Over the same 13 images in each of two parts: only the noise differs."""
    given = changes(scene, "new", "old", compat__noise=0.5, compat__transform={"name": "linear"})
    settings = config(tmp_path / "unused", **given, train__accumulate=2)
    inputs = prepare(settings, Ranks())
    task = CrossModelTask(settings, inputs, Ranks())
    batch = next(build_loader(settings.data, 0, inputs.dataset, Ranks(), images=False).batches())
    orders = [(0, False), (0, True), (1, False), (1, True), (0, False)]
    *found, again = [task.compute(batch, step, last, torch.tensor(1.0)).report["loss"].item() for step, last in orders]
    assert len(set(found)) == 4
    assert again == found[0]


def test_compiled_maps_learn_the_same(scene: Path, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    maps = {"compat__transform": {"blocks": 3, "paths": 2, "bottleneck": 4}, "compat__maps": "t21"}
    settings = {**changes(scene, "new", "old", "bank", **maps), "train__steps": 5, "train__precision": "float64"}
    train(config(tmp_path / "plain", **settings), Ranks())
    before = counters["stats"]["unique_graphs"]
    train(config(tmp_path / "compiled", **settings, train__compile=True), Ranks())
    made = counters["stats"]["unique_graphs"] - before
    assert 1 <= made <= 2, "one for the block between the dimensions, one for all the others"
    plain, compiled = (losses_of(tmp_path / name) for name in ("plain", "compiled"))
    np.testing.assert_allclose(compiled, plain, rtol=1e-9)
    one, other = (load_file(tmp_path / name / "model" / "t21.safetensors") for name in ("plain", "compiled"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def uneven(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all terms on the scene's embeddings, of whose old ones those of the first five classes are noisy;
    these are ``old.npy`` next to it."""
    folder = tmp_path_factory.mktemp("uneven")
    labels, rng = np.asarray(open_dataset(scene / "packed").labels), np.random.default_rng(3)
    noise = np.where(labels < 5, 0.6, 0.01)[:, None] * rng.normal(size=(len(labels), OLD))
    np.save(folder / "old.npy", (np.load(scene / "old.npy") + noise).astype(np.float32))
    given = changes(scene, "new", **TERMS, compat__old_embeddings=str(folder / "old.npy"))
    given |= {"train__steps": 300, "train__precision": "float32", "data__batch_size": 44}
    given |= {"optimizer__name": "adamw", "optimizer__lr": 0.01, "checkpoint__every_steps": 300}
    train(config(folder / "run", **given), Ranks())
    return folder


def test_what_t12_maps_worst_is_upgraded_first(scene: Path, uneven: Path, tmp_path: Path) -> None:
    model, old, new = load_model(uneven / "run"), np.load(uneven / "old.npy"), np.load(scene / "new.npy")
    assert {"contrastive", "orthogonality", "distance"} <= log_of(uneven / "run")[-1].keys()
    noisy = np.asarray(open_dataset(scene / "packed").labels) < 5
    expected, actual = model.distance(old), 1 - (model.transform("t12", old) * new).sum(1)
    assert expected.shape == (len(old),)
    assert expected[noisy].mean() > 1.2 * expected[~noisy].mean()
    assert np.corrcoef(expected, actual)[0, 1] > 0.8
    assert expected.mean() == pytest.approx(actual.mean(), rel=0.1)
    np.save(tmp_path / "gallery.npy", 3 * old)  # of any length
    order = order_rows("distance", tmp_path / "gallery.npy", model=model)
    assert order is not None
    assert (np.diff(expected[order]) <= 1e-6).all()
    command = ["gallery", "upgrade", str(tmp_path / "gallery.npy"), "--model", str(uneven / "run")]
    assert main([*command, "--order", "distance", "--json", str(tmp_path / "done.json")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "gallery.npy"), model.transform("t12", old), atol=1e-5)
    with pytest.raises(DataError, match="order distance is of the old model's vectors"):
        order_rows("distance", tmp_path / "gallery.npy", model=model)  # they are converted


def test_the_order_by_distance_is_one_of_the_backfill_curves(scene: Path, uneven: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.asarray(open_dataset(scene / "packed").labels))
    words = ["--old-embeddings", str(uneven / "old.npy"), "--new-embeddings", str(scene / "new.npy")]
    words += ["--labels", str(tmp_path / "labels.npy"), "--fars", "1e-1", "--replicates", "100"]
    out, found = tmp_path / "result.json", []
    for maps in (uneven / "run", scene / "run-without"):
        if maps.parent == scene:
            given = changes(scene, "new", "old", compat__transform={"name": "linear"}, train__steps=2)
            train(config(maps, **given), Ranks())
        report = ["--report", str(tmp_path / "r.html")] if maps.parent == uneven else []
        assert main(["evaluate", *words, "--maps", str(maps), "--json", str(out), *report]) == 0
        found.append({curve["order"] for curve in json.loads(out.read_text())["sets"]["embeddings"]["backfill"]})
    assert found == [{"random", "confidence", "class", "distance"}, {"random", "confidence", "class"}]


def test_a_head_goes_with_the_model_and_is_refused_when_damaged(uneven: Path, tmp_path: Path) -> None:
    model = load_model(uneven / "run")
    assert isinstance(model, TorchModel)
    vectors = np.load(uneven / "old.npy")
    copy = tmp_path / "copy"
    save_model(copy, None, model.card, model.transforms, None, model.distance_head)
    np.testing.assert_array_equal(load_model(copy).distance(vectors), model.distance(vectors))
    with pytest.raises(ModelError, match="takes vectors"):
        model.distance(vectors[:, 1:])
    with pytest.raises(ModelError, match=r"the model card describes .*t12_distance"):
        save_model(tmp_path / "none", None, model.card, model.transforms)
    without = model.card.model_copy(update={"distance": False})
    save_model(tmp_path / "without", None, without, model.transforms)
    with pytest.raises(ModelError, match=r"compat\.mode = cross-model and compat\.distance = true"):
        load_model(tmp_path / "without").distance(vectors)
    assert not graph_card(model.card, None).distance
    file = copy / "t12_distance.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"t12_distance\.safetensors"):
        load_model(copy)


def test_a_penalty_keeps_the_map_nearer_to_orthogonal(scene: Path, tmp_path: Path) -> None:
    apart = []
    for weight in (0.0, 1.0):
        more = {"compat__orthogonal_weight": weight} | ({"compat__orthogonal_threshold": 0.5} if weight else {})
        given = changes(scene, "new", "old", **more, compat__transform={"name": "linear"}, compat__maps="t21")
        train(config(tmp_path / f"{weight}", **given, train__steps=60, compat__contrastive_weight=1.0), Ranks())
        model = load_model(tmp_path / f"{weight}")
        assert isinstance(model, TorchModel)
        apart.append(losses.gram_distance(model.transforms["t21"].get_parameter("weight")).item())
    assert apart[1] < 0.75 < apart[0], apart


def test_maps_from_embeddings_learn_and_convert_a_gallery(scene: Path, tmp_path: Path) -> None:
    given = changes(scene, "new", "old", "bank", compat__maps="t12", compat__transform={"name": "linear"})
    given |= {"train__steps": 150, "train__precision": "float32", "compat__alignment_weight": 3.0}
    train(config(tmp_path / "run", **given), Ranks())
    values = [line["alignment"] for line in log_of(tmp_path / "run")]
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    model = load_model(tmp_path / "run")
    assert model.card.mode == "cross-model"
    assert model.card.compatible_with == "old"
    old, new = np.load(scene / "old.npy"), np.load(scene / "new.npy")
    mapped = Forward(model)(np.arange(len(old)), old)
    assert (mapped * new).sum(1).mean() > (np.roll(mapped, 7, 0) * new).sum(1).mean() + 0.3
    with pytest.raises(ModelError, match="no network"):
        model.embed(np.zeros((1, 8, 8, 3), np.uint8))


def save_network(folder: Path, dim: int) -> Path:
    torch.manual_seed(dim)
    card = ModelCard(backbone=BackboneConfig(name="test_linear", dim=dim), dim=dim, image_size=(8, 8))
    save_model(folder, Linear(dim, (8, 8)), card)
    return folder


def test_with_images_the_new_model_is_handed_over_unchanged(scene: Path, tmp_path: Path) -> None:
    old, new = save_network(tmp_path / "old", OLD), save_network(tmp_path / "new", NEW)
    given = changes(scene, compat__old_model=str(old), compat__new_model=str(new), data__workers=0)
    train(config(tmp_path / "run", **given), Ranks())
    made, before = load_model(tmp_path / "run"), load_model(new)
    images = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(made.embed(images), before.embed(images))
    assert made.transform("t21", before.embed(images)).shape == (5, OLD)
    assert made.card.compatible_with == str(old)
    assert made.card.compatible_with_hash == load_model(old).hash


def test_refusals_leave_nothing_behind(scene: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.npy"
    np.save(short, np.ones((3, NEW), np.float32))
    synthetic = changes(scene, "new", "old", data__loader="synthetic")
    cases: list[tuple[type[LceError], str, dict[str, Any]]] = [
        (ConfigError, "compat.new_embeddings", changes(scene, "old", "bank")),
        (ConfigError, "nothing to align", changes(scene, "new", "bank")),
        (ConfigError, "set compat.bank", changes(scene, "new", "new_bank")),
        (ConfigError, "3 rows", changes(scene, "old", compat__new_embeddings=str(short))),
        (ConfigError, "compat.mode belongs to lce", changes(scene, "new", "old", compat__method="bct")),
        (ConfigError, "set data.path", {k: v for k, v in synthetic.items() if k != "data__path"}),
        (ConfigError, "train.parallel = fsdp", changes(scene, "new", "old", train__parallel="fsdp")),
        (
            CenterBankError,
            "dimension 9, the old embeddings have 6",
            changes(scene, "new", "old", compat__bank=str(scene / "new-bank")),
        ),
        (
            CenterBankError,
            "dimension 6, the new embeddings have 9",
            changes(scene, "new", "bank", compat__new_bank=str(scene / "old-bank")),
        ),
    ]
    for kind, reason, given in cases:
        with pytest.raises(kind, match=reason):
            train(config(tmp_path / "run", **given), Ranks())
        assert not (tmp_path / "run").exists()


def test_two_onnx_models_get_maps_and_a_verdict(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither model is of ours; one takes images of 8 × 8, the other of 12 × 12. Three ways say the same of the maps:
    of the models along with them, of the embeddings on disk, and of maps that were trained from these."""
    rng, size = np.random.default_rng(5), {"old": (8, OLD), "new": (12, NEW)}
    models = {}
    for name, (side, dim) in size.items():
        weights = rng.normal(size=(3 * side * side, dim)).astype(np.float32)
        shape = {"shape": ["b", 3, side, side], "outputs": {"e": ["b", dim]}}
        models[name] = graph_file(tmp_path / f"{name}.onnx", weights=weights, **shape)
    given = {f"compat__{name}_model": str(path) for name, path in models.items()}
    train(config(tmp_path / "maps", **changes(scene, **given, data__workers=0, train__steps=3)), Ranks())
    said = caplog.text
    assert f"{models['old']}: fed pixels normalised by mean 0.5 and std 0.5" in said
    assert f"its images of 8 × 8 are resized to 12 × 12, which {models['new']} takes" in said
    card = load_model(tmp_path / "maps").card
    assert (card.backbone, card.dim, card.image_size) == (None, NEW, (12, 12))
    assert card.maps_of == load_model(models["new"]).hash
    assert card.compatible_with_hash == load_model(models["old"]).hash
    data = str(scene / "packed")
    rows = {name: tmp_path / f"{name}.npy" for name in models}
    for name, path in models.items():
        bank = ["centers", "from-model", str(path), data, str(tmp_path / f"bank-{name}"), "--allow-collapsed"]
        assert main([*bank, "--embeddings", str(rows[name])]) == 0
    np.save(tmp_path / "labels.npy", np.asarray(open_dataset(data).labels))
    from_model = ["--old", str(models["old"]), "--new", str(models["new"]), "--data", f"embeddings={data}"]
    from_model += ["--cache", "none", "--no-colour-check"]
    labels = ["--labels", str(tmp_path / "labels.npy")]
    from_disk = ["--old-embeddings", str(rows["old"]), "--new-embeddings", str(rows["new"]), *labels]
    common = ["--maps", str(tmp_path / "maps"), "--fars", "1e-1", "--replicates", "100"]
    found = []
    for number, words in enumerate((from_model, from_disk)):
        out = tmp_path / f"{number}.json"
        report = ["--report", str(tmp_path / "r.html")] if words is from_disk else []
        assert main(["evaluate", *words, *common, "--json", str(out), *report]) == 0
        assert "NOT" in capsys.readouterr().out
        found.append(json.loads(out.read_text()))
    assert found[0]["verdict"]["answer"] == found[1]["verdict"]["answer"]
    one, other = (result["sets"]["embeddings"]["cells"] for result in found)
    assert one.keys() == other.keys() >= {"new->old", "old->new"}
    for name, cell in one.items():
        assert other[name]["auc"] == pytest.approx(cell["auc"], abs=1e-3)
    stored = changes(scene, compat__old_embeddings=str(rows["old"]), compat__new_embeddings=str(rows["new"]))
    train(config(tmp_path / "m2", **stored | {"compat__new_model": str(models["new"]), "train__steps": 1}), Ranks())
    assert load_model(tmp_path / "m2").card.maps_of == card.maps_of
    refused = [
        ([*from_model[:3], str(models["old"]), *from_model[4:]], "of another model than"),
        (["--pixels", "0..255", *from_model], "of another model than"),
        ([*from_disk, "--data", "x=y"], "--data: not with embeddings on disk"),
        (from_disk[:4], "--labels is missing"),
        (from_model[:2], "--new is missing"),
        ([*from_disk[:2], "--new-embeddings", str(rows["old"]), *labels], "of embeddings of dimension 9"),
    ]
    for words, reason in refused:
        assert main(["evaluate", *words, *common]) == 2
        assert reason in capsys.readouterr().err
    np.save(tmp_path / "labels.npy", np.zeros(3, np.int64))
    assert main(["evaluate", *from_disk, *common]) == 2
    assert "but 3 labels" in capsys.readouterr().err
    spoilt = np.load(rows["new"])
    spoilt[5] = 0
    np.save(rows["new"], spoilt)
    np.save(tmp_path / "labels.npy", np.asarray(open_dataset(data).labels))
    assert main(["evaluate", *from_disk, *common]) == 2
    assert "new.npy, row 5: a vector of norm 0 has no direction" in capsys.readouterr().err
