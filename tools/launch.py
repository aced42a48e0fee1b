"""Train as a configuration says: start the ranks on this machine, on many, or hand the job to a queue.

  lce launch configs/FILE.yaml --nproc 2 train.steps=1000
  lce launch configs/FILE.yaml --nproc 8 --nnodes 2 --node-rank 0 --master node0:29500      # the same on node 1
  lce launch configs/data/wf42m.yaml configs/network/r50.yaml configs/gpus/8.yaml --nproc 8    # files in order
  lce launch configs/FILE.yaml --nproc 8 --nnodes 4 --with slurm --gpus 8 --dry-run          # shows the sbatch file
  lce launch configs/FILE.yaml --nnodes 4 --with kubernetes --gpus 8 --image I --claim C --dry-run    # the TrainJob

The same command continues an interrupted run, on any number of ranks. Exit status: 0 finished; 2 wrong use; 70 crash;
75 stopped by SIGTERM and 130 by Ctrl-C, both with a checkpoint.
"""

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tools.arguments import whole_number

if TYPE_CHECKING:
    from launch.job import Job
    from trainer.compat.methods.inputs import Inputs
    from trainer.run.config import Config

QUEUES = ("slurm", "kubernetes")
_OF: dict[tuple[str, ...], str] = {
    QUEUES: "gpus cpus mem script",
    ("slurm",): "time partition account qos constraint exclusive sbatch header module container bind",
    ("kubernetes",): "image claim mount shared_memory runtime namespace",
    ("mpirun", "deepspeed"): "hostfile",
    ("torchrun",): "node_rank rendezvous",
    ("torchrun", "deepspeed"): "master",
    ("torchrun", *QUEUES): "max_restarts",
}
"""Launchers → the options that only they heed."""
_MEMORY = {
    "slurm": (r"(?i:\d+[kmgt]?)", "64G, without i or B"),
    "kubernetes": (r"\d+(\.\d+)?([KMGTP]i|[kMGTP])?", "64Gi"),
}
"""What each queue takes as an amount of memory, and an example."""
_TIME = re.compile(r"(?i:infinite|unlimited)|\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
_HOST = re.compile(r"([^\s-]\S*)(\s+(slots|max[_-]slots)\s*=\s*\d+)*")
"""A line of a host file."""
_HOSTS = {
    "SLURM_JOB_ID",
    "PBS_NODEFILE",
    "LSB_HOSTS",
    "LSB_DJOB_HOSTFILE",
    "PE_HOSTFILE",
    "OMPI_MCA_orte_default_hostfile",
}
"""By one of these mpirun learns of the machines without a hostfile."""
HELP = "train as a configuration says, on one or many processes and machines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce launch``."""
    parser.usage = "%(prog)s [options] config [key=value …]"
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="for example optimizer.lr=0.05; or a further YAML file",
    )
    parser.add_argument("--nproc", type=whole_number(1), help="processes per node (default: one a GPU, or 1)")
    parser.add_argument(
        "--with",
        dest="launcher",
        choices=("torchrun", "mpirun", "deepspeed", *QUEUES),
        default="torchrun",
        help="what starts the ranks, or the queue that the job is handed to (default: torchrun)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print exactly what would run; with --check open it too")
    parser.add_argument(
        "--check", action="store_true", help="open all that the run needs, print what would be trained, start nothing"
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not open data and models here before anything starts: they lie on the computing machines alone",
    )
    parser.add_argument(
        "--max-restarts", type=whole_number(0), default=0, help="start the ranks again after a failure, this often"
    )
    parser.add_argument("--interface", default="", help="network interface for gloo and NCCL, such as eth0")
    nodes = parser.add_argument_group("many machines")
    nodes.add_argument("--nnodes", default="1", help="machines; MIN:MAX with --rendezvous c10d")
    nodes.add_argument("--node-rank", type=whole_number(0), default=0, help="this machine's number (static rendezvous)")
    nodes.add_argument("--master", default="", metavar="HOST:PORT", help="where the ranks meet")
    nodes.add_argument(
        "--rendezvous", choices=("static", "c10d"), default="static", help="c10d: machines may come and go"
    )
    nodes.add_argument("--job-id", default="lce", help="name of the job, and of the c10d rendezvous")
    nodes.add_argument("--hostfile", type=Path, help="host slots=N, a line a machine (mpirun, deepspeed)")
    queue = parser.add_argument_group("SLURM and Kubernetes")
    queue.add_argument("--gpus", type=whole_number(0), default=0, help="GPUs per node")
    queue.add_argument(
        "--cpus", type=whole_number(1), default=0, help="CPUs per node (default: 2 and the decoders, for each rank)"
    )
    queue.add_argument("--mem", default="", help="memory per node, such as 64G (SLURM) or 64Gi (Kubernetes)")
    queue.add_argument("--script", type=Path, help="the file to write (default: lce.sbatch, lce.trainjob.yaml)")
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--time", default="", help="time limit, such as 2-00:00:00")
    for name in ("partition", "account", "qos", "constraint"):
        slurm.add_argument(f"--{name}", default="", help="as named on the cluster")
    slurm.add_argument("--exclusive", action="store_true", help="whole nodes, with all their cores")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; may be repeated"
    )
    slurm.add_argument(
        "--header", type=Path, help="a file of #SBATCH lines and of shell lines that every node needs (module load …)"
    )
    slurm.add_argument("--module", action="append", default=[], help="an environment module to load; may be repeated")
    slurm.add_argument("--container", default="", metavar="IMAGE", help="run in it: srun --container-image (pyxis)")
    slurm.add_argument(
        "--bind",
        action="append",
        default=[],
        metavar="HOST:FOLDER",
        help="a folder in it (default: the working folder)",
    )
    pods = parser.add_argument_group("Kubernetes")
    pods.add_argument("--image", default="", help="container image with lce (launch/Dockerfile makes one)")
    pods.add_argument("--claim", default="", help="PersistentVolumeClaim with data, configuration and run folder")
    pods.add_argument("--mount", default="", help="where the claim lies in the container (default: /work)")
    pods.add_argument("--shared-memory", default="", help="the most of the memory that processes share (16Gi)")
    pods.add_argument("--runtime", default="", help="ClusterTrainingRuntime (torch-distributed)")
    pods.add_argument("--namespace", default="")


