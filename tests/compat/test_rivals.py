"""The rivals in the trainer: W ranks = 1 rank = the plain float64 formulas, one step at a time and in whole runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.banks import write_bank
from tests.compat.plain import mixbct
from tests.data.samples import loader_of, packed
from tests.head.cases import draw_negatives
from tests.ranks import run_ranks
from tests.runs import Linear, config, log_of, losses_of, train_rank
from trainer.compat.bank.center_bank import BankInfo, CenterBank
from trainer.compat.bank.from_model import bank_from_model
from trainer.compat.methods import losses, ndpp, neighbours
from trainer.compat.methods.advbct import AdvBct
from trainer.compat.methods.bct import bank_rows
from trainer.compat.methods.config import AnyMethod
from trainer.compat.methods.fct import Fct
from trainer.compat.methods.old_embeddings import ModelEmbeddings, StoredEmbeddings
from trainer.compat.methods.registry import build_method
from trainer.config import node_for
from trainer.data import Batch, DatasetInfo, open_dataset
from trainer.data.draws import uniforms
from trainer.distributed import Ranks
from trainer.errors import ConfigError, DataError, LceError, ModelError
from trainer.head.partial_fc import PartialFC
from trainer.head.partition import class_range
from trainer.models.card import ModelCard
from trainer.models.folder import save_model
from trainer.models.model import resized
from trainer.models.open import load_model
from trainer.networks.config import BackboneConfig
from trainer.run.config import Config
from trainer.run.engine import train
from trainer.run.startup import prepare

CLASSES, RECORDS, DIM, STEP = 11, 41, 6, 5
SIZES = {1: [13], 2: [8, 5], 3: [6, 7, 0]}
PLACES = {world: max(sizes) for world, sizes in SIZES.items()}
NUMBERS = torch.tensor([4, 20, 12, 15, 0, 29, 32, 13, 1, 28, 37, 11, 3])  # records; the classes are these modulo 11
LABELS = torch.where(NUMBERS == 0, -1, NUMBERS % CLASSES)
UNKNOWN, MASKED = 15, (1, 7, 10)  # a record without an old embedding, and classes without a centre
METHODS = ("bct", "unibct", "ndpp", "l2", "mixbct", "advbct", "fct")


def make_old(folder: Path, dim: int = DIM) -> dict[str, Any]:
    """A centre bank and old embeddings by record, as the changes of a configuration that name them."""
    generator = torch.Generator().manual_seed(dim)
    centers = torch.nn.functional.normalize(torch.randn(CLASSES, dim, generator=generator))
    mask = torch.ones(CLASSES, dtype=torch.bool)
    mask[list(MASKED)] = False
    boundaries = 0.8 * torch.rand(CLASSES, generator=generator)
    old = centers[torch.arange(RECORDS) % CLASSES] + 0.3 * torch.randn(RECORDS, dim, generator=generator)
    old[UNKNOWN] = 0
    write_bank(
        folder / "bank",
        centers=centers,
        boundaries=boundaries,
        counts=torch.full((CLASSES,), 4),
        mask=mask,
        info=BankInfo(model="old", model_hash="0123"),
    )
    np.save(folder / "old.npy", old.numpy())
    return {"compat__bank": str(folder / "bank"), "compat__old_embeddings": str(folder / "old.npy")}


def settings(folder: Path, method: str, world: int, **more: Any) -> Config:
    changes: dict[str, Any] = {
        "compat__bank": str(folder / "bank"),
        "compat__old_embeddings": str(folder / "old.npy"),
        "compat__method": method,
        "compat__weight": 0.7,
        "compat__boundary_weight": 1.3,
        "compat__old_margin": 0.1,
        "compat__mix_share": 0.4,
        "compat__neighbours": 3,
        "compat__push": 0.8,
        "compat__transform": {"name": "mlp"},
        "data__batch_size": PLACES[world] * world,
        "head__chunk_rows": 2,
    }
    return config(folder / "run", **(own_keys(method, changes) | more))


def own_keys(method: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes without keys of ``compat`` that the method does not have."""
    methods = node_for(AnyMethod)
    assert methods is not None
    keys = methods.kind({"method": method}, "", "test").model_fields
    return {k: v for k, v in changes.items() if not k.startswith("compat__") or k.removeprefix("compat__") in keys}


