"""Upgrade of vectors in PostgreSQL (pgvector): a new column next to the old one, filled by any number of workers,
swapped in at once.

For a table T with vector column V an upgrade adds V_new (the new vectors) and V_new_version (by which model each row's
is), and keeps its state in the table ``lce_gallery`` of T's schema, by T's own number. While it goes on, a trigger
empties V_new of every row whose V is changed, so that it is converted again. A worker takes a batch of rows that have
no V_new yet, by ``FOR UPDATE SKIP LOCKED``, converts them and commits: what a killed worker held is free again, no row
is lost or done twice, and workers on any number of machines share the table without a scheduler. Every index over V is
made over V_new by its own definition; then the swap, in one transaction that holds the table, converts the rows that
came meanwhile and renames V to V_old and V_new to V; a rollback renames them back, and finishing drops V_old. Between
swap and finish the trigger empties V_old of rows whose V is changed: a rollback, which would lose the vectors of rows
without V_old, is refused while there are such.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.gallery.convert import Converter, check_direction, usable
from trainer.gallery.files import Check, smallest_cosine
from trainer.gallery.orders import parse_order
from trainer.gallery.postgres_table import TODO, Index, Table, quoted, shortened

_STATE = """CREATE TABLE IF NOT EXISTS {state} (relation regclass, attribute text, version text NOT NULL,
    dim_in int NOT NULL, dim_out int NOT NULL, phase text NOT NULL, applied text[] NOT NULL DEFAULT '{{}}',
    indexes jsonb NOT NULL DEFAULT '{{}}', PRIMARY KEY (relation, attribute))"""
# When a vector changes, its counterpart is set to NULL; before the swap a worker then converts the row again.
# One function serves all tables of the schema, and no name is in its body.
_STALE = """CREATE OR REPLACE FUNCTION {stale}() RETURNS trigger LANGUAGE plpgsql AS $lce$
    BEGIN RETURN jsonb_populate_record(NEW, jsonb_build_object(TG_ARGV[0], NULL)); END $lce$"""
# Triggers of an event fire in the order of their names: "~" comes behind the letters, so that this one sees what those
# of the application made of the row, whichever column was updated.
_ON_CHANGE = """CREATE OR REPLACE TRIGGER {todo} BEFORE UPDATE ON {t} FOR EACH ROW
    WHEN (NEW.{v} IS DISTINCT FROM OLD.{v}) EXECUTE FUNCTION {stale}({counterpart})"""
_LATER_TRIGGER = """SELECT tgname FROM pg_trigger WHERE tgrelid = %s AND NOT tgisinternal AND (tgtype & 19) = 19
    AND tgname NOT LIKE '~lce%%' AND tgname::text COLLATE "C" > %s COLLATE "C" """
_LOCK_SECONDS = 2  # that readers and writers wait behind a swap which does not get the table
_PATIENCE_SECONDS = 60
_STUCK = 3  # batches in which a trigger of the application undid every conversion


class UnfinishedError(DataError):
    """Work that another call goes on with: the table is held by somebody, or changes faster than it is converted."""


@dataclass(frozen=True)
class TableState:
    """Where the upgrade of a table stands. phase: none, converting, swapped or finished; left: rows without their new
    vector."""

    phase: str
    version: str | None
    rows: int
    left: int


@dataclass(frozen=True)
class Search:
    """How PostgreSQL answers the kind of query that an index of the old column is for, before and after: by an index or
    by a sequential scan. index: the method, the operator and the condition."""

    index: str
    before: str
    after: str


@dataclass(frozen=True)
class TableCheck(Check):
    """A verified sample of a table; searches: see :class:`Search`."""

    searches: tuple[Search, ...] = ()


@dataclass(frozen=True)
class _State:
    phase: str = "none"
    version: str | None = None
    dim_out: int = 0
    applied: tuple[str, ...] = ()
    indexes: tuple[tuple[str, str], ...] = ()  # moved at the swap: the name, and the old one's

    @property
    def through(self) -> tuple[str, ...]:
        done = self.version is not None and self.phase in ("swapped", "finished")
        return (*self.applied, str(self.version)) if done else self.applied


class PostgresGallery:
    """A vector column of a table.

    Args:
        dsn: how to connect, for example ``postgresql://user@host/database``.
        table, column: names of the table (``schema.table`` where needed) and its column of type vector or halfvec.
        key: the column, or several with commas between, of any type, that names a row; by default the primary key.
        order: which rows are taken first, see :mod:`trainer.gallery.orders`: stored (by key), random, highest:COLUMN or
            lowest:COLUMN (rows without a value last).

    Raises:
        DataError: no such database, table or column, a partitioned table, a column without a dimension and without a
            vector, no such key, or no pgvector.
    """

    def __init__(
        self, dsn: str, table: str, column: str = "embedding", key: str | None = None, order: str = "stored"
    ) -> None:
        self._table = Table(dsn, table, column, key)
        self._run, self._connect, self._names = self._table.run, self._table.connect, self._table.names
        self.name, self.dim = self._table.name, self._table.dim
        self._stem = f"{self._table.table}_{column}"
        mark = hashlib.sha256(column.encode()).hexdigest()[:8]  # of the column alone: a table may get another name
        self._todo_end = f"_{mark}{TODO}"
        self._trigger = f"~lce_{mark}"
        schema = self._table.schema
        self._names |= {
            "state": quoted(schema, "lce_gallery"),
            "stale": quoted(schema, "lce_gallery_stale"),
            "todo": quoted(self._trigger),
        }
        self._names["order"] = self._order(*parse_order(order))

    def _order(self, kind: str, column: str) -> str:
        """What rows are sorted by; an index over it makes taking a batch cheap."""
        if kind in ("confidence", "distance"):
            by = "lowest" if kind == "confidence" else "highest"
            raise DataError(f"{self.name}: in a database the order is {by}:COLUMN, by a column that holds {kind}s")
        if kind in ("highest", "lowest"):
            return quoted(column) + (" DESC NULLS LAST" if kind == "highest" else "")
        if not self._table.key:
            if kind == "random":
                raise DataError(f"{self.name}: a random order needs a key; name one with `key`")
            return "({v} IS NULL)".format_map(self._names)  # the same of all rows that are taken: as they lie there
        # The same at every worker.
        return "(hash_record(ROW({k})))".format_map(self._names) if kind == "random" else self._names["k"]

    @contextmanager
    def _alone(self) -> Iterator[Any]:
        """A connection while which no other worker is in such a section."""
        with self._connect() as connection:
            # Polled, because building an index concurrently waits for who waits in a lock.
            while not connection.execute("SELECT pg_try_advisory_lock(hashtext('lce_gallery'))").fetchone()[0]:
                time.sleep(0.05)
            yield connection  # closing it releases the lock

    def status(self) -> TableState:
        """Where the upgrade stands."""
        with self._connect() as connection:
            state = self._state(connection)
            rows = self._run(connection, "SELECT count({v}) FROM {t}").fetchone()[0]
            left = self._left(connection) if state.phase == "converting" else 0
            return TableState(state.phase, state.version, rows, left)

    def _left(self, connection: Any) -> int:
        text = "SELECT count(*) FROM {t} WHERE {new} IS NULL AND {v} IS NOT NULL"
        return int(self._run(connection, text).fetchone()[0])

    def _state(self, connection: Any) -> _State:
        columns = connection.execute(
            "SELECT array_agg(attname::text) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0",
            (self._names["state"],),
        ).fetchone()[0]
        if columns is None:
            return _State()
        if "relation" not in columns:
            raise DataError(
                f"{self.name}: {self._names['state']} made by an earlier version; finish or roll back there, drop it"
            )
        text = (
            "SELECT phase, version, dim_out, applied, indexes FROM {state} WHERE relation = %s::oid AND attribute = %s"
        )
        row = self._run(connection, text, self._table.oid, self._table.texts["v"]).fetchone()
        if row is None:
            return _State()
        return _State(row[0], row[1], row[2], tuple(row[3]), tuple(sorted(row[4].items())))

    def _set(self, connection: Any, change: str, *values: Any) -> None:
        """Change this gallery's row of the state."""
        where = "WHERE relation = %s::oid AND attribute = %s"
        self._run(connection, f"{change} {where}", *values, self._table.oid, self._table.texts["v"])

    def _rows(self, rows: list[Any]) -> tuple[IntArray, FloatArray]:
        """Ids and unit vectors of rows (anything, vector, key …); where the key is no number, ids are its texts."""
        keys: list[Any] = [row[2] if len(row) == 3 else ", ".join(map(str, row[2:])) for row in rows]
        ids = np.array(keys, np.int64 if self._table.numbered else object)
        found = [_array(row[1]) for row in rows]
        for key, vector in zip(ids, found, strict=True):
            if vector.shape != found[0].shape:  # a column without a dimension takes them all
                raise DataError(
                    f"{self.name}: the vector of id {key} has dimension {len(vector)}, others {len(found[0])}"
                )
        vectors = usable(np.stack(found), ids, self.name)
        return ids, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def plan(self, converter: Converter, sample: int = 1000) -> dict[str, Any]:
        """What an upgrade takes: rows, dimensions, bytes of the new column, seconds for one worker (from a sample), and
        what cannot be carried to the new column."""
        with self._connect() as connection:
            state = self._state(connection)
            old = "{old}" if state.phase == "swapped" else "{v}"
            text = f"SELECT ctid, {old}, {{k}} FROM {{t}} WHERE {old} IS NOT NULL LIMIT %s"
            rows = self._run(connection, text, sample).fetchall()
            count = self._run(connection, f"SELECT count({old}) FROM {{t}}").fetchone()[0]
            not_kept: list[str] = []
            if state.phase in ("none", "finished"):
                not_kept = self._check_new(connection, state, converter)
        if not rows:
            raise DataError(f"{self.name}: the table holds no vector; there is nothing to upgrade")
        ids, vectors = self._rows(rows)
        if vectors.shape[1] != converter.dim_in:
            raise DataError(f"{self.name}: vectors of dimension {self.dim}, the conversion takes {converter.dim_in}")
        converter(ids[:1], vectors[:1])  # the first call takes longer than its share
        start = time.perf_counter()
        converter(ids, vectors)
        seconds = (time.perf_counter() - start) / len(rows) * count
        size = 2 if self._table.type == "halfvec" else 4
        return {
            "rows": count,
            "dim_in": converter.dim_in,
            "dim_out": converter.dim_out,
            "bytes_needed": count * (converter.dim_out * size + 8 + len(converter.version)),
            "seconds": seconds,
            "not_kept": not_kept,
        }

    def _check_new(self, connection: Any, state: _State, converter: Converter, indexes: bool = True) -> list[str]:
        """Whether an upgrade may begin; returns what stays with the old column.

        Raises:
            DataError: it was done already, or something forbids it.
        """
        forget = f"DELETE FROM {self._names['state']} WHERE relation = {self._table.oid}"
        check_direction(self.name, state.through, converter, forget)
        if self._table.column(connection, "vv") is not None and not converter.by_id:
            text = "SELECT count(*) FROM {t} WHERE {vv} = %s"
            if done := self._run(connection, text, converter.version).fetchone()[0]:
                raise DataError(
                    f"{self.name}: {done:,} rows were converted to {converter.version} already, as their "
                    f"{self._table.texts['vv']} says; converting them again would spoil them"
                )
        if converter.by_id and not self._table.numbered:
            raise DataError(
                f"{self.name}: with images a row's key is the number of its picture; name a unique integer column "
                "with `key`"
            )
        refused, left = self._table.dependents(connection)
        if refused:
            raise DataError(f"{self.name}: {refused[0]}")
        if found := connection.execute(_LATER_TRIGGER, (self._table.oid, self._trigger)).fetchone():
            raise DataError(
                f"{self.name}: the trigger {found[0]} fires after the upgrade's own, which would not see what it "
                "changes; rename it"
            )
        if self.dim == converter.dim_in and indexes:
            self._table.copies(connection, converter.dim_out)
        return left

    def begin(self, converter: Converter, indexes: bool = True) -> list[str]:
        """Make the new column and note what it will hold; nothing happens when that is done already.

        Args:
            indexes: those of the old column are to be copied, which is tried first on an empty table.

        Returns:
            What stays with the old column, a sentence each.

        Raises:
            DataError: vectors of another dimension, a view or another thing that hangs on the column, an upgrade to
                another version is under way or done, or this one was finished before.
        """
        with self._alone() as connection:
            state = self._state(connection)
            if state.phase in ("converting", "swapped") and state.version != converter.version:
                raise DataError(
                    f"{self.name}: an upgrade to {state.version} is {state.phase}; finish it or roll it back first"
                )
            left: list[str] = []
            if state.phase == "swapped":
                return left
            if state.phase != "converting":
                left = self._check_new(connection, state, converter, indexes)
                if self.dim != converter.dim_in:
                    raise DataError(
                        f"{self.name}: vectors of dimension {self.dim}, the conversion takes {converter.dim_in}"
                    )
                self._prepare(connection, state, converter)
            # So that taking a batch does not walk over all the rows that are done.
            self._build(
                connection, shortened(self._stem, self._todo_end), " ({order}) WHERE {new} IS NULL AND {v} IS NOT NULL"
            )
            return left

    def _prepare(self, connection: Any, state: _State, converter: Converter) -> None:
        with connection.transaction():
            connection.execute("SET LOCAL client_min_messages = error")
            connection.execute(
                f"SET LOCAL lock_timeout = '{_PATIENCE_SECONDS}s'"
            )  # or everybody waits behind this call
            self._run(connection, _STATE)
            columns = "ALTER TABLE {t} ADD COLUMN {new} {type}(%d), ADD COLUMN {vnew} text" % converter.dim_out  # noqa: UP031
            self._run(connection, columns)
            self._table.carry(connection)
            self._watch(connection, "new")
            self._run(connection, "DELETE FROM {state} WHERE relation::oid NOT IN (SELECT oid FROM pg_class)")
            self._set(connection, "DELETE FROM {state}")
            self._run(
                connection,
                "INSERT INTO {state} VALUES (%s::oid, %s, %s, %s, %s, 'converting', %s)",
                self._table.oid,
                self._table.texts["v"],
                converter.version,
                converter.dim_in,
                converter.dim_out,
                list(state.through),
            )

    def _watch(self, connection: Any, counterpart: str) -> None:
        """From now on a change of V empties the named column of the row."""
        self._run(connection, _STALE)
        text = self._table.psycopg.sql.Literal(self._table.texts[counterpart]).as_string(connection)
        self._run(connection, _ON_CHANGE, counterpart=text)

    def _build(self, connection: Any, name: str, behind: str, /, **names: str) -> None:
        """Make an index without blocking readers or writers, unless there is a whole one of that name.

        Building that was interrupted leaves an index that is never used: it is dropped.
        """
        state = (
            "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "WHERE i.indrelid = %s AND c.relname = %s"
        )
        found = connection.execute(state, (self._table.oid, name)).fetchone()
        if found is not None and found[0]:
            return
        if found is not None:
            left = quoted(self._table.schema, name)
            self._run(connection, "DROP INDEX CONCURRENTLY {left}", left=left)
        text = "CREATE INDEX CONCURRENTLY {made} ON {t}" + behind
        self._run(connection, text, made=quoted(name), **names)

    def work(
        self,
        converter: Converter,
        *,
        batch: int = 2048,
        rows_per_second: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Convert rows until fewer than a batch are free; returns how many this worker did. Any number of workers may
        do so at once.

        Args:
            rows_per_second: an upper limit of this worker's pace. progress: given the rows of each batch.

        Raises:
            DataError: a vector that cannot be used, or a trigger of the application that changes it at every update.
            UnfinishedError: rows come faster than they are converted.
        """
        done, stuck, began = 0, 0, time.perf_counter()
        with self._connect() as connection:
            left = due = -1
            while True:
                with connection.transaction():
                    # While it is held nobody swaps the columns.
                    self._run(connection, "LOCK TABLE {t} IN ROW EXCLUSIVE MODE")
                    if self._state(connection).phase != "converting":
                        return done
                    if due < 0:
                        left = due = self._left(connection)
                    taken, kept = self._batch(connection, converter, batch)
                if not taken:
                    return done
                done += kept
                stuck = 0 if kept else stuck + 1
                self._check_stuck(stuck)
                if progress is not None:
                    progress(kept)
                if kept and taken < batch:  # what comes meanwhile must not keep it for ever
                    return done
                if done >= due + batch:  # all that was there at the last count, and more came meanwhile
                    before, left = left, self._left(connection)
                    if left >= before:
                        raise UnfinishedError(
                            f"{self.name}: rows come faster than they are converted ({left:,} are left, {before:,} "
                            "were); run more workers (start the same command again, also elsewhere) or write less"
                        )
                    due = done + left
                if rows_per_second is not None:
                    time.sleep(max(0.0, done / rows_per_second - (time.perf_counter() - began)))

    def _batch(self, connection: Any, converter: Converter, size: int) -> tuple[int, int]:
        """Convert some rows; how many were taken, and how many are done (a trigger may have changed others)."""
        rows = self._run(
            connection,
            "SELECT ctid, {v}, {k} FROM {t} WHERE {new} IS NULL AND {v} IS NOT NULL ORDER BY {order} LIMIT %s "
            "FOR UPDATE SKIP LOCKED",
            size,
        ).fetchall()
        if not rows:
            return 0, 0
        new = converter(*self._rows(rows))
        # A locked row stays where it is, so that its address names it, whatever its key is.
        put = self._run(
            connection,
            "UPDATE {t} SET {new} = given.vector::{type}, {vnew} = %s "
            "FROM unnest(%s::text[]::tid[], %s::vector[]) AS given(address, vector) WHERE {t}.ctid = given.address "
            "RETURNING {t}.{new} IS NOT NULL",
            converter.version,
            [row[0] for row in rows],
            list(new),
        )
        return len(rows), sum(row[0] for row in put.fetchall())

    def _check_stuck(self, stuck: int) -> None:
        if stuck >= _STUCK:
            raise DataError(
                f"{self.name}: a trigger of the table changes the vector at every update, so that no conversion lasts; "
                "disable it for the time of the upgrade"
            )

    def index(self, method: str = "same") -> None:
        """Build the indexes of the new column without blocking readers or writers.

        Args:
            method: ``same``: every index over the old column by its own definition, for the new dimension; ``hnsw`` or
                ``ivfflat``: one of that kind by cosine instead.
        """
        if method not in ("same", "hnsw", "ivfflat"):
            raise DataError(f"index method {method}: known are same, hnsw and ivfflat")
        with self._alone() as connection:
            state = self._state(connection)
            if state.phase != "converting":  # swapped by another worker, with its indexes
                return
            if method == "same":
                for name, behind in self._table.copies(connection, state.dim_out).items():
                    self._build(connection, self._copy_name(name, state), "{behind}", behind=behind)
            else:
                name = self._copy_name(f"{self._stem}_{method}", state)
                self._build(connection, name, f" USING {method} ({{new}} {self._table.type}_cosine_ops)")
            self._run(connection, "ANALYZE {t} ({new})")  # or the planner would guess after the swap

    @staticmethod
    def _copy_name(name: str, state: _State) -> str:
        """Of an index over the new column. With the version in it, for the next upgrade comes too."""
        return shortened(name, f"_{hashlib.sha256(f'{state.version} {name}'.encode()).hexdigest()[:8]}")

    def swap(
        self, converter: Converter | None = None, most: int = 0, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        """Put the new column in the old one's place, in one transaction.

        Args:
            converter: converts what has come meanwhile, while the table is held. most: so many rows at most.
            patience_seconds: how long to try to get hold of the table.

        Raises:
            UnfinishedError: more rows are left, or others hold the table.
            DataError: nothing is converted, or building an index of the new column was interrupted.
        """
        end = time.monotonic() + patience_seconds
        with self._alone() as connection:
            state = self._state(connection)
            if state.phase == "swapped":
                return
            if state.phase != "converting":
                raise DataError(f"{self.name}: nothing is converted; upgrade it first")
            while True:
                try:
                    with connection.transaction():
                        connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
                        self._run(connection, "LOCK TABLE {t} IN ACCESS EXCLUSIVE MODE")
                        connection.execute("SET LOCAL lock_timeout = 0")
                        self._rest(connection, converter, most)
                        self._exchange(connection, state)
                    return
                except self._table.psycopg.errors.LockNotAvailable:
                    if time.monotonic() > end:
                        raise UnfinishedError(
                            f"{self.name}: not swapped, because {self._holders(connection)} held the table for "
                            f"{patience_seconds:.0f} s; run the upgrade again when that is done"
                        ) from None
                    time.sleep(1)

    def _holders(self, connection: Any) -> str:
        found = connection.execute(
            "SELECT string_agg(format('process %%s (%%s)', a.pid, left(a.query, 60)), ', ') FROM pg_stat_activity a "
            "WHERE a.pid IN (SELECT pid FROM pg_locks WHERE relation = %s AND granted) AND a.pid <> pg_backend_pid()",
            (self._table.oid,),
        ).fetchone()[0]
        return found or "others"

    def _rest(self, connection: Any, converter: Converter | None, most: int) -> None:
        """Convert what came while the others were converted; the table is held."""
        left, stuck = self._left(connection), 0
        if left > (0 if converter is None else most):
            raise UnfinishedError(f"{self.name}: {left:,} rows have no new vector yet; run the upgrade again")
        while converter is not None and left:
            _, kept = self._batch(connection, converter, most)
            stuck, left = 0 if kept else stuck + 1, self._left(connection)
            self._check_stuck(stuck)

    def _exchange(self, connection: Any, state: _State) -> None:
        """The renames; the table is held."""
        run, table = self._run, self._table
        if not all(index.whole for index in table.indexes(connection, "new")):
            raise DataError(f"{self.name}: the new column's index is not whole; run the upgrade again")
        self._drop_todo(connection)
        old, new = table.column(connection, "v"), table.column(connection, "new")
        assert old is not None
        assert new is not None
        moved = self._move_indexes(connection, state)
        run(connection, "ALTER TABLE {t} RENAME COLUMN {v} TO {old}")
        run(connection, "ALTER TABLE {t} RENAME COLUMN {new} TO {v}")
        if old.required:  # who enrols a face gives the new vector alone
            run(connection, "ALTER TABLE {t} ALTER {old} DROP NOT NULL, ALTER {v} SET NOT NULL")
        table.publish(connection, old.number, new.number)
        self._watch(connection, "old")
        if table.column(connection, "vv") is not None:  # of the upgrade before this one
            run(connection, "ALTER TABLE {t} RENAME COLUMN {vv} TO {vold}")
        run(connection, "ALTER TABLE {t} RENAME COLUMN {vnew} TO {vv}")
        self._set(connection, "UPDATE {state} SET phase = 'swapped', indexes = %s::jsonb", json.dumps(moved))

    def _move_indexes(self, connection: Any, state: _State) -> dict[str, str]:
        """Give the copies of indexes the names of the old ones; returns what these are called now."""
        made = {index.name for index in self._table.indexes(connection, "new")}
        moved: dict[str, str] = {}
        for index in self._table.indexes(connection, "v"):
            copy = self._copy_name(index.name, state)
            if copy in made:
                moved[index.name] = shortened(index.name, f"_old{copy[-9:]}")
                self._rename_index(connection, index.name, moved[index.name])
                self._rename_index(connection, copy, index.name)
        return moved

    def _rename_index(self, connection: Any, name: str, to: str) -> None:
        names = {"index": quoted(self._table.schema, name), "to": quoted(to)}
        self._run(connection, "ALTER INDEX IF EXISTS {index} RENAME TO {to}", **names)

    def complete(
        self,
        converter: Converter,
        *,
        index: str = "same",
        batch: int = 2048,
        rows_per_second: float | None = None,
        progress: Callable[[int], None] | None = None,
        rounds: int = 10,
    ) -> None:
        """Build the indexes (``none``: none), convert what came meanwhile, and swap: also while rows keep coming.

        Raises:
            UnfinishedError: rows came faster than they were converted, or others hold the table.
        """
        if index != "none":
            self.index(index)
        for at in range(rounds):
            self.work(converter, batch=batch, rows_per_second=rows_per_second, progress=progress)
            try:
                return self.swap(converter, batch)
            except UnfinishedError:
                if at + 1 == rounds or self.status().left <= batch:
                    raise
        return None

    def rollback(self) -> None:
        """Undo an upgrade, swapped or not, in one transaction; the old vectors were never touched.

        Raises:
            DataError: no upgrade, or rows that got their vector after the swap and have no old one.
        """
        run, table = self._run, self._table
        with self._alone() as connection, connection.transaction():
            connection.execute("SET LOCAL client_min_messages = error")
            state = self._state(connection)
            if state.phase in ("none", "finished"):
                raise DataError(f"{self.name}: has no upgrade to roll back")
            required = False
            if state.phase == "swapped":
                run(connection, "LOCK TABLE {t} IN ACCESS EXCLUSIVE MODE")
                self._check_old(connection)
                new, old = table.column(connection, "v"), table.column(connection, "old")
                if new is None or old is None:
                    raise DataError(f"{self.name}: the column {table.texts['old']} is gone; there is no way back")
                required = new.required
                run(connection, "ALTER TABLE {t} RENAME COLUMN {v} TO {new}")
                run(connection, "ALTER TABLE {t} RENAME COLUMN {old} TO {v}")
                run(connection, "ALTER TABLE {t} RENAME COLUMN {vv} TO {vnew}")
                table.publish(connection, new.number, old.number)
                if table.column(connection, "vold") is not None:
                    run(connection, "ALTER TABLE {t} RENAME COLUMN {vold} TO {vv}")
            self._drop_todo(connection)
            run(connection, "ALTER TABLE {t} DROP COLUMN {new}, DROP COLUMN {vnew}")
            for name, moved in state.indexes:
                self._rename_index(connection, moved, name)
            if required:
                run(connection, "ALTER TABLE {t} ALTER {v} SET NOT NULL")
            if state.applied:
                change = "UPDATE {state} SET phase = 'finished', version = %s, applied = %s, indexes = '{{}}'"
                self._set(connection, change, state.applied[-1], list(state.applied[:-1]))
            else:
                self._set(connection, "DELETE FROM {state}")

    def _check_old(self, connection: Any) -> None:
        missing = "SELECT count(*) FROM {t} WHERE {old} IS NULL AND {v} IS NOT NULL"
        if left := self._run(connection, missing).fetchone()[0]:
            column, kept = self._table.texts["v"], self._table.texts["old"]
            raise DataError(
                f"{self.name}: {left:,} rows were enrolled or changed after the swap and have no old vector, "
                f"which a rollback would leave empty; give them one in {kept}, or remove them (WHERE {kept} IS "
                f"NULL AND {column} IS NOT NULL)"
            )

    def finish(self) -> None:
        """Drop the old vectors, which a rollback would need: the upgrade is final, and the next one may begin."""
        with self._alone() as connection, connection.transaction():
            connection.execute("SET LOCAL client_min_messages = error")
            state = self._state(connection)
            if state.phase == "finished":
                return
            if state.phase != "swapped":
                raise DataError(f"{self.name}: is not upgraded ({state.phase}); there is nothing to finish")
            self._drop_todo(connection)
            self._run(connection, "ALTER TABLE {t} DROP COLUMN {old}, DROP COLUMN IF EXISTS {vold}")
            self._set(connection, "UPDATE {state} SET phase = 'finished', indexes = '{{}}'")

    def _drop_todo(self, connection: Any) -> None:
        """Remove the trigger and its index, and the function with the last trigger that calls it."""
        of_table = "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s"
        for (name,) in connection.execute(of_table, (self._table.oid,)).fetchall():
            if name.endswith(self._todo_end):
                self._run(connection, "DROP INDEX {index}", index=quoted(self._table.schema, name))
        self._run(connection, "DROP TRIGGER IF EXISTS {todo} ON {t}")
        used = "SELECT 1 FROM pg_trigger WHERE tgfoid = to_regprocedure(%s)"
        if connection.execute(used, (f"{self._names['stale']}()",)).fetchone() is None:
            self._run(connection, "DROP FUNCTION IF EXISTS {stale}()")

    def verify(self, converter: Converter, sample: int = 1000) -> TableCheck:
        """Re-compute a random sample of converted rows, measure the recall of both columns' indexes, and ask how
        PostgreSQL answers the kind of query that each index is for."""
        with self._connect() as connection:
            state = self._state(connection)
            if state.phase not in ("converting", "swapped") or state.version != converter.version:
                raise DataError(f"{self.name}: is not upgraded to {converter.version} ({state.phase})")
            old, new = ("old", "v") if state.phase == "swapped" else ("v", "new")
            text = f"SELECT ctid, {{{old}}}, {{k}}, {{{new}}} FROM {{t}} WHERE {{{new}}} IS NOT NULL "
            text += f"AND {{{old}}} IS NOT NULL ORDER BY random() LIMIT %s"  # rows enrolled later have no old one
            rows = self._run(connection, text, sample).fetchall()
            if not rows:
                raise DataError(f"{self.name}: no row is converted yet")
            counts = self._run(connection, f"SELECT count({{{old}}}), count({{{new}}}) FROM {{t}}").fetchone()
            befores, afters = self._table.indexes(connection, old), self._table.indexes(connection, new)
            addresses = [row[0] for row in rows[:50]]
            recalls = [
                self._recall(connection, short, found, addresses) for short, found in ((new, afters), (old, befores))
            ]
            searches = self._searches(connection, state, {i.name: i for i in befores}, {i.name: i for i in afters})
        stored = np.stack([_array(row[-1]) for row in rows])
        made = converter(*self._rows([row[:-1] for row in rows]))
        cosine = smallest_cosine(made, stored)
        return TableCheck(len(rows), cosine, recalls[0], recalls[1], counts[0], counts[1], 0, searches)

    def _searches(
        self, connection: Any, state: _State, before: dict[str, Index], after: dict[str, Index]
    ) -> tuple[Search, ...]:
        """How the query of each index of the old column is answered in the old column and in the new one."""
        moved = {now: name for name, now in state.indexes}
        old, new = ("old", "v") if state.phase == "swapped" else ("v", "new")
        done = []
        for name, index in before.items():
            if index.operator is None or not index.whole:
                continue
            copy = after.get(moved.get(name, self._copy_name(name, state)))
            shown = f"{index.method} {index.operator}" + (f" where {index.where}" if index.where else "")
            answered = self._answered(connection, new, copy) if copy is not None else "sequential scan"
            done.append(Search(shown, self._answered(connection, old, index), answered))
        return tuple(done)

    def _query_of(self, short: str, index: Index, given: str) -> str:
        """The kind of query that an index is for, with the vector of the row at an address (or of any row)."""
        column = self._names[short]
        condition = f"({index.where})" if index.where else f"{column} IS NOT NULL"
        asked = f"({index.asked})"
        return (
            f"SELECT ctid FROM {self._names['t']} WHERE {condition} ORDER BY {asked} {index.operator} "
            f"(SELECT {asked} FROM {self._names['t']} WHERE {given} AND {column} IS NOT NULL LIMIT 1) LIMIT "
        )

    def _answered(self, connection: Any, short: str, index: Index) -> str:
        text = "EXPLAIN (FORMAT JSON) " + self._query_of(short, index, "true") + "10"
        nodes, found = [connection.execute(text).fetchone()[0][0]["Plan"]], []
        while nodes:
            node = nodes.pop()
            if node.get("Parent Relationship") != "InitPlan":
                found.append(node.get("Index Name"))
                nodes += node.get("Plans", [])
        return "index" if any(found) else "sequential scan"

    def _recall(
        self, connection: Any, short: str, indexes: list[Index], addresses: list[str], k: int = 10
    ) -> float | None:
        """The share of the ``k`` exact neighbours of stored rows that an index finds, of the worst index; None:
        there is none for search."""
        worst: float | None = None
        for index in indexes:
            if index.operator is None or not index.whole:
                continue
            ask = self._query_of(short, index, "ctid = %s::tid").replace("%", "%%").replace("%%s::tid", "%s::tid")
            found: list[list[set[str]]] = []
            for avoided in ("enable_indexscan", "enable_seqscan"):
                with connection.transaction():
                    connection.execute(f"SET LOCAL {avoided} = off")
                    answers = [connection.execute(f"{ask}{k}", (address,)).fetchall() for address in addresses]
                found.append([{row[0] for row in answer} for answer in answers])
            shares = [len(exact & got) / len(exact) for exact, got in zip(*found, strict=True) if exact]
            mean = float(np.mean(shares)) if shares else 1.0
            worst = mean if worst is None else min(worst, mean)
        return worst

    def sample(self, count: int) -> tuple[IntArray, list[FloatArray]]:
        """Ids and stored vectors (of one dimension or several) of random rows, whatever space they are in."""
        with self._connect() as connection:
            text = "SELECT ctid, {v}, {k} FROM {t} WHERE {v} IS NOT NULL ORDER BY random() LIMIT %s"
            rows = self._run(connection, text, count).fetchall()
        ids = np.array([row[2] for row in rows], np.int64) if self._table.numbered else np.full(len(rows), -1)
        return ids, [_array(row[1]) for row in rows]

    def search(self, as_old: FloatArray | None, as_new: FloatArray, k: int) -> list[tuple[Any, float]]:
        """The ``k`` nearest rows of a gallery in any phase: (key, cosine), best first.

        Args:
            as_old: the query (D1,) as it meets an old row; None once no old row is left. as_new: as it meets a new
                one (D2,).

        While rows are being converted each is compared in the space it is in: by its new vector where it has one.
        """
        with self._connect() as connection:
            phase = self._state(connection).phase
            parts = [("{new}", as_new, ""), ("{v}", as_old, "AND {new} IS NULL")]
            if phase != "converting":
                parts = [("{v}", as_new if phase in ("swapped", "finished") else as_old, "")]
            found: list[tuple[Any, float]] = []
            for column, query, condition in parts:
                if query is None:
                    raise DataError(f"{self.name}: holds old rows ({phase}); give the query as it meets them too")
                distance = f"{column} <=> %s::vector::{{type}}"
                text = f"SELECT 1 - ({distance}), {{k}} FROM {{t}} WHERE {column} IS NOT NULL {condition}"
                text += f" ORDER BY {distance} LIMIT %s"
                rows = self._run(connection, text, np.asarray(query), np.asarray(query), k).fetchall()
                found += [(row[1] if len(row) == 2 else tuple(row[1:]), float(row[0])) for row in rows]
        return sorted(found, key=lambda row: -row[1])[:k]


def _array(value: Any) -> FloatArray:
    return np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value, np.float32)
