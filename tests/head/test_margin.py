"""Every margin against a formula written down independently in float64 and differentiated by finite differences."""

import math

import numpy as np
import pytest
import torch

from tests.sections import variant
from trainer.head.config import AnyMargin
from trainer.head.margin import build_margin

SETTINGS = {"m": 0.45, "m1": 1.3, "m2": 0.25, "m3": 0.1, "lower_norm": 5.0, "upper_norm": 60.0}


def continued(phi: float) -> float:
    """SphereFace's monotone cosine, branch by branch."""
    turns = 0
    while phi > math.pi:
        phi -= math.pi
        turns += 1
    return math.cos(phi) - 2 * turns


def expected(name: str, t: float, norm: float, mean: float = 0.0, deviation: float = 1.0) -> float:
    """ψ of one sample, from the papers' formulas."""
    theta, m = math.acos(t), SETTINGS["m"]
    if name == "softmax":
        return t
    if name == "cosface":
        return t - m
    if name in ("arcface", "curricular"):
        return continued(theta + m)
    if name == "combined":
        return continued(SETTINGS["m1"] * theta + SETTINGS["m2"]) - SETTINGS["m3"]
    if name == "magface":
        a = min(max(norm, SETTINGS["lower_norm"]), SETTINGS["upper_norm"])
        share = (a - SETTINGS["lower_norm"]) / (SETTINGS["upper_norm"] - SETTINGS["lower_norm"])
        return continued(theta + 0.45 + (0.8 - 0.45) * share)
    z = max(-1.0, min(1.0, (norm - mean) / (deviation + 1e-3) * 0.333))
    return math.cos(max(0.0, min(math.pi, theta - m * z))) - m - m * z


NAMES = ["softmax", "cosface", "arcface", "combined", "adaface", "magface", "curricular"]


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(5)
    cosine = torch.from_numpy(np.concatenate([generator.uniform(-0.99, 0.99, 40), [-0.97, 0.97]]))
    return cosine, torch.from_numpy(generator.uniform(6.0, 55.0, 42))


