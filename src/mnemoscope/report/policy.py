"""What a release must not do, in a file: rules with limits, what the evidence must be like, waivers with an end.

    version: 1
    requires: {prompts: ">= 299", seeds: ">= 4", calibrated: true}
    rules:
      - {name: no verbatim copies, metric: copies.share, max_upper95: 0.01, level: fail}
    waivers:
      - {id: 9f2c, why: "public-domain logo", by: release-team, until: 2027-03-01}

A policy is data. :mod:`mnemoscope.report.gate` holds a run against it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import stats
from ..bounds import AMOUNT, BOUNDED_SHARE, SIZE
from ..errors import UnknownName, UsageError
from ..parsing import LARGEST_YAML, ParseError, parse_yaml
from ..records.places import read_named
from ..records.store import short
from .words import Number, prompts

__all__ = ["LIMITS", "Policy", "Requires", "Rule", "Waiver", "least_prompts"]

LIMITS = ("max", "max_upper95", "max_increase", "max_increase_upper95")
"""The limits a rule may have, one each."""

METRICS = ("copies.share", "copies.count", "detect.NAME.share", "detect.NAME.count")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _at_least(value: Any) -> Any:
    """``">= 299"``, ``"> 298"`` and ``299`` all mean at least 299."""
    found = re.fullmatch(r"(>=|>)?\s*(\d+)", value.strip()) if isinstance(value, str) else None
    if found is None:
        return value
    return int(found[2]) + (found[1] == ">")


AtLeast = Annotated[int, AMOUNT, BeforeValidator(_at_least)]
"""The least number that will do."""


class Requires(_Section):
    """What the evidence must be like. A run that is not is not judged clean, whatever its numbers are."""

    prompts: AtLeast = 0
    """Prompts with a result, such as ``">= 299"``."""
    seeds: AtLeast = 1
    """Seeds with a result, of every prompt."""
    status: Literal["done", "any"] = "done"
    """``done``: every sample that was asked for has a result; ``any``: a run that was stopped will do."""
    calibrated: bool = False
    """The run has a threshold, made under its own setting."""


LONGEST_NAME = 500
"""Characters of a rule's name, which stands in every sentence about it."""


class Rule(_Section):
    """One limit on one number."""

    name: str = Field(min_length=1, max_length=LONGEST_NAME)
    """How verdicts call it."""
    metric: str
    """``copies.share`` or ``copies.count`` (prompts with a copy found in any seed), ``detect.NAME.share`` or
    ``detect.NAME.count`` (prompts above the threshold of a detector)."""
    leaks: str | None = Field(None, alias="in")
    """A prompt file: the rule is about its prompts alone, and each of them must have been audited."""
    baseline: str | None = None
    """A run folder: only what is found now and was not found there counts."""
    max: Annotated[float | None, SIZE] = None
    """The number itself may be at most this."""
    max_upper95: Annotated[float | None, BOUNDED_SHARE] = None
    """The upper 95 % bound of the share may be at most this."""
    max_increase: Annotated[float | None, SIZE] = None
    """With ``baseline``: what is newly found may be at most this."""
    max_increase_upper95: Annotated[float | None, BOUNDED_SHARE] = None
    """With ``baseline``: the upper 95 % bound of the share that is newly found may be at most this."""
    level: Literal["fail", "warn"] = "fail"
    """The worst this rule can do."""

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.fullmatch(r"(copies|detect\..+)\.(share|count)", value):
            raise UnknownName("metric", value, METRICS)
        return value

    @model_validator(mode="after")
    def _one_sensible_limit(self) -> Rule:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"rule {self.name!r} has {' and '.join(given) or 'no limit'}; give one of {', '.join(LIMITS)}."
            )
        if ("increase" in given[0]) != (self.baseline is not None):
            has, lacks = ("baseline", "max_increase") if self.baseline is not None else (given[0], "baseline")
            raise UsageError(f"rule {self.name!r} has {has} and no {lacks}; an increase is one over a baseline.")
        if self.bounded and not self.share:
            raise UsageError(f"rule {self.name!r}: a count has no upper bound; write {self.subject}.share, or max.")
        if self.share and self.limit > 1:
            raise UsageError(
                f"rule {self.name!r}: {given[0]} is {self.limit:g}, and a share is at most 1; write 0.01 for 1 %."
            )
        if not self.share and self.limit != int(self.limit):
            raise UsageError(
                f"rule {self.name!r}: {given[0]} is {self.limit:g}, and a count is whole; or write {self.subject}.share."
            )
        return self

    @property
    def subject(self) -> str:
        """What is looked for: ``copies`` or ``detect.NAME``."""
        return self.metric.rpartition(".")[0]

    @property
    def share(self) -> bool:
        """A share of prompts; else a count."""
        return self.metric.endswith(".share")

    @property
    def detector(self) -> str | None:
        """The detector's score, if the rule is about one."""
        return self.subject.removeprefix("detect.") if self.subject != "copies" else None

    @property
    def limit(self) -> float:
        """The value of whichever limit was given."""
        return next(float(v) for name in LIMITS if (v := getattr(self, name)) is not None)

    @property
    def bounded(self) -> bool:
        """The upper bound is held against the limit, not the estimate."""
        return self.max_upper95 is not None or self.max_increase_upper95 is not None

    @property
    def least(self) -> int:
        """Independent prompts without which the rule can never hold."""
        return least_prompts(self.limit) if self.bounded else 1


