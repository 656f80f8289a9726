"""A verdict for other tools: JUnit XML for test reports, Markdown for the page of a CI job, JSON for whoever asks later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from xml.etree import ElementTree as ET

from .html import environment
from .verdict import Call, Check, Status, Verdict
from .words import printable

__all__ = ["to_json", "to_junit", "to_markdown"]

SHOWN = 20
"""How many finds of a rule the Markdown lists; ``gate.json`` has them all."""


def to_json(verdict: Verdict) -> str:
    """``gate.json``."""
    return json.dumps(verdict.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(verdict: Verdict) -> str:
    """A headline, a row per check, and the finds: for ``$GITHUB_STEP_SUMMARY``, a pull request, a model card."""
    return environment(escape=False).get_template("gate.md.jinja").render(verdict=verdict, most=SHOWN)


def to_junit(verdict: Verdict) -> str:
    """JUnit XML: one test case per check, and one per known leak.

    Failed checks are failures, those that cannot be judged are errors. A warning passes, with its sentence in the output.
    """
    cases = list(_cases(verdict))
    counts = {"tests": len(cases)} | {
        name: sum(case.find(tag) is not None for case in cases)
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    numbers = {name: str(count) for name, count in counts.items()}
    suites = ET.Element("testsuites", {"name": "mnemoscope gate", **numbers})
    suite = ET.SubElement(suites, "testsuite", {"name": printable(verdict.run), **numbers})
    suite.extend(cases)
    ET.SubElement(suite, "system-out").text = printable(verdict.headline)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _cases(verdict: Verdict) -> Iterator[ET.Element]:
    for check in verdict.checks:
        yield _case(f"mnemoscope.gate.{check.kind}", check.name, check.status, check.sentence)
        for leak in check.leaks:
            yield _case(f"mnemoscope.gate.rule.{check.name}", leak.prompt or "(empty prompt)", *_leak(check, leak))


def _leak(check: Check, leak: Call) -> tuple[Status, str]:
    """A leak is as bad as its rule is, and no worse: a rule may allow some, or only warn."""
    if leak.waived:
        return Status.WARN, f"waived: {leak.waived.words}; {leak.words}"
    if leak.found is False:
        return Status.PASS, leak.words
    own = Status.FAIL if leak.found else Status.ERROR
    return min(own, max(check.status, Status.WARN)), leak.words


def _case(group: str, name: str, status: Status, words: str) -> ET.Element:
    case = ET.Element("testcase", {"classname": printable(group), "name": printable(name)})
    tag = {Status.FAIL: "failure", Status.ERROR: "error", Status.SKIPPED: "skipped"}.get(status)
    if tag:
        ET.SubElement(case, tag, {"message": printable(words)})
    else:
        ET.SubElement(case, "system-out").text = printable(f"{status.word}: {words}")
    return case
