"""Products in bfloat16 keep float32 results, and the gradient's error is that of the rounded inputs alone."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.head.test_equality import config
from tests.head.test_native import as_if_large
from trainer.distributed import Ranks
from trainer.head import fused, native, products
from trainer.head.frozen import FrozenClassifier, FrozenRows
from trainer.head.fused import FusedSoftmax
from trainer.head.kernels import Kernels
from trainer.head.partial_fc import PartialFC
from trainer.head.partition import ClassRange

LARGEST_ERROR = 3e-3
"""Of ∂L/∂x relative to float64, at s = 64, with one hard negative and a margin of 0.2. Over other margins and numbers
of hard negatives it is 2e-3 to 8e-3: what the rounding of the inputs alone costs."""
ROWS, BATCH, DIM = 20_000, 64, 512


def trained(hard: int) -> tuple[Tensor, Tensor, Tensor]:
    """A classifier as it is late in training: targets at a cosine of 0.75, ``hard`` negatives a sample at 0.6; float64
    rows (C, D), embeddings (B, D) and labels (B,).
    """
    generator = torch.Generator().manual_seed(0)

    def unit(n: int) -> Tensor:
        return normalize(torch.randn(n, DIM, generator=generator, dtype=torch.float64))

    rows, x, labels = unit(ROWS), unit(BATCH), torch.randperm(ROWS, generator=generator)[: BATCH * (hard + 1)]
    for k, at in enumerate(labels.split(BATCH)):
        cosine = 0.75 if k == 0 else 0.6
        across = normalize(rows[at] - (rows[at] * x).sum(1, keepdim=True) * x)
        rows[at] = cosine * x + (1 - cosine**2) ** 0.5 * across
    return rows, 7 * x, labels[:BATCH]


def gradient(
    dtype: str, compute: str, patch: pytest.MonkeyPatch, *, hard: int = 1, margin: float = 0.2, cpp: bool = False
) -> Tensor:
    """∂L/∂x (B, D) of a head at those rows; ``cpp``: by the C++ pass."""
    settings = config(rows=dtype, compute=compute, chunk_rows=4096, margin={"scale": 64, "m": margin})
    with patch.context() as inner:
        if cpp:
            as_if_large(inner)
        head = PartialFC(settings, ROWS, DIM, Ranks(), seed=0)
    assert isinstance(head.softmax, native.NativeSoftmax if cpp else FusedSoftmax)
    rows, x, labels = trained(hard)
    head.rows.copy_(rows)
    x = x.to(head.rows.dtype).requires_grad_()
    head(x, labels, 0).loss.backward()
    assert x.grad is not None
    return x.grad.double()


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def test_the_head_s_gradient_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradient("float64", "float32", monkeypatch)
    paths = [False] + [True] * (native.load() is not None and products.bfloat16_gemm() is not None)
    for cpp in paths:
        error = relative(gradient("float32", "bfloat16", monkeypatch, cpp=cpp), exact)
        assert 1e-4 < error < LARGEST_ERROR, (cpp, error)


def test_rounded_results_would_err_ten_times_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a margin the gradient is a small probability, e to the error of a logit."""
    exact = gradient("float64", "float32", monkeypatch, hard=20, margin=0.0)
    ours = relative(gradient("float32", "bfloat16", monkeypatch, hard=20, margin=0.0), exact)
    monkeypatch.setattr(fused, "product", lambda a, b: torch.mm(a, b).float())
    rounded = relative(gradient("float32", "bfloat16", monkeypatch, hard=20, margin=0.0), exact)
    assert ours < rounded / 10, (ours, rounded)


def test_a_frozen_classifier_s_gradient_in_bfloat16() -> None:
    rows, x, labels = trained(hard=1)
    found = []
    for dtype, compute in ((torch.float64, torch.float64), (torch.float32, torch.bfloat16)):
        known = FrozenRows(rows.to(dtype), torch.ones(ROWS, dtype=torch.bool), ClassRange(0, ROWS, ROWS))
        frozen = FrozenClassifier(known, scale=64.0, margin=0.2, kernels=Kernels(4096, False), compute=compute)
        leaf = x.to(dtype, copy=True).requires_grad_()
        frozen.loss(leaf, labels, 0)[0].backward()
        assert leaf.grad is not None
        found.append(leaf.grad.double())
    assert 1e-4 < relative(found[1], found[0]) < LARGEST_ERROR


@pytest.mark.parametrize("blas", [True, False])
def test_products_of_any_shape_and_layout(blas: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blas and products.bfloat16_gemm() is None:
        pytest.skip("this processor or torch's BLAS has no product of bfloat16 matrices")
    if not blas:
        monkeypatch.setattr(products, "bfloat16_gemm", lambda: None)
    generator = torch.Generator().manual_seed(1)
    for m, k, n in ((300, 130, 48), (1, 5, 7), (7, 1, 1), (3, 4, 1), (0, 4, 3), (3, 0, 2)):
        wide = torch.randn(m, 2 * k, generator=generator).bfloat16()
        right = torch.randn(k, n, generator=generator).bfloat16()
        for a in (wide[:, :k].contiguous(), wide[:, :k].t().contiguous().t(), wide[:, ::2], wide[:, :k]):
            for b in (right, right.t().contiguous().t()):
                out = products.product(a, b)
                assert out.dtype == torch.float32
                torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5 * max(k, 1))
