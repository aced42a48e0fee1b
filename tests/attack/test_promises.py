"""Every value of every enumeration that decides the numbers of a run is trained some hundred updates, and one assertion
says what the value promises. A value that :data:`PROMISES` does not know fails: whoever adds one says what it promises.

Runs are of synthetic pictures with the defaults of head, optimizer, schedule and training that users have; dimensions
and scale are small. A run that several promises compare with is made once.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attack import tally
from tests.data.samples import encoded
from tests.data.test_damage import overwrite, spoil
from tests.ranks import run_ranks
from tests.run.test_norms import pictures
from tests.runs import config, log_of, train_rank
from trainer.__main__ import _choose_arithmetic
from trainer.checkpoint import read_index
from trainer.checkpoint_folder import list_checkpoints
from trainer.compat.bank.center_bank import BankInfo
from trainer.compat.bank.convert import bank_from_embeddings
from trainer.compat.bank.matrices import open_rows
from trainer.data import build_loader, open_dataset
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.distributed import Ranks
from trainer.errors import ConfigError, DataError
from trainer.head import native
from trainer.models.model import TorchModel, embed_dataset
from trainer.models.open import load_model
from trainer.networks.scale import embedding_norm
from trainer.run.config import SgdConfig
from trainer.run.engine import train

CLASSES, EACH, DIM, STEPS = 30, 8, 32, 120
RANGE = {"lower_norm": 2.5, "upper_norm": 27}  # magface's, for D = 32
SECTIONS = ("data.sampling", "head", "compat", "optimizer", "schedule", "train")


@dataclass
class Scene:
    """The data, the old model's files, and the runs that were made so far."""

    folder: Path
    runs: dict[str, "Run"] = field(default_factory=dict)

    def run(self, world: int = 1, **changes: Any) -> "Run":
        """The run with these changes, made once."""
        name = repr((world, sorted(changes.items())))
        if name not in self.runs:
            folder = self.folder / f"run-{len(self.runs):03d}"
            changes = self.settings(**changes)
            if world == 1:
                train(config(folder, **changes), Ranks())
            else:
                run_ranks(train_rank, world, folder, changes, timeout=400)
            self.runs[name] = Run(folder, self)
        return self.runs[name]

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The common settings under ``changes``; a margin or another section may be given as a mapping."""
        base: dict[str, Any] = {"loader": "torch", "path": str(self.folder / "packed"), "workers": 0, "batch_size": 32}
        out = {f"data__{key}": value for key, value in base.items()}
        out |= {"backbone__name": "small", "backbone__dim": DIM, "train__steps": STEPS, "train__precision": "float32"}
        out |= {"head__rows": "float32", "head__init_std": 0.01, "head__margin": {"name": "cosface", "scale": 32}}
        if changes.get("compat__method", "none") != "none":
            out |= {"compat__bank": str(self.folder / "bank")}
            if changes["compat__method"] in ("l2", "unibct", "advbct", "mixbct", "fct", "bt2"):
                out |= {"compat__old_embeddings": str(self.folder / "old.npy")}
        return out | changes

    def old(self) -> np.ndarray:
        return np.load(self.folder / "old.npy")


@dataclass
class Run:
    """A finished run."""

    folder: Path
    scene: Scene

    @property
    def log(self) -> list[dict[str, Any]]:
        return log_of(self.folder)

    def series(self, key: str) -> np.ndarray:
        return np.array([line[key] for line in self.log])

    def model(self) -> TorchModel:
        model = load_model(self.folder)
        assert isinstance(model, TorchModel)
        return model

    def embeddings(self) -> np.ndarray:
        """Of the training images, unit (N, D)."""
        return embed_dataset(self.model(), open_dataset(self.scene.folder / "packed"))

    def rank1(self) -> float:
        """Of new pictures of the training classes, leave one out."""
        unit = self.model().embed(pictures(CLASSES, 4, 0))
        near = np.where(np.eye(len(unit)) > 0, -2, unit @ unit.T).argmax(1)
        return float((near // 4 == np.arange(len(unit)) // 4).mean())

    def toward_old(self) -> float:
        """Mean cosine between what search compares, of the training images: mapped where there is a map."""
        new, old, model = self.embeddings(), self.scene.old(), self.model()
        if "t21" in model.transforms:
            new = model.transform("t21", new)
        elif "t12" in model.transforms:
            old = model.transform("t12", old)
        return float((new * old).sum(1).mean())

    def state(self) -> set[str]:
        """The names of the tensors in its checkpoint."""
        return set(read_index(list_checkpoints(self.folder / "checkpoints")[-1]).state_dict_metadata)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("promises")
    from PIL import Image

    for number, image in enumerate(pictures(CLASSES, EACH, 0)):
        person = folder / "source" / f"{number // EACH:02d}"
        person.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[::2, ::2]).resize((32, 32)).save(person / f"{number % EACH}.png")
    pack(list_source(folder / "source"), folder / "packed", PackOptions())
    scene = Scene(folder)
    old, dataset = scene.run(run__seed=11), open_dataset(folder / "packed")
    np.save(folder / "old.npy", old.embeddings())
    for storage in ("float32", "bfloat16"):
        name = "bank" if storage == "float32" else f"bank-{storage}"
        labels = np.asarray(dataset.labels)
        bank_from_embeddings(
            open_rows([folder / "old.npy"]), labels, CLASSES, folder / name, BankInfo(model="old"), storage=storage
        )
    np.save(folder / "new.npy", scene.run().embeddings())
    return scene


Check = Callable[[Scene], None]


def learns(**changes: Any) -> Check:
    """The run beats its start: the loss falls by half, new pictures find their own class."""

    def check(scene: Scene) -> None:
        run = scene.run(**changes)
        loss = run.series("loss")
        assert np.isfinite(loss).all()
        assert loss[-10:].mean() < 0.5 * loss[0], (loss[0], loss[-10:])
        assert run.rank1() > 0.8, run.rank1()

    return check


def same(
    tolerance: float, steps: int, changes: dict[str, Any], other: dict[str, Any], also: Check | None = None
) -> Check:
    """The first losses are those of another run, to a relative tolerance, before rounding parts them; and it learns."""

    def check(scene: Scene) -> None:
        mine, theirs = scene.run(**changes).series("loss"), scene.run(**other).series("loss")
        np.testing.assert_allclose(mine[:steps], theirs[:steps], rtol=tolerance)
        (also or learns(**changes))(scene)

    return check


def margin(name: str, **more: Any) -> dict[str, Any]:
    return {"head__margin": {"name": name, "scale": 32, **more}}


def wider_than_softmax(**changes: Any) -> Check:
    """A margin draws a class together: its own images are nearer to it than under softmax."""

    def check(scene: Scene) -> None:
        learns(**changes)(scene)
        plain = scene.run(**margin("softmax")).series("target_cosine")[-10:].mean()
        assert scene.run(**changes).series("target_cosine")[-10:].mean() > plain

    return check


def keeps(entry: str, **changes: Any) -> Check:
    """The run learns, and its checkpoint holds what the value needs to continue."""

    def check(scene: Scene) -> None:
        learns(**changes)(scene)
        assert any(entry in name for name in scene.run(**changes).state()), entry

    return check


def magface(scene: Scene) -> None:
    learns(**margin("magface", **RANGE))(scene)
    found = embedding_norm(scene.run(**margin("magface", **RANGE)).model().backbone)
    assert found is not None
    assert bool((found[1].weight != 1).any()), "the scale is learned"
    with pytest.raises(ConfigError, match="begin with norms of about"):
        scene.run(**margin("magface", lower_norm=50.0))


def native_pass(scene: Scene) -> None:
    if native.load() is None:
        pytest.skip("no C++ compiler or no sgemm in torch's BLAS")
    same(1e-3, 2, {"head__impl": "native"}, {})(scene)


def needs_a_gpu(scene: Scene) -> None:
    """What there is of it without one is tests/head/test_triton.py's."""
    with pytest.raises(ConfigError, match=r"head\.impl = triton: (its kernels run on CUDA|the package triton)"):
        scene.run(head__impl="triton")


