"""What clients send and are sent: the shape of OpenAI's images API, and ours under names of their own.

Every limit stands in the document that is served as ``/openapi.json``: what it allows is drawn, what it does not allow is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse

from ..bounds import SERVED_GUIDANCE
from ..errors import UsageError

if TYPE_CHECKING:
    from .guard import Decision, Guard

__all__ = [
    "NEVER", "ErrorBody", "Images", "Judged", "Limits", "Model", "Models", "Picture", "Problem", "State",
    "calibrated", "error_response", "in_words", "judged", "limits_of", "problem_of", "request_model", "size_of",
]  # fmt: skip

LARGEST_SEED = 2**53 - 1
"""Every JSON reader keeps integers up to here."""

MOST_GUIDANCE = SERVED_GUIDANCE.high
LONGEST_USER = 512
"""Characters of a caller's own id, which nothing here reads."""

GRID = 8
"""Pixels: diffusers draws no sides but multiples of this."""

CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "foreign_origin",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_content_type",
    421: "unknown_host",
    429: "rate_limit_exceeded",
    500: "generation_failed",
    503: "shutting_down",
    504: "timeout",
}
"""What an answer's ``error.code`` says where nothing more exact is known."""


# What may be asked for


@dataclass(frozen=True)
class Limits:
    """What one request may ask of a model.

    Attributes:
        model: The name it is served under.
        heights: Heights in pixels that it draws.
        widths: Widths in pixels that it draws.
        height: Of a picture whose size is not given.
        width: The same.
        guidance: Guidance scale where none is given.
        steps: Sampler steps where none are given.
        counts: Numbers of steps that may be asked for, ascending.
        most_pictures: Most pictures of one request; they are drawn together.
        longest_prompt: Characters of a prompt.
    """

    model: str
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    height: int
    width: int
    guidance: float
    steps: int = 50
    counts: Sequence[int] = range(1, 101)
    most_pictures: int = 4
    longest_prompt: int = 4000

    def __post_init__(self) -> None:
        for name in ("steps", "most_pictures", "longest_prompt"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} {getattr(self, name)}: give 1 or more.")
        if self.steps not in self.counts:
            raise UsageError(
                f"{self.steps} steps where a request says nothing, and {in_words(self.counts)} may be asked for."
            )
        if not 1 < self.guidance <= MOST_GUIDANCE:
            raise UsageError(
                f"guidance {self.guidance:g}: the guard compares predictions with and without the prompt, so give more than 1 and "
                f"at most {MOST_GUIDANCE:g}."
            )

    @property
    def largest_body(self) -> int:
        """Bytes that no allowed request exceeds: JSON may write one character as ``\\ud83d\\ude00``."""
        return 12 * (2 * self.longest_prompt + LONGEST_USER) + 4096


def limits_of(
    target: Any, *, name: str = "", largest: int | None = None, most_steps: int = 100, **given: Any
) -> Limits:
    """The limits that a model sets, narrowed by what is given.

    Args:
        target: The model (:class:`~mnemoscope.models.host.DiffusersTarget`).
        name: What it is served as; default: its own name.
        largest: Longest side of a picture in pixels; default: the model's, twice what it was trained at.
        most_steps: Most sampler steps.
        **given: Further fields of :class:`Limits`; None stands for the default.

    Raises:
        UsageError: the model takes no text, or nothing would be left to draw.
    """
    if not target.has_text:
        raise UsageError(f"{target.name} takes no text, so there is no prompt to guard; serve a text-to-image model.")
    _, rows, columns = target.latent_shape
    height, width = rows * target.factor, columns * target.factor
    heights, widths = (
        tuple(side for side in sides if side % GRID == 0 and side <= (largest or side)) for sides in target.sides()
    )
    if height not in heights or width not in widths:
        raise UsageError(f"{target.name} draws {width}x{height} pixels; allow at least {max(width, height)}.")
    target.schedule(most_steps)  # which knows how many it can make
    kept = {"guidance": target.guidance, "steps": min(50, most_steps)} | {
        k: v for k, v in given.items() if v is not None
    }
    return Limits(name or target.name, heights, widths, height, width, counts=range(1, most_steps + 1), **kept)


