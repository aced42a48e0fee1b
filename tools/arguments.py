"""Numbers on a command line: values out of range are refused while the arguments are read."""

import argparse
import math
from collections.abc import Callable


def whole_number(least: int) -> Callable[[str], int]:
    """For ``type=``: a whole number of at least ``least`` that int64 holds; 29e6 is one too."""

    def parse(text: str) -> int:
        try:
            value = int(text) if text.strip("+-").isdecimal() else float(text)
        except ValueError:
            power = {"K": 3, "M": 6, "G": 9}.get(text[-1:].upper())
            hint = "" if power is None or not text[:-1].isdecimal() else f"; write {text[:-1]}e{power}"
            raise argparse.ArgumentTypeError(f"{text}: not a number{hint}") from None
        if not least <= value < 2**63 or value != int(value):
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least {least}")
        return int(value)

    return parse


def at_least_zero(text: str) -> float:
    """For ``type=``: a finite number of at least 0."""
    return _finite(text, lambda value: value >= 0, "a number of at least 0")


def above_zero(text: str) -> float:
    """For ``type=``: a finite number above 0."""
    return _finite(text, lambda value: value > 0, "a number above 0")


def _finite(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not fits(value):
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
    return value