def compatible(least: float = 0.3, **changes: Any) -> Check:
    """The new model's embeddings lie nearer to the old ones than an independent model's, by at least ``least``."""

    def check(scene: Scene) -> None:
        run = scene.run(**changes)
        assert run.rank1() > 0.8
        assert run.toward_old() > scene.run().toward_old() + least, run.toward_old()

    return check


def cross(**changes: Any) -> Check:
    """Maps between the frozen models: no network is trained, and mapped embeddings lie near their counterparts."""

    def check(scene: Scene) -> None:
        given = {f"compat__{name}_embeddings": str(scene.folder / f"{name}.npy") for name in ("old", "new")}
        run = scene.run(**{"compat__method": "lce", "compat__mode": "cross-model", **given, **changes})
        model, new, old = run.model(), np.load(scene.folder / "new.npy"), scene.old()
        wanted = changes.get("compat__maps", "both")
        assert set(model.transforms) == ({"t21", "t12"} if wanted == "both" else {wanted})
        for direction in model.transforms:
            a, b = (new, old) if direction == "t21" else (old, new)
            before, after = (a * b).sum(1).mean(), (model.transform(direction, a) * b).sum(1).mean()
            assert after > before + 0.3, (direction, before, after)

    return check


def predicts_distance(scene: Scene) -> None:
    """The model says of which old embeddings T₁₂ errs more; its maps are as without."""
    cross(compat__distance=True)(scene)
    given = {f"compat__{name}_embeddings": str(scene.folder / f"{name}.npy") for name in ("old", "new")}
    model = scene.run(compat__method="lce", compat__mode="cross-model", **given, compat__distance=True).model()
    old, new = scene.old(), np.load(scene.folder / "new.npy")
    expected, actual = model.distance(old), 1 - (model.transform("t12", old) * new).sum(1)
    assert np.corrcoef(expected, actual)[0, 1] > 0.2


