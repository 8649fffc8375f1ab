"""Whether a trained version may be published: the decision of a recipe's `Gate`, on measured results."""

from __future__ import annotations

from typing import NamedTuple

from veneer.errors import InvalidRequest
from veneer.training.evaluation.evaluate import EvaluationResult, compare_models
from veneer.training.evaluation.metrics import less_is_better, shown
from veneer.training.recipe import Gate


class GateDecision(NamedTuple):
    passed: bool
    reason: str  # what was measured, and the rule that it meets or misses


def gate_passed(
    gate: Gate, result: EvaluationResult, *, new: str, base: str | None = None, previous: str | None = None
) -> GateDecision:
    """The new version must reach the gate's bound and measure no worse than the base or the previous version.

    `new`, `base` and `previous` are models of the result. Without a previous version there is none to be worse
    than. "No worse" is about what was measured: a version that is worse on these rows does not pass, even if that
    may be chance; the reason says whether it may.

    Raises:
        InvalidRequest: the result lacks the gate's metric, or the base that it compares with.
    """
    checks = []
    if gate.metric not in result[new].metrics:
        raise InvalidRequest(f"the gate asks for {gate.metric}, which was not measured")
    if gate.at_least is not None:
        checks.append(_reaches(gate, gate.at_least, result, new))
    if gate.no_worse_than is not None:
        other = base if gate.no_worse_than == "base" else previous
        if other is None and gate.no_worse_than == "base":
            raise InvalidRequest("the gate compares with the base, which was not measured")
        checks.append(
            GateDecision(True, "there is no previous version to be worse than")
            if other is None
            else _no_worse(gate, result, new, other)
        )
    return GateDecision(all(check.passed for check in checks), "; ".join(check.reason for check in checks))


def _reaches(gate: Gate, bound: float, result: EvaluationResult, new: str) -> GateDecision:
    value = result[new].metrics[gate.metric].value
    lower = less_is_better(gate.metric)
    measured = f"{gate.metric} of {new} is {shown(gate.metric, value)}"
    rule = f"{'at most' if lower else 'at least'} {shown(gate.metric, bound)}"
    passed = value <= bound if lower else value >= bound
    return GateDecision(passed, f"{measured}, {'' if passed else 'not '}{rule} as the gate asks")


def _no_worse(gate: Gate, result: EvaluationResult, new: str, other: str) -> GateDecision:
    difference = compare_models(result[other], result[new]).differences[gate.metric]
    gain = -difference.value if less_is_better(gate.metric) else difference.value
    word = "better than" if gain > 0 else "worse than" if gain < 0 else "equal to"
    values = " and ".join(
        shown(gate.metric, result[each].metrics[gate.metric].value) for each in (new, other)
    )
    noise = "" if gain == 0 else f", {'more than' if difference.significant else 'maybe'} chance"
    reason = (
        f"{gate.metric} of {new} is {word} that of {other} ({values}{noise}, p = {difference.p_value:.2g})"
    )
    return GateDecision(gain >= 0, reason)
