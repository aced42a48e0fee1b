"""A vector column of a PostgreSQL table as the catalog knows it: type, key, indexes and what else hangs on it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trainer.errors import DataError

LONGEST = 63  # bytes of a name
TODO = "_lce_todo"
"""How the name of the index over the rows that are left ends."""
_KINDS = {"v": "view", "m": "materialized view", "f": "foreign table", "p": "partitioned table"}
_FIND = """SELECT c.oid, n.nspname, c.relname, c.relkind::text, row_security_active(c.oid),
    EXISTS (SELECT 1 FROM pg_inherits h WHERE h.inhparent = c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)"""
_COLUMN = """SELECT a.attnum, t.typname, a.atttypmod, a.attnotnull, a.attgenerated::text, a.attstorage::text,
    col_description(a.attrelid, a.attnum), format_type(a.atttypid, a.atttypmod)
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = %s AND a.attname = %s AND a.attnum > 0 AND NOT a.attisdropped"""
_PRIMARY = """SELECT a.attname FROM pg_index i CROSS JOIN unnest(i.indkey) WITH ORDINALITY AS k (number, at)
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
    WHERE i.indrelid = %s AND i.indisprimary AND k.at <= i.indnkeyatts ORDER BY k.at"""
_UNIQUE = """SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL
    AND a.attname = %s AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)"""
# An index hangs on the columns that it is over, and on those of its expressions and its condition.
_INDEXES = """SELECT DISTINCT i.indexrelid, c.relname, i.indisvalid, pg_get_indexdef(i.indexrelid),
    pg_get_indexdef(i.indexrelid, 1, true), pg_get_expr(i.indpred, i.indrelid, true), m.amname,
    (SELECT o.oprname FROM pg_opclass s JOIN pg_amop x ON x.amopfamily = s.opcfamily AND x.amoppurpose = 'o'
        JOIN pg_operator o ON o.oid = x.amopopr WHERE s.oid = i.indclass[0] LIMIT 1)
    FROM pg_depend d JOIN pg_index i ON i.indexrelid = d.objid JOIN pg_class c ON c.oid = i.indexrelid
    JOIN pg_am m ON m.oid = c.relam
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = %s
    AND d.refobjsubid = %s AND i.indrelid = d.refobjid ORDER BY c.relname"""
_DEPENDENTS = """SELECT DISTINCT d.classid::regclass::text, pg_describe_object(d.classid, d.objid, d.objsubid),
    (SELECT r.ev_class::regclass::text FROM pg_rewrite r WHERE r.oid = d.objid),
    (SELECT e.attname FROM pg_attrdef f JOIN pg_attribute e ON e.attrelid = f.adrelid AND e.attnum = f.adnum
        WHERE f.oid = d.objid),
    (SELECT k.contype::text FROM pg_constraint k WHERE k.oid = d.objid),
    (SELECT pg_get_constraintdef(k.oid) FROM pg_constraint k WHERE k.oid = d.objid),
    (SELECT g.tgname FROM pg_trigger g WHERE g.oid = d.objid)
    FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = %s AND d.refobjsubid = %s
    AND d.classid <> 'pg_class'::regclass AND d.deptype IN ('n', 'a') ORDER BY 1, 2"""
_PUBLISHED = """SELECT p.pubname, r.prattrs::int2[], pg_get_expr(r.prqual, r.prrelid) FROM pg_publication_rel r
    JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = %s"""
_GRANTS = """SELECT a.privilege_type, a.is_grantable,
    CASE WHEN a.grantee = 0 THEN NULL ELSE pg_get_userbyid(a.grantee) END
    FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) a WHERE t.attrelid = %s AND t.attnum = %s"""


def quoted(*names: str) -> str:
    """A name, with its schema where two are given, as PostgreSQL reads it whatever is in it."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def shortened(name: str, ending: str) -> str:
    """``name`` and ``ending``, with the name cut so that PostgreSQL need not cut what tells two apart."""
    return name.encode()[: LONGEST - len(ending.encode())].decode(errors="ignore") + ending


@dataclass(frozen=True)
class Column:
    """A column as the catalog knows it. number: its own, which a new name does not change."""

    number: int
    type: str
    size: int
    required: bool
    generated: str
    storage: str
    comment: str | None
    shown: str


