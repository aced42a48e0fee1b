"""The losses of compatible training as plain functions: what the fused and sharded paths are compared with.

Every function takes raw vectors, normalises them itself (n(v) = v / ‖v‖), works in the dtype it is given (float64 for
references), and uses only the classes or samples that ``mask`` keeps, exactly: the others are taken out before
anything is computed. Weights are left to the caller. Alignment terms are in (1 − cos) units: ½ ‖u − v‖² on unit
vectors; the paper's mean over dimensions is 2/D of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, one_hot

Map = Callable[[Tensor], Tensor]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a_i, b_i): (n, D), (n, D) → (n,)."""
    return (normalize(a) * normalize(b)).sum(1)


def _mean(values: Tensor) -> Tensor:
    """The mean, and 0 of nothing."""
    return values.sum() / max(1, len(values))


def alignment(
    rows: Tensor,
    centers: Tensor,
    mask: Tensor,
    *,
    t21: Map | None = None,
    t12: Map | None = None,
    authors_formula: bool = False,
) -> Tensor:
    """LCE's alignment of class centres (Meng et al., "Learning Compatible Embeddings", ICCV 2021, eq. 5), in (1 − cos)
    units.

    Without maps ``mean_j [1 − cos(w_j, o_j)]``; with T₂₁ ``mean_j [1 − cos(T₂₁(n(w_j)), o_j)]``; with T₁₂
    ``mean_j [1 − cos(w_j, T₁₂(o_j))]``; with both the mean of the two.

    Args:
        rows: (C, D2), the new classifier's. centers: (C, D1), the old centres. mask: (C,) bool.
        authors_formula: T's output is not renormalised, as in the authors' code: ½ ‖T(·) − ·‖².
    """
    w, o = normalize(rows[mask]), normalize(centers[mask])
    terms = []
    if t21 is not None:
        terms.append(_distance(t21(w), o, authors_formula))
    if t12 is not None:
        terms.append(_distance(t12(o), w, authors_formula))
    if not terms:
        terms.append(_distance(w, o, True))
    return torch.stack(terms).mean()


def _distance(mapped: Tensor, target: Tensor, as_it_is: bool) -> Tensor:
    """mean_i ½ ‖u_i − v_i‖², which is 1 − cos where u is normalised."""
    u = mapped if as_it_is else normalize(mapped)
    return _mean((u - target).square().sum(1) / 2)


def boundary(
    embeddings: Tensor,
    centers: Tensor,
    boundaries: Tensor,
    mask: Tensor | slice,
    *,
    t21: Map | None = None,
    t12: Map | None = None,
    authors_formula: bool = False,
) -> Tensor:
    """LCE's boundary loss (ICCV 2021, eq. 6): new embeddings stay inside their class's old radius.

    ``mean_i max(0, b_i − cos(T₂₁(n(x_i)), o_i))`` over the samples that ``mask`` keeps; the identity where there is no
    T₂₁. In forward mode, where only T₁₂ is trained, ``cos(x_i, T₁₂(o_i))`` (the paper gives no formula for it).

    Args:
        embeddings: (n, D2). centers: (n, D1), boundaries: (n,), mask: (n,) bool (or a slice), all of
            the samples' own classes.
        authors_formula: the product of the unnormalised embedding (or T's output) with the centre, clamped to [−1, 1],
            as in the authors' code; nearly every sample then lies in the clamp, where the gradient is 0.
    """
    x, o, b = embeddings[mask], normalize(centers[mask]), boundaries[mask]
    if authors_formula:
        mapped = x if t21 is None else t21(x)
        if t21 is None and t12 is not None:
            o = t12(o)
        return _mean((b - (mapped * o).sum(1).clamp(-1, 1)).clamp_min(0))
    x = normalize(x)
    if t21 is not None:
        x = t21(x)
    elif t12 is not None:
        o = t12(o)
    return _mean((b - cosine(x, o)).clamp_min(0))


