"""Measure a part of the product against its plain implementation: both sides in one run, medians, JSON.

Examples:
  lce bench head --classes 1000000 --rate 0.1          # the class-sharded head against the plain one
  lce bench head --classes 100000 --rate 1.0 --json -
  lce bench input                                      # the loaders against a bare DALI pipeline
  lce bench compat --methods bct,lce --seeds 1         # ways to stay compatible against each other
  lce bench criterion                                  # new→old above old→old, all modes and dimensions
"""

import argparse
import importlib
import pkgutil

HELP = "measure a part against its plain implementation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand for every file in tools/benchmarks that measures something."""
    import tools.benchmarks

    which = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    for found in pkgutil.iter_modules(tools.benchmarks.__path__):
        module = importlib.import_module(f"tools.benchmarks.{found.name}")
        if hasattr(module, "add_arguments"):
            sub = which.add_parser(
                found.name,
                help=module.HELP,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(sub)
            sub.set_defaults(measure=module.run)


def run(args: argparse.Namespace) -> int:
    """Run one benchmark; returns its exit status."""
    return int(args.measure(args))
