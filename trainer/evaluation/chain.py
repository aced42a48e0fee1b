"""Several models one after another: which one each was made compatible with, and through which transformations the
embeddings of one reach the space of another."""

from collections.abc import Mapping

from trainer.errors import ModelError
from trainer.evaluation.arrays import FloatArray
from trainer.models.card import Direction
from trainer.models.model import EmbeddingModel

Models = Mapping[str, EmbeddingModel]
"""Role → model, from the first deployed one (``old``) to ``new``; ``paragon`` stands outside of the chain."""


def anchors(models: Models) -> dict[str, str]:
    """Role → the role of the model that it was made compatible with: the one that its card names by its hash, where
    that is an earlier one of these, else the one before it."""
    chain = [role for role in models if role != "paragon"]
    by_hash = {models[role].hash: at for at, role in enumerate(chain)}
    found = {}
    for at, role in enumerate(chain[1:], 1):
        known = by_hash.get(models[role].card.compatible_with_hash or "", at)
        found[role] = chain[known if known < at else at - 1]
    return found


def check_links(models: Models) -> None:
    """Refuse a model whose embeddings cannot meet those of its anchor. Raises :class:`ModelError`."""
    for role, anchor in anchors(models).items():
        new, old = models[role], models[anchor]
        if new.card.left_out and (old.dim != new.dim or new.card.compatible_with_hash == old.hash):
            inside = ", or one that `lce export --transform t21` wrote" if "t21" in new.card.left_out else ""
            raise ModelError(
                f"{new.path}: its embeddings meet those of {old.path} through {' and '.join(new.card.left_out)}, which "
                f"this file does not hold; give the model folder that it was exported from{inside}"
            )
        if old.dim != new.dim and not new.card.transforms:
            raise ModelError(
                f"{new.path}: dimension {new.dim} against {old.dim} of {old.path}, and no transformation between them "
                "in the new model; train with compat.mode backward, forward, both or cross-model"
            )
        for direction, part in new.card.transforms.items():
            expected = (new.dim, old.dim) if direction == "t21" else (old.dim, new.dim)
            if (part.dim_in, part.dim_out) != expected:
                raise ModelError(
                    f"{new.path}: its {direction} maps dimension {part.dim_in} to {part.dim_out}, needed is "
                    f"{expected[0]} to {expected[1]}; was it trained against another old model?"
                )


def predicted_distance(models: Models, vectors: Mapping[str, FloatArray]) -> FloatArray | None:
    """How far the new model expects T₁₂ of the first deployed one's embeddings to be from its own, (n,); None where it
    does not predict that, or its maps are to another model. vectors: role → (n, D) unit."""
    new = models.get("new")
    if new is None or not new.predicts_distance or anchors(models).get("new") != "old":
        return None
    return new.distance(vectors["old"])


def carried(models: Models, vectors: Mapping[str, FloatArray]) -> dict[tuple[str, str], FloatArray]:
    """(model, space) → the model's embeddings in every other model's space that they reach, by the fewest steps.

    A step is T₂₁ of a model into its anchor's space, T₁₂ from its anchor's into its own, or nothing at all, both ways,
    where the model has no transformation. vectors: role → (n, D) unit.
    """
    steps: dict[str, list[tuple[str, EmbeddingModel, Direction | None]]] = {role: [] for role in models}
    for role, anchor in anchors(models).items():
        model = models[role]
        if "t21" in model.card.transforms:
            steps[role].append((anchor, model, "t21"))
        if "t12" in model.card.transforms:
            steps[anchor].append((role, model, "t12"))
        if not model.card.transforms:
            steps[role].append((anchor, model, None))
            steps[anchor].append((role, model, None))
    out = {}
    for role in vectors:
        reached = {role: vectors[role]}
        waiting = [role]
        for here in waiting:
            for space, model, direction in steps[here]:
                if space not in reached:
                    given = reached[here]
                    reached[space] = given if direction is None else model.transform(direction, given)
                    waiting.append(space)
        out.update({(role, space): found for space, found in reached.items() if space != role})
    return out