def bct(
    embeddings: Tensor, labels: Tensor, old_rows: Tensor, mask: Tensor, scale: float, margin: float = 0.0
) -> Tensor:
    """BCT's influence loss: the old classifier, frozen, must classify the new embeddings (Shen et al., CVPR 2020, eq.
    5).

    Cross entropy of ``s · cos(x, o_j)``, the target's cosine less ``margin`` (CosFace), over the classes that have an
    old row. Left
    out: the knowledge distillation and synthesised classifier rows for classes that the old model did not know (they
    are masked).

    Args:
        embeddings: (n, D1). labels: (n,) in [0, C). old_rows: (C, D1). mask: (C,) bool.
    """
    kept = mask[labels]
    row = torch.cumsum(mask, 0) - 1
    x, y = normalize(embeddings[kept]), row[labels[kept]]
    logits = x @ normalize(old_rows[mask]).T
    logits = logits - margin * one_hot(y, logits.shape[1]).to(logits)
    return _mean(cross_entropy(scale * logits, y, reduction="none"))


def ndpp_prototypes(centers: Tensor, mask: Tensor, neighbours: int, push: float) -> Tensor:
    """Old centres moved away from their near neighbours, after NDPP (Zhou, Sun, Pei, Li, Wang, "Prototype Perturbation
    for Relaxing Alignment Constraints in Backward-Compatible Learning", arXiv:2503.14824).

    ``n(o_j + push · (1/K) Σ_k max(0, cos(o_j, o_k)) (o_j − o_k))`` over the K nearest other centres: a class that
    stands alone stays where it is. The form is ours. Left out: the paper also heeds the new model's features and moves
    the prototypes again while it trains; here it is done once, before.

    Args:
        centers: (C, D). mask: (C,) bool, which of them there are.

    Returns:
        (C, D), unit; rows that are masked are as they were given.
    """
    known = mask.nonzero()[:, 0]
    o = normalize(centers[known])
    cosines = (o @ o.T).fill_diagonal_(-torch.inf)
    near = cosines.topk(min(neighbours, len(o) - 1))
    offsets = near.values.clamp_min(0)[:, :, None] * (o[:, None] - o[near.indices])
    out = centers.clone()
    out[known] = normalize(o + push * offsets.mean(1)) if near.values.shape[1] else o
    return out


def bt2(
    mapped: Tensor,
    old_embeddings: Tensor,
    known: Tensor,
    labels: Tensor,
    valid: Tensor,
    old_rows: Tensor,
    mask: Tensor,
    scale: float,
    margin: float = 0.0,
) -> Tensor:
    """After BT² (Zhou et al., "BT²: Backward-compatible Training with Basis Transformation", ICCV 2023): the old part
    of the new embedding is near the image's old embedding, and the old classifier knows it.

    ``mean_i [1 − cos(T₂₁(n(x_i)), e_i)]`` plus :func:`bct` of T₂₁(n(x_i)), T₂₁ with orthonormal rows. The authors weigh
    both by 10 and take the classes' mean embeddings as old classifier, without a scale; here it is the bank's, with the
    head's. Left out: their third term, which draws the rest of the new embedding to that of a finished model without
    compatibility; here the classification loss acts on the whole embedding instead.

    Args:
        mapped: (n, D1), T₂₁ of the unit new embeddings. old_embeddings: (n, D1). known: (n,) bool, which of these there
            are. labels: (n,) in [0, C). valid: (n,) bool, which samples have a class. old_rows: (C, D1). mask: (C,)
            bool.
    """
    part = l2(mapped[known], old_embeddings[known])
    return part + bct(mapped[valid], labels[valid], old_rows, mask, scale, margin)


def l2(embeddings: Tensor, old_embeddings: Tensor) -> Tensor:
    """Regression to the old embedding of the same image, ``mean_i ½ ‖n(x_i) − n(e_i)‖²`` = ``mean_i [1 − cos(x_i,
    e_i)]``.

    The instance baseline of BCT (Shen et al., CVPR 2020, section 4) and MixBCT. Args: both (n, D1), image by image.
    """
    return _mean(1 - cosine(embeddings, old_embeddings))


