"""Each reference loss against numpy written from the formula, against finite differences, and with masked classes
poisoned."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from tests.compat.plain import mixbct
from tests.sections import variant
from trainer.compat.methods import losses
from trainer.networks.config import AnyTransform
from trainer.networks.transform import build_transform

C, D1, D2, N = 6, 5, 8, 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


MASK = torch.tensor([True, True, False, True, False, True])


def linear(dim_in: int, dim_out: int) -> nn.Module:
    module = nn.Linear(dim_in, dim_out).double()
    nn.init.normal_(module.weight)
    return module


def through(module: nn.Module, v: np.ndarray) -> np.ndarray:
    weight, bias = (module.get_parameter(name).detach().numpy() for name in ("weight", "bias"))
    return v @ weight.T + bias


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("which", ["t21", "t12", "both"])
def test_alignment_through_maps(which: str, authors: bool) -> None:
    w, o = randn(C, D2), randn(C, D1)
    t21, t12 = linear(D2, D1), linear(D1, D2)
    keep = MASK.numpy()
    nw, no = unit(w.detach().numpy()[keep]), unit(o.detach().numpy()[keep])
    made = (lambda v: v) if authors else unit
    backward = ((made(through(t21, nw)) - no) ** 2).mean() * D1 / 2
    forward = ((made(through(t12, no)) - nw) ** 2).mean() * D2 / 2
    expected = {"t21": backward, "t12": forward, "both": (backward + forward) / 2}[which]
    maps: dict[str, Any] = {"t21": {"t21": t21}, "t12": {"t12": t12}, "both": {"t21": t21, "t12": t12}}[which]
    got = losses.alignment(w, o, MASK, authors_formula=authors, **maps)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: losses.alignment(a, o, MASK, authors_formula=authors, **maps), (w,))


def test_direct_alignment_is_the_papers_mse_in_other_units() -> None:
    w, o = randn(C, D2), randn(C, D2)
    everyone = torch.ones(C, dtype=torch.bool)
    got = losses.alignment(w, o, everyone)
    assert got.item() == pytest.approx((mse_loss(normalize(w), normalize(o)) * D2 / 2).item(), rel=1e-12)
    cosines = (unit(w.detach().numpy()) * unit(o.detach().numpy())).sum(1)
    assert got.item() == pytest.approx((1 - cosines).mean(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: losses.alignment(a, o, MASK), (w,))


@pytest.mark.parametrize("which", ["direct", "t21", "t12"])
def test_boundary(which: str) -> None:
    dim = D1 if which == "direct" else D2
    x, o = randn(N, dim), randn(N, D1)
    b = torch.linspace(-0.5, 0.9, N, dtype=torch.float64)
    mask = torch.arange(N) % 3 != 1
    t21, t12 = linear(D2, D1), linear(D1, D2)
    maps: dict[str, Any] = {"direct": {}, "t21": {"t21": t21}, "t12": {"t12": t12}}[which]
    nx, no = unit(x.detach().numpy()), unit(o.detach().numpy())
    left = unit(through(t21, nx)) if which == "t21" else nx
    right = unit(through(t12, no)) if which == "t12" else no
    hinge = np.maximum(0, b.numpy() - (left * right).sum(1))
    assert 0 < (hinge > 0).sum() < N
    got = losses.boundary(x, o, b, mask, **maps)
    assert got.item() == pytest.approx(hinge[mask.numpy()].mean(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: losses.boundary(a, o, b, mask, **maps), (x,))


def test_the_authors_boundary_sits_in_the_clamp() -> None:
    x, o = (randn(N, D1).detach() * 30).requires_grad_(), randn(N, D1)
    b, mask = torch.full((N,), 0.99, dtype=torch.float64), torch.ones(N, dtype=torch.bool)
    product = (x.detach().numpy() * unit(o.detach().numpy())).sum(1)
    got = losses.boundary(x, o, b, mask, authors_formula=True)
    assert got.item() == pytest.approx(np.maximum(0, 0.99 - product.clip(-1, 1)).mean(), rel=1e-12)
    got.backward()
    assert x.grad is not None
    clamped = np.abs(product) > 1
    assert clamped.mean() > 0.8
    assert not x.grad[clamped].any(), "no gradient for nearly every sample: why ours normalises"


def test_bct_against_a_loop() -> None:
    x, rows = randn(N, D1), randn(C, D1)
    labels = torch.arange(N) % C
    scale, margin, total = 16.0, 0.3, []
    nx, nr, keep = unit(x.detach().numpy()), unit(rows.detach().numpy()), MASK.numpy()
    for i, y in enumerate(labels.tolist()):
        if not keep[y]:
            continue
        logits = {j: scale * (nx[i] @ nr[j] - (margin if j == y else 0)) for j in range(C) if keep[j]}
        total.append(math.log(sum(math.exp(v) for v in logits.values())) - logits[y])
    got = losses.bct(x, labels, rows, MASK, scale, margin)
    assert got.item() == pytest.approx(np.mean(total), rel=1e-10)
    assert torch.autograd.gradcheck(lambda a: losses.bct(a, labels, rows.detach(), MASK, scale, margin), (x,))


def test_l2_and_fct() -> None:
    x, e = randn(N, D1), randn(N, D1)
    squares = ((unit(x.detach().numpy()) - unit(e.detach().numpy())) ** 2).sum(1)
    assert losses.l2(x, e).item() == pytest.approx(squares.mean() / 2, rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: losses.l2(a, e), (x,))
    losses.fct(e, x).backward()
    assert x.grad is None, "the new embeddings are the target"
    assert e.grad is not None
    assert losses.fct(e, x).item() == pytest.approx(squares.mean() / 2, rel=1e-12)


def test_unibct_prototypes_against_a_series() -> None:
    """(1 − λ)(I − λE)⁻¹ = (1 − λ) Σ λᵏ Eᵏ: the average over walks of all lengths."""
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 3])
    new, old = torch.randn(7, D2, dtype=torch.float64), torch.randn(7, D1, dtype=torch.float64)
    got, mask = losses.unibct_prototypes(new, old, labels, 5, share=0.6, temperature=0.5)
    assert mask.tolist() == [True, False, True, True, False]
    for j in (0, 2, 3):
        x, e = unit(new[labels == j].numpy()), unit(old[labels == j].numpy())
        links = np.exp(x @ x.T / 0.5) * (1 - np.eye(len(x)))
        links = links / links.sum(1, keepdims=True) if len(x) > 1 else links + 1
        walk, total = np.eye(len(x)), np.zeros((len(x), D1))
        for k in range(200):
            total += 0.4 * 0.6**k * walk @ e
            walk = walk @ links
        np.testing.assert_allclose(got[j], unit(total.mean(0)), atol=1e-10)
    assert not got[~mask].any()
    plain, _ = losses.unibct_prototypes(new, old, labels, 5, share=0.0)
    np.testing.assert_allclose(plain[0], unit(unit(old[:4].numpy()).mean(0)), atol=1e-12)


def test_elastic_boundary_lies_between_the_old_radius_and_the_batch() -> None:
    x, o = randn(N, D1), randn(N, D1)
    mask = torch.arange(N) % 4 != 0
    angles = np.arccos((unit(x.detach().numpy()) * unit(o.detach().numpy())).sum(1))
    radius = np.linspace(0.3, 2.0, N)
    b = torch.cos(torch.from_numpy(radius))
    keep = mask.numpy()
    for elasticity in (0.0, 0.4, 1.0):
        usual = angles[keep].mean()
        limit = radius[keep] + elasticity * np.maximum(0, usual - radius[keep])
        expected = np.maximum(0, angles[keep] - limit).mean()
        got = losses.elastic_boundary(x, o, b, mask, elasticity)
        assert got.item() == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(lambda a: losses.elastic_boundary(a, o, b, mask, 0.0), (x,))
    same = randn(3, D1)
    losses.angle(same, same.detach()).sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_adversarial_trains_the_discriminator_and_reverses_for_the_embeddings() -> None:
    x, e = randn(N, D1), randn(4, D1)
    discriminator = linear(D1, 1)
    got = losses.adversarial(x, e, discriminator)
    logits = through(discriminator, unit(np.concatenate([x.detach().numpy(), e.detach().numpy()])))[:, 0]
    signed = np.where(np.arange(N + 4) < N, logits, -logits)
    assert got.item() == pytest.approx(np.log1p(np.exp(-signed)).mean(), rel=1e-10)
    got.backward()
    assert x.grad is not None
    step = 1e-3 * x.grad
    assert losses.adversarial((x - step).detach(), e, discriminator) > got, "going down it confuses the discriminator"
    with torch.no_grad():
        for p in discriminator.parameters():
            assert p.grad is not None
            p.sub_(1e-3 * p.grad)
    assert losses.adversarial(x, e, discriminator) < got


def test_adversarial_weight_is_of_the_embeddings_gradient_alone() -> None:
    x, e = randn(N, D1), randn(4, D1)
    discriminator = linear(D1, 1)
    own = list(discriminator.parameters())

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [x, *own]))

    both = torch.nn.functional.normalize(torch.cat([x, e]))
    target = (torch.arange(N + 4) < N).double()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(discriminator(both)[:, 0], target)
    weighted = losses.adversarial(x, e, discriminator, 7.0)
    assert weighted.item() == pytest.approx(plain.item(), rel=1e-12)
    into_x, *into_own = gradients(weighted)
    expected, *expected_own = gradients(plain)
    torch.testing.assert_close(into_x, -7.0 * expected, rtol=1e-10, atol=1e-14)
    for got, same in zip(into_own, expected_own, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-10, atol=1e-14)


def test_mixbct_replaces_a_share_of_credible_images() -> None:
    x, e = randn(N, D1), randn(N, D1)
    credible = torch.arange(N) != 4
    draws = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.0, 0.8, 0.7, 0.6, 0.3], dtype=torch.float64)
    mixed = mixbct(x, e, credible, 1 / 3, draws)
    old = [1, 3, 8]
    np.testing.assert_allclose(mixed[old].detach(), unit(e.detach().numpy())[old], atol=1e-12)
    others = [i for i in range(N) if i not in old]
    np.testing.assert_allclose(mixed[others].detach(), unit(x.detach().numpy())[others], atol=1e-12)
    mixed.sum().backward()
    assert x.grad is not None
    assert not x.grad[old].any()
    assert x.grad[others].any(1).all()
    assert e.grad is None
    everything = mixbct(x, e, torch.zeros(N, dtype=torch.bool), 1.0, draws)
    np.testing.assert_allclose(everything.detach(), unit(x.detach().numpy()), atol=1e-12)


def test_masked_classes_contribute_nothing_even_when_they_are_nan() -> None:
    w, o, x = randn(C, D1), randn(C, D1).detach(), randn(N, D1)
    labels = torch.arange(N) % C
    b = torch.full((C,), 0.9, dtype=torch.float64)
    t21 = build_transform(variant(AnyTransform, name="rbt", bottleneck=4), D1, D1).double().train()

    def run(centers: Tensor, boundaries: Tensor) -> tuple[Tensor, ...]:
        of = MASK[labels]
        loss = (
            losses.alignment(w, centers, MASK, t21=t21)
            + losses.boundary(x, centers[labels], boundaries[labels], of, t21=t21)
            + losses.bct(x, labels, centers, MASK, 8.0)
            + losses.elastic_boundary(x, centers[labels], boundaries[labels], of)
        )
        return (loss, *torch.autograd.grad(loss, (w, x)))

    clean = run(o, b)
    poisoned, limits = o.clone(), b.clone()
    poisoned[~MASK], limits[~MASK] = torch.nan, torch.nan
    for expected, got in zip(clean, run(poisoned, limits), strict=True):
        assert torch.equal(expected, got)
    assert not clean[1][~MASK].any()
    assert not clean[2][~MASK[labels]].any()
    nothing = torch.zeros(C, dtype=torch.bool)
    assert losses.alignment(w, o, nothing).item() == 0
    assert losses.boundary(x, o[labels], b[labels], nothing[labels]).item() == 0


def test_contrastive_loss_prefers_the_class_among_the_other_models_embeddings() -> None:
    mapped, targets = randn(N, D1), randn(N, D1)
    y, tau = torch.tensor([0, 1, 0, 2, 1, 0, 3, 3, 4]), 0.3
    a, b = unit(mapped.detach().numpy()), unit(targets.detach().numpy())
    expected = 0.0
    for i in range(N):
        q = [math.exp(a[i] @ b[j] / tau) for j in range(N)]
        own = [j for j in range(N) if y[j] == y[i]]
        expected -= sum(math.log(q[j] / sum(q)) for j in own) / len(own) / N
    assert losses.contrastive(mapped, targets, y, tau).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda m, t: losses.contrastive(m, t, y, tau), (mapped, targets))


@pytest.mark.parametrize("shape", [(D1, D2), (D2, D1), (D1, D1)])
def test_lambda_orthogonality_acts_above_its_threshold(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    m = matrix.detach().numpy()
    gram = m @ m.T if shape[0] <= shape[1] else m.T @ m
    apart = math.sqrt(((gram - np.eye(len(gram))) ** 2).sum())
    found = losses.gram_distance(matrix)
    assert found.item() == pytest.approx(apart, rel=1e-12)
    for threshold in (apart - 0.1, apart, apart + 2):
        switch = 1 / (1 + math.exp(-losses.STEEPNESS * (apart - threshold)))
        assert losses.orthogonality(found, threshold).item() == pytest.approx(switch * apart, rel=1e-9)
    assert torch.autograd.gradcheck(lambda w: losses.orthogonality(losses.gram_distance(w), apart), matrix)
    unturned = torch.eye(*shape, dtype=torch.float64, requires_grad=True)  # where maps start
    losses.orthogonality(losses.gram_distance(unturned), 0.0).backward()
    assert unturned.grad is not None
    assert not unturned.grad.any()


def test_expected_distance_is_least_at_the_mean_and_leaves_the_map_alone() -> None:
    s, d = randn(N), torch.rand(N, dtype=torch.float64, requires_grad=True)
    plain = [(math.exp(-a) * b + a) / 2 for a, b in zip(s.tolist(), d.tolist(), strict=True)]
    value = losses.expected_distance(s, d)
    assert value.item() == pytest.approx(sum(plain) / N, rel=1e-12)
    value.backward()
    assert d.grad is None
    best = d.detach().mean().log().expand(N).clone().requires_grad_()
    losses.expected_distance(best, d).backward()
    assert best.grad is not None
    assert best.grad.sum().item() == pytest.approx(0, abs=1e-12)
