"""The loader that a configuration asks for."""

import logging

import numpy as np

from trainer.data.config import BlocksConfig, DataConfig, ImagesConfig, SyntheticConfig, choose_loader
from trainer.data.index import Dataset
from trainer.data.loader import Loader
from trainer.data.order import Blocks, Order, Schedule
from trainer.distributed import Ranks
from trainer.errors import ConfigError

log = logging.getLogger(__name__)


def build_loader(data: DataConfig, seed: int, dataset: Dataset | None, ranks: Ranks, images: bool = True) -> Loader:
    """The loader that ``data.loader`` asks for, for this rank; it says in the log which it is and why.

    Args:
        data: the section. seed: of order and augmentation.
        dataset: the opened data set; None for ``data.loader: synthetic``.
        ranks: this rank, the world size and the device that batches go to.
        images: False: batches of record numbers and labels alone.

    Raises:
        ConfigError: DALI is asked for and not installed, or no data set is given.
        DataError: nothing to train on, or more records known to be damaged than allowed.
    """
    if isinstance(data, SyntheticConfig):
        from trainer.data.synthetic import SyntheticLoader

        records = np.arange(data.synthetic_records)
        order = Order(records, records % data.synthetic_classes, seed=seed, sampling=data.sampling, repeat=data.repeat)
        schedule = Schedule(order, data.batch_size, ranks.rank, ranks.world_size, data.drop_last)
        return SyntheticLoader(schedule, data.synthetic_classes, data.synthetic_size, seed=seed, device=ranks.device)
    if dataset is None or not isinstance(data, ImagesConfig):
        raise ConfigError(f"data.loader = {data.loader} needs a data set: set data.path")
    labels = np.asarray(dataset.labels[dataset.kept]) if data.sampling == "class_balanced" else None
    blocks = None
    if isinstance(data, BlocksConfig):
        blocks = Blocks(dataset.byte_positions(dataset.kept), data.block_bytes, data.buffer_bytes)
    order = Order(dataset.kept, labels, seed=seed, sampling=data.sampling, repeat=data.repeat, blocks=blocks)
    schedule = Schedule(order, data.batch_size, ranks.rank, ranks.world_size, data.drop_last)
    if not images:
        from trainer.data.records import RecordLoader

        return RecordLoader(dataset, schedule, ranks.device)
    kind, reason = choose_loader(data.loader)
    if ranks.is_main:
        log.info("data loader: %s (%s)", kind, reason)
    if kind == "dali":
        from trainer.data.dali import DaliLoader

        return DaliLoader(
            dataset,
            schedule,
            data.augment,
            seed=seed,
            threads=data.workers,
            device=ranks.device,
            max_bad=data.max_bad_records,
        )
    from trainer.data.torch_loader import TorchLoader

    return TorchLoader(
        dataset,
        schedule,
        data.augment,
        seed=seed,
        workers=data.workers,
        device=ranks.device,
        max_bad=data.max_bad_records,
    )
