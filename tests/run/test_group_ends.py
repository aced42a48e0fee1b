"""No thread of the process group is there while a rank's interpreter ends, which it could abort (SIGABRT)."""

from pathlib import Path

import pytest

from tests import forked

RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
THREADS = """
import pathlib

def threads():
    names = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)
"""
IMPORTED_LATER = """
from trainer.distributed import on_main, process_group

with process_group("cpu") as ranks:
    import torch.distributed.nn.functional  # as torch itself does
    on_main(lambda: 3, ranks)
    print(f"within {threads() > 0}")
print(f"left {threads()}")
"""
TRAINED = """
import atexit, runpy, sys

class Ending:
    def __del__(self):
        print("the interpreter ends")

atexit.register(print, "exit functions run")
sys.modules["ending"] = Ending()
sys.argv = ["trainer", *sys.argv[1:]]
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""
CONFIG = """
run: {device: cpu, threads: 1, dir: run}
data: {loader: synthetic, batch_size: 4, synthetic_classes: 8, synthetic_size: 32, synthetic_records: 24}
backbone: {name: small, dim: 6}
optimizer: {lr: 0.1}
train: {steps: 2}
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_no_thread_outlives_the_group(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(THREADS + IMPORTED_LATER)
    done = forked.run([*RANKS, str(script)])
    assert [done.stdout.count(line) for line in ("within True", "left 0")] == [2, 2], done.stdout + done.stderr


def test_a_rank_that_has_trained_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(TRAINED)
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = forked.run([*RANKS, "rank.py", "run.yaml"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exit functions run") == 2
    assert "the interpreter ends" not in done.stdout
