"""Make the committed table of the head's figures again: one `lce bench head` after the other, head.json and head.md.

Takes about forty minutes on two cores and 20 GiB; run it on a machine that does nothing else.

Example:
  lce bench table --out benchmarks
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

HELP = "make the committed table of the head's figures again"

CASES = (
    "--classes 100000 --rate 1.0",
    "--classes 100000 --rate 0.1",
    "--classes 1000000 --rate 1.0 --steps 5",
    "--classes 1000000 --rate 0.1",
    "--classes 1000000 --rate 0.02",
    "--classes 1000000 --rate 1.0 --compute bfloat16 --steps 5",
    "--classes 1000000 --rate 1.0 --compute bfloat16 --rows bfloat16 --steps 5",
    "--classes 1000000 --rate 0.1 --rows bfloat16",
    "--classes 1000000 --rate 0.1 --compute bfloat16 --rows bfloat16",
    "--classes 1000000 --rate 0.1 --momentum 0",
    "--classes 1000000 --rate 0.1 --momentum 0 --rows bfloat16",
    "--classes 1000000 --rate 0.1 --momentum 0 --rows float8",
    "--classes 100000 --rate 1.0 --lce direct --against-no-lce",
    "--classes 100000 --rate 0.1 --lce direct --against-no-lce",
    "--classes 100000 --rate 0.1 --world-size 2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce bench table`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="the folder to write to (benchmarks)")
    parser.add_argument(
        "--only", type=int, nargs="*", metavar="N", help="these alone, counted from 1; the others' rows stay"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def run(args: argparse.Namespace) -> int:
    """Measure every case and write the table; returns the exit status."""
    from tools.benchmarks import head
    from trainer.files import replaced

    wanted = range(1, len(CASES) + 1) if args.only is None else args.only
    if not all(1 <= n <= len(CASES) for n in wanted):
        raise ConfigError(f"--only: the cases are 1 to {len(CASES)}")
    parser = argparse.ArgumentParser()
    head.add_arguments(parser)
    known = _known(args.out / "head.json")
    for number in wanted:
        print(f"case {number}: lce bench head {CASES[number - 1]}", file=sys.stderr)
        case = parser.parse_args([*CASES[number - 1].split(), "--device", args.device])
        known[f"lce bench head {CASES[number - 1]}"] = head.measure(case)
    commands = [f"lce bench head {case}" for case in CASES]
    rows = [{"command": command, **known[command]} for command in commands if command in known]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("head.json", json.dumps(rows, indent=1) + "\n"), ("head.md", as_markdown(rows))):
        with replaced(args.out / name, ConfigError) as partial:
            partial.write_text(text)
    print(as_markdown(rows))
    return 0


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of a table made before, by command."""
    if not path.is_file():
        return {}
    try:
        return {row["command"]: row for row in json.loads(path.read_text())}
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{path}: not a table of lce bench table; remove it, or say --out elsewhere") from None


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table that people read."""
    first, machines = rows[0], list(dict.fromkeys(row["machine"] for row in rows))
    older = (
        "(rows whose JSON has no `memory_seconds`: the products)"
        if any("memory_seconds" not in r for r in rows)
        else ""
    )
    lines = [
        "# The head against the plain implementation",
        "",
        f"{'; '.join(machines)}; torch {first['torch']}; batch {first['batch']}, dimension "
        f"{first['dim']}, {first['margin']}. Made by `lce bench table`; each row is one run in which both sides take "
        "turns of two steps, the second of which counts; figures are medians. The reference is `impl: reference` in "
        "float32 (in the rows with `--against-no-lce`: ours without LCE). “Bound” is the time of four matrix products "
        "at the speed of one in the same run, or of the memory traffic that cannot be avoided where that is longer "
        f"{older}. Peaks are of the whole process; the state is rows, momentum and, with "
        "LCE, centres.",
        "",
        "| command | reference: time, peak | ours: time, peak | ratio | × bound | peak / state | machine | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        costs = [f"{row[s]['seconds']:.4g} s, {row[s]['peak_bytes'] / 2**30:.2f} GiB" for s in ("reference", "ours")]
        ratios = f"{row['ratio']:.2f} | {row['times_bound']:.2f} | {row['times_state']:.2f}"
        lines.append(
            f"| `{row['command']}` | {costs[0]} | {costs[1]} | {ratios} | {row['machine']} | {row['commit']} |"
        )
    return "\n".join(lines) + "\n"
