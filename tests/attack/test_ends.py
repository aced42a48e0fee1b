"""However a command is brought to its end, it ends soon, says why in one line, and leaves what the next one needs."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.attack import tallied
from tests.attack.commands import ROOT, data_processes, ended, launched, rank_pids, start, wait_for_step
from tests.banks import write_bank
from tests.data.samples import identity_folders, packed
from tests.runs import tree
from tools.cli import main
from trainer.compat.bank.center_bank import BankInfo
from trainer.data.index import open_dataset
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.errors import DataError

pytestmark = pytest.mark.slow


def test_a_stopped_rank_does_not_keep_the_launcher(tmp_path: Path) -> None:
    """F10."""
    run = launched(tmp_path, train__steps=100000, environment={"STUCK": "3"})
    wait_for_step(tmp_path, 2)
    os.kill(rank_pids(tmp_path)[1], signal.SIGSTOP)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    status, output = ended(run, 90)
    assert status == 70, output
    assert "gave no sign of life for 3 s and was ended" in output
    assert "ended before the checkpoint was complete" in output


def test_a_killed_data_process_is_one_line(tmp_path: Path) -> None:
    """F13."""
    data = packed(tmp_path, 11, 4, (8, 8))
    loader = {"data__loader": "torch", "data__path": str(data), "data__workers": 2}
    run = launched(tmp_path, ranks=1, train__steps=100000, slow=0.1, **loader)
    wait_for_step(tmp_path, 2)
    os.kill(data_processes(rank_pids(tmp_path)[0])[0], signal.SIGKILL)
    status, output = ended(run)
    assert status == 70, output
    assert "a data worker died (killed, perhaps for want of memory)" in output
    assert "Traceback" not in output, output


@tallied("full disk: /dev/shm", "refused")
def test_no_room_in_shared_memory_is_one_line_at_once(tmp_path: Path) -> None:
    """A container's /dev/shm of 64 MiB is soon full; the rank waited for run.timeout_seconds."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")
    data = packed(tmp_path, 11, 4, (64, 64))
    code = """
import sys
from pathlib import Path
from tests.data.samples import loader_of, take
from trainer.data.index import open_dataset
from trainer.errors import DataError
try:
    take(loader_of(open_dataset(Path(sys.argv[1])), "torch", batch_size=8, workers=2), 3)
except DataError as error:
    print("refused:", error)
"""
    words = f"mount -t tmpfs -o size=128k none /dev/shm && exec {sys.executable} -c '{code}' {data}"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    if "mount" in done.stderr and "refused" not in done.stdout:
        pytest.skip("mounts are not permitted here")
    assert "refused: /dev/shm: no room for a batch of 393,216 bytes" in done.stdout, done.stderr
    assert "--shm-size" in done.stdout
    assert "Traceback" not in done.stderr


def huge_png(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [65500, 12000])
@tallied("hostile files: pictures", "handled")
def test_a_picture_of_too_many_pixels_is_named_and_the_rest_is_packed(tmp_path: Path, side: int) -> None:
    """F12."""
    source = identity_folders(tmp_path / "a", 2, 3)
    (source / "person00/0.jpeg").write_bytes(huge_png(side, side))
    with pytest.raises(DataError, match=r"person00/0\.jpeg: .*pixels.* `skip_damaged`"):
        pack(list_source(source), tmp_path / "out", PackOptions())
    made = pack(list_source(source), tmp_path / "out2", PackOptions(skip_damaged=True))
    assert (made.records, made.skipped) == (5, 1)
    assert "person00/0.jpeg" in (tmp_path / "out2/skipped.txt").read_text()


