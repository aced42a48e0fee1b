"""lce-trainer: class-sharded face recognition training with compatible embeddings (LCE, ICCV 2021).

What most users call from Python stands here; each name is imported when it is first used (docs/python.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
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

__all__ = [
    "__version__",
    "embed",
    "evaluate",
    "export_onnx",
    "load_config",
    "load_model",
    "make_bank",
    "open_dataset",
    "train",
    "upgrade_gallery",
]

if TYPE_CHECKING:
    from trainer.api import embed, evaluate, export_onnx, make_bank, train, upgrade_gallery
    from trainer.data import open_dataset
    from trainer.models.open import load_model
    from trainer.run.config import load_config


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
