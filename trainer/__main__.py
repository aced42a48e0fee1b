"""One rank of a run, what every launcher starts: ``python -m trainer CONFIG [key=value …]``.

Alone it trains in one process; under torchrun (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT) it is one of many. Exit status: see :mod:`trainer.run.watch`.
"""

import argparse
import atexit
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

if __name__ == "__main__":  # until the loop watches for signals there is nothing to save: Ctrl-C ends it at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from trainer.distributed import end_with_parent, launched_by, process_group
from trainer.errors import (
    DIVERGED,
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PEER,
    EXIT_TERMINATED,
    EXIT_USAGE,
    BrokenRunError,
    LceError,
    NetworkError,
    TrainingError,
    refused_by_system,
)
from trainer.run.config import Config, load_config
from trainer.run.watch import is_echo

TIMEOUT_SLACK_SECONDS = 30.0  # collectives give up this long after the watch, which can say who is missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status. A failure inside the run ends the process at once."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="or a further YAML file")
    args = parser.parse_args(arguments)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # torch renames collectives; the oldest supported version has the old names
    if launched_by():
        end_with_parent()
    try:
        config = load_config(args.config, args.overrides)
        return _run(config)
    except LceError as error:
        alike = isinstance(error, NetworkError) and os.environ.get("LOCAL_RANK", "0") != "0"
        return _refuse(error, everywhere=not alike)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(config: Config) -> int:
    from trainer.run.engine import train

    _choose_arithmetic(config)
    timeout = config.run.timeout_seconds + TIMEOUT_SLACK_SECONDS
    with process_group(config.run.device, timeout, config.run.threads) as ranks:
        try:
            summary = train(config, ranks)
        except BaseException as error:
            _end(error)
    if summary.signal == signal.SIGINT:
        return EXIT_INTERRUPTED
    return EXIT_TERMINATED if summary.signal else EXIT_DONE


def _choose_arithmetic(config: Config) -> None:
    """Before CUDA is used: the precision of float32 products; with ``run.deterministic`` the sums of ``index_add_``,
    cuBLAS and cuDNN in an order that does not change, else cuDNN's quickest kernels for the images' one size.
    """
    import torch

    torch.backends.cuda.matmul.fp32_precision = "tf32" if config.train.matmul == "tf32" else "ieee"
    torch.backends.cudnn.benchmark = not config.run.deterministic
    if not config.run.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _refuse(error: LceError, everywhere: bool, status: int = EXIT_USAGE) -> int:
    """One line for wrong input; a problem that all ranks have found together is told by rank 0 alone."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or everywhere:
        what = f"{DIVERGED}{error}" if isinstance(error, TrainingError) else str(error)
        print(f"trainer: {what}" if rank == 0 else f"trainer, rank {rank}: {what}", file=sys.stderr, flush=True)
    return status


def _end(error: BaseException) -> NoReturn:
    """Say why and end the process, without waiting for other ranks that may be gone."""
    notes = getattr(error, "__notes__", [])
    if isinstance(error, KeyboardInterrupt):
        status = EXIT_INTERRUPTED
    elif isinstance(error, LceError):
        broken = isinstance(error, BrokenRunError)
        status = _refuse(
            error, everywhere=bool(notes) or broken, status=EXIT_CRASH if broken else EXIT_USAGE
        )  # notes are of the loop, where ranks fail alone
    elif not notes and (reason := refused_by_system(error)) is not None:
        status = _refuse(LceError(reason), everywhere=True)
    elif notes and is_echo(error):
        status = EXIT_PEER
        print("\n".join(notes), file=sys.stderr, flush=True)
    else:
        status = EXIT_CRASH
        traceback.print_exception(error)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process at once, with everything printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    ended = main()
    if "RANK" in os.environ:
        # DTensor's caches keep the process group, whose threads may still let go of tensors while the interpreter ends;
        # that aborts it (pytorch/pytorch#179291), and a finished run would count as failed.
        atexit._run_exitfuncs()
        _leave(ended)
    sys.exit(ended)
