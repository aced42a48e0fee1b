"""A real SLURM of a few virtual nodes on this machine, from Debian's packages, for tests.

All that it writes lies in one folder, munge's socket and key included; it takes ports that are free, and nodes whose
names are loopback addresses, so that nothing of the machine is changed and a SLURM that runs here is left alone.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from trainer.distributed import end_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def missing() -> str:
    """Why no SLURM can be started here; empty: one can."""
    if any(shutil.which(name, path=_PATH) is None for name in PROGRAMS):
        return "SLURM is not installed (make queue-extras)"
    return "" if os.geteuid() == 0 else "starting SLURM needs root"


class VirtualSlurm:
    """A cluster of ``nodes`` nodes with ``cpus`` processors each, which stand for this machine's.

    Use as a context manager; its daemons and jobs end with it, and with this process.

    Args:
        folder: an empty folder for all its files.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.folder, self.nodes = folder, [f"127.0.0.{number + 1}" for number in range(nodes)]
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._cpus = cpus
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "VirtualSlurm":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if len(self._daemons) > 1:
            self._ask("scancel", "--user", "root")
            self.until(lambda: not self._ask("squeue", "-h").stdout.strip(), 60, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self) -> None:
        key, sockets = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = [f"--{name}={self.folder / f'munge.{name}'}" for name in ("log-file", "pid-file", "seed-file")]
        self._run("munged", "--foreground", "--force", f"--socket={sockets}", f"--key-file={key}", *files)
        self.until(sockets.exists, 20)
        control, *ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().partition(".")[0]
        lines = [
            "ClusterName=here",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={control}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            # A job that is queued again waits for its credentials to expire.
            f"AuthInfo=socket={sockets},cred_expire=5",
            "CredType=cred/munge",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmctldPidFile={self.folder / 'control.pid'}",
            f"SlurmdPidFile={self.folder}/node-%n.pid",
            "ReturnToService=2",
            "KillWait=10",
            "MpiDefault=none",
            "MailProg=/bin/true",
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs={self._cpus} State=UNKNOWN"
                for name, port in zip(self.nodes, ports, strict=True)
            ),
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES State=UP",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        for name in self.nodes:
            (self.folder / f"spool-{name}").mkdir()
        (self.folder / "state").mkdir()
        self._run("slurmctld", "-D")
        self.until(lambda: self._ask("scontrol", "ping").returncode == 0, 30)
        for name in self.nodes:
            self._run("slurmd", "-D", "-N", name)
        self.until(
            lambda: self._ask("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == str(len(self.nodes)), 60
        )

    def _run(self, *command: str) -> None:
        log = self.folder / f"{'-'.join([command[0], *command[3:4]]).replace('/', '_')[:40]}.log"
        with log.open("wb") as out:
            program = shutil.which(command[0], path=_PATH)
            assert program is not None
            self._daemons.append(
                subprocess.Popen(
                    [program, *command[1:]],
                    env=self.environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    preexec_fn=end_with_parent,
                )
            )

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd=self.folder
        )

    def command(self, *command: str) -> str:
        """Run one of SLURM's commands; what it prints."""
        done = self._ask(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def until(self, answer: Callable[[], object], seconds: float, check: bool = True) -> None:
        """Wait for something to be so; a failure with the daemons' logs after ``seconds``."""
        end = time.monotonic() + seconds
        while not answer():
            if time.monotonic() > end:
                assert not check, "\n".join(
                    f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in self.folder.glob("*.log")
                )
                return
            time.sleep(0.1)

    def state(self, job: str) -> str:
        """A job's state, such as ``RUNNING`` or ``COMPLETED``."""
        return self._field(job, "JobState")

    def restarts(self, job: str) -> int:
        """How often a job has been queued again."""
        return int(self._field(job, "Restarts"))

    def exit_status(self, job: str) -> int:
        """The exit status of a job's script."""
        return int(self._field(job, "ExitCode").partition(":")[0])

    def hurry(self, job: str) -> None:
        """Let a job that was queued again start soon after its nodes are free, not after the usual two minutes."""
        self.until(lambda: self.state(job) != "COMPLETING", 120)
        time.sleep(3)  # a node refuses what was started in the second in which it was told to end the job

        def started() -> bool:
            if self.state(job) == "PENDING":
                self._ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            return self.state(job) in ("RUNNING", "COMPLETED")

        self.until(started, 120)

    def _field(self, job: str, name: str) -> str:
        fields = dict(word.partition("=")[::2] for word in self.command("scontrol", "show", "job", job).split())
        return fields[name]


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