def unibct_prototypes(
    new: Tensor, old: Tensor, labels: Tensor, num_classes: int, *, share: float = 0.9, temperature: float = 0.05
) -> tuple[Tensor, Tensor]:
    """UniBCT's refined prototypes, which then take the place of BCT's old rows (Zhang et al., IJCAI 2022, eq. 8 to 10).

    Within a class, images are linked by the softmax E of their new embeddings' cosines over ``temperature`` (no
    self-links); the old embeddings are averaged along the links, ``(1 − λ)(I − λE)⁻¹ e``, and their mean is the
    prototype. E is normalised over the rows here, so that a constant stays what it is. Left out: linking across
    classes, and repeating it while the new model trains.

    Args:
        new: (n, D2), old: (n, D1), labels: (n,). share: λ in [0, 1).

    Returns:
        Unit prototypes (C, D1), zero for classes without images, and their mask (C,) bool.
    """
    prototypes = old.new_zeros(num_classes, old.shape[1])
    mask = torch.bincount(labels, minlength=num_classes) > 0
    for j in mask.nonzero().flatten().tolist():
        x, e = normalize(new[labels == j]), normalize(old[labels == j])
        if len(x) > 1:
            links = (x @ x.T / temperature).fill_diagonal_(-torch.inf).softmax(1)
            identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
            e = (1 - share) * torch.linalg.solve(identity - share * links, e)
        prototypes[j] = normalize(e.mean(0), dim=0)
    return prototypes, mask


def elastic_boundary(
    embeddings: Tensor, centers: Tensor, boundaries: Tensor, mask: Tensor | slice, elasticity: float = 0.5
) -> Tensor:
    """An elastic radius in the manner of AdvBCT (Pan et al., CVPR 2023): ``mean_i max(0, θ_i − r_i)`` in radians.

    θ_i is the angle between the new embedding and its old centre. The radius r_i lies between the class's old radius
    ``arccos b`` and the angle that the new embeddings of the batch have on average (``elasticity`` 0 … 1, without
    gradient), where that is
    larger: a class that the new model spreads wider is not forced at once. This is the idea, not the authors'
    schedule; their radius from the training set's new embeddings needs a pass over it each epoch.

    Args:
        embeddings: (n, D1). centers: (n, D1), boundaries: (n,), mask: (n,) bool of the samples' classes.
    """
    angles = angle(embeddings[mask], centers[mask])
    radius = boundaries[mask].clamp(-1, 1).arccos()
    usual = _mean(angles.detach())
    return _mean((angles - (radius + elasticity * (usual - radius).clamp_min(0))).clamp_min(0))


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between a_i and b_i in radians, (n,), by atan2: its gradient stays finite at 0 and π."""
    u, v = normalize(a), normalize(b)
    tiny = torch.finfo(u.dtype).tiny
    return 2 * torch.atan2(((u - v).square().sum(1) + tiny).sqrt(), ((u + v).square().sum(1) + tiny).sqrt())


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grads[0], None


def adversarial(embeddings: Tensor, old_embeddings: Tensor, discriminator: Map, weight: float = 1.0) -> Tensor:
    """AdvBCT's adversarial term (Pan et al., CVPR 2023): a discriminator must not tell new embeddings from old ones.

    The discriminator's own cross entropy, with the gradient reversed on its way into the embeddings: one minimisation
    trains both. As with gradient reversal's authors (Ganin et al., JMLR 2016, section 5.2.2) the weight is that of the
    reversed gradient alone, so that the discriminator learns at one pace whatever the weight.

    Args:
        embeddings, old_embeddings: (n, D1), (m, D1). discriminator: (k, D1) → (k, 1) logits of being new. weight: of
            the gradient into the embeddings; the value returned is without it.
    """
    both = torch.cat([_Reverse.apply(normalize(embeddings), weight), normalize(old_embeddings)])
    target = torch.cat([both.new_ones(len(embeddings)), both.new_zeros(len(old_embeddings))])
    return binary_cross_entropy_with_logits(discriminator(both)[:, 0], target)


def mixbct_choice(credible: Tensor, share: float, draws: Tensor) -> Tensor:
    """Which images of a batch MixBCT replaces by their old embeddings (Liang et al., arXiv 2308.06948), (n,) bool.

    Args:
        credible: (n,) bool, the old embedding is among the nearest (the authors' 90 %) to its centre. share: of the
            batch to be replaced. draws: (n,) in [0, 1), uniform and independent; the credible images with the smallest
            draws are replaced.
    """
    order = torch.where(credible, draws, torch.inf).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return credible & (rank < int(share * len(credible)))


def contrastive(mapped: Tensor, targets: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss between two models' embeddings of the same images (Ricci et al., "λ-Orthogonality
    Regularization for Compatible Representation Learning", NeurIPS 2025, eq. 8).

    ``−mean_i Σ_j p_ij log q_ij`` with q_i the softmax over j of cos(m_i, t_j) / τ and p_i the same for all targets of
    i's class, its own image among them, and 0 for the others. In their eq. 9 the mapped old embeddings meet the old
    ones and the mapped new ones, as all of these lie in one space; here a map's output meets the embeddings that it
    is compared with at search time: T₂₁(x) the old ones, or T₁₂(e) the new ones.

    Args:
        mapped: (n, D), targets: (n, D), image by image. labels: (n,). temperature: τ.
    """
    log_q = (normalize(mapped) @ normalize(targets).T / temperature).log_softmax(1)
    same = labels[:, None] == labels[None, :]
    return -_mean((log_q * same).sum(1) / same.sum(1))


STEEPNESS = 10.0
"""α of :func:`orthogonality`."""


def gram_distance(matrix: Tensor) -> Tensor:
    """‖M Mᵀ − I‖_F of a matrix, or ‖Mᵀ M − I‖_F where that is the smaller Gram matrix: 0 for orthonormal rows or
    columns. The gradient there is 0."""
    m = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m), dtype=m.dtype, device=m.device))


