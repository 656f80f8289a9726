"""What a training is asked to do: one frozen object that the command line and keyword arguments fill. No torch.

Defaults are written here and nowhere else. The docstring under a setting is its help text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import redaction
from ..bounds import AMOUNT, COUNT, FACTOR, POSITIVE, RATE, REST, SEED, SIDE, SIMILARITY, SIZE, Bound, shown
from ..errors import UnknownName, UsageError
from ..records.places import require_utf8

__all__ = ["AUGMENTATIONS", "TrainConfig"]

Augmentation = Literal["random-tokens", "replaced-tokens", "random-numbers", "repeated-words", "embedding-noise"]
AUGMENTATIONS = get_args(Augmentation)

FREE = frozenset({
    "out", "save_every", "keep", "log_every", "validate_every", "validation_prompts", "tracker", "strict", "device",
    "cache_gigabytes",
})  # fmt: skip
"""Settings that change nothing of what is learned: an interrupted training may be continued with others."""


def _setting(default: Any, allowed: str | Bound) -> Any:
    """A field with the words that say what it may be; a bound is also the annotation of its type."""
    return Field(default, json_schema_extra={"allowed": allowed.words if isinstance(allowed, Bound) else allowed})


class TrainConfig(BaseModel):
    """A fine-tuning: which model, which pictures, how, and how it is kept from memorizing them.

    Raises:
        UnknownName: a setting that does not exist, with the nearest that does.
        UsageError: a value that is not allowed, or two settings that do not fit each other.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: str
    """Hub id, pipeline folder or ``.safetensors`` checkpoint of the model to start from."""
    data: str
    """A folder of pictures with captions, one that ``datasets`` saved, or Parquet."""
    out: str
    """Where everything is written; the same command continues there."""
    model_options: dict[str, Any] = _setting({}, "a mapping of options for loading the model")
    """Handed to the loader (revision, variant, …)."""
    caption_column: str | None = _setting(None, "the name of a column")
    """Column or key of the caption; by default ``text``, ``caption`` or ``prompt``."""
    image_column: str | None = _setting(None, "the name of a column")
    """Column of a table that holds the pictures; by default the only one that can."""

    steps: Annotated[int, COUNT] = _setting(1000, COUNT)
    """Steps of the optimizer."""
    batch_size: Annotated[int, COUNT] = _setting(4, COUNT)
    """Pictures per forward pass of one process."""
    accumulate: Annotated[int, COUNT] = _setting(1, COUNT)
    """Forward passes whose gradients make one step."""
    lr: Annotated[float | None, POSITIVE] = _setting(None, POSITIVE)
    """Learning rate; by default 1e-4 with LoRA and 1e-5 without."""
    schedule: Literal["constant", "linear", "cosine"] = _setting("constant", "'constant', 'linear' or 'cosine'")
    """How the learning rate goes on after the warm-up."""
    warmup: Annotated[int, AMOUNT] = _setting(0, AMOUNT)
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, SIZE] = _setting(0.01, SIZE)
    """Of AdamW."""
    clip: Annotated[float, POSITIVE] = _setting(1.0, POSITIVE)
    """Norm to which gradients are clipped."""
    lora: Annotated[int | None, COUNT] = _setting(None, COUNT)
    """Rank of a LoRA; without it the whole UNet is trained."""
    resolution: Annotated[int | None, SIDE] = _setting(None, SIDE)
    """Side in pixels; by default the model's own."""
    flip: bool = _setting(False, "true or false")
    """Mirror half of the visits."""
    min_side: Annotated[int | None, COUNT] = _setting(None, COUNT)
    """Pictures whose short side has fewer pixels are left out; by default the resolution."""
    max_aspect: Annotated[float, FACTOR] = _setting(3.0, FACTOR)
    """Pictures are cut to a square; those that are longer than this many times their width, or wider, are left out."""
    ema: bool = _setting(False, "true or false")
    """Keep a moving average of what is trained; it is then what is saved."""
    ema_decay: Annotated[float, REST] = _setting(0.9999, REST)
    """Of the moving average."""
    mixed_precision: Literal["no", "fp16", "bf16"] = _setting("no", "'no', 'fp16' or 'bf16'")
    """Precision of the forward and backward passes."""
    gradient_checkpointing: bool = _setting(False, "true or false")
    """Compute activations twice instead of keeping them: less memory, more time."""
    caption_dropout: Annotated[float, REST] = _setting(0.0, REST)
    """Share of visits with the empty prompt, which is what guidance needs."""
    snr_gamma: Annotated[float | None, POSITIVE] = _setting(None, POSITIVE)
    """γ of Min-SNR weights (Hang et al., ICCV 2023); by default all times weigh alike."""
    seed: Annotated[int, SEED] = _setting(0, SEED)
    """Every draw depends on it and on the step alone."""

    filter: Annotated[Literal["auto"] | float | str | None, POSITIVE] = _setting(
        None, "a number above 0, 'auto', or a tau.json"
    )
    """Leave samples out of the loss whose magnitude is above τ: a number, τ(t) from clean pictures (auto), or its file."""
    filter_drop: Annotated[float, RATE] = _setting(0.05, RATE)
    """Share of clean samples that τ(t) drops, at most."""
    filter_ranges: Annotated[int, COUNT] = _setting(10, COUNT)
    """Ranges of t with a threshold each."""
    clean: str | None = _setting(None, "the path of captioned pictures")
    """Captioned pictures known to be clean; by default a part of the data is held out."""
    heldout: Annotated[float, RATE] = _setting(0.1, RATE)
    """Share of the data that is held out where clean pictures are needed and none are given."""
    running_scores: Literal["flag", "down-weight", "drop"] | None = _setting(None, "'flag', 'down-weight' or 'drop'")
    """Keep a record of every picture over its visits, and do this with those that stand out."""
    augment: Augmentation | None = _setting(None, f"one of {', '.join(AUGMENTATIONS)}")
    """Change captions at every visit."""
    augment_count: Annotated[int, COUNT] = _setting(4, COUNT)
    """Words that are inserted or replaced."""
    augment_scale: Annotated[float, POSITIVE] = _setting(0.1, POSITIVE)
    """λ of embedding-noise."""
    canaries: dict[Annotated[int, AMOUNT], Annotated[int, COUNT]] = _setting(
        {}, "copies:number pairs such as 0:20,1:20,16:20"
    )
    """Copies → how many pictures are planted so often."""
    canaries_every: Annotated[int | None, COUNT] = _setting(None, COUNT)
    """Steps between looks at the canaries; by default ``save_every``."""
    canary_threshold: Annotated[float | None, SIMILARITY] = _setting(None, SIMILARITY)
    """Similarity above which a generation is a copy of its canary; without it nothing is generated and the training is not stopped."""
    canary_screen: str | None = _setting(None, "an installed measure such as denoising-loss")
    """How strongly each canary is stored, by this measure, at each look (``mnemoscope ls measures``)."""
    dedupe: Literal["off", "drop", "merge"] = _setting("off", "'off', 'drop' or 'merge'")
    """Near-duplicates: keep one of each cluster, with its own caption (drop) or those of all (merge)."""
    dedupe_threshold: Annotated[float | None, SIMILARITY] = _setting(None, SIMILARITY)
    """Similarity above which two pictures are near-duplicates; by default the descriptor's."""
    descriptor: str = _setting("fingerprint", "an installed descriptor")
    """What says how similar two pictures are."""

    save_every: Annotated[int, COUNT] = _setting(500, COUNT)
    """Steps between checkpoints."""
    keep: Annotated[int, COUNT] = _setting(2, COUNT)
    """Checkpoints that are kept."""
    log_every: Annotated[int, COUNT] = _setting(10, COUNT)
    """Steps between readings of losses from the device."""
    validate_every: Annotated[int | None, COUNT] = _setting(None, COUNT)
    """Steps between pictures of the validation prompts; by default ``save_every``."""
    validation_prompts: tuple[str, ...] = _setting((), "a list of prompts")
    """Prompts to draw and to score while training."""
    tracker: str | None = _setting(None, "a tracker of accelerate such as tensorboard")
    """Where else losses are sent: tensorboard, wandb, mlflow, …"""
    strict: bool = _setting(False, "true or false")
    """Refuse to train where any picture has to be left out."""
    device: Literal["cpu"] | None = _setting(None, "'cpu', or left out: accelerate's environment chooses")
    """cpu, or by default what accelerate chooses."""
    cache_gigabytes: Annotated[float, SIZE] = _setting(8.0, SIZE)
    """Memory for latents and for captions; more latents than that are kept in a file, more captions are encoded at every step."""

    def __init__(self, **settings: Any):
        try:
            super().__init__(**settings)
        except ValidationError as e:
            raise _sentence(e) from None

    @model_validator(mode="before")
    @classmethod
    def _can_be_kept(cls, settings: Any) -> Any:
        for name, value in settings.items() if isinstance(settings, Mapping) else ():
            require_utf8(value, name)
        return settings

    @field_validator("model_options")
    @classmethod
    def _remember_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        redaction.remember(value)
        return value

    @field_validator("model", "data", "out", "clean", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("filter", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        if isinstance(value, bool) or value == "":
            raise ValueError("neither a threshold nor a file")
        try:
            return float(value) if isinstance(value, str | int) else str(value) if isinstance(value, Path) else value
        except (ValueError, OverflowError):
            return value

    @field_validator("canaries", mode="before")
    @classmethod
    def _levels(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [pair.partition(":") for pair in value.split(",")]
        return {int(copies): int(number) for copies, _, number in pairs}

    @field_validator("canaries")
    @classmethod
    def _counts(cls, value: dict[int, int]) -> dict[int, int]:
        return dict(sorted(value.items()))

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        asked = (self.canary_threshold, self.canaries_every, self.canary_screen)
        if not self.canaries and any(value is not None for value in asked):
            raise UsageError("there are no canaries to look at; plant some, for instance 0:20,1:20,16:20,64:20.")
        if self.clean is not None and not self.needs_clean:
            raise UsageError(
                f"clean pictures ({self.clean}) are for a filter 'auto' or for running scores; ask for one of them."
            )
        return self

    @property
    def learning_rate(self) -> float:
        """The one that holds."""
        return self.lr or (1e-5 if self.lora is None else 1e-4)

    @property
    def needs_clean(self) -> bool:
        """Whether magnitudes of clean pictures have to be taken before the first step."""
        return self.filter == "auto" or (self.running_scores is not None and not isinstance(self.filter, str))

    def identity(self) -> dict[str, Any]:
        """The settings that what is learned depends on, as plain values. A constant learning rate lets a training be prolonged.

        Secrets are none of them: a training goes on with another token or with none.
        """
        free = FREE | ({"steps"} if self.schedule == "constant" else set())
        known = {k: v for k, v in self.model_dump(mode="json").items() if k not in free}
        return known | {"model_options": redaction.without_secrets(known["model_options"])}


def _sentence(error: ValidationError) -> UsageError:
    """The first complaint as one sentence: which setting, which value, what is allowed."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "the configuration"
    if first["type"] == "extra_forbidden":
        return UnknownName("setting", name, TrainConfig.model_fields)
    if first["type"] == "missing":
        return UsageError(f"{name} is missing; a training needs model, data and out.")
    extra = TrainConfig.model_fields[name].json_schema_extra if name in TrainConfig.model_fields else None
    allowed = extra["allowed"] if isinstance(extra, dict) else "a text"
    return UsageError(f"{name.replace('_', '-')} is {shown(first['input'])}, and must be {allowed}.")