def schedule(shape: Callable[[float], float], **changes: Any) -> Check:
    """After the climb the learning rate follows ``shape`` of the share of updates made, to within one update."""

    def check(scene: Scene) -> None:
        learns(**changes)(scene)
        lr = scene.run(**changes).series("lr")
        peak, warmup = SgdConfig().lr, 12
        np.testing.assert_allclose(lr[:warmup], peak * np.arange(1, warmup + 1) / warmup)
        for step in range(warmup, STEPS):
            near = sorted(peak * shape((step + shift) / STEPS) for shift in (-1, 0, 1))
            assert near[0] - 1e-3 <= lr[step] <= near[-1] + 1e-3, step

    return check


def parallel(name: str) -> Check:
    """Two ranks under another wrapper make the run of two ranks under DDP."""

    def check(scene: Scene) -> None:
        if name.startswith("zero"):
            pytest.importorskip("deepspeed", reason="needs DeepSpeed (extra `deepspeed`)")
        run = scene.run(world=2, train__parallel=name)
        theirs = scene.run(world=2, train__parallel="ddp").series("loss")
        np.testing.assert_allclose(run.series("loss")[:2], theirs[:2], rtol=1e-3)
        assert run.series("loss")[-10:].mean() < 0.5 * theirs[0]
        assert run.rank1() > 0.8

    return check