def orthogonality(distance: Tensor, threshold: float) -> Tensor:
    """λ-orthogonality (Ricci et al., NeurIPS 2025, eq. 6): ``σ(α (d − λ)) · d``, which draws a matrix toward an
    orthogonal one while d, its :func:`gram_distance`, is above λ, and hardly below.

    Their matrix is square, as they cut the longer embeddings; a rectangular one is taken as it is here. α is fixed
    (:data:`STEEPNESS`).
    """
    return torch.sigmoid(STEEPNESS * (distance - threshold)) * distance


def expected_distance(log_expected: Tensor, distances: Tensor) -> Tensor:
    """What a head that predicts distances minimises: ``mean_i ½ [d_i e^(−s_i) + s_i]``, least where e^s = E[d].

    It is the negative log-likelihood, per dimension and but for a constant, of a Gaussian whose variance is the same in
    each of D dimensions: FastFill (Jaeckle et al., ICLR 2023) takes that for the error of a mapped old embedding. There
    it trains the map as well; here ``distances`` come without gradient, so that the map is the same without a head.

    Args:
        log_expected: (n,), s. distances: (n,), ½ ‖·‖² of unit vectors, 1 − cos.
    """
    return _mean(distances.detach() * (-log_expected).exp() + log_expected) / 2


def fct(mapped_old: Tensor, embeddings: Tensor) -> Tensor:
    """Forward-compatible training's map (Ramanujan et al., CVPR 2022, eq. 3): ``mean_i [1 − cos(h(e_i), x_i)]``.

    The new embeddings are the target and get no gradient. Left out: the side information of a third network that the
    paper stores with each old embedding; so this is its weaker variant, which needs nothing that a deployed gallery
    lacks.

    Args:
        mapped_old: (n, D2), h of the old embeddings. embeddings: (n, D2), image by image.
    """
    return _mean(1 - cosine(mapped_old, embeddings.detach()))
