"""What a run will need, before it is queued: memory of a rank by part, bytes per update, size on disk, hours.

  lce plan configs/data/ms1mv3.yaml configs/network/r50.yaml --classes 93431 --gpus 8 head.sample_rate=0.1
  lce plan --classes 29e6 --dim 512 --backbone iresnet50 --gpus 8 --batch 128 --memory 32GiB
  lce plan --classes 2e6 --gpus 8 --link-gbps 100 --samples-per-second 5000 --records 42e6 --json -
  lce plan --classes 2e6 --gpus 64 --batch 128 --simulate 512    # run one update as each kind of rank of 512
  lce plan --verify                                              # planned next to measured on this machine, 3 minutes

Files are a recipe's layers; --classes is needed only where the data set is not there. Tables and bytes sent are exact;
what a step of the head needs besides is a model of the code, within a tenth of the measured peak on the CPU (--verify,
small networks). What was not measured on such a device is marked. Exit status 1: it does not fit --memory, the
simulation found a problem, or --verify one that is off by more than a tenth.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from tools.arguments import above_zero, whole_number
from tools.output import size_text

if TYPE_CHECKING:
    from trainer.head.config import HeadConfig
    from trainer.planning.plan import Holds, Plan
    from trainer.planning.setting import Setting
    from trainer.planning.simulation import Simulated
    from trainer.run.config import Config

Case = tuple[int, float, int]
"""Classes, sample rate and ranks of what --verify measures."""
HELP = "memory, traffic and time of a run before it is queued"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


GPUS = {"A100": 79 * 2**30, "H100": 79 * 2**30, "H200": 139 * 2**30, "B200": 178 * 2**30}
"""What torch finds free on an empty one (those of 80 GB where there are several), rounded down to GiB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce plan``."""
    parser.add_argument("config", nargs="?", help="YAML file (default: a run of the sizes below)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example head.sample_rate=0.1"
    )
    sizes = parser.add_argument_group("sizes, where the configuration does not say or is to be overruled")
    sizes.add_argument("--classes", type=whole_number(1), metavar="C", help="all classes")
    sizes.add_argument("--dim", type=whole_number(1), help="D, the embedding's dimension")
    sizes.add_argument("--backbone", help="its name, such as iresnet50 (r50 for short)")
    sizes.add_argument(
        "--gpus", "--ranks", dest="ranks", type=whole_number(1), default=1, help="ranks, one a device (1)"
    )
    sizes.add_argument("--batch", type=whole_number(1), metavar="b", help="samples per rank")
    sizes.add_argument("--rate", type=float, help="sample rate of the head")
    sizes.add_argument(
        "--rows",
        choices=("float32", "bfloat16", "float8"),
        help="dtype of the rows and their state; float8: without momentum",
    )
    sizes.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="of the backbone")
    sizes.add_argument("--image-size", type=whole_number(1), metavar="PIXELS", help="side of the images")
    sizes.add_argument("--records", type=whole_number(1), metavar="N", help="images of an epoch")
    sizes.add_argument("--lce", type=whole_number(1), metavar="D1", help="LCE against centres of this dimension")
    sizes.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, unless run.device is cpu")
    more = parser.add_argument_group("what else is asked")
    more.add_argument(
        "--memory",
        type=parse_bytes,
        metavar="SIZE",
        help=f"of a device, such as 80GiB or {', '.join(GPUS)}: does it fit, what would, how many classes do",
    )
    more.add_argument(
        "--link-gbps", type=above_zero, metavar="G", help="10⁹ bits per second of a rank's link: time to send"
    )
    more.add_argument("--samples-per-second", type=above_zero, metavar="S", help="measured, all ranks together: hours")
    more.add_argument(
        "--simulate", type=whole_number(1), metavar="N", help="check the configuration for N ranks without devices"
    )
    more.add_argument("--verify", action="store_true", help="measure planned runs here, in processes of their own")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Plan, simulate or verify; returns the exit status."""
    if args.config is not None and "=" in args.config:
        args.config, args.overrides = None, [args.config, *args.overrides]
    return _verify(args) if args.verify else _plan(args)


