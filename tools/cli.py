"""The command ``lce``: one subcommand a file in this folder; this one only dispatches and turns errors into exit
statuses.

Exit status: 0 done; 1 the answer is no (damage found, upgrade unsafe); 2 wrong use or configuration. A crash is never 1
or 2: it ends with 70 and its traceback; an interruption by Ctrl-C with 130, a
reader that has gone away with 141, a training run's by SIGTERM with 75.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("trainer", "launch", "tools")
EXIT_USAGE, EXIT_CRASH, EXIT_INTERRUPTED, EXIT_PIPE = 2, 70, 130, 141

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
    "tune",
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

HINTS = {
    "train": "lce launch trains: lce launch CONFIG.yaml",
    "convert": "lce centers makes centre banks, lce gallery converts galleries, lce export writes models",
    "test": "lce evaluate compares models",
    "eval": "lce evaluate compares models",
}
"""What people type who come from other tools."""

DATASETS = ("dataset", "new_dataset", "old_dataset", "data", "images", "validation")
"""The arguments that name data sets."""
ALLOW_OUTSIDE = "follow names in a dataset.yaml that lead out of its folder (training: data.allow_outside)"

OUTPUTS = ("json", "report", "pdf", "markdown")
"""Options that name a file for a command's outcome."""
MODULES = {"demo": "tools.demo.command", "characters": "tools.demo.characters"}
"""Where a command's module is not ``tools.NAME``."""


def shadowed() -> str | None:
    """What stands in the way of this distribution's packages: one line, or None where they are all its own.

    A package of one of our names may come first on the path, and another distribution may have overwritten our files:
    both are found without importing anything.
    """
    root = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != root / name / "__init__.py":
            where = origin or (spec and spec.submodule_search_locations and next(iter(spec.submodule_search_locations)))
            return (
                f"the package {name} of lce-trainer ({root / name}) is shadowed by {where or 'nothing'}: rename that, "
                "or take its folder off PYTHONPATH"
            )
        if "lce-trainer" not in origin.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
            return (
                f"{origin} is not lce-trainer's: another distribution installed a package {name} over it; use an "
                "environment of its own, or reinstall lce-trainer last"
            )
    return None


def build_parser(commands: Sequence[str] = COMMANDS, arguments: bool = True) -> argparse.ArgumentParser:
    """The command line with the subcommands ``commands``; without their ``arguments`` just what each is for."""
    from trainer import __version__

    parser = argparse.ArgumentParser(
        prog="lce", description="Train face recognition models that stay compatible with the deployed one."
    )
    parser.add_argument("--version", action="version", version=f"lce-trainer {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands:
        module = importlib.import_module(MODULES.get(name, f"tools.{name}"))
        sub = subparsers.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if arguments:
            module.add_arguments(sub)
            for leaf in _leaves(sub):
                if any(action.dest in DATASETS for action in leaf._actions):
                    leaf.add_argument("--allow-outside", action="store_true", help=ALLOW_OUTSIDE)
        sub.set_defaults(run=module.run, parser=sub)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; ``key=value`` and FILE.yaml may stand behind options too (argparse alone takes them in one place only).
    Only the module of the command that is called is imported."""
    named = argv[0] if argv else ""
    known = named in COMMANDS
    parser = build_parser([named] if known else COMMANDS, arguments=known)
    if not argv:
        parser.error("which command? `lce --help` lists them")
    if named in HINTS:
        parser.error(f"there is no command {named}: {HINTS[named]}")
    args, rest = parser.parse_known_args(argv)
    if rest:
        from trainer.config import is_layer

        wrong = [word for word in rest if word.startswith("-") or not ("=" in word or is_layer(word))]
        if not hasattr(args, "overrides"):
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if wrong:
            args.parser.error(f"{wrong[0]}: no such option{_meant(wrong[0], rest, args.parser)}")
        args.overrides = [*args.overrides, *rest]
    return args


def _meant(word: str, rest: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What is near to an option that is none, or how a setting that was given as an option (``--lr 0.1``) or as YAML
    (``lr: 0.1``) is written."""
    import difflib

    name, _, value = word.lstrip("-").partition("=")
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.8) if word.startswith("--") else []
    if near:
        return f"; did you mean {near[0]}?"
    follows = [other for other in rest[rest.index(word) + 1 :][:1] if not other.startswith("-")]
    if word.startswith("-"):
        key = name.replace("-", "_")
        keys = [key] if "." in key else _keys(key) or [f"SECTION.{key}"]
        value = value or (follows[0] if follows else "VALUE")
        examples = " or ".join(f"{key}={value}" for key in keys)
        return f"; a setting of the configuration is written {examples}, see lce config"
    return "; a setting of the configuration is written key=value without spaces, see lce config"


def _keys(name: str) -> list[str]:
    """The keys of a configuration that end with a name."""
    from trainer.config import Node, in_sections
    from trainer.run.config import Config

    return in_sections(Node((Config,)), name)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse files that a command could not write its outcome to (:data:`OUTPUTS`)."""
    from tools.output import check_writable

    for option in OUTPUTS:
        target = getattr(args, option, None)
        if isinstance(target, str | Path) and str(target) != "-":
            check_writable(f"--{option}", Path(target))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``lce`` command; returns its exit status."""
    problem = shadowed()
    if problem is not None:
        print(f"lce: {problem}", file=sys.stderr)
        return EXIT_USAGE
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that a command starts takes modules from the working folder
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    args.argv = argv  # for commands that start themselves again on all ranks
    with contextlib.suppress(AttributeError):  # names of files may hold bytes that are no characters
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    from trainer.errors import LceError, refused_by_system
    from trainer.extras import remedy

    try:
        _check_outputs(args)
        with _outside_allowed(args):
            status = int(args.run(args))
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read the output has enough (`| head -1`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at the end
        return EXIT_PIPE
    except LceError as error:
        print(f"lce {args.command}: {translated(str(error), args.parser)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"lce {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            reason = remedy(error)
        else:
            nameless = isinstance(error, OSError) and error.filename is None
            reason = (_lost_output() if nameless else None) or refused_by_system(error)
        if reason is not None:
            print(f"lce {args.command}: {reason}", file=sys.stderr)
            return EXIT_USAGE
        traceback.print_exc()
        return EXIT_CRASH


def _lost_output() -> str | None:
    """Why nothing more can be printed (a full disk), or None."""
    try:
        print(flush=True)
    except (OSError, ValueError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at the end
        return f"standard output cannot be written: {getattr(error, 'strerror', None) or error}"
    return None


def _outside_allowed(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    if not getattr(args, "allow_outside", False):
        return contextlib.nullcontext()
    from trainer.data.index import outside_allowed

    return outside_allowed(True)


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of a command's actions; a command without actions is its own."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for group in groups for sub in group.choices.values() for leaf in _leaves(sub)] if groups else [parser]


def translated(message: str, parser: argparse.ArgumentParser) -> str:
    """A library's message: the arguments that it names in backquotes get the names of the command's options."""
    for action in _actions(parser):
        if action.option_strings:
            message = message.replace(f"`{action.dest}`", action.option_strings[-1])
    return message


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a command and of its actions."""
    out = []
    for action in parser._actions:
        out.append(action)
        if isinstance(action, argparse._SubParsersAction):
            out += [inner for sub in action.choices.values() for inner in _actions(sub)]
    return out


if __name__ == "__main__":
    sys.exit(main())
