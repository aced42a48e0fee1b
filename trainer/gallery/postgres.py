"""Upgrade of vectors in PostgreSQL (pgvector): a new column beside the old one, filled by any number of workers,
swapped in at once.

For a table T with vector column V an upgrade adds V_new (the new vectors) and keeps its state in the table
``lce_gallery``. A worker takes a batch of rows that have no V_new yet, by ``FOR UPDATE SKIP LOCKED``, converts them
and commits: what a killed worker held is free again, no row is lost or done twice, and workers on any number of
machines share the table without a scheduler. The swap renames V to V_old and V_new to V in one transaction, in which
it also checks that no row is left; a rollback renames them back.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray
from trainer.gallery.convert import Converter

_STATE = """CREATE TABLE IF NOT EXISTS lce_gallery (
    gallery text PRIMARY KEY, version text NOT NULL, dim_in int NOT NULL, dim_out int NOT NULL, phase text NOT NULL)"""


@dataclass(frozen=True)
class TableState:
    """Where the upgrade of a table stands. phase: none, converting or swapped; left: rows without their new vector."""

    phase: str
    version: str | None
    rows: int
    left: int


class PostgresGallery:
    """A vector column of a table.

    Args:
        dsn: how to connect, for example ``postgresql://user@host/database``.
        table, column, key: names of the table, its vector column and its integer primary key.
        order: a column by which rows are taken, highest first (how often they are searched, for example); None: any
        order.

    Raises:
        DataError: no such database, table or column, or no pgvector.
    """

    def __init__(
        self, dsn: str, table: str, column: str = "embedding", key: str = "id", order: str | None = None
    ) -> None:
        try:
            import psycopg
            from pgvector.psycopg import register_vector
            from psycopg import sql
        except ImportError:
            raise DataError(
                "a PostgreSQL gallery needs psycopg and pgvector; pip install 'lce-trainer[gallery]'"
            ) from None
        self._psycopg, self._register, self._sql = psycopg, register_vector, sql
        self._dsn, self.name = dsn, f"{table}.{column}"
        names = {"t": table, "v": column, "new": f"{column}_new", "old": f"{column}_old", "k": key, "o": order or key}
        names["todo"] = f"{table}_{column}_lce_todo"
        self._names = {short: sql.Identifier(name) for short, name in names.items()}
        self._texts = names
        self._ordered = order is not None
        with self._connect() as connection:
            dim = self._column_dim(connection, column)
        if dim is None:
            raise DataError(f"{self.name}: no such vector column in the database")
        self.dim = dim

    @contextmanager
    def _connect(self) -> Iterator[Any]:
        """A connection whose loss is one clear error."""
        try:
            with self._psycopg.connect(self._dsn, autocommit=True) as connection:
                self._register(connection)
                yield connection
        except self._psycopg.OperationalError as error:
            raise DataError(
                f"{self.name}: the database cannot be reached: {_line(error)}; run again to continue"
            ) from None
        except self._psycopg.ProgrammingError as error:
            raise DataError(f"{self.name}: {_line(error)}") from None

    def _query(self, text: str) -> Any:
        return self._sql.SQL(text).format(**self._names)

    def _column_dim(self, connection: Any, column: str) -> int | None:
        row = connection.execute(
            "SELECT a.atttypmod FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "WHERE a.attrelid = to_regclass(%s) AND a.attname = %s AND t.typname = 'vector' AND NOT a.attisdropped",
            (self._texts["t"], column),
        ).fetchone()
        return None if row is None else int(row[0])

    def status(self) -> TableState:
        """Where the upgrade stands."""
        with self._connect() as connection:
            phase, version = self._state(connection)
            rows = connection.execute(self._query("SELECT count({v}) FROM {t}")).fetchone()[0]
            left = 0
            if phase == "converting":
                left = connection.execute(self._query("SELECT count({v}) FROM {t} WHERE {new} IS NULL")).fetchone()[0]
            return TableState(phase, version, rows, left)

    def _state(self, connection: Any) -> tuple[str, str | None]:
        if connection.execute("SELECT to_regclass('lce_gallery')").fetchone()[0] is None:
            return "none", None
        row = connection.execute("SELECT phase, version FROM lce_gallery WHERE gallery = %s", (self.name,)).fetchone()
        return ("none", None) if row is None else (row[0], row[1])

    def plan(self, converter: Converter, sample: int = 1000) -> dict[str, float]:
        """What an upgrade takes: rows, dimensions, bytes of the new column, seconds for one worker (from a sample)."""
        with self._connect() as connection:
            phase, _ = self._state(connection)
            old = "{old}" if phase == "swapped" else "{v}"
            text = f"SELECT {{k}}, {old} FROM {{t}} WHERE {old} IS NOT NULL LIMIT %s"
            rows = connection.execute(self._query(text), (sample,)).fetchall()
            count = connection.execute(self._query(f"SELECT count({old}) FROM {{t}}")).fetchone()[0]
        if not rows:
            raise DataError(f"{self.name}: the table holds no vector; there is nothing to upgrade")
        vectors = _unit(rows, self.name)
        if vectors.shape[1] != converter.dim_in:
            raise DataError(f"{self.name}: vectors of dimension {self.dim}, the conversion takes {converter.dim_in}")
        start = time.perf_counter()
        converter(np.array([row[0] for row in rows], np.int64), vectors)
        seconds = (time.perf_counter() - start) / len(rows) * count
        room = count * (converter.dim_out * 4 + 8)
        return {
            "rows": count,
            "dim_in": converter.dim_in,
            "dim_out": converter.dim_out,
            "bytes_needed": room,
            "seconds": seconds,
        }

    def begin(self, converter: Converter) -> None:
        """Make the new column and note what it will hold; nothing happens when that is done already.

        Raises:
            DataError: vectors of another dimension, or an upgrade to another version is under way or done.
        """
        with self._connect() as connection:
            # One worker at a time; polled, because building an index concurrently waits for who waits in a lock.
            while not connection.execute("SELECT pg_try_advisory_lock(hashtext('lce_gallery'))").fetchone()[0]:
                time.sleep(0.05)
            phase, version = self._state(connection)
            if phase != "none" and version != converter.version:
                raise DataError(f"{self.name}: an upgrade to {version} is {phase}; roll it back before another")
            if phase == "swapped":
                return
            if self.dim != converter.dim_in:
                raise DataError(
                    f"{self.name}: vectors of dimension {self.dim}, the conversion takes {converter.dim_in}"
                )
            with connection.transaction():
                connection.execute(_STATE)
                column = self._sql.SQL("ALTER TABLE {t} ADD COLUMN IF NOT EXISTS {new} vector({dim})")
                connection.execute(column.format(**self._names, dim=self._sql.Literal(converter.dim_out)))
                connection.execute(
                    "INSERT INTO lce_gallery VALUES (%s, %s, %s, %s, 'converting') ON CONFLICT DO NOTHING",
                    (self.name, converter.version, converter.dim_in, converter.dim_out),
                )
            # So that taking a batch does not walk over all the rows that are done.
            todo = "CREATE INDEX CONCURRENTLY IF NOT EXISTS {todo} ON {t} ({o}) WHERE {new} IS NULL AND {v} IS NOT NULL"
            connection.execute(self._query(todo))

    def work(
        self,
        converter: Converter,
        *,
        batch: int = 2048,
        rows_per_second: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Convert rows until none is free; returns how many this worker did. Any number of workers may do so at once.

        Args:
            rows_per_second: an upper limit of this worker's pace. progress: told the rows of each batch.
        """
        order = "ORDER BY {o} DESC" if self._ordered else "ORDER BY {o}"
        take = self._query(
            f"SELECT {{k}}, {{v}} FROM {{t}} WHERE {{new}} IS NULL AND {{v}} IS NOT NULL {order} LIMIT %s "
            "FOR UPDATE SKIP LOCKED"
        )
        put = self._query(
            "UPDATE {t} SET {new} = given.vector FROM unnest(%s::bigint[], %s::vector[]) AS given(id, vector) "
            "WHERE {t}.{k} = given.id"
        )
        done, began = 0, time.perf_counter()
        with self._connect() as connection:
            while True:
                with connection.transaction():
                    rows = connection.execute(take, (batch,)).fetchall()
                    if not rows:
                        return done
                    ids = np.array([row[0] for row in rows], np.int64)
                    new = converter(ids, _unit(rows, self.name))
                    connection.execute(put, (ids.tolist(), list(new)))
                done += len(rows)
                if progress is not None:
                    progress(len(rows))
                if rows_per_second is not None:
                    time.sleep(max(0.0, done / rows_per_second - (time.perf_counter() - began)))

    def index(self, method: str = "hnsw") -> None:
        """Build a cosine index on the new column without blocking readers or writers."""
        if method not in ("hnsw", "ivfflat"):
            raise DataError(f"index method {method}: known are hnsw and ivfflat")
        name = self._sql.Identifier(f"{self._texts['t']}_{self._texts['new']}_{method}")
        text = f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {{name}} ON {{t}} USING {method} ({{new}} vector_cosine_ops)"
        with self._connect() as connection:
            connection.execute(self._sql.SQL(text).format(**self._names, name=name))

    def swap(self) -> None:
        """Put the new column in the old one's place, in one transaction; :class:`DataError` while rows are left."""
        with self._connect() as connection:
            phase, _ = self._state(connection)
            if phase == "swapped":
                return
            if phase != "converting":
                raise DataError(f"{self.name}: nothing is converted; upgrade it first")
            with connection.transaction():
                connection.execute(self._query("LOCK TABLE {t} IN ACCESS EXCLUSIVE MODE"))
                missing = self._query("SELECT count(*) FROM {t} WHERE {new} IS NULL AND {v} IS NOT NULL")
                left = connection.execute(missing).fetchone()[0]
                if left:
                    raise DataError(f"{self.name}: {left:,} rows have no new vector yet; run the upgrade again")
                connection.execute(self._query("DROP INDEX IF EXISTS {todo}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {v} TO {old}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {new} TO {v}"))
                connection.execute("UPDATE lce_gallery SET phase = 'swapped' WHERE gallery = %s", (self.name,))

    def rollback(self) -> None:
        """Undo an upgrade, swapped or not, in one transaction; the old vectors were never touched."""
        with self._connect() as connection, connection.transaction():
            phase, _ = self._state(connection)
            if phase == "none":
                raise DataError(f"{self.name}: has no upgrade to roll back")
            if phase == "swapped":
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {v} TO {new}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {old} TO {v}"))
            connection.execute(self._query("ALTER TABLE {t} DROP COLUMN {new}"))
            connection.execute("DELETE FROM lce_gallery WHERE gallery = %s", (self.name,))

    def verify(self, converter: Converter, sample: int = 1000) -> tuple[int, float]:
        """Re-compute a random sample of converted rows: how many, and their smallest cosine to what is stored."""
        with self._connect() as connection:
            phase, version = self._state(connection)
            if phase == "none" or version != converter.version:
                raise DataError(f"{self.name}: is not upgraded to {converter.version} ({phase})")
            old, new = ("{old}", "{v}") if phase == "swapped" else ("{v}", "{new}")
            text = f"SELECT {{k}}, {old}, {new} FROM {{t}} WHERE {new} IS NOT NULL ORDER BY random() LIMIT %s"
            rows = connection.execute(self._query(text), (sample,)).fetchall()
        if not rows:
            raise DataError(f"{self.name}: no row is converted yet")
        made = converter(np.array([row[0] for row in rows], np.int64), _unit(rows, self.name))
        stored = np.stack([_array(row[2]) for row in rows])
        cosines = np.einsum("nd,nd->n", made, stored) / np.linalg.norm(stored, axis=1)
        return len(rows), float(cosines.min())

    def search(self, as_old: FloatArray | None, as_new: FloatArray, k: int) -> list[tuple[int, float]]:
        """The ``k`` nearest rows of a gallery in any phase: (key, cosine), best first.

        Args:
            as_old: the query (D1,) as it meets an old row; None once no old row is left. as_new: as it meets a new
            one (D2,).

        While rows are being converted each is compared in the space it is in: by its new vector where it has one.
        """
        with self._connect() as connection:
            phase, _ = self._state(connection)
            parts = [("{new}", as_new, ""), ("{v}", as_old, "AND {new} IS NULL")]
            if phase != "converting":
                parts = [("{v}", as_new if phase == "swapped" else as_old, "")]
            found: list[tuple[int, float]] = []
            for column, query, condition in parts:
                if query is None:
                    raise DataError(f"{self.name}: holds old rows ({phase}); give the query as it meets them too")
                text = (
                    f"SELECT {{k}}, 1 - ({column} <=> %s) AS cosine FROM {{t}} WHERE {column} IS NOT NULL {condition}"
                )
                text += f" ORDER BY {column} <=> %s LIMIT %s"
                found += connection.execute(self._query(text), (np.asarray(query), np.asarray(query), k)).fetchall()
        return sorted(((int(key), float(cosine)) for key, cosine in found), key=lambda row: -row[1])[:k]


def _array(value: Any) -> FloatArray:
    return np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value, np.float32)


def _unit(rows: list[Any], name: str) -> FloatArray:
    vectors = np.stack([_array(row[1]) for row in rows])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise DataError(f"{name}: the vector of row {rows[bad[0]][0]} is zero or not finite")
    return vectors / norms


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