def run(args: argparse.Namespace) -> int:
    """Check the configuration and what it names, then start (or show) the job; returns its exit status."""
    from launch.job import Job
    from trainer.errors import ConfigError
    from trainer.run.config import load_config

    _check_idle(args)
    _check_nodes(args)
    _check_options(args)
    if (args.config / "config.yaml").is_file():
        raise ConfigError(f"{args.config}: is a run folder; {args.config / 'config.yaml'} continues the run in it")
    config = load_config(args.config, args.overrides)
    device, present = _devices(config, args)
    if args.launcher in QUEUES and args.gpus and (args.nproc or 0) > args.gpus:
        raise ConfigError(f"--nproc {args.nproc} --gpus {args.gpus}: each rank needs a GPU of its own")
    job = Job(
        config=args.config,
        overrides=tuple(args.overrides),
        nproc=args.nproc or (args.gpus or 1 if args.launcher in QUEUES else present),
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        master=args.master,
        rendezvous=args.rendezvous,
        job_id=args.job_id,
        max_restarts=args.max_restarts,
        interface=args.interface,
        hostfile=args.hostfile,
        run_dir=config.run.dir,
        join_seconds=config.run.timeout_seconds,
    )
    _check_classes(config, job)
    if args.launcher not in QUEUES and device == "cuda":
        from trainer.distributed import choose_device

        choose_device(config.run.device, job.nproc - 1)  # refuses more ranks than GPUs
    if job.many_nodes and args.launcher == "torchrun" and not job.master:
        raise ConfigError(f"--nnodes {job.nnodes}: needs --master HOST:PORT, the first machine as all others reach it")
    if not args.dry_run or args.check:
        _check_hosts(args, job)
    if args.check:
        _check(config, job, device)
        if not args.dry_run:
            return 0
    if not args.dry_run and not args.no_check and args.launcher != "kubernetes":  # its paths are the pods'
        _check_inputs(config, job)
    if args.launcher in QUEUES:
        cpus = args.cpus or (0 if args.exclusive else job.nproc * cpus_of_a_rank(config))
        return (_slurm if args.launcher == "slurm" else _kubernetes)(args, job, cpus)
    return _start(args.launcher, job, args.dry_run)