def deep(changes: dict[str, Any], tolerance: float = 1e-4) -> Check:
    """The same run of a network with units, without and with the value."""
    common = {"backbone__name": "iresnet18", "backbone__width": 4, "train__steps": 40}

    def check(scene: Scene) -> None:
        mine, theirs = scene.run(**common, **changes).series("loss"), scene.run(**common).series("loss")
        np.testing.assert_allclose(mine[:2], theirs[:2], rtol=tolerance)  # later ones part by rounding
        assert mine[-5:].mean() < mine[0]

    return check


def compiled(scene: Scene) -> None:
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    same(1e-3, 2, {"train__compile": True}, {})(scene)
    assert counters["stats"]["unique_graphs"] > before


def compressed(scene: Scene) -> None:
    """Two ranks exchange rounded gradients: the first loss is that of whole ones, the next are near, not the same."""
    run = scene.run(world=2, train__compress_gradients=True)
    mine, theirs = run.series("loss"), scene.run(world=2, train__parallel="ddp").series("loss")
    assert mine[0] == theirs[0]
    np.testing.assert_allclose(mine[:3], theirs[:3], rtol=1e-2)
    assert (mine[1:] != theirs[1:]).any()
    assert mine[-10:].mean() < 0.5 * mine[0]
    assert run.rank1() > 0.8


def synchronised(scene: Scene) -> None:
    """Two ranks are one: under batch norm by rank the first loss differs already."""
    whole = {"data__drop_last": True}
    one, alone = scene.run(**whole).series("loss"), scene.run(world=2, **whole).series("loss")
    run = scene.run(world=2, train__sync_batchnorm=True, **whole)
    np.testing.assert_allclose(run.series("loss")[:2], one[:2], rtol=1e-4)
    assert np.abs(alone[:2] / one[:2] - 1).max() > 1e-3
    assert run.rank1() > 0.8


def epoch_counts(scene: Scene, sampling: str) -> tuple[np.ndarray, np.ndarray]:
    """How often each record, and each class of uneven ones, comes in an epoch of the product's own loader."""
    labels = np.asarray(open_dataset(scene.folder / "packed").labels).copy()
    labels[np.arange(len(labels)) % 8 >= 2 + labels % 6] = -1  # classes of 2 to 7 images
    np.save(scene.folder / "uneven.npy", labels)
    changes = scene.settings(data__sampling=sampling, data__labels=str(scene.folder / "uneven.npy"))
    settings = config(scene.folder / "unused", **changes)
    dataset = open_dataset(scene.folder / "packed", scene.folder / "uneven.npy")
    loader = build_loader(settings.data, settings.run.seed, dataset, Ranks())
    batches = loader.batches()
    taken = torch.cat([next(batches).records for _ in range(loader.steps_per_epoch)]).numpy()
    loader.close()
    return np.bincount(taken, minlength=len(labels))[labels >= 0], np.bincount(labels[taken])


def shuffles(scene: Scene) -> None:
    assert (epoch_counts(scene, "shuffle")[0] == 1).all()
    learns(data__sampling="shuffle")(scene)


def balances(scene: Scene) -> None:
    counts = epoch_counts(scene, "class_balanced")[1]
    assert counts.max() - counts.min() <= 1
    learns(data__sampling="class_balanced")(scene)