@pytest.mark.parametrize("name", NAMES)
def test_value(name: str) -> None:
    margin = build_margin(variant(AnyMargin, name=name, **SETTINGS))
    cosine, norm = samples()
    target = margin.target(cosine, norm, training=False)
    truth = [expected(name, t, a, 20.0, 100.0) for t, a in zip(cosine.tolist(), norm.tolist(), strict=True)]
    np.testing.assert_allclose(target.psi.numpy(), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_by_finite_differences(name: str) -> None:
    margin = build_margin(variant(AnyMargin, name=name, **SETTINGS))
    cosine, norm = samples()
    step = 1e-6
    target = margin.target(cosine, norm, training=False)

    def psi(t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return margin.target(t, a, training=False).psi

    slope = (psi(cosine + step, norm) - psi(cosine - step, norm)) / (2 * step)
    np.testing.assert_allclose(target.slope, slope, rtol=1e-5, atol=1e-6)
    if target.norm_slope is not None:
        slope = (psi(cosine, norm + step) - psi(cosine, norm - step)) / (2 * step)
        np.testing.assert_allclose(target.norm_slope, slope, rtol=1e-5, atol=1e-7)


def test_adaface_stops_at_the_ends_of_the_half_circle() -> None:
    """θ − m·ẑ is clipped to [0, π] (eq. 9): there the value stands still and no gradient flows."""
    margin = build_margin(variant(AnyMargin, name="adaface", **SETTINGS))
    margin.state()["margin_norm_deviation"].fill_(1.0)  # ẑ is 1 for a norm of 60, −1 for one of 2
    cosine = torch.tensor([0.999, 0.95, 0.85, -0.5, -0.999, -0.95, -0.85, 0.5], dtype=torch.float64)
    norm = torch.tensor([60.0] * 4 + [2.0] * 4, dtype=torch.float64)
    clipped = torch.tensor([True, True, False, False] * 2)

    def psi(t: torch.Tensor) -> torch.Tensor:
        return margin.target(t, norm, training=False).psi

    target = margin.target(cosine, norm, training=False)
    truth = [expected("adaface", t, a, 20.0, 1.0) for t, a in zip(cosine.tolist(), norm.tolist(), strict=True)]
    np.testing.assert_allclose(target.psi.numpy(), truth, rtol=1e-12, atol=1e-12)
    assert torch.equal(target.slope == 0, clipped)
    slope = (psi(cosine + 1e-6) - psi(cosine - 1e-6)) / 2e-6
    np.testing.assert_allclose(target.slope, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["arcface", "combined", "magface"])
def test_monotone_and_continuous_past_pi(name: str) -> None:
    margin = build_margin(variant(AnyMargin, name=name, **SETTINGS))
    angles = torch.linspace(0.0, math.pi, 20001, dtype=torch.float64)
    psi = margin.target(torch.cos(angles), torch.full_like(angles, 30.0), training=False).psi
    falls = -psi.diff()
    assert (falls >= -1e-12).all()
    assert falls.max() < 1e-3  # a jump would be far larger than a step of the grid


def test_magface_norm_term() -> None:
    config = variant(AnyMargin, name="magface", **SETTINGS)
    norm = torch.tensor([3.0, 20.0, 80.0], dtype=torch.float64)
    target = build_margin(config).target(torch.zeros(3, dtype=torch.float64), norm, training=False)
    a = np.clip(norm.numpy(), 5.0, 60.0)
    np.testing.assert_allclose(target.penalty, 35.0 * (1 / a + a / 60.0**2))
    inside = np.array([0.0, 1.0, 0.0])
    np.testing.assert_allclose(target.penalty_slope, inside * 35.0 * (1 / 60.0**2 - 1 / a**2))


def test_straight_through_keeps_the_value_and_drops_the_slope() -> None:
    cosine, norm = samples()
    plain = build_margin(variant(AnyMargin, name="arcface", m=0.5)).target(cosine, norm, True)
    through = build_margin(variant(AnyMargin, name="arcface", m=0.5, gradient="straight_through")).target(
        cosine, norm, True
    )
    torch.testing.assert_close(plain.psi, through.psi)
    assert (through.slope == 1).all()
    assert not (plain.slope == 1).any()


def test_adaface_statistics_move_in_training_only() -> None:
    margin = build_margin(variant(AnyMargin, name="adaface", norm_momentum=0.5))
    norm = torch.tensor([30.0, 50.0], dtype=torch.float64)
    margin.target(torch.zeros(2, dtype=torch.float64), norm, training=False)
    assert margin.state()["margin_norm_mean"] == 20.0
    margin.target(torch.zeros(2, dtype=torch.float64), norm, training=True)
    assert margin.state()["margin_norm_mean"] == pytest.approx(30.0)
    assert margin.state()["margin_norm_deviation"] == pytest.approx(0.5 * 100 + 0.5 * norm.std().item())


def test_curricular_reweights_hard_negatives() -> None:
    """The head's loss against the paper's formula on dense logits."""
    from trainer.distributed import Ranks
    from trainer.head.config import HeadConfig
    from trainer.head.partial_fc import PartialFC

    config = HeadConfig(margin=variant(AnyMargin, name="curricular", scale=16, m=0.3), rows="float64", chunk_rows=7)
    head = PartialFC(config, 30, 8, Ranks(), seed=1)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = torch.tensor([0, 3, 3, 29, 11, 7])
    loss = head(x, y, 0).loss
    rows = torch.nn.functional.normalize(head.rows)
    z = x.detach().clone().requires_grad_()
    cosine = torch.nn.functional.normalize(z) @ rows.t()
    target = cosine[torch.arange(6), y]
    tau = 0.01 * target.detach().mean()
    psi = torch.cos(torch.arccos(target) + 0.3)
    logits = torch.where(cosine > psi[:, None], cosine * (tau + cosine), cosine)
    logits = logits.index_put((torch.arange(6), y), psi)
    truth = torch.nn.functional.cross_entropy(16 * logits, y)
    assert loss.item() == pytest.approx(truth.item(), abs=1e-10)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-11)


def test_sub_centers_take_the_nearest_row() -> None:
    """Three rows per class against dense logits (Sub-center ArcFace, Deng et al., ECCV 2020, eq. 3)."""
    from trainer.distributed import Ranks
    from trainer.head.config import HeadConfig
    from trainer.head.partial_fc import PartialFC

    config = HeadConfig(margin=variant(AnyMargin, scale=16, m=0.3), rows="float64", chunk_rows=9, sub_centers=3)
    head = PartialFC(config, 20, 8, Ranks(), seed=1)
    head.set_lr(0.0)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = torch.tensor([0, 3, 3, 19, 11, 7])
    rows = head.rows.clone()
    loss = head(x, y, 0).loss
    loss.backward()
    z = x.detach().clone().requires_grad_()
    cosine = (torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(rows).t()).view(6, 20, 3).amax(2)
    shifted = cosine - 0.3 * torch.nn.functional.one_hot(y, 20).double()
    truth = torch.nn.functional.cross_entropy(16 * shifted, y)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), abs=1e-10)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-11)