def global_batch() -> Tensor:
    return torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def one_step(ranks: Ranks, folder: Path, method: str, more: dict[str, Any]) -> dict[str, Any]:
    """What a method adds to a step of the head: loss, gradient of this rank's embeddings, and of its modules."""
    chosen = settings(folder, method, ranks.world_size, **more)
    inputs = prepare(chosen, ranks)
    torch.manual_seed(1)
    made = build_method(chosen.methods[0], chosen, inputs, ranks)
    assert made is not None
    for module in made.modules().values():
        module.double()
    head = PartialFC(chosen.head, CLASSES, DIM, ranks, seed=3, local_batch=PLACES[ranks.world_size])
    head.set_lr(0.0)
    sizes = SIZES[ranks.world_size]
    labels, numbers = (whole.split(sizes)[ranks.rank] for whole in (LABELS, NUMBERS))
    batch = Batch(torch.zeros(len(labels), 3, 8, 8), labels, numbers)
    out: dict[str, Any] = {}
    for with_method in (False, True):
        x = global_batch().split(sizes)[ranks.rank].clone().requires_grad_()
        seen = made.prepare(x, batch, STEP) if with_method else x
        result = head(seen, labels, STEP, (lambda *given: made.loss(*given, STEP)) if with_method else None)
        result.loss.backward()
        assert x.grad is not None
        out["loss"] = result.loss.detach() - out.get("loss", 0)
        out["x"] = x.grad - out.get("x", 0)
    out |= {
        f"report {k}": result.report[k] for k in result.report if not k.startswith(("classification", "target_cosine"))
    }
    return out | {f"{n} {k}": p.grad for n, m in made.modules().items() for k, p in m.named_parameters()}


def plain(folder: Path, method: str, more: dict[str, Any]) -> dict[str, Any]:
    """The same from the reference functions on the whole batch."""
    chosen = settings(folder, method, 1, **more)
    rows = CenterBank.open(folder / "bank").rows(0, CLASSES)
    every_old = torch.from_numpy(np.load(folder / "old.npy")).double()
    x, old = global_batch().requires_grad_(), every_old[NUMBERS]
    valid = LABELS >= 0
    known = valid & (NUMBERS != UNKNOWN)
    weight, scale = getattr(chosen.methods[0], "weight", 1.0), chosen.head.margin.scale
    modules: dict[str, torch.nn.Module] = {}
    torch.manual_seed(1)
    made = build_method(chosen.methods[0], chosen, prepare(chosen, Ranks()), Ranks())
    if method in ("bct", "unibct", "ndpp"):
        old_rows, mask = rows.centers.double(), rows.mask
        if method == "unibct":
            there = torch.arange(RECORDS) != UNKNOWN
            y = torch.arange(RECORDS)[there] % CLASSES
            old_rows, mask = losses.unibct_prototypes(every_old[there], every_old[there], y, CLASSES)
        elif method == "ndpp":
            old_rows = losses.ndpp_prototypes(old_rows, mask, 3, 0.8)
        if chosen.head.sample_rate < 1:
            taken = torch.zeros(CLASSES, dtype=torch.bool)
            taken[draw_negatives(chosen.run.seed, STEP, CLASSES, chosen.head.sample_rate, 0, CLASSES)] = True
            taken[LABELS[valid]] = True
            mask = mask & taken
        loss = weight * losses.bct(x[valid], LABELS[valid], old_rows, mask, scale, chosen.methods[0].old_margin)
    elif method == "l2":
        loss = weight * losses.l2(x[known], old[known])
    elif method == "advbct":
        assert isinstance(made, AdvBct)
        modules = {"discriminator": made.discriminator.double()}
        of = LABELS[valid]
        loss = losses.adversarial(x[known], old[known], made.discriminator, weight)
        boundary = losses.elastic_boundary(
            x[valid], rows.centers.double()[of], rows.boundaries.double()[of], rows.mask[of]
        )
        loss = loss + chosen.methods[0].boundary_weight * boundary
    elif method == "fct":
        assert isinstance(made, Fct)
        modules = {"t12": made.t12.double()}
        mapped = made.t12(torch.nn.functional.normalize(old[known]))
        loss = weight * losses.fct(mapped, x[known])
    else:
        return plain_mix(chosen, x, old, known, rows)
    loss.backward()
    gradient = torch.zeros_like(x) if x.grad is None else x.grad
    named = {f"{n} {k}": p.grad for n, m in modules.items() for k, p in m.named_parameters()}
    return {"loss": loss.detach(), "x": gradient, **named}


