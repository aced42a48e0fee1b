"""What `lce demo` runs: pictures → old model → centre bank → new model → evaluation → export, for one seed; on request
with a pretrained old model of another dimension as well: maps to it, and new models with LCE through maps.

Every step is a command of the product (`lce pack`, `lce launch`, `lce centers`, `lce evaluate`, `lce export`); what is
particular to the demo is only the order, the folders and the pictures.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.pictures import sources
from tools.steps import CONFIGS, CROSS_MODEL, Steps, run_lce, without_network
from trainer import files
from trainer.errors import ConfigError
from trainer.run.config import dump_config, load_config


@dataclass(frozen=True)
class Plan:
    """What distinguishes the stories.

    Attributes:
        write: lays the pictures out as ``folder/SET/CLASS/*.png`` for a seed, from a cache folder.
        recipe: ``configs/demo-RECIPE-….yaml`` are the three training runs.
        sets: the sets that it writes; ``old`` and ``train`` are trained on.
        reported: those of them that the verdict goes by.
        fars: the false accept rates that are reported.
    """

    write: Callable[[Path, int, Path], None]
    recipe: str
    sets: tuple[str, ...]
    reported: tuple[str, ...]
    fars: tuple[float, ...]


_FACES = (("old", "train", "seen", "unseen"), ("unseen", "seen"), (1e-2, 1e-1))
PLANS = {
    "faces": Plan(sources.write_faces, "faces", *_FACES),
    "people": Plan(sources.write_people, "faces", *_FACES),
    "characters": Plan(
        sources.write_characters,
        "characters",
        ("old", "train", "seen", "unseen", "validation"),
        ("unseen", "seen"),
        (1e-4, 1e-3),
    ),
}


LCE_MODES = ("backward", "forward", "both")
WAYS = ("maps", *LCE_MODES)
"""How a pretrained old model is met: by maps alone, or by a new model that is trained with LCE in one of its modes."""


@dataclass(frozen=True)
class Outcome:
    """The outcome for one seed.

    Attributes:
        evaluation: what ``lce evaluate --json`` reports. onnx: the same with the exported model as the new one.
        export: what ``lce export --json`` reports. report: the HTML file. seconds: by step.
        pretrained: what ``lce evaluate --json`` reports against a pretrained old model, if there is one, by
            :data:`WAYS`.
    """

    seed: int
    evaluation: dict[str, Any]
    onnx: dict[str, Any]
    export: dict[str, Any]
    report: Path
    seconds: dict[str, float]
    pretrained: dict[str, Any] | None = None


class DemoUpgrade:
    """The demo's steps for one kind of pictures, one seed and one folder.

    Args:
        data: ``faces``, ``people`` or ``characters``.
        seed: draws the split and seeds the training runs.
        folder: everything is written inside it.
        nproc: training processes.
        say: prints a line.
        settings: overrides of every run's configuration (``train.steps=20``), for trying things out; maps have no
            ``backbone`` and no ``head``.
        stdout: where the commands' own output goes (:func:`tools.steps.run_lce`).
        pretrained: a model file that serves as a second old model, which is met in all of :data:`WAYS`.

    Raises:
        ConfigError: the configurations or the model file are not there, or a setting is not one of theirs.
        ModelError: the model file cannot be used.
    """

    def __init__(
        self,
        data: str,
        seed: int,
        folder: Path,
        nproc: int,
        say: Callable[[str], None],
        settings: Sequence[str] = (),
        stdout: int | None = None,
        pretrained: Path | None = None,
    ) -> None:
        self.data, self.plan, self.seed, self.folder, self.nproc = data, PLANS[data], seed, folder, nproc
        self._settings, self._stdout, self._pretrained = list(settings), stdout, pretrained
        self._steps = Steps(folder, say)
        if not (CONFIGS / "base.yaml").is_file():
            raise ConfigError(
                f"{CONFIGS}: the demo's configurations are not there; run it from a clone of the repository"
            )
        if pretrained is not None and not pretrained.is_file():
            raise ConfigError(f"{pretrained}: no such model file")
        for name in ("old", "paragon", "new", *(WAYS if pretrained is not None else ())):
            load_config(*self._training(name))  # a wrong override is refused now, not after the first training
        self._pretrained_hash = ""
        if pretrained is not None:  # likewise a file that is no model
            from trainer.models.open import load_model

            self._pretrained_hash = load_model(pretrained).hash  # of its weights and of what its description states

    def run(self) -> Outcome:
        """Do what is not done yet, and return the outcome."""
        self._pictures()
        self._train("old", "the old model")
        self._centers()
        self._train("paragon", "the paragon: the new model without compatibility")
        self._train("new", "the new model, with LCE")
        self._export()
        self._evaluate()
        pretrained = None
        if self._pretrained is not None:
            self._meet(self._pretrained)
            pretrained = {name: self._read(f"pretrained-{name}") for name in WAYS}
        evaluation, onnx, export = (self._read(name) for name in ("evaluation", "onnx", "export"))
        report = self.folder / "report.html"
        return Outcome(self.seed, evaluation, onnx, export, report, self._steps.seconds, pretrained)

    def _read(self, name: str) -> dict[str, Any]:
        """The figures that a step left."""
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found

    def _path(self, name: str) -> str:
        return str(self.folder / name)

    def _pictures(self) -> None:
        def action() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="pictures-", dir=self.folder) as temporary:
                self.plan.write(Path(temporary), self.seed, files.cache_folder())
                for name in self.plan.sets:
                    run_lce(["pack", str(Path(temporary) / name), self._path(f"data/{name}")], self._stdout)

        made_from = [self.data, str(self.seed), *self.plan.sets]
        self._steps.run("pictures", "pictures → data sets", made_from, [self.folder / "data"], action)

    def _training(self, name: str) -> tuple[Path, list[str]]:
        """The configuration file of one of the training runs, and its overrides."""
        overrides = [
            f"run.dir={self._path(name)}",
            f"run.seed={self.seed}",
            f"data.path={self._path('data/old' if name == 'old' else 'data/train')}",
        ]
        if name == "maps":
            overrides += [f"compat.bank={self._path('pretrained-bank')}", f"compat.new_model={self._path('paragon')}"]
            overrides += [f"compat.old_embeddings={self._path('pretrained.npy')}"]
            overrides += [f"compat.new_embeddings={self._path('paragon.npy')}"]
            overrides += ["data.batch_size=128", "train.steps=300"]
            return CROSS_MODEL, [*overrides, *without_network(self._settings)]
        if name == "new":
            overrides.append(f"compat.bank={self._path('bank')}")
        if name in LCE_MODES:
            overrides += [f"compat.bank={self._path('pretrained-bank')}", f"compat.mode={name}"]
            name = "new"
        return CONFIGS / f"demo-{self.plan.recipe}-{name}.yaml", [*overrides, *self._settings]

    def _train(self, name: str, title: str, nproc: int | None = None) -> None:
        config, overrides = self._training(name)
        processes = str(nproc or self.nproc)
        made_from = self._without_folder([dump_config(load_config(config, overrides)), processes])

        def action() -> None:
            run_lce(["launch", str(config), "--nproc", processes, *overrides], self._stdout)

        self._steps.run(name, f"training {title}", made_from, [self.folder / name], action, continues=True)

    def _centers(self) -> None:
        argv = ["centers", "from-model", self._path("old"), self._path("data/train"), self._path("bank")]
        argv += ["--nproc", str(self.nproc)]
        self._command("bank", "old model → centre bank of the new training set", argv, ["bank"], self._stdout)

    def _export(self) -> None:
        argv = ["export", self._path("new"), self._path("new.onnx"), "--dataset", self._path("data/unseen")]
        argv += ["--json", self._path("export.json")]
        title = "the new model → ONNX, compared with torch on real images"
        self._command("export", title, argv, ["new.onnx", "export.json"], self._stdout)

    def _evaluate(self) -> None:
        """Measure the three models, and once more with ONNX Runtime running the new one on the old gallery."""
        argv = ["--new", self._path("new"), "--paragon", self._path("paragon")]
        argv += ["--runs", *(self._path(name) for name in ("old", "new", "paragon"))]
        argv += ["--report", self._path("report.html"), "--pictures", "--json", self._path("evaluation.json")]
        argv += ["--gallery", "pooled"]
        products = ["embeddings", "report.html", "evaluation.json"]
        self._command("evaluate", "evaluation and report", [*self._against(self._path("old")), *argv], products)
        argv = ["--new", self._path("new.onnx"), "--replicates", "100", "--json", self._path("onnx.json")]
        common = self._against(self._path("old"), self.plan.reported[:1])
        self._command("onnx", "the old gallery searched by the ONNX model", [*common, *argv], ["onnx.json"])

    def _against(self, old: str, sets: Sequence[str] | None = None) -> list[str]:
        """An evaluation against the old model at a path, on some sets or all that are reported."""
        argv = ["evaluate", "--old", old, "--fars", ",".join(f"{far:g}" for far in self.plan.fars)]
        argv += ["--cache", self._path("embeddings"), "--data"]
        return argv + [f"{name}={self._path(f'data/{name}')}" for name in sets or self.plan.reported]

    def _meet(self, model: Path) -> None:
        """Meet a pretrained old model: by maps between it and the paragon, neither trained further, and by new models
        with LCE through maps; measure each."""
        for name, path, title in (
            ("pretrained", str(model), "the pretrained model's"),
            ("paragon", self._path("paragon"), "the paragon's"),
        ):
            argv = ["centers", "from-model", path, self._path("data/train"), self._path(f"{name}-bank")]
            argv += ["--embeddings", self._path(f"{name}.npy"), "--nproc", str(self.nproc)]
            products = [f"{name}-bank", f"{name}.npy"]
            title = f"{title} embeddings of the training images"
            self._command(f"{name}-bank", title, argv, products, self._stdout, [self._pretrained_hash])
        self._train("maps", "maps between the two", nproc=1)
        for mode in LCE_MODES:
            self._train(mode, f"a new model with LCE in {mode} mode, towards the pretrained one")
        for name in WAYS:
            products = [f"pretrained-{name}.html", f"pretrained-{name}.json"]
            argv = [*self._against(str(model)), "--new", self._path(name)]
            argv += ["--report", self._path(products[0]), "--json", self._path(products[1])]
            self._command(f"pretrained-{name}", f"evaluation against the pretrained model: {name}", argv, products)

    def _command(
        self,
        name: str,
        title: str,
        argv: list[str],
        products: list[str],
        stdout: int | None = subprocess.DEVNULL,
        made_from: Sequence[str] = (),
    ) -> None:
        paths = [self.folder / product for product in products]
        key = [*self._without_folder(argv), *made_from]
        self._steps.run(name, title, key, paths, lambda: run_lce(argv, stdout))

    def _without_folder(self, argv: list[str]) -> list[str]:
        """The arguments without this demo's folder, so that a demo that was moved continues."""
        return [word.replace(str(self.folder), "story") for word in argv]  # the key of steps done before
