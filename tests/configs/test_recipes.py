"""Every recipe and every upgrade in configs/ loads, and `lce launch --dry-run` shows what it would start."""

import copy
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import cli
from trainer.compat.methods.config import LceConfig
from trainer.errors import ConfigError
from trainer.networks import BACKBONES
from trainer.run.config import Config, dump_config, load_config, parse_config

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = {"ms1mv3": 1.0, "glint360k": 1.0, "wf42m": 0.2}  # sample rate
NETWORKS = {"r50": "iresnet50", "r100": "iresnet100", "vit-b": "vit_b"}
GPUS = (1, 8, 32, 64)
RECIPES = list(itertools.product(DATA, NETWORKS, GPUS))
UPGRADES = ("class", "data", "loss", "architecture", "dimension", "fine-tune", "chain")


def layers(data: str, network: str, gpus: int) -> list[str]:
    """The files of a recipe."""
    kind = f"vit-{gpus}" if network.startswith("vit") else str(gpus)
    files = (CONFIGS / "data" / data, CONFIGS / "network" / network, CONFIGS / "gpus" / kind)
    return [f"{file}.yaml" for file in files]


def load(data: str, network: str, gpus: int, *more: str) -> Config:
    """A recipe's configuration."""
    first, *rest = layers(data, network, gpus)
    return load_config(first, [*rest, *more])


