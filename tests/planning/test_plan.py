"""The plan as a user gets it: memory, advice, time, the simulation of many ranks, and ``lce plan`` itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.cli import main
from tools.plan import _within_gpus
from tools.plan_verify import CASES, case_setting, verify
from trainer.compat.methods.config import LceDirectConfig
from trainer.errors import ConfigError
from trainer.planning.backbones import backbone_sizes
from trainer.planning.memory import Part, peak_bytes
from trainer.planning.plan import _on_host, changes_to_fit, holds, make_plan, ranks_to_fit
from trainer.planning.setting import Setting
from trainer.planning.simulation import fake_ranks, simulate
from trainer.run.config import parse_config

GIB = 2**30


def setting(classes: int = 1_000_000, world: int = 8, device: Any = "cuda", **sections: dict[str, Any]) -> Setting:
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "data": {"loader": "synthetic", "batch_size": 128 * world},
        "backbone": {"name": "small", "dim": 512},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Setting(parse_config(tree, "test"), classes, (112, 112), world, device, records=1_000_000)


def parts(plan: Any) -> dict[str, int]:
    return {part.name: part.bytes for part in plan.memory}


def test_tables_are_exact() -> None:
    found = parts(make_plan(setting(29_000_000)))
    rows = -(-29_000_000 // 8)
    assert found["rows"] == found["rows' optimizer state"] == rows * 512 * 4
    half = setting(29_000_000, head={"rows": "bfloat16", "sample_rate": 0.1, "optimizer": {"name": "adamw"}})
    found = parts(make_plan(replace(half, bank_dim=512, config=with_lce(half))))
    assert found["rows"] == rows * 512 * 2
    assert found["rows' optimizer state"] == rows * (2 * 512 * 2 + 4)
    assert found["old centres"] == rows * (512 * 4 + 5)


def test_tables_without_momentum_and_in_float8() -> None:
    """Of one H200: 100 million classes in float8."""
    rows, none = -(-29_000_000 // 8), {"optimizer": {"momentum": 0.0}}
    found = parts(make_plan(setting(29_000_000, head=none)))
    assert (found["rows"], "rows' optimizer state" in found) == (rows * 512 * 4, False)
    short = make_plan(setting(29_000_000, head={"rows": "float8", **none}))
    assert (parts(short)["rows"], "rows' optimizer state" in parts(short)) == (rows * (512 + 4), False)
    kept = parts(make_plan(setting(29_000_000, head={"rows": "float8", "rows_residual": True, **none})))
    assert kept["rows"] == rows * (3 * 512 + 4)
    one = setting(100_000_000, world=1, head={"rows": "float8", "sample_rate": 0.1, **none})
    room = holds(make_plan(one), 139 * GIB)
    for classes, changed in (
        (room.classes, one),
        (room.lce, replace(one, config=with_lce(one), bank_dim=512)),
        (room.lce_on_host, _on_host(replace(one, config=with_lce(one), bank_dim=512))),
    ):
        assert classes is not None
        assert make_plan(replace(changed, num_classes=classes)).device_bytes <= 139 * GIB
        assert make_plan(replace(changed, num_classes=classes + 1)).device_bytes > 139 * GIB
    assert room.lce_on_host is not None
    assert room.lce < 100_000_000 < room.lce_on_host < room.classes
    all_rows = setting(1, world=1, head={"rows": "float8", **none})
    assert holds(make_plan(all_rows), 8 * GIB).lce_on_host is None


def test_lce_plan_says_what_an_h200_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--classes", "100e6", "--rows", "float8", "--gpus", "1", "--json", "-"]) == 0
    held = json.loads(capsys.readouterr().out)["holds"]
    assert held["classes"] > 100_000_000
    assert held["lce"] > 50_000_000
    assert main(["plan", "--classes", "100e6", "--rows", "float8", "--memory", "H200"]) == 0
    out = capsys.readouterr().out
    assert f"would hold {held['classes']:,} classes" in out
    assert f"with LCE's centres: {held['lce']:,}" in out
    assert main(["plan", "--classes", "1000", "--rows", "float8", "head.optimizer.momentum=0.9"]) == 2
    assert "without momentum" in capsys.readouterr().err


def with_lce(one: Setting) -> Any:
    return one.config.model_copy(update={"compat": (LceDirectConfig(bank=Path("bank")),)})


def test_activations_are_what_autograd_keeps() -> None:
    """Two linear layers with tanh between: the input of each, and tanh's result, which is the second's input."""
    from tests.runs import config

    sizes = backbone_sizes(config(Path("unused"), train__precision="float32"), (8, 8), 5)
    assert sizes.parameters == 192 * 24 + 24 + 24 * 6 + 6
    assert sizes.saved_bytes == 5 * 24 * 4  # the images are counted separately
    assert sizes.buffers == sizes.fixed == 0


def test_recomputation_and_bfloat16_keep_less() -> None:
    def kept(**train: Any) -> int:
        return backbone_sizes(setting(backbone={"name": "iresnet18"}, train=train).config, (112, 112), 8).saved_bytes

    whole = kept()
    assert kept(activation_checkpointing=True) < 0.4 * whole
    assert 0.4 * whole < kept(precision="bfloat16") < 0.65 * whole


def test_the_largest_moment_counts_once() -> None:
    made = [Part("a", 10), Part("b", 5, "step"), Part("c", 7, "load"), Part("d", 3, on_host=True)]
    assert peak_bytes(made) == 17
    assert peak_bytes(made, on_host=True) == 3


def test_more_ranks_until_it_fits() -> None:
    one = setting(10_000_000, world=1)
    ranks = ranks_to_fit(one, 24 * GIB)
    assert ranks is not None
    assert make_plan(replace(one, world_size=ranks)).device_bytes <= 24 * GIB
    assert make_plan(replace(one, world_size=ranks - 1)).device_bytes > 24 * GIB
    assert ranks_to_fit(one, GIB // 4) is None


def test_advice_says_what_fits() -> None:
    plan = make_plan(setting(29_000_000, world=2))
    changes = changes_to_fit(plan, 40 * GIB)
    by_words = {change.text: change for change in changes}
    half = by_words["rows in bfloat16 (head.rows=bfloat16)"]
    assert half.fits
    assert half.peak_bytes < plan.device_bytes - 25 * GIB
    assert all(change.peak_bytes < plan.device_bytes for change in changes)
    assert any(change.text.startswith("at least") and change.fits for change in changes)


def test_old_centres_move_to_the_host() -> None:
    sampled = {"sample_rate": 0.1}
    one = setting(29_000_000, compat={"method": "lce", "bank": "unused"}, head=sampled)
    plan = make_plan(replace(one, bank_dim=512))
    centers, classes = parts(plan)["old centres"], -(-29_000_000 // 8)
    words = "old centres in host memory (compat.centers=host)"
    change = next(c for c in changes_to_fit(plan, 1) if c.text == words)
    # a step's rows come to the device for both passes, a boundary and a mask for each class stay there
    assert centers - (plan.device_bytes - change.peak_bytes) == one.step_rows * 512 * 4 + 5 * classes
    moved = setting(29_000_000, compat={"method": "lce", "bank": "unused", "centers": "host"}, head=sampled)
    assert make_plan(replace(moved, bank_dim=512)).host_bytes == plan.host_bytes + centers


def test_a_frozen_old_classifier_is_planned_and_repeated_images_make_no_longer_epochs() -> None:
    bct = setting(29_000_000, compat={"method": "bct", "bank": "unused"}, head={"rows": "bfloat16"})
    found = parts(make_plan(replace(bct, bank_dim=512)))
    assert found["old classifier's rows"] == -(-29_000_000 // 8) * 512 * 2
    assert "old centres" not in found
    once, again = (make_plan(setting(train={"epochs": 2}, data={"repeat": r})).updates for r in (1, 4))
    assert once == again == 2 * -(-1_000_000 // 1024)


def test_time_and_checkpoint() -> None:
    plan = make_plan(setting(train={"epochs": 2}, data={"batch_size": 1000}))
    assert plan.updates == 2000
    assert plan.hours(5000) == pytest.approx(2000 * 1000 / 5000 / 3600)
    assert plan.link_seconds(100) == pytest.approx(plan.sent_bytes * 8 / 100e9)
    network = plan.backbone.parameters * 2 + plan.backbone.buffers
    assert plan.checkpoint_bytes == 1_000_000 * 512 * 4 * 2 + network * 4


@pytest.mark.parametrize("maps", [False, True])
def test_a_real_checkpoint_is_as_large_as_planned(maps: bool, tmp_path: Path) -> None:
    from tests.banks import write_bank
    from tests.runs import config
    from trainer.compat.bank.center_bank import BankInfo
    from trainer.distributed import Ranks
    from trainer.run.engine import train

    changes = {"data__synthetic_classes": 5000, "backbone__dim": 64, "train__steps": 1, "head__rows": "float32"}
    if maps:  # more numbers than the rows
        wide = {"compat__transform": {"name": "mlp", "hidden": 4096}, "compat__mode": "both"}
        changes |= {"compat__method": "lce", "compat__bank": str(tmp_path / "bank"), "train__ema": 0.9, **wide}
        of_all = {"boundaries": torch.ones(5000), "counts": torch.ones(5000).long(), "mask": torch.ones(5000).bool()}
        centers = torch.nn.functional.normalize(torch.randn(5000, 64))
        write_bank(tmp_path / "bank", centers=centers, info=BankInfo(model="old"), **of_all)
    one = config(tmp_path / "run", **changes)
    train(one, Ranks())
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    setting = Setting(one, 5000, (8, 8), 1, "cpu", 64 if maps else None)
    assert on_disk == pytest.approx(make_plan(setting).checkpoint_bytes, rel=0.02)


def test_512_ranks_are_simulated() -> None:
    found = simulate(setting(29_000_000), 512)
    assert found.problems == ()
    assert found.owned == (56641, 56449, 0)
    assert found.samples == (2, 2)
    assert found.ranks == (0, 511)
    assert len(found.collectives) == 5


def test_a_simulation_finds_ranks_without_classes() -> None:
    found = simulate(setting(100, world=4), 60)
    assert found.owned == (2, 2, 10)
    assert "10 of 60 ranks would own no class" in found.problems[0]
    assert "start 50 ranks" in found.problems[0]
    assert found.collectives == ()


def test_a_simulation_finds_other_bytes_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.planning import traffic

    monkeypatch.setattr(traffic, "_softmax", lambda setting: [])
    found = simulate(setting(1000), 4)
    assert any("other bytes than planned" in problem for problem in found.problems)


@pytest.mark.parametrize(("mode", "transform"), [("backward", "rbt"), ("both", "mlp"), ("forward", "linear")])
def test_maps_are_simulated(mode: str, transform: str) -> None:
    compat = {"method": "lce", "bank": "unused", "mode": mode, "transform": {"name": transform}}
    small = setting(1000, compat=compat, backbone={"dim": 24})
    assert simulate(replace(small, bank_dim=16), 4).problems == ()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"compat": {"method": "bct", "bank": "unused"}}, "compat.method = bct"),
        ({"train": {"parallel": "zero2"}}, "train.parallel = zero2 cannot be simulated, only ddp or fsdp"),
        ({"train": {"sync_batchnorm": True}}, "train.sync_batchnorm = true"),
    ],
)
def test_what_cannot_be_simulated_is_said(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(setting(1000, **sections), 4)


def test_a_simulation_within_a_job_is_refused() -> None:
    with fake_ranks(1, 3), pytest.raises(ConfigError, match="outside of a job"):
        simulate(setting(1000), 4)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_verify_measures_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.planning import memory

    (row,) = verify([case_setting(20_000, 0.1, 2, "cpu", ["backbone.dim=64"])])
    assert row["ok"], row
    monkeypatch.setattr(memory, "PROCESS_BYTES", 2 * memory.PROCESS_BYTES)
    planned = make_plan(case_setting(20_000, 0.1, 2, "cpu", ["backbone.dim=64"])).device_bytes
    assert planned > 1.1 * row["measured_bytes"]


def test_triton_takes_memory_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.planning import memory

    planned = []
    for found in (None, object()):
        monkeypatch.setattr(memory, "find_spec", lambda name, found=found: found)
        planned.append(make_plan(case_setting(20_000, 0.1, 2, "cpu", [])).device_bytes)
    assert planned[1] - planned[0] == memory.TRITON_BYTES


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--classes", "2e6", "--gpus", "4", "--backbone", "r18", "--batch", "16", "--image-size", "32"]
    assert main([*words, "--memory", "80GiB", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["fits"]
    assert figures["backbone"] == "iresnet18"
    assert figures["batch"] == 64
    assert main([*words, "--memory", "2GB", "--link-gbps", "10", "--samples-per-second", "900", "--simulate", "6"]) == 1
    text = capsys.readouterr().out
    assert "does NOT fit" in text
    assert "ms an update" in text
    assert "nothing is wrong" in text
    assert main(["plan", "head.sample_rate=2", "--classes", "100"]) == 2
    assert "head.sample_rate" in capsys.readouterr().err
    assert main(["plan"]) == 2


@pytest.mark.parametrize(
    "words",
    [
        "--classes inf",
        "--classes nan",
        "--classes 2.5",
        "--classes 1e30",
        "--link-gbps 0",
        "--link-gbps -4",
        "--link-gbps inf",
        "--samples-per-second 0",
        "--samples-per-second -1",
        "--lce 0",
        "--lce -2",
        "--image-size 0",
        "--gpus 0",
        "--verify --gpus 0",
        "--simulate 0",
        "--batch 0",
        "--dim 0",
        "--records 0",
        "--memory 0GiB",
        "--memory 80",
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *([] if "--classes" in words else ["--classes", "100"]), *words.split()])
    assert stopped.value.code == 2
    assert f": {words.split()[-1]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["head.sample_rate=["], "is no readable YAML"),
        (["head.sample_rate=2026-13-45"], "is no readable YAML"),
        (["--verify", "head.sample_rate=["], "is no readable YAML"),
        (["--gpus", "101"], "101 ranks for 100 classes"),
        (["--verify", "--gpus", "101"], "101 ranks for 100 classes"),
        (["--lce", "256", "--dim", "512"], "use backbone.dim=256"),
        (["--verify", "--rate", "0"], "sample_rate"),
        (["compat.method=lce", "compat.mode=cross-model"], "backbone.name belongs to runs that train a network"),
    ],
)
def test_what_training_would_refuse_is_refused(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--classes", "100", "--backbone", "small", "--image-size", "32", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1


def test_centres_of_another_dimension_are_planned_through_maps(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--classes", "100", "--backbone", "small", "--image-size", "32", "--dim", "512", "--lce", "256"]
    assert main([*words, "compat.mode=backward"]) == 0
    assert "old centres" in capsys.readouterr().out


def test_verifying_on_gpus_needs_as_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["plan", "--verify", "--device", "cuda"]) == 2
    assert "needs 1 GPU(s), torch sees 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["plan", "--verify", "--device", "cuda", "--classes", "100", "--gpus", "2"]) == 2
    assert "needs 2 GPU(s), torch sees 1" in capsys.readouterr().err
    assert _within_gpus(CASES) == tuple(case for case in CASES if case[2] == 1)


def test_a_recipe_without_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {dir: runs/x}\ndata: {path: not-there}\nbackbone: {name: small, dim: 64}\n")
    assert main(["plan", str(path)]) == 2
    assert "--classes" in capsys.readouterr().err
    assert main(["plan", str(path), "--classes", "1000", "--image-size", "32", "train.steps=7", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 7


@pytest.mark.parametrize(
    ("steps", "every", "kept", "most"), [(60, 0, 1, 1), (60, 100, 1, 1), (60, 30, 2, 2), (60, 20, 3, 3), (60, 10, 3, 4)]
)
def test_the_newest_checkpoint_is_written_before_the_oldest_goes(steps: int, every: int, kept: int, most: int) -> None:
    given = {
        "run": {"dir": "run"},
        "data": {"path": "data"},
        "train": {"steps": steps},
        "checkpoint": {"keep": 3, "every_steps": every},
    }
    plan = make_plan(Setting(parse_config(given, "given"), 1000, (112, 112), 1, "cpu"))
    assert (plan.kept_checkpoints, plan.most_checkpoints) == (kept, most)


def test_what_is_assumed_is_marked_and_all_kept_checkpoints_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--classes", "1000", "--backbone", "small", "--dim", "8", "checkpoint.keep=3", "train.steps=5000"]
    assert main([*words, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kept_bytes"] == 3 * figures["checkpoint_bytes"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "3 kept at the end: " in out
    assert "(assumed: 100,000 records)" in out
    assert main([*words, "--records", "5000"]) == 0
    assert "assumed: " not in capsys.readouterr().out.split("updates:")[1]


def test_an_old_model_that_is_run_along_is_said_not_to_be_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        str(Path(__file__).parents[2] / "configs" / "base.yaml"),
        "run.dir=x",
        "data.loader=synthetic",
        "data.synthetic_classes=100",
    ]
    assert main([*words, "compat.method=l2", f"compat.old_model={tmp_path / 'old'}"]) == 0
    assert f"not counted: {tmp_path / 'old'}, which is run along" in capsys.readouterr().out
