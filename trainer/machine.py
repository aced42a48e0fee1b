"""The machine: the processor's name and features and the commit of the code, which a result was made on; the cores
that a process may use, and how many threads of them are its own."""

import ctypes
import math
import os
import platform
import subprocess
from itertools import pairwise
from pathlib import Path


def processor_name() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.machine()


def processor_features() -> str:
    """What distinguishes processors for ``-march=native``."""
    return _cpuinfo("flags", "Features") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


def has_gpu_driver() -> bool:
    """Whether the driver of a GPU is installed. Without one torch need not be asked, whose import takes a second."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()  # AMD's
    return True


def usable_cores() -> int:
    """The cores that this process may use: its affinity, within the CPU time that its control group is given."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def largest_share(total: int, world_size: int) -> int:
    """The most that one rank has of ``total`` things shared out evenly, ⌈total/W⌉.

    >>> largest_share(10, 4), largest_share(8, 4), largest_share(0, 4)
    (3, 2, 0)
    """
    return -(-total // world_size)


def other_ranks(on_node: int) -> int:
    """The ranks (``python -m trainer``) on this machine besides the ``on_node`` that one launcher starts here."""
    siblings, others = _ranks_besides_this()
    return others + max(0, siblings - (on_node - 1))


def _ranks_besides_this() -> tuple[int, int]:
    """How many ranks this process's launcher has started besides it, and how many other launchers have."""
    launcher, siblings, others = os.getppid(), 0, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it has ended, or is not ours to read
        if (b"-m", b"trainer") in pairwise(argv[:8]) and int(folder.name) not in (os.getpid(), launcher):
            siblings, others = siblings + (parent == launcher), others + (parent != launcher)
    return siblings, others


def threads_of_a_rank(on_node: int) -> int:
    """The intra-op threads of one of ``on_node`` ranks on this machine: what ``OMP_NUM_THREADS`` says, else its share
    of the cores among them and the ranks of other runs. Threads that outnumber the cores wait for each other at every
    operation: two such runs were 20 times slower.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, usable_cores() // (on_node + other_ranks(on_node)))


def commit() -> str:
    """The short commit of the checkout that this package lies in, with ``+changes`` where tracked files of the packages
    differ from it; ``unknown`` outside of a checkout."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", f"{Path(__file__).parent.name}/{Path(__file__).name}")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "trainer", "launch", "tools")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def interfaces(asked: str) -> list[str]:
    """The network interfaces that a list such as ``GLOO_SOCKET_IFNAME`` names; none where it says which not to take."""
    return [] if asked.startswith("^") else [name for name in asked.lstrip("=").split(",") if name]
