"""Packages that only some commands need, and the extra of this distribution that installs each."""

EXTRAS = {
    "matplotlib": "evaluate",
    "onnxruntime": "evaluate",
    "onnx": "export",
    "onnxscript": "export",
    "fontTools": "demo",
    "faiss": "gallery",
    "psycopg": "gallery",
    "pgvector": "gallery",
    "pyarrow": "gallery",
    "qdrant_client": "gallery",
    "deepspeed": "deepspeed",
    "triton": "triton",
    "mpi4py": "mpi",
}


def remedy(error: ModuleNotFoundError) -> str | None:
    """What to install for a package that is missing: one line; None where it is none of the extras'."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"needs {package}, which is not installed: pip install 'lce-trainer[{EXTRAS[package]}]'"