@tallied("hostile files: pictures", "handled")
def test_a_pipe_among_the_pictures_is_left_out_like_any_damage(tmp_path: Path) -> None:
    source = identity_folders(tmp_path / "a", 2, 3)
    os.mkfifo(source / "person00/9.png")
    made = pack(list_source(source), tmp_path / "out", PackOptions(skip_damaged=True))
    assert (made.records, made.skipped) == (6, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounts are not permitted here: a full disk cannot be tried")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


@tallied("full disk", "refused")
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, small_disk: Path) -> None:
    source = tmp_path / "a"
    for label in range(2):
        (source / f"p{label}").mkdir(parents=True)
        for k in range(30):
            pixels = np.random.default_rng(100 * label + k).integers(0, 256, (64, 64, 3), np.uint8)
            import PIL.Image

            PIL.Image.fromarray(pixels).save(source / f"p{label}/{k}.png")
    words = ["-m", "tools.cli", "pack", source, small_disk / "out", "--part-records", "10", "--processes", "1"]
    status, output = ended(start(words))
    assert status == 2, output
    assert "No space left" in output
    assert "Traceback" not in output
    rows = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "labels.npy", np.arange(4000))
    bank = ["-m", "tools.cli", "centers", "from-embeddings", tmp_path / "rows.npy", small_disk / "bank"]
    status, output = ended(start([*bank, "--labels", tmp_path / "labels.npy"]))
    assert status == 2, output
    assert "Traceback" not in output
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert ended(start(words))[0] == 0
    assert len(open_dataset(small_disk / "out")) == 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "64"], "64 ranks for 11 classes: a rank would own none"),
        (["--nproc", "4", "--nnodes", "3", "--master", "127.0.0.1:29555"], "12 ranks for 11 classes"),
        (["--nproc", "0"], "expected a whole number of at least 1"),
        (["--nnodes", "2", "--master", "no.such.host.invalid:29500"], "no.such.host.invalid is unknown on"),
        (["--nnodes", "2", "--master", "127.0.0.1:port"], "expected HOST:PORT"),
        (["--nnodes", "2", "--master", "127.0.0.1:99999"], "expected HOST:PORT"),
    ],
)
@tallied("commands that cannot start", "refused")
def test_what_cannot_start_is_refused_before_ranks_start(
    tmp_path: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree(tmp_path / "run", backbone__name="small")))
    try:
        status: object = main(["launch", str(tmp_path / "c.yaml"), *words])
    except SystemExit as end:
        status = end.code
    out, err = capfd.readouterr()
    output = out + err
    assert status == 2, output
    assert message in output
    assert len(output.splitlines()) < 12, output
    assert not (tmp_path / "run").exists()


def test_a_reader_that_has_enough_is_no_crash(tmp_path: Path) -> None:
    count = 50
    write_bank(
        tmp_path / "bank",
        centers=torch.nn.functional.normalize(torch.randn(count, 8)),
        boundaries=torch.zeros(count),
        counts=torch.ones(count, dtype=torch.int64),
        mask=torch.ones(count, dtype=torch.bool),
        info=BankInfo(made_from="embeddings", source="x"),
    )
    for words in (["centers", "info", str(tmp_path / "bank")], ["--help"], ["launch", "--help"]):
        command = f"{sys.executable} -m tools.cli {' '.join(words)} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 141)
        assert done.stderr.replace("comparing centres", "").find("Traceback") < 0, done.stderr
        assert "BrokenPipe" not in done.stderr


def test_the_rows_of_records_without_a_class_are_named(tmp_path: Path) -> None:
    from tests.models.test_export import SIZE, saved

    saved(tmp_path / "old")
    data = packed(tmp_path, 3, 4, SIZE)
    labels = np.array(open_dataset(data).labels)
    labels[:2] = -1
    np.save(tmp_path / "table.npy", labels)
    words = ["centers", "from-model", tmp_path / "old", data, tmp_path / "bank", "--labels", tmp_path / "table.npy"]
    status, output = ended(start(["-m", "tools.cli", *words, "--embeddings", tmp_path / "rows.npy"]))
    assert status == 0, output
    assert "the 2 records without a class (label −1, or damaged) were not embedded and have rows of zeros" in output
    assert (np.abs(np.load(tmp_path / "rows.npy")).sum(1) == 0).sum() == 2
