"""The errors a user can cause. Each says what is wrong, where (file, key, record) and what to do about it.

Command lines turn an :class:`LceError` into one line on standard error and exit status 2; anything else is a defect of
ours and shows its traceback.
"""

import contextlib
import errno
import os
from collections.abc import Iterator

EXIT_DONE, EXIT_USAGE, EXIT_CRASH, EXIT_PEER, EXIT_TERMINATED, EXIT_INTERRUPTED = 0, 2, 70, 71, 75, 130
"""The exit statuses of a rank; :mod:`trainer.run.watch` says when it ends with which."""


class LceError(Exception):
    """Base of all errors that a user can correct: wrong input, wrong configuration, damaged files."""


class ConfigError(LceError):
    """A configuration that cannot be used: unknown key, wrong value, impossible combination."""


class NetworkError(ConfigError):
    """What a machine's network lacks: all of its ranks find the same, and the first of them tells it."""


class DataError(LceError):
    """A data set that is missing, empty, damaged or at odds with the configuration."""


class MissingDataError(DataError):
    """There is no data set, or no label table, of that name: nothing that could be damaged."""


class OutsideError(DataError):
    """A data set names files outside its folder, which was not allowed."""


class ForeignRecordsError(DataError):
    """A label table, or embeddings by record, of other records than those of the data set."""


class CheckpointError(LceError):
    """A checkpoint that is incomplete, damaged or belongs to another run."""


class CenterBankError(LceError):
    """A centre bank that is incomplete, damaged or does not fit the model or the data set."""


class ModelError(LceError):
    """A model file that is missing, damaged or does not fit what it is used for."""


class BrokenRunError(LceError):
    """A process of the run was killed or failed though nothing is wrong with the input: status 70, and the same command
    continues."""


class TrainingError(LceError):
    """Training that cannot usefully go on: the loss is not finite for too many updates in a row."""


DIVERGED = "training cannot go on: "
"""Stands before a :class:`TrainingError` in a run's output: its status is that of wrong use too."""


_REFUSED = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
    | {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
)


def refused_by_system(error: BaseException) -> str | None:
    """One line for what a file system may refuse anywhere (no rights, no room, a name that is too long), which is no
    defect of ours; None: the error is another."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else "a file"
    return f"{name}: {error.strerror}"


@contextlib.contextmanager
def named(**paths: object) -> Iterator[None]:
    """Put the configuration key that named a file before what is wrong with the file.

    Args:
        paths: what each key says, with two underscores for the point of a nested key; None: nothing. What begins with
            none of them is put down to the first.
    """
    try:
        yield
    except LceError as error:
        text, given = str(error), {key.replace("__", "."): str(path) for key, path in paths.items() if path is not None}
        if not given or text.startswith(tuple(given)):
            raise
        key = next((key for key, path in given.items() if text.startswith(path)), next(iter(given)))
        itself = text.startswith(f"{given[key]}:")  # else a file within it
        raise type(error)(f"{key}{' =' if itself else ':'} {text}") from None


def ranks_text(count: int) -> str:
    """A number of ranks.

    >>> ranks_text(1), ranks_text(1024)
    ('1 rank', '1,024 ranks')
    """
    return "1 rank" if count == 1 else f"{count:,} ranks"


def check_ranks(ranks: int, classes: int) -> None:
    """Refuse more ranks than classes. Raises :class:`ConfigError`."""
    if ranks > classes:
        raise ConfigError(f"{ranks_text(ranks)} for {classes} classes: a rank would own none; start at most {classes}")
