"""The demo's steps: skipped when done, continued when interrupted, redone when what they were made from changed."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tools import steps as demo_steps
from tools.steps import StepFailed, Steps, run_lce


class Demo:
    """Three steps a → b → c, each of which appends a letter to its product; records what ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran, self.said = folder, "", list[str]()

    def run(self, settings: dict[str, str], fail_in: str = "") -> str:
        self.ran = ""
        steps = Steps(self.folder, self.said.append)
        for name in "abc":
            product = self.folder / name

            def action(name: str = name, product: Path = product) -> None:
                self.ran += name
                product.mkdir(parents=True, exist_ok=True)
                with (product / "log").open("a") as file:
                    file.write(name)
                if name == fail_in:
                    raise KeyboardInterrupt

            steps.run(name, f"step {name}", [settings.get(name, "")], [product], action, continues=name == "b")
        return self.ran

    def log(self, name: str) -> str:
        return (self.folder / name / "log").read_text()


def test_done_steps_are_not_done_again(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    assert demo.run({}) == "abc"
    assert demo.run({}) == ""
    assert demo.said[-1].startswith("step c: done before")


def test_a_change_redoes_its_step_and_all_after_it_from_nothing(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.run({})
    assert demo.run({"b": "other"}) == "bc"
    assert (demo.log("a"), demo.log("b"), demo.log("c")) == ("a", "b", "c")


@pytest.mark.parametrize(("interrupted", "log"), [("b", "bb"), ("c", "c")])
def test_an_interrupted_step_continues_on_what_it_left_only_where_it_can(
    tmp_path: Path, interrupted: str, log: str
) -> None:
    demo = Demo(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        demo.run({}, fail_in=interrupted)
    assert demo.run({})[0] == interrupted
    assert demo.log(interrupted) == log
    assert demo.run({}) == ""


def test_an_interrupted_step_does_not_continue_with_other_settings(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        demo.run({}, fail_in="b")
    assert demo.run({"b": "other"}) == "bc"
    assert demo.log("b") == "b"


def test_a_missing_product_or_a_damaged_stamp_is_made_again(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.run({})
    (tmp_path / "b" / "log").unlink()
    (tmp_path / "b").rmdir()
    assert demo.run({}) == "b"
    (tmp_path / "steps" / "c.json").write_text("{")
    assert demo.run({}) == "c"
    assert demo.log("c") == "c"


def test_a_failing_command_is_named() -> None:
    with pytest.raises(StepFailed, match=r"`lce launch /nowhere\.yaml.*exit status 2"):
        run_lce(["launch", "/nowhere.yaml"])


@pytest.mark.parametrize("stubborn", [False, True])
def test_interruption_ends_the_child_and_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(demo_steps, "STOP_SECONDS", (1.0, 0.5))
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    program = textwrap.dedent(f"""
        import signal, subprocess, sys, time
        {ignore if stubborn else ""}
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
        print(child.pid, flush=True)
        time.sleep(900)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    demo_steps.end_group(process)
    assert process.poll() is not None
    assert _gone(grandchild)
    process.stdout.close()


def test_sigterm_ends_the_demo_as_ctrl_c_does() -> None:
    with demo_steps.interruptible(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _gone(pid: int) -> bool:
    """Whether a process has ended (a zombie nobody has waited for counts as ended), within two seconds."""
    for _ in range(20):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