@dataclass(frozen=True)
class Index:
    """An index over a column. asked: what it sorts by; where: its condition; operator: the distance, if it has one."""

    oid: int
    name: str
    whole: bool
    definition: str
    asked: str
    where: str | None
    method: str
    operator: str | None


class Table:
    """A table with a vector column; ``names`` are what ``{…}`` in the text of a query stands for.

    Args:
        dsn, table, column: see :class:`~trainer.gallery.postgres.PostgresGallery`. key: column names with commas
            between; None: the primary key.

    Raises:
        DataError: no such database, table or column, one of another kind or type, or no pgvector.
    """

    def __init__(self, dsn: str, table: str, column: str, key: str | None) -> None:
        try:
            import psycopg
            from pgvector.psycopg import register_vector
        except ImportError:
            raise DataError(
                "a PostgreSQL gallery needs psycopg and pgvector; pip install 'lce-trainer[gallery]'"
            ) from None
        self.psycopg, self._register, self._dsn = psycopg, register_vector, dsn
        self.name = f"{table}.{column}"
        with self.connect() as connection:
            self.oid, self.schema, self.table = self._find(connection, table)
            self.texts = {"v": column, "new": f"{column}_new", "old": f"{column}_old"}
            self.texts |= {"vv": f"{column}_version", "vnew": f"{column}_new_version", "vold": f"{column}_old_version"}
            if len(column.encode()) > LONGEST - len("_old_version"):
                raise DataError(f"{self.name}: the column's name is too long for those that are made next to it")
            found = self.column(connection, "v")
            if found is None:
                raise DataError(f"{self.name}: the table has no column of that name; name it with `column`")
            self.type, self.dim = found.type, found.size
            self._check_type(found)
            self.key = self._key(connection, key)
            integer = len(self.key) == 1 and connection.execute(_UNIQUE, (self.oid, self.key[0])).fetchone()
            self.numbered = bool(integer)
            self.names = {short: quoted(text) for short, text in self.texts.items()}
            self.names |= {"t": quoted(self.schema, self.table), "type": quoted(self.type)}
            self.names |= {"k": ", ".join(quoted(name) for name in self.key) or "ctid"}
            if self.dim < 1:
                self.dim = self._stored_dim(connection)

    def _find(self, connection: Any, table: str) -> tuple[int, str, str]:
        for names in (table.split("."), [table]):
            row = connection.execute(_FIND, (quoted(*names),)).fetchone()
            if row is not None:
                break
        else:
            raise DataError(f"{self.name}: no such table in the database; name it with `table`")
        oid, schema, name, kind, secured, inherited = row
        if kind == "p":
            raise DataError(
                f"{self.name}: a partitioned table, whose index cannot be built while it is used; detach the "
                "partitions and upgrade each as a table of its own"
            )
        if kind != "r":
            raise DataError(f"{self.name}: is a {_KINDS.get(kind, 'relation')}, not a table; name the table")
        if inherited:
            raise DataError(f"{self.name}: other tables inherit from it; upgrade each as a table of its own")
        if secured:
            raise DataError(
                f"{self.name}: row security hides rows from this user, which would stay old; connect as its owner"
            )
        return oid, schema, name

    def _check_type(self, found: Column) -> None:
        column = self.texts["v"]
        if found.type not in ("vector", "halfvec"):
            numbers = found.shown.removesuffix("[]") in ("real", "double precision", "numeric", "integer")
            how = (
                f"; convert it: ALTER TABLE {quoted(self.table)} ALTER {quoted(column)} TYPE vector USING "
                f"{quoted(column)}::vector"
            )
            raise DataError(
                f"{self.name}: is no vector column but {found.shown}; taken are pgvector's vector and halfvec"
                + (how if numbers and found.shown.endswith("[]") else "")
            )
        if found.generated:
            raise DataError(f"{self.name}: is a generated column; upgrade the column that it is computed from")

    def _key(self, connection: Any, key: str | None) -> list[str]:
        if key is None:
            return [row[0] for row in connection.execute(_PRIMARY, (self.oid,)).fetchall()]
        for names in ([key], [name.strip() for name in key.split(",")]):
            if all(connection.execute(_COLUMN, (self.oid, name)).fetchone() for name in names):
                return names
        raise DataError(f"{self.name}: the table has no column {key}; name the key with `key` (of several: a,b)")

    def _stored_dim(self, connection: Any) -> int:
        row = self.run(connection, "SELECT vector_dims({v}) FROM {t} WHERE {v} IS NOT NULL LIMIT 1").fetchone()
        if row is None:
            raise DataError(
                f"{self.name}: the column has no dimension and holds no vector; there is nothing to upgrade"
            )
        return int(row[0])

    @contextmanager
    def connect(self) -> Iterator[Any]:
        """A connection whose loss, and whatever else the database says, is one clear error."""
        try:
            with self.psycopg.connect(self._dsn, autocommit=True) as connection:
                self._register(connection)
                yield connection
        except self.psycopg.OperationalError as error:
            lost = (error.sqlstate or "08").startswith(("08", "57P"))  # classes of connections and of shutdowns
            what = "the database cannot be reached: " if lost else ""
            raise DataError(f"{self.name}: {what}{_line(error)}; run again to continue") from None
        except self.psycopg.Error as error:
            raise DataError(f"{self.name}: {_line(error)}") from None

    def run(self, connection: Any, text: str, /, *values: Any, **names: str) -> Any:
        """Execute a query with names for ``{…}`` and values for ``%s``."""
        every = {**self.names, **names}
        if values:
            every = {short: name.replace("%", "%%") for short, name in every.items()}
        return connection.execute(text.format_map(every), values or None)

    def column(self, connection: Any, short: str) -> Column | None:
        """A column by its short name; None: there is none."""
        row = connection.execute(_COLUMN, (self.oid, self.texts[short])).fetchone()
        return None if row is None else Column(*row)

    def indexes(self, connection: Any, short: str) -> list[Index]:
        """The indexes over a column, its expressions and conditions included."""
        column = self.column(connection, short)
        if column is None:
            return []
        rows = connection.execute(_INDEXES, (self.oid, column.number)).fetchall()
        return [Index(*row) for row in rows if not row[1].endswith(TODO)]

    def dependents(self, connection: Any) -> tuple[list[str], list[str]]:
        """What hangs on the column and cannot be carried to another: what forbids an upgrade, and what stays behind."""
        column, refused, left = self.column(connection, "v"), [], []
        assert column is not None
        for kind, shown, view, default, constraint, text, trigger in connection.execute(
            _DEPENDENTS, (self.oid, column.number)
        ).fetchall():
            if kind == "pg_rewrite":
                refused.append(f"the view {view} would go on showing the old vectors; drop it and make it again after")
            elif kind == "pg_attrdef" and default == self.texts["v"]:
                refused.append("its default is a vector of the old model; drop the default first")
            elif kind == "pg_attrdef":
                refused.append(
                    f"the generated column {default} would go on being computed from the old vectors; drop it "
                    "and add it again after"
                )
            elif kind == "pg_constraint" and constraint in ("p", "u", "x", "f"):
                refused.append(f"the {shown} is over the vectors; drop it first")
            elif kind == "pg_constraint" and constraint == "c" and "IS NOT NULL" in text:
                refused.append(f"the {shown} asks for old vectors for ever; drop it (NOT NULL itself is carried)")
            elif kind not in ("pg_publication_rel", "pg_trigger") and constraint != "n":
                left.append(f"the {shown} stays with the old vectors")
            elif kind == "pg_trigger" and not trigger.startswith("~lce_"):
                left.append(f"the {shown} stays with the old vectors: it sees no change of the new ones")
        for name, numbers, _ in connection.execute(_PUBLISHED, (self.oid,)).fetchall():
            if numbers is None:
                left.append(
                    f"the publication {name} sends all columns: its subscribers need {self.texts['new']} and "
                    f"{self.texts['vnew']} before the upgrade begins"
                )
        return refused, left

    def carry(self, connection: Any) -> None:
        """Give the new column the storage, the comment and the rights of the old one."""
        column, run = self.column(connection, "v"), self.run
        assert column is not None
        storage = {"p": "PLAIN", "e": "EXTERNAL", "x": "EXTENDED", "m": "MAIN"}[column.storage]
        run(connection, f"ALTER TABLE {{t}} ALTER {{new}} SET STORAGE {storage}")
        if column.comment is not None:
            literal = self.psycopg.sql.Literal(column.comment).as_string(connection)
            run(connection, "COMMENT ON COLUMN {t}.{new} IS {text}", text=literal)
        for right, grantable, who in connection.execute(_GRANTS, (self.oid, column.number)).fetchall():
            end = " WITH GRANT OPTION" if grantable else ""
            role = "PUBLIC" if who is None else quoted(who)
            run(connection, f"GRANT {right} ({{new}}) ON {{t}} TO {{role}}{end}", role=role)

    def publish(self, connection: Any, old: int, new: int) -> None:
        """In publications of some columns of the table, put column number ``new`` in the place of ``old``."""
        for name, numbers, where in connection.execute(_PUBLISHED, (self.oid,)).fetchall():
            if numbers is None or old not in numbers:
                continue
            wanted = [new if number == old else number for number in numbers]
            columns = connection.execute(
                "SELECT array_agg(attname::text ORDER BY attnum) FROM pg_attribute "
                "WHERE attrelid = %s AND attnum = ANY (%s)",
                (self.oid, wanted),
            ).fetchone()[0]
            listed = ", ".join(quoted(column) for column in columns)
            self.run(connection, "ALTER PUBLICATION {p} DROP TABLE {t}", p=quoted(name))
            condition = "" if where is None else f" WHERE ({where})"
            text = "ALTER PUBLICATION {p} ADD TABLE {t} ({listed}){condition}"
            self.run(connection, text, p=quoted(name), listed=listed, condition=condition)

    def copies(self, connection: Any, dim_out: int) -> dict[str, str]:
        """How each index over the vectors would be made over the new column: its name → what stands behind ``ON T``.

        PostgreSQL itself writes them: on an empty copy of the table whose column has the new name. The sizes of types
        in expressions and conditions become the new dimension.

        Raises:
            DataError: an index cannot be made for that dimension.
        """
        indexes = self.indexes(connection, "v")
        found: dict[str, str] = {}
        with connection.transaction(force_rollback=True):
            connection.execute("SET LOCAL client_min_messages = error")
            self.run(connection, "CREATE TEMP TABLE lce_scratch (LIKE {t})")
            for short in ("new", "vnew"):
                self.run(connection, f"ALTER TABLE pg_temp.lce_scratch DROP COLUMN IF EXISTS {{{short}}}")
            for at, index in enumerate(indexes):
                behind = self._behind(index.definition, index.name, self.schema, self.table)
                connection.execute(f"CREATE INDEX lce_scratch_{at} ON pg_temp.lce_scratch{behind}")
            self.run(connection, "ALTER TABLE pg_temp.lce_scratch RENAME {v} TO {new}")
            schema = connection.execute("SELECT nspname FROM pg_namespace WHERE oid = pg_my_temp_schema()").fetchone()[
                0
            ]
            for at, index in enumerate(indexes):
                name = f"lce_scratch_{at}"
                text = connection.execute(
                    "SELECT pg_get_indexdef(c.oid) FROM pg_class c WHERE c.relname = %s "
                    "AND c.relnamespace = pg_my_temp_schema()",
                    (name,),
                ).fetchone()[0]
                found[index.name] = self._resized(self._behind(text, name, schema, "lce_scratch"), dim_out)
                connection.execute(f"DROP INDEX pg_temp.{name}")
            self.run(connection, f"ALTER TABLE pg_temp.lce_scratch ALTER {{new}} TYPE {{type}}({int(dim_out)})")
            for name, behind in found.items():
                try:
                    connection.execute(f"CREATE INDEX ON pg_temp.lce_scratch{behind}")
                except self.psycopg.Error as error:
                    raise DataError(
                        f"{self.name}: the index {name} cannot be made for vectors of dimension {dim_out}: "
                        f"{_line(error)}; drop it, or choose another with `index`"
                    ) from None
        return found

    @staticmethod
    def _behind(definition: str, name: str, schema: str, table: str) -> str:
        """What stands in an index's definition behind the table's name."""
        at = definition.index(" USING ")
        for tables in (f"{a}.{b}" for a in (schema, quoted(schema)) for b in (table, quoted(table))):
            for names in (name, quoted(name)):
                for kind in ("CREATE INDEX", "CREATE UNIQUE INDEX"):
                    head = f"{kind} {names} ON {tables}"
                    if definition.startswith(f"{head} USING "):
                        return definition[len(head) :]
        return definition[at:]

    def _resized(self, text: str, dim_out: int) -> str:
        """The text with the old dimension of types replaced, but not within quotes."""
        parts = re.split(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")""", text)
        sizes = re.compile(rf"\b(vector|halfvec|sparsevec|bit)\({self.dim}\)")
        return "".join(part if at % 2 else sizes.sub(rf"\1({dim_out})", part) for at, part in enumerate(parts))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
