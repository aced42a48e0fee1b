"""What a plan is made for: a configuration and the sizes that it does not state itself."""

from dataclasses import dataclass, replace
from typing import Literal

from trainer.errors import ConfigError, check_ranks
from trainer.head.partition import class_range
from trainer.head.sizes import stratum_count
from trainer.machine import largest_share
from trainer.run.config import Config

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}


@dataclass(frozen=True)
class Setting:
    """A run as far as its needs go.

    Attributes:
        config: the run's configuration.
        num_classes: C.
        image_size: (H, W) in pixels.
        world_size: ranks, one a device.
        device: where the ranks compute.
        bank_dim: D1 of the centre bank; None: no bank.
        records: images of an epoch; None: not known.
    """

    config: Config
    num_classes: int
    image_size: tuple[int, int]
    world_size: int
    device: Literal["cpu", "cuda"]
    bank_dim: int | None = None
    records: int | None = None

    @property
    def old_dim(self) -> int:
        """D1: of the bank, else taken to be the new model's."""
        return self.config.backbone.dim if self.bank_dim is None else self.bank_dim

    @property
    def local_batch(self) -> int:
        """⌈B/W⌉, the most samples that a rank handles of a batch; collectives are padded to it."""
        return largest_share(self.config.data.batch_size, self.world_size)

    @property
    def gathered(self) -> int:
        """The samples that every rank sees in the head, padding included."""
        return self.local_batch * self.world_size

    @property
    def classes(self) -> int:
        """c of the first rank, the most that any rank owns."""
        return class_range(self.num_classes, 0, self.world_size).size

    @property
    def rows(self) -> int:
        """Rows of the classifier on that rank."""
        return self.classes * self.config.head.sub_centers

    @property
    def sampled(self) -> bool:
        """Whether every step draws some of the rows only."""
        return self.config.head.highest_rate < 1

    @property
    def by_rate(self) -> list["Setting"]:
        """One setting for every sample rate that the run comes to."""
        head = self.config.head
        if len(head.rates) == 1:
            return [self]
        heads = [head.model_copy(update={"sample_rate": rate}) for _, rate in head.rates]
        return [replace(self, config=self.config.model_copy(update={"head": one})) for one in heads]

    @property
    def step_rows(self) -> int:
        """Rows of that rank in a step: its share of the drawn classes, and its expected share of the batch's own."""
        if not self.sampled:
            return self.rows
        rate, c = self.config.head.highest_rate, self.classes
        drawn = -(-stratum_count(self.num_classes, rate) * c // self.num_classes) + 2
        others = -(-self.gathered * c // self.num_classes) * (1 - rate)
        return min(self.classes, drawn + round(others)) * self.config.head.sub_centers

    @property
    def embedding_bytes(self) -> int:
        """Bytes of a number of an embedding between backbone and head."""
        return 8 if self.config.train.precision == "float64" else 4

    @property
    def work_bytes(self) -> int:
        """Bytes of a number in the head's arithmetic."""
        return 8 if self.config.head.rows == "float64" else 4


def check_sizes(setting: Setting) -> None:
    """Refuse sizes that training would refuse. Raises :class:`trainer.errors.ConfigError`."""
    check_ranks(setting.world_size, setting.num_classes)
    dim, old = setting.config.backbone.dim, setting.bank_dim
    method = next((one for one in setting.config.methods if not any(one.directions)), None)
    if method is not None and old is not None and old != dim:
        raise ConfigError(
            f"compat.method = {method.method}: the old centres have dimension {old}, backbone.dim is {dim}; use "
            f"backbone.dim={old}, or lce with compat.mode=backward, forward or both, which map between the two"
        )