class Waiver(_Section):
    """A find that somebody answers for, until a day."""

    id: str = Field(min_length=1)
    """Id of the prompt, as in ``gate.json`` and in the report."""
    why: str = Field(min_length=1)
    """The reason."""
    by: str = Field(min_length=1)
    """Who answers for it."""
    until: date
    """The last day on which it holds; after that it fails."""

    @field_validator("id", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def expired(self, today: date) -> bool:
        """Whether its last day has passed."""
        return today > self.until

    @property
    def words(self) -> str:
        """``9f2c by release-team until 2027-03-01: public-domain logo``."""
        return f"{self.id} by {self.by} until {self.until}: {self.why}"


class Policy(_Section):
    """A policy file. Built from keyword arguments or by :meth:`read`; paths in it stand as they were written.

    Raises:
        UnknownName: a key or metric that does not exist, with the nearest one that does.
        UsageError: something is missing or makes no sense; the sentence names the rule.
    """

    version: Literal[1]
    """Of the policy's language."""
    requires: Requires = Requires()
    """What the evidence must be like."""
    clusters: Literal["near-duplicates", "none"] = "near-duplicates"
    """What counts as one independent prompt in an upper bound: a cluster of near-duplicate prompts, or each prompt."""
    rules: list[Rule] = Field(min_length=1)
    """The rules."""
    waivers: list[Waiver] = []
    """The waivers."""

    def __init__(self, **content: Any):
        try:
            super().__init__(**content)
        except ValidationError as e:
            raise _sentence(e, content) from None

    @field_validator("rules")
    @classmethod
    def _names_differ(cls, value: list[Rule]) -> list[Rule]:
        names = [rule.name for rule in value]
        if repeated := [n for n in names if names.count(n) > 1]:
            raise UsageError(f"two rules are named {repeated[0]!r}; give each a name of its own.")
        return value

    @classmethod
    def read(cls, path: str | Path) -> Policy:
        """Read a YAML file.

        Raises:
            UsageError: it cannot be read, or is no policy.
        """
        try:
            content = parse_yaml(read_named(path, LARGEST_YAML))
        except OSError as e:
            raise UsageError(f"policy {path} cannot be read ({e.strerror or e}); name a YAML file.") from None
        except ParseError as e:
            raise UsageError(f"policy {path} cannot be read ({e}); correct it.") from None
        if not isinstance(content, dict):
            raise UsageError(f"policy {path} holds {type(content).__name__}; begin with `version: 1` and `rules:`.")
        return cls(**{str(k): v for k, v in content.items()})

    @property
    def detectors(self) -> list[str]:
        """The scores that its rules are about."""
        return list(dict.fromkeys(rule.detector for rule in self.rules if rule.detector))

    @property
    def remarks(self) -> list[str]:
        """Where the policy asks for fewer prompts than its own rules can be judged on."""
        return [
            f"rule {rule.name!r} can never hold on fewer than {prompts(rule.least)}, and requires.prompts lets "
            f'{self.requires.prompts:,} through; write ">= {rule.least}" there.'
            for rule in self.rules
            if rule.bounded and rule.leaks is None and self.requires.prompts < rule.least
        ]


@cache
def least_prompts(limit: Number, found: int = 0) -> int:
    """How many independent prompts it takes before ``found`` finds among them can show a share of at most ``limit``.

    299 for 1 % and 598 for 0.5 % without a find: the least n whose one-sided 95 % Clopper–Pearson bound is within the limit.
    """

    def shows(n: int) -> bool:
        return stats.upper_bound(found, n).high <= limit

    most = found + 1
    while not shows(most):
        most *= 2
    return bisect_left(range(most + 1), True, lo=found + 1, key=shows)


# One sentence for whatever is wrong ---------------------------------------------------------------------------------------

PARTS: dict[str, type[_Section]] = {"requires": Requires, "rules": Rule, "waivers": Waiver}


def _sentence(error: ValidationError, content: dict[str, Any]) -> UsageError:
    """The first complaint: which part of the policy, which key, which value, what it must be."""
    first = error.errors(include_url=False)[0]
    path = list(first["loc"])
    part = path[0] if path[0] in PARTS and len(path) > 1 else None
    holder = PARTS[str(part)] if part else Policy
    place, key = _place(path, content), str(path[-1])
    says = first["msg"].replace("Input should", "it should").removeprefix("Value error, ")
    if isinstance(path[-1], int):  # the whole rule or waiver
        return UsageError(f"{place} is {short(repr(first['input']))}; write it as `key: value` pairs.")
    if first["type"] == "extra_forbidden":
        return UnknownName(f"key of {place}", key, [f.alias or name for name, f in holder.model_fields.items()])
    if first["type"] == "missing":
        return UsageError(f"{place} has no {key}; add it.")
    hint = (
        " (put it in quotes)" if first["type"] == "string_type" and not isinstance(first["input"], (dict, list)) else ""
    )
    return UsageError(f"{place}: {key} is {short(repr(first['input']))}; {says}{hint}.")


def _place(path: list[Any], content: dict[str, Any]) -> str:
    """``rule 2 ('no known leak returns')``."""
    if path[0] in ("rules", "waivers") and len(path) > 1 and isinstance(path[1], int):
        item = content[path[0]][path[1]]
        named = next((item[k] for k in ("name", "id") if isinstance(item, dict) and k in item), None)
        return f"{path[0].removesuffix('s')} {path[1] + 1}" + (f" ({short(repr(named))})" if named is not None else "")
    return "requires" if path[0] == "requires" and len(path) > 1 else "the policy"
