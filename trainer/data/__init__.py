"""Training images: RecordIO data sets, one order for every world size, and three loaders behind one interface."""

from typing import TYPE_CHECKING

from trainer.lazy import importer

if TYPE_CHECKING:
    from trainer.data.building import build_loader as build_loader
    from trainer.data.config import choose_loader as choose_loader
    from trainer.data.index import Dataset as Dataset
    from trainer.data.index import DatasetInfo as DatasetInfo
    from trainer.data.index import open_dataset as open_dataset
    from trainer.data.index import open_named as open_named
    from trainer.data.loader import Batch as Batch
    from trainer.data.loader import Loader as Loader
    from trainer.data.order import slice_of as slice_of

_MODULES = {
    "build_loader": "trainer.data.building",
    "choose_loader": "trainer.data.config",
    **dict.fromkeys(("Dataset", "DatasetInfo", "open_dataset", "open_named"), "trainer.data.index"),
    **dict.fromkeys(("Batch", "Loader"), "trainer.data.loader"),
    "slice_of": "trainer.data.order",
}

__getattr__ = importer(__name__, _MODULES)
