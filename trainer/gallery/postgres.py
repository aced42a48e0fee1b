"""Upgrade of vectors in PostgreSQL (pgvector): a new column beside the old one, filled by any number of workers,
swapped in at once.

For a table T with vector column V an upgrade adds V_new (the new vectors) and V_new_version (by which model each row's
is), and keeps its state in the table ``lce_gallery``. While it goes on, a trigger empties V_new of every row whose V is
changed, so that it is converted again. A worker takes a batch of rows that have no V_new yet, by ``FOR UPDATE SKIP
LOCKED``, converts them and commits: what a killed worker held is free again, no row is lost or done twice, and workers
on any number of machines share the table without a scheduler. The swap renames V to V_old and V_new to V in one
transaction, in which it also checks that no row is left; a rollback renames them back, and finishing drops V_old.
Between swap and finish the trigger empties V_old of rows whose V is changed: a rollback, which would lose the vectors
of rows without V_old, is refused while there are such.
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
from trainer.gallery.files import Check, smallest_cosine
from trainer.gallery.orders import parse_order

_STATE = """CREATE TABLE IF NOT EXISTS lce_gallery (
    gallery text PRIMARY KEY, version text NOT NULL, dim_in int NOT NULL, dim_out int NOT NULL, phase text NOT NULL)"""


_LONGEST = 63  # bytes of a name
_UNIQUE_INTEGER = """SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = to_regclass(%s) AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL
    AND a.attname = %s AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)"""
_DEPENDENT_VIEW = """SELECT r.ev_class::regclass FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
    JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
    WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%s) AND a.attname = %s LIMIT 1"""
# A changed vector makes its counterpart stale: that is emptied, so that before the swap a worker takes the row again.
_STALE = """CREATE OR REPLACE FUNCTION {stale}() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.{counterpart} := NULL; RETURN NEW; END $$"""
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
        DataError: no such database, table or column, a partitioned table, a column without a dimension and without a
            vector, a key that is no unique integer, or no pgvector.
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
        if len(column.encode()) > _LONGEST - len("_old_version"):
            raise DataError(f"{self.name}: the column's name is too long for those that are made beside it")
        self._stem = f"{bare}_{column}"
        if len(self._stem.encode()) > _LONGEST - len("_ivfflat_12345678"):  # PostgreSQL would cut what tells them apart
            mark = hashlib.sha256(self._stem.encode()).hexdigest()[:8]
            self._stem = f"{bare.encode()[:32].decode(errors='ignore')}_{mark}"
        todo = f"{self._stem}_lce_todo"
        self._names |= {"t": sql.Identifier(*schema, bare), "todo": sql.Identifier(todo)}
        self._names |= {name: sql.Identifier(*schema, todo) for name in ("old_todo", "stale")}
        self._schema = tuple(schema)
        self._texts = {
            **texts,
            "todo": todo,
            "t": ".".join('"' + part.replace('"', '""') + '"' for part in (*schema, bare)),
        }
        self._names["order"] = self._order(*parse_order(order))
        with self._connect() as connection:
            self.dim = self._column_dim(connection)
            if connection.execute(_UNIQUE_INTEGER, (self._texts["t"], key)).fetchone() is None:
                raise DataError(f"{self.name}: {key} is no unique integer column; name the key with --key")

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
        """A connection whose loss, and whatever else the database says, is one clear error."""
        try:
            with self._psycopg.connect(self._dsn, autocommit=True) as connection:
                self._register(connection)
                yield connection
        except self._psycopg.OperationalError as error:
            lost = (error.sqlstate or "08").startswith(("08", "57P"))  # classes of connections and of shutdowns
            what = "the database cannot be reached: " if lost else ""
            raise DataError(f"{self.name}: {what}{_line(error)}; run again to continue") from None
        except self._psycopg.Error as error:
            raise DataError(f"{self.name}: {_line(error)}") from None

    @contextmanager
    def _alone(self) -> Iterator[Any]:
        """A connection while which no other worker is in such a section."""
        with self._connect() as connection:
            # Polled, because building an index concurrently waits for who waits in a lock.
            while not connection.execute("SELECT pg_try_advisory_lock(hashtext('lce_gallery'))").fetchone()[0]:
                time.sleep(0.05)
            yield connection  # closing it releases the lock

    def _query(self, text: str) -> Any:
        return self._sql.SQL(text).format(**self._names)

    def _column_dim(self, connection: Any) -> int:
        row = connection.execute(
            "SELECT a.atttypmod, c.relkind FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "JOIN pg_class c ON c.oid = a.attrelid "
            "WHERE a.attrelid = to_regclass(%s) AND a.attname = %s AND t.typname = 'vector' AND NOT a.attisdropped",
            (self._texts["t"], self._texts["v"]),
        ).fetchone()
        if row is None:
            raise DataError(f"{self.name}: no such vector column in the database")
        if row[1] == "p":
            raise DataError(
                f"{self.name}: a partitioned table, whose index cannot be built while it is used; detach the "
                "partitions and upgrade each as a table of its own"
            )
        if row[0] > 0:
            return int(row[0])
        row = connection.execute(self._query("SELECT vector_dims({v}) FROM {t} WHERE {v} IS NOT NULL LIMIT 1"))
        found = row.fetchone()
        if found is None:
            raise DataError(
                f"{self.name}: the column has no dimension and holds no vector; there is nothing to upgrade"
            )
        return int(found[0])

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
            DataError: vectors of another dimension, a view of the column, or an upgrade to another version is under
                way or done.
        """
        with self._alone() as connection:
            phase, version = self._state(connection)
            if phase != "none" and version != converter.version:
                raise DataError(f"{self.name}: an upgrade to {version} is {phase}; finish it or roll it back first")
            if phase == "swapped":
                return
            if self.dim != converter.dim_in:
                raise DataError(
                    f"{self.name}: vectors of dimension {self.dim}, the conversion takes {converter.dim_in}"
                )
            view = connection.execute(_DEPENDENT_VIEW, (self._texts["t"], self._texts["v"])).fetchone()
            if view is not None:
                raise DataError(
                    f"{self.name}: the view {view[0]} would go on showing the old vectors; drop it, and make it again "
                    "after the swap"
                )
            with connection.transaction():
                connection.execute(_STATE)
                columns = self._sql.SQL(
                    "ALTER TABLE {t} ADD COLUMN IF NOT EXISTS {new} vector({dim}), ADD COLUMN IF NOT EXISTS {vnew} text"
                )
                connection.execute(columns.format(**self._names, dim=self._sql.Literal(converter.dim_out)))
                self._watch(connection, "new")
                connection.execute(
                    "INSERT INTO lce_gallery VALUES (%s, %s, %s, %s, 'converting') ON CONFLICT DO NOTHING",
                    (self.name, converter.version, converter.dim_in, converter.dim_out),
                )
            # So that taking a batch does not walk over all the rows that are done.
            todo = "ON {t} ({order}) WHERE {new} IS NULL AND {v} IS NOT NULL"
            self._build(connection, self._texts["todo"], todo)

    def _watch(self, connection: Any, counterpart: str) -> None:
        """From now on a change of V empties the named column of the row."""
        names = {**self._names, "counterpart": self._names[counterpart]}
        for text in (_STALE, _ON_CHANGE):
            connection.execute(self._sql.SQL(text).format(**names))

    def _build(self, connection: Any, name: str, what: str) -> None:
        """Make an index without blocking readers or writers, unless there is a whole one of that name.

        Building that was interrupted leaves an index that is never used: it is dropped.
        """
        state = (
            "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "WHERE i.indrelid = to_regclass(%s) AND c.relname = %s"
        )
        found = connection.execute(state, (self._texts["t"], name)).fetchone()
        if found is not None and found[0]:
            return
        if found is not None:
            left = self._sql.Identifier(*self._schema, name)
            connection.execute(self._sql.SQL("DROP INDEX CONCURRENTLY {left}").format(left=left))
        text = self._sql.SQL("CREATE INDEX CONCURRENTLY {name} " + what)
        connection.execute(text.format(**self._names, name=self._sql.Identifier(name)))

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
        with self._alone() as connection:
            phase, version = self._state(connection)
            if phase == "swapped":  # by another worker, with its index
                return
            # Without the version in it the name would be taken when the next upgrade comes.
            mark = hashlib.sha256(str(version).encode()).hexdigest()[:8]
            name = f"{self._stem}_{method}_{mark}"
            self._build(connection, name, f"ON {{t}} USING {method} ({{new}} vector_cosine_ops)")

    def swap(self) -> None:
        """Put the new column in the old one's place, in one transaction.

        Raises:
            DataError: rows are left, or building an index of the new column was interrupted.
        """
        with self._alone() as connection:
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
                if False in self._indexes(connection, "new"):
                    raise DataError(f"{self.name}: the new column's index is not whole; run the upgrade again")
                self._drop_todo(connection)
                required = self._required(connection)
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {v} TO {old}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {new} TO {v}"))
                if required:  # who enrols a face gives the new vector alone
                    change = "ALTER TABLE {t} ALTER {old} DROP NOT NULL, ALTER {v} SET NOT NULL"
                    connection.execute(self._query(change))
                self._watch(connection, "old")
                if self._required(connection, "vv") is not None:  # of the upgrade before this one
                    connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vv} TO {vold}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vnew} TO {vv}"))
                connection.execute("UPDATE lce_gallery SET phase = 'swapped' WHERE gallery = %s", (self.name,))

    def rollback(self) -> None:
        """Undo an upgrade, swapped or not, in one transaction; the old vectors were never touched.

        Raises:
            DataError: no upgrade, or rows that got their vector after the swap and have no old one.
        """
        with self._alone() as connection, connection.transaction():
            phase, _ = self._state(connection)
            if phase == "none":
                raise DataError(f"{self.name}: has no upgrade to roll back")
            required: bool | None = False
            if phase == "swapped":
                connection.execute(self._query("LOCK TABLE {t} IN ACCESS EXCLUSIVE MODE"))
                missing = self._query("SELECT count(*) FROM {t} WHERE {old} IS NULL AND {v} IS NOT NULL")
                if left := connection.execute(missing).fetchone()[0]:
                    column, kept = self._texts["v"], self._texts["old"]
                    raise DataError(
                        f"{self.name}: {left:,} rows were enrolled or changed after the swap and have no old vector, "
                        f"which a rollback would leave empty; give them one in {kept}, or remove them (WHERE {kept} IS "
                        f"NULL AND {column} IS NOT NULL)"
                    )
                required = self._required(connection)
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {v} TO {new}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {old} TO {v}"))
                connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vv} TO {vnew}"))
                if self._required(connection, "vold") is not None:
                    connection.execute(self._query("ALTER TABLE {t} RENAME COLUMN {vold} TO {vv}"))
            self._drop_todo(connection)
            connection.execute(self._query("ALTER TABLE {t} DROP COLUMN {new}, DROP COLUMN {vnew}"))
            if required:
                connection.execute(self._query("ALTER TABLE {t} ALTER {v} SET NOT NULL"))
            connection.execute("DELETE FROM lce_gallery WHERE gallery = %s", (self.name,))

    def finish(self) -> None:
        """Drop the old vectors, which a rollback would need: the upgrade is final, and the next one may begin."""
        with self._alone() as connection, connection.transaction():
            phase, _ = self._state(connection)
            if phase != "swapped":
                raise DataError(f"{self.name}: is not upgraded ({phase}); there is nothing to finish")
            self._drop_todo(connection)
            connection.execute(self._query("ALTER TABLE {t} DROP COLUMN {old}, DROP COLUMN IF EXISTS {vold}"))
            connection.execute("DELETE FROM lce_gallery WHERE gallery = %s", (self.name,))

    def _drop_todo(self, connection: Any) -> None:
        connection.execute(self._query("DROP INDEX IF EXISTS {old_todo}"))
        connection.execute(self._query("DROP TRIGGER IF EXISTS {todo} ON {t}"))
        connection.execute(self._query("DROP FUNCTION IF EXISTS {stale}"))

    def _required(self, connection: Any, short: str = "v") -> bool | None:
        """Whether a column (V) is NOT NULL; None: there is none of that name."""
        text = (
            "SELECT attnotnull FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped"
        )
        row = connection.execute(text, (self._texts["t"], self._texts[short])).fetchone()
        return None if row is None else row[0]

    def _indexes(self, connection: Any, column: str) -> list[bool]:
        """Of each index for search on a column: whether it is whole."""
        text = (
            "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "JOIN pg_am m ON m.oid = c.relam JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
            "WHERE i.indrelid = to_regclass(%s) AND a.attname = %s AND m.amname IN ('hnsw', 'ivfflat')"
        )
        return [row[0] for row in connection.execute(text, (self._texts["t"], self._texts[column]))]

    def verify(self, converter: Converter, sample: int = 1000) -> Check:
        """Re-compute a random sample of converted rows, and measure the recall of both columns' indexes."""
        with self._connect() as connection:
            phase, version = self._state(connection)
            if phase == "none" or version != converter.version:
                raise DataError(f"{self.name}: is not upgraded to {converter.version} ({phase})")
            old, new = ("{old}", "{v}") if phase == "swapped" else ("{v}", "{new}")
            text = f"SELECT {{k}}, {old}, {new} FROM {{t}} WHERE {new} IS NOT NULL AND {old} IS NOT NULL "
            text += "ORDER BY random() LIMIT %s"  # rows enrolled after the swap have nothing to be computed from
            rows = connection.execute(self._query(text), (sample,)).fetchall()
            if not rows:
                raise DataError(f"{self.name}: no row is converted yet")
            recalls = [
                self._recall(connection, column, [_array(row[at]) for row in rows[:50]])
                for at, column in ((2, new), (1, old))
            ]
        made = converter(np.array([row[0] for row in rows], np.int64), _unit(rows, self.name))
        stored = np.stack([_array(row[2]) for row in rows])
        return Check(len(rows), smallest_cosine(made, stored), recalls[0], recalls[1])

    def _recall(self, connection: Any, column: str, queries: list[FloatArray], k: int = 10) -> float | None:
        """The share of the ``k`` exact neighbours of stored vectors that the column's index finds; None without one."""
        if True not in self._indexes(connection, column.strip("{}")):
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
    found = [_array(row[1]) for row in rows]
    for row, vector in zip(rows, found, strict=True):
        if vector.shape != found[0].shape:  # a column without a dimension takes them all
            raise DataError(f"{name}: the vector of id {row[0]} has dimension {len(vector)}, others {len(found[0])}")
    vectors = usable(np.stack(found), ids, name)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
