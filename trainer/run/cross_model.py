"""Cross-model training: only the maps between the spaces of two frozen models, T₁₂ and T₂₁, from pairs.

The pairs to align are class centres where both banks are given (LCE, Meng et al., ICCV 2021, section 3.2, with the new
model's centres in place of the classifier's rows), else the two embeddings of the same image. The boundary loss needs
the old bank. Image pairs may also be contrasted by class, a linear T₂₁ be drawn toward an orthogonal one, and a head
learn how far T₁₂ errs (:mod:`trainer.compat.methods.losses`).

Every rank gathers the global batch and computes the same loss of it (trainer/compat/methods/lce.py), so that the maps,
their statistics and their gradients are equal on all ranks without an all-reduce.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.compat.bank.center_bank import BankRows
from trainer.compat.methods import losses
from trainer.compat.methods.config import LceCrossConfig
from trainer.compat.methods.cross import CrossInputs
from trainer.compat.methods.inputs import Inputs
from trainer.compat.methods.lce import (
    Known,
    Pairs,
    TransformedCompat,
    boundary_cosines,
    gather_pairs,
    half_distance,
    own_classes,
    smallest_norm,
)
from trainer.data import Batch
from trainer.data.identities import identities
from trainer.distributed import Labels, MarkedLabels, Ranks, gather_batch, on_main, scale_gradient, send, upload
from trainer.head.partition import class_range
from trainer.machine import largest_share
from trainer.models.card import DISTANCE, trained_card, transform_card
from trainer.models.folder import save_model
from trainer.models.model import TorchModel
from trainer.networks.transform import build_distance_head
from trainer.randomness import step_seed
from trainer.run.config import Config
from trainer.run.parallel import compile_maps
from trainer.run.task import DTYPES, StepOutput


class CrossModelTask:
    """The maps alone (a :class:`trainer.run.task.Task`); ``compat.maps`` says which.

    Two collectives a step: the all-gather of the batch's embeddings, and that of its classes' centres where there is a
    bank.

    Args:
        config: the run's configuration. inputs: with its ``cross`` part. ranks: who we are.
    """

    def __init__(self, config: Config, inputs: Inputs, ranks: Ranks) -> None:
        assert inputs.cross is not None
        method = config.of(LceCrossConfig)
        assert method is not None
        self.method = method
        self.config, self.inputs, self.ranks, self.cross = config, inputs, ranks, inputs.cross
        self._dtype = DTYPES[config.train.precision]
        torch.manual_seed(config.run.seed)
        self.compat = TransformedCompat(method, self.cross.dim_old, self.cross.dim_new)
        self.compat.to(ranks.device, self._dtype)
        compile_maps(self.compat.maps().values(), config.train, ranks)
        self.head = build_distance_head(self.cross.dim_old).to(ranks.device, self._dtype) if method.distance else None
        self.capacity = largest_share(config.data.batch_size, ranks.world_size)
        own = class_range(inputs.num_classes, ranks.rank, ranks.world_size)
        self._centers, self._rows = _own_rows(self.cross, own.start, own.stop)
        self._part = 0  # of an update's batch, with train.accumulate

    def modules(self) -> dict[str, nn.Module]:
        """See :class:`trainer.run.task.Task`: ``t21``, ``t12`` and the head that predicts how far T₁₂ errs."""
        maps: dict[str, nn.Module] = {str(direction): module for direction, module in self.compat.maps().items()}
        return maps if self.head is None else maps | {DISTANCE: self.head}

    def wrapped(self) -> None:
        """See :class:`trainer.run.task.Task`: maps are not wrapped."""

    def compute(
        self, batch: Batch, step: int, last: bool, factor: Tensor, weight: float = 1.0, measured: bool = False
    ) -> StepOutput:
        """See :class:`trainer.run.task.Task`."""
        del measured
        parts = [source.of(batch).to(self._dtype) for source in (self.cross.new, self.cross.old) if source is not None]
        there = [(part != 0).any(1) for part in parts]  # zero rows: no embedding
        codes = MarkedLabels.code(torch.where(there[0], batch.labels, -1), there[-1])
        whole, codes = gather_batch(torch.cat(parts, 1), codes, self.ranks.world_size, self.capacity)
        x, e = whole[:, : self.cross.dim_new], whole[:, self.cross.dim_new :]
        labels = MarkedLabels(codes)
        pairs = self._pairs(labels)
        if self.cross.old is None:
            assert pairs is not None
            loss, report = self.compat(pairs, x)
        else:
            noise = self._noise(step, last) if self.method.noise else None
            loss, report = image_pairs_loss(self.compat, x, e, labels.marked, pairs, labels.device, self.head, noise)
        if self.method.orthogonal_weight:
            assert self.compat.t21 is not None
            apart = losses.gram_distance(self.compat.t21.get_parameter("weight"))
            penalty = losses.orthogonality(apart, self.method.orthogonal_threshold)
            loss, report = loss + self.method.orthogonal_weight * penalty, {**report, "orthogonality": apart.detach()}
        finite = torch.isfinite(loss.detach())
        if loss.requires_grad:
            scale_gradient(loss, factor * weight).backward()
        return StepOutput({"loss": loss.detach(), **report}, finite)

    def _noise(self, step: int, last: bool) -> torch.Generator:
        """The same draws on every rank and after a resume, others for every part of a batch."""
        noise = torch.Generator(self.ranks.device).manual_seed(step_seed(self.config.seed, step, self._part))
        self._part = 0 if last else self._part + 1
        return noise

    def _pairs(self, labels: Labels) -> Pairs | None:
        """The classes of the global batch with their centres."""
        if self._centers is None:
            return None
        own = own_classes(labels, self.inputs.num_classes, self.ranks)
        rows = send(self._rows[own.to(self._rows.device)].to(self._dtype), labels.device.device)
        return gather_pairs(labels, rows, self._centers, self.inputs.num_classes, self.ranks)

    def set_lr(self, lr: float) -> None:
        """See :class:`trainer.run.task.Task`: the maps are the engine's to update."""

    def apply(self, finite: Tensor) -> None:
        """See :class:`trainer.run.task.Task`: nothing is held back."""

    def state(self) -> dict[str, Tensor]:
        """See :class:`trainer.run.task.Task`: nothing beyond the maps."""
        return {}

    def loaded(self) -> None:
        """See :class:`trainer.run.task.Task`."""

    def export(self, folder: Path, weights: dict[str, dict[str, Tensor]], step: int, figures: dict[str, float]) -> None:
        """See :class:`trainer.run.task.Task`: the maps, with the new model's network where it is known."""
        on_main(lambda: self._write(folder, weights, step, figures), self.ranks)

    def _write(self, folder: Path, weights: dict[str, dict[str, Tensor]], step: int, figures: dict[str, float]) -> None:
        modules = {name: copy.deepcopy(module) for name, module in self.modules().items()}
        for name, module in modules.items():
            module.load_state_dict(weights[name])
            module.float()
        maps, head = {direction: modules[direction] for direction in self.compat.maps()}, modules.get(DISTANCE)
        cross, dataset = self.cross, self.inputs.dataset
        assert dataset is not None
        old = self._old_model()
        known = {
            "transforms": {
                direction: transform_card(self.method.transform, direction, cross.dim_new, cross.dim_old)
                for direction in maps
            },
            "distance": head is not None,
            "mode": "cross-model",
            "figures": figures,
        }
        seen = identities(dataset)
        both = seen if seen is None or cross.model is None else seen.and_of(cross.model.identities)
        if isinstance(cross.model, TorchModel):
            named = {"compatible_with": old[0], "compatible_with_hash": old[1]}
            card = cross.model.card.model_copy(update=known | named)
            save_model(folder, cross.model.backbone, card, maps, both, head)
            return
        source = self.method.new_embeddings if cross.model is None else cross.model.path
        card = trained_card(
            dataset.info if cross.model is None else cross.model.card,
            dataset.path,
            old,
            dim=cross.dim_new,
            step=step,
            classes=self.inputs.num_classes,
            maps_of=None if cross.model is None else cross.model.hash,
            notes=f"maps alone, of the embeddings of {source}",
            **known,
        )
        save_model(folder, None, card, maps, both, head)

    def _old_model(self) -> tuple[str | None, str | None]:
        """Name and hash of the old model, as far as known."""
        if self.cross.old is not None and self.cross.old.model is not None:
            return self.cross.old.model
        bank = self.cross.bank
        return (None, None) if bank is None else (bank.info.model, bank.info.model_hash)