class RoundedProducts(TorchDispatchMode):
    """CUDA's rule on the CPU: where the flag says tf32, matrix products take float32 matrices rounded to 11 bits.

    ``rounded``, ``whole``: whose products of either kind there were: those of the head have a side of C.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded: set[str] = set()
        self.whole: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            whose = "head" if CLASSES in (*args[-2].shape, *args[-1].shape) else "backbone"
            (self.rounded if tf32 else self.whole).add(whose)
            if tf32:
                args = [*args[:-2], *map(self.round, args[-2:])]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def round(matrix: torch.Tensor) -> torch.Tensor:
        """To the nearest float32 of 10 bits behind the leading one."""
        return ((matrix.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def rounded(**changes: Any) -> Check:
    """With the products of CUDA imitated: the head's take rounded matrices where head.compute says so, the backbone's
    where train.matmul does, neither the other's; the losses are near float32's and not the same. Without a GPU nothing
    is rounded: the run is that of float32."""

    def check(scene: Scene) -> None:
        same(0, STEPS, changes, {})(scene)
        outside = torch.backends.cuda.matmul.fp32_precision
        short = scene.settings(train__steps=20, **changes)
        settings = config(scene.folder / f"rounded-{len(list(scene.folder.glob('rounded-*')))}", **short)
        try:
            _choose_arithmetic(settings)
            before = torch.backends.cuda.matmul.fp32_precision
            assert before == ("tf32" if "train__matmul" in changes else "ieee")
            with RoundedProducts() as products:
                train(settings, Ranks())
            assert torch.backends.cuda.matmul.fp32_precision == before
        finally:
            torch.backends.cuda.matmul.fp32_precision = outside
            torch.backends.cudnn.benchmark = False
        mine, others = ("head", "backbone") if "head__compute" in changes else ("backbone", "head")
        assert (products.rounded, products.whole) == ({mine}, {others})
        losses = np.array([line["loss"] for line in log_of(settings.run.dir)])
        exact = scene.run(train__steps=20).series("loss")
        assert (losses != exact).any()
        np.testing.assert_allclose(losses[:3], exact[:3], rtol=2e-2)

    return check


ADAMW = {"optimizer__name": "adamw", "optimizer__lr": 3e-3}
LCE: dict[str, Any] = {"compat__method": "lce", "compat__alignment_weight": 10.0}
ARC = margin("arcface", m=0.3)
FLOAT8: dict[str, Any] = {"head__rows": "float8", "head__optimizer": {"momentum": 0.0, "lr_factor": 5.0}}

PROMISES: dict[tuple[str, str], Check] = {
    ("data.sampling", "shuffle"): shuffles,
    ("data.sampling", "class_balanced"): balances,
    ("head.impl", "auto"): learns(),
    ("head.impl", "fused"): same(1e-3, 2, {"head__impl": "fused"}, {}),
    ("head.impl", "native"): native_pass,
    ("head.impl", "triton"): needs_a_gpu,
    ("head.impl", "reference"): same(1e-3, 2, {"head__impl": "reference"}, {}),
    ("head.update", "fused"): learns(head__update="fused"),
    ("head.update", "deferred"): same(1e-3, 2, {"head__update": "deferred"}, {}),
    ("head.margin.name", "softmax"): learns(**margin("softmax")),
    ("head.margin.name", "cosface"): wider_than_softmax(),
    ("head.margin.name", "arcface"): wider_than_softmax(**ARC),
    ("head.margin.name", "combined"): same(1e-5, 20, margin("combined", m2=0.3), ARC),
    ("head.margin.name", "adaface"): keeps("margin_norm_mean", **margin("adaface")),
    ("head.margin.name", "magface"): magface,
    ("head.margin.name", "curricular"): keeps("margin_tau", **margin("curricular")),
    ("head.margin.gradient", "exact"): same(0, STEPS, margin("arcface", m=0.3, gradient="exact"), ARC),
    ("head.margin.gradient", "straight_through"): same(
        1e-5, 1, margin("arcface", m=0.3, gradient="straight_through"), ARC
    ),
    ("head.optimizer.name", "sgd"): keeps("task.momentum"),
    ("head.optimizer.name", "adamw"): keeps("task.", head__optimizer={"name": "adamw", "lr_factor": 0.1}),
    ("head.compute", "float32"): learns(head__compute="float32"),
    ("head.compute", "bfloat16"): same(0.05, 2, {"head__compute": "bfloat16"}, {}),
    ("head.compute", "tf32"): rounded(head__compute="tf32"),
    ("head.rows", "float32"): learns(head__rows="float32"),
    ("head.rows", "bfloat16"): same(0.05, 2, {"head__rows": "bfloat16"}, {}),
    ("head.rows", "float8"): same(0.1, 2, FLOAT8, {}),
    ("head.rows_residual", "true"): same(0.1, 2, {**FLOAT8, "head__rows_residual": True}, {}),
    ("head.rows", "float64"): same(1e-3, 2, {"head__rows": "float64"}, {}),
    ("head.sampling_correction", "true"): learns(head__sampling_correction=True, head__sample_rate=0.5),
    ("compat.method", "none"): learns(compat__method="none"),
    ("compat.method", "lce"): compatible(**LCE),
    ("compat.method", "bct"): compatible(compat__method="bct"),
    ("compat.method", "l2"): compatible(compat__method="l2", compat__weight=10.0),
    ("compat.method", "unibct"): compatible(compat__method="unibct"),
    ("compat.method", "frozen"): compatible(compat__method="frozen"),
    ("compat.method", "ndpp"): compatible(compat__method="ndpp"),
    ("compat.method", "bt2"): compatible(compat__method="bt2", backbone__dim=48),
    ("compat.method", "advbct"): compatible(compat__method="advbct", compat__boundary_weight=10.0),
    ("compat.method", "mixbct"): compatible(compat__method="mixbct", compat__mix_share=0.6, train__steps=300),
    ("compat.method", "fct"): compatible(compat__method="fct", compat__transform={"name": "linear"}),
    ("compat.mode", "direct"): compatible(**LCE, compat__mode="direct"),
    ("compat.mode", "backward"): compatible(**LCE, compat__mode="backward"),
    ("compat.mode", "forward"): compatible(**LCE, compat__mode="forward"),
    ("compat.mode", "both"): compatible(**LCE, compat__mode="both"),
    ("compat.mode", "cross-model"): cross(),
    ("compat.maps", "both"): cross(compat__maps="both"),
    ("compat.maps", "t21"): cross(compat__maps="t21"),
    ("compat.maps", "t12"): cross(compat__maps="t12"),
    ("compat.distance", "true"): predicts_distance,
    ("compat.centers", "device"): compatible(**LCE, compat__centers="device"),
    ("compat.centers", "host"): same(0, STEPS, {**LCE, "compat__centers": "host"}, LCE, compatible(**LCE)),
    **{
        ("compat.transform.name", name): compatible(**LCE, compat__mode="both", compat__transform={"name": name})
        for name in ("rbt", "linear", "orthogonal", "mlp")
    },
    ("compat.authors_formula", "true"): compatible(**LCE, compat__authors_formula=True),
    ("optimizer.name", "sgd"): keeps("momentum_buffer"),
    ("optimizer.name", "adamw"): keeps("exp_avg_sq", **ADAMW),
    ("schedule.name", "polynomial"): schedule(lambda t: (1 - (t - 0.1) / 0.9) ** 2),
    ("schedule.name", "cosine"): schedule(lambda t: (1 + np.cos(np.pi * (t - 0.1) / 0.9)) / 2, schedule__name="cosine"),
    ("schedule.name", "step"): schedule(
        lambda t: 0.1 ** sum(t >= at for at in (0.5, 0.75, 0.9)), schedule__name="step"
    ),
    ("schedule.name", "constant"): schedule(lambda t: 1.0, schedule__name="constant"),
    ("train.matmul", "float32"): learns(train__matmul="float32"),
    ("train.matmul", "tf32"): rounded(train__matmul="tf32"),
    ("train.precision", "float32"): learns(train__precision="float32"),
    ("train.precision", "float64"): same(1e-3, 2, {"train__precision": "float64"}, {}),
    ("train.precision", "bfloat16"): same(0.05, 2, {"train__precision": "bfloat16"}, {}),
    ("train.precision", "float16"): same(0.05, 1, {"train__precision": "float16"}, {}),
    **{("train.parallel", name): parallel(name) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")},
    ("train.compress_gradients", "true"): compressed,
    ("train.compile", "true"): compiled,
    ("train.channels_last", "true"): deep({"train__channels_last": True}, 1e-3),
    ("train.activation_checkpointing", "true"): deep({"train__activation_checkpointing": True}),
    ("train.sync_batchnorm", "true"): synchronised,
}


def values(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Every (key, value) of an enumeration below a node of a JSON schema; of a switch the value ``true``. Variants of a
    section are walked as one."""
    if "$ref" in schema:
        yield from values(definitions[schema["$ref"].rpartition("/")[2]], definitions, path)
    for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        yield from values(branch, definitions, path)
    if "items" in schema:
        yield from values(schema["items"], definitions, path)
    for key, child in schema.get("properties", {}).items():
        yield from values(child, definitions, f"{path}.{key}" if path else key)
    yield from ((path, value) for value in schema.get("enum", [schema.get("const")]) if isinstance(value, str))
    if schema.get("type") == "boolean":
        yield path, "true"


