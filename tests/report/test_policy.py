"""The policy file: what it says, and one sentence for whatever is wrong with it."""

from datetime import date
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemoscope import stats
from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.report.policy import Policy, least_prompts

DOCS = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")
RULE = {"name": "no copies", "metric": "copies.share", "max_upper95": 0.01}


def policy(**changes) -> Policy:
    return Policy(**({"version": 1, "rules": [RULE]} | changes))


def test_reads_what_the_file_says(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text(
        """
version: 1
requires: {prompts: ">= 299", seeds: "> 3", status: done, calibrated: true}
rules:
  - {name: no verbatim copies, metric: copies.share, max_upper95: 0.01, level: fail}
  - {name: leaks, metric: copies.count, in: leaks.jsonl, max: 0}
  - {name: last, metric: detect.first.step.share, baseline: runs/v1, max_increase_upper95: 0.005, level: warn}
waivers:
  - {id: 9f2c, why: a logo, by: release-team, until: 2027-03-01}
"""
    )
    found = Policy.read(file)
    assert (found.requires.prompts, found.requires.seeds, found.requires.calibrated) == (299, 4, True)
    copies, leaks, last = found.rules
    assert (copies.subject, copies.share, copies.bounded, copies.limit, copies.least) == (
        "copies",
        True,
        True,
        0.01,
        299,
    )
    assert (leaks.leaks, leaks.share, leaks.bounded, leaks.limit, leaks.level) == (
        "leaks.jsonl",
        False,
        False,
        0,
        "fail",
    )
    assert (last.detector, last.baseline, last.least) == ("first.step", "runs/v1", 598)
    assert found.detectors == ["first.step"]
    assert found.waivers[0].until == date(2027, 3, 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rules": [RULE | {"max_uper95": 0.1}]},
            r"no key of rule 1 \('no copies'\) named 'max_uper95'. Did you mean 'max_upper95'",
        ),
        ({"rules": [RULE | {"leaks": "x"}]}, "named 'leaks'"),
        ({"waiver": []}, "no key of the policy named 'waiver'. Did you mean 'waivers'"),
        ({"requires": {"prompt": 3}}, "no key of requires named 'prompt'. Did you mean 'prompts'"),
        ({"rules": [RULE | {"metric": "copy.share"}]}, "Did you mean 'copies.share'"),
    ],
)
def test_unknown_names_get_a_suggestion(changes, sentence):
    with pytest.raises(UnknownName, match=sentence):
        policy(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "the policy: version is 2; it should be 1"),
        ({"rules": []}, "rules is"),
        ({"rules": ["no copies"]}, "rule 1 is 'no copies'; write it as `key: value` pairs"),
        ({"rules": [{"metric": "copies.share", "max": 0}]}, "rule 1 has no name; add it"),
        ({"rules": [{"name": "x", "metric": "copies.share"}]}, "rule 'x' has no limit; give one of max, "),
        ({"rules": [RULE | {"max": 0}]}, "has max and max_upper95; give one"),
        ({"rules": [RULE | {"baseline": "runs/v1"}]}, "has baseline and no max_increase"),
        ({"rules": [{"name": "x", "metric": "copies.count", "max_increase": 0}]}, "has max_increase and no baseline"),
        ({"rules": [RULE | {"metric": "copies.count"}]}, "a count has no upper bound; write copies.share"),
        ({"rules": [{"name": "x", "metric": "copies.share", "max": 5}]}, "max is 5, and a share is at most 1"),
        ({"rules": [{"name": "x", "metric": "copies.count", "max": 0.01}]}, "a count is whole"),
        ({"rules": [RULE | {"max_upper95": 0}]}, "max_upper95 is 0; it must be a share from 1e-06 to below 1"),
        ({"rules": [RULE | {"max_upper95": 1e-12}]}, "max_upper95 is 1e-12; it must be a share from 1e-06 to below 1"),
        ({"rules": [RULE | {"level": "error"}]}, "level is 'error'; it should be 'fail' or 'warn'"),
        ({"rules": [RULE, RULE]}, "two rules are named 'no copies'"),
        ({"rules": [RULE | {"name": 7}]}, "put it in quotes"),
        ({"rules": [RULE | {"name": "x" * 501}]}, "at most 500 characters"),
        ({"rules": [RULE | {"name": [0] * 1000}]}, r"rule 1 \(\[0, 0, .{0,60}…\): name is"),
        ({"waivers": [{"id": "x" * 1000}]}, r"waiver 1 \('x{0,60}…\) has no why"),
        ({"requires": {"prompts": "many"}}, "requires: prompts is 'many'"),
        ({"requires": {"status": "finished"}}, "status is 'finished'; it should be 'done' or 'any'"),
        ({"waivers": [{"id": "a", "why": "b", "by": "c"}]}, r"waiver 1 \('a'\) has no until"),
        ({"waivers": [{"id": "a", "why": "", "by": "c", "until": "2027-01-01"}]}, "why is ''"),
        ({"waivers": [{"id": "a", "why": "b", "by": "c", "until": "soon"}]}, "until is 'soon'"),
    ],
)
def test_what_makes_no_sense_gets_one_sentence(changes, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        policy(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"), [("- a\n- b\n", "holds list"), ("{", "is not YAML"), ("", "holds NoneType")]
)
def test_what_is_no_policy_is_said(tmp_path, text, sentence):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        Policy.read(file)
    with pytest.raises(UsageError, match="cannot be read"):
        Policy.read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(("limit", "found", "least"), [(0.01, 0, 299), (0.005, 0, 598), (0.01, 1, 473), (0.05, 0, 59)])
def test_least_prompts_is_the_published_arithmetic(limit, found, least):
    assert least_prompts(limit, found) == least


@settings(deadline=None, max_examples=30)
@given(st.floats(0.002, 0.9), st.integers(0, 5))
def test_least_prompts_is_the_least(limit, found):
    n = least_prompts(limit, found)
    assert stats.upper_bound(found, n).high <= limit
    assert n == found + 1 or stats.upper_bound(found, n - 1).high > limit


def test_a_policy_that_asks_for_fewer_prompts_than_it_needs_is_told_at_once():
    assert policy(requires={"prompts": ">= 299"}).remarks == []
    (remark,) = policy(requires={"prompts": ">= 100"}).remarks
    assert "can never hold on fewer than 299 prompts" in remark
    assert 'write ">= 299"' in remark


def test_a_waiver_holds_through_its_last_day():
    (waiver,) = policy(waivers=[{"id": 17, "why": "a", "by": "b", "until": "2027-03-01"}]).waivers
    assert waiver.id == "17"
    assert not waiver.expired(date(2027, 3, 1))
    assert waiver.expired(date(2027, 3, 2))


def test_the_policy_in_the_docs_is_one():
    written = DOCS.split("```yaml\n")[1].split("```")[0]
    found = Policy(**yaml.safe_load(written))
    assert found.remarks == []
    assert len(found.rules) == 4


def test_the_table_in_the_docs_is_right():
    rows = [line.strip("| ").split("|") for line in DOCS.splitlines() if line.startswith("| ≤")]
    assert len(rows) >= 5
    for limit, *needed in rows:
        share = float(limit.strip("≤ %")) / 100
        assert [int(n.replace(",", "")) for n in needed] == [least_prompts(share, k) for k in range(len(needed))]