def _devices(config: "Config", args: argparse.Namespace) -> tuple[Literal["cpu", "cuda"], int]:
    """What the ranks compute on, and how many of them a machine has devices for. torch is asked only where there may be
    a GPU: its import takes longer than all else that comes before the ranks."""
    from trainer.errors import ConfigError
    from trainer.machine import has_gpu_driver

    wanted = config.run.device
    if args.launcher in QUEUES:  # this machine is not the one that computes
        return ("cuda" if args.gpus and wanted != "cpu" else "cpu"), args.gpus
    if wanted == "cpu" or not has_gpu_driver():
        there = 0
    else:
        import torch

        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not there:
        raise ConfigError("run.device = cuda: this machine has no usable CUDA device; use run.device=cpu or auto")
    return ("cuda", there) if there else ("cpu", 1)


def _check_inputs(config: "Config", job: "Job") -> None:
    """Open what the ranks will open, so that what is wrong is printed once and at once, not by each of them."""
    from trainer.run.startup import check

    check(config, _world(job), shown=False)


def _world(job: "Job") -> int:
    """The ranks of a job; where machines may come and go, the fewest."""
    return job.nproc * int(job.nnodes.partition(":")[0])


def _check(config: "Config", job: "Job", device: Literal["cpu", "cuda"]) -> None:
    """Open everything in this process and print the plan. Raises :class:`LceError`: something is wrong."""
    import shutil

    from tools.output import size_text
    from trainer.errors import ConfigError
    from trainer.planning.plan import make_plan
    from trainer.planning.setting import Setting
    from trainer.run.startup import check

    world = _world(job)
    inputs = check(config, world)
    records = None if inputs.dataset is None else len(inputs.dataset.kept)
    bank_dim = None if inputs.bank is None else inputs.bank.dim
    plan = make_plan(Setting(config, inputs.num_classes, inputs.image_size, world, device, bank_dim, records))
    print(f"run folder: {config.run.dir}")
    if inputs.dataset is None:
        print(f"data: synthetic, {inputs.num_classes:,} classes")
    else:
        print(f"data: {inputs.dataset.path}, {records:,} images of {inputs.num_classes:,} classes")
    if inputs.bank is not None:
        print(f"centre bank: of the model {inputs.bank.info.model}, dimension {inputs.bank.dim}")
    for key, path in {"backbone.weights": config.backbone.weights, "head.weights": config.head.weights}.items():
        if path is not None:
            print(f"{key}: {path}")
    if beyond := "" if plan.updates is None else config.beyond_end(plan.updates):
        raise ConfigError(beyond)
    print(f"ranks: {world}" + ("" if plan.updates is None else f", updates: {plan.updates:,}"))
    _show_state(config, inputs, plan.updates)
    if inputs.cross is not None:
        print("memory and disk: not planned, as maps alone are trained; they are small")
        return
    print(f"memory of a rank: {size_text(plan.device_bytes)} on {device}, by `lce plan`'s arithmetic")
    folder = next(path for path in (config.run.dir.absolute(), *config.run.dir.absolute().parents) if path.is_dir())
    there = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))  # a continued run replaces them
    needed, free = plan.most_checkpoints * plan.checkpoint_bytes - there, shutil.disk_usage(folder).free
    print(f"disk: {size_text(max(0, needed))} of checkpoints, {size_text(free)} free")
    if needed > free:
        raise ConfigError(f"run.dir = {config.run.dir}: {size_text(needed)} of checkpoints, {size_text(free)} free")


def _show_state(config: "Config", inputs: "Inputs", updates: int | None) -> None:
    """Say what the run folder holds.

    Raises:
        ConfigError: a run that was finished with other settings, or checkpoints that ``checkpoint.resume`` refuses.
        CheckpointError: checkpoints of other data or of another network.
    """
    import torch

    from trainer.checkpoint import check_shapes
    from trainer.checkpoint_folder import Checkpoint, list_checkpoints, read_seal
    from trainer.errors import CheckpointError
    from trainer.networks import build_backbone
    from trainer.run.engine import refuse_other_settings, refuse_used
    from trainer.run.folder import changes_since, read_summary
    from trainer.run.startup import check_goal, check_origin

    folder = config.run.dir
    finished = updates is not None and read_summary(folder, updates) is not None
    saved = list_checkpoints(folder / "checkpoints")
    refuse_used(config, bool(saved))
    newest: Checkpoint | None = None
    for path in reversed(saved):
        try:
            newest = Checkpoint(path, read_seal(path))
            break
        except CheckpointError as error:
            print(f"run folder: {error}")
    if newest is not None:
        check_origin(newest, config, inputs)
    if finished:
        refuse_other_settings(config)
        print("run folder: finished already; there is nothing to do")
    elif newest is not None:
        if updates is not None:
            check_goal(newest, updates)
        if inputs.cross is None:
            with torch.device("meta"):
                network = build_backbone(config.backbone, inputs.image_size).state_dict()
            check_shapes(newest, {f"module.backbone.{name}": tensor for name, tensor in network.items()})
        print(f"run folder: continues from {newest.folder.name}, if its files are whole")
        for change in changes_since(newest.seal.get("config", {}), config):
            print(f"changed since then: {change}")