def known_values() -> list[tuple[str, str]]:
    """Those of the sections that decide a run's numbers."""
    schema = type(config(Path("unused"))).model_json_schema()
    found = dict.fromkeys(values(schema, schema["$defs"], ""))
    return [(key, value) for key, value in found if any(key == s or key.startswith(f"{s}.") for s in SECTIONS)]


ELSEWHERE = {("optimizer.start_momentum", "true")}
"""Values that a test of their own below covers."""
SHARE = set(random.Random(0).sample(sorted(PROMISES), 4))


def test_every_value_promises_something() -> None:
    known = set(known_values())
    assert known - set(PROMISES) - ELSEWHERE == set(), "say in PROMISES what these values promise"
    assert set(PROMISES) - known == set(), "these values are no more"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"), [pytest.param(*at, marks=() if at in SHARE else pytest.mark.attack) for at in PROMISES]
)
def test_a_value_keeps_its_promise(scene: Scene, key: str, value: str) -> None:
    try:
        PROMISES[key, value](scene)
    except AssertionError:
        tally("values of the configuration", "silent")
        raise
    tally("values of the configuration", "handled")


@pytest.mark.attack
@pytest.mark.slow
def test_momentum_of_another_run_continues_it(scene: Scene) -> None:
    """A run of 12 updates, written as arcface_torch writes its own and started from with its momentum, goes on as 24
    updates do; without the momentum it does not. Every batch is the whole set, and nothing is augmented."""
    whole = {"data__batch_size": CLASSES * EACH, "data__augment": {"flip": 0.0}, "checkpoint__every_steps": 12}
    fixed = {"schedule__name": "constant", "schedule__warmup": 0.0, "optimizer__lr": 0.05, **whole}
    through = scene.run(**fixed, train__steps=24)
    from trainer.checkpoint import load_tensors
    from trainer.checkpoint_folder import Checkpoint, read_seal

    place = through.folder / "checkpoints" / "step-00000012"
    index = read_index(place).state_dict_metadata
    state = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in index.items() if hasattr(e, "size")}
    load_tensors(Checkpoint(place, read_seal(place)), state)
    weights = {k.removeprefix("module.backbone."): v for k, v in state.items() if k.startswith("module.backbone.")}
    order = list(through.model().backbone.state_dict())
    weights = {name: weights[name] for name in order}
    trained = [n for n in order if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    buffers = [state[f"optimizer.backbone.{name}/momentum_buffer"] for name in trained] + [state["task.momentum"]]
    folder = scene.folder / "arcface"
    folder.mkdir()
    saved = {
        "state_dict_backbone": weights,
        "state_dict_softmax_fc": {"weight": state["task.rows"]},
        "state_optimizer": {"state": {n: {"momentum_buffer": b} for n, b in enumerate(buffers)}, "param_groups": []},
    }
    torch.save(saved, folder / "checkpoint_gpu_0.pt")
    start = {"backbone__weights": str(folder / "checkpoint_gpu_0.pt"), "head__weights": str(folder)}
    with_it = scene.run(**fixed, **start, train__steps=12, optimizer__start_momentum=True).series("loss")
    without = scene.run(**fixed, **start, train__steps=12).series("loss")
    expected = through.series("loss")[12:]
    np.testing.assert_allclose(with_it, expected, rtol=1e-3)
    assert np.abs(without[1:] / expected[1:] - 1).max() > 1e-2


@pytest.mark.attack
@pytest.mark.slow
def test_damaged_records_are_skipped_up_to_the_limit(scene: Scene, tmp_path: Path) -> None:
    from PIL import Image

    for number, image in enumerate(pictures(6, 6, 0)):
        person = tmp_path / "source" / f"{number // 6}"
        person.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(person / f"{number % 6}.jpg")
    (tmp_path / "source" / "0" / "extra.jpg").write_bytes(encoded(3))
    pack(list_source(tmp_path / "source"), tmp_path / "packed", PackOptions())
    dataset = open_dataset(tmp_path / "packed")
    for record in (3, 17):
        overwrite(dataset, record, spoil)
    changes = scene.settings(data__path=str(tmp_path / "packed"), train__steps=100, data__batch_size=8)
    done = train(config(tmp_path / "two", **changes, data__max_bad_records=2), Ranks())
    assert (done.status, done.bad_records) == ("finished", 2)
    assert log_of(tmp_path / "two")[-1]["loss"] < 0.5 * log_of(tmp_path / "two")[0]["loss"]
    with pytest.raises(DataError, match=r"data\.max_bad_records allows 1"):
        train(config(tmp_path / "one", **changes, data__max_bad_records=1), Ranks())


@pytest.mark.attack
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "both"])
def test_a_bfloat16_bank_trains_as_a_float32_one(scene: Scene, mode: str) -> None:
    changes: dict[str, Any] = {**LCE, "compat__mode": mode}
    half = scene.run(**changes, compat__bank=str(scene.folder / "bank-bfloat16"))
    np.testing.assert_allclose(half.series("loss")[:5], scene.run(**changes).series("loss")[:5], rtol=0.02)
    assert half.toward_old() > scene.run(**changes).toward_old() - 0.05


