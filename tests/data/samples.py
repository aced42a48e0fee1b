"""Small data sets for the tests, and what several of them ask of a loader."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.sections import variant
from trainer.data import Batch, Dataset, Loader, build_loader
from trainer.data.config import AnyData, AugmentConfig
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.distributed import Ranks

MXNET = Path(__file__).parent / "mxnet"
ALL_AUGMENTATIONS = AugmentConfig(
    flip=0.5,
    rotate_degrees=5,
    scale=0.1,
    translate=0.05,
    contrast=0.2,
    brightness=0.1,
    saturation=0.3,
    noise=0.02,
    blur=0.5,
    low_resolution=0.5,
    occlusion=0.5,
)


def encoded(seed: int, size: tuple[int, int] = (32, 32), kind: str = "JPEG") -> bytes:
    """A smooth coloured image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return out.getvalue()


def identity_folders(folder: Path, classes: int = 5, images: int = 9, size: tuple[int, int] = (32, 32)) -> Path:
    """``classes`` folders of ``images`` files each; every third is a PNG."""
    for label in range(classes):
        identity = folder / f"person{label:02d}"
        identity.mkdir(parents=True)
        for k in range(images):
            kind = "PNG" if k % 3 == 2 else "JPEG"
            (identity / f"{k}.{kind.lower()}").write_bytes(encoded(100 * label + k, size, kind))
    return folder


def packed(folder: Path, classes: int = 5, images: int = 9, size: tuple[int, int] = (32, 32), **options: Any) -> Path:
    """A packed data set of ``classes`` × ``images`` records in a new folder."""
    source = identity_folders(folder / "source", classes, images, size)
    pack(list_source(source), folder / "packed", PackOptions(**options))
    return folder / "packed"


def unsealed(folder: Path) -> Path:
    """The data set without its checksums, as earlier versions and other tools write them."""
    for file in (folder / "checksums.json", *folder.glob("*.crc.npy")):
        file.unlink(missing_ok=True)
    return folder


def mxnet_copy(name: str, folder: Path) -> Path:
    """A copy of one of MXNet's files, so that tables are not written next to the committed ones."""
    return Path(shutil.copytree(MXNET / name, folder / name))


def loader_of(
    dataset: Dataset | None, kind: str, ranks: Ranks | None = None, seed: int = 3, images: bool = True, **data: Any
) -> Loader:
    """A loader with batches of 8 and no augmentation unless said otherwise."""
    given = {
        "path": "unused",
        "loader": kind,
        "augment": AugmentConfig(flip=0.0),
        "batch_size": 8,
        "workers": 1,
        **data,
    }
    return build_loader(variant(AnyData, **given), seed, dataset, ranks or Ranks(), images)


def take(loader: Loader, count: int) -> list[Batch]:
    """The next ``count`` batches; the loader keeps its position."""
    batches = loader.batches()
    taken = [next(batches) for _ in range(count)]
    batches.close()  # type: ignore[attr-defined]
    return taken
