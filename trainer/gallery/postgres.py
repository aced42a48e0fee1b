"""Upgrade of vectors in PostgreSQL (pgvector): a new column beside the old one, filled by any number of workers,
swapped in at once.

For a table T with vector column V an upgrade adds V_new (the new vectors) and V_new_version (by which model each row's
is), and keeps its state in the table ``lce_gallery``. While it goes on, a trigger empties V_new of every row whose V is
changed, so that it is converted again. A worker takes a batch of rows that have no V_new yet, by ``FOR UPDATE SKIP
LOCKED``, converts them and commits: what a killed worker held is free again, no row is lost or done twice, and workers
on any number of machines share the table without a scheduler. The swap renames V to V_old and V_new to V in one
transaction, in which it also checks that no row is left; a rollback renames them back, and finishing drops V_old.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray
from trainer.gallery.convert import Converter, usable
from trainer.gallery.files import Check
from trainer.gallery.orders import parse_order

_STATE = """CREATE TABLE IF NOT EXISTS lce_gallery (
    gallery text PRIMARY KEY, version text NOT NULL, dim_in int NOT NULL, dim_out int NOT NULL, phase text NOT NULL)"""


_UNIQUE_INTEGER = """SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = to_regclass(%s) AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL
    AND a.attname = %s AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)"""
# A changed old vector makes its new one stale: it is emptied, so that a worker takes the row again.
_STALE = """CREATE OR REPLACE FUNCTION {stale}() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.{new} := NULL; RETURN NEW; END $$"""
_ON_CHANGE = """CREATE OR REPLACE TRIGGER {todo} BEFORE UPDATE OF {v} ON {t} FOR EACH ROW
    WHEN (NEW.{v} IS DISTINCT FROM OLD.{v}) EXECUTE FUNCTION {stale}()"""


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
        table, column, key: names of the table (``schema.table`` where it is needed), its vector column and its integer
        key, which must be unique.
        order: which rows are taken first, see :mod:`trainer.gallery.orders`: stored (by key), random, highest:COLUMN or
        lowest:COLUMN (rows without a value last).

    Raises:
        DataError: no such database, table or column, a key that is no unique integer, or no pgvector.
    """

    def __init__(self, dsn: str, table: str, column: str = "embedding", key: str = "id", order: str = "stored") -> None:
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
        *schema, bare = table.split(".")
        versions = {"vv": f"{column}_version", "vnew": f"{column}_new_version", "vold": f"{column}_old_version"}
        texts = {"v": column, "new": f"{column}_new", "old": f"{column}_old", "k": key, **versions}
        self._names = {short: sql.Identifier(name) for short, name in texts.items()}
        todo = f"{bare}_{column}_lce_todo"
        self._names |= {"t": sql.Identifier(*schema, bare), "todo": sql.Identifier(todo)}
        self._names |= {name: sql.Identifier(*schema, todo) for name in ("old_todo", "stale")}
        self._texts = {
            **texts,
            "t": ".".join('"' + part.replace('"', '""') + '"' for part in (*schema, bare)),
            "b": bare,
        }
        self._names["order"] = self._order(*parse_order(order))
        with self._connect() as connection:
            dim = self._column_dim(connection, column)
            if dim is None:
                raise DataError(f"{self.name}: no such vector column in the database")
            if connection.execute(_UNIQUE_INTEGER, (self._texts["t"], key)).fetchone() is None:
                raise DataError(f"{self.name}: {key} is no unique integer column; name the key with --key")
        self.dim = dim

    def _order(self, kind: str, column: str) -> Any:
        """What rows are sorted by; an index over it makes taking a batch cheap."""
        if kind == "confidence":
            raise DataError(
                f"{self.name}: in a database the order is lowest:COLUMN, by a column that holds confidences"
            )
        if kind == "random":
            return self._sql.SQL("(hashint8({k}::bigint))").format(**self._names)  # the same at every worker
        direction = self._sql.SQL(" DESC NULLS LAST" if kind == "highest" else "")
        return self._sql.Identifier(column or self._texts["k"]) + direction

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
        ids = np.array([row[0] for row in rows], np.int64)
        converter(ids[:1], vectors[:1])  # the first call takes longer than its share
        start = time.perf_counter()
        converter(ids, vectors)
        seconds = (time.perf_counter() - start) / len(rows) * count
        room = count * (converter.dim_out * 4 + 8 + len(converter.version))
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
                raise DataError(f"{self.name}: an upgrade to {version} is {phase}; finish it or roll it back first")
            if phase == "swapped":
                return
            if self.dim != converter.dim_in:
                raise DataError(
                    f"{self.name}: vectors of dimension {self.dim}, the conversion takes {converter.dim_in}"
                )
            with connection.transaction():
                connection.execute(_STATE)
                columns = self._sql.SQL(
                    "ALTER TABLE {t} ADD COLUMN IF NOT EXISTS {new} vector({dim}), ADD COLUMN IF NOT EXISTS {vnew} text"
                )
                connection.execute(columns.format(**self._names, dim=self._sql.Literal(converter.dim_out)))
                connection.execute(self._query(_STALE))
                connection.execute(self._query(_ON_CHANGE))
                connection.execute(
                    "INSERT INTO lce_gallery VALUES (%s, %s, %s, %s, 'converting') ON CONFLICT DO NOTHING",
                    (self.name, converter.version, converter.dim_in, converter.dim_out),
                )
            # So that taking a batch does not walk over all the rows that are done.
            todo = "CREATE INDEX CONCURRENTLY IF NOT EXISTS {todo} ON {t} ({order}) "
            connection.execute(self._query(todo + "WHERE {new} IS NULL AND {v} IS NOT NULL"))

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
        take = self._query(
            "SELECT {k}, {v} FROM {t} WHERE {new} IS NULL AND {v} IS NOT NULL ORDER BY {order} LIMIT %s "
            "FOR UPDATE SKIP LOCKED"
        )
        put = self._query(
            "UPDATE {t} SET {new} = given.vector, {vnew} = %s "
            "FROM unnest(%s::bigint[], %s::vector[]) AS given(id, vector) WHERE {t}.{k} = given.id"
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
                    connection.execute(put, (converter.version, ids.tolist(), list(new)))
                done += len(rows)
                if progress is not None:
                    progress(len(rows))
                if rows_per_second is not None:
                    time.sleep(max(0.0, done / rows_per_second - (time.perf_counter() - began)))

    def index(self, method: str = "hnsw") -> None:
        """Build a cosine index on the new column without blocking readers or writers."""
        if method not in ("hnsw", "ivfflat"):
            raise DataError(f"index method {method}: known are hnsw and ivfflat")
        text = f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {{name}} ON {{t}} USING {method} ({{new}} vector_cosine_ops)"
        with self._connect() as connection:
            # Without the version in it the name would be taken when the next upgrade comes.
            version = hashlib.sha256(str(self._state(connection)[1]).encode()).hexdigest()[:8]
            name = self._sql.Identifier(f"{self._texts['b']}_{self._texts['v']}_{method}_{version}")
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
                self._drop_todo(connection)
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {v} TO {old}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {new} TO {v}"))
                if self._exists(connection, "vv"):  # of the upgrade before this one
                    connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vv} TO {vold}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vnew} TO {vv}"))
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
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vv} TO {vnew}"))
                if self._exists(connection, "vold"):
                    connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vold} TO {vv}"))
            self._drop_todo(connection)
            connection.execute(self._query("ALTER TABLE {t} DROP COLUMN {new}, DROP COLUMN {vnew}"))
            connection.execute("DELETE FROM lce_gallery WHERE gallery = %s", (self.name,))

    def finish(self) -> None:
        """Drop the old vectors, which a rollback would need: the upgrade is final, and the next one may begin."""
        with self._connect() as connection, connection.transaction():
            phase, _ = self._state(connection)
            if phase != "swapped":
                raise DataError(f"{self.name}: is not upgraded ({phase}); there is nothing to finish")
            connection.execute(self._query("ALTER TABLE {t} DROP COLUMN {old}, DROP COLUMN IF EXISTS {vold}"))
            connection.execute("DELETE FROM lce_gallery WHERE gallery = %s", (self.name,))

    def _drop_todo(self, connection: Any) -> None:
        connection.execute(self._query("DROP INDEX IF EXISTS {old_todo}"))
        connection.execute(self._query("DROP TRIGGER IF EXISTS {todo} ON {t}"))
        connection.execute(self._query("DROP FUNCTION IF EXISTS {stale}"))

    def _exists(self, connection: Any, short: str) -> bool:
        text = "SELECT 1 FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped"
        return connection.execute(text, (self._texts["t"], self._texts[short])).fetchone() is not None

    def verify(self, converter: Converter, sample: int = 1000) -> Check:
        """Re-compute a random sample of converted rows, and measure the recall of both columns' indexes."""
        with self._connect() as connection:
            phase, version = self._state(connection)
            if phase == "none" or version != converter.version:
                raise DataError(f"{self.name}: is not upgraded to {converter.version} ({phase})")
            old, new = ("{old}", "{v}") if phase == "swapped" else ("{v}", "{new}")
            text = f"SELECT {{k}}, {old}, {new} FROM {{t}} WHERE {new} IS NOT NULL ORDER BY random() LIMIT %s"
            rows = connection.execute(self._query(text), (sample,)).fetchall()
            if not rows:
                raise DataError(f"{self.name}: no row is converted yet")
            recalls = [
                self._recall(connection, column, [_array(row[at]) for row in rows[:50]])
                for at, column in ((2, new), (1, old))
            ]
        made = converter(np.array([row[0] for row in rows], np.int64), _unit(rows, self.name))
        stored = np.stack([_array(row[2]) for row in rows])
        cosines = np.einsum("nd,nd->n", made, stored) / np.linalg.norm(stored, axis=1)
        return Check(len(rows), float(cosines.min()), *recalls)

    def _recall(self, connection: Any, column: str, queries: list[FloatArray], k: int = 10) -> float | None:
        """The share of the ``k`` exact neighbours of stored vectors that the column's index finds; None without one."""
        text = (
            "SELECT 1 FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam "
            "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
            "WHERE i.indrelid = to_regclass(%s) AND a.attname = %s AND m.amname IN ('hnsw', 'ivfflat')"
        )
        if connection.execute(text, (self._texts["t"], self._texts[column.strip("{}")])).fetchone() is None:
            return None
        ask = self._query(f"SELECT {{k}} FROM {{t}} WHERE {column} IS NOT NULL ORDER BY {column} <=> %s LIMIT %s")
        found: list[list[set[int]]] = []
        for avoided in ("enable_indexscan", "enable_seqscan"):
            with connection.transaction():
                connection.execute(f"SET LOCAL {avoided} = off")
                answers = [connection.execute(ask, (query, k)).fetchall() for query in queries]
            found.append([{row[0] for row in answer} for answer in answers])
        return float(np.mean([len(exact & index) / len(exact) for exact, index in zip(*found, strict=True)]))

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
    ids = np.array([row[0] for row in rows], np.int64)
    vectors = usable(np.stack([_array(row[1]) for row in rows]), ids, name)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
