"""The rivals of LCE in the same trainer: BCT, UniBCT, AdvBCT, MixBCT, FCT and the regression to old embeddings.

Each is a :class:`trainer.compat.method.CompatMethod`; the formulas, their papers and what was left out of them are in
:mod:`trainer.compat.losses`. What involves all classes is sharded as the head is. What involves the images of a batch
is computed on every rank alike from the same gathered tensors, so that trained modules (AdvBCT's discriminator, FCT's
map) get equal gradients without an all-reduce.
"""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.compat import losses
from trainer.compat.center_bank import CenterBank
from trainer.compat.method import CompatMethod
from trainer.compat.old_embeddings import StoredEmbeddings
from trainer.compat.transform import build_transform
from trainer.compat.transformed import AuthorsBoundary, TransformedLce, gather_pairs, own_classes
from trainer.config import Config
from trainer.data import Batch
from trainer.data.draws import uniforms
from trainer.distributed import Ranks, all_reduce_sum, gather_batch, scale_gradient
from trainer.export import Direction
from trainer.head.frozen import FrozenClassifier, FrozenRows
from trainer.head.kernels import Kernels
from trainer.head.partial_fc import COMPILE_FROM_ROWS
from trainer.head.partition import ClassRange, class_range
from trainer.startup import Inputs

BANK_BLOCK = 65536
PROTOTYPE_BLOCK = 64
"""Classes whose prototypes are made at a time."""


def build_method(config: Config, inputs: Inputs, ranks: Ranks) -> CompatMethod | None:
    """What ``compat.method`` adds beside the head: None for ``none`` and for LCE's direct mode, which is fused into it
    (but for the authors' boundary).

    Modules come in float32 on the CPU; they are the same on all ranks when torch is seeded alike.
    """
    method, mode = config.compat.method, config.compat.mode
    if method == "lce" and mode == "direct" and config.compat.authors_formula:
        return AuthorsBoundary(config, inputs, ranks)
    if method == "none" or (method == "lce" and mode == "direct"):
        return None
    kinds: dict[str, Callable[[Config, Inputs, Ranks], CompatMethod]] = {
        "lce": TransformedLce,
        "l2": L2,
        "bct": Bct,
        "unibct": UniBct,
        "advbct": AdvBct,
        "mixbct": MixBct,
        "fct": Fct,
    }
    return kinds[method](config, inputs, ranks)


