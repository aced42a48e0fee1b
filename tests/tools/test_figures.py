"""``lce bench figures``: the pictures and the page of a demo, and the slack by its definition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.test_verdict import upgrade
from tests.models.test_export import images
from tools.cli import main
from tools.results import figures
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.bank.from_model import bank_from_model
from trainer.data.index import open_dataset
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.evaluation.results import Options, measure_sets
from trainer.models.card import ModelCard
from trainer.models.folder import save_model
from trainer.models.open import load_model
from trainer.networks import build_backbone
from trainer.networks.config import BackboneConfig


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a demo leaves, as far as it is drawn: data sets, networks of random weights, a bank, figures."""
    folder = tmp_path_factory.mktemp("demo") / "characters" / "seed-0"
    for name, count in (("train", 30), ("unseen", 24)):
        for number, picture in enumerate(images(count)):
            path = folder / "pictures" / name / f"{name}{number % 10}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        pack(list_source(folder / "pictures" / name), folder / "data" / name, PackOptions(size=(32, 32)))
    config = BackboneConfig(name="small", dim=16)
    for seed, role in enumerate(figures.QUERIES):
        torch.manual_seed(seed)
        card = ModelCard(backbone=config, dim=16, image_size=(32, 32))
        save_model(folder / role, build_backbone(config, (32, 32)), card)
    bank_from_model(load_model(folder / "old"), open_dataset(folder / "data/train"), folder / "bank")
    options = Options(fars=(1e-2,), replicates=20, backfill_images=400)
    result = measure_sets([upgrade(1.0)], options) | {"provenance": {"commit": "abc123"}}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return folder


def test_a_demo_becomes_a_page_with_three_pictures(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "figures.md"
    before = sorted(path.name for path in demo.iterdir())
    assert main(["bench", "figures", str(demo), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "A demo of commit abc123, drawn by commit " in text
    assert "lce bench figures demo/characters/seed-0" in text
    assert "8 of 60 identities" in text
    assert "There lie 100.0% of the old model's own embeddings" in text
    for name in ("space", "slack", "backfill"):
        assert f"](pictures/figures-{name}.png)" in text
        with Image.open(out.parent / "pictures" / f"figures-{name}.png") as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    assert sorted(path.name for path in demo.iterdir()) == before


def test_the_slack_is_the_cosine_to_the_old_centre_less_the_boundary(demo: Path) -> None:
    models = {role: load_model(demo / role) for role in figures.QUERIES}
    dataset, bank = open_dataset(demo / "data/train"), CenterBank.open(demo / "bank")
    found = figures.slack(models, dataset, bank)
    old = models["old"].embed(np.stack([dataset.decode(i) for i in range(len(dataset))])).astype(np.float64)
    new = models["new"].embed(np.stack([dataset.decode(i) for i in range(len(dataset))])).astype(np.float64)
    labels = np.asarray(dataset.labels)
    for i, j in enumerate(labels):
        center = old[labels == j].mean(0) / np.linalg.norm(old[labels == j].mean(0))
        boundary = (old[labels == j] @ center).min()
        assert found["new"][i] == pytest.approx(new[i] @ center - boundary, abs=1e-5)
    assert len(figures.slack(models, dataset, bank, images=7)["new"]) == 7


def test_a_demo_that_is_not_finished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "figures", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    assert "no finished demo (evaluation.json is missing); run `lce demo` first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
