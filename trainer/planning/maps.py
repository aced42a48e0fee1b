"""The sizes of what compatibility methods train next to the network: maps between the two spaces, a discriminator."""

from dataclasses import dataclass
from functools import cache

from trainer.compat.methods.config import AdvBctConfig, Bt2Config, FctConfig, LceMapsConfig
from trainer.networks.config import TransformConfig
from trainer.planning.setting import Setting


@dataclass(frozen=True)
class MapSizes:
    """Numbers, not bytes.

    Attributes:
        parameters: that are trained. fixed: other tensors of a checkpoint. statistics: running ones, of all these.
    """

    parameters: int = 0
    fixed: int = 0
    statistics: int = 0


def map_sizes(setting: Setting) -> MapSizes:
    """Of all methods together; nothing where there is no old model yet."""
    dim, old, found = setting.config.backbone.dim, setting.old_dim, list[MapSizes]()
    for method in setting.config.methods:
        if isinstance(method, LceMapsConfig) and setting.bank_dim is None:
            continue
        if isinstance(method, LceMapsConfig | FctConfig | Bt2Config):
            sizes = zip(method.directions, ((dim, old), (old, dim)), strict=True)
            found += [_built(method.transform, *pair) for asked, pair in sizes if asked]
        elif isinstance(method, AdvBctConfig):  # Linear, PReLU, Linear
            found.append(MapSizes(old * (old + 1) + old + old + 1))
    parameters, fixed, statistics = (
        sum(getattr(one, name) for one in found) for name in ("parameters", "fixed", "statistics")
    )
    return MapSizes(parameters, fixed, statistics)


@cache
def _built(transform: TransformConfig, dim_in: int, dim_out: int) -> MapSizes:
    import torch

    from trainer.networks.transform import build_transform
    from trainer.run.optim import running_statistics

    with torch.device("meta"):
        made = build_transform(transform, dim_in, dim_out)
    parameters = sum(one.numel() for one in made.parameters())
    every = sum(value.numel() for value in made.state_dict().values())
    return MapSizes(parameters, every - parameters, sum(value.numel() for value in running_statistics(made)))
