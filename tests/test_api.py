"""What `import trainer` offers, called with arguments of other types: one line that names the argument."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import trainer
from tests.data.samples import packed
from trainer.errors import ConfigError, LceError
from trainer.models.card import ModelCard
from trainer.models.folder import save_model
from trainer.networks import build_backbone
from trainer.networks.config import BackboneConfig


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainer.train("s.yaml"), "`config` 's.yaml': expected a configuration, as trainer.load_config(FILE)"),
        (lambda: trainer.train({"run": {"dir": "x"}}), "`config` {'run': {'dir': 'x'}}: expected a configuration"),
        (lambda: trainer.load_config(None), "`path` None: expected the path of a YAML file"),
        (lambda: trainer.load_config(""), "`path` '': expected the path of a YAML file"),
        (lambda: trainer.load_config({"run": 1}), "`path` {'run': 1}: expected the path of a YAML file"),
        (lambda: trainer.load_config("s.yaml", "run.dir=x"), "s.yaml: "),
        (lambda: trainer.load_model(3), "`path` 3: expected the path of a model"),
        (lambda: trainer.load_model(b"m"), "`path` b'm': expected the path of a model"),
        (lambda: trainer.open_dataset(None), "`path` None: expected the path of a data set"),
        (lambda: trainer.open_dataset("d", 5), "`labels` 5: expected the path of a label table"),
        (lambda: trainer.embed(torch.nn.Linear(2, 2), "d"), "`model` Linear(in_features=2, out_features=2, bias=True)"),
        (lambda: trainer.make_bank("m", "d", None), "`path` None: expected the folder of the bank to be"),
        (lambda: trainer.make_bank("m", "d", "b", centers="c"), "`centers` 'c': expected an open bank"),
        (lambda: trainer.evaluate("m", "n", "path"), "`data` 'path': expected names and data sets, such as {'mine':"),
        (lambda: trainer.evaluate("m", "n", {}), "`data` is empty"),
        (lambda: trainer.evaluate("m", "n", {1: "d"}), "`data` {1: 'd'}: expected texts as names of the sets, not 1"),
        (lambda: trainer.evaluate("m", "n", {"a": "d"}, fars=0.01), "`fars` 0.01: expected false accept rates such as"),
        (lambda: trainer.evaluate("m", "n", {"a": "d"}, fars="1e-2"), "`fars` '1e-2': expected false accept rates"),
        (lambda: trainer.evaluate("m", "n", {"a": "d"}, fars=["1e-2"]), "`fars` ['1e-2']: expected false accept"),
        (lambda: trainer.evaluate("m", "n", {"a": "d"}, seen="a"), "`seen` 'a': expected names of sets"),
        (lambda: trainer.evaluate("m", "n", {"a": "d"}, unseen=[1]), "`unseen` [1]: expected names of sets"),
        (lambda: trainer.evaluate("m", "n", {"a": "d"}, report=1), "`report` 1: expected the path of an .html file"),
        (lambda: trainer.export_onnx("m", "m.onnx", "d", images="16"), "`images` '16': expected how many images"),
        (lambda: trainer.export_onnx("m", None, "d"), "`path` None: expected the path of the .onnx file to be"),
        (lambda: trainer.upgrade_gallery(np.zeros((9, 99)), "m"), "`gallery` of type ndarray: expected the path of a"),
    ],
)
def test_an_argument_of_another_type_is_named_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(LceError) as error:
        call()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_data_set_of_another_type_is_named(tmp_path: Path) -> None:
    config = BackboneConfig(name="small", width=4, dim=4)
    card = ModelCard(backbone=config, dim=4, image_size=(8, 8))
    save_model(tmp_path / "model", build_backbone(config, (8, 8)), card)
    with pytest.raises(ConfigError, match=r"`dataset` of type ndarray: expected the path of a data set, or what"):
        trainer.embed(str(tmp_path / "model"), np.zeros((4, 8, 8, 3)))


def test_texts_and_paths_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(name="small", width=4, dim=4)
    card = ModelCard(backbone=config, dim=4, image_size=(8, 8))
    save_model(tmp_path / "model", build_backbone(config, (8, 8)), card)
    data = packed(tmp_path / "data", classes=4, images=3, size=(8, 8))
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"run": {"dir": "x"}, "data": {"path": str(data)}}))
    assert trainer.load_config(str(file)) == trainer.load_config(file)
    one, other = trainer.embed(str(tmp_path / "model"), str(data)), trainer.embed(tmp_path / "model", data)
    assert (one == other).all()
    kept = str(tmp_path / "rows.npy")
    bank = trainer.make_bank(str(tmp_path / "model"), str(data), str(tmp_path / "bank"), keep_embeddings=kept)
    assert bank.num_classes == 4
    assert np.load(kept).shape == (12, 4)