def _verify(args: argparse.Namespace) -> int:
    from tools.measuring import origin
    from tools.output import write_json
    from tools.plan_verify import CASES, as_text, case_setting, verify
    from tools.progress import progress_bar
    from trainer.planning.setting import check_sizes

    device = args.device or "cpu"
    cases = CASES if args.classes is None else ((args.classes, 1.0 if args.rate is None else args.rate, args.ranks),)
    if device == "cuda":
        cases = _within_gpus(cases)
    settings = [case_setting(classes, rate, ranks, device, args.overrides) for classes, rate, ranks in cases]
    for setting in settings:
        check_sizes(setting)
    rows: list[dict[str, Any]] = []
    with progress_bar("measuring") as progress:
        for number, setting in enumerate(settings):
            if progress is not None:
                progress(number, len(settings))
            rows += verify([setting])
    good = all(row["ok"] for row in rows)
    write_json({"plan": "verify", **origin(), "ok": good, "cases": rows}, args.json)
    if args.json != "-":
        print(as_text(rows))
    return 0 if good else 1


def _within_gpus(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases whose ranks have a GPU each. Raises :class:`trainer.errors.ConfigError` where none has."""
    import torch

    from trainer.errors import ConfigError

    there, needed = torch.cuda.device_count(), min(ranks for _, _, ranks in cases)
    if there < needed:
        raise ConfigError(
            f"--verify --device cuda: needs {needed} GPU(s), torch sees {there}; take --device cpu or fewer --gpus"
        )
    return tuple(case for case in cases if case[2] <= there)


def _plan(args: argparse.Namespace) -> int:
    from tools.output import write_json
    from trainer.planning.plan import changes_to_fit, make_plan

    setting = make_setting(args)
    plan = make_plan(setting)
    changes = changes_to_fit(plan, args.memory) if args.memory and plan.device_bytes > args.memory else []
    simulated = None
    if args.simulate:
        from trainer.planning.simulation import simulate

        simulated = simulate(setting, args.simulate)
    figures = as_figures(plan, args)
    held = _held(plan, args)
    figures["holds"] = None if held is None else asdict(held)
    figures["changes_to_fit"] = [asdict(change) for change in changes]
    figures["simulation"] = None if simulated is None else asdict(simulated)
    write_json(figures, args.json)
    if args.json != "-":
        print(
            "\n".join(
                [
                    *_describe(plan, args),
                    *_holds(plan, args, held),
                    *_advice(plan, args, changes),
                    *_simulation(simulated, args),
                ]
            )
        )
    return 1 if figures["fits"] is False or (simulated is not None and simulated.problems) else 0


def make_setting(args: argparse.Namespace) -> "Setting":
    """The setting that the command line and the configuration describe.

    Raises:
        ConfigError: a wrong configuration, sizes that nothing says, or that training would refuse.
    """
    from trainer.compat.methods.config import LceCrossConfig
    from trainer.data.config import ImagesConfig, SyntheticConfig
    from trainer.data.index import open_dataset, outside_allowed
    from trainer.errors import ConfigError
    from trainer.planning.setting import Setting, check_sizes

    config = _config(args)
    if config.of(LceCrossConfig):
        raise ConfigError("compat.mode = cross-model: trains maps alone, without a head; there is nothing to plan")
    data = config.data
    classes, records, pixels = args.classes, args.records, args.image_size
    size = (pixels, pixels) if pixels else None
    if isinstance(data, SyntheticConfig):
        classes, records = classes or data.synthetic_classes, records or data.synthetic_records
        size = size or (data.synthetic_size, data.synthetic_size)
    elif isinstance(data, ImagesConfig) and data.path.exists():
        with outside_allowed(data.allow_outside):
            dataset = open_dataset(data.path, data.labels)
        classes, records = classes or dataset.num_classes, records or len(dataset.kept)
        size = size or dataset.info.image_size
    if classes is None:
        raise ConfigError(
            f"{getattr(data, 'path', 'data')}: not there, so the number of classes is not known: give --classes (and "
            "--records)"
        )
    bank_dim = args.lce
    if bank_dim is None and config.methods:
        bank = next((one.bank for one in config.methods if one.bank is not None), None)
        bank_dim = config.backbone.dim
        if bank is not None and bank.exists():
            from trainer.compat.bank.center_bank import CenterBank

            bank_dim = CenterBank.open(str(bank)).dim
    device: Literal["cpu", "cuda"] = args.device or ("cpu" if config.run.device == "cpu" else "cuda")
    setting = Setting(config, classes, size or (112, 112), args.ranks, device, bank_dim, records)
    check_sizes(setting)
    return setting


def _config(args: argparse.Namespace) -> "Config":
    from trainer.errors import ConfigError
    from trainer.run.config import load_config, parse_config

    name = None if args.backbone is None else re.sub(r"^r(\d+)$", r"iresnet\1", args.backbone)
    keys = {
        "backbone.dim": args.dim,
        "backbone.name": name,
        "data.batch_size": None if args.batch is None else args.batch * args.ranks,
        "head.sample_rate": args.rate,
        "head.rows": args.rows,
        "train.precision": args.precision,
    }
    if args.lce is not None:
        keys |= {"compat.method": "lce", "compat.bank": "planned"}
    settings = [f"{key}={value}" for key, value in keys.items() if value is not None]
    if args.rows == "float8" and not any(word.startswith("head.optimizer.") for word in args.overrides):
        settings.append("head.optimizer.momentum=0")
    if args.config is not None:
        return load_config(args.config, [*args.overrides, *settings])
    if args.classes is None:
        raise ConfigError(
            "give a configuration, or the sizes: --classes 29e6 --backbone iresnet50 --gpus 8 --batch 128"
        )
    data: dict[str, Any] = {"loader": "synthetic", "synthetic_classes": args.classes}
    data |= {"synthetic_records": args.records} if args.records else {}
    tree: dict[str, Any] = {"run": {"dir": "planned"}, "data": data}
    if args.batch is None:
        tree["data"]["batch_size"] = 128 * args.ranks
    return parse_config(tree, "lce plan", [*args.overrides, *settings])


def as_figures(plan: "Plan", args: argparse.Namespace) -> dict[str, Any]:
    """The plan as JSON values."""
    setting, speed, link = plan.setting, args.samples_per_second, args.link_gbps
    seconds = None if link is None else plan.link_seconds(link)
    return {
        "plan": "run",
        "classes": setting.num_classes,
        "dim": setting.config.backbone.dim,
        "backbone": setting.config.backbone.name,
        "ranks": setting.world_size,
        "batch": setting.config.data.batch_size,
        "rate": setting.config.head.sample_rate,
        "device": setting.device,
        "memory": [asdict(part) for part in plan.memory],
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "memory_limit_bytes": args.memory,
        "fits": None if args.memory is None else plan.device_bytes <= args.memory,
        "traffic": [asdict(c) | {"sent_bytes": c.sent_bytes(setting.world_size)} for c in plan.traffic],
        "sent_bytes": plan.sent_bytes,
        "link_seconds": seconds,
        "link_share": None if seconds is None or speed is None else seconds / plan.step_seconds(speed),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "kept_bytes": plan.kept_bytes,
        "updates": plan.updates,
        "epochs": _epochs(plan),
        "hours": None if speed is None else plan.hours(speed),
    }


def _epochs(plan: "Plan") -> float | None:
    """Passes over the data, where their number is known."""
    setting = plan.setting
    if plan.updates is None or setting.records is None:
        return None
    train, data = setting.config.train, setting.config.data
    return plan.updates * train.accumulate * data.batch_size / setting.records


def _rates(head: "HeadConfig") -> str:
    """Such as ``0.1, from update 20,000 on 1``."""
    (_, first), *later = head.rates
    return ", ".join([f"{first:g}", *(f"from update {update:,} on {rate:g}" for update, rate in later)])


def _describe(plan: "Plan", args: argparse.Namespace) -> list[str]:
    setting = plan.setting
    config = setting.config
    lines = [
        f"{setting.num_classes:,} classes, dimension {config.backbone.dim}, {config.backbone.name}, "
        f"global batch {config.data.batch_size:,} on {setting.world_size} × {setting.device}, "
        f"sample rate {_rates(config.head)}, rows {config.head.rows}",
        "",
        "memory of a rank" + ("" if setting.device == "cpu" else " (GPU)"),
        *_parts(plan, False),
    ]
    for method in config.methods:
        if (old := getattr(method, "old_model", None)) is not None:
            lines.append(f"not counted: {old}, which is run along on every batch (compat.old_model)")
    if plan.host_bytes:
        lines += ["host memory of a rank", *_parts(plan, True)]
    if plan.traffic:
        lines += ["", "an update, on every rank"]
        for c in plan.traffic:
            times, most = f"{c.count} × " if c.count > 1 else "", "" if c.exact else "at most "
            lines.append(f"  {c.purpose:46} {c.operation:15} {most}{times}{size_text(c.tensor_bytes)}")
        lines.append(f"  {'sent by a rank (ring)':46} {'':15} {size_text(plan.sent_bytes)}")
    kept = f"{plan.kept_checkpoints} kept at the end: {size_text(plan.kept_bytes)}"
    lines += ["", f"checkpoint on disk: {size_text(plan.checkpoint_bytes)}, {kept}"]
    if plan.updates is not None:
        epochs = _epochs(plan)
        assumed = f" (assumed: {setting.records:,} records)" if args.config is None and not args.records else ""
        lines.append(f"updates: {plan.updates:,}" + ("" if epochs is None else f" in {epochs:.3g} epochs{assumed}"))
    return lines + _times(plan, args)


def _holds(plan: "Plan", args: argparse.Namespace, one: "Holds | None") -> list[str]:
    """How many classes a rank's memory holds: the one that is given, on a GPU else an H200's."""
    if one is None:
        return []
    from trainer.compat.methods.config import LceConfig

    on_host = "" if one.lce_on_host is None else f", {one.lce_on_host:,} with them in host memory"
    what = f"{size_text(one.memory_bytes)}" + ("" if args.memory else ", an H200's,")
    ranks = "" if plan.setting.world_size == 1 else f" on each of {plan.setting.world_size} ranks"
    methods = plan.setting.config.methods
    centres = f"  with LCE's centres: {one.lce:,} with them next to the rows{on_host}"
    shown = not methods or any(isinstance(method, LceConfig) for method in methods)
    return ["", f"{what}{ranks} would hold {one.classes:,} classes", *([centres] if shown else [])]


def _held(plan: "Plan", args: argparse.Namespace) -> "Holds | None":
    from trainer.planning.plan import holds

    memory = args.memory or (GPUS["H200"] if plan.setting.device == "cuda" else None)
    return None if memory is None else holds(plan, memory)


def _times(plan: "Plan", args: argparse.Namespace) -> list[str]:
    lines, speed = [], args.samples_per_second
    if args.link_gbps is not None and plan.traffic:
        seconds = plan.link_seconds(args.link_gbps)
        share = "" if speed is None else f", {seconds / plan.step_seconds(speed):.1%} of an update if nothing overlaps"
        lines.append(f"sending at {args.link_gbps:g} Gbit/s: {seconds * 1e3:.2f} ms an update{share}")
    if speed is not None:
        hours = plan.hours(speed)
        lines.append(f"at {speed:g} samples/s: {plan.step_seconds(speed):.4g} s an update")
        lines.append("  hours: give --records or train.steps" if hours is None else f"  {hours:.1f} hours in all")
    return lines


def _parts(plan: "Plan", on_host: bool) -> list[str]:
    lines = []
    for part in plan.memory:
        if part.on_host == on_host:
            when = {"always": "", "step": "in a step", "load": "while a checkpoint is loaded"}[part.moment]
            when += "" if part.measured else "  (assumed)"
            lines.append(f"  {part.name:42} {size_text(part.bytes):>12}  {when}".rstrip())
    total = plan.host_bytes if on_host else plan.device_bytes
    return [*lines, f"  {'peak':42} {size_text(total):>12}"]


def _advice(plan: "Plan", args: argparse.Namespace, changes: Any) -> list[str]:
    if args.memory is None:
        return []
    if plan.device_bytes <= args.memory:
        return ["", f"fits {size_text(args.memory)}: {size_text(args.memory - plan.device_bytes)} to spare"]
    lines = ["", f"does NOT fit {size_text(args.memory)}; what would change that:"]
    return lines + [
        f"  {'fits    ' if c.fits else 'too much'} {size_text(c.peak_bytes):>12}  {c.text}" for c in changes
    ]


def _simulation(simulated: "Simulated | None", args: argparse.Namespace) -> list[str]:
    if simulated is None:
        return []
    first, last, empty = simulated.owned
    lines = [
        "",
        f"simulated as {args.simulate} ranks: {first:,} classes on the first, {last:,} on the last that owns any",
    ]
    lines.append(f"  {empty} ranks without a class; {simulated.samples[1]} to {simulated.samples[0]} samples a rank")
    if simulated.collectives:
        ranks = ", ".join(map(str, simulated.ranks))
        lines.append(f"  ranks {ranks} took a real step on scaled sizes: {len(simulated.collectives)} collectives")
    return [*lines, *(f"  PROBLEM: {problem}" for problem in simulated.problems or ())] + (
        [] if simulated.problems else ["  nothing is wrong"]
    )


def parse_bytes(text: str) -> int:
    """A size such as ``80GiB`` or ``80GB`` in bytes, or a GPU's name. Raises :class:`argparse.ArgumentTypeError`."""
    if text.upper() in GPUS:
        return GPUS[text.upper()]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|K|M|G|T|Ki|Mi|Gi|Ti)B?", text)
    if not found or (not found[2] and float(found[1]) < 2**20):  # 80 is meant as something else
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 80GiB or 80GB")
    size = float(found[1]) * _UNITS[found[2]]
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"{text}: at least a byte, and less than 8 EiB")
    return int(size)
