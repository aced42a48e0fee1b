"""The scale of the embeddings: the learned factors of the batch norm that a network ends with.

A margin that looks at angles alone needs none, and the small networks have none, iresnet's are frozen at 1 as in
arcface_torch: every embedding is then about √D long. MagFace (Meng et al., CVPR 2021) reads an image's quality from the
norm and needs them free.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def embedding_norm(backbone: nn.Module) -> tuple[str, nn.BatchNorm1d] | None:
    """The batch norm that gives the embeddings, with its name; None for a network that ends otherwise."""
    name, last = list(backbone.named_modules())[-1]
    return (name, last) if isinstance(last, nn.BatchNorm1d) else None


def learn_scale(backbone: nn.Module) -> None:
    """Let the embeddings' norms be learned: the last batch norm gets trained factors and shifts, from 1 and 0 on where
    it has none. A network that ends otherwise is left as it is."""
    found = embedding_norm(backbone)
    if found is None:
        return
    _, norm = found
    if norm.weight is None:
        norm.affine = True
        norm.weight, norm.bias = (nn.Parameter(make(norm.num_features)) for make in (torch.ones, torch.zeros))
    norm.weight.requires_grad_(True)


def fit_scale(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Before ``state`` is loaded: a backbone whose last batch norm has no factors gets those that the state holds."""
    found = embedding_norm(backbone)
    if found is not None and found[1].weight is None and f"{found[0]}.weight" in state:
        learn_scale(backbone)


def add_scale(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Before ``state`` is loaded: one without the factors and shifts of the backbone's last batch norm gets 1 and 0."""
    found = embedding_norm(backbone)
    if found is None or found[1].weight is None:
        return
    name, norm = found
    if f"{name}.running_mean" in state and not {f"{name}.weight", f"{name}.bias"} & state.keys():
        state[f"{name}.weight"] = torch.ones(norm.num_features)
        state[f"{name}.bias"] = torch.zeros(norm.num_features)


def usual_norm(backbone: nn.Module, state: Mapping[str, Tensor] | None = None) -> float | None:
    """The norm that the embeddings of a training batch have in the root mean square: √Σ(γ² + β²) of the last batch norm
    (√D of a new one); None for a network that ends otherwise.

    Args:
        state: the weights that the backbone is to start from, where it does not have them yet.
    """
    found = embedding_norm(backbone)
    if found is None:
        return None
    name, norm = found
    given = [(state or {}).get(f"{name}.{part}") for part in ("weight", "bias")]
    squares = [norm.num_features if given[0] is None else float(given[0].double().square().sum())]
    squares += [] if given[1] is None else [float(given[1].double().square().sum())]
    return sum(squares) ** 0.5