def plain_mix(chosen: Config, x: Tensor, old: Tensor, known: Tensor, rows: Any) -> dict[str, Any]:
    """MixBCT: the head's own loss of the mixed batch, less that of the plain one."""
    valid = LABELS >= 0
    credible = torch.zeros(len(LABELS), dtype=torch.bool)
    near = losses.cosine(old[known], rows.centers.double()[LABELS[known]]) >= rows.boundaries[LABELS[known]]
    credible[known] = near & rows.mask[LABELS[known]]
    draws = torch.from_numpy(uniforms(chosen.run.seed, STEP, NUMBERS.numpy(), np.zeros(len(LABELS), np.int64), 1)[:, 0])
    found = []
    for mix in (False, True):
        leaf = x.detach().clone().requires_grad_()
        seen = leaf[valid]
        if mix:
            seen = mixbct(seen, old[valid], credible[valid], chosen.methods[0].mix_share, draws[valid])
        head = PartialFC(chosen.head, CLASSES, DIM, Ranks(), seed=3)
        head.set_lr(0.0)
        loss = head(seen, LABELS[valid], STEP).loss
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    assert ((found[1][1] == 0).all(1) & valid).sum() == 4, "0.4 of 12, of whom more are credible"
    return {"loss": found[1][0] - found[0][0], "x": found[1][1] - found[0][1]}


CASES: list[tuple[str, dict[str, Any]]] = [
    *((m, {}) for m in METHODS),
    ("bct", {"head__sample_rate": 0.5}),
    ("ndpp", {"compat__neighbours": 3, "head__sample_rate": 0.5}),
]


