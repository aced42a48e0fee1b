"""Look into the checkpoints of a run, verify them, or take the backbone's weights out of one.

  lce checkpoint info runs/mine                     what each checkpoint holds
  lce checkpoint verify runs/mine                   read every byte; status 1 when one is damaged
  lce checkpoint extract runs/mine backbone.safetensors

A run folder means all its checkpoints (extract: the newest); a single step-XXXXXXXX folder is taken as well.
"""

import argparse
import ast
from pathlib import Path
from typing import Any

from tools.output import size_text, write_json
from tools.progress import progress_bars

HELP = "look into checkpoints, verify them, or extract weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce checkpoint``."""
    parser.add_argument("action", choices=("info", "verify", "extract"))
    parser.add_argument("path", type=Path, help="a run folder or one of its checkpoints")
    parser.add_argument("out", type=Path, nargs="?", help="extract: the .safetensors file to write")
    parser.add_argument("--average", action="store_true", help="extract: the moving average instead of the weights")
    parser.add_argument("--json", type=Path, help="also write the figures there; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Do it; 1 when there is damage."""
    from trainer.checkpoint_folder import SEAL, list_checkpoints
    from trainer.errors import CheckpointError

    if (args.path / SEAL).is_file() or args.path.name.startswith("step-"):
        folders = [args.path]
    else:
        folders = list_checkpoints(args.path / "checkpoints")
    if not folders:
        raise CheckpointError(f"{args.path}: no checkpoints in it")
    if args.action == "extract":
        return _extract(folders[-1], args.out, args.average)
    results = [_verify(f) if args.action == "verify" else _whole_info(f) for f in folders]
    _report(results, args.json)
    return 1 if any(result.get("damage") for result in results) else 0


def _whole_info(folder: Path) -> dict[str, Any]:
    from trainer.errors import CheckpointError

    try:
        return _info(folder)
    except CheckpointError as error:
        return {"folder": str(folder), "damage": str(error)}


def _report(results: list[dict[str, Any]], path: Path | None) -> None:

    write_json(results, path)
    if str(path) == "-":
        return
    for result in results:
        print(result["folder"])
        for key, value in result.items():
            if key != "folder" and value not in ({}, "none"):
                print(f"  {_NAMES.get(key, key)}: {_shown(key, value)}")


_NAMES = {"world_size": "ranks", "bytes": "size"}


def _shown(key: str, value: Any) -> str:
    """A value of :func:`_info` for people."""
    if key == "bytes":
        return size_text(value)
    if key == "normalisation" and isinstance(found := ast.literal_eval(value), tuple) and len(found) == 2:
        return "; ".join(f"{name} {', '.join(map(str, of))}" for name, of in zip(("mean", "std"), found, strict=True))
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    return f"{value:,}" if key == "numbers" else str(value)


def _info(folder: Path) -> dict[str, Any]:
    import datetime

    from trainer.checkpoint_folder import INDEX, find_damage, read_seal
    from trainer.errors import CheckpointError

    seal = read_seal(folder)
    damage = find_damage(folder, {INDEX: seal["files"].get(INDEX, [0, 0])})
    if damage is not None:
        raise CheckpointError(damage)
    tensors, numbers = seal.get("tensors") or _count(folder)
    return {
        "folder": str(folder),
        "step": seal["step"],
        "steps": seal["steps"],
        "written": datetime.datetime.fromtimestamp(seal["time"]).isoformat(timespec="seconds"),
        "world_size": seal["world_size"],
        "loader": seal["loader"],
        "figures": seal.get("figures", {}),
        "classes": seal["num_classes"],
        "backbone": seal["config"]["backbone"]["name"],
        "dim": seal["config"]["backbone"]["dim"],
        "tensors": tensors,
        "numbers": numbers,
        "bytes": sum(size for size, _ in seal["files"].values()),
        **seal["identity"],
    }


def _count(folder: Path) -> tuple[int, int]:
    """The tensors of a checkpoint and the numbers in them, by its index: older seals do not say."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from trainer.checkpoint import read_index

    entries = read_index(folder).state_dict_metadata.values()
    sizes = [entry.size.numel() for entry in entries if isinstance(entry, TensorStorageMetadata)]
    return len(sizes), sum(sizes)


def _verify(folder: Path) -> dict[str, Any]:
    from trainer.checkpoint import read_index
    from trainer.checkpoint_folder import find_damage, read_seal
    from trainer.errors import CheckpointError

    damage: str | None = None
    size = 0
    try:
        files = read_seal(folder)["files"]
        read_index(folder)
        with progress_bars() as bars:
            for number, name in enumerate(sorted(files)):
                bars.update(str(folder), number, len(files))
                damage = damage or find_damage(folder, {name: files[name]})
            bars.update(str(folder), len(files), len(files))
        size = sum(entry[0] for entry in files.values())
    except CheckpointError as error:
        damage = str(error)
    return {"folder": str(folder), "bytes": size, "damage": damage}


def _extract(folder: Path, out: Path | None, average: bool) -> int:
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from trainer.checkpoint import load_tensors, read_index
    from trainer.checkpoint_folder import Checkpoint, find_damage, read_seal
    from trainer.errors import CheckpointError, ConfigError
    from trainer.files import replaced
    from trainer.tensor_files import save_tensors

    if out is None or out.suffix != ".safetensors":
        raise ConfigError("lce checkpoint extract: name the .safetensors file to write behind the run folder")
    prefix = "average.backbone." if average else "module.backbone."
    checkpoint = Checkpoint(folder, read_seal(folder))
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in read_index(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    if not state:
        raise CheckpointError(f"{folder}: holds no {prefix.rstrip('.')}")
    damage = find_damage(folder, checkpoint.seal["files"])
    if damage is not None:
        raise CheckpointError(damage)
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out}: the folder {out.absolute().parent} does not exist")
    load_tensors(checkpoint, state)
    with replaced(out, ConfigError) as partial:
        save_tensors({name.removeprefix(prefix): tensor for name, tensor in state.items()}, partial)
    print(f"{out}: {len(state)} tensors of step {checkpoint.step}")
    return 0
