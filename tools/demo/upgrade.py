"""What `lce demo` runs: pictures → old model → centre bank → new model → evaluation → export, for one seed.

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

from tools.pictures import sources as demo_sources
from tools.steps import CONFIGS, Steps, run_lce
from trainer.errors import ConfigError
from trainer.run.config import dump_config, load_config


@dataclass(frozen=True)
class Plan:
    """What distinguishes the two stories.

    Attributes:
        write: lays the pictures out as ``folder/SET/CLASS/*.png`` for a seed, from a cache folder.
        sets: the sets that it writes; ``old`` and ``train`` are trained on.
        reported: those of them that the verdict goes by.
        fars: the false accept rates that are reported.
    """

    write: Callable[[Path, int, Path], None]
    sets: tuple[str, ...]
    reported: tuple[str, ...]
    fars: tuple[float, ...]


PLANS = {
    "faces": Plan(demo_sources.write_faces, ("old", "train", "seen", "unseen"), ("unseen", "seen"), (1e-2, 1e-1)),
    "characters": Plan(
        demo_sources.write_characters,
        ("old", "train", "seen", "unseen", "validation"),
        ("unseen", "seen"),
        (1e-4, 1e-3),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """The outcome for one seed.

    Attributes:
        evaluation: what ``lce evaluate --json`` reports. onnx: the same with the exported model as the new one.
        export: what ``lce export --json`` reports. report: the HTML file. seconds: by step.
    """

    seed: int
    evaluation: dict[str, Any]
    onnx: dict[str, Any]
    export: dict[str, Any]
    report: Path
    seconds: dict[str, float]


class DemoUpgrade:
    """The demo's steps for one kind of pictures, one seed and one folder.

    Args:
        data: ``faces`` or ``characters``.
        seed: draws the split and seeds the training runs.
        folder: everything is written inside it.
        nproc: training processes.
        say: prints a line.
        settings: overrides of every run's configuration (``train.steps=20``), for trying things out.
        stdout: where the commands' own output goes (:func:`tools.steps.run_lce`).

    Raises:
        ConfigError: the configurations are not there, or a setting is not one of theirs.
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
    ) -> None:
        self.data, self.plan, self.seed, self.folder, self.nproc = data, PLANS[data], seed, folder, nproc
        self._settings, self._stdout = list(settings), stdout
        self._steps = Steps(folder, say)
        if not (CONFIGS / "base.yaml").is_file():
            raise ConfigError(
                f"{CONFIGS}: the demo's configurations are not there; run it from a clone of the repository"
            )
        for name in ("old", "paragon", "new"):
            load_config(*self._training(name))  # a wrong override is refused now, not after the first training

    def run(self) -> Outcome:
        """Do what is not done yet, and return the outcome."""
        self._pictures()
        self._train("old", "the old model")
        self._centers()
        self._train("paragon", "the paragon: the new model without compatibility")
        self._train("new", "the new model, with LCE")
        self._export()
        self._evaluate()
        evaluation, onnx, export = (
            json.loads((self.folder / f"{name}.json").read_text()) for name in ("evaluation", "onnx", "export")
        )
        return Outcome(self.seed, evaluation, onnx, export, self.folder / "report.html", self._steps.seconds)

    def _path(self, name: str) -> str:
        return str(self.folder / name)

    def _pictures(self) -> None:
        def action() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="pictures-", dir=self.folder) as temporary:
                self.plan.write(Path(temporary), self.seed, demo_sources.cache_folder())
                for name in self.plan.sets:
                    run_lce(["pack", str(Path(temporary) / name), self._path(f"data/{name}")], self._stdout)

        made_from = [self.data, str(self.seed), *self.plan.sets]
        self._steps.run("pictures", "pictures → data sets", made_from, [self.folder / "data"], action)

    def _training(self, name: str) -> tuple[Path, list[str]]:
        """The configuration file of one of the three training runs, and its overrides."""
        overrides = [
            f"run.dir={self._path(name)}",
            f"run.seed={self.seed}",
            f"data.path={self._path('data/old' if name == 'old' else 'data/train')}",
        ]
        if name == "new":
            overrides.append(f"compat.bank={self._path('bank')}")
        return CONFIGS / f"demo-{self.data}-{name}.yaml", [*overrides, *self._settings]

    def _train(self, name: str, title: str) -> None:
        config, overrides = self._training(name)
        made_from = self._without_folder([dump_config(load_config(config, overrides)), str(self.nproc)])

        def action() -> None:
            run_lce(["launch", str(config), "--nproc", str(self.nproc), *overrides], self._stdout)

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
        common = ["evaluate", "--old", self._path("old"), "--fars", ",".join(f"{far:g}" for far in self.plan.fars)]
        common += ["--cache", self._path("embeddings"), "--data"]
        sets = [f"{name}={self._path(f'data/{name}')}" for name in self.plan.reported]
        argv = ["--new", self._path("new"), "--paragon", self._path("paragon")]
        argv += ["--runs", *(self._path(name) for name in ("old", "new", "paragon"))]
        argv += ["--report", self._path("report.html"), "--pictures", "--json", self._path("evaluation.json")]
        products = ["embeddings", "report.html", "evaluation.json"]
        self._command("evaluate", "evaluation and report", [*common, *sets, *argv], products)
        argv = ["--new", self._path("new.onnx"), "--replicates", "100", "--json", self._path("onnx.json")]
        self._command("onnx", "the old gallery searched by the ONNX model", [*common, sets[0], *argv], ["onnx.json"])

    def _command(
        self, name: str, title: str, argv: list[str], products: list[str], stdout: int | None = subprocess.DEVNULL
    ) -> None:
        paths = [self.folder / product for product in products]
        self._steps.run(name, title, self._without_folder(argv), paths, lambda: run_lce(argv, stdout))

    def _without_folder(self, argv: list[str]) -> list[str]:
        """The arguments without this demo's folder, so that a demo that was moved continues."""
        return [word.replace(str(self.folder), "story") for word in argv]  # the key of steps done before
