"""Sections with variants, as the tests build them from a bag of keys."""

from typing import Any

from trainer.config import node_for


def variant(kind: Any, **values: Any) -> Any:
    """The variant of ``kind`` that the tag among ``values`` chooses, from those of the values whose keys it has."""
    node = node_for(kind)
    assert node is not None
    chosen = node.kind(values, "", "test")
    return chosen(**{key: value for key, value in values.items() if key in chosen.model_fields})
