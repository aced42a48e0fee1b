"""Schedules against closed forms, fused updates against torch's plain ones, the average against its recurrence."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.sections import variant
from trainer.networks.transform import Orthogonal
from trainer.run.config import AnyOptimizer, AnySchedule
from trainer.run.optim import Average, LossScale, Statistics, Updater, learning_rate, running_statistics

YES, NO = torch.tensor(True), torch.tensor(False)


def test_schedules() -> None:
    def rates(steps: int = 10, **settings: object) -> list[float]:
        config = variant(AnySchedule, **settings)
        return [learning_rate(config, 2.0, step, steps) for step in range(steps)]

    assert rates(name="constant", warmup=0.4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates(name="polynomial", power=2, warmup=0) == pytest.approx([2 * (1 - t / 10) ** 2 for t in range(10)])
    assert rates(name="cosine", warmup=0.2)[2:] == pytest.approx([1 + math.cos(math.pi * t / 8) for t in range(8)])
    assert rates(name="step", warmup=0, milestones=(0.5, 0.8), gamma=0.1) == pytest.approx(
        [2.0] * 5 + [0.2] * 3 + [0.02] * 2
    )


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _gradients(net: nn.Module, step: int, scale: float = 1.0) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    net.zero_grad()
    (net(x).square().sum() * scale).backward()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [0.0, 1.5])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_updates_are_those_of_torch(name: str, clip: float, scale: float) -> None:
    """Scaled gradients, clipped by the whole norm, against unscaled ones, clip_grad_norm_ and the plain optimizer."""
    ours, plain = _net(), _net()
    updater = Updater({"net": ours}, variant(AnyOptimizer, name=name, lr=0.1, weight_decay=0.02, clip_norm=clip))
    reference: torch.optim.Optimizer
    if name == "sgd":
        reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    else:
        reference = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.02)
    for step in range(4):
        _gradients(ours, step, scale)
        _gradients(plain, step)
        lr = 0.1 / (step + 1)
        updater.step(lr, updater.gradient_norm(), YES, torch.tensor(scale))
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # torch clips to norm + 1e-6


def test_an_update_that_is_not_finite_is_left_out() -> None:
    net = _net()
    updater = Updater({"net": net}, variant(AnyOptimizer, name="adamw"))
    _gradients(net, 0)
    updater.step(0.1, updater.gradient_norm(), YES, torch.tensor(1.0))
    before, state = copy.deepcopy(net.state_dict()), {k: v.clone() for k, v in updater.state().items()}
    _gradients(net, 1, math.nan)
    updater.step(0.1, updater.gradient_norm(), NO, torch.tensor(1.0))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(state[k], v) for k, v in updater.state().items())


def test_loss_scale() -> None:
    scale = LossScale(8.0, False, torch.device("cpu"))
    for finite in (NO, NO, YES):
        scale.update(finite)
    assert float(scale.value) == 2.0
    for _ in range(1999):
        scale.update(YES)
    assert (float(scale.value), int(scale.good_steps)) == (4.0, 0)
    fixed = LossScale(1.0, True, torch.device("cpu"))
    fixed.update(NO)
    assert float(fixed.value) == 1.0


def test_average() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    average = Average({"net": net}, 0.75)
    start = net[0].weight.detach().clone()
    with torch.no_grad():
        for added in (1.0, 2.0):
            net[0].weight.add_(added)
            net[1].running_mean.add_(added)  # type: ignore[operator, union-attr]
            average.update()
    expected = 0.75 * (0.75 * start + 0.25 * (start + 1)) + 0.25 * (start + 3)
    torch.testing.assert_close(average.values["net"]["0.weight"], expected)
    assert torch.equal(average.values["net"]["1.running_mean"], torch.full((2,), 3.0, dtype=torch.float64))


def test_statistics_of_a_bad_step_are_taken_back() -> None:
    norm = nn.BatchNorm1d(2)
    statistics = Statistics([norm], 1)
    statistics.remember()
    norm(torch.full((3, 2), math.nan))
    statistics.settle(NO)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0, 0]
    statistics.remember()
    norm(torch.ones(3, 2))
    statistics.settle(YES)
    assert norm.running_mean.tolist() == pytest.approx([0.1, 0.1])


def test_the_fixed_matrix_of_an_orthogonal_map_is_no_statistic() -> None:
    """It never changes, so that no update needs to average it over the ranks; a spectral norm's vectors change."""
    both = nn.Sequential(Orthogonal(6, 4), nn.BatchNorm1d(4))
    assert any(key.endswith(".base") for key, _ in both.named_buffers())
    assert [tuple(buffer.shape) for buffer in running_statistics(both)] == [(4,), (4,)]
    assert Statistics([both[0]], 2).buffers == []
    assert len(running_statistics(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))) == 2
