"""The command ``lce``: one subcommand a file in this folder; this one only dispatches and turns errors into exit
statuses.

Exit status: 0 done; 1 the answer is no (damage found, upgrade unsafe); 2 wrong use or configuration. A crash is never 1
or 2: it ends with 70 and its traceback; an interruption by Ctrl-C with 130, a
reader that has gone away with 141, a training's by SIGTERM with 75.
"""

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from trainer import __version__
from trainer.config import is_layer
from trainer.errors import LceError

EXIT_DONE, EXIT_NO, EXIT_USAGE, EXIT_CRASH, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 70, 130, 141

# A subcommand is a module with HELP (one line), add_arguments(parser) and run(args) -> exit status. It imports what is
# heavy or optional inside run(), so that `lce --help` stays quick and works without the extras.
COMMANDS = (
    "demo",
    "characters",
    "pack",
    "check",
    "split",
    "config",
    "launch",
    "model",
    "centers",
    "evaluate",
    "export",
    "gallery",
    "checkpoint",
    "runs",
    "plan",
    "bench",
)

MODULES = {"demo": "tools.demo.command", "characters": "tools.demo.characters"}
"""Where a command's module is not ``tools.NAME``."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, with every subcommand's own help."""
    parser = argparse.ArgumentParser(prog="lce", description=f"lce-trainer {__version__}: {__doc__.split(':')[0]}")
    parser.description = "Train face recognition models that stay compatible with the deployed one."
    parser.add_argument("--version", action="version", version=f"lce-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(MODULES.get(name, f"tools.{name}"))
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; ``key=value`` and FILE.yaml may stand behind options too (argparse alone takes them in one place only)."""
    args, rest = parser.parse_known_args(argv)
    if rest:
        fits = [("=" in word or is_layer(word)) and not word.startswith("-") for word in rest]
        if not hasattr(args, "overrides") or not all(fits):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``lce`` command; returns its exit status."""
    args = parse(build_parser(), argv)
    args.words = list(sys.argv[1:] if argv is None else argv)  # for commands that start themselves again on all ranks
    with contextlib.suppress(AttributeError):  # names of files may hold bytes that are no characters
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read the output has enough (`| head -1`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at the end
        return EXIT_PIPE
    except LceError as error:
        print(f"lce {args.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"lce {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_CRASH


if __name__ == "__main__":
    sys.exit(main())
