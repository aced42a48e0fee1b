"""Measure how long the nearest centres of a whole bank take, and how many of the true ones are found.

  lce bench neighbours                            # 1,000,000 centres of dimension 512: 8 GB, see docs/upgrades.md
  lce bench neighbours --bank banks/old --json -  # those of a bank
  lce bench neighbours --classes 200000 --latent 64

Synthetic centres: families of classes around common centres, the vectors of --latent dimensions with variances that
fall as 1/k, as those of trained embeddings do, turned into the whole space.
"""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.arguments import whole_number

if TYPE_CHECKING:
    from trainer.compat.bank.center_bank import CenterBank

HELP = "the nearest centres of a million: time, and the share of the true ones"
FAMILY = 20
"""Classes of a synthetic family, with a cosine of about 0.5 to each other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench neighbours``."""
    parser.add_argument("--bank", type=Path, help="a centre bank (default: a synthetic one)")
    parser.add_argument("--classes", type=whole_number(2), default=1_000_000, help="synthetic classes (1000000)")
    parser.add_argument("--dim", type=whole_number(1), default=512, help="D of the synthetic ones (512)")
    parser.add_argument("--latent", type=whole_number(1), default=256, help="dimensions that they vary in (256)")
    parser.add_argument("--neighbours", type=whole_number(1), default=10, help="of each centre (10)")
    parser.add_argument("--queries", type=whole_number(1), default=10_000, help="centres to compare with all (10000)")
    parser.add_argument("--folder", type=Path, help="where the synthetic bank is made (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Measure and report."""
    from tools.measuring import write_json
    from trainer.compat.bank.center_bank import CenterBank

    if args.bank is not None:
        figures = measure(args, CenterBank.open(args.bank))
    else:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="lce-bench-neighbours-") as folder:
            figures = measure(args, _synthetic(args, Path(folder) / "bank"))
    write_json(figures, args.json)
    if args.json != "-":
        print(
            f"{figures['centres']:,} centres of dimension {figures['dim']}: {figures['seconds']:.1f} s for the "
            f"{args.neighbours} nearest of each; {figures['recall']:.4f} of the true ones of {figures['queries']:,}, "
            f"which take {figures['exact_seconds']:.1f} s: {figures['exact_all_seconds']:.0f} s for all"
        )
    return 0


def measure(args: argparse.Namespace, bank: "CenterBank") -> dict[str, Any]:
    """The figures, as the JSON holds them."""
    import torch
    from torch.nn.functional import normalize

    from tools.measuring import origin, seconds_of
    from trainer.compat.methods.neighbours import exact, nearest
    from trainer.errors import ConfigError

    known = bank.per_class()["mask"].nonzero()[:, 0]
    if len(known) <= args.neighbours:
        raise ConfigError(f"--neighbours {args.neighbours}: the bank has {len(known)} centres")
    rows = normalize(bank.rows(0, bank.num_classes).centers[known])
    found: list[torch.Tensor] = []
    seconds = seconds_of(lambda: found.append(nearest(rows, known, bank, args.neighbours).who))
    which = torch.linspace(0, len(known) - 1, min(args.queries, len(known))).long()
    exact_seconds = seconds_of(
        lambda: found.append(exact(rows[which].clone(), known[which], bank, args.neighbours).who)
    )
    hits = (found[0][which][:, :, None] == found[1][:, None]).any(1)
    return {
        "bench": "neighbours",
        "centres": len(known),
        "dim": bank.dim,
        "latent": None if args.bank else args.latent,
        "neighbours": args.neighbours,
        "queries": len(which),
        "seconds": seconds,
        "recall": float(hits.double().mean()),
        "exact_seconds": exact_seconds,
        "exact_all_seconds": exact_seconds * len(known) / len(which),
        **origin(),
    }


def _synthetic(args: argparse.Namespace, folder: Path) -> "CenterBank":
    import torch

    from trainer.compat.bank.center_bank import BankInfo, BankWriter, CenterBank

    generator = torch.Generator().manual_seed(0)
    latent = min(args.latent, args.dim)
    basis = torch.linalg.qr(torch.randn(args.dim, latent, generator=generator)).Q
    basis *= torch.arange(1, latent + 1).float().rsqrt()
    families = torch.randn(-(-args.classes // FAMILY), latent, generator=generator)
    with BankWriter(folder, args.classes, args.dim, BankInfo()) as writer:
        for start in range(0, args.classes, 1 << 16):
            part = torch.arange(start, min(start + (1 << 16), args.classes))
            own = torch.randn(len(part), latent, generator=generator)
            writer.append(torch.nn.functional.normalize((families[part % len(families)] + own) @ basis.T))
        every = torch.ones(args.classes, dtype=torch.bool)
        writer.finish(torch.zeros(args.classes), every.long(), every)
    return CenterBank.open(folder)
