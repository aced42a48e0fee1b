"""What a run shows: lines in a redirected log, a bar whose counter and times are never cut, groups in TensorBoard."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.nn import functional

from tests.banks import write_bank
from tests.data.samples import packed
from tests.runs import config, log_of
from trainer.compat.bank.center_bank import BankInfo
from trainer.data import open_dataset
from trainer.data.loader import Batch
from trainer.distributed import Ranks
from trainer.errors import DataError
from trainer.run.config import LogConfig
from trainer.run.display import Display, duration
from trainer.run.engine import train
from trainer.run.monitor import FIELDS, Monitor, grouped

LINE = {
    "step": 120,
    "epoch": 1.25,
    "loss": 9.817,
    "classification": 9.1,
    "alignment": 0.146,
    "boundary": 0.021,
    "lr": 0.05,
    "grad_norm": 1.0,
    "skipped_steps": 2,
    "samples_per_second": 67.0,
    "step_seconds": 0.5,
    "data_share": 0.01,
    "communication_share": 0.0,
    "memory_bytes": 2**30,
    "seconds": 60.0,
}


def shown(line_seconds: float, steps: list[int], evaluated: tuple[int, ...] = ()) -> list[str]:
    out = io.StringIO()
    display = Display(1000, 0, line_seconds, Console(file=out, width=80))
    display.start()
    for step in steps:
        display.advance(step)
        display.figures({**LINE, "step": step}, step in evaluated)
    display.stop()
    return out.getvalue().splitlines()


def test_a_log_file_gets_lines_with_every_figure_a_user_waits_for() -> None:
    (line,) = shown(30.0, [120])
    for part in ("step 120/1000 (12%)", "epoch 1.25", "loss 9.817", "alignment 0.146", "boundary 0.021", "lr 0.05"):
        assert part in line
    for part in ("67 samples/s", "data wait 1%", "memory 1.00 GiB", "remaining 0:0", "skipped_steps 2"):
        assert part in line


def test_lines_are_rare_but_never_miss_an_evaluation_or_the_end() -> None:
    assert [line.split()[1] for line in shown(3600.0, [1, 20, 40, 60, 1000], (40,))] == [
        "1/1000",
        "40/1000",
        "1000/1000",
    ]
    assert len(shown(0.0, [1, 20, 40])) == 3


@pytest.mark.parametrize("width", [60, 80, 200])
def test_counter_elapsed_and_remaining_time_are_never_cut(width: int) -> None:
    out = io.StringIO()
    display = Display(100_000, 0, 30.0, Console(file=out, force_terminal=True, width=width))
    display.advance(12_000)
    display.figures({**LINE, "step": 12_000}, False)
    assert display._progress is not None
    out.truncate(0)
    display._progress.console.print(display._progress.get_renderable())
    text = out.getvalue()
    assert "12000/100000" in text.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert text.count("0:00:0") + text.count("-:--:--") == 2
    assert "loss 9.8" in text
    assert all(len(line) < 400 for line in text.splitlines())


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3600 * 30 + 59.6)] == ["0:00:00", "0:01:01", "30:01:00"]


def test_every_figure_has_a_group() -> None:
    assert {grouped(name).split("/")[0] for name in FIELDS} == {"train", "compat", "data", "system", "evaluate"}
    assert grouped("unseen.rank1") == "evaluate/unseen.rank1"


@pytest.mark.slow
def test_tensorboard_holds_settings_pictures_and_embeddings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = packed(tmp_path / "faces", classes=4, images=4, size=(8, 8))
    changes = {"data__path": str(data), "data__loader": "torch", "log__tensorboard": True}
    train(config(tmp_path / "run", **changes), Ranks())
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "data/samples_per_second", "system/memory_bytes"} <= set(tags["scalars"])
    assert "configuration/text_summary" in tags["tensors"]
    assert tags["images"]
    assert (tmp_path / "run/tensorboard/projector_config.pbtxt").is_file()
    assert b"optimizer.lr" in b"".join(f.read_bytes() for f in (tmp_path / "run/tensorboard").glob("events*"))
    train(config(tmp_path / "off", **changes, log__images=False), Ranks())
    events = EventAccumulator(str(tmp_path / "off/tensorboard"), {"images": 0})
    events.Reload()
    assert not events.Tags()["images"]


def test_a_batch_without_pixels_shows_none_and_ends_no_writer(tmp_path: Path) -> None:
    """A run on stored embeddings; TensorBoard refuses an empty picture and would get nothing more."""
    dataset = open_dataset(packed(tmp_path / "faces", classes=2, images=2, size=(8, 8)))
    monitor = Monitor(tmp_path, LogConfig(progress=False, tensorboard=False), Ranks(), 10, 0)
    given: list[tuple[int, ...]] = []

    class Board:
        def images(self, name: str, step: int, images: NDArray[Any]) -> None:
            given.append(images.shape)

    monitor._writers["board"] = Board()  # type: ignore[assignment]
    labels = torch.zeros(4, dtype=torch.int64)
    for shape in ((4, 3, 0, 0), (0, 3, 8, 8), (4, 3, 8, 8)):
        monitor.show_images(1, Batch(torch.zeros(shape), labels[: shape[0]], labels[: shape[0]]), dataset)
    assert given == [(4, 8, 8, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "accumulate"), [("direct", 1), ("backward", 2)])
def test_tensorboard_has_distributions_of_cosines_and_of_the_slack(tmp_path: Path, mode: str, accumulate: int) -> None:
    """The figures of the log are their means; the class without an old centre is in the first one alone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = packed(tmp_path / "faces", classes=4, images=4, size=(8, 8))
    settings = config(tmp_path / "run", data__path=str(data), data__loader="torch")
    centers = functional.normalize(torch.randn(4, settings.backbone.dim, generator=torch.Generator().manual_seed(1)))
    write_bank(
        tmp_path / "bank",
        centers=centers,
        boundaries=torch.full((4,), 0.5),
        counts=torch.full((4,), 4),
        mask=torch.tensor([True, True, True, False]),
        info=BankInfo(model="old"),
    )
    compat = {"compat__method": "lce", "compat__mode": mode, "compat__bank": str(tmp_path / "bank")}
    changes = {"data__path": str(data), "data__loader": "torch", "log__tensorboard": True, "data__batch_size": 16}
    train(config(tmp_path / "run", **changes, **compat, train__accumulate=accumulate), Ranks())
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"histograms": 0})
    events.Reload()
    figures = log_of(tmp_path / "run")[-1]
    target, cosine, slack = (
        events.Histograms(name)[-1].histogram_value
        for name in ("train/target_cosines", "compat/center_cosines", "compat/boundary_slack")
    )
    assert (target.num, cosine.num, slack.num) == (16 * accumulate, 12 * accumulate, 12 * accumulate)
    assert target.sum / target.num == pytest.approx(figures["target_cosine"], abs=1e-5)
    assert slack.sum == pytest.approx(cosine.sum - 0.5 * cosine.num, abs=1e-4)
    assert max(0.0, -slack.sum / slack.num) - 1e-5 <= figures["boundary"] <= max(0.0, -slack.min) + 1e-5
    assert not {"target_cosines", "boundary_slack"} & set(figures)


@pytest.mark.slow
def test_a_finished_run_does_not_fail_for_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(*given: object) -> None:
        raise DataError("record 3 does not decode")

    monkeypatch.setattr("trainer.run.engine.embed_batches", damaged)
    data = packed(tmp_path / "faces", classes=4, images=4, size=(8, 8))
    changes = {"data__path": str(data), "data__loader": "torch", "log__tensorboard": True}
    assert train(config(tmp_path / "run", **changes), Ranks()).status == "finished"
    assert "no embeddings are shown: record 3 does not decode" in capsys.readouterr().err
