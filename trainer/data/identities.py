"""Which identities a data set holds and a model was trained on: 64-bit hashes that can be compared, and no names."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from trainer.data.index import Dataset, open_dataset, same_records
from trainer.errors import DataError, LceError
from trainer.files import checksum, write_array
from trainer.reading import read_array, read_yaml

Kind = Literal["names", "digits", "numbers"]


class IdentitiesCard(BaseModel):
    """What a model card says of the identities; their hashes stand next to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    records: str = Field(description="fingerprint of the records")
    kind: Kind = Field(description="what was hashed: names, names of digits alone, or class numbers")
    complete: bool = Field(description="False: the weights that training started from have seen others too")
    file: tuple[int, int] = Field(description="(bytes, CRC-32) of the file of hashes")


@dataclass(frozen=True)
class Identities:
    """The identities of some records.

    Attributes:
        records: :attr:`Dataset.records_fingerprint`.
        kind: what the hashes are of. Only names tell identities of other data sets: names of digits alone, and class
            numbers, mean something within one data set.
        keys: (k,) uint64, a hash for each identity.
        complete: whether these are all that a model was trained on.
    """

    records: str
    kind: Kind
    keys: NDArray[np.uint64]
    complete: bool = True

    def shared(self, other: "Identities") -> NDArray[np.bool_] | None:
        """(k,) which of these identities are among the other's; None: the two cannot be compared."""
        comparable = self.kind == other.kind == "names" or same_records(self.records, other.records)
        return np.isin(self.keys, other.keys) if comparable else None

    def and_of(self, other: "Identities | None") -> "Identities":
        """These and the other's; not complete where the other's are not known or cannot be compared with these."""
        if other is None or other.shared(self) is None:
            return replace(self, complete=False)
        keys = np.union1d(self.keys, other.keys)
        return replace(self, keys=keys, complete=self.complete and other.complete)


def named_identities(dataset: Dataset) -> tuple[Identities, list[str]] | None:
    """The identities of the records that a data set uses, and what each is called; None: nothing is known of them.

    Classes are the data set's own, whatever the label table calls them.
    """
    classes, names = dataset.own_classes
    if not len(classes):
        return None
    called = [f"class {number}" for number in classes.tolist()]
    kind: Kind = "numbers"
    if names is not None and int(classes[-1]) < len(names):
        called = [names[number] for number in classes.tolist()]
        kind = "digits" if 2 * sum(name.isdecimal() for name in called) > len(called) else "names"
    keys = np.array([_key(name) for name in called], np.uint64)
    return Identities(dataset.records_fingerprint, kind, keys), called


def identities(dataset: Dataset | None) -> Identities | None:
    """As :func:`named_identities`, without the names."""
    found = None if dataset is None else named_identities(dataset)
    return None if found is None else found[0]


def save_identities(known: Identities, file: Path) -> IdentitiesCard:
    """Write the hashes, in ascending order (uint64 .npy), and give what the card says of them."""
    write_array(file, np.unique(known.keys))
    return IdentitiesCard(records=known.records, kind=known.kind, complete=known.complete, file=checksum(file))


def load_identities(card: IdentitiesCard | None, file: Path) -> Identities | None:
    """What a model says of its identities; None: the card names none, or the file is missing.

    Raises:
        DataError: the file is not the one that the card was written with.
    """
    if card is None or not file.exists():
        return None
    if checksum(file) != card.file:
        raise DataError(f"{file}: is not what was written with the model (its checksum differs); copy it again")
    return Identities(card.records, card.kind, np.asarray(read_array(file, DataError), np.uint64), card.complete)


def identities_of_run(folder: Path) -> Identities | None:
    """Those of the data set and label table that a run folder's configuration names, where they are still there."""
    try:
        config = read_yaml(folder / "config.yaml", DataError)
        data = config["data"]
        return identities_of(data["path"], data.get("labels"), config["backbone"].get("weights"))
    except (LceError, KeyError, TypeError, AttributeError):
        return None


def identities_of(path: str | Path | None, labels: str | Path | None, weights: object) -> Identities | None:
    """Those of a training run by its settings, where the data set is still there."""
    try:
        found = None if path is None else identities(open_dataset(path, labels))
    except LceError:
        return None
    return None if found is None else replace(found, complete=weights is None)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