@pytest.mark.attack
@pytest.mark.slow
def test_a_deterministic_run_repeats_to_the_last_bit(scene: Scene) -> None:
    one, two = (scene.run(run__deterministic=True, run__timeout_seconds=seconds) for seconds in (600.0, 601.0))
    assert (one.series("loss") == two.series("loss")).all()
    assert (one.embeddings() == two.embeddings()).all()


@pytest.mark.attack
@pytest.mark.slow
def test_zero3_without_a_moving_average(scene: Scene) -> None:
    """And with one it is refused, by name."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (extra `deepspeed`)")
    parallel("zero3")(scene)
    with pytest.raises(AssertionError, match="no moving average of parameters that no rank has"):
        scene.run(world=2, train__parallel="zero3", train__ema=0.9)


def test_template_weights_count() -> None:
    """An image that weighs as three is three images, each of a medium of its own; the order does not matter."""
    from trainer.evaluation.templates import pool

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    heavy = pool(rows[:3], np.zeros(3, np.int64), np.arange(3), np.array([3.0, 1.0, 1.0]))[1]
    thrice = pool(rows[[0, 0, 0, 1, 2]], np.zeros(5, np.int64), np.arange(5))[1]
    np.testing.assert_allclose(heavy, thrice, atol=1e-6)
    turned = pool(rows[[2, 1, 0]], np.zeros(3, np.int64), np.arange(3), np.array([1.0, 1.0, 3.0]))[1]
    np.testing.assert_allclose(heavy, turned, atol=1e-6)
    assert np.abs(heavy - pool(rows[:3], np.zeros(3, np.int64), np.arange(3))[1]).max() > 1e-2
