"""lce-trainer: class-sharded face recognition training with compatible embeddings (LCE, ICCV 2021).

What most users call from Python stands here; each name is imported when it is first used (docs/python.md).
"""

from typing import TYPE_CHECKING

from trainer.lazy import importer

__version__ = "0.1.0"

_MODULES = {
    "load_config": "trainer.run.config",
    "train": "trainer.api",
    "load_model": "trainer.models.open",
    "open_dataset": "trainer.data",
    "embed": "trainer.api",
    "make_bank": "trainer.api",
    "evaluate": "trainer.api",
    "export_onnx": "trainer.api",
    "upgrade_gallery": "trainer.api",
}

if TYPE_CHECKING:
    from trainer.api import embed as embed
    from trainer.api import evaluate as evaluate
    from trainer.api import export_onnx as export_onnx
    from trainer.api import make_bank as make_bank
    from trainer.api import train as train
    from trainer.api import upgrade_gallery as upgrade_gallery
    from trainer.data import open_dataset as open_dataset
    from trainer.models.open import load_model as load_model
    from trainer.run.config import load_config as load_config


__getattr__ = importer(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