def calibrated(limits: Limits, guard: Guard, *, steps: int | None = None) -> Limits:
    """The limits narrowed to generations that the guard's calibration speaks about.

    It would fail on others, and whoever may choose their size or steps could choose to pass unguarded.

    Args:
        limits: What the model can do.
        guard: The guard before it. Behind a bare number, or a calibration that was accepted although it does not fit, nothing
            is narrowed.
        steps: Where a request says nothing; default: as many as it was calibrated with.

    Raises:
        UsageError: nothing would be left.
    """
    fit = guard.fit
    if fit.t is None or fit.calibration is None:
        return limits
    own = fit.calibration.record.setting["steps"]
    scheduler = type(guard.pipe.scheduler).from_config(guard.pipe.scheduler.config)

    def first_time(count: int) -> float:
        scheduler.set_timesteps(count)
        return float(scheduler.timesteps[0])

    counts = tuple(count for count in limits.counts if first_time(count) == fit.t)
    _, rows, columns = fit.size
    height, width = rows * guard.target.factor, columns * guard.target.factor
    if not counts or height not in limits.heights or width not in limits.widths:
        raise UsageError(
            f"{fit.calibration.name} was made with {own} steps at {width}x{height}; allow these, or calibrate for what you allow."
        )
    chosen = steps or (own if own in counts else counts[-1])
    return replace(limits, heights=(height,), widths=(width,), height=height, width=width, counts=counts, steps=chosen)


