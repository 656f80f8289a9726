"""May this model be released? A policy held against a run, as a pure function.

A rule holds, is broken, or cannot be judged, and the third is not the first: what is not known counts as found before a rule
holds, and as not found before it is broken. Shares are held against limits by their one-sided 95 % upper bound (Clopper &
Pearson 1934), for which near-duplicate prompts are one case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property

from .. import stats
from ..records.store import known_differences
from .audited import Audited, Case
from .policy import Policy, Requires, Rule, Waiver, least_prompts
from .verdict import Call, Check, Status, Verdict
from .words import Number, prompts, verb

__all__ = ["Material", "judge"]


@dataclass(frozen=True)
class Material:
    """What a policy is held against.

    Attributes:
        audited: The run.
        baselines: Other runs, by the path in the policy.
        leaks: Prompts known to leak, by the path in the policy.
    """

    audited: Audited
    baselines: Mapping[str, Audited] = field(default_factory=dict)
    leaks: Mapping[str, Sequence[str]] = field(default_factory=dict)


def judge(policy: Policy, material: Material, today: date) -> Verdict:
    """Hold a policy against a run.

    Args:
        policy: The policy.
        material: The run, and whatever the policy's rules name.
        today: Waivers that ended before it fail.

    Raises:
        KeyError: ``material`` lacks a baseline or a list of leaks that a rule names.
    """
    required = _requirements(policy.requires, material.audited)
    met = all(check.status is Status.PASS for check in required)
    waivers = [w for w in policy.waivers if not w.expired(today)]
    growing = policy.requires.status == "done" and not material.audited.complete
    rules = [_rule(rule, material, waivers, growing=growing) for rule in policy.rules]
    checks = [*required, *(rules if met else map(_withheld, rules)), *_expired(policy.waivers, today)]
    return Verdict(material.audited.name, today, tuple(checks), policy, (*policy.remarks, *_idle(policy, material)))


# Requirements and waivers -------------------------------------------------------------------------------------------------


def _requirements(requires: Requires, audited: Audited) -> list[Check]:
    n = sum(case.seeds > 0 for case in audited.cases)
    so_far = f"the run is {audited.status} with {audited.done:,} of {prompts(audited.asked, 'sample')}"
    there = f"{verb(audited.seeds, 'is', 'are')} there for the prompt with the fewest"
    asked = [
        ("status done", requires.status == "done", audited.complete, so_far),
        (f"prompts >= {requires.prompts}", requires.prompts > 0, n >= requires.prompts, f"{prompts(n)} {verb(n, 'has', 'have')} a result"),
        (f"seeds >= {requires.seeds}", True, audited.seeds >= requires.seeds, f"{prompts(audited.seeds, 'seed')} {there}"),
        ("no contradictions", bool(audited.faults), not audited.faults, f"the run contradicts itself: {_list(audited.faults)}"),
        ("calibrated", requires.calibrated, audited.uncalibrated is None, audited.uncalibrated or "it has a threshold of its own"),
    ]  # fmt: skip
    return [
        Check(
            name,
            "requirement",
            Status.PASS if met else Status.ERROR,
            met,
            f"{'' if met else 'cannot be judged: '}{words}.",
        )
        for name, wanted, met, words in asked
        if wanted
    ]


def _withheld(check: Check) -> Check:
    """A pass on evidence that the policy itself calls insufficient."""
    if not check.holds:
        return check
    return replace(check, status=Status.SKIPPED, sentence=f"no pass, since a requirement is not met: {check.sentence}")


def _expired(waivers: Iterable[Waiver], today: date) -> list[Check]:
    return [
        Check(
            f"waiver {w.id}",
            "waiver",
            Status.FAIL,
            False,
            f"the waiver of {w.words} has ended; renew it for a reason, or delete it.",
        )
        for w in waivers
        if w.expired(today)
    ]


def _idle(policy: Policy, material: Material) -> list[str]:
    known = {case.id for case in material.audited.cases}
    return [f"the waiver of {w.words} is for no prompt of this run." for w in policy.waivers if w.id not in known]


# Rules --------------------------------------------------------------------------------------------------------------------


def _rule(rule: Rule, material: Material, waivers: Sequence[Waiver], *, growing: bool) -> Check:
    """One rule: as it stands and, if it does not hold so, without the finds that somebody answers for."""
    calls = _calls(rule, material)
    count = _Count.of(rule, calls, growing=growing)
    if not count.holds:
        calls = [replace(c, waived=next((w for w in waivers if c.found and w.id == c.id), None)) for c in calls]
        count = _Count.of(rule, calls, growing=growing)
    worst = {True: Status.WARN if count.waived else Status.PASS, False: Status.FAIL, None: Status.ERROR}[count.holds]
    return Check(
        name=rule.name,
        kind="rule",
        status=min(worst, Status.WARN) if rule.level == "warn" else worst,
        holds=count.holds,
        sentence=_sentence(rule, count, calls),
        numbers=count.to_dict(),
        finds=tuple(c for c in calls if c.found),
        leaks=tuple(calls) if rule.leaks is not None else (),
    )


def _calls(rule: Rule, material: Material) -> list[Call]:
    """What the rule is about, prompt by prompt."""
    audited, now = material.audited, _by_prompt(rule, material.audited)
    asked = dict.fromkeys(now if rule.leaks is None else material.leaks[rule.leaks])
    if rule.baseline is None:
        return [_call(rule, audited, prompt, now.get(prompt)) for prompt in asked]
    baseline = material.baselines[rule.baseline]
    before, apart = _by_prompt(rule, baseline), _apart(rule, audited, baseline)
    if rule.leaks is None:
        # What the baseline has not seen cannot have changed; what it has seen and this run has not may hide a change.
        asked = dict.fromkeys(before)
    calls = [_call(rule, audited, prompt, now.get(prompt)) for prompt in asked]
    return [_change(rule, call, before.get(call.prompt), baseline.name, apart) for call in calls]


def _by_prompt(rule: Rule, audited: Audited) -> dict[str, Case]:
    """The cases by their text; of two with one text, the one with a find."""
    return {case.prompt: case for case in sorted(audited.cases, key=lambda c: c.found.get(rule.subject) is True)}


def _call(rule: Rule, audited: Audited, prompt: str, case: Case | None) -> Call:
    if case is None:
        return Call(None, prompt, -1, None, "not audited")
    found = case.found.get(rule.subject)
    words = case.words.get(rule.subject, "") if found is not None else audited.gaps.get(rule.subject, "not tested")
    return Call(case.id, prompt, case.cluster, found, words, case.picture)


def _change(rule: Rule, call: Call, before: Case | None, baseline: str, apart: str) -> Call:
    """Found now and not before; all that is found is new where there was no before."""
    if before is None:
        return call
    if apart:
        return replace(call, found=None, words=f"{baseline} was audited otherwise ({apart})")
    then = before.found.get(rule.subject)
    if call.found and then is None:
        return replace(call, found=None, words=f"not known of {baseline}")
    return replace(call, found=False) if then else call


def _apart(rule: Rule, audited: Audited, baseline: Audited) -> str:
    """In what two audits differ, besides the model; what either does not say is not held against it."""
    if baseline.faults:
        return f"it contradicts itself: {_list(baseline.faults)}"
    mine, theirs = (a.conditions.get(rule.subject, {}) for a in (audited, baseline))
    return "; ".join(known_differences(theirs, mine)[:2])


@dataclass(frozen=True)
class _Count:
    """k found and some not known, among n cases of a rule; finds that somebody answers for are no cases."""

    rule: Rule
    k: int
    unknown: int
    n: int
    prompts: int
    waived: int
    growing: bool
    """More prompts are to come, so that a share may still fall."""

    @classmethod
    def of(cls, rule: Rule, calls: Sequence[Call], *, growing: bool) -> _Count:
        """For a bound, a cluster is one case: found if any of its prompts is, not known if any of the others is not."""
        units: dict[int | str, list[bool | None]] = {}
        rest = [call for call in calls if not call.waived]
        for call in rest:
            alone = not rule.bounded or call.id is None
            units.setdefault(call.prompt if alone else call.cluster, []).append(call.found)
        found = [True if True in unit else None if None in unit else False for unit in units.values()]
        waived = len(calls) - len(rest)
        return cls(rule, found.count(True), found.count(None), len(found), len(rest), waived, growing)

    @cached_property
    def upper(self) -> float | None:
        """One-sided 95 % upper bound of the share. Where the rule holds it does so with all that is not known counted as found."""
        worst = self.k + self.unknown if self.holds else self.k
        return stats.upper_bound(worst, self.n).high if self.n else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values for JSON."""
        return {
            "found": self.k,
            "not_known": self.unknown,
            "waived": self.waived,
            "cases": self.n,
            "prompts": self.prompts,
            "upper95": self.upper,
            "limit": self.rule.limit,
            "least_cases": self.rule.least,
        }

    @cached_property
    def holds(self) -> bool | None:
        """Three values: see the top of the module."""
        best, worst = self._within(self.k), self._within(self.k + self.unknown)
        return False if best is False else True if best and worst else None

    def _within(self, k: int) -> bool | None:
        """Whether k of n are within the limit; None: this n does not say."""
        limit = self.rule.limit
        if self.n == 0:
            return True if self.waived and not self.rule.bounded else None
        if not self.rule.share:
            return k <= limit
        if (stats.upper_bound(k, self.n).high if self.rule.bounded else k / self.n) <= limit:
            return True
        # On more prompts the share might yet be shown to be within the limit, unless it is certainly beyond it.
        certain = stats.clopper_pearson(k, self.n, 0.90).low > limit
        return None if (self.growing or self.n < self.rule.least) and not certain else False


