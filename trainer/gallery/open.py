"""Which kind of gallery a file is: told by its first bytes."""

from pathlib import Path

from trainer.errors import DataError
from trainer.gallery.faiss_index import FaissGallery
from trainer.gallery.formats import TAKEN, Format, NpyGallery, NpzGallery, SafetensorsGallery, ShardsGallery
from trainer.gallery.parquet import ParquetGallery
from trainer.reading import open_regular

_FOREIGN = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".csv", ".tsv", ".json", ".h5", ".hdf5", ".mat", ".txt")


def open_gallery(path: Path) -> Format:
    """Open a gallery: a folder holds .safetensors shards; a file tells by its first bytes what it is, else FAISS.

    Raises:
        DataError: missing, damaged, of another kind, or empty.
    """
    if path.is_dir():
        return ShardsGallery(path)
    if not path.exists():
        raise DataError(f"{path}: no such gallery file")
    with open_regular(path, DataError) as file:
        first = file.read(9)
    if path.suffix == ".npy" or first.startswith(b"\x93NUMPY"):
        return NpyGallery(path)
    if path.suffix == ".npz" or (first.startswith(b"PK") and path.suffix not in _FOREIGN):
        return NpzGallery(path)
    if path.suffix == ".safetensors" or first[8:] == b"{":  # behind the length of its JSON
        return SafetensorsGallery(path)
    if path.suffix == ".parquet" or first.startswith(b"PAR1"):
        return ParquetGallery(path)
    if path.suffix in _FOREIGN or first.startswith((b"\x80", b"PK")):
        raise DataError(
            f"{path}: a {path.suffix or 'pickled'} file is not taken (nothing is unpickled); taken are {TAKEN}; write "
            "it with numpy.savez(FILE, vectors=…, ids=…)"
        )
    return FaissGallery(path)
