"""The judgment: three values, five statuses, one verdict."""

import json
from dataclasses import replace
from datetime import date
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemoscope import stats
from mnemoscope.report.audited import Audited, Case
from mnemoscope.report.export import to_json, to_junit, to_markdown
from mnemoscope.report.gate import Material, judge
from mnemoscope.report.policy import Policy, least_prompts
from mnemoscope.report.trial import try_out
from mnemoscope.report.verdict import EXIT_CODES, Status

TODAY = date(2026, 12, 1)
COPIES = {"name": "no verbatim copies", "metric": "copies.share", "max_upper95": 0.01}
COUNT = {"name": "none", "metric": "copies.count", "max": 0}


def audited(*found, name="rc", seeds=4, clusters=None, **changes) -> Audited:
    """An audit whose i-th prompt has a copy (True), none (False), or was not compared (None)."""
    clusters = clusters or range(len(found))
    cases = tuple(
        Case(f"p{i}", f"prompt {i}", seeds, {"copies": f, "detect.magnitude": f}, {"copies": f"copies: {f}"}, cluster)
        for i, (f, cluster) in enumerate(zip(found, clusters, strict=True))
    )
    facts = {"status": "done", "asked": seeds * len(found), "done": seeds * len(found), "detector": "magnitude"}
    gaps = {"copies": "no picture was compared", "detect.magnitude": "no threshold"}
    return Audited(name, cases=cases, **(facts | {"gaps": gaps} | changes))


def policy(*rules, **changes) -> Policy:
    return Policy(version=1, rules=list(rules), **changes)


def verdict_of(run, *rules, leaks=None, baseline=None, **changes):
    material = Material(run, {"runs/v1": baseline} if baseline else {}, {"leaks.txt": leaks} if leaks else {})
    return judge(policy(*rules, **changes), material, TODAY)


def status_of(run, *rules, **more):
    found = verdict_of(run, *rules, **more)
    (check,) = (c for c in found.checks if c.kind == "rule")
    return check.status.word, check.sentence


def clean(n: int) -> list[bool]:
    return [False] * n


# Bounds -------------------------------------------------------------------------------------------------------------------


def test_299_clean_prompts_are_the_least_that_can_pass_one_percent():
    status, sentence = status_of(audited(*clean(299)), COPIES)
    assert status == "pass"
    assert sentence == "no copy found among 299 prompts (95 % upper bound 0.997 %, allowed 1 %)."
    status, sentence = status_of(audited(*clean(298)), COPIES)
    assert status == "error"
    assert "since 298 can never show 1 %: that takes 299 without a find" in sentence


def test_one_copy_in_300_means_up_to_1_57_percent():
    status, sentence = status_of(audited(True, *clean(299)), COPIES)
    assert status == "fail"
    assert sentence == "a copy found for 1 of 300 prompts (95 % upper bound 1.57 %, allowed 1 %)."
    assert status_of(audited(True, *clean(472)), COPIES)[0] == "pass"


def test_what_is_certainly_too_much_fails_even_on_few_prompts():
    assert stats.clopper_pearson(1, 50, 0.9).low < 0.01 < stats.clopper_pearson(3, 50, 0.9).low
    status, sentence = status_of(audited(True, *clean(49)), COPIES)
    assert status == "error"
    assert "299 without a find, and 473 with 1 found" in sentence
    assert status_of(audited(*[True] * 3, *clean(47)), COPIES)[0] == "fail"


