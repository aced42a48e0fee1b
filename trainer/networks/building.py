"""The networks by name, and how one is built.

To add one: a module with the network, and a line in :data:`BACKBONES`.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import nn

from trainer.errors import ConfigError
from trainer.networks import ir
from trainer.networks.config import BackboneConfig
from trainer.networks.iresnet import UNITS, IResNet
from trainer.networks.mobilefacenet import MobileFaceNet
from trainer.networks.small import Small, SmallResNet
from trainer.networks.vit import SIZES, VisionTransformer

Builder: TypeAlias = Callable[..., nn.Module]

BACKBONES: dict[str, Builder] = {
    "small": Small,
    "small_resnet": SmallResNet,
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in UNITS},
    **{f"ir_{depth}": partial(ir.IR, depth) for depth in ir.UNITS},
    "mobilefacenet": MobileFaceNet,
    **{f"vit_{size}": partial(VisionTransformer, size) for size in SIZES},
}
"""name → builder(dim, image_size, [width]). ``small`` and ``small_resnet`` are for trying things out on a processor, as
the demo and the tests do: nobody has published results with them."""


def build_backbone(config: BackboneConfig, image_size: tuple[int, int]) -> nn.Module:
    """The network ``config.name``, freshly initialised from torch's global generator.

    Args:
        config: name, embedding dimension D, and the first stage's channels where the network offers them.
        image_size: (H, W) in pixels.

    Returns:
        A module (b, 3, H, W) → (b, D); the embeddings are not normalised.

    Raises:
        ConfigError: no network of this name, or it has no width to choose.
    """
    if config.name not in BACKBONES:
        raise ConfigError(f"backbone.name = {config.name!r}: unknown; known: {', '.join(BACKBONES)}")
    builder = BACKBONES[config.name]
    if config.width is None:
        return builder(config.dim, image_size)
    try:
        return builder(config.dim, image_size, width=config.width)
    except TypeError:
        raise ConfigError(f"backbone.width = {config.width}: {config.name} has a fixed width; leave it out") from None
