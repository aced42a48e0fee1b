"""The list of deliberate mistakes fits the code, a share of it is noticed, and what is not noticed is reported."""

import dataclasses
import random
from pathlib import Path

import pytest

from tests.mutants import ROOT, Mutant, misfit, read_list, run

SHARE = 2


def test_every_mistake_of_the_list_can_be_made() -> None:
    mutants = read_list()
    assert len(mutants) >= 37
    assert [problem for mutant in mutants if (problem := misfit(mutant))] == []
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants}) == len(mutants)


def test_a_text_or_a_test_that_has_gone_is_named(tmp_path: Path) -> None:
    mutant = read_list()[0]
    assert "0 times" in str(misfit(dataclasses.replace(mutant, old="no such line")))
    assert "0 times" in str(misfit(dataclasses.replace(mutant, file="trainer/no_such_file.py")))
    assert "not once" in str(misfit(dataclasses.replace(mutant, old="return")))
    assert "no test" in str(misfit(dataclasses.replace(mutant, test=mutant.test + "_of_old")))
    assert "0 times" in str(misfit(mutant, tmp_path))
    wrong = dataclasses.replace(mutant, old="no such line")
    assert list(run([wrong], 1, print)) == [wrong.name]


@pytest.mark.slow
def test_a_share_of_the_mistakes_is_noticed_and_a_harmless_change_is_not() -> None:
    quick = [mutant for mutant in read_list() if mutant.test.startswith(("tests/head/test_margin", "tests/evaluation"))]
    chosen = random.Random(len(read_list())).sample(quick, SHARE)
    harmless = Mutant(
        "trainer/head/partition.py",
        "Which rank owns which classes",
        "Who owns which classes",
        "tests/head/test_partition.py::test_what_is_no_partition_is_refused",
    )
    said: list[str] = []
    wrong = run([*chosen, harmless], 1, said.append)
    assert list(wrong) == [harmless.name]
    assert wrong[harmless.name].startswith("survived")
    assert len(said) == SHARE + 1
    assert "Which rank owns" in (ROOT / harmless.file).read_text(encoding="utf-8")