# Words --------------------------------------------------------------------------------------------------------------------


def _sentence(rule: Rule, count: _Count, calls: Sequence[Call]) -> str:
    says = _numbers(rule, count)
    if count.holds is None:
        says = f"cannot be judged, {_why(rule, count, calls)}: {says}"
    waived = [c.waived.words for c in calls if c.waived]
    return f"{says}.{f' Waived: {_list(waived)}.' if waived else ''}"


def _numbers(rule: Rule, count: _Count) -> str:
    """``no copy found among 300 prompts (95 % upper bound 0.994 %, allowed 1 %)``."""
    new = " that was not in the baseline" if rule.baseline is not None else ""
    cases = prompts(count.n) if count.n == count.prompts else f"{count.n:,} clusters of {prompts(count.prompts)}"
    if rule.detector is None:
        words = f"a copy found for {count.k:,} of {cases}{new}" if count.k else f"no copy found among {cases}{new}"
    else:
        score = f"above the threshold of {rule.detector}{' for the first time' if new else ''}"
        words = f"{count.k:,} of {cases} {score}" if count.k else f"none of {cases} {score}"
    unknown = f", {count.unknown:,} not known" if count.unknown else ""
    return f"{words}{unknown} ({_held(rule, count)})"


def _held(rule: Rule, count: _Count) -> str:
    allowed = f"allowed {_percent(rule.limit) if rule.share else f'{rule.limit:g}'}"
    if not rule.share or count.upper is None:
        return allowed
    upper = f"95 % upper bound {_percent(count.upper)}"
    return f"{upper}, {allowed}" if rule.bounded else f"{_percent(count.k / count.n)}, {allowed}; {upper}"


def _why(rule: Rule, count: _Count, calls: Sequence[Call]) -> str:
    """Why a rule cannot be judged: too few, or not known."""
    if count.n == 0:
        return "since there is no prompt to judge by"
    if rule.bounded and count.n < rule.least:
        more = f", and {least_prompts(rule.limit, count.k):,} with {count.k:,} found" if count.k else ""
        return (
            f"since {count.n:,} can never show {_percent(rule.limit)}: that takes {rule.least:,} without a find{more}"
        )
    if count.growing and not count.unknown:
        return "since more prompts are to come"
    reasons = list(dict.fromkeys(c.words for c in calls if c.found is None))
    return f"since {_list(reasons)}"


def _list(items: Sequence[str], most: int = 3) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def _percent(share: Number) -> str:
    """Three digits: a bound just above its limit must not look equal to it."""
    return f"{100 * share:.3g} %"