def request_model(limits: Limits) -> type[BaseModel]:
    """The body of ``POST /v1/images/generations`` under these limits."""
    most = limits.longest_prompt
    last = LARGEST_SEED - limits.most_pictures + 1  # so that the seeds of all pictures are such integers
    seed = Annotated[int, Field(ge=0, le=last), BeforeValidator(_whole)]
    pictures = Annotated[int, Field(ge=1, le=limits.most_pictures), BeforeValidator(_whole)]
    steps = _count_among(limits.counts)
    guidance = Annotated[float, Field(gt=1, le=MOST_GUIDANCE, allow_inf_nan=False)]
    size = Annotated[str, AfterValidator(_size_within(limits)), Field(json_schema_extra={"pattern": _pattern(limits)})]
    form = Annotated[Literal["b64_json"], BeforeValidator(_no_address)]

    def optional(kind: Any, words: str) -> Any:
        return (kind | None, Field(None, description=words))

    fields: dict[str, Any] = {
        "prompt": (Annotated[str, Field(min_length=1, max_length=most, description="What to draw.")], ...),
        "model": optional(Literal[limits.model], "The model that is served here."),
        "n": optional(pictures, "Pictures; default 1. One that is refused refuses them all."),
        "size": optional(size, f"WIDTHxHEIGHT in pixels, or auto ({limits.width}x{limits.height})."),
        "response_format": optional(form, "Pictures come as base64 of a PNG; none is kept, so there are no addresses."),
        "user": optional(Annotated[str, Field(max_length=LONGEST_USER)], "Accepted and not read."),
        "seed": optional(seed, "Of the first picture; the next ones have the numbers after it. Default: random."),
        "steps": optional(steps, f"Sampler steps; default {limits.steps}."),
        "guidance_scale": optional(guidance, f"Guidance scale; default {limits.guidance:g}."),
        "negative_prompt": optional(Annotated[str, Field(max_length=most)], "What to keep away from."),
    }
    return create_model("ImagesRequest", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def size_of(text: str | None, limits: Limits) -> tuple[int, int]:
    """Width and height of an allowed ``size``."""
    if text is None or text == "auto":
        return limits.width, limits.height
    width, _, height = text.partition("x")
    return int(width), int(height)


def _whole(value: Any) -> Any:
    """JSON knows one kind of number, so 2.0 is 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count_among(counts: Sequence[int]) -> Any:
    if not _gaps(counts):
        return Annotated[int, Field(ge=counts[0], le=counts[-1]), BeforeValidator(_whole)]
    document = WithJsonSchema({"type": "integer", "enum": list(counts)})
    return Annotated[int, AfterValidator(_one_of(counts)), BeforeValidator(_whole), document]


def _gaps(counts: Sequence[int]) -> bool:
    return len(counts) != counts[-1] - counts[0] + 1


def _one_of(counts: Sequence[int]) -> Any:
    def check(value: int) -> int:
        if value not in counts:
            raise PydanticCustomError("steps", "{known} are possible", {"known": in_words(counts)})
        return value

    return check


def in_words(counts: Sequence[int]) -> str:
    """Numbers of steps, as a sentence has them."""
    return (
        ", ".join(map(str, counts))
        if _gaps(counts)
        else f"{counts[0]} to {counts[-1]}"
        if len(counts) > 1
        else str(counts[0])
    )


def _pattern(limits: Limits) -> str:
    widths, heights = ("|".join(map(str, sides)) for sides in (limits.widths, limits.heights))
    return f"^(auto|({widths})x({heights}))$"


def _size_within(limits: Limits) -> Any:
    names = {f"{w}x{h}" for w in limits.widths for h in limits.heights} | {"auto"}

    def check(value: str) -> str:
        if value not in names:
            raise PydanticCustomError(
                "size",
                "size must be WIDTHxHEIGHT, widths from {w0} to {w1} and heights from {h0} to {h1} in multiples of {unit}, or auto",
                {
                    "w0": limits.widths[0], "w1": limits.widths[-1], "h0": limits.heights[0], "h1": limits.heights[-1],
                    "unit": math.gcd(*limits.widths, *limits.heights),
                },
            )  # fmt: skip
        return value

    return check


def _no_address(value: Any) -> Any:
    if value == "url":
        raise PydanticCustomError(
            "address", "response_format 'url' is not offered, because no picture is kept here; ask for 'b64_json'"
        )
    return value


# What is answered


class Judged(BaseModel):
    """What the guard found and did about one picture; ``score`` is null where none could be computed."""

    index: int
    seed: int
    score: float | None
    threshold: float | None
    p: float | None
    hit: bool
    action: str
    mitigation: str | None


class Guarded(BaseModel):
    """The guard's part of an answer."""

    decisions: list[Judged]


class Picture(BaseModel):
    """One picture, base64 of a PNG."""

    b64_json: str


class Images(BaseModel):
    """Pictures, and under ``mnemoscope`` the guard's decision about each."""

    created: int
    data: list[Picture]
    mnemoscope: Guarded


class ErrorFacts(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error object; a refused generation carries the guard's decisions."""

    error: ErrorFacts
    mnemoscope: Guarded | None = None


class Model(BaseModel):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mnemoscope"


class Models(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class State(BaseModel):
    """Whether the server lives, or takes work."""

    status: str


NEVER = 1e9
"""A threshold that no score exceeds, for a guard that only reports scores; answers then name no threshold."""


def judged(decisions: Sequence[Decision], seeds: Sequence[int]) -> Guarded:
    """Decisions as they are sent, without any prompt; ``seeds`` are those of the rows."""
    return Guarded(decisions=[_judged(d, seeds[d.row]) for d in decisions])


def _judged(d: Decision, seed: int) -> Judged:
    threshold = None if d.threshold >= NEVER else d.threshold
    return Judged(
        index=d.row, seed=seed, score=_finite(d.score), threshold=threshold, p=_finite(d.p), hit=d.hit, action=d.action,
        mitigation=d.mitigation,
    )  # fmt: skip


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


# Errors


class Problem(Exception):
    """Ends a request with an error object.

    Args:
        status: HTTP status.
        message: A sentence for whoever sent the request.
        code: What programs tell errors apart by; default: by the status.
        param: The parameter that is wrong.
        headers: Sent with it.
        guarded: The guard's decisions, where it was the guard.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        guarded: Guarded | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self.code, self.param, self.guarded = code or CODES.get(status, "error"), param, guarded

    def response(self) -> JSONResponse:
        """It as an answer."""
        kind = "server_error" if self.status >= 500 else "requests" if self.status == 429 else "invalid_request_error"
        facts = ErrorFacts(message=self.message, type=kind, param=self.param, code=self.code)
        body = ErrorBody(error=facts, mnemoscope=self.guarded).model_dump()
        if self.guarded is None:
            del body["mnemoscope"]
        return JSONResponse(body, self.status, self.headers)


def error_response(status: int, message: str, headers: Mapping[str, str]) -> JSONResponse:
    """An answer for whoever refuses requests before they come here."""
    return Problem(status, message, "internal_error" if status == 500 else None, headers=headers).response()


def problem_of(error: ValidationError) -> Problem:
    """The first thing that is wrong with a body, in a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, name = first["type"], str(first["loc"][0])[:64] if first["loc"] else None
    if name is None:
        return Problem(400, "The body must be a JSON object.", "invalid_type")
    if kind == "extra_forbidden":
        return Problem(400, f"Unknown parameter: {name!r}.", "unknown_parameter", param=name)
    if kind == "missing":
        return Problem(400, f"Missing required parameter: {name!r}.", "missing_required_parameter", param=name)
    if name == "model" and kind == "literal_error":
        known = first["ctx"]["expected"]
        return Problem(404, f"There is no such model here; this server has {known}.", "model_not_found", param=name)
    return Problem(400, f"Invalid {name!r}: {first['msg']}.", "invalid_value", param=name)
