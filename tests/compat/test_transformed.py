"""LCE through learned maps: W ranks = 1 rank = the plain formulas, for every mode, map and pair of dimensions."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks
from tests.sections import variant
from trainer import distributed
from trainer.compat.bank.center_bank import BankRows
from trainer.compat.methods import losses
from trainer.compat.methods.config import AnyMethod, LceMapsConfig
from trainer.compat.methods.lce import TransformedCompat, classes_of, gather_own, gather_pairs, own_classes
from trainer.distributed import Ranks
from trainer.head.partition import class_range
from trainer.networks.config import AnyTransform
from trainer.networks.transform import build_transform

CLASSES = 11
LABELS = torch.tensor([4, 9, 1, 4, -1, 7, 10, 2, 1, 6, 4, 0, 3])
SIZES = {1: [13], 2: [8, 5], 3: [6, 7, 0]}
DIMS = ((6, 6), (12, 6), (6, 12))
CASES = [(mode, "rbt", *dims) for mode in ("backward", "forward", "both", "cross-model") for dims in DIMS] + [
    ("both", name, *dims) for name in ("linear", "orthogonal", "mlp") for dims in DIMS
]


def config(mode: Any, name: Any, **more: Any) -> LceMapsConfig:
    transform = variant(AnyTransform, name=name, blocks=2, paths=2, bottleneck=4)
    given = {"alignment_weight": 0.7, "boundary_weight": 1.3, "transform": transform, "bank": "bank"} | more
    made: LceMapsConfig = variant(AnyMethod, method="lce", mode=mode, **given)
    return made


def problem(d1: int, d2: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(d1 * 100 + d2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(CLASSES, dtype=torch.bool)
    mask[[1, 8, 10]] = False
    return {
        "rows": randn(CLASSES, d2),
        "centers": torch.nn.functional.normalize(randn(CLASSES, d1)),
        "boundaries": torch.rand(CLASSES, generator=generator, dtype=torch.float64),
        "mask": mask,
        "x": randn(len(LABELS), d2),
    }


def module(mode: str, name: str, d1: int, d2: int, **more: Any) -> TransformedCompat:
    torch.manual_seed(7)
    made = TransformedCompat(config(mode, name, **more), d1, d2).double()
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def one_case(ranks: Ranks, mode: str, name: str, d1: int, d2: int) -> dict[str, Any]:
    """Loss, this rank's parts of the gradients, T's gradients and state, after one training step of T."""
    p, sizes = problem(d1, d2), SIZES[ranks.world_size]
    own = class_range(CLASSES, ranks.rank, ranks.world_size)
    part = slice(own.start, own.stop)
    bank = BankRows(
        p["centers"][part], p["boundaries"][part], p["mask"][part], torch.zeros(own.size), torch.zeros(own.size)
    )
    index = own_classes(LABELS, CLASSES, ranks)
    rows = p["rows"][part][index].requires_grad_()
    local = p["x"].split(sizes)[ranks.rank].clone().requires_grad_()
    compat = module(mode, name, d1, d2)
    pairs = gather_pairs(LABELS, rows, bank, CLASSES, ranks)
    loss, report = compat(pairs, gather_own(local, sizes, ranks.rank))
    loss.backward()
    gradients = {f"gradient {n}": q.grad for n, q in compat.named_parameters()}
    torch.optim.SGD(compat.parameters(), 0.1).step()
    state = {f"state {n}": v.detach().clone() for n, v in compat.state_dict().items() if v.is_floating_point()}
    return {"loss": loss.detach(), **report, "rows": rows.grad, "x": local.grad, **gradients, **state}


def all_cases(ranks: Ranks) -> list[dict[str, Any]]:
    return [one_case(ranks, *case) for case in CASES]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return all_cases(Ranks())


@pytest.mark.parametrize("world", [2, 3])
def test_many_ranks_are_one(world: int, alone: list[dict[str, Any]]) -> None:
    results = run_ranks(all_cases, world)
    for number, expected in enumerate(alone):
        each = [result[number] for result in results]
        for name, value in expected.items():
            if name in ("rows", "x"):
                got = torch.cat([one[name] for one in each])
                torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12)
                continue
            torch.testing.assert_close(each[0][name], value, rtol=1e-10, atol=1e-12)
            for one in each[1:]:
                assert torch.equal(one[name], each[0][name]), f"{CASES[number]}: {name} differs between ranks"


@pytest.mark.parametrize(("mode", "name", "d1", "d2"), CASES)
def test_one_rank_is_the_plain_formula(mode: str, name: str, d1: int, d2: int, alone: list[dict[str, Any]]) -> None:
    """T₂₁ sees rows and embeddings together, so the reference evaluates it once on both too and hands out the
    results."""
    p, compat = problem(d1, d2), module(mode, name, d1, d2)
    known = LABELS >= 0
    present = sorted({y for y in LABELS.tolist() if y >= 0 and p["mask"][y]})
    of = known & p["mask"][LABELS]
    rows, x = p["rows"].clone().requires_grad_(), p["x"].clone().requires_grad_()
    w, e = torch.nn.functional.normalize(rows[present]), torch.nn.functional.normalize(x[of])
    maps: dict[str, Any] = {"w": {}, "x": {}}
    if compat.t21 is not None:
        mapped = compat.t21(torch.cat([w, e]))
        maps = {"w": {"t21": lambda _: mapped[: len(w)]}, "x": {"t21": lambda _: mapped[len(w) :]}}
    if compat.t12 is not None:
        centers = compat.t12(p["centers"][present])
        maps["w"]["t12"] = lambda _: centers
        if compat.t21 is None:
            place = [present.index(y) for y in LABELS[of].tolist()]
            maps["x"]["t12"] = lambda _: centers[place]
    everyone = torch.ones(len(present), dtype=torch.bool)
    a = losses.alignment(rows[present], p["centers"][present], everyone, **maps["w"])
    b = losses.boundary(x, p["centers"][LABELS], p["boundaries"][LABELS], of, **maps["x"])
    loss = 0.7 * a + 1.3 * b
    loss.backward()
    got = alone[CASES.index((mode, name, d1, d2))]
    assert x.grad is not None
    for part, value in (("alignment", a), ("boundary", b), ("loss", loss), ("x", x.grad)):
        torch.testing.assert_close(got[part], value.detach(), rtol=1e-10, atol=1e-12)
    assert rows.grad is not None
    asked = sorted({y for y in LABELS.tolist() if y >= 0})
    torch.testing.assert_close(got["rows"], rows.grad[asked], rtol=1e-10, atol=1e-12)
    for n, q in compat.named_parameters():
        torch.testing.assert_close(got[f"gradient {n}"], q.grad, rtol=1e-9, atol=1e-12)


def test_masked_classes_change_no_bit_and_a_seen_one_does() -> None:
    p = problem(6, 6)
    results: list[Any] = []
    for change in ("none", "masked", "kept"):
        centers, rows = p["centers"].clone(), p["rows"].clone()
        at = {"none": [], "masked": [1, 10], "kept": [4]}[change]
        centers[at] = torch.nan if change == "masked" else -centers[at]
        compat = module("both", "rbt", 6, 6)
        bank = BankRows(centers, p["boundaries"], p["mask"], torch.zeros(CLASSES), torch.zeros(CLASSES))
        leaf = rows[own_classes(LABELS, CLASSES, Ranks())].requires_grad_()
        x = p["x"].clone().requires_grad_()
        loss, _ = compat(gather_pairs(LABELS, leaf, bank, CLASSES, Ranks()), x)
        loss.backward()
        results.append((loss.detach(), leaf.grad, x.grad, dict(compat.state_dict())))
    first, masked, kept = results
    assert torch.equal(first[0], masked[0])
    assert torch.equal(first[1], masked[1])
    assert torch.equal(first[2], masked[2])
    assert all(torch.equal(v, masked[3][n]) for n, v in first[3].items())
    assert not first[2][~p["mask"][LABELS] | (LABELS < 0)].any()
    assert not torch.allclose(first[0], kept[0]), "the control"


def test_too_little_for_statistics_is_nothing() -> None:
    p, compat = problem(6, 6), module("backward", "rbt", 6, 6)
    before = {n: v.clone() for n, v in compat.state_dict().items()}
    labels = torch.tensor([1, 10, 4, 4])
    bank = BankRows(p["centers"], p["boundaries"], p["mask"], torch.zeros(CLASSES), torch.zeros(CLASSES))
    pairs = gather_pairs(labels, p["rows"][own_classes(labels, CLASSES, Ranks())], bank, CLASSES, Ranks())
    loss, report = compat(pairs, p["x"][:4])
    assert loss.item() == report["alignment"].item() == 0
    assert all(torch.equal(v, before[n]) for n, v in compat.state_dict().items())


def test_authors_formula() -> None:
    p = problem(6, 6)
    bank = BankRows(p["centers"], p["boundaries"], p["mask"], torch.zeros(CLASSES), torch.zeros(CLASSES))
    rows = p["rows"][own_classes(LABELS, CLASSES, Ranks())]
    ours, theirs = (module("backward", "linear", 6, 6, authors_formula=a) for a in (False, True))
    pairs = gather_pairs(LABELS, rows, bank, CLASSES, Ranks())
    got = theirs(pairs, p["x"])[1]["alignment"]
    w = torch.nn.functional.normalize(pairs.rows[pairs.mask])
    assert theirs.t21 is not None
    expected = torch.nn.functional.mse_loss(theirs.t21(w), pairs.centers[pairs.mask]) * 6 / 2
    torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=0)
    assert not torch.allclose(got, ours(pairs, p["x"])[1]["alignment"])


def test_orthogonal_maps_stay_orthogonal_and_rbt_starts_as_its_skip() -> None:
    for d_in, d_out in ((6, 6), (12, 6), (6, 12)):
        made = build_transform(variant(AnyTransform, name="orthogonal"), d_in, d_out).double()
        optimizer = torch.optim.SGD(made.parameters(), 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            made(torch.randn(8, d_in, dtype=torch.float64)).square().sum(1).sqrt().sum().neg().backward()
            (made(torch.randn(8, d_in, dtype=torch.float64)) - 1).square().sum().backward()
            optimizer.step()
        q = made(torch.eye(d_in, dtype=torch.float64)).T
        gram = q @ q.T if d_out < d_in else q.T @ q
        torch.testing.assert_close(gram, torch.eye(min(d_in, d_out), dtype=torch.float64), atol=1e-6, rtol=0)
    rbt = build_transform(variant(AnyTransform), 6, 6)
    x = torch.randn(9, 6)
    torch.testing.assert_close(rbt(x), x)


def count_collectives(ranks: Ranks) -> int:
    calls: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            calls.append(name)
            return real(*args, **more)

        return call

    for name in ("all_reduce", "reduce_scatter_tensor", "broadcast", "all_gather", "broadcast_object_list"):
        setattr(dist, name, counted(name, getattr(dist, name)))
    distributed._all_gather = counted("all_gather", distributed._all_gather)
    p, sizes = problem(6, 12), SIZES[ranks.world_size]
    own = class_range(CLASSES, ranks.rank, ranks.world_size)
    part = slice(own.start, own.stop)
    bank = BankRows(
        p["centers"][part], p["boundaries"][part], p["mask"][part], torch.zeros(own.size), torch.zeros(own.size)
    )
    x = gather_own(p["x"].split(sizes)[ranks.rank].clone().requires_grad_(), sizes, ranks.rank)
    calls.clear()
    rows = p["rows"][part][own_classes(LABELS, CLASSES, ranks)].requires_grad_()
    loss, _ = module("both", "rbt", 6, 12)(gather_pairs(LABELS, rows, bank, CLASSES, ranks), x)
    loss.backward()
    assert calls == ["all_gather"], calls
    return len(calls)


def test_one_collective_a_step() -> None:
    assert run_ranks(count_collectives, 2) == [1, 1]


def test_classes_of_labels() -> None:
    classes, place = classes_of(torch.tensor([5, -1, 2, 5]))
    assert (classes.tolist(), place.tolist()) == ([2, 5], [1, -1, 0, 1])
    classes, place = classes_of(torch.tensor([3, 3]))
    assert (classes.tolist(), place.tolist()) == ([3], [0, 0])