def test_near_duplicates_are_one_case_of_a_bound():
    families = [i // 2 for i in range(300)]
    run = audited(*clean(300), clusters=families)
    status, sentence = status_of(run, COPIES)
    assert status == "error"
    assert "150 clusters of 300 prompts" in sentence
    # A cluster is found once, however many of its prompts are; a count and a plain share count prompts, as the report does.
    run = audited(True, True, *clean(998), clusters=[i // 2 for i in range(1000)])
    assert verdict_of(run, COPIES).checks[-1].numbers["found"] == 1
    assert verdict_of(run, COUNT).checks[-1].numbers["found"] == 2
    assert verdict_of(run, COUNT | {"metric": "copies.share", "max": 0.002}).status is Status.PASS


def test_a_plain_share_and_a_count_are_held_as_they_are():
    run = audited(*[True] * 5, *clean(95))
    share = {"name": "s", "metric": "detect.magnitude.share", "level": "warn"}
    assert status_of(run, share | {"max": 0.05}) == (
        "pass",
        "5 of 100 prompts above the threshold of magnitude (5 %, allowed 5 %; 95 % upper bound 10.2 %).",
    )
    assert status_of(run, share | {"max": 0.04})[0] == "warn"
    assert status_of(run, COUNT | {"max": 5}) == ("pass", "a copy found for 5 of 100 prompts (allowed 5).")
    assert status_of(run, COUNT | {"max": 4})[0] == "fail"


# What is not known --------------------------------------------------------------------------------------------------------


def test_what_is_not_known_counts_as_found_before_a_rule_holds():
    status, sentence = status_of(audited(None, *clean(299)), COPIES)
    assert status == "error"
    assert sentence.startswith(
        "cannot be judged, since no picture was compared: no copy found among 300 prompts, 1 not known"
    )
    status, sentence = status_of(audited(None, *clean(472)), COPIES)
    assert status == "pass"
    assert f"1 not known (95 % upper bound {100 * stats.upper_bound(1, 473).high:.3g} %" in sentence


def test_what_is_not_known_does_not_excuse_what_is():
    assert status_of(audited(True, *[None] * 10), COUNT)[0] == "fail"
    assert status_of(audited(*[None] * 10), COUNT)[0] == "error"


def test_no_prompt_is_no_pass():
    assert status_of(audited(), COUNT)[0] == "error"
    assert verdict_of(audited(), COUNT).exit_code == 3


def test_an_unjudged_warning_is_a_warning():
    assert status_of(audited(*clean(10)), COPIES | {"level": "warn"})[0] == "warn"


# Requirements -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "asked", "sentence"),
    [
        ({"done": 48}, {}, "the run is done with 48 of 2,000 samples"),
        ({"status": "interrupted"}, {}, "the run is interrupted"),
        ({}, {"prompts": ">= 501"}, "500 prompts have a result"),
        ({}, {"seeds": 5}, "4 seeds are there"),
        ({"uncalibrated": "the run has no threshold"}, {"calibrated": True}, "the run has no threshold"),
    ],
)
def test_a_requirement_that_is_not_met_withholds_the_pass(changes, asked, sentence):
    found = verdict_of(audited(*clean(500), **changes), COPIES, requires=asked)
    assert found.exit_code == 3
    assert "cannot be judged, which is no pass" in found.headline
    assert any(c.status is Status.ERROR and sentence in c.sentence for c in found.checks)
    (rule,) = (c for c in found.checks if c.kind == "rule")
    assert rule.status is Status.SKIPPED
    assert "since a requirement is not met" in rule.sentence


def test_a_crash_at_sample_12_of_500_does_not_go_green_and_a_find_before_it_fails():
    assert verdict_of(audited(*clean(3), asked=500, status="running"), COUNT).exit_code == 3
    assert verdict_of(audited(True, *clean(2), asked=500, status="running"), COUNT).exit_code == 1


def test_a_share_that_may_still_fall_is_not_yet_too_large():
    halfway = {"asked": 4000, "status": "interrupted"}
    status, sentence = status_of(audited(True, *clean(299), **halfway), COPIES)
    assert status == "error"
    assert sentence.startswith("cannot be judged, since more prompts are to come: a copy found for 1 of 300 prompts")
    assert status_of(audited(True, *clean(299), **halfway), COPIES, requires={"status": "any"})[0] == "fail"
    assert status_of(audited(*[True] * 9, *clean(291), **halfway), COPIES)[0] == "fail"


def test_a_stopped_run_may_be_allowed():
    assert (
        verdict_of(audited(*clean(3), asked=500, status="interrupted"), COUNT, requires={"status": "any"}).exit_code
        == 0
    )


# Known leaks and baselines ------------------------------------------------------------------------------------------------

LEAKS = {"name": "no known leak returns", "metric": "copies.count", "in": "leaks.txt", "max": 0}


def test_known_leaks_are_judged_one_by_one():
    run = audited(True, False, True)
    assert status_of(run, LEAKS, leaks=["prompt 1"])[0] == "pass"
    found = verdict_of(run, LEAKS, leaks=["prompt 0", "prompt 1"])
    assert found.exit_code == 1
    assert [leak.found for leak in found.checks[-1].leaks] == [True, False]
    assert [find.prompt for find in found.checks[-1].finds] == ["prompt 0"]


def test_a_known_leak_that_was_not_audited_is_no_pass():
    status, sentence = status_of(audited(False), LEAKS, leaks=["prompt 0", "another"])
    assert status == "error"
    assert "since not audited" in sentence


NEWLY = {"name": "not worse", "metric": "copies.share", "baseline": "runs/v1", "max_increase_upper95": 0.005}


def test_only_what_is_new_counts_against_a_baseline():
    before, now = audited(True, *clean(599), name="v1"), audited(True, *clean(599))
    status, sentence = status_of(now, NEWLY, baseline=before)
    assert status == "pass"
    assert "no copy found among 600 prompts that was not in the baseline (95 % upper bound 0.498 %" in sentence
    assert status_of(audited(True, True, *clean(598)), NEWLY, baseline=before)[0] == "fail"
    # Prompts that the baseline has not seen say nothing about a change.
    assert status_of(audited(True, *clean(599), True), NEWLY, baseline=before)[0] == "pass"
    assert status_of(audited(*clean(9)), NEWLY, baseline=audited(*clean(9)))[0] == "error"


def test_leaving_out_the_prompts_of_the_baseline_is_no_pass():
    status, sentence = status_of(audited(*clean(600)), NEWLY, baseline=audited(*clean(602), name="v1"))
    assert status == "error"
    assert "2 not known" in sentence
    assert "since not audited" in sentence


def test_a_baseline_under_other_conditions_cannot_be_compared():
    conditions = {"copies": {"seeds": 4, "guidance": 7.5, "steps": None}}
    now = audited(*clean(600), conditions=conditions)
    same = audited(*clean(600), conditions={"copies": {"seeds": 4, "guidance": 7.5, "steps": 50}})
    assert status_of(now, NEWLY, baseline=same)[0] == "pass"
    other = audited(*clean(600), name="v1", conditions={"copies": {"seeds": 1, "guidance": 7.5}})
    status, sentence = status_of(now, NEWLY, baseline=other)
    assert status == "error"
    assert "v1 was audited otherwise (seeds: was 1, now 4)" in sentence


def test_a_find_that_the_baseline_cannot_exclude_is_not_known():
    assert (
        status_of(
            audited(True), COUNT | {"baseline": "runs/v1", "max": None, "max_increase": 0}, baseline=audited(None)
        )[0]
        == "error"
    )
    assert (
        status_of(
            audited(True), COUNT | {"baseline": "runs/v1", "max": None, "max_increase": 0}, baseline=audited(False)
        )[0]
        == "fail"
    )


# Waivers ------------------------------------------------------------------------------------------------------------------

WAIVER = {"id": "p0", "why": "public-domain logo", "by": "release-team", "until": "2027-03-01"}


def test_a_waived_find_is_a_warning_that_names_who_answers_for_it():
    found = verdict_of(audited(True, False), COUNT, waivers=[WAIVER])
    assert (found.status, found.exit_code) == (Status.WARN, 0)
    assert "Waived: p0 by release-team until 2027-03-01: public-domain logo." in found.checks[-1].sentence
    assert found.to_dict()["checks"][-1]["finds"][0]["waived"]["by"] == "release-team"


def test_a_waiver_covers_one_prompt_and_not_the_next():
    found = verdict_of(audited(True, True), COUNT, waivers=[WAIVER])
    assert found.exit_code == 1
    assert [find.waived is not None for find in found.checks[-1].finds] == [True, False]


def test_a_waiver_takes_its_prompt_out_of_the_evidence():
    assert status_of(audited(True, *clean(299)), COPIES, waivers=[WAIVER])[0] == "warn"
    assert status_of(audited(True, *clean(298)), COPIES, waivers=[WAIVER])[0] == "error"


def test_an_expired_waiver_fails_whatever_else_is_so():
    old = WAIVER | {"until": "2026-11-30"}
    found = verdict_of(audited(True, False), COUNT, waivers=[old])
    assert [c.name for c in found.checks if c.status is Status.FAIL] == ["none", "waiver p0"]
    assert "has ended; renew it" in found.checks[-1].sentence
    assert verdict_of(audited(False), COUNT, waivers=[old]).exit_code == 1
    assert verdict_of(audited(True), COUNT, waivers=[WAIVER | {"until": str(TODAY)}]).exit_code == 0


def test_a_list_of_leaks_may_be_waived_as_a_whole():
    assert status_of(audited(True, False), LEAKS, leaks=["prompt 0"], waivers=[WAIVER])[0] == "warn"
    assert status_of(audited(True), COPIES, waivers=[WAIVER])[0] == "error"


def test_a_waiver_for_nothing_is_remarked_upon():
    found = verdict_of(audited(False), COUNT, waivers=[WAIVER | {"id": "p7"}])
    assert found.exit_code == 0
    assert any("is for no prompt of this run" in remark for remark in found.remarks)


def test_a_waived_leak_is_waived_in_the_test_report():
    found = verdict_of(audited(True, False), LEAKS, leaks=["prompt 0", "prompt 1"], waivers=[WAIVER])
    cases = ET.fromstring(to_junit(found)).iter("testcase")
    (leak,) = (c for c in cases if c.get("name") == "prompt 0")
    assert leak.find("failure") is None
    assert "waived: p0" in leak.findtext("system-out")


# Properties ---------------------------------------------------------------------------------------------------------------

states = st.lists(st.sampled_from([True, False, False, False, None]), max_size=30).flatmap(
    lambda few: st.sampled_from([0, 5, 58, 59, 93, 299]).map(lambda n: [*few, *clean(n)])
)
limits = st.sampled_from([0.002, 0.005, 0.01, 0.05, 0.3])
rules = st.one_of(
    limits.map(lambda v: {"metric": "copies.share", "max_upper95": v}),
    limits.map(lambda v: {"metric": "detect.magnitude.share", "max": v}),
    st.integers(0, 3).map(lambda v: {"metric": "copies.count", "max": v}),
).flatmap(lambda rule: st.sampled_from(["fail", "warn"]).map(lambda level: rule | {"level": level}))
several = st.lists(rules, min_size=1, max_size=4).map(
    lambda found: [r | {"name": f"rule {i}"} for i, r in enumerate(found)]
)
required = st.sampled_from([{}, {"prompts": 300}, {"seeds": 5}, {"calibrated": True}])
steady = settings(deadline=None, max_examples=25)
days = st.dates(date(2026, 11, 1), date(2027, 1, 1))


@st.composite
def cases(draw):
    uncalibrated = draw(st.sampled_from([None, "no threshold"]))
    waivers = [WAIVER | {"id": f"p{i}", "until": day} for i, day in enumerate(draw(st.lists(days, max_size=3)))]
    return draw(states), uncalibrated, draw(several), draw(required), waivers


def held(drawn):
    """Outside the strategy: the run-time checks of annotations use chance, and a strategy may not."""
    found, uncalibrated, drawn_rules, requires, waivers = drawn
    run = audited(*found, uncalibrated=uncalibrated)
    asked = policy(*drawn_rules, requires=requires, waivers=waivers)
    return run, asked, judge(asked, Material(run), TODAY)


@steady
@given(cases())
def test_exit_code_and_sentence_are_those_of_the_worst_check(drawn):
    _, _, verdict = held(drawn)
    worst = max(check.status for check in verdict.checks)
    assert verdict.status is worst
    assert verdict.exit_code == EXIT_CODES[worst] == {"pass": 0, "warn": 0, "fail": 1, "error": 3}[worst.word]
    assert ("fails" in verdict.headline, "passes" in verdict.headline, "cannot be judged" in verdict.headline) == (
        verdict.exit_code == 1,
        verdict.exit_code == 0,
        verdict.exit_code == 3,
    )


@steady
@given(cases())
def test_adding_a_failing_rule_never_improves_a_verdict(drawn):
    run, asked, verdict = held(drawn)
    failing = policy(COUNT | {"name": "added"}).rules[0]
    run = replace(run, cases=(*run.cases, Case("px", "prompt x", 4, {"copies": True, "detect.magnitude": True})))
    before = judge(asked, Material(run), TODAY)
    after = judge(asked.model_copy(update={"rules": [*asked.rules, failing]}), Material(run), TODAY)
    assert after.status >= before.status
    assert after.exit_code == 1
    assert verdict.status <= Status.FAIL


@steady
@given(
    st.sampled_from([0, 9, 10, 58, 59, 93, 124, 298, 299, 473]),
    st.integers(0, 3),
    limits,
    st.sampled_from(["fail", "warn"]),
)
def test_too_few_prompts_are_never_a_pass(n, k, limit, level):
    k = min(k, n)
    run = audited(*[True] * k, *clean(n - k))
    verdict = verdict_of(run, COPIES | {"max_upper95": limit, "level": level})
    passes = n > k and n >= least_prompts(limit, k)
    assert (verdict.checks[-1].status is Status.PASS) == passes
    assert verdict.checks[-1].holds is (True if passes else verdict.checks[-1].holds and False)


@steady
@given(st.integers(1, 5), st.integers(0, 50), st.integers(0, 60))
def test_a_waived_fail_is_shown_as_waived(k, n, ahead):
    until = str(date.fromordinal(TODAY.toordinal() + ahead))
    waivers = [WAIVER | {"id": f"p{i}", "until": until} for i in range(k)]
    run = audited(*[True] * k, *clean(n + 1))
    assert verdict_of(run, COUNT).exit_code == 1
    found = verdict_of(run, COUNT, waivers=waivers)
    assert (found.status, found.exit_code) == (Status.WARN, 0)
    assert "Waived: p0" in found.checks[-1].sentence
    assert all(find.waived for find in found.checks[-1].finds)
    assert "waived: p0" in to_markdown(found)


@steady
@given(cases())
def test_one_more_find_never_helps(drawn):
    run, asked, verdict = held(drawn)
    if not run.cases:
        return
    worse = replace(run.cases[-1], found=dict.fromkeys(run.cases[-1].found, True))
    after = judge(asked, Material(replace(run, cases=(*run.cases[:-1], worse))), TODAY)
    if f"p{len(run.cases) - 1}" not in {w.id for w in asked.waivers}:
        assert after.status >= verdict.status or verdict.status is Status.ERROR


@steady
@given(cases())
def test_every_export_says_the_same(drawn):
    _, _, verdict = held(drawn)
    stored = json.loads(to_json(verdict))
    assert (stored["status"], stored["exit_code"]) == (verdict.status.word, verdict.exit_code)
    suite = ET.fromstring(to_junit(verdict).encode()).find("testsuite")
    counted = {"failures": Status.FAIL, "errors": Status.ERROR, "skipped": Status.SKIPPED}
    for name, status in counted.items():
        assert int(suite.get(name)) == sum(check.status is status for check in verdict.checks)
    assert int(suite.get("tests")) == len(verdict.checks)
    assert to_markdown(verdict).startswith(f"## Memorization gate: {verdict.status.word}\n")


def test_hostile_prompts_are_harmless_in_every_export():
    run = audited(True)
    prompt = "</testcase>|\x00\u202e<b>[x](http://y)\n# \ud800"
    run = replace(run, cases=(replace(run.cases[0], prompt=prompt),))
    found = judge(policy(LEAKS), Material(run, leaks={"leaks.txt": [prompt]}), TODAY)
    names = [case.get("name") for case in ET.fromstring(to_junit(found).encode()).iter("testcase")]
    assert any("⟨U+202E⟩" in name for name in names)
    page = to_markdown(found)
    page.encode()
    assert "\\</testcase\\>\\|␀⟨U+202E⟩\\<b\\>\\[x\\](http:\\//y) \\#" in page


# The self-test ------------------------------------------------------------------------------------------------------------


def test_a_policy_that_bites_passes_its_self_test():
    world = audited(*[True] * 10, *clean(40), name="demo", status="interrupted")
    asked = policy(COPIES, LEAKS, NEWLY, requires={"prompts": 299}, waivers=[WAIVER])
    trial = try_out(asked, world, TODAY)
    assert (trial.exit_code, trial.silent) == (0, [])
    assert "The self-test passes: on demo, which has memorized, 3 of 3 rules" in trial.headline


def test_a_policy_that_lets_anything_through_fails_its_self_test():
    world = audited(*[True] * 10, *clean(990), name="demo")
    trial = try_out(policy(COPIES | {"max_upper95": 0.9}, COUNT | {"level": "warn"}), world, TODAY)
    assert trial.exit_code == 1
    assert [check.name for check in trial.silent] == ["no verbatim copies"]
    assert "would let anything through" in trial.headline


def test_the_self_test_says_when_it_cannot_judge_and_what_stays_silent():
    few = audited(False, False, name="demo")
    assert try_out(policy(COPIES), few, TODAY).exit_code == 3
    trial = try_out(policy(COUNT, COPIES | {"max_upper95": 0.99}), audited(True, *clean(99), name="demo"), TODAY)
    assert trial.exit_code == 0
    assert [check.name for check in trial.silent] == ["no verbatim copies"]


def test_the_self_test_takes_the_score_that_the_world_has():
    rule = {"name": "score", "metric": "detect.first_step.share", "max": 0.05}
    world = audited(*[True] * 10, *clean(10), name="demo")
    assert try_out(policy(rule), world, TODAY).exit_code == 0
