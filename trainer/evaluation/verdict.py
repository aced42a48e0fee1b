"""The verdict on an upgrade: SAFE, NOT SAFE or NOT ENOUGH DATA, by the pairwise criterion with intervals over
identities.

Each set is judged on rank-1 and on the TAR at the smallest stated FAR that the set can resolve (enough impostor
pairs). The difference new→old less old→old of a metric is *better* when its interval lies above 0, *worse* when it
lies below minus the tolerance, *level* when the interval does not reach below minus the tolerance (both perfect, for
example), and *unclear* otherwise.

- NOT SAFE: a metric is worse on some set.
- SAFE: on every set at least one metric is better and the others better or level, and there are enough identities.
- NOT ENOUGH DATA: anything else; the reason says what is missing.

Sets with identities that a model was trained on are judged apart: they neither make nor block the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.evaluation.bootstrap import LEVEL, Interval, interval
from trainer.evaluation.compatibility import Cell, OperatingPoint, PointToSet, rate_text, tar_name

Answer = Literal["SAFE", "NOT SAFE", "NOT ENOUGH DATA"]
Outcome = Literal["better", "level", "worse", "unclear"]


@dataclass(frozen=True)
class Rules:
    """What the verdict asks for.

    tolerance: a loss of at most this much counts as level (0: none). min_identities: with fewer the verdict is never
    SAFE; below ``least_identities`` nothing is concluded at all. min_false_accepts: a FAR counts as resolved
    when it allows at least so many impostor pairs. level: of the intervals.
    """

    tolerance: float = 0.0
    min_identities: int = 20
    least_identities: int = 5
    min_false_accepts: int = 10
    level: float = LEVEL

    def resolves(self, far: float, impostor_pairs: int) -> bool:
        """Whether so many impostor pairs resolve this FAR."""
        return far * impostor_pairs >= self.min_false_accepts - 1e-9


@dataclass(frozen=True)
class Finding:
    """One metric on one set: old→old, new→old and their paired difference, with intervals."""

    metric: str
    old: Interval
    new: Interval
    difference: Interval
    outcome: Outcome


@dataclass(frozen=True)
class SetVerdict:
    """The answer on one set, its findings and the reason in words; gallery: of which model. seen: in words, which of
    its identities were trained on; such a set is judged apart."""

    name: str
    answer: Answer
    identities: int
    images: int
    findings: list[Finding]
    reason: str
    gallery: str = "old"
    seen: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer over all sets and the paragraph that gives it with its numbers.

    caveats: the sentences of the paragraph that say what the answer does not rest on.
    """

    answer: Answer
    paragraph: str
    sets: list[SetVerdict]
    caveats: list[str] = field(default_factory=list)


def resolved_far(fars: Sequence[float], impostor_pairs: int, rules: Rules) -> float | None:
    """The smallest FAR that ``impostor_pairs`` can resolve; None when none can be."""
    fit = [far for far in sorted(fars) if rules.resolves(far, impostor_pairs)]
    return fit[0] if fit else None


def judge_set(
    name: str,
    old: Cell,
    new: Cell,
    size: tuple[int, int],
    fars: Sequence[float],
    rules: Rules,
    gallery: str = "old",
    seen: str = "",
) -> SetVerdict:
    """Judge one set by its cells old→old and new→old; ``size``: its identities and images. gallery: the old model's
    name in a longer chain."""
    identities, images = size
    far = resolved_far(fars, min(old.scores.impostor_count, new.scores.impostor_count), rules)
    metrics = ([tar_name(far)] if far is not None else []) + ["rank-1"]
    findings = [_find(metric, old, new, rules) for metric in metrics]
    outcomes = [finding.outcome for finding in findings]
    missing = []
    if far is None:
        pairs = min(old.scores.impostor_count, new.scores.impostor_count)
        smallest = rules.min_false_accepts / pairs
        missing.append(
            f"its {pairs:,} impostor pairs resolve no FAR below {rate_text(smallest)}, so none of those asked for"
        )
    if identities < rules.min_identities:
        missing.append(f"it has {identities} identities, {rules.min_identities} are needed to call an upgrade safe")
    answer: Answer = "NOT ENOUGH DATA"
    if identities < rules.least_identities:
        reason = f"with {identities} identities nothing can be concluded"
    elif "worse" in outcomes:
        answer = "NOT SAFE"
        reason = f"worse than {_named(gallery)}: " + " and ".join(f.metric for f in findings if f.outcome == "worse")
    elif "unclear" in outcomes:
        reason = "; ".join([*(_unclear(f, rules) for f in findings if f.outcome == "unclear"), *missing])
    elif missing:
        reason = "; ".join(missing)
    elif "better" not in outcomes:
        within = [f for f in findings if f.difference.high < 0]
        reason = "no metric tells the models apart on this set; a harder one is needed"
        if within:
            worse = " and ".join(f.metric for f in within)
            reason = f"no metric is better, and {worse} is worse by no more than the tolerance of {rules.tolerance:g}, "
            reason += "which counts as level"
    else:
        answer, reason = (
            "SAFE",
            f"better than {_named(gallery)}: " + " and ".join(f.metric for f in findings if f.outcome == "better"),
        )
    return SetVerdict(name, answer, identities, images, findings, reason, gallery, seen)