def _check_hosts(args: argparse.Namespace, job: "Job") -> None:
    """Refuse hosts that cannot be reached by what was given for them."""
    from trainer.errors import ConfigError

    if job.many_nodes and args.launcher not in QUEUES and job.master:
        _check_master(job.master)
    if job.interface and args.launcher not in QUEUES:
        _check_interface(job.interface)
    if job.hostfile is not None:
        _check_hostfile(job.hostfile, job)
    if job.many_nodes and args.launcher == "mpirun" and job.hostfile is None and not _HOSTS.intersection(os.environ):
        raise ConfigError(
            f"--nnodes {job.nnodes}: mpirun needs --hostfile, with a line `host slots=N` for each machine; without it "
            "all ranks would start on this one"
        )


def _check_interface(asked: str) -> None:
    """Refuse an interface that this machine does not have (the others look for themselves when they start)."""
    import socket

    from trainer.errors import ConfigError
    from trainer.machine import interfaces

    there, names = [name for _, name in socket.if_nameindex()], interfaces(asked)
    if names and not set(names).intersection(there):
        raise ConfigError(f"--interface {asked}: this machine has no such network interface; it has {', '.join(there)}")


def _check_hostfile(path: Path, job: "Job") -> None:
    """Refuse a host file that cannot be read, or whose machines are too few for the job."""
    from trainer.errors import ConfigError
    from trainer.reading import read_text

    needed = "a line `host slots=N` for each machine"
    try:
        lines = [line.partition("#")[0].strip() for line in read_text(path, ConfigError).splitlines()]
    except ConfigError as error:
        raise ConfigError(f"--hostfile {error}; it has {needed}") from None
    slots: dict[str, int | None] = {}
    for number, line in enumerate(lines, 1):
        found = _HOST.fullmatch(line)
        given = re.search(r"\sslots\s*=\s*(\d+)", line)
        if line and (not found or (given and not int(given[1]))):
            raise ConfigError(f"--hostfile {path}: line {number}: {line!r}; it has {needed}")
        if found and found[1] in slots:
            raise ConfigError(f"--hostfile {path}: line {number}: {found[1]} stands there twice; it has {needed}")
        if found:
            slots[found[1]] = int(given[1]) if given else None
    if not slots:
        raise ConfigError(f"--hostfile {path}: names no machine; it has {needed}")
    wanted = int(job.nnodes.partition(":")[0])
    enough = sum(count is None or count >= job.nproc for count in slots.values())
    if enough < wanted:
        raise ConfigError(
            f"--hostfile {path}: names {len(slots)} machine(s), {enough} of them with {job.nproc} or more slots; "
            f"--nnodes {job.nnodes} --nproc {job.nproc} needs {wanted}"
        )


def _check_master(master: str) -> None:
    """Refuse at once what torch would try for minutes."""
    import socket

    from trainer.errors import ConfigError

    host, _, port = master.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--master {master}: {host} is unknown on {socket.gethostname()} ({getattr(error, 'strerror', error)})"
        ) from None


def _check_classes(config: "Config", job: "Job") -> None:
    """Refuse more ranks than classes before they start, where the class count is written down."""
    from trainer.data.index import DESCRIPTION, load_description, table_info
    from trainer.errors import LceError, check_ranks

    data, classes = config.data, None
    try:
        if data.loader == "synthetic":
            classes = data.synthetic_classes
        elif data.labels is not None:
            table = table_info(Path(data.labels))
            classes = None if table is None else table.num_classes
        elif data.path is not None and (Path(data.path) / DESCRIPTION).exists():
            classes = load_description(Path(data.path)).num_classes
    except LceError:
        return  # rank 0 tells
    if classes is not None:
        check_ranks(_world(job), classes)


