"""Compile the head's Triton kernels for GPUs that need not be here, and say what they take of each.

Every kernel is compiled for D = 512 and 1,024 samples. What counts: no register spills (a kernel's stack is empty), and
the shared memory is below what a block may have. Times are not among the figures: they need a GPU.

Examples:
  lce bench triton
  lce bench triton --out benchmarks      # the committed table: triton.json and triton.md
  lce bench triton --architectures 90

Needs the package triton (pip install 'lce-trainer[triton]'). Takes some minutes.
Exit status: 0 all fit; 1 one does not; 2 wrong use, or no triton.
"""

import argparse
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HELP = "compile the head's Triton kernels for several GPUs: registers, spills, shared memory"

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a block may have, by compute capability (A100, H100 and H200, B200)."""
DIM, BATCH = 512, 1024
VARIANTS = (
    ("first", "float32", "bfloat16", False, False),
    ("first", "float32", "bfloat16", True, False),
    ("first", "float32", "bfloat16", True, True),
    ("first", "bfloat16", "bfloat16", False, False),
    ("first", "bfloat16", "bfloat16", True, False),
    ("first", "float32", "tf32", False, False),
    ("first", "float32", "tf32", True, False),
    ("first", "float32", "tf32", True, True),
    ("first", "float32", "float32", True, False),
    ("first", "float32", "float32", True, True),
    ("second", "float32", "bfloat16", True, False),
    ("second", "float32", "bfloat16", True, True),
    ("second", "float32", "tf32", True, False),
    ("second", "float32", "float32", True, False),
    ("second", "float32", "float32", True, True),
)
"""Pass, rows, products, whether rows are drawn (then the sampling correction is compiled in too), and whether with the
inter-class filter."""
_SHORT = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench triton``."""
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=list(SHARED_BYTES), metavar="SM", help="such as 90 (80 90 100)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write triton.json and triton.md there")


def run(args: argparse.Namespace) -> int:
    """Compile and report; returns the exit status."""
    from tools.measuring import origin, write_json
    from tools.progress import progress_bars
    from trainer.errors import ConfigError

    if importlib.util.find_spec("triton") is None:
        raise ConfigError("needs triton, which is not installed: pip install 'lce-trainer[triton]'")
    if unknown := [sm for sm in args.architectures if sm not in SHARED_BYTES]:
        raise ConfigError(f"--architectures {unknown[0]}: known: {', '.join(map(str, SHARED_BYTES))}")
    cases = [(sm, *variant) for sm in args.architectures for variant in VARIANTS]
    found: list[dict[str, Any]] = []
    with progress_bars() as bars:
        for done, case in enumerate(cases):
            bars.update("compiling", done, len(cases))
            found.append(compiled(*case))
    figures = {"bench": "triton", "dim": DIM, "batch": BATCH, "triton": _version(), "kernels": found, **origin()}
    if args.out:
        write_json(figures, str(args.out / "triton.json"))
        (args.out / "triton.md").write_text(as_markdown(figures), encoding="utf-8")
    print(as_markdown(figures), end="")
    return 0 if all(one["fits"] for one in found) else 1


def compiled(sm: int, which: str, rows: str, products: str, drawn: bool, filtered: bool) -> dict[str, Any]:
    """What one kernel takes on one architecture.

    Args:
        sm: compute capability, 90 for 9.0. which: ``first`` or ``second``. rows: their dtype. products: what they
            take. drawn: gather the rows. filtered: with the inter-class filter.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.head import triton_kernels
    from trainer.head.triton_pass import Tile

    kernel = getattr(triton_kernels, which)
    tile = Tile.of(which == "second", getattr(torch, products.replace("tf32", "float32")), BATCH, filtered)
    constants = _constants(which, drawn, filtered) | {"PRECISION": "tf32" if products == "tf32" else "ieee"}
    constants |= {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    types = {name: _type(name, which, rows, products) for name in kernel.arg_names if name not in constants}
    pointers = [number for number, kind in enumerate(types.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(number,): [["tt.divisibility", 16]] for number in pointers},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    return {
        "architecture": sm,
        "kernel": which,
        "rows": rows,
        "products": products,
        "drawn": drawn,
        "filtered": filtered,
        "tile": [tile.BM, tile.BN, tile.BK],
        "warps": tile.num_warps,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": made.metadata.shared,
        "fits": stack == 0 and made.metadata.shared <= SHARED_BYTES[sm],
    }


def _constants(which: str, drawn: bool, filtered: bool) -> dict[str, Any]:
    both = {"D": DIM, "BATCH": BATCH, "CORRECTED": drawn, "FILTER": filtered}
    return both | ({"SAMPLED": drawn, "MOMENTUM": True, "ALIGN": True} if which == "first" else {})


def _type(name: str, which: str, rows: str, products: str) -> str:
    """A kernel's argument as Triton writes it."""
    own = {"INDEX": "*i64", "PLACES": "*i64", "ORDER": "*i32", "X": f"*{_SHORT[products]}", "Q": f"*{_SHORT[products]}"}
    own |= {"V": f"*{_SHORT[rows]}", "W": f"*{_SHORT[rows if which == 'first' else products]}"}
    if name in own:
        return own[name]
    if name.isupper():
        return "*fp32"
    return "fp32" if name in ("shift", "limit", "scale") else "i32"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what was spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers: {text!r:.200}")
    return int(found[1]), int(found[2])


def _version() -> str:
    import triton

    return str(triton.__version__)


def as_markdown(figures: dict[str, Any]) -> str:
    """The table that people read."""
    lines = [
        f"triton {figures['triton']}, D = {figures['dim']}, {figures['batch']:,} samples; made by `lce bench triton`. "
        "No GPU took part: these are the compiler's figures.",
        "",
        "| architecture | pass | rows | products | tile | registers | spilled | shared memory | fits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in figures["kernels"]:
        tile = " × ".join(map(str, one["tile"]))
        rows = one["rows"] + ", drawn" * one["drawn"] + ", filter" * one["filtered"]
        takes = f"{one['registers']} | {one['stack_bytes']} B | {one['shared_bytes'] / 1024:.0f} KiB"
        fits = "yes" if one["fits"] else "no"
        lines.append(
            f"| sm_{one['architecture']} | {one['kernel']} | {rows} | {one['products']} | {tile} | {takes} | {fits} |"
        )
    return "\n".join(lines) + "\n"
