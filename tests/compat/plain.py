"""Formulas that only tests need whole: what the methods do in parts."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.compat.methods import losses


def mixbct(embeddings: Tensor, old_embeddings: Tensor, credible: Tensor, share: float, draws: Tensor) -> Tensor:
    """MixBCT (Liang et al., arXiv 2308.06948): old embeddings stand in for a share of the new ones before the
    classifier.

    The one classification loss then sees both, so its rows must serve both. Both kinds are made unit here.

    Args:
        embeddings, old_embeddings: (n, D1), image by image. credible: (n,) bool, the old embedding is among the
            nearest (the authors' 90 %) to its centre. share: of the batch to be replaced. draws: (n,) in [0, 1),
            uniform and independent; the credible images with the smallest draws are replaced.

    Returns:
        (n, D1) unit vectors for the classifier; no gradient flows where an old one stands.
    """
    replaced = losses.mixbct_choice(credible, share, draws)
    return torch.where(replaced[:, None], normalize(old_embeddings).detach(), normalize(embeddings))