def _check_nodes(args: argparse.Namespace) -> None:
    from trainer.errors import ConfigError

    numbers = args.nnodes.split(":")
    fewest, most = numbers[0], numbers[-1]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers) or len(numbers) > 2:
        raise ConfigError(f"--nnodes {args.nnodes}: a number of machines, or MIN:MAX with --rendezvous c10d")
    if len(numbers) == 2 and (args.launcher != "torchrun" or args.rendezvous != "c10d"):
        raise ConfigError(f"--nnodes {args.nnodes}: machines come and go with torchrun and --rendezvous c10d alone")
    if int(most) < int(fewest):
        raise ConfigError(f"--nnodes {args.nnodes}: at least {fewest} and at most {most}")
    if args.node_rank >= int(most):
        raise ConfigError(f"--node-rank {args.node_rank}: {args.nnodes} machines have the numbers from 0 on")


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and values that only the queue or torchrun would refuse, later."""
    from trainer.errors import ConfigError

    if args.check and args.no_check:
        raise ConfigError("--check --no-check: one of them")
    port = args.master.rpartition(":")[2]
    if args.master and (":" not in args.master or not port.isdecimal() or not 0 < int(port) < 65536):
        raise ConfigError(f"--master {args.master}: expected HOST:PORT with a port from 1 to 65535")
    if args.launcher in QUEUES and args.mem:
        amount, example = _MEMORY[args.launcher]
        if not re.fullmatch(amount, args.mem):
            raise ConfigError(f"--mem {args.mem}: {args.launcher} takes an amount such as {example}")
    if args.time and not _TIME.fullmatch(args.time):
        raise ConfigError(
            f"--time {args.time}: sbatch takes minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
        )
    for bind in args.bind:
        if not re.fullmatch(r"[^:]+:/[^:]*(:[^:]+)?", bind):
            raise ConfigError(f"--bind {bind}: expected HOST:FOLDER, a folder here and its place in the container")
    if args.script is not None and not args.script.absolute().parent.is_dir():
        raise ConfigError(f"--script {args.script}: the folder {args.script.absolute().parent} does not exist")


def _check_idle(args: argparse.Namespace) -> None:
    """Refuse options that the chosen launcher does not heed."""
    from trainer.errors import ConfigError

    for launchers, names in _OF.items():
        for name in names.split():
            if getattr(args, name) not in (None, "", [], 0, "static") and args.launcher not in launchers:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: has no effect with {args.launcher}; it belongs to --with "
                    + " and --with ".join(launchers)
                )


def _start(launcher: str, job: "Job", dry_run: bool) -> int:
    from importlib import import_module

    module = import_module(f"launch.{launcher}")
    if not dry_run:
        status: int = module.run(job)
        return status
    argv = ["torchrun", *module.arguments(job)] if launcher == "torchrun" else module.command(job)
    settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in job.environment.items())
    print(f"{settings} {shlex.join(argv)}".strip())
    return 0


def cpus_of_a_rank(config: "Config") -> int:
    """What a rank is given where nothing else is said: its own threads (2 at least: one trains, one saves and sends)
    and those that decode."""
    return max(config.run.threads, 2) + getattr(config.data, "workers", 0)


def _slurm(args: argparse.Namespace, job: "Job", cpus: int) -> int:
    from launch import slurm
    from trainer.errors import ConfigError

    try:
        header = args.header.read_text(encoding="utf-8") if args.header is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ConfigError(f"--header {args.header}: cannot be read: {reason}") from None
    allocation = slurm.Allocation(
        gpus=args.gpus,
        cpus=cpus,
        time=args.time,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        mem=args.mem,
        exclusive=args.exclusive,
        options=tuple(args.sbatch),
        header=header,
        modules=tuple(args.module),
        container=args.container,
        mounts=tuple(args.bind),
    )
    return _hand_over(slurm.script(job, allocation), args.script or Path("lce.sbatch"), ["sbatch"], args.dry_run)


def _kubernetes(args: argparse.Namespace, job: "Job", cpus: int) -> int:
    from launch import kubernetes

    pods = kubernetes.Pods(
        image=args.image,
        claim=args.claim,
        gpus=args.gpus,
        cpus=cpus,
        mem=args.mem,
        namespace=args.namespace,
        **{name: getattr(args, name) for name in ("mount", "shared_memory", "runtime") if getattr(args, name)},
    )
    text = kubernetes.text(job, pods)
    return _hand_over(text, args.script or Path("lce.trainjob.yaml"), ["kubectl", "create", "-f"], args.dry_run)


def _hand_over(text: str, path: Path, command: list[str], dry_run: bool) -> int:
    from launch.child import submit

    print(text if dry_run else f"{submit(text, path, command)}\n", end="")
    return 0
