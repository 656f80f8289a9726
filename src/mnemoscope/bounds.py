"""What numbers may be: the one home of the bounds of options, settings and arguments. No torch.

A bound is one object for all who need it: what an option of a command is read by, the annotation of a setting, and what :func:`within`
holds the arguments of a function against. Upper ends that no method has are there to refuse slips: nobody wants 10¹⁸ seeds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeVar

from .errors import UsageError

__all__ = ["Bound", "bounds_of", "seed_numbers", "shown", "within"]

P = ParamSpec("P")
R = TypeVar("R")

LONGEST = 60
"""Characters of a value that a sentence repeats."""


@dataclass(frozen=True)
class Bound:
    """The numbers from ``low`` to ``high``.

    Attributes:
        low: The lower end.
        high: The upper end.
        whole: Whole numbers only.
        above: The lower end itself is not allowed.
        below: The upper end itself is not allowed.
        noun: What such a number is called.
    """

    low: int | float
    high: int | float
    whole: bool = False
    above: bool = False
    below: bool = False
    noun: str = "a number"

    @property
    def words(self) -> str:
        """``a whole number from 1 to 1000``."""
        low, high = _digits(self.low), _digits(self.high)
        if self.above:
            return f"{self.noun} above {low} and {'below' if self.below else 'at most'} {high}"
        return f"{self.noun} from {low} to {'below ' if self.below else ''}{high}"

    def admits(self, value: Any) -> bool:
        """Whether a value is one of these numbers. Switches, texts and NaN are no numbers."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        number: Any = value  # the protocol of real numbers does not say that they can be compared
        inside = self.low < number if self.above else self.low <= number
        inside = inside and (number < self.high if self.below else number <= self.high)
        return bool(inside) and (not self.whole or number == int(number))

    def judge(self, name: str, value: Any) -> Any:
        """The value, as an int where whole numbers are meant.

        Raises:
            UsageError: it is none of these numbers; the sentence has the name, the value and what is allowed.
        """
        if not self.admits(value):
            raise UsageError(f"{name} is {shown(value)}, and must be {self.words}.")
        return int(value) if self.whole else value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """The bound as an annotation of a setting, as pydantic asks for it. What is no number (None, a word) is for the setting's type."""
        from pydantic_core import core_schema

        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def _validate(self, value: Any, convert: Callable[[Any], Any]) -> Any:
        if isinstance(value, bool):  # pydantic takes it for 0 or 1
            raise ValueError(f"it must be {self.words}")
        number = convert(value)
        if isinstance(number, Real) and not self.admits(number):
            raise ValueError(f"it must be {self.words}")
        return number


def _whole(low: int, high: int) -> Bound:
    return Bound(low, high, whole=True, noun="a whole number")


def _digits(end: int | float) -> str:
    """An end as a sentence has it: digits in groups where there are many."""
    return f"{end:,}" if abs(end) >= 10_000 else f"{end:g}"


SEEDS = _whole(1, 100_000_000)
"""Generations of a prompt."""
SEED = _whole(0, 2**63 - 1)
"""What random numbers start from."""
STEPS = _whole(1, 1000)
"""Steps of a sampler."""
STEP = _whole(0, 999)
"""Which of them, counted from 0."""
COUNT = _whole(1, 1_000_000_000)
"""Of anything that there must be one of."""
AMOUNT = _whole(0, 1_000_000_000)
"""Of anything that there may be none of."""
SIDE = _whole(8, 65_536)
"""Of a picture in pixels."""
WORKERS = _whole(1, 1024)
"""Threads."""
PORT = _whole(0, 65_535)
"""Where a server listens; 0: wherever it may."""
FINITE = Bound(-1_000_000_000, 1_000_000_000)
"""A score, or a threshold of scores."""
POSITIVE = Bound(0, 1_000_000_000, above=True)
"""A strength, or a length of time."""
SIZE = Bound(0, 1_000_000_000)
"""The same where 0 switches it off."""
FACTOR = Bound(1, 1_000_000_000)
"""How many times more."""
GUIDANCE = Bound(0, 1000, above=True)
"""A guidance scale."""
SERVED_GUIDANCE = Bound(1, 30, above=True)
"""The same in requests of strangers; a guard compares predictions with and without the prompt, which takes more than 1."""
LORA_SCALE = Bound(-1000, 1000)
"""How strongly a LoRA changes its model."""
SCALE = Bound(1, 1000)
"""A guidance scale with which pictures are brought back; 1: without guidance."""
SIMILARITY = Bound(-1, 1, above=True, below=True, noun="a similarity")
"""Above which two pictures are taken for one."""
LEAST_SIMILARITY = Bound(-1, 1, above=True, noun="a similarity")
"""From which on they are."""
RATE = Bound(0, 1, above=True, below=True, noun="a rate")
"""Of errors that are accepted: neither none nor all."""
BOUNDED_SHARE = Bound(1e-6, 1, below=True, noun="a share")
"""That an upper 95 % bound can be held against: a smaller one would need more than three million prompts."""
SHARE = Bound(0, 1, noun="a share")
"""Of a whole."""
PART = Bound(0, 1, above=True, noun="a share")
"""Of a whole, and not nothing."""
REST = Bound(0, 1, below=True, noun="a share")
"""Of a whole, and not everything."""
NEARNESS = Bound(-1, 1)
"""Of two pictures: a similarity, or a distance of at most 1."""
THUMBNAIL = _whole(2, 256)
"""Side of a picture that is only compared, in pixels."""
TIMES = _whole(1, 999)
"""How many of 1000 training times, without both ends."""
DIFFERENCE = Bound(0, 1, below=True, noun="a relative difference")
"""Between two computations of one number."""


def within(**bounds: Bound) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose arguments of these names are held against bounds before it begins; None only where its annotation allows it.

    A call with a number outside raises :class:`~mnemoscope.errors.UsageError`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        if unknown := bounds.keys() - signature.parameters.keys():
            raise TypeError(f"{function.__qualname__} has no argument {', '.join(sorted(unknown))}")

        optional = {name for name in bounds if "None" in str(signature.parameters[name].annotation)}

        @wraps(function)
        def judged(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind_partial(*args, **kwargs)
            for name, bound in bounds.items():
                if name in given.arguments and not (name in optional and given.arguments[name] is None):
                    given.arguments[name] = bound.judge(name, given.arguments[name])
            return function(*given.args, **given.kwargs)

        judged.__bounds__ = bounds  # type: ignore[attr-defined]
        return judged

    return decorate


def bounds_of(make: Any) -> Mapping[str, Bound]:
    """The bounds that :func:`within` holds the arguments of a function, or of a class, against; by name."""
    function = make.__init__ if inspect.isclass(make) else make
    found: Mapping[str, Bound] = getattr(function, "__bounds__", {})
    return found


def seed_numbers(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Seeds 0 … n − 1 where a number n is given, else the seeds themselves.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        return tuple(SEED.judge("a seed", seed) for seed in seeds)
    return tuple(range(SEEDS.judge("seeds", seeds)))


def shown(value: Any) -> str:
    """A value as a sentence repeats it: short, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