def _own_rows(cross: CrossInputs, start: int, stop: int) -> tuple[BankRows | None, Tensor]:
    """This rank's old centres (masked where the new centre is missing), and its new centres (c, D2), else (c, 0)."""
    if cross.bank is None:
        return None, torch.empty(stop - start, 0)
    old = cross.bank.rows(start, stop)
    if cross.new_bank is None:
        return old, torch.empty(stop - start, 0)
    new = cross.new_bank.rows(start, stop)
    both = BankRows(old.centers, old.boundaries, old.mask & new.mask, old.counts, old.class_ids)
    return both, new.centers


def image_pairs_loss(
    compat: TransformedCompat,
    x: Tensor,
    e: Tensor,
    known: NDArray[np.int64],
    classes: Pairs | None,
    labels: Tensor | None = None,
    head: nn.Module | None = None,
    noise: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """λ_a L_a + λ_b L_b with the two embeddings of an image as the pairs to align; the same on every rank.

    With ``contrastive_weight`` also its product with :func:`trainer.compat.methods.losses.contrastive`, through T₂₁
    where there is one, as the boundary (T₁₂ found less with it); with a head,
    :func:`trainer.compat.methods.losses.expected_distance` of T₁₂'s, which does not move the maps.

    ``L_a``: mean over the images of ½ [1 − cos(T₂₁(n(x)), e)] + ½ [1 − cos(n(x), T₁₂(n(e)))], or of the one term there
    is. ``L_b`` as in LCE, over the images whose class has an old centre; 0 without ``classes``.

    Args:
        x: (B, D2). e: (B, D1). known: (n,) places of the images that have both embeddings.
        classes: the batch's classes with their old centres.
        labels: (B,), for the contrastive loss. head: of T₁₂.
        noise: what ``compat.noise`` is drawn from. What a map takes, n(v) or a centre, then has a Gaussian vector of
            about that length added (training with noise: Bishop, Neural Computation 7, 1995); what its output is
            compared with has none.

    Returns:
        The loss, and ``alignment``, ``boundary``, ``t21_norm``, ``t12_norm`` (the smallest norm that the map gave) and,
        where asked for, ``contrastive`` and ``distance``, detached; loss, alignment and boundary are 0 with fewer than
        two known images. ``center_cosines`` and ``boundary_slack`` of the images with an old centre as in
        :class:`TransformedCompat`, where there are any.
    """
    zero, config = x.new_zeros(()), compat.config
    assert isinstance(config, LceCrossConfig)
    if len(known) < 2:
        return zero, {"alignment": zero, "boundary": zero}
    (places,) = upload([known], x.device)
    u, v, unit = normalize(x[places]), normalize(e[places]), not config.authors_formula
    of, centers = _old_centers(classes, known, v)
    terms, bound, more = [], zero, dict[str, Tensor]()
    meetings = list[tuple[Tensor, Tensor]]()
    if compat.t21 is not None:
        mapped = compat.t21(_noisy(u, config.noise, noise))
        more["t21_norm"] = smallest_norm(mapped)
        terms.append(half_distance(mapped, v, unit))
        meetings.append((mapped, v))
        cosines = boundary_cosines(mapped.index_select(0, of.samples), centers[of.among], unit)
    if compat.t12 is not None:
        taken = _noisy(torch.cat([v, centers]), config.noise, noise)
        mapped, mapped_centers = compat.t12(taken).split([len(v), len(centers)])
        more["t12_norm"] = smallest_norm(mapped)
        terms.append(half_distance(mapped, u, unit))
        meetings.append((mapped, u))
        if compat.t21 is None:
            cosines = boundary_cosines(u[of.samples], mapped_centers.index_select(0, of.among), unit)
    align = torch.stack(terms).mean()
    if classes is not None and len(of.samples):
        slack = cosines - classes.boundaries[of.places]
        bound = (-slack).clamp_min(0).mean()
        more |= {"center_cosines": cosines.detach(), "boundary_slack": slack.detach()}
    loss = config.alignment_weight * align + config.boundary_weight * bound
    if config.contrastive_weight:
        assert labels is not None
        mapped, target = meetings[0]  # T₂₁'s where there is one
        contrast = losses.contrastive(mapped, target, labels[places], config.contrastive_temperature)
        loss = loss + config.contrastive_weight * contrast
        more["contrastive"] = contrast.detach()
    if head is not None:
        mapped, target = meetings[-1]  # T₁₂'s
        if noise is not None:
            mapped = _deployed(compat.t12, v)
        likelihood = losses.expected_distance(head(v)[:, 0], 1 - losses.cosine(mapped, target))
        loss, more["distance"] = loss + likelihood, likelihood.detach()
    return loss, {"alignment": align.detach(), "boundary": bound.detach(), **more}


def _deployed(transform: nn.Module | None, unit: Tensor) -> Tensor:
    """What a map gives with its running statistics, which stay as they are."""
    assert transform is not None
    with torch.no_grad():
        mapped = transform.eval()(unit)
    transform.train()
    return mapped


def _noisy(unit: Tensor, length: float, noise: torch.Generator | None) -> Tensor:
    """(n, D) with independent Gaussian vectors added, whose squared length is ``length``² on average."""
    if noise is None:
        return unit
    drawn = torch.randn(unit.shape, generator=noise, dtype=unit.dtype, device=unit.device)
    return unit + length / unit.shape[1] ** 0.5 * drawn


def _old_centers(classes: Pairs | None, known: NDArray[np.int64], like: Tensor) -> tuple[Known, Tensor]:
    """The classes and, of the n known images, those that have an old centre; those centres, unit, (V, D1)."""
    if classes is None:
        none = torch.empty(0, dtype=torch.int64, device=like.device)
        return Known(none, none, none, none), like.new_empty(0, like.shape[1])
    of = Known.of(replace(classes, class_index=classes.class_index[known]))
    return of, normalize(classes.centers[of.classes])