def all_cases(ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
    return [one_step(ranks, folder, *case) for case in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("old")
    make_old(made)
    return made


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_is_the_plain_formula(world: int, folder: Path) -> None:
    results = [all_cases(Ranks(), folder)] if world == 1 else run_ranks(all_cases, world, folder)
    for number, case in enumerate(CASES):
        each, expected = [result[number] for result in results], plain(folder, *case)
        assert abs(expected["loss"]) > 0.01, case
        for name, value in expected.items():
            got = torch.cat([one["x"] for one in each]) if name == "x" else each[0][name]
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12, msg=lambda m: f"{case}, {name}: {m}")  # noqa: B023
        for name in each[0].keys() - {"x"}:
            for one in each[1:]:
                assert torch.equal(one[name], each[0][name]), f"{case}: {name} differs between ranks"


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (2048, 16384)])
def test_centres_are_moved_apart_block_by_block(
    rows: int, columns: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks: the plain formula; near centres come apart, and no push changes nothing."""
    monkeypatch.setattr(neighbours, "ROWS", rows)
    monkeypatch.setattr(neighbours, "COLUMNS", columns)
    bank = CenterBank.open(folder / "bank")
    whole = bank.rows(0, CLASSES)
    mask, o = whole.mask, torch.nn.functional.normalize(whole.centers.double())
    for nearest, push in ((1, 0.5), (3, 0.8), (99, 2.0), (3, 0.0)):
        moved = []
        for world in (1, 3):
            own = [bank_rows(bank, class_range(CLASSES, r, world), torch.float64) for r in range(world)]
            cpu = torch.device("cpu")
            moved.append(torch.cat([ndpp.move_apart(one, bank, nearest, push, cpu) for one in own]))
        expected = losses.ndpp_prototypes(o, mask, nearest, push)[mask]
        for one in moved:
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)
        nearest = [(v @ v.T).fill_diagonal_(-1).max() for v in (expected, o[mask])]
        assert nearest[0] < nearest[1] if push else torch.equal(nearest[0], nearest[1])
    alone = torch.zeros(CLASSES, dtype=torch.bool)
    alone[2] = True
    torch.testing.assert_close(losses.ndpp_prototypes(o, alone, 3, 0.8), o)


def test_what_the_methods_leave_out_matters(folder: Path, tmp_path: Path) -> None:
    """The control: with the masked classes, the margin or the unknown image the losses are others."""
    make_old(tmp_path)
    centers = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(DIM)))
    whole = torch.ones(CLASSES, dtype=torch.bool)
    write_bank(
        tmp_path / "bank",
        centers=centers,
        boundaries=torch.zeros(CLASSES),
        counts=whole.long(),
        mask=whole,
        info=BankInfo(),
        overwrite=True,
    )
    old = np.load(tmp_path / "old.npy")
    old[UNKNOWN] = 1
    np.save(tmp_path / "old.npy", old)
    for method in METHODS:
        here, there = (one_step(Ranks(), f, method, {}) for f in (folder, tmp_path))
        assert not torch.allclose(here["loss"], there["loss"], rtol=1e-3), method
    free = one_step(Ranks(), folder, "bct", {"compat__old_margin": 0.0})
    assert free["loss"] < one_step(Ranks(), folder, "bct", {})["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_whole_runs(method: str, folder: Path, tmp_path: Path) -> None:
    """The same losses on three ranks, and from a run that is cut in two; the model says what it is."""
    more = {"schedule__name": "constant", "schedule__warmup": 0.0, "data__batch_size": 7, "head__sample_rate": 0.6}

    def changes() -> dict[str, Any]:
        given = settings(folder, method, 1, **more).model_dump(mode="json")
        sections = ("compat", "data", "head", "schedule")
        return {f"{section}__{key}": value for section in sections for key, value in given[section].items()}

    same = changes()
    train(config(tmp_path / "1", **same), Ranks())
    expected = losses_of(tmp_path / "1")
    run_ranks(train_rank, 3, tmp_path / "3", same)
    np.testing.assert_allclose(losses_of(tmp_path / "3"), expected, rtol=1e-8)
    train(config(tmp_path / "cut", **same, train__steps=4), Ranks())
    train(config(tmp_path / "cut", **same), Ranks())
    np.testing.assert_allclose(losses_of(tmp_path / "cut"), expected, rtol=1e-12)
    names = {
        "bct": "influence",
        "unibct": "influence",
        "ndpp": "influence",
        "mixbct": "replaced",
        "advbct": "adversarial",
        "fct": "map",
    }
    assert np.isfinite([line[names.get(method, method)] for line in log_of(tmp_path / "1")]).all()
    model, many = load_model(tmp_path / "1"), load_model(tmp_path / "3")
    assert (model.card.mode, model.card.compatible_with_hash) == (method, "0123")
    assert set(model.card.transforms) == ({"t12"} if method == "fct" else set())
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(model.embed(images), many.embed(images), atol=1e-6)
    if method == "fct":
        vectors = np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32)
        np.testing.assert_allclose(model.transform("t12", vectors), many.transform("t12", vectors), atol=1e-6)


@pytest.mark.parametrize(("method", "figure"), [("bct", "influence"), ("l2", "l2"), ("fct", "map")])
def test_the_loss_is_minimised(method: str, figure: str, tmp_path: Path) -> None:
    """Against a run that as good as only reports it."""
    old = make_old(tmp_path, 9 if method == "fct" else DIM)
    ends = []
    for weight in (1e-12, 5.0):
        folder = tmp_path / str(weight)
        more = {"compat__transform": {"name": "mlp"}, "compat__weight": weight, "train__steps": 100}
        given = own_keys(method, {"compat__method": method, "optimizer__lr": 0.02, **old, **more})
        train(config(folder, **given), Ranks())
        ends.append(np.mean([line[figure] for line in log_of(folder)][-10:]))
    assert ends[1] < 0.7 * ends[0]


def test_the_old_model_run_along(tmp_path: Path) -> None:
    """It sees the pixels as it does in use: its own normalisation, its own order of colours."""
    torch.manual_seed(2)
    backbone = BackboneConfig(name="test_linear", dim=DIM)
    card = ModelCard(
        backbone=backbone, dim=DIM, image_size=(8, 8), color="BGR", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    save_model(tmp_path / "old", Linear(DIM, (8, 8)), card)
    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)
    look = DatasetInfo(image_size=(8, 8), mean=(0.4, 0.4, 0.5), std=(0.25, 0.5, 0.3))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(look.mean).view(3, 1, 1)) / (
        torch.tensor(look.std).view(3, 1, 1)
    )
    source = ModelEmbeddings(tmp_path / "old", look, torch.device("cpu"))
    labels = torch.zeros(4, dtype=torch.int64)
    found = torch.nn.functional.normalize(source.of(Batch(images, labels, labels)))
    np.testing.assert_allclose(found.numpy(), load_model(tmp_path / "old").embed(pixels, "RGB"), atol=1e-5)
    assert source.of(Batch(images[:0], labels[:0], labels[:0])).shape == (0, DIM)
    settings = {"compat__method": "l2", "compat__old_model": str(tmp_path / "old"), "train__steps": 2}
    run_ranks(train_rank, 2, tmp_path / "run", settings)
    assert load_model(tmp_path / "run").card.compatible_with_hash == source.fingerprint
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = torch.nn.functional.normalize(source.of(Batch(larger, labels, labels)))
    stored = resized(pixels.repeat(2, 1).repeat(2, 2), (8, 8))
    np.testing.assert_allclose(found.numpy(), load_model(tmp_path / "old").embed(stored, "RGB"), atol=0.02)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"compat__method": "bct"}, ConfigError, r"compat\.bank"),
        ({"compat__method": "l2"}, ConfigError, r"needs one of them, 0 given"),
        ({"compat__method": "fct", "old": "old.npy", "compat__old_model": "x"}, ConfigError, "2 given"),
        (
            {"compat__method": "unibct", "compat__old_model": "x"},
            ConfigError,
            "compat.method is unibct",
        ),
        (
            {"compat__method": "l2", "old": "old.npy", "compat__mode": "both"},
            ConfigError,
            "compat.mode belongs to lce",
        ),
        ({"compat__method": "l2", "old": "old.npy", "data__synthetic_records": 40}, ConfigError, "41 rows.*40 records"),
        ({"compat__method": "l2", "old": "old.npy", "backbone__dim": 5}, ConfigError, "use backbone.dim=6"),
        ({"compat__method": "bct", "bank": True, "backbone__dim": 5}, ConfigError, "use backbone.dim=6"),
        ({"compat__method": "l2", "old": "absent.npy"}, DataError, "no such file"),
        ({"compat__method": "l2", "old": "doubles.npy"}, DataError, "expected float32"),
        ({"compat__method": "l2", "old": "zeros.npy"}, ConfigError, "is zero"),
        ({"compat__method": "l2", "old": "nan.npy"}, ConfigError, "row 3 is not finite"),
        ({"compat__method": "advbct", "bank": True, "old": "wide.npy"}, ConfigError, "dimension 6.*have 9"),
        ({"compat__method": "l2", "compat__old_model": "absent"}, ModelError, "no such file or folder"),
        (
            {"compat__method": "mixbct", "bank": True, "old": "old.npy", "head__margin": {"name": "magface"}},
            ConfigError,
            "norms",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[LceError], words: str, folder: Path, tmp_path: Path) -> None:
    old = np.load(folder / "old.npy")
    np.save(tmp_path / "old.npy", old)
    np.save(tmp_path / "doubles.npy", old.astype(np.float64))
    np.save(tmp_path / "zeros.npy", 0 * old)
    np.save(tmp_path / "wide.npy", np.ones((RECORDS, 9), np.float32))
    old[3, 2] = np.nan
    np.save(tmp_path / "nan.npy", old)
    given = {key: value for key, value in changes.items() if "__" in key}
    if "old" in changes:
        given["compat__old_embeddings"] = str(tmp_path / changes["old"])
    if "bank" in changes:
        given["compat__bank"] = str(folder / "bank")
    with pytest.raises(error, match=words):
        train(config(tmp_path / "run", **given), Ranks())
    assert not (tmp_path / "run").exists()


def test_rows_are_asked_for_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(tmp_path, "l2", 1, train__steps=9, **make_old(tmp_path))
    told, at_once = list[int](), list[list[int]]()
    read = StoredEmbeddings.read

    def reading(self: StoredEmbeddings, records: Any) -> Any:
        at_once.append([told.index(one) for one in records.tolist()] if told else [])
        return read(self, records)

    monkeypatch.setattr(StoredEmbeddings, "will_need", lambda self, records: told.extend(records.tolist()))
    monkeypatch.setattr(StoredEmbeddings, "read", reading)
    train(chosen, Ranks())
    assert len([one for one in at_once if one]) == 9
    assert len(told) == 3 * RECORDS, "twelve batches, four an epoch: three ahead of the ninth"


def test_stored_rows_are_read_where_they_lie(tmp_path: Path) -> None:
    path, rows = tmp_path / "old.npy", np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    np.save(path, rows)
    source = StoredEmbeddings(path, 50)
    asked = np.array([3, 0, 49, 3])
    source.will_need(asked)
    np.testing.assert_array_equal(source.read(asked), rows[asked])
    assert source.read(asked[:0]).shape == (0, 6)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(DataError, match="row 49 is not there any more"):
        source.read(asked)
    np.save(path, np.asfortranarray(rows))
    with pytest.raises(ConfigError, match=r"compat.old_embeddings = .*column by column"):
        StoredEmbeddings(path, 50)


def test_from_images_to_compatible_models(tmp_path: Path) -> None:
    """Real images: an old model, its bank and embeddings by record, then models trained with them and with it."""
    data = packed(tmp_path / "data", classes=6)
    look = {"data__loader": "torch", "data__workers": 0, "data__path": str(data), "data__augment": {"flip": 0.0}}
    train(config(tmp_path / "old", train__steps=20, optimizer__lr=0.05, **look), Ranks())
    old, dataset = load_model(tmp_path / "old"), open_dataset(data)
    array = tmp_path / "old.npy"
    bank_from_model(old, dataset, tmp_path / "bank", keep_embeddings=array)
    source = ModelEmbeddings(tmp_path / "old", dataset.info, torch.device("cpu"))
    loader = loader_of(dataset, "torch")
    batch = next(loader.batches())
    loader.close()
    along = torch.nn.functional.normalize(source.of(batch))
    torch.testing.assert_close(along, StoredEmbeddings(array, len(dataset)).of(batch), rtol=0, atol=1e-5)
    for method in METHODS:
        given = {} if method == "unibct" else {"compat__bank": str(tmp_path / "bank")}
        if method not in ("bct", "ndpp"):
            key = "old_model" if method in ("l2", "advbct") else "old_embeddings"
            given[f"compat__{key}"] = str(tmp_path / "old" if key == "old_model" else array)
        train(config(tmp_path / method, train__steps=3, compat__method=method, **given, **look), Ranks())
        card = load_model(tmp_path / method).card
        assert (card.mode, card.compatible_with_hash) == (method, None if method == "unibct" else old.hash)
    both = {"compat__method": "advbct", "compat__bank": str(tmp_path / "bank")}
    for key, other in (("old_model", tmp_path / "bct"), ("old_embeddings", tmp_path / "other.npy")):
        if key == "old_embeddings":
            bank_from_model(load_model(tmp_path / "bct"), dataset, tmp_path / "other", keep_embeddings=other)
        with pytest.raises(
            ConfigError, match=rf"hash {old.hash}.*with the hash (?!{old.hash}).*make both from one model"
        ):
            train(config(tmp_path / "two", **both, **{f"compat__{key}": str(other)}, **look), Ranks())
    assert not (tmp_path / "two").exists()
