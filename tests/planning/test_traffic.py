"""The plan's bytes against the collectives of real updates on 2 and 3 ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import config
from trainer.distributed import Ranks
from trainer.planning.backbones import backbone_sizes
from trainer.planning.setting import Setting
from trainer.planning.simulation import CollectiveCounter, Updates, totals
from trainer.planning.traffic import Collective, update_traffic
from trainer.run.watch import Vote

CLASSES, SIZE, DIM = 11, 16, 6
PLAIN = {"data__synthetic_classes": CLASSES, "data__synthetic_size": SIZE, "train__steps": 50}
SMALL = PLAIN | {"backbone__name": "small", "train__precision": "float32", "head__rows": "float32"}
BANK, OLD = {"compat__bank": "synthetic"}, {"compat__old_embeddings": "synthetic"}
LCE = BANK | {"compat__method": "lce"}
CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "float64, batch that does not divide": (PLAIN, None),
    "DDP with batch norm": (SMALL | {"data__batch_size": 6}, None),
    "sampled, rows in bfloat16": (SMALL | {"head__sample_rate": 0.5, "head__rows": "bfloat16"}, None),
    "curricular": (SMALL | {"head__margin": {"name": "curricular", "scale": 8}}, None),
    "direct LCE": (SMALL | LCE, DIM),
    "accumulated": (SMALL | {"train__accumulate": 2}, None),
    "compressed gradients": (SMALL | {"train__compress_gradients": True}, None),
    "reference head": (SMALL | {"head__impl": "reference"}, None),
    "reference head, direct LCE": (SMALL | LCE | {"head__impl": "reference"}, DIM),
    "BCT": (SMALL | BANK | {"compat__method": "bct"}, DIM),
    "L2": (SMALL | OLD | {"compat__method": "l2", "train__accumulate": 2}, DIM),
    "MixBCT": (SMALL | BANK | OLD | {"compat__method": "mixbct"}, DIM),
    "FCT": (SMALL | OLD | {"compat__method": "fct", "train__precision": "float64"}, 4),
    "BT²": (SMALL | BANK | OLD | {"compat__method": "bt2"}, 4),
    "rows that stay": (SMALL | BANK | {"compat__method": "frozen"}, DIM),
}
SHARDED = SMALL | {"backbone__name": "iresnet18", "train__parallel": "fsdp", "data__batch_size": 6}


def setting_for(changes: dict[str, Any], bank_dim: int | None, world: int, folder: Path) -> Setting:
    """The plan's view of a run of tests.runs."""
    return Setting(config(folder, **changes), CLASSES, (SIZE, SIZE), world, "cpu", bank_dim)


def counted(ranks: Ranks, folder: Path, cases: list[tuple[dict[str, Any], int | None]]) -> list[list[tuple[str, int]]]:
    """The collectives of the third update of each case (DDP sorts its buckets anew after the first)."""
    torch.set_num_threads(1)
    out = []
    for changes, bank_dim in cases:
        updates, vote = Updates(config(folder, **changes), ranks, bank_dim), Vote()
        for _ in range(2):
            updates.take()
        with CollectiveCounter() as counter:
            updates.take()
            vote.cast(0, 0)
        updates.close()
        out.append(counter.found)
    return out


def planned(setting: Setting) -> list[Collective]:
    return update_traffic(setting, backbone_sizes(setting.config, setting.image_size, setting.local_batch))


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_of_an_update_are_exact(world: int, tmp_path: Path) -> None:
    every = run_ranks(counted, world, tmp_path, [*CASES.values(), (SHARDED, None)])
    for number, (changes, bank_dim) in enumerate([*CASES.values(), (SHARDED, None)]):
        plan = planned(setting_for(changes, bank_dim, world, tmp_path))
        bytes_ = totals([(c.operation, c.count * c.tensor_bytes) for c in plan])
        for found in (results[number] for results in every):
            assert totals(found) == bytes_, changes
            assert len(found) == sum(c.count for c in plan), changes  # these networks fit one bucket of DDP


def test_an_orthogonal_map_adds_no_statistics(tmp_path: Path) -> None:
    """Neither in updates of two ranks nor in the plan: its fixed matrix is the same everywhere."""
    changes = SMALL | LCE | {"compat__mode": "backward", "data__batch_size": 6}
    changes |= {"compat__transform": {"name": "orthogonal"}, "backbone__name": "test_linear"}
    found = run_ranks(counted, 2, tmp_path, [(changes, 8)])[0][0]
    plan = planned(setting_for(changes, 8, 2, tmp_path))
    assert not [one for one in plan if one.purpose == "running statistics"]
    reduces = [(one.operation, one.count * one.tensor_bytes) for one in plan if one.operation == "all-reduce"]
    assert totals([one for one in found if one[0] == "all-reduce"]) == totals(reduces)


BOUNDED: dict[str, tuple[dict[str, Any], int, int]] = {
    "LCE through a map": (LCE | {"compat__mode": "backward"}, 8, 2),
    "the authors' LCE": (LCE | {"compat__authors_formula": True}, DIM, 2),
    "AdvBCT": (BANK | OLD | {"compat__method": "advbct"}, DIM, 3),
}


def test_what_depends_on_the_batch_stays_below_its_bound(tmp_path: Path) -> None:
    cases = [(SMALL | changes | {"data__batch_size": 6}, dim) for changes, dim, _ in BOUNDED.values()]
    for (changes, dim), found, (_, _, number) in zip(
        cases, run_ranks(counted, 2, tmp_path, cases)[0], BOUNDED.values(), strict=True
    ):
        plan = planned(setting_for(changes, dim, 2, tmp_path))
        bound = next(c for c in plan if not c.exact)
        gathers = [size for operation, size in found if operation == "all-gather"]
        assert len(gathers) == number  # the batch, perhaps its old embeddings, and the pairs
        exact = [c.tensor_bytes for c in plan if c.operation == "all-gather" and c.exact]
        pairs = sum(gathers) - sum(exact)
        assert 0 < pairs <= bound.tensor_bytes, changes
        assert len(found) == sum(c.count for c in plan), changes


def test_a_wrong_plan_is_noticed(tmp_path: Path) -> None:
    """The negative control: the bytes of another batch, or of a wider embedding, are not those that were counted."""
    changes, _ = CASES["DDP with batch norm"]
    setting = setting_for(changes, None, 2, tmp_path)
    right = totals([(c.operation, c.tensor_bytes) for c in planned(setting)])
    for wrong in (changes | {"data__batch_size": 8}, changes | {"backbone__dim": DIM + 1}):
        other = replace(setting, config=config(tmp_path, **wrong))
        assert totals([(c.operation, c.tensor_bytes) for c in planned(other)]) != right


def test_what_a_ring_sends() -> None:
    assert Collective("x", "all-gather", 1200).sent_bytes(4) == 900
    assert Collective("x", "reduce-scatter", 1200, count=2).sent_bytes(4) == 1800
    assert Collective("x", "all-reduce", 1200).sent_bytes(4) == 1800
    assert Collective("x", "all-reduce", 1200).sent_bytes(1) == 0


def test_a_single_process_sends_nothing(tmp_path: Path) -> None:
    assert planned(setting_for(SMALL, None, 1, tmp_path)) == []
