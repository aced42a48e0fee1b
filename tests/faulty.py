"""Runs with a fault: ``python -m tests.faulty CONFIG RANKS RESTARTS key=value …``; the variable FAULT says which.

It is ``kind:rank:batch``: before that batch the rank raises (``raise``), raises an error of ours (``data``), sleeps for
good (``hang``) or is killed (``kill``, in the first attempt only). Every batch takes SLOW seconds longer.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.job import Job


class FaultyJob(Job):
    """A job whose ranks are this module."""

    @property
    def program(self) -> list[str]:
        return ["-m", "tests.faulty", *super().program[2:]]


def _fail(kind: str) -> None:
    from trainer.errors import DataError

    if kind == "raise":
        raise ValueError("a defect for the test")
    if kind == "data":
        raise DataError("record 5 is damaged, for the test")
    if kind == "hang":
        time.sleep(3600)
    if kind == "kill" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def _rank() -> int:
    import tests.runs  # noqa: F401  (makes its backbone known)
    import trainer.run.engine
    from trainer.__main__ import main

    kind, rank, number = os.environ.get("FAULT", "none:0:0").split(":")
    build = trainer.run.engine.build_loader

    def build_faulty(*args: Any) -> Any:
        loader = build(*args)
        whole = loader.batches

        def batches() -> Iterator[Any]:
            for at, batch in enumerate(whole()):
                time.sleep(float(os.environ.get("SLOW", "0")))
                if os.environ["RANK"] == rank and at == int(number):
                    _fail(kind)
                yield batch

        loader.batches = batches
        return loader

    trainer.run.engine.build_loader = build_faulty
    return main()


def _launch() -> int:
    import tests.runs  # noqa: F401
    from launch import child, torchrun
    from trainer.run.config import load_config

    child.STUCK_SECONDS = float(os.environ.get("STUCK", child.STUCK_SECONDS))

    path, ranks, restarts, *overrides = sys.argv[1:]
    run_dir = load_config(path, overrides).run.dir
    job = FaultyJob(Path(path), tuple(overrides), nproc=int(ranks), max_restarts=int(restarts), run_dir=run_dir)
    return torchrun.run(job)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
    sys.exit(_rank() if "RANK" in os.environ else _launch())
