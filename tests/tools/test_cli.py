"""The command itself: hints for what people type, errors that name options, and what it imports."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import packed
from tools.cli import main, translated
from trainer.extras import EXTRAS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "`lce --help` lists them"),
        (["train", "x.yaml"], "lce launch trains"),
        (["launch", "x.yaml", "--lr", "0.1", "run.dir=runs/x"], "--lr: no such option; a setting of the configuration"),
        (["launch", "x.yaml", "--lr", "0.1"], "is written optimizer.lr=0.1, see lce config"),
        (["launch", "x.yaml", "--learning-rate", "0.1"], "SECTION.learning_rate=0.1"),
        (["launch", "x.yaml", "--nprocs", "2"], "--nprocs: no such option; did you mean --nproc?"),
        (["launch", "--dry-run", "x.yaml", "a.b=1", "--nproc", "2", "optimizer.lr", "=", "0.05"], "without spaces"),
        (["launch", "x.yaml", "--nproc", "2", "optimizer.lr: 0.1"], "key=value without spaces"),
        (["launch", "--nproc", "2"], "the following arguments are required: config\n"),
        (["check", "x", "--depp"], "lce check"),
    ],
)
def test_what_people_type_gets_its_hint(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert hint in err
    assert "run.dir=runs/x" not in err.splitlines()[-1]


def test_a_library_s_argument_gets_the_option_s_name() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size")
    actions = parser.add_subparsers()
    actions.add_parser("make").add_argument("-f", "--force")
    assert translated("`batch_size` 0, `force` replaces it; `other`", parser) == (
        "--batch-size 0, --force replaces it; `other`"
    )


RECIPE = "configs/network/r50.yaml"


def imported(*words: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    code = (
        "import sys; from tools.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.stdout.write('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (("--help",), ("torch", "numpy", "pydantic", "yaml", "rich")),
        (("launch", "--help"), ("torch", "numpy", "pydantic")),
        (("runs", "nowhere"), ("torch", "numpy", "pydantic")),
        (("launch", RECIPE, "run.dir=x", "run.device=cpu", "data.loader=synthetic", "--dry-run"), ("torch", "sympy")),
        (("launch", RECIPE, "run.dirr=x"), ("torch", "sympy")),
        (("plan", "--classes", "1e6", "--backbone", "r50", "--gpus", "8", "--memory", "80GiB"), ("torch", "sympy")),
    ],
)
def test_a_command_imports_what_it_needs(words: tuple[str, ...], without: tuple[str, ...]) -> None:
    assert not set(without) & imported(*words)


def test_a_look_at_files_imports_no_torch(tmp_path: Path) -> None:
    packed(tmp_path / "faces", classes=2, images=2)
    np.save(tmp_path / "gallery.npy", np.eye(4, dtype=np.float32))
    assert not {"torch", "sympy"} & imported("check", str(tmp_path / "faces"))
    assert not {"torch", "sympy"} & imported("gallery", "status", str(tmp_path / "gallery.npy"))


def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("run: {dir: x}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["runs", "plot", str(tmp_path / "run"), str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err == (
        "lce runs: needs matplotlib, which is not installed: pip install 'lce-trainer[evaluate]'\n"
    )


def test_every_extra_that_is_named_is_one() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in text for extra in EXTRAS.values())


def test_sizes_with_a_letter_get_their_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--classes", "10M"])
    assert "10M: not a number; write 10e6" in capsys.readouterr().err


def test_a_run_folder_is_not_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("run: {dir: x}")
    assert main(["launch", str(tmp_path)]) == 2
    assert f"{tmp_path}: is a run folder; {tmp_path}/config.yaml continues the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["check", "NAME"], ["split", "NAME", "out"], ["model", "describe", "NAME.onnx"], ["runs", "NAME"]]
)
def test_what_a_file_system_refuses_anywhere_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is too long, as a folder that one may not enter: met by whoever asks first whether it is there."""
    assert main([word.replace("NAME", "n" * 300) for word in words]) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error
    assert len(error.splitlines()) == 1


def test_an_output_that_is_lost_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk behind ``lce … > FILE``; a standard output that is closed is nobody's wish to read."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["config"]) == 2
    assert "lce config: standard output cannot be written: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["config"]) == 0