def _unclear(finding: Finding, rules: Rules) -> str:
    """Why a metric is neither better nor worse nor level."""
    low, high = finding.difference.low, finding.difference.high
    if high >= 0:
        return f"the interval of the difference in {finding.metric} holds zero"
    return (
        f"{finding.metric} is worse, by between {-high:.3f} and {-low:.3f}, and whether by more than the tolerance of "
        f"{rules.tolerance:g} is not shown"
    )


def _find(metric: str, old: Cell, new: Cell, rules: Rules) -> Finding:
    difference = interval(
        new.value[metric] - old.value[metric], new.replicates[metric] - old.replicates[metric], rules.level
    )
    outcome: Outcome = "unclear"
    if difference.low > 0:
        outcome = "better"
    elif difference.high < -rules.tolerance:
        outcome = "worse"
    elif difference.low >= -rules.tolerance:
        outcome = "level"
    before, after = old.figure(metric, rules.level), new.figure(metric, rules.level)
    return Finding(metric, before, after, difference, outcome)


def decide(
    sets: Sequence[SetVerdict],
    points: Mapping[str, OperatingPoint],
    shares: Mapping[str, PointToSet],
    level: float = LEVEL,
    unknown: str = "",
) -> Verdict:
    """The verdict over all sets of identities that nobody was trained on; operating point and point-to-set shares, by
    set, the intervals' level, and what is ``unknown`` of the identities, are for the paragraph alone."""
    counted = [s for s in sets if not s.seen]
    apart = {s.name.partition(", gallery of ")[0]: s.seen for s in sets if s.seen}
    answers = {s.answer for s in counted}
    answer: Answer = "NOT ENOUGH DATA"
    if "NOT SAFE" in answers:
        answer = "NOT SAFE"
    elif answers == {"SAFE"}:
        answer = "SAFE"
    caveats = []
    if apart and not counted:
        caveats.append("No set of identities that nobody was trained on was given.")
    caveats += [f"{name} is not part of this answer: {reason}." for name, reason in apart.items()]
    caveats += [unknown] if unknown else []
    sentences = [_OPENINGS[answer], *caveats]
    sentences += [_sentence(s, level) for s in [*counted, *(s for s in sets if s.seen)]]
    if not sets:
        sentences.append("No set with labelled identities was given.")
    if shares:
        name, share = min(shares.items(), key=lambda item: item[1].nearest)
        sentences.append(
            f"Of the new embeddings of {name} {share.nearest:.1%} lie nearest to their own old class and "
            f"{share.within:.1%} within its boundary (of the old ones {share.old_nearest:.1%} lie nearest to theirs)."
        )
    if points:
        name, point = max(points.items(), key=lambda item: item[1].far_kept / item[1].far)
        sentences.append(_threshold_sentence(name, point))
    return Verdict(answer, " ".join(sentences), list(sets), caveats)


_OPENINGS: dict[Answer, str] = {
    "SAFE": "SAFE: the new model may query the old gallery.",
    "NOT SAFE": "NOT SAFE: the new model must not query the old gallery.",
    "NOT ENOUGH DATA": "NOT ENOUGH DATA: it is not shown whether the new model may query the old gallery.",
}


def _named(model: str) -> str:
    return "the old model" if model == "old" else model


def _sentence(s: SetVerdict, level: float) -> str:
    before = _named(s.gallery)
    figures = ", ".join(
        f"{f.metric} is {f.new.value:.3f} where {before} has {f.old.value:.3f} "
        f"({f.difference.value:+.3f}, {100 * level:g} % interval {f.difference.low:+.3f} to {f.difference.high:+.3f})"
        for f in s.findings
    )
    why = "" if s.answer == "SAFE" else f": {s.answer}, {s.reason}"
    return f"On {s.name} ({s.identities:,} identities, {s.images:,} images) {figures}{why}."


def _threshold_sentence(name: str, point: OperatingPoint) -> str:
    more = f" ({point.far_kept / point.far:.2g} times as many impostors)" if point.far_kept > point.far else ""
    before = f"FAR {rate_text(point.far)}, TAR {point.tar:.3f}"
    return (
        f"The deployed threshold, {point.threshold:.3f} on {name} ({before}), would give FAR "
        f"{rate_text(point.far_kept)}{more} and TAR {point.tar_kept:.3f}; {point.restored:.3f} restores the FAR, with "
        f"TAR {point.tar_restored:.3f}."
    )
