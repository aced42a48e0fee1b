"""A gallery in a .parquet: one column of vectors, the others carried along."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.gallery.formats import NOTE, Format, Rows, whole_ids
from trainer.reading import why_unreadable


class ParquetGallery(Format):
    """A table with one column of float lists, all of one length, and, where there is one, an integer column of ids (of
    several, the one called ``ids`` or ``id``; with none of that name, row numbers are the ids)."""

    def __init__(self, path: Path) -> None:
        try:
            self._arrow: Any = importlib.import_module("pyarrow")
            self._parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise DataError(f"{path}: needs pyarrow; pip install 'lce-trainer[gallery]'") from None
        types = self._arrow.types
        try:
            with self._parquet.ParquetFile(path) as file:
                table = self._table = file.read()
                meta = file.metadata
                self._codec = meta.row_group(0).column(0).compression if meta.num_row_groups else "SNAPPY"
        except (OSError, self._arrow.ArrowException) as error:
            reason = why_unreadable(path) or f"is no .parquet file: {str(error).splitlines()[0][:200]}"
            raise DataError(f"{path}: {reason}") from None
        fields = list(table.schema)
        lists = [f.name for f in fields if _is_list(types, f.type) and types.is_floating(f.type.value_type)]
        if len(lists) != 1 or not table.num_rows:
            raise DataError(f"{path}: expected one column of float lists and some rows; found {table.schema.names}")
        self._name, self._path = lists[0], path
        self.rows = table.num_rows
        self._vectors = self._read(table[self._name])
        self.dim = self._vectors.shape[1]
        numbers = [f.name for f in fields if types.is_integer(f.type)]
        named = [name for name in numbers if name in ("ids", "id")]
        chosen = numbers if len(numbers) == 1 else named
        if len(chosen) == 1:
            column = table[chosen[0]]
            if column.null_count:
                raise DataError(f"{path}: {column.null_count:,} rows have no {chosen[0]}")
            self._ids = whole_ids(column.to_numpy(), self.rows, path)
        else:
            self._ids = np.arange(self.rows)
        self.applied = tuple((table.schema.metadata or {}).get(NOTE.encode(), b"").decode().split())

    def _read(self, column: Any) -> FloatArray:
        whole = column.combine_chunks()
        parts = whole.chunks if hasattr(whole, "chunks") else [whole]
        if column.null_count or any(part.flatten().null_count for part in parts):
            raise DataError(f"{self._path}: a row of {self._name} has no vector, or one with a missing number")
        flat = np.concatenate([np.asarray(part.flatten().to_numpy(zero_copy_only=False)) for part in parts])
        counts = np.concatenate(
            [np.asarray(self._arrow.compute.list_value_length(part).to_numpy(zero_copy_only=False)) for part in parts]
        )
        if counts.min() != counts.max() or not counts[0]:
            raise DataError(f"{self._path}: the lists of {self._name} have {counts.min()} to {counts.max()} numbers")
        return flat.reshape(self.rows, -1).astype(np.float32)

    def ids(self, rows: Rows) -> IntArray:
        """See :class:`Format`."""
        return self._ids[rows]

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        return self._vectors[rows]

    def build(self, vectors: FloatArray, target: Path, applied: Sequence[str] = ()) -> None:
        """See :class:`Format`; types, order of columns, compression and metadata are kept."""
        arrow, at = self._arrow, self._table.schema.get_field_index(self._name)
        field = self._table.schema.field(at)
        values, dim = field.type.value_type, vectors.shape[1]
        flat = arrow.array(np.ascontiguousarray(vectors).reshape(-1).astype(values.to_pandas_dtype()), values)
        if arrow.types.is_fixed_size_list(field.type):
            column = arrow.FixedSizeListArray.from_arrays(flat, dim)
        else:
            large = arrow.types.is_large_list(field.type) or len(flat) > np.iinfo(np.int32).max
            starts = np.arange(len(vectors) + 1, dtype=np.int64) * dim
            kind = arrow.LargeListArray if large else arrow.ListArray
            column = kind.from_arrays(arrow.array(starts, arrow.int64() if large else arrow.int32()), flat)
        new = arrow.field(field.name, column.type, field.nullable, field.metadata)
        table = self._table.set_column(at, new, column)
        if applied:
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), NOTE: " ".join(applied)})
        self._parquet.write_table(table, target, compression=self._codec)


def _is_list(types: Any, kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