def nodes(gpus: int) -> list[str]:
    """How a launcher is told of so many GPUs, eight a machine."""
    many = ["--nnodes", str(gpus // 8), "--master", "node0:29500"] if gpus > 8 else []
    return ["--nproc", str(min(8, gpus)), *many]


@pytest.mark.parametrize(("data", "network", "gpus"), RECIPES)
def test_recipe(data: str, network: str, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*layers(data, network, gpus), "run.dir=runs/x", "run.device=cpu"]
    assert cli.main(["launch", *words, *nodes(gpus), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)
    assert re.search(rf"--nproc-per-node[= ]{min(8, gpus)}\b", shown)
    config = load(data, network, gpus)
    assert config.backbone.name == NETWORKS[network]
    assert config.backbone.name in BACKBONES
    assert config.head.sample_rate == DATA[data]
    assert config.data.batch_size % gpus == 0
    images = config.data.batch_size * config.train.accumulate
    if network == "vit-b":  # the same update on any number of GPUs but one: square-root scaling
        assert (config.optimizer.name, config.head.optimizer.name) == ("adamw", "adamw")
        assert images == (24576 if gpus > 1 else 3072)
        assert config.optimizer.lr == pytest.approx(0.001 * (images / 24576) ** 0.5, rel=2e-3)
    else:  # linear scaling
        assert images == 128 * gpus
        assert config.optimizer.lr == pytest.approx(0.1 * images / 1024)


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize(("data", "network"), [("glint360k", "r100"), ("wf42m", "vit-b")])
def test_upgrade(upgrade: str, data: str, network: str, capsys: pytest.CaptureFixture[str]) -> None:
    layer = str(CONFIGS / "upgrade" / f"{upgrade}.yaml")
    words = [*layers(data, network, 8), layer, "run.dir=runs/new", "compat.bank=bank", "run.device=cpu"]
    assert cli.main(["launch", *words, "--nproc", "8", "--dry-run"]) == 0
    assert layer in capsys.readouterr().out
    config, plain = load(data, network, 8, layer), load(data, network, 8)
    assert isinstance(config.methods[0], LceConfig)
    assert config.methods[0].bank is not None
    assert config.methods[0].mode == ("both" if upgrade == "dimension" else "direct")
    assert config.head.sample_rate == plain.head.sample_rate
    assert (config.backbone.weights is not None) == (upgrade == "fine-tune")
    assert (config.data.labels is not None) == (upgrade in ("class", "data"))
    assert config.optimizer == plain.optimizer


def test_every_file_is_used_by_a_recipe_or_stands_alone() -> None:
    used = {Path(file).resolve() for recipe in RECIPES for file in layers(*recipe)}
    used |= {CONFIGS / "upgrade" / f"{name}.yaml" for name in (*UPGRADES, "lce")} | {CONFIGS / "data" / "faces.yaml"}
    assert set(CONFIGS.glob("*/*.yaml")) == {path.resolve() for path in used}
    for path in CONFIGS.glob("*.yaml"):
        if path.name != "base.yaml":
            assert load_config(path, ["run.dir=runs/x"]).run.dir == Path("runs/x")


def test_layers_go_over_what_stands_before_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: {dir: runs/a}\ndata: {path: x, batch_size: 4}\noptimizer: {lr: 0.5}\n")
    (tmp_path / "b.yml").write_text("data: {batch_size: 8}\nrun: {seed: 3}\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yml")
    config = load_config(a, ["optimizer.lr=0.25", "data.batch_size=2", b])
    assert (config.data.batch_size, config.optimizer.lr, config.run.seed) == (8, 0.25, 3)
    assert load_config(a, [b, "data.batch_size=2"]).data.batch_size == 2
    with pytest.raises(ConfigError, match="no such file"):
        load_config(a, ["missing.yaml"])
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load_config(a, ["missing"])
    (tmp_path / "whole.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "whole.yaml") == config
    assert parse_config({"run": {"dir": "x"}, "data": {"path": "y"}}, "t").data.batch_size == 128


def test_files_may_stand_behind_options_and_other_words_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = layers("ms1mv3", "r50", 8)
    assert cli.main(["launch", first, "--nproc", "2", *rest, "--dry-run", "run.device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert all(file in shown for file in [first, *rest])
    with pytest.raises(SystemExit):
        cli.main(["launch", first, "--nproc", "2", "gpus"])
    assert "gpus: no such option" in capsys.readouterr().err


@pytest.mark.parametrize(("network", "gpus"), list(itertools.product(NETWORKS, (1, 8, 64))))
def test_recipe_is_planned(network: str, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*layers("wf42m", network, gpus), "run.dir=runs/x"]
    status = cli.main(["plan", *words, "--classes", "2059906", "--gpus", str(gpus), "--memory", "80GiB", "--json", "-"])
    assert status == 0, capsys.readouterr().out  # it fits
    figures = json.loads(capsys.readouterr().out)
    rows = next(item["bytes"] for item in find(figures, "rows"))
    assert rows >= 2059906 // gpus * 512 * 4


def find(tree: object, name: str) -> Iterator[dict[str, Any]]:
    """The entries of a plan with this name, wherever they stand."""
    if isinstance(tree, dict):
        if tree.get("name") == name:
            yield tree
        for value in tree.values():
            yield from find(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from find(value, name)


BEGINNINGS = [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("data/*.yaml")]
"""Files that a recipe begins with. Those of network/, gpus/ and upgrade/ are put over them, whatever these hold."""
TAGS = ("name", "method", "mode", "loader")
"""Which variant a section is may be said: the keys next to it are that variant's."""


def leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a file's values, from the outermost section on."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        elif key != "extends":
            yield (*prefix, key)


def repeated(path: Path, folder: Path) -> list[str]:
    """The values of a file without which its configuration is the same."""
    needed = {("run", "dir"): "runs/x", ("data", "path"): "data/x"}
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "extends" in tree:
        tree["extends"] = str((path.parent / tree["extends"]).resolve())
    found = []
    whole = resolved(tree, needed, folder)
    for keys in leaves(tree):
        shorter = copy.deepcopy(tree)
        section = shorter
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
        if keys not in needed and keys[-1] not in TAGS and resolved(shorter, needed, folder) == whole:
            found.append(".".join(keys))
    return found


def resolved(tree: dict[str, Any], needed: dict[tuple[str, ...], str], folder: Path) -> Config | None:
    """The configuration of a file of this content; None where it is refused."""
    (folder / "file.yaml").write_text(yaml.safe_dump(tree))
    synthetic = tree.get("data", {}).get("loader") == "synthetic"
    overrides = [f"{'.'.join(k)}={v}" for k, v in needed.items() if k[0] == "run" or not synthetic]
    try:
        return load_config(folder / "file.yaml", overrides)
    except ConfigError:
        return None


@pytest.mark.parametrize("path", BEGINNINGS, ids=lambda path: path.stem)
def test_no_recipe_repeats_a_default(path: Path, tmp_path: Path) -> None:
    assert repeated(path, tmp_path) == []


def test_a_repeated_default_is_seen(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("optimizer: {lr: 0.1, momentum: 0.8}\nhead: {margin: {name: cosface, m: 0.3}}\n")
    assert repeated(tmp_path / "own.yaml", tmp_path) == ["optimizer.lr"]
