"""The networks that map images to embeddings: :data:`BACKBONES` by name, :func:`build_backbone`."""

from typing import TYPE_CHECKING

from trainer.lazy import importer

if TYPE_CHECKING:
    from trainer.networks.building import BACKBONES as BACKBONES
    from trainer.networks.building import build_backbone as build_backbone

__getattr__ = importer(__name__, dict.fromkeys(("BACKBONES", "build_backbone"), "trainer.networks.building"))
