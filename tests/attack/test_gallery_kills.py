"""Upgrades of galleries are killed at random moments while their rows change; in the end every row is there once, in
the new space, or the upgrade is refused and the gallery is what the writer made of it."""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.attack import amounts, tally
from tests.evaluation.samples import identities
from tests.gallery.rotation import Rotation
from tests.gallery.servers import postgres
from trainer.errors import DataError
from trainer.gallery.files import rollback, status, upgrade

pytestmark = pytest.mark.slow
VECTORS = identities(50, 6, dim=16, seed=1)[0]


def slowly(path: Path) -> None:
    """One worker of a file's upgrade, until it is killed."""
    upgrade(path, Rotation(seconds=0.003), batch=8)


def _refusal(path: Path) -> str:
    """Why the upgrade does not go on; empty: it is done."""
    try:
        upgrade(path, Rotation())
    except DataError as error:
        return str(error)
    return ""


@amounts(2, 20, 70)
def test_a_gallery_file_is_killed_and_written_to(tmp_path: Path, amount: int) -> None:
    draw, context = random.Random(amount), multiprocessing.get_context("fork")
    for attempt in range(amount):
        path = tmp_path / f"{attempt}.npy"
        now = VECTORS[: draw.randint(150, 300)]
        np.save(path, now)
        changes = draw.random() < 0.5
        for _ in range(draw.randint(1, 3)):
            worker = context.Process(target=slowly, args=(path,))
            worker.start()
            worker.join(draw.uniform(0.02, 0.25))
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGSTOP)
            if changes and (state := status(path)) is not None and state.phase == "converting":
                now = np.concatenate([now, VECTORS[:7]])[3:]
                np.save(path.with_suffix(".other.npy"), now)
                path.with_suffix(".other.npy").replace(path)
            if worker.is_alive():
                os.kill(worker.pid, draw.choice((signal.SIGKILL, signal.SIGCONT)))
            worker.join()
        refused = _refusal(path)
        if refused:
            assert changes
            assert "changed since its upgrade began" in refused or "was written to" in refused
            rollback(path)
            assert np.array_equal(np.load(path), now)
            upgrade(path, Rotation())
        found = np.load(path)
        assert found == pytest.approx(Rotation()(None, now), abs=1e-6)
        tally("a gallery file killed while it is written to", "refused" if refused else "equal")


def worker_of(dsn: str) -> None:
    """One worker of a table's upgrade, until it is killed."""
    from trainer.gallery.postgres import PostgresGallery

    gallery, slow = PostgresGallery(dsn, "faces"), Rotation(seconds=0.01)
    gallery.begin(slow)
    gallery.work(slow, batch=16)
    gallery.complete(slow, batch=16)


class Writer(threading.Thread):
    """Enrols, changes and removes faces until the table is swapped: from then on its vectors do not fit.

    Attributes:
        truth: what the table must hold. unexpected: an error that ended it.
    """

    def __init__(self, dsn: str, seed: int) -> None:
        super().__init__()
        self._dsn, self._draw = dsn, np.random.default_rng(seed)
        self.truth = dict(enumerate(VECTORS))
        self.unexpected: Exception | None = None

    def run(self) -> None:
        import psycopg

        with psycopg.connect(self._dsn, autocommit=True) as connection:
            try:
                while True:
                    self._change(connection)
                    time.sleep(0.004)
            except psycopg.errors.DataException:
                return
            except Exception as error:
                self.unexpected = error

    def _change(self, connection) -> None:
        number, given = int(self._draw.integers(max(self.truth) + 1)), self._draw.normal(size=16).astype(np.float32)
        given /= np.linalg.norm(given)
        if number not in self.truth or self._draw.random() < 0.4:
            number = max(self.truth) + 1
            connection.execute("INSERT INTO faces (id, embedding) VALUES (%s, %s)", (number, str(given.tolist())))
            self.truth[number] = given
        elif self._draw.random() < 0.8:
            connection.execute("UPDATE faces SET embedding = %s WHERE id = %s", (str(given.tolist()), number))
            self.truth[number] = given
        else:  # with a vector of the old model, so that it fails like the others once the table is swapped
            old = connection.execute(
                "DELETE FROM faces WHERE id = %s AND vector_dims(embedding) = 16 RETURNING id", (number,)
            ).fetchone()
            if old is not None:
                del self.truth[number]


@amounts(2, 10, 30)
def test_a_table_is_killed_while_rows_change(amount: int) -> None:
    psycopg = pytest.importorskip("psycopg", reason="needs the extra `gallery`")
    from trainer.gallery.postgres import PostgresGallery

    draw, context, killed = random.Random(amount), multiprocessing.get_context("fork"), 0
    with postgres() as dsn:
        while killed < amount:
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute("SET client_min_messages = error")
                connection.execute("DROP TABLE IF EXISTS faces, lce_gallery")
                connection.execute("CREATE TABLE faces (id bigint PRIMARY KEY, embedding vector(16))")
                connection.execute("CREATE INDEX face_index ON faces USING hnsw (embedding vector_l2_ops)")
                with connection.transaction(), connection.cursor() as cursor:
                    rows = [(i, str(vector.tolist())) for i, vector in enumerate(VECTORS)]
                    cursor.executemany("INSERT INTO faces VALUES (%s, %s)", rows)
            writer = Writer(dsn, killed)
            writer.start()
            before = killed
            gallery, most = PostgresGallery(dsn, "faces"), draw.randint(2, 6)
            while gallery.status().phase != "swapped":
                worker = context.Process(target=worker_of, args=(dsn,))
                worker.start()
                worker.join(draw.uniform(0.1, 0.6) if most else 120)
                if worker.is_alive():
                    os.kill(worker.pid, signal.SIGKILL)
                    most, killed = max(0, most - 1), killed + 1
                worker.join()
            writer.join(30)
            assert not writer.is_alive()
            assert writer.unexpected is None
            with psycopg.connect(dsn) as connection:
                found = connection.execute(
                    "SELECT id, embedding::text, embedding_version FROM faces ORDER BY id"
                ).fetchall()
                [(index,)] = connection.execute(
                    "SELECT indexdef FROM pg_indexes WHERE indexname = 'face_index'"
                ).fetchall()
            assert [number for number, _, _ in found] == sorted(writer.truth)
            assert "hnsw (embedding vector_l2_ops)" in index
            made = Rotation()(None, np.stack([writer.truth[number] for number, _, _ in found]))
            stored = np.array([np.fromstring(text.strip("[]"), sep=",") for _, text, _ in found])
            assert stored == pytest.approx(made, abs=1e-5)
            assert {version for _, _, version in found} == {"rotation-1"}
            tally("a table killed while rows change", "equal", killed - before)
