"""Make data sets of characters as identities, in many typefaces: a benchmark of many classes that anyone can rebuild.

OUT gets RecordIO data sets:
  train               the characters to train on, clean pictures
  validation          other characters, for choosing settings        varied pictures, as if photographed
  unseen              other characters, for the report               varied
  seen                some of the training characters                varied
  unseen-typefaces    the unseen characters in typefaces that nothing is trained on: another domain

and label tables over train (data.labels of a configuration): splits/KIND/old.npy and new.npy, with KIND one of
  extended-class      old: a share of the characters;    new: all of them
  open-class          old: a share of the characters;    new: the others
  extended-typeface   old: a share of the typefaces;     new: all of them
  open-typeface       old: a share of the typefaces;     new: the others

The typefaces are free ones out of Debian's packages (--list names them, with their licences), installed or not: .deb
files and wheels in a folder given with --fonts are read as well. What a typeface lacks, leaves blank, shows as a box or
draws alike for two characters is left out. The same command continues what was interrupted.

Example:
  apt-get download fonts-unifont fonts-wqy-zenhei fonts-droid-fallback fonts-arphic-uming fonts-arphic-ukai \\
      fonts-babelstone-han fonts-seto fonts-vlgothic fonts-unfonts-core
  lce characters characters --fonts . --script hangul --classes 9000
  lce characters characters --script both --size 112 --json characters.json     # with what is installed
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.output import write_json

if TYPE_CHECKING:
    from tools.pictures.typefaces import Found

HELP = "data sets of up to 38,721 characters as identities, in many typefaces"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce characters``."""
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder of the data sets; made if missing")
    parser.add_argument(
        "--fonts", type=Path, action="append", metavar="PLACE", help="folder, font, .deb or .whl; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="show the typefaces, what is found of them, and stop")
    parser.add_argument("--script", choices=("han", "hangul", "both"), default="both", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=0, metavar="N", help="characters to train on (default: all)")
    parser.add_argument(
        "--min-typefaces", type=int, default=6, metavar="N", help="that draw a character (default: %(default)s)"
    )
    parser.add_argument(
        "--max-typefaces", type=int, default=12, metavar="N", help="that a character is shown in (default: %(default)s)"
    )
    parser.add_argument(
        "--held-typefaces", type=int, default=2, metavar="N", help="never trained on (default: %(default)s)"
    )
    parser.add_argument("--validation", type=int, default=400, metavar="N", help="characters (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=1000, metavar="N", help="characters (default: %(default)s)")
    parser.add_argument("--seen", type=int, default=400, metavar="N", help="characters (default: %(default)s)")
    parser.add_argument("--old-share", type=float, default=0.3, help="of classes or typefaces (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training characters (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="default: one per core")
    parser.add_argument("--json", metavar="FILE", help="write the counts as JSON; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Make the data sets; returns the exit status."""
    from tools.pictures.building import Recipe, build
    from tools.pictures.typefaces import SMALL_SET, SYSTEM_FONTS, find
    from tools.progress import progress_bar
    from trainer.errors import ConfigError

    sources = args.fonts or [source for source in (SYSTEM_FONTS,) if source.is_dir()]
    found = find(sources, args.script)
    if args.list:
        write_json(_list(found, show=args.json != "-"), args.json)
        return 0
    _check(args)
    if not found:
        where = ", ".join(map(str, sources)) or SYSTEM_FONTS
        raise ConfigError(
            f"no known typeface in {where}; install some (apt-get install {' '.join(SMALL_SET)}), or give a folder "
            "with these packages: --fonts FOLDER. More: lce characters --list"
        )
    recipe = Recipe(
        script=args.script,
        size=args.size,
        classes=args.classes,
        least=args.min_typefaces,
        most=args.max_typefaces,
        held_typefaces=args.held_typefaces,
        validation=args.validation,
        unseen=args.unseen,
        seen=args.seen,
        old_share=args.old_share,
        seed=args.seed,
    )
    figures = build(found, args.out, recipe, args.processes or len(os.sched_getaffinity(0)), progress_bar)
    write_json(figures, args.json)
    if args.json != "-":
        _print(args.out, figures)
    return 0


def _check(args: argparse.Namespace) -> None:
    from trainer.errors import ConfigError

    if args.out is None:
        raise ConfigError("say where: lce characters OUT")
    if not 8 <= args.size <= 512:
        raise ConfigError(f"--size {args.size}: from 8 to 512 pixels")
    if not 1 <= args.min_typefaces <= args.max_typefaces or args.max_typefaces < 2:
        raise ConfigError(
            f"--min-typefaces {args.min_typefaces} --max-typefaces {args.max_typefaces}: at least 1 and 2, in order"
        )
    counts = (args.classes, args.validation, args.unseen, args.seen, args.held_typefaces, args.processes, args.seed)
    if min(counts) < 0:
        raise ConfigError("counts and the seed are whole numbers from 0 on")
    if not 0 < args.old_share < 1:
        raise ConfigError(f"--old-share {args.old_share}: between 0 and 1")


def _list(found: "list[Found]", show: bool) -> list[dict[str, Any]]:
    """The catalogue with what is found of it."""
    from rich.console import Console
    from rich.table import Table

    from tools.pictures.typefaces import CATALOGUE

    where = {one.typeface.name: str(one.path) for one in found}
    table = Table("typeface", "script", "package", "licence", "found")
    rows = []
    for face in CATALOGUE:
        source = where.get(face.name)
        table.add_row(face.name, face.scripts, face.package, face.licence, source or "–")
        rows.append(
            {
                "name": face.name,
                "script": face.scripts,
                "package": face.package,
                "licence": face.licence,
                "found": source,
            }
        )
    if show:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    return rows


def _print(out: Path, figures: dict[str, Any]) -> None:
    held = [face["name"] for face in figures["typefaces"] if face["held"]]
    print(
        f"{out}: {figures['characters']} characters, each drawn by at least {figures['recipe']['least']} of "
        f"{len(figures['typefaces'])} typefaces; held out: {', '.join(held) or 'none'}"
    )
    for name, count in figures["sets"].items():
        print(f"  {name}: {count['images']} images of {count['classes']} classes")
    for kind, tables in figures["splits"].items():
        counts = "; ".join(f"{name} {count['images']} of {count['classes']}" for name, count in tables.items())
        print(f"  splits/{kind}: {counts}")
