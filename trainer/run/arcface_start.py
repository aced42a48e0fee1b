"""A run of arcface_torch as a start: the rows of its per-rank heads, and the momentum that its optimizer kept.

Its ``checkpoint_gpu_{rank}.pt`` hold the backbone (``state_dict_backbone``, see :mod:`trainer.networks.weights`), this
rank's rows (``state_dict_softmax_fc``) and the state of one SGD over the backbone's parameters and then the rows
(``state_optimizer``). Its momentum is that of torch's SGD, as ours is. Files are read with ``weights_only``.
"""

import re
from pathlib import Path

from torch import Tensor

from trainer.compat.bank.classifiers import open_classifier, rank_files
from trainer.compat.bank.matrices import Rows, load_torch, open_arrays
from trainer.errors import CenterBankError, ModelError

_MOMENTUM = re.compile(r"^state_optimizer\.state\.(\d+)\.momentum_buffer$")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def head_rows(path: Path, num_classes: int, dim: int) -> Rows:
    """The classifier rows (C, D) in a folder of per-rank files, one file, or a run of this project.

    Raises:
        ModelError: missing or damaged files, a missing rank, another class count or dimension.
    """
    try:
        rows = open_classifier([path], num_classes=num_classes).rows
    except CenterBankError as error:
        raise ModelError(str(error)) from None
    if rows.dim != dim:
        raise ModelError(f"head.weights = {path}: rows of dimension {rows.dim}, backbone.dim is {dim}")
    return rows


def head_momentum(path: Path) -> Rows | None:
    """The rows' momentum (C, D) next to them in the per-rank files; None when one of these has none."""
    parts = []
    for file in rank_files(path):
        arrays = open_arrays(file)
        weight = arrays.get("state_dict_softmax_fc.weight")
        numbered = {int(m[1]): array for name, array in arrays.items() if (m := _MOMENTUM.match(name))}
        last = numbered[max(numbered)] if numbered else None
        if weight is None or last is None or last.shape != weight.shape:
            return None
        parts.append(last)
    return Rows(parts, [str(file) for file in rank_files(path)]) if parts else None


def backbone_momentum(path: Path) -> dict[str, Tensor]:
    """name of a backbone's parameter → its momentum, from a ``checkpoint_gpu_{rank}.pt``; empty where it has none.

    The optimizer numbers the parameters in the order of the state dict, which also names the buffers.
    """
    if not path.is_file() or path.suffix == ".safetensors":
        return {}
    try:
        content = load_torch(path)
    except CenterBankError as error:
        raise ModelError(f"backbone.weights: {error}") from None
    if not isinstance(content, dict) or "state_optimizer" not in content or "state_dict_backbone" not in content:
        return {}
    weights, state = content["state_dict_backbone"], content["state_optimizer"]["state"]
    names = [name for name in weights if name.rpartition(".")[2] not in _BUFFERS]
    found = {name: state[number].get("momentum_buffer") for number, name in enumerate(names) if number in state}
    wrong = [n for n, value in found.items() if value is None or value.shape != weights[n].shape]
    if wrong:
        raise ModelError(f"{path}: its optimizer's state does not belong to its backbone (at {wrong[0]})")
    return {name.removeprefix("module."): value for name, value in found.items()}
