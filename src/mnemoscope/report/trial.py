"""The gate tests itself: a policy that lets a model through which is known to have memorized is worth nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from .audited import Audited
from .gate import Material, judge
from .policy import Policy, Requires
from .verdict import Check, Status, Verdict
from .words import prompts, verb

__all__ = ["Trial", "try_out"]


@dataclass(frozen=True)
class Trial:
    """A policy tried out on a model that is known to have memorized: it must fail there."""

    verdict: Verdict

    @property
    def exit_code(self) -> int:
        """0: the policy fails there, as it must; 1: it does not; 3: it cannot be judged there."""
        return {Status.FAIL: 0, Status.ERROR: 3, Status.SKIPPED: 3}.get(self.verdict.status, 1)

    @property
    def checks(self) -> tuple[Check, ...]:
        """Of the verdict there."""
        return self.verdict.checks

    @property
    def silent(self) -> list[Check]:
        """Rules of level fail that do not fail there."""
        levels = {rule.name: rule.level for rule in self.verdict.policy.rules}
        return [c for c in self.verdict.checks if levels.get(c.name) == "fail" and c.status is not Status.FAIL]

    @property
    def headline(self) -> str:
        """One sentence, by the same status as the exit code."""
        where = f"on {self.verdict.run}, which has memorized,"
        if self.exit_code == 0:
            total = sum(rule.level == "fail" for rule in self.verdict.policy.rules)
            bite = total - len(self.silent)
            return f"The self-test passes: {where} {bite} of {prompts(total, 'rule')} of level fail {verb(bite, 'fails', 'fail')}."
        if self.exit_code == 3:
            return f"The self-test cannot be judged: {where} no rule of level fail fails, and not all can be judged."
        return f"The self-test fails: {where} no rule of level fail fails. This policy would let anything through."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        mine = {"headline": self.headline, "exit_code": self.exit_code, "silent": [c.name for c in self.silent]}
        return {"format": 1, "self_test": mine, "there": self.verdict.to_dict()}


def try_out(policy: Policy, audited: Audited, today: date) -> Trial:
    """Hold the rules against a run that must fail.

    The run's own prompts stand for lists of known leaks, the run without any find for baselines, and its score for the
    policy's detectors; requirements and waivers are left out. What is tested is whether the limits can bite.
    """
    of_run = f"detect.{audited.detector}"
    rules = [
        rule
        if rule.detector is None
        else rule.model_copy(update={"metric": f"{of_run}.{rule.metric.rpartition('.')[2]}"})
        for rule in policy.rules
    ]
    tried = policy.model_copy(update={"rules": rules, "requires": Requires(status="any"), "waivers": []})
    leaks = {rule.leaks: [case.prompt for case in audited.cases] for rule in rules if rule.leaks is not None}
    baselines = {rule.baseline: audited.clean for rule in rules if rule.baseline is not None}
    return Trial(judge(tried, Material(audited, baselines, leaks), today))