class Bct(CompatMethod):
    """BCT (Shen et al., CVPR 2020): the old classifier, frozen and sharded, classifies the new embeddings as well.

    Its rows are the bank's centres, float32 (bfloat16 with ``head.rows=bfloat16``, in half the memory); scale, sample
    rate and draw are the head's, the margin is ``compat.old_margin``. One collective a step, the all-reduce of
    :class:`trainer.head.frozen.FrozenClassifier`. Left out: see :func:`trainer.compat.losses.bct`.
    """

    def __init__(self, config: Config, inputs: Inputs, ranks: Ranks) -> None:
        self.weight, self.ranks = config.compat.weight, ranks
        head, cpu = config.head, ranks.device.type == "cpu"
        known = self.rows(config, inputs, class_range(inputs.num_classes, ranks.rank, ranks.world_size))
        chunk = head.chunk_rows or (4096 if cpu else 65536)
        self.classifier = FrozenClassifier(
            FrozenRows(known.rows.to(ranks.device), known.mask.to(ranks.device), known.classes),
            scale=head.margin.scale,
            margin=config.compat.old_margin,
            kernels=Kernels(chunk, compiled=len(known.rows) >= COMPILE_FROM_ROWS),
            compute=getattr(torch, head.compute),
            sample_rate=head.sample_rate,
            seed=config.run.seed,
        )

    def rows(self, config: Config, inputs: Inputs, classes: ClassRange) -> FrozenRows:
        """The old rows of this rank's classes."""
        assert inputs.bank is not None
        return bank_rows(inputs.bank, classes, getattr(torch, config.head.rows))

    def loss(self, embeddings: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``influence`` is BCT's loss."""
        del rows
        # The rank's part of the gradient, W times: the head takes the mean over the ranks, which makes it the sum.
        mine = scale_gradient(embeddings, self.ranks.world_size)
        value, _ = self.classifier.loss(mine, labels, step)
        return self.weight * value, {"influence": value.detach()}


def bank_rows(bank: CenterBank, classes: ClassRange, dtype: torch.dtype) -> FrozenRows:
    """The centres that a bank has of ``classes``, read block by block."""
    mask = bank.per_class(classes.start, classes.stop)["mask"]
    out = torch.empty(int(mask.sum()), bank.dim, dtype=dtype)
    filled = 0
    for start in range(classes.start, classes.stop, BANK_BLOCK):
        block = bank.rows(start, min(start + BANK_BLOCK, classes.stop))
        centers = block.centers[block.mask]
        out[filled : filled + len(centers)] = normalize(centers.to(torch.promote_types(dtype, torch.float32)))
        filled += len(centers)
    return FrozenRows(out, mask, classes)


class UniBct(Bct):
    """UniBCT (Zhang et al., IJCAI 2022): BCT whose rows are prototypes refined along the links within each class.

    Each rank makes those of its own classes once, at the start, from the old embeddings of their images; images without
    an old embedding (zero rows) take no part, classes without any image are masked. The links come from the *old*
    embeddings: the paper takes the new model's and makes them again while it trains, which needs a pass over the
    training set each time. Left out as well: links across classes.
    """

    def rows(self, config: Config, inputs: Inputs, classes: ClassRange) -> FrozenRows:
        """See :class:`Bct`. Memory: the old embeddings of a few classes at a time."""
        old = cast(StoredEmbeddings, inputs.old)
        labels = record_labels(config, inputs)
        own = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
        own = own[np.argsort(labels[own], kind="stable")]
        sorted_labels = labels[own]
        dtype = getattr(torch, config.head.rows)
        rows, masks = [torch.empty(0, old.dim, dtype=dtype)], [torch.empty(0, dtype=torch.bool)]
        for first in range(classes.start, classes.stop, PROTOTYPE_BLOCK):
            last = min(first + PROTOTYPE_BLOCK, classes.stop)
            low, high = np.searchsorted(sorted_labels, [first, last])
            vectors = torch.from_numpy(old.rows[own[low:high]]).double()
            known = vectors.norm(dim=1) > 0
            y = torch.from_numpy(sorted_labels[low:high] - first)[known]
            made, mask = losses.unibct_prototypes(vectors[known], vectors[known], y, last - first)
            rows.append(made[mask].to(dtype))
            masks.append(mask)
        return FrozenRows(torch.cat(rows), torch.cat(masks), classes)


def record_labels(config: Config, inputs: Inputs) -> np.ndarray:
    """The class of every record, (N,) int64; −1: not used."""
    if inputs.dataset is None:
        return np.arange(config.data.synthetic_records) % inputs.num_classes
    return np.asarray(inputs.dataset.labels)


class WithOld(CompatMethod):
    """Base of the methods that compare images: the old embeddings of the global batch, on every rank.

    One collective more than the head makes: an all-gather of W·b·(4·D1 + 8) bytes in float32.
    """

    def __init__(self, config: Config, inputs: Inputs, ranks: Ranks) -> None:
        assert inputs.old is not None
        self.config, self.source, self.ranks = config.compat, inputs.old, ranks
        self.capacity = -(-config.data.batch_size // ranks.world_size)  # as the head pads its own gathered batch

    def prepare(self, embeddings: Tensor, batch: Batch, step: int) -> Tensor:
        """See :class:`CompatMethod`: gathers ``old`` (B, D1), in the order of the head's gathered batch, and ``known``
        (B,), whether there is one for a labelled sample."""
        del step
        self.gather(self.source.of(batch).to(embeddings), batch.labels)
        return embeddings

    def gather(self, old: Tensor, labels: Tensor) -> Tensor:
        """Gather this rank's old embeddings (b, D1 or more columns); returns all ranks' labels (B,)."""
        with torch.no_grad():
            whole, every = gather_batch(old, labels, self.ranks.world_size, self.capacity)
        self.old = whole
        self.known = (every >= 0) & (whole[:, : self.source.dim] != 0).any(1)
        return every


class L2(WithOld):
    """Regression to the old embedding of the same image (the instance baseline of BCT, Shen et al., CVPR 2020)."""

    def loss(self, embeddings: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``l2`` is the mean of ½ ‖·‖² = 1 − cos."""
        del labels, rows, step
        value = losses.l2(embeddings[self.known], self.old[self.known])
        return self.config.weight * value, {"l2": value.detach()}


class MixBct(WithOld):
    """MixBCT (Liang et al., arXiv 2308.06948): before the head, old embeddings stand in for ``compat.mix_share`` of
    the global batch.

    An old embedding is credible when its cosine with the bank's centre of its class is at least the class's boundary:
    make the bank with ``--quantile 0.1`` for the authors' nearest 90 %. Which credible images are replaced is drawn by
    (seed, step, record), the same at any world size. There is no loss of its own; ``compat.weight`` has no effect. One
    more collective, an all-reduce of B numbers, by which the owner of a class says what is credible.
    """

    def __init__(self, config: Config, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, inputs, ranks)
        assert inputs.bank is not None
        self.seed = config.run.seed
        self.classes = class_range(inputs.num_classes, ranks.rank, ranks.world_size)
        self.bank = inputs.bank.rows(self.classes.start, self.classes.stop)

    def prepare(self, embeddings: Tensor, batch: Batch, step: int) -> Tensor:
        """See :class:`CompatMethod`: unit vectors for the classifier, new or old; no gradient where an old one
        stands."""
        records = batch.records.numpy()
        draws = torch.from_numpy(uniforms(self.seed, step, records, np.zeros_like(records), 1)).to(embeddings)
        old = self.source.of(batch).to(embeddings)
        labels = self.gather(torch.cat([old, draws], 1), batch.labels)
        replaced = self._choose(self.old[:, :-1], labels, self.old[:, -1])
        self.replaced = replaced.sum() / (labels >= 0).sum().clamp_min(1)
        first = self.ranks.rank * self.capacity
        mine = replaced[first : first + len(old), None]
        return torch.where(mine, normalize(old), normalize(embeddings))

    def _choose(self, old: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        """Which samples of the global batch are replaced, (B,) bool, equal on all ranks."""
        c = self.classes
        here = (self.known & (labels >= c.start) & (labels < c.stop)).nonzero()[:, 0]
        local = (labels[here] - c.start).to(self.bank.centers.device)
        centers, boundaries = self.bank.centers[local].to(old), self.bank.boundaries[local].to(old)
        near = torch.linalg.vecdot(normalize(old[here]), centers) >= boundaries
        credible = torch.zeros(len(labels), dtype=torch.float64, device=old.device)
        credible[here] = (near & self.bank.mask[local].to(near.device)).double()
        sure = all_reduce_sum(credible) > 0
        labelled = labels >= 0
        replaced = torch.zeros_like(sure)
        replaced[labelled] = losses.mixbct_choice(sure[labelled], self.config.mix_share, draws[labelled])
        return replaced

    def loss(self, embeddings: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: no loss; ``replaced`` is the share of the batch that was."""
        del labels, rows, step
        return embeddings.new_zeros(()), {"replaced": self.replaced}


class AdvBct(WithOld):
    """In the manner of AdvBCT (Pan et al., CVPR 2023): a discriminator that must not tell new from old, and an elastic
    boundary.

    The loss is adversarial + ``compat.boundary_weight`` · boundary; ``compat.weight`` is that of the adversarial
    part's gradient into the embeddings. The discriminator is Linear, PReLU, Linear on unit embeddings, trained with the
    backbone's optimizer by its own, unweighted cross entropy. One more collective, the all-gather of the
    batch's centres and boundaries. Left out: the authors' radius from a pass over the training set each epoch, see
    :func:`trainer.compat.losses.elastic_boundary`.
    """

    def __init__(self, config: Config, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, inputs, ranks)
        assert inputs.bank is not None
        self.num_classes, dim = inputs.num_classes, inputs.bank.dim
        mine = class_range(inputs.num_classes, ranks.rank, ranks.world_size)
        self.bank = inputs.bank.rows(mine.start, mine.stop)
        self.discriminator = nn.Sequential(nn.Linear(dim, dim), nn.PReLU(dim), nn.Linear(dim, 1))

    def modules(self) -> dict[str, nn.Module]:
        """See :class:`CompatMethod`."""
        return {"discriminator": self.discriminator}

    def loss(self, embeddings: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``adversarial`` is the discriminator's cross entropy, ``boundary`` in radians."""
        del rows, step
        adversarial = embeddings.new_zeros(())
        if bool(self.known.any()):
            adversarial = losses.adversarial(
                embeddings[self.known], self.old[self.known], self.discriminator, self.config.weight
            )
        own = own_classes(labels, self.num_classes, self.ranks)
        pairs = gather_pairs(labels, embeddings.new_empty(len(own), 0), self.bank, self.num_classes, self.ranks)
        labelled = pairs.place >= 0
        place = pairs.place[labelled]
        boundary = losses.elastic_boundary(
            embeddings[labelled], pairs.centers[place], pairs.boundaries[place], pairs.mask[place]
        )
        total = adversarial + self.config.boundary_weight * boundary
        return total, {"adversarial": adversarial.detach(), "boundary": boundary.detach()}


class Fct(WithOld):
    """Forward-compatible training's map (Ramanujan et al., CVPR 2022): T₁₂ from old embeddings to those of a new model
    that is trained independently, beside it; ``compat.transform`` says which kind of map.

    It is exported as ``t12``, so that old galleries are converted by it. Left out: see
    :func:`trainer.compat.losses.fct`. The new embeddings are those of the step, of a model that still changes; the
    paper trains the map after the model.
    """

    def __init__(self, config: Config, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, inputs, ranks)
        self.t12 = build_transform(config.compat.transform, self.source.dim, config.backbone.dim)

    def transforms(self) -> dict[Direction, nn.Module]:
        """See :class:`CompatMethod`."""
        return {"t12": self.t12}

    def loss(self, embeddings: Tensor, labels: Tensor, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``map`` is 1 − cos(T₁₂(old), new); 0 with fewer than two images (batch
        statistics need two). The backbone gets no gradient of it."""
        del labels, rows, step
        value = embeddings.new_zeros(())
        if int(self.known.sum()) >= 2:
            value = losses.fct(self.t12(normalize(self.old[self.known])), embeddings[self.known])
        return self.config.weight * value, {"map": value.detach()}
