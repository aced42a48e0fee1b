"""Run a subcommand of ``lce`` on several processes: the command starts itself again under torchrun."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job
from trainer.distributed import Ranks, end_with_parent
from trainer.errors import LceError


@dataclass(frozen=True)
class _CommandJob(Job):
    argv: tuple[str, ...] = ()

    @property
    def program(self) -> list[str]:
        # One word of JSON: torchrun's own parser trips over options of ours that begin like its own.
        return ["-m", "tools.parallel", json.dumps(self.argv)]


def on_ranks_already() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ


def start_ranks(argv: Sequence[str], nproc: int) -> int:
    """Run ``lce WORDS`` on ``nproc`` processes of this machine; returns their exit status.

    Raises:
        LceError: ``nproc`` < 1.
    """
    from launch import torchrun

    if nproc < 1:
        raise LceError(f"--nproc {nproc}: at least 1")
    return torchrun.run(_CommandJob(Path(), nproc=nproc, argv=tuple(argv)))


@contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """Errors that all ranks raise together are printed by rank 0 alone; the others leave with the same exit status.

    Raises:
        SystemExit: on the other ranks, status 2.
    """
    try:
        yield
    except LceError:
        if ranks.is_main:
            raise
        raise SystemExit(2) from None


if __name__ == "__main__":
    from tools.cli import main

    end_with_parent()

    sys.exit(main(json.loads(sys.argv[1])))
