"""The run folder: its configuration, what changed since the last start, and the summary that marks it as finished."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.checkpoint_folder import list_checkpoints
from trainer.config import Section
from trainer.distributed import Ranks, launched_by, on_main
from trainer.errors import ConfigError
from trainer.files import write_text
from trainer.owner import owned
from trainer.reading import read_json, read_yaml
from trainer.run.config import Config, dump_config
from trainer.run.idle import without_idle
from trainer.run.watch import ranks_left
from trainer.seals import unsealed

SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunSummary:
    """How a call of :func:`train` ended.

    Attributes:
        status: ``finished``, or ``interrupted`` with a checkpoint; the same call continues.
        signal: the signal that interrupted, else 0.
        dir: the run folder.
        step: updates made in all; ``steps`` is how many the run has.
        skipped_steps: updates left out because loss or gradients were not finite.
        seconds: wall time of this process's part.
        last: the last logged line.
        head: ``eager``, where torch.compile failed on some rank and the head's work ran uncompiled.
        bad_records: damaged records that any rank met in this part, each replaced by a sound one.
    """

    status: Literal["finished", "interrupted"]
    signal: int
    dir: str
    step: int
    steps: int
    skipped_steps: int
    seconds: float
    last: dict[str, Any]
    bad_records: int = 0
    head: str = ""


@contextmanager
def owned_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """One run owns its folder: rank 0 holds the lock, and all ranks raise what it meets.

    Raises:
        ConfigError: another run owns it; its process is named.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(owned(folder, ConfigError, lock=folder / ".owner", launcher=launched_by()))

        on_main(enter, ranks)
        yield


def open_folder(config: Config, sealed: dict[str, Any] | None = None) -> list[str]:
    """Make the run folder, keep the resolved configuration, and forget what an earlier attempt left: the notes of its
    ranks, and the summary of fewer updates, which a launcher would believe.

    Args:
        sealed: the configuration in the checkpoint that the run continues from; None: it starts. config.yaml is for
            people, who may have edited it.

    Returns:
        What has changed in the configuration since the last start, for people.
    """
    try:
        folder = config.run.dir
        changes = changes_since(folder / "config.yaml" if sealed is None else sealed, config)
        (folder / "ranks").mkdir(parents=True, exist_ok=True)
        for status in (folder / "ranks").iterdir():
            status.unlink()
        (folder / SUMMARY).unlink(missing_ok=True)
        write_text(folder / "config.yaml", dump_config(config))
        return changes
    except OSError as error:
        raise ConfigError(f"run.dir = {config.run.dir}: cannot be written: {error.strerror}") from None


def changes_since(before: Path | dict[str, Any], config: Config, common: bool = False) -> list[str]:
    """The settings that differ from those ``before`` (a config.yaml, or what one holds), as ``key: old → new``;
    ``common``: only those that both have (another version may know other keys). A key that is missing there, and that
    has its default now, is no difference: a later version added it."""
    if isinstance(before, Path):
        if not before.exists():
            return []
        before = read_yaml(before, ConfigError) or {}
    tree, _ = without_idle(before, every=True)
    old = flat(tree)
    new = flat(yaml.safe_load(dump_config(config)))
    added = {key for key in new.keys() - old.keys() if _is_default(config, key)}
    keys = sorted(old.keys() & new.keys() if common else (old.keys() | new.keys()) - added)
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _is_default(config: Config, key: str) -> bool:
    """Whether a dotted key of the resolved configuration has its default."""
    section: Any = config
    *sections, last = key.split(".")
    for name in sections:
        section = next(iter(config.methods), None) if name == "compat" else getattr(section, name, None)
    known = type(section).model_fields.get(last) if isinstance(section, Section) else None
    return known is not None and getattr(section, last) == known.get_default(call_default_factory=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's sections as dotted keys: ``{"data": {"path": p}}`` → ``{"data.path": p}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def is_finished(folder: Path, since: float) -> bool:
    """Whether a run has come to its end: it has a summary, none of its ranks is in the loop since ``since`` (seconds of
    the epoch), and no checkpoint is of a later step (of a run that was continued for more updates)."""
    try:
        summary = read_summary(folder, 0)
    except ConfigError:
        return False
    if summary is None or ranks_left(folder, since):
        return False
    saved = list_checkpoints(folder / "checkpoints")
    return not saved or int(saved[-1].name.removeprefix("step-")) <= summary.step


def has_saved(folder: Path, since: float) -> bool:
    """Whether a run has a checkpoint that was completed after ``since`` (seconds of the epoch)."""
    return any(path.stat().st_mtime >= since for path in list_checkpoints(folder / "checkpoints"))


def read_summary(folder: Path, steps: int) -> RunSummary | None:
    file = folder / SUMMARY
    if not file.exists():
        return None
    try:
        summary = RunSummary(**unsealed(read_json(file, ConfigError), file, ConfigError))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{file}: not a summary of a run: {error}; remove it to continue the run") from None
    return summary if summary.step >= steps else None
