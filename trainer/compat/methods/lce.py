"""LCE with learned transformations: on every rank T sees the same pairs, so its statistics and gradients agree by
themselves.

The classes of the global batch, U of them, are known to all ranks. Their rows w, old centres o, boundaries and masks
are gathered from the ranks that own them by ONE all-gather; with the gathered embeddings every rank then computes the
same loss on the same tensors. So the gradients of T are equal on all ranks without an all-reduce, and a rank keeps the
part of the other gradients that is its own: of the rows it owns, of the samples it embedded.

The mean over the classes of the batch weights a class by how often it is drawn, not evenly: it is no unbiased estimate
of the mean over all classes where their sizes differ. Classes without an old centre are taken out before T is
evaluated, with their samples, so that they change neither loss nor statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.compat.bank.center_bank import BankRows, CenterBank
from trainer.compat.methods import losses
from trainer.compat.methods.config import LceDirectConfig, LceMapsConfig, LceTransformedConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.method import CompatMethod
from trainer.distributed import Labels, Ranks, all_gather_rows, send, upload
from trainer.errors import CenterBankError
from trainer.head.old_centers import DirectCompat
from trainer.head.partition import class_range
from trainer.models.card import Direction
from trainer.networks.transform import build_transform


class _GatherOwn(torch.autograd.Function):
    """All ranks' rows for every rank; the gradient of a rank's rows is its slice, because all ranks compute the same
    loss."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.start, ctx.stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
        return all_gather_rows(local, sizes).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.start : ctx.stop], None, None


