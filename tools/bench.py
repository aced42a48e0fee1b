"""Measure a part of the product against its plain implementation: both sides in one run, medians, JSON.

Examples:
  lce bench head --classes 1000000 --rate 0.1          # the class-sharded head against the plain one
  lce bench head --classes 100000 --rate 1.0 --json -
  lce bench input                                      # the loaders against a bare DALI pipeline
  lce bench compat-step --method l2                    # what reading old embeddings costs an update
  lce bench compat --methods bct,lce --seeds 1         # ways to stay compatible against each other
  lce bench chain --methods lce,bct                    # five models after one another
  lce bench criterion                                  # new→old above old→old, all modes and dimensions
  lce bench changes                                    # the same for other data, loss, architecture, dimension
"""

import argparse
import importlib
import importlib.util
import pkgutil

from trainer.errors import ConfigError

HELP = "measure a part against its plain implementation"

ONLY_IN_A_CLONE = ("chain", "changes", "compat", "criterion", "figures", "million", "results", "rows", "table")
"""The files of tools/results, which the wheel leaves out: they only make pages of docs/ again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand for every file in tools/benchmarks and tools/results that measures something."""
    which = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    # Loaded by name, so that the command knows no benchmark: a benchmark may use the command's files.
    for package in ("tools.benchmarks", "tools.results"):
        if importlib.util.find_spec(package) is None:
            continue
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            module = importlib.import_module(f"{package}.{found.name}")
            if hasattr(module, "add_arguments"):
                sub = which.add_parser(
                    getattr(module, "NAME", found.name),
                    help=module.HELP,
                    description=module.__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                )
                module.add_arguments(sub)
                sub.set_defaults(measure=module.run)
    for name in ONLY_IN_A_CLONE:
        if name not in which.choices:
            # Without a prefix for options, whatever follows is taken, --help too.
            sub = which.add_parser(name, help="(only in a clone of the repository)", add_help=False, prefix_chars="\0")
            sub.add_argument("rest", nargs="*")
            sub.set_defaults(measure=_not_installed)


def _not_installed(args: argparse.Namespace) -> int:
    raise ConfigError(
        f"bench {args.benchmark} makes a page of docs/ again and is not part of the installed package; "
        "run it in a clone of the repository"
    )


def run(args: argparse.Namespace) -> int:
    """Run one benchmark; returns its exit status."""
    return int(args.measure(args))
