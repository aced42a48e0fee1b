"""Upgrade in a real PostgreSQL with pgvector: workers killed and side by side, mixed search, swap, refusals."""

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest

from tests.evaluation.samples import identities
from tests.gallery.rotation import Rotation
from tests.gallery.servers import postgres
from trainer.errors import DataError

psycopg = pytest.importorskip("psycopg", reason="needs the extra `gallery`")

from trainer.gallery.postgres import PostgresGallery  # noqa: E402

VECTORS = identities(100, 4, dim=16, seed=1)[0]


@pytest.fixture(scope="module")
def server():
    with postgres() as address:
        yield address


@pytest.fixture
def dsn(server):
    """A database with the table faces (id, embedding vector(16), hits): 400 rows and one without a vector."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS faces, lce_gallery")
        connection.execute("CREATE TABLE faces (id bigint PRIMARY KEY, embedding vector(16), hits int)")
        with connection.cursor() as cursor:
            rows = [(10 * i, str(v.tolist()), i % 7) for i, v in enumerate(VECTORS)]
            cursor.executemany("INSERT INTO faces VALUES (%s, %s, %s)", rows)
        connection.execute("INSERT INTO faces VALUES (999999, NULL, 0)")
    return server


def stored(dsn, column="embedding"):
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            f"SELECT id, {column}::text FROM faces WHERE {column} IS NOT NULL ORDER BY id"
        ).fetchall()
    return np.array([i for i, _ in rows]), np.array([np.fromstring(v.strip("[]"), sep=",") for _, v in rows])


def test_the_whole_upgrade_and_back(dsn):
    gallery = PostgresGallery(dsn, "faces")
    assert (gallery.dim, gallery.status().phase, gallery.status().rows) == (16, "none", 400)
    gallery.begin(Rotation())
    gallery.begin(Rotation())  # another worker
    with pytest.raises(DataError, match="400 rows have no new vector yet"):
        gallery.swap()
    counts = []
    assert gallery.work(Rotation(), batch=64, progress=counts.append) == 400
    assert sum(counts) == 400
    assert gallery.status().left == 0
    gallery.index("hnsw")
    gallery.swap()
    gallery.swap()
    assert gallery.status().phase == "swapped"
    ids, vectors = stored(dsn)
    assert list(ids) == [10 * i for i in range(400)]
    assert vectors == pytest.approx(Rotation()(None, VECTORS), abs=1e-5)
    check = PostgresGallery(dsn, "faces").verify(Rotation(), sample=100)
    assert (check.rows, check.smallest_cosine) == (100, pytest.approx(1.0, abs=1e-5))
    assert check.recall > 0.9  # of the HNSW index
    assert check.recall_before is None  # the old column had none
    with psycopg.connect(dsn) as connection:
        versions = connection.execute("SELECT DISTINCT embedding_version FROM faces WHERE embedding IS NOT NULL")
        assert versions.fetchall() == [("rotation-1",)]
    with psycopg.connect(dsn) as connection:
        indexes = connection.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'faces'").fetchall()
    assert sum("hnsw" in text for (text,) in indexes) == 1
    gallery.rollback()
    assert stored(dsn)[1] == pytest.approx(VECTORS, abs=1e-6)
    assert gallery.status().phase == "none"
    assert columns(dsn) == ["embedding", "hits", "id"]
    with pytest.raises(DataError, match="no upgrade to roll back"):
        gallery.rollback()


def columns(dsn):
    with psycopg.connect(dsn) as connection:
        text = "SELECT column_name FROM information_schema.columns WHERE table_name = 'faces' ORDER BY 1"
        return [name for (name,) in connection.execute(text).fetchall()]


class Back(Rotation):
    """The way back, from 24 dimensions to 16."""

    dim_in, dim_out = 24, 16

    def __init__(self):
        super().__init__("back")
        self.matrix = self.matrix.T


def test_a_chain_of_upgrades(dsn):
    gallery = PostgresGallery(dsn, "faces")
    with pytest.raises(DataError, match="nothing to finish"):
        gallery.finish()
    gallery.begin(Rotation())
    gallery.work(Rotation())
    gallery.index("hnsw")
    gallery.swap()
    with pytest.raises(DataError, match="finish it or roll it back"):
        PostgresGallery(dsn, "faces").begin(Back())
    gallery.finish()
    assert columns(dsn) == ["embedding", "embedding_version", "hits", "id"]
    second = PostgresGallery(dsn, "faces")
    second.begin(Back())
    second.work(Back())
    second.index("hnsw")
    second.swap()
    assert stored(dsn)[1] == pytest.approx(VECTORS, abs=1e-5)
    assert second.verify(Back()).recall > 0.9
    second.rollback()
    assert stored(dsn)[1] == pytest.approx(Rotation()(None, VECTORS), abs=1e-5)
    assert columns(dsn) == ["embedding", "embedding_version", "hits", "id"]


def test_a_row_that_changes_during_the_upgrade_is_converted_again(dsn):
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation())
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE faces SET embedding = %s WHERE id = 30", (str(VECTORS[9].tolist()),))
        connection.execute("UPDATE faces SET hits = 99, embedding = embedding WHERE id = 40")
    assert gallery.status().left == 1
    assert gallery.work(Rotation()) == 1
    gallery.swap()
    assert stored(dsn)[1][3] == pytest.approx(Rotation()(None, VECTORS)[9], abs=1e-5)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE faces SET embedding = %s WHERE id = 50", (str([1.0] * 24),))


def swapped(dsn):
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation())
    gallery.swap()
    return gallery


def execute(dsn, text, *values):
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(text, values or None)
        return cursor.fetchall() if cursor.description else []


def test_what_is_enrolled_after_the_swap_is_not_lost_by_a_rollback(dsn):
    execute(dsn, "DELETE FROM faces WHERE embedding IS NULL")
    execute(dsn, "ALTER TABLE faces ALTER embedding SET NOT NULL")
    gallery = swapped(dsn)
    execute(dsn, "INSERT INTO faces (id, embedding) VALUES (7, %s)", str([1.0] * 24))
    execute(dsn, "UPDATE faces SET embedding = %s WHERE id = 50", str([2.0] * 24))
    with pytest.raises(psycopg.errors.NotNullViolation):
        execute(dsn, "INSERT INTO faces (id, embedding) VALUES (8, NULL)")
    assert gallery.verify(Rotation()).rows == 399  # whose old vector is known
    assert gallery.verify(Rotation()).smallest_cosine > 0.999
    with pytest.raises(DataError, match="2 rows were enrolled or changed after the swap"):
        gallery.rollback()
    assert len(stored(dsn)[0]) == 401
    execute(dsn, "DELETE FROM faces WHERE id = 7")
    execute(dsn, "UPDATE faces SET embedding_old = %s WHERE id = 50", str([3.0] * 16))
    gallery.rollback()
    assert stored(dsn)[1][5] == pytest.approx([3.0] * 16)
    assert stored(dsn)[1][6] == pytest.approx(VECTORS[6], abs=1e-6)
    with pytest.raises(psycopg.errors.NotNullViolation):
        execute(dsn, "INSERT INTO faces (id, embedding) VALUES (8, NULL)")
    swapped(dsn).finish()
    execute(dsn, "UPDATE faces SET embedding = %s WHERE id = 50", str([2.0] * 24))


def test_verify_sees_vectors_that_are_spoiled(dsn):
    gallery = swapped(dsn)
    execute(dsn, "ALTER TABLE faces DISABLE TRIGGER USER")
    execute(dsn, "UPDATE faces SET embedding = %s WHERE id = 50", str([0.0] * 24))
    assert gallery.verify(Rotation()).smallest_cosine == -1


def test_an_index_whose_building_was_cut_off_is_built_anew(dsn):
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation())
    gallery.index("hnsw")
    spoil = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass"
    [name] = [name for (name,) in execute(dsn, "SELECT indexname FROM pg_indexes WHERE indexdef LIKE '%hnsw%'")]
    execute(dsn, spoil, name)
    assert gallery.verify(Rotation()).recall is None
    with pytest.raises(DataError, match="index is not whole; run the upgrade again"):
        gallery.swap()
    gallery.index("hnsw")
    gallery.swap()
    assert gallery.verify(Rotation()).recall > 0.9


def test_names_that_postgresql_would_cut(dsn):
    table, column = "faces_of_everybody_who_ever_was_in_the_gallery", "embedding_of_the_first_model"
    execute(dsn, f"DROP TABLE IF EXISTS {table}")
    execute(dsn, f"CREATE TABLE {table} (id bigint PRIMARY KEY, {column} vector(16))")
    execute(dsn, f"INSERT INTO {table} SELECT id, embedding FROM faces")
    gallery = PostgresGallery(dsn, table, column)
    gallery.begin(Rotation())
    gallery.work(Rotation())
    gallery.index("hnsw")
    gallery.swap()
    assert gallery.verify(Rotation()).recall > 0.9
    execute(dsn, f"DROP TABLE {table}")
    with pytest.raises(DataError, match="name is too long"):
        PostgresGallery(dsn, "faces", "e" * 60)


def _finish_work(dsn):
    gallery = PostgresGallery(dsn, "faces")
    gallery.index("hnsw")
    gallery.swap()


def test_workers_that_end_together_build_one_index_and_swap_once(dsn):
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation())
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_finish_work, args=(dsn,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert gallery.status().phase == "swapped"
    assert gallery.verify(Rotation()).recall > 0.9


def test_tables_that_cannot_be_swapped_are_refused(dsn):
    execute(dsn, "CREATE VIEW shown AS SELECT id, embedding FROM faces")
    with pytest.raises(DataError, match="the view shown would go on showing the old vectors"):
        PostgresGallery(dsn, "faces").begin(Rotation())
    execute(dsn, "DROP VIEW shown")
    execute(dsn, "DROP TABLE IF EXISTS parts, loose")
    execute(dsn, "CREATE TABLE parts (id bigint PRIMARY KEY, embedding vector(16)) PARTITION BY RANGE (id)")
    with pytest.raises(DataError, match="a partitioned table"):
        PostgresGallery(dsn, "parts")
    execute(dsn, "CREATE TABLE loose (id bigint PRIMARY KEY, embedding vector)")
    with pytest.raises(DataError, match="has no dimension and holds no vector"):
        PostgresGallery(dsn, "loose")
    execute(dsn, "INSERT INTO loose VALUES (1, %s), (2, %s)", str([1.0] * 16), str([1.0] * 8))
    gallery = PostgresGallery(dsn, "loose")
    gallery.begin(Rotation())
    with pytest.raises(DataError, match="the vector of id 2 has dimension 8, others 16"):
        gallery.work(Rotation())
    execute(dsn, "DROP TABLE parts, loose")


def test_a_table_in_another_schema_and_with_capitals(dsn):
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute('DROP SCHEMA IF EXISTS "Prod" CASCADE')
        connection.execute('CREATE SCHEMA "Prod"')
        connection.execute('CREATE TABLE "Prod"."Faces" (id int UNIQUE, embedding vector(16))')
        connection.execute('INSERT INTO "Prod"."Faces" SELECT id / 10, embedding FROM public.faces WHERE id < 4000')
    gallery = PostgresGallery(dsn, "Prod.Faces")
    gallery.begin(Rotation())
    assert gallery.work(Rotation()) == 400
    gallery.index("hnsw")
    gallery.swap()
    assert gallery.verify(Rotation()).recall > 0.9
    gallery.rollback()


def _work(dsn, log, seconds):
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation(seconds=seconds, log=log), batch=8)


def test_workers_side_by_side_do_no_row_twice(dsn, tmp_path):
    context = multiprocessing.get_context("fork")
    logs = [tmp_path / f"log{i}" for i in range(3)]
    workers = [context.Process(target=_work, args=(dsn, log, 0.01)) for log in logs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    done = [[int(line) for line in log.read_text().split()] for log in logs]
    assert sorted(number for one in done for number in one) == [10 * i for i in range(400)]
    assert stored(dsn, "embedding_new")[1] == pytest.approx(Rotation()(None, VECTORS), abs=1e-5)


def test_workers_killed_at_random_moments_lose_nothing(dsn, tmp_path):
    context, generator, killed = multiprocessing.get_context("fork"), random.Random(5), 0
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    while gallery.status().left:
        worker = context.Process(target=_work, args=(dsn, tmp_path / "log", 0.02))
        worker.start()
        worker.join(generator.uniform(0.2, 0.5) if killed < 5 else 60)
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            killed += 1
        worker.join()
    assert killed > 0
    gallery.swap()
    assert stored(dsn)[1] == pytest.approx(Rotation()(None, VECTORS), abs=1e-5)


def test_workers_side_by_side_go_on_when_one_is_killed(dsn, tmp_path):
    context = multiprocessing.get_context("fork")
    logs = [tmp_path / f"log{i}" for i in range(3)]
    workers = [context.Process(target=_work, args=(dsn, log, 0.02)) for log in logs]
    for worker in workers:
        worker.start()
    while not logs[0].exists():
        workers[0].join(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    assert PostgresGallery(dsn, "faces").status().left == 0
    done = [[int(line) for line in log.read_text().split()] for log in logs]
    assert len(done[0]) < 400
    # What the killed one held is done by the others; at most its last batch was converted twice.
    assert 400 <= sum(map(len, done)) <= 408
    assert sorted({number for one in done for number in one}) == [10 * i for i in range(400)]
    assert stored(dsn, "embedding_new")[1] == pytest.approx(Rotation()(None, VECTORS), abs=1e-5)


def test_a_mixed_gallery_is_searched_rightly(dsn):
    gallery = PostgresGallery(dsn, "faces")
    query = VECTORS[7]
    exact = [10 * int(i) for i in np.argsort(-(VECTORS @ query))[:10]]

    def found():
        return [key for key, _ in gallery.search(query, Rotation()(None, query[None])[0], 10)]

    assert found() == exact

    class Half(Rotation):
        done = 0

        def __call__(self, ids, vectors):
            Half.done += len(ids)
            if Half.done > 200:
                raise KeyboardInterrupt
            return super().__call__(ids, vectors)

    gallery.begin(Rotation())
    with pytest.raises(KeyboardInterrupt):
        gallery.work(Half(), batch=50)
    assert gallery.status().left == 200
    assert found() == exact  # an isometry: the same cosines in both spaces
    with pytest.raises(DataError, match="holds old rows"):
        gallery.search(None, Rotation()(None, query[None])[0], 10)
    gallery.work(Rotation())
    gallery.swap()
    assert found() == exact


def test_most_searched_rows_come_first(dsn, tmp_path):
    gallery = PostgresGallery(dsn, "faces", order="highest:hits")
    gallery.begin(Rotation())
    gallery.work(Rotation(log=tmp_path / "log"), batch=50)
    order = [int(line) // 10 % 7 for line in (tmp_path / "log").read_text().split()]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(("order", "wanted"), [("lowest:hits", sorted), ("stored", None), ("random", None)])
def test_orders(dsn, tmp_path, order, wanted):
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE faces SET hits = NULL WHERE id = 70")
    gallery = PostgresGallery(dsn, "faces", order=order)
    gallery.begin(Rotation())
    gallery.work(Rotation(log=tmp_path / "log"), batch=50)
    ids = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert sorted(ids) == [10 * i for i in range(400)]
    if order == "lowest:hits":
        hits = [number // 10 % 7 for number in ids]
        assert hits[:-1] == sorted(hits[:-1])
        assert ids[-1] == 70  # rows without a value last
    else:
        assert (ids == sorted(ids)) == (order == "stored")


def test_rows_added_during_the_upgrade_are_not_lost(dsn):
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())
    gallery.work(Rotation())
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO faces VALUES (5, %s, 1)", (str(VECTORS[0].tolist()),))
    with pytest.raises(DataError, match="1 rows have no new vector yet"):
        gallery.swap()
    assert gallery.work(Rotation()) == 1
    gallery.swap()


def test_refusals(dsn):
    with pytest.raises(DataError, match="is no vector column but integer"):
        PostgresGallery(dsn, "faces", "hits")
    with pytest.raises(DataError, match="no such table"):
        PostgresGallery(dsn, "nobody; DROP TABLE faces")
    with pytest.raises(DataError, match="no column nothing"):
        PostgresGallery(dsn, "faces", key="nothing")
    for order, column in (("confidence", "lowest:COLUMN"), ("distance", "highest:COLUMN")):
        with pytest.raises(DataError, match=column):
            PostgresGallery(dsn, "faces", order=order)
    with pytest.raises(DataError, match='column "nothing" does not exist'):
        PostgresGallery(dsn, "faces", order="highest:nothing").begin(Rotation())
    PostgresGallery(dsn, "faces").rollback()
    with pytest.raises(DataError, match="cannot be reached"):
        PostgresGallery("postgresql://nobody@127.0.0.1:1/none?connect_timeout=2", "faces")
    gallery = PostgresGallery(dsn, "faces")
    other = Rotation()
    other.dim_in = 32
    with pytest.raises(DataError, match="takes 32"):
        gallery.begin(other)
    with pytest.raises(DataError, match="nothing is converted"):
        gallery.swap()
    gallery.begin(Rotation())
    with pytest.raises(DataError, match="an upgrade to rotation-1 is converting"):
        gallery.begin(Rotation("rotation-2"))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE faces SET embedding = %s WHERE id = 30", (str([0.0] * 16),))
    with pytest.raises(DataError, match="id 30 is zero or not finite"):
        gallery.work(Rotation())
    gallery.rollback()
    assert len(stored(dsn)[0]) == 400


def test_a_database_that_goes_away_is_one_clear_error(dsn):
    gallery = PostgresGallery(dsn, "faces")
    gallery.begin(Rotation())

    class Ending(Rotation):
        def __call__(self, ids, vectors):
            if ids[0] >= 1000:  # every other connection is ended, as a server's restart would
                with psycopg.connect(dsn, autocommit=True) as connection:
                    connection.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                    )
            return super().__call__(ids, vectors)

    with pytest.raises(DataError, match="run again to continue"):
        gallery.work(Ending(), batch=50)
    left = gallery.status().left
    assert 0 < left < 400
    assert left % 50 == 0  # whole batches only
    assert gallery.work(Rotation()) == left
    gallery.swap()
    assert stored(dsn)[1] == pytest.approx(Rotation()(None, VECTORS), abs=1e-5)