def gather_own(local: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """Gather (n_r, …) → (Σ n_r, …) in rank order, differentiable: for a loss that every rank computes in full.

    One collective forward, none backward.
    """
    return _GatherOwn.apply(local, list(sizes), rank)


@dataclass(frozen=True)
class Pairs:
    """The classes of a global batch with both their centres, the same on every rank.

    Attributes:
        classes: (U,) int64, ascending, on the host. rows: (U, D2), of the new classifier, with gradient to the owner's
            rows.
        centers: (U, D1). boundaries: (U,). mask: (U,) bool.
        class_index: (B,) int64, where each sample's class is; −1 for samples without a class. On the host.
    """

    classes: NDArray[np.int64]
    rows: Tensor
    centers: Tensor
    boundaries: Tensor
    mask: Tensor
    class_index: NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """The classes and samples of a batch that have an old centre, as indexes on the device.

    Attributes:
        classes: (V,) places among the pairs. samples: (n,) places in the batch. places: (n,) of the samples' classes
            among the pairs, and ``among`` (n,) among ``classes``.
    """

    classes: Tensor
    samples: Tensor
    places: Tensor
    among: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> "Known":
        """Waits for the device: which of the other ranks' classes have a centre came with the gathered pairs."""
        mask = pairs.mask.cpu().numpy()
        samples = np.flatnonzero(pairs.class_index >= 0)
        if len(samples):
            samples = samples[mask[pairs.class_index[samples]]]
        places = pairs.class_index[samples]
        among = np.cumsum(mask)[places] - 1 if len(places) else places
        return cls(*upload([np.flatnonzero(mask), samples, places, among], pairs.mask.device))


def classes_of(labels: Tensor | Labels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct classes (U,) of all ranks' labels (B,), ascending, and each sample's index (B,) among them (−1:
    none).
    """
    host = (labels if isinstance(labels, Labels) else Labels(labels)).host
    classes, index = np.unique(host, return_inverse=True)
    without = int(len(classes) > 0 and classes[0] < 0)
    return classes[without:], index - without


def gather_pairs(labels: Tensor | Labels, rows: Tensor | None, bank: BankRows, num_classes: int, ranks: Ranks) -> Pairs:
    """Collect the pairs of the batch's classes; every rank calls it.

    Args:
        labels: (B,) of all ranks, in [−1, C).
        rows: (u, D2), this rank's classifier rows of the batch's classes that it owns (:func:`own_classes`), in
            ascending order; a leaf whose gradient the caller hands to the head. None: the old model's part alone, in
            float32 on this rank's device.
        bank: this rank's part of the centre bank (all its c classes).
    """
    labels = labels if isinstance(labels, Labels) else Labels(labels)
    classes, index = classes_of(labels)
    starts = [class_range(num_classes, rank, ranks.world_size).start for rank in range(ranks.world_size)]
    edges = [*np.searchsorted(classes, starts).tolist(), len(classes)]
    sizes = np.diff(edges).tolist()
    local = classes[edges[ranks.rank] : edges[ranks.rank + 1]] - starts[ranks.rank]
    if rows is None:
        rows = torch.empty(len(local), 0, dtype=torch.float32, device=labels.device.device)
    if len(rows) != len(local):
        raise ValueError(f"{len(rows)} rows were given for the {len(local)} classes of the batch that this rank owns")
    own = send(torch.from_numpy(local), bank.centers.device)
    known = [bank.centers[own], bank.boundaries[own, None], bank.mask[own, None]]
    packed = torch.cat([rows, send(torch.cat([value.to(rows.dtype) for value in known], 1), rows.device)], 1)
    whole = gather_own(packed, sizes, ranks.rank)
    dim = rows.shape[1]
    return Pairs(
        classes,
        whole[:, :dim],
        whole[:, dim:-2].detach(),
        whole[:, -2].detach(),
        whole[:, -1].detach() > 0.5,
        index,
    )


def own_classes(labels: Tensor | Labels, num_classes: int, ranks: Ranks) -> Tensor:
    """The distinct classes (u,) of all ranks' labels (B,) that this rank owns, ascending, counted from its first
    class; on the host.
    """
    own = class_range(num_classes, ranks.rank, ranks.world_size)
    classes, _ = classes_of(labels)
    return torch.from_numpy(classes[(classes >= own.start) & (classes < own.stop)] - own.start)


class TransformedCompat(nn.Module):
    """The transformations of one mode and LCE's losses through them.

    ``backward`` trains T₂₁ (new → old), ``forward`` T₁₂ (old → new), ``both`` both, ``cross-model`` what ``maps`` says.
    The boundary goes through T₂₁ where there is one, as in the paper, else compares with T₁₂ of the centre. T₂₁ is
    evaluated once on the classes' rows and the batch's embeddings together, so that its statistics are those of both.
    With ``authors_formula`` T's output is not made unit, and the boundary takes the embeddings as they are.

    Args:
        config: mode, weights (alignment in (1 − cos) units) and transform.
        dim_old, dim_new: D1, D2.
    """

    def __init__(self, config: LceMapsConfig, dim_old: int, dim_new: int) -> None:
        super().__init__()
        self.config = config
        backward, forward = config.directions
        self.t21 = build_transform(config.transform, dim_new, dim_old) if backward else None
        self.t12 = build_transform(config.transform, dim_old, dim_new) if forward else None

    def maps(self) -> dict[Direction, nn.Module]:
        """The maps that the mode has, by their direction."""
        both: dict[Direction, nn.Module | None] = {"t21": self.t21, "t12": self.t12}
        return {direction: module for direction, module in both.items() if module is not None}

    def forward(self, pairs: Pairs, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """λ_a L_a + λ_b L_b of the global batch, the same on every rank, and its parts.

        Args:
            pairs: of the global batch. embeddings: (B, D2) of all ranks in rank order, not normalised.

        Returns:
            The loss with gradient to T, ``pairs.rows`` and ``embeddings``; ``alignment`` (1 − cos), ``boundary`` and
            the smallest norm that each map gave (``t21_norm``, ``t12_norm``), detached; of the samples that have a
            centre ``center_cosines`` (n,), what the boundary is compared with, and ``boundary_slack`` (n,), that minus
            the boundary. With fewer than two classes or samples that have a centre (batch statistics need two) the
            losses are 0, and nothing else is given.
        """
        known = Known.of(pairs)
        if len(known.classes) < 2 or len(known.samples) < 2:
            zero = embeddings.new_zeros(())
            return zero, {"alignment": zero, "boundary": zero}
        dtype = next(self.parameters()).dtype  # the rows may have another
        w, o = (normalize(of.index_select(0, known.classes).to(dtype)) for of in (pairs.rows, pairs.centers))
        ours, x = not self.config.authors_formula, embeddings.index_select(0, known.samples).to(dtype)
        x = normalize(x) if ours else x
        among, terms, norms = known.among, list[Tensor](), dict[str, Tensor]()
        b = pairs.boundaries.index_select(0, known.places).to(dtype)
        if self.t21 is not None:
            mapped_w, mapped_x = self.t21(torch.cat([w, x])).split([len(w), len(x)])
            norms["t21_norm"] = smallest_norm(mapped_w)
            terms.append(half_distance(mapped_w, o, ours))
            cosines = boundary_cosines(mapped_x, o[among], ours)
        if self.t12 is not None:
            mapped_o = self.t12(o)
            norms["t12_norm"] = smallest_norm(mapped_o)
            terms.append(half_distance(mapped_o, w, ours))
            if self.t21 is None:
                cosines = boundary_cosines(x, mapped_o[among], ours)
        align, bound = torch.stack(terms).mean(), (b - cosines).clamp_min(0).mean()
        loss = self.config.alignment_weight * align + self.config.boundary_weight * bound
        parts = {"alignment": align.detach(), "boundary": bound.detach(), **norms}
        return loss, parts | {"center_cosines": cosines.detach(), "boundary_slack": (cosines - b).detach()}


def smallest_norm(mapped: Tensor) -> Tensor:
    """The smallest norm of a map's vectors (n, D), n ≥ 1, without gradient: 0 says that the map has died."""
    return mapped.detach().norm(dim=1).min()


def half_distance(mapped: Tensor, target: Tensor, unit: bool) -> Tensor:
    """mean ½ ‖u − v‖²: 1 − cos where T's output is made unit, the authors' term (in the same unit) where not."""
    u = normalize(mapped) if unit else mapped
    return (u - target).square().sum(1).mean() / 2


def boundary_cosines(a: Tensor, b: Tensor, unit: bool) -> Tensor:
    """What the boundary is compared with, (n,): cos(a_i, b_i), or the authors' product of the vectors as they are,
    clamped to [−1, 1]."""
    return (normalize(a) * normalize(b)).sum(1) if unit else (a * b).sum(1).clamp(-1, 1)


class TransformedLce(CompatMethod):
    """:class:`TransformedCompat` in training: the pairs of the batch's classes come from the ranks that own them, by
    one collective."""

    mapped = True

    def __init__(self, config: LceTransformedConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        assert inputs.bank is not None
        self.compat = TransformedCompat(config, inputs.bank.dim, run.backbone.dim)
        mine = class_range(inputs.num_classes, ranks.rank, ranks.world_size)
        self.bank = inputs.bank.rows(mine.start, mine.stop)
        self.num_classes, self.ranks = inputs.num_classes, ranks

    def transforms(self) -> dict[Direction, nn.Module]:
        """See :class:`CompatMethod`."""
        return self.compat.maps()

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``alignment`` and ``boundary``."""
        del step
        value, report = self.compat(gather_pairs(labels, rows, self.bank, self.num_classes, self.ranks), embeddings)
        return value, report


class DirectLce(CompatMethod):
    """LCE's direct mode, which the head computes in its own pass over the rows (:attr:`direct`).

    With ``compat.authors_formula`` the boundary is the authors', whose embeddings are not made unit
    (:func:`trainer.compat.methods.losses.boundary`): then it is a loss of its own, by one collective a step.
    """

    def __init__(self, config: LceDirectConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        del run
        self.config, self.num_classes, self.ranks = config, inputs.num_classes, ranks
        self.adds_loss = config.authors_formula
        if inputs.bank is None:  # a plan's or a benchmark's run without LCE
            self.adds_loss = False
            return
        self.direct = direct_compat(config, inputs.bank, ranks)
        there = self.direct.centers.device
        none = torch.empty(0, dtype=torch.int64)
        self.bank = BankRows(
            self.direct.centers, self.direct.boundaries.to(there), self.direct.mask.to(there), none, none
        )
        self._total: Tensor | None = None

    @classmethod
    def check(cls, config: LceDirectConfig, run: Sections, inputs: Inputs) -> None:
        """See :class:`CompatMethod`."""
        bank, dim = inputs.bank, run.backbone.dim
        if bank is not None and bank.dim != dim:
            raise CenterBankError(
                f"{config.bank}: dimension {bank.dim}, backbone.dim is {dim}; "
                f"direct mode needs backbone.dim={bank.dim}; backward, forward and both map between the two dimensions"
            )

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``boundary``, the authors'."""
        del rows, step
        value = self._boundary(embeddings, gather_pairs(labels, None, self.bank, self.num_classes, self.ranks))
        return self.config.boundary_weight * value, {"boundary": value.detach()}

    def _boundary(self, embeddings: Tensor, pairs: Pairs) -> Tensor:
        known = Known.of(pairs)
        return losses.boundary(
            embeddings.index_select(0, known.samples),
            pairs.centers[known.places].to(embeddings.dtype),
            pairs.boundaries[known.places].to(embeddings.dtype),
            slice(None),
            authors_formula=self.config.authors_formula,
        )

    def fused(self, embeddings: Tensor, labels: Labels, rows: Tensor) -> Tensor | None:
        """See :class:`CompatMethod`: of the alignment, a mean over all classes, the batch's classes' part.

        With a sample rate below 1 the head weights the drawn classes so that this is what it adds on average.
        """
        if self.direct is None:
            return None
        if self._total is None:
            self._total = self.direct.total(self.ranks.device)
        pairs = gather_pairs(labels, rows, self.bank, self.num_classes, self.ranks)
        known = Known.of(pairs).classes
        w = pairs.rows.index_select(0, known)
        apart = 1 - losses.cosine(w, pairs.centers.index_select(0, known).to(w.dtype))
        value = self.direct.alignment_weight * apart.sum() / self._total.clamp_min(1).to(w.dtype)
        value = value.to(embeddings.dtype)
        if self.direct.boundary_weight:
            value = value + self.direct.boundary_weight * self._boundary(embeddings, pairs)
        return value


def direct_compat(config: LceDirectConfig, bank: CenterBank, ranks: Ranks) -> DirectCompat:
    """The old model's centres and boundaries of this rank's classes, with the weights of the losses."""
    mine = class_range(bank.num_classes, ranks.rank, ranks.world_size)
    rows = bank.rows(mine.start, mine.stop)
    where = ranks.device if config.centers == "device" else torch.device("cpu")
    return DirectCompat(
        rows.centers.to(where),
        rows.boundaries.to(ranks.device),
        rows.mask.to(ranks.device),
        config.alignment_weight,
        0.0 if config.authors_formula else config.boundary_weight,  # theirs: a loss of its own
    )
