"""Models as files: folders and ONNX give back the same embeddings; what does not fit is refused and leaves no file."""

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from tests.data.test_check_and_split import held
from tests.ranks import run_ranks
from tests.run.test_modes import bank, changes_for
from tests.runs import config
from tests.sections import variant
from trainer.compat.bank.center_bank import BankInfo
from trainer.compat.bank.classifiers import open_classifier
from trainer.distributed import Ranks
from trainer.errors import DataError, ModelError
from trainer.evaluation.chain import check_links
from trainer.models.card import Direction, ModelCard, TransformCard, read_card
from trainer.models.folder import save_model
from trainer.models.model import TorchModel, embed_dataset
from trainer.models.onnx import OnnxModel, OnnxTransform
from trainer.models.onnx_export import export_onnx, export_transform
from trainer.models.open import load_model
from trainer.models.program_export import export_folder, export_program
from trainer.networks import build_backbone
from trainer.networks.config import AnyTransform, BackboneConfig
from trainer.networks.transform import build_transform
from trainer.run.engine import train

SIZE, DIM = (32, 32), 16


def images(count: int = 9) -> np.ndarray:
    """Smooth pictures with different colours, (n, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return nn.functional.interpolate(coarse, SIZE, mode="bilinear").permute(0, 2, 3, 1).to(torch.uint8).numpy()


def trained(module: nn.Module) -> nn.Module:
    """Statistics and weights that are no longer those of a new module."""
    torch.manual_seed(4)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and "parametrizations" not in name:
            value.add_(0.1 * torch.randn_like(value))
    return module.eval()


def network() -> nn.Module:
    """The same network at each call."""
    torch.manual_seed(5)
    return trained(build_backbone(BackboneConfig(name="small", dim=DIM), SIZE))


def saved(folder: Path, transform: str | None = None, direction: Direction = "t21", **card: Any) -> TorchModel:
    parts: dict[Direction, TransformCard] = {}
    transforms: dict[Direction, nn.Module] = {}
    if transform is not None:
        dims = (DIM, 24) if direction == "t21" else (24, DIM)
        parts = {
            direction: TransformCard(
                config=variant(AnyTransform, name=transform, blocks=1, paths=2), dim_in=dims[0], dim_out=dims[1]
            )
        }
        transforms = {direction: trained(build_transform(parts[direction].config, *dims))}
    given = ModelCard(
        backbone=BackboneConfig(name="small", dim=DIM), dim=DIM, image_size=SIZE, transforms=parts, **card
    )
    save_model(folder, network(), given, transforms)
    model = load_model(folder)
    assert isinstance(model, TorchModel)
    return model


class Records:
    """A data set in memory, as embed_dataset sees one; record 5 may be damaged."""

    def __init__(self, pixels: np.ndarray, color: str = "RGB", damaged: bool = False) -> None:
        self.pixels, self.damaged = pixels, damaged
        self.info = SimpleNamespace(color=color, image_size=pixels.shape[1:3])

    def __len__(self) -> int:
        return len(self.pixels)

    def decode(self, record: int) -> np.ndarray:
        if self.damaged and record == 5:
            raise DataError("records.rec: record 5 is damaged")
        return self.pixels[record]


def test_a_folder_gives_back_the_network_and_its_preprocessing(tmp_path: Path) -> None:
    card: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.5), "color": "BGR"}
    model = saved(tmp_path / "run" / "model", **card)
    pixels = images()
    bgr = torch.from_numpy(pixels[..., ::-1].copy()).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = normalize(network()((bgr - mean) / std)).detach().numpy()
    np.testing.assert_allclose(model.embed(pixels), expected, atol=1e-6)
    np.testing.assert_allclose(model.embed(pixels[..., ::-1], color="BGR"), expected, atol=1e-6)
    assert np.abs(model.embed(pixels[..., ::-1]) - expected).max() > 1e-3, "wrong colour order must show"
    again = load_model(tmp_path / "run")
    assert (again.hash, again.dim, again.card.color) == (model.hash, DIM, "BGR")
    np.testing.assert_allclose(np.linalg.norm(again.embed(pixels, flip=True), axis=1), 1, atol=1e-6)
    assert np.allclose(again.embed(pixels, flip=True), again.embed(pixels[:, :, ::-1], flip=True), atol=1e-6)


def test_hashes_follow_weights_and_preprocessing_but_not_notes(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", notes="one").hash
    assert saved(tmp_path / "b", notes="two").hash == first
    assert saved(tmp_path / "c", mean=(0.4, 0.4, 0.4)).hash != first
    assert saved(tmp_path / "d", transform="linear").hash != first


@pytest.mark.parametrize("normalisation", ["inside", "outside"])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_onnx_gives_the_same_embeddings(tmp_path: Path, normalisation: Any, color: str) -> None:
    model = saved(tmp_path / "model", color=color, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.5))
    path = tmp_path / "model.onnx"
    parity = export_onnx(model, path, images(), normalisation=normalisation)
    assert parity.largest_difference < 1e-5
    assert parity.smallest_cosine > 0.99999
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.onnx"]
    loaded = load_model(path)
    assert isinstance(loaded, OnnxModel)
    for count in (1, 4, 9):
        np.testing.assert_allclose(loaded.embed(images()[:count]), model.embed(images()[:count]), atol=1e-5)
    np.testing.assert_allclose(loaded.embed(images()[..., ::-1], color="BGR"), model.embed(images()), atol=1e-5)
    first = [node.name for node in onnx.load(path).graph.node[:8]]
    named = (any(n.startswith("Sub") for n in first), any(n.startswith("Mul") for n in first))
    assert named == ((True, True) if normalisation == "inside" else (False, False))
    graph = onnx.load(path).graph
    assert len(graph.input) == len(graph.output) == 1
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim][1:] == [3, *SIZE]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("transform", ["rbt", "linear", "orthogonal", "mlp"])
def test_transformations_in_folders_and_as_onnx(tmp_path: Path, transform: str) -> None:
    backward = saved(tmp_path / "backward", transform)
    old_space = backward.transform("t21", backward.embed(images()))
    assert old_space.shape == (9, 24)
    parity = export_onnx(backward, tmp_path / "old.onnx", images(), direction="t21")
    assert parity.largest_difference < 1e-5
    composed = load_model(tmp_path / "old.onnx")
    assert composed.dim == 24
    np.testing.assert_allclose(composed.embed(images()), old_space, atol=1e-5)
    forward = saved(tmp_path / "forward", transform, "t12")
    vectors = normalize(torch.randn(7, 24, generator=torch.Generator().manual_seed(1))).numpy()
    assert export_transform(forward, "t12", tmp_path / "t12.onnx", vectors).largest_difference < 1e-5
    alone = OnnxTransform(tmp_path / "t12.onnx")
    assert (alone.dim_in, alone.dim_out) == (24, DIM)
    np.testing.assert_allclose(alone(vectors), forward.transform("t12", vectors), atol=1e-5)
    with pytest.raises(ModelError, match="not a model of images"):
        load_model(tmp_path / "t12.onnx")
    with pytest.raises(ModelError, match="no transformation t12"):
        backward.transform("t12", vectors)
    with pytest.raises(ModelError, match=r"takes vectors \(n, 24\)"):
        forward.transform("t12", vectors[:, 1:])


@pytest.mark.parametrize(("precision", "limit"), [("float16", 0.9999), ("int8", 0.99)])
def test_smaller_precisions_report_their_cosine(tmp_path: Path, precision: Any, limit: float) -> None:
    model = saved(tmp_path / "model")
    whole = export_onnx(model, tmp_path / "float32.onnx", images())
    small = export_onnx(model, tmp_path / "small.onnx", images(), precision=precision)
    assert limit < small.smallest_cosine < 1
    assert small.size_bytes < 0.75 * whole.size_bytes
    loaded = load_model(tmp_path / "small.onnx")
    cosines = (loaded.embed(images()) * model.embed(images())).sum(1)
    assert cosines.min() >= small.smallest_cosine - 1e-6
    first = [node.name for node in onnx.load(tmp_path / "small.onnx").graph.node[:8]]
    assert any(n.startswith("Sub") for n in first)
    assert any(n.startswith("Mul") for n in first)
    with pytest.raises(ModelError, match=r"allowed: smallest cosine 0\.9999999"):
        export_onnx(model, tmp_path / "n.onnx", images(), precision=precision, smallest_cosine=0.9999999)
    assert not (tmp_path / "n.onnx").exists()


def scaled(model: TorchModel, factor: float) -> TorchModel:
    """The model with embeddings ``factor`` times as long."""
    plain = nn.Sequential(model.backbone, nn.Linear(DIM, DIM, bias=False))
    plain[1].weight.data.copy_(factor * torch.eye(DIM))
    return TorchModel(model.card, model.path, model.hash, plain, model.transforms, "cpu")


@pytest.mark.parametrize("direction", [None, "t21"])
def test_float16_files_of_long_embeddings_give_unit_rows(tmp_path: Path, direction: Direction | None) -> None:
    model = saved(tmp_path / "model", "linear")
    long = scaled(model, float(6e4 / np.abs(model.embed(images(), unit=False)).max()))
    assert np.linalg.norm(long.embed(images(), unit=False), axis=1).max() > 65_504, "a norm that float16 does not hold"
    export_onnx(long, tmp_path / "half.onnx", images(), precision="float16", direction=direction)
    rows = OnnxModel.open(tmp_path / "half.onnx").rows(images())
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)


def test_rows_that_are_not_unit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "model")
    rows = OnnxModel.rows
    monkeypatch.setattr(OnnxModel, "rows", lambda self, given: 1.5 * rows(self, given))
    with pytest.raises(ModelError, match=r"the exported file.s embedding of input 0 has norm 1\.5, not 1"):
        export_onnx(model, tmp_path / "m.onnx", images(), precision="float16")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_map_that_gives_zero_vectors_is_not_exported(tmp_path: Path, precision: Any) -> None:
    model = saved(tmp_path / "model", "orthogonal")
    with torch.no_grad():
        model.transforms["t21"].get_parameter("linear.parametrizations.weight.original").mul_(0.9999)  # decay, once
    with pytest.raises(ModelError, match="torch's embedding of input 0 has norm 0, not 1"):
        export_onnx(model, tmp_path / "m.onnx", images(), direction="t21", precision=precision)
    with pytest.raises(ModelError, match="has norm 0"):
        export_transform(model, "t21", tmp_path / "t21.onnx", model.embed(images()))
    with pytest.raises(ModelError, match="has norm 0"):
        export_program(model, tmp_path / "m.pt2", images(), direction="t21")
    with pytest.raises(ModelError, match="has norm 0"):
        export_folder(model, tmp_path / "out", images(), model.card)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_wide_bound_does_not_let_another_direction_pass(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    wrong = TorchModel(model.card, model.path, model.hash, network(), {}, "cpu")
    wrong.embed = lambda given: np.roll(model.embed(given), 1, axis=0)  # type: ignore[method-assign,assignment,misc]
    with pytest.raises(ModelError, match="smallest cosine"):
        export_onnx(wrong, tmp_path / "m.onnx", images(), bound=10.0)


@pytest.mark.parametrize("normalisation", ["inside", "outside"])
def test_torch_export_programs(tmp_path: Path, normalisation: Any) -> None:
    model = saved(tmp_path / "model", "linear", color="BGR", mean=(0.4, 0.5, 0.6))
    parity = export_program(model, tmp_path / "m.pt2", images(), normalisation=normalisation, direction="t21")
    assert parity.largest_difference < 1e-5
    loaded: Any = torch.export.load(tmp_path / "m.pt2").module()
    pixels = torch.from_numpy(images().transpose(0, 3, 1, 2).copy()).float()
    if normalisation == "outside":
        pixels = (pixels / 255 - torch.tensor([0.6, 0.5, 0.4]).view(3, 1, 1)) / 0.5
    for count in (1, 5):
        expected = model.transform("t21", model.embed(images()[:count]))
        np.testing.assert_allclose(loaded(pixels[:count]).detach(), expected, atol=1e-5)
    with pytest.raises(ModelError, match="differs from torch"):
        export_program(model, tmp_path / "n.pt2", images(), bound=-1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt2", "model"]


def test_the_checksums_of_a_program_are_those_of_its_archive(tmp_path: Path) -> None:
    """torch compares none of them; zip's own test finds every damaged entry, so that no seal of ours is needed."""
    export_program(saved(tmp_path / "model"), tmp_path / "m.pt2", images(2))
    whole = (tmp_path / "m.pt2").read_bytes()
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        assert archive.testzip() is None
        entries = [entry for entry in archive.infolist() if entry.file_size]
        places = [whole.index(archive.read(entry), entry.header_offset + 30) for entry in entries]
    for entry, at in list(zip(entries, places, strict=True))[::7]:
        data = bytearray(whole)
        data[at + entry.file_size // 2] ^= 16
        (tmp_path / "n.pt2").write_bytes(data)
        with zipfile.ZipFile(tmp_path / "n.pt2") as archive:
            assert archive.testzip() == entry.filename


def test_folders_with_another_card_hold_the_same_model(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "mlp", "t12")
    card = model.card.model_copy(update={"licence": "Apache-2.0", "figures": {"tar": 0.5}})
    parity = export_folder(model, tmp_path / "out", images(), card)
    assert parity.largest_difference < 1e-6
    again = load_model(tmp_path / "out")
    assert (again.hash, again.card.licence, again.card.figures) == (model.hash, "Apache-2.0", {"tar": 0.5})
    vectors = normalize(torch.randn(3, 24)).numpy()
    assert np.array_equal(again.transform("t12", vectors), model.transform("t12", vectors))


@pytest.mark.parametrize("direction", [None, "t21"])
def test_a_graphs_card_says_what_comes_out_of_it(tmp_path: Path, direction: Direction | None) -> None:
    model = saved(tmp_path / "model", "linear", licence="MIT", mode="backward", compatible_with_hash="abc")
    export_onnx(model, tmp_path / "m.onnx", images(), direction=direction)
    export_program(model, tmp_path / "m.pt2", images(), direction=direction)
    extra = {"model.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    for card in (load_model(tmp_path / "m.onnx").card, read_card(extra["model.json"], "m.pt2")):
        assert card.transforms == {}
        assert (card.dim, card.left_out) == ((DIM, ("t21",)) if direction is None else (24, ()))
        assert (card.licence, card.mode, card.compatible_with_hash) == ("MIT", "backward", "abc")
    assert load_model(tmp_path / "model").card.left_out == ()


def test_an_export_has_one_owner(tmp_path: Path) -> None:
    """A model and its identities are two files: those of two exports at once would not belong together."""
    model = saved(tmp_path / "model")
    with held(tmp_path / ".m.onnx.owner"), pytest.raises(ModelError, match="in use by"):
        export_onnx(model, tmp_path / "m.onnx", images())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_check_leaves_no_file_and_keeps_the_earlier_one(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    with pytest.raises(ModelError, match="differs from torch"):
        export_onnx(model, tmp_path / "m.onnx", images(), bound=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    export_onnx(model, tmp_path / "m.onnx", images())
    before = (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(ModelError, match="none were given"):
        export_onnx(model, tmp_path / "m.onnx", images()[:0])
    with pytest.raises(ModelError, match="differs"):
        export_onnx(model, tmp_path / "m.onnx", images(), bound=-1.0)
    assert (tmp_path / "m.onnx").read_bytes() == before
    mapped = saved(tmp_path / "mapped", "linear", "t12")
    vectors = torch.randn(3, 24).numpy()
    with pytest.raises(ModelError, match="differs"):
        export_transform(mapped, "t12", tmp_path / "t12.onnx", vectors, bound=-1.0)
    with pytest.raises(ModelError, match="none were given"):
        export_transform(mapped, "t12", tmp_path / "t12.onnx", vectors[:0])
    wrong = TorchModel(model.card, model.path, model.hash, network(), {}, "cpu")
    wrong.embed = lambda given: np.roll(model.embed(given), 1, axis=0)  # type: ignore[method-assign,assignment,misc]
    with pytest.raises(ModelError, match="differs"):
        export_folder(wrong, tmp_path / "folder", images(), model.card)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "mapped", "model"]


def test_what_is_no_usable_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ModelError, match="or no ONNX file"):
        load_model(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "absent.onnx")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="no checkpoint yet"):
        load_model(tmp_path / "run")
    saved(tmp_path / "model")
    with pytest.raises(ModelError, match=r"needs uint8 images \(b, 32, 32, 3\)"):
        load_model(tmp_path / "model").embed(np.zeros((1, 16, 16, 3), np.uint8))
    weights = tmp_path / "model" / "backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"backbone.safetensors: is not what was written"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text('{"dim": 0}')
    with pytest.raises(ModelError, match=r"model\.json: dim"):
        load_model(tmp_path / "model")


def test_a_checkpoint_is_a_model_too_and_its_head_a_classifier(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(run, train__steps=4, train__precision="float32", head__rows="float32"), Ranks())
    finished = load_model(run)
    (run / "model").rename(tmp_path / "kept")
    unfinished = load_model(run)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_allclose(unfinished.embed(pixels), finished.embed(pixels), atol=1e-6)
    assert (unfinished.dim, unfinished.card.step, unfinished.card.classes) == (6, 4, 11)
    classifier = open_classifier([run], num_classes=11)
    assert classifier.rows.read(0, 11).shape == (11, 6)
    newest = max((run / "checkpoints").glob("step-*"))
    data = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match="bytes"):
        load_model(run)


def test_a_checkpoint_of_a_run_with_maps_is_not_compared_without_them(tmp_path: Path) -> None:
    """Its backbone can be had, but to compare it with its old model needs the maps of the finished run."""
    train(config(tmp_path / "old"), Ranks())
    old = load_model(tmp_path / "old")
    changes = changes_for(bank(tmp_path / "bank", 6, BankInfo(model_hash=old.hash)), "backward", "linear")
    train(config(tmp_path / "run", **changes), Ranks())
    check_links({"old": old, "new": load_model(tmp_path / "run")})
    (tmp_path / "run/model").rename(tmp_path / "kept")
    unfinished = load_model(tmp_path / "run")
    assert (unfinished.card.mode, unfinished.card.left_out) == ("backward", ("t21",))
    with pytest.raises(ModelError, match="through t21, which this file does not hold"):
        check_links({"old": old, "new": unfinished})


def test_saving_refuses_a_card_that_does_not_fit_and_foreign_folders(tmp_path: Path) -> None:
    card = ModelCard(backbone=BackboneConfig(name="small", dim=DIM), dim=DIM, image_size=SIZE)
    with pytest.raises(ModelError, match="describes"):
        save_model(tmp_path / "a", network(), card, {"t21": nn.Linear(DIM, DIM)})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ModelError, match="no model folder"):
        save_model(tmp_path / "photos", network(), card)
    model = saved(tmp_path / "m")
    with pytest.raises(ModelError, match="no model folder"):
        export_folder(model, tmp_path / "photos", images(), model.card)
    (tmp_path / "photos.onnx").mkdir()
    with pytest.raises(ModelError, match="is a folder"):
        export_onnx(model, tmp_path / "photos.onnx", images())
    assert (tmp_path / "photos" / "cat.jpg").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "photos", "photos.onnx"]


def embed_on(ranks: Ranks, folder: str, damaged: bool) -> np.ndarray:
    dataset: Any = Records(images(11), damaged=damaged)
    return embed_dataset(load_model(folder), dataset, np.array([10, 3, 7, 5, 0, 1, 9]), batch_size=2, ranks=ranks)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_embed_dataset_shares_the_work_and_every_rank_gets_all(tmp_path: Path, world: int) -> None:
    model = saved(tmp_path / "model")
    expected = model.embed(images(11)[[10, 3, 7, 5, 0, 1, 9]])
    for got in run_ranks(embed_on, world, str(tmp_path / "model"), False):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_damaged_record_stops_all_ranks_with_its_name(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    with pytest.raises(AssertionError, match="record 5 is damaged"):
        run_ranks(embed_on, 2, str(tmp_path / "model"), True)


def test_embed_dataset_of_nothing_and_of_other_colours(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    empty: Any = Records(images(2))
    assert embed_dataset(model, empty, []).shape == (0, DIM)
    bgr: Any = Records(images()[..., ::-1], "BGR")
    np.testing.assert_allclose(embed_dataset(model, bgr), model.embed(images()), atol=1e-6)
