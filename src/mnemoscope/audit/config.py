"""What an audit is asked to do: one frozen object that YAML, the command line and keyword arguments all fill.

Defaults are written here and nowhere else. The docstring under a setting is its help text everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import redaction
from ..bounds import COUNT, GUIDANCE, LEAST_SIMILARITY, SCALE, SEED, SEEDS, SIZE, STEPS, Bound, shown
from ..errors import UnknownName, UsageError
from ..parsing import LARGEST_YAML, ParseError, parse_yaml
from ..plugins import document_options, options_of
from ..records.documents import require_reachable
from ..records.places import read_named, require_place_for_folder, require_readable, require_utf8
from ..records.store import digest, short
from .prompts import Columns, Prompt, PromptSet, read_prompts

__all__ = ["AuditConfig", "Control", "DetectorSpec", "MeasureSpec", "PromptSource"]

Control: TypeAlias = Literal["case-fold", "title-case", "swap", "within-family", "matched"]
"""A control that an audit may be asked for."""


def _setting(default: Any, allowed: str | Bound, **limits: Any) -> Any:
    """A field with the words that say what it may be; a bound is also the annotation of its type."""
    words = allowed.words if isinstance(allowed, Bound) else allowed
    return Field(default, json_schema_extra={"allowed": words}, **limits)


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        populate_by_name=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class PromptSource(_Settings):
    """Where prompts come from: a file with its columns, or a list."""

    path: str | None = _setting(None, "the path of a prompt file")
    """A TXT, JSONL, JSON, CSV, TSV or Parquet file."""
    items: list[Any] | None = _setting(None, "a list of prompts")
    """The prompts themselves: texts, or mappings with the columns below."""
    column: str | None = _setting(None, "the name of a column")
    """Column of the prompt; by default ``prompt``, ``caption`` or ``text``."""
    id_column: str | None = _setting(None, "the name of a column")
    """Column of the prompt's id; by default ``id`` where there is one."""
    group_column: str | None = _setting(None, "the name of a column")
    """Column of the prompt's group; by default ``group`` where there is one."""
    label_column: str | None = _setting(None, "the name of a column")
    """Column of the known ground truth (true: memorized); by default ``label`` where it holds yes and no."""
    family_column: str | None = _setting(None, "the name of a column")
    """Column of the prompt's family (of one picture, brand or layout); by default ``family`` where there is one."""
    swap_column: str | None = _setting(None, "the name of a column")
    """Column of another caption of the prompt's picture, for the control ``swap``; by default ``swap`` where there is one."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return {"path": str(value)}
        if isinstance(value, PromptSet):
            return {"items": list(value.prompts)}
        return {"items": list(value)} if isinstance(value, (list, tuple)) else value

    def read(self, limit: int | None = None) -> PromptSet:
        """Read the prompts; see :func:`mnemoscope.audit.prompts.read_prompts`."""
        source: str | list[Any] | None = self.path if self.items is None else self.items
        if source is None or (self.path is not None and self.items is not None):
            raise UsageError("prompts needs either a path or a list of items; give one of them.")
        return read_prompts(
            source,
            Columns(
                self.column, self.id_column, self.group_column, self.label_column, self.family_column, self.swap_column
            ),
            limit=limit,
        )

    def stored(self) -> dict[str, Any]:
        """As plain values for the manifest: a list is too long to keep twice, so its length and hash stand for it."""
        plain = self.model_dump(exclude={"items"}, exclude_none=True)
        if self.items is not None:
            texts = [i.text if isinstance(i, Prompt) else i for i in self.items]
            plain |= {"items": len(texts), "sha256": digest([t if isinstance(t, str) else str(t) for t in texts])}
        return plain


class DetectorSpec(_Settings):
    """One detector: its name, its options, and the name under which its scores are stored."""

    name: str
    """An installed detector (``mnemoscope ls detectors``)."""
    options: dict[str, Any] = _setting({}, "a mapping of options")
    """Arguments of the detector; ``{name: magnitude, steps: 10}`` is short for ``options: {steps: 10}``."""
    alias: str | None = _setting(None, "a name", alias="as")
    """Name of the score in the rows; by default the detector's."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping):
            return value
        own = {k: v for k, v in value.items() if k in ("name", "options", "as", "alias")}
        options = own.get("options", {})
        loose = {k: v for k, v in value.items() if k not in own}
        return own | {"options": {**options, **loose}} if isinstance(options, Mapping) else own

    @property
    def label(self) -> str:
        """Name of the score in the rows."""
        return self.alias or self.name


class MeasureSpec(_Settings):
    """How pictures are measured: a preset of InvMM, what is changed in it, and when a draw is the picture."""

    name: str = _setting("improved", "improved or official")
    """The preset."""
    updates: Annotated[int | None, COUNT] = _setting(None, COUNT)
    """Budget of updates; by default the preset's."""
    steps: Annotated[int | None, STEPS] = _setting(None, STEPS)
    """Steps of the sampler in tests; by default the preset's."""
    scales: tuple[Annotated[float, SCALE], ...] | None = _setting(
        None, f"a list of guidance scales, each {SCALE.words}", min_length=1
    )
    """Guidance scales that are tried; by default the preset's."""
    descriptor: str = _setting("fingerprint", "an installed descriptor")
    """What says how similar two pictures are."""
    beta: Annotated[float | None, LEAST_SIMILARITY] = _setting(None, LEAST_SIMILARITY)
    """Similarity from which a draw is the picture; only the bundled model has a calibrated one, for the fingerprint."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class AuditConfig(_Settings):
    """An audit: which model, which prompts, which detectors, how many seeds.

    Raises:
        UnknownName: a setting that does not exist, with the nearest that does.
        UsageError: a value that is not allowed; the message names the setting, the value and what is allowed.
    """

    model: str | None = _setting(None, "a model id or a folder")
    """Hub id, local folder or single-file checkpoint of the model; not needed where a loaded target is handed in."""
    model_options: dict[str, Any] = _setting({}, "a mapping of options for loading the model")
    """Handed to the loader (revision, variant, a fine-tuned UNet, …)."""
    prompts: PromptSource | None = _setting(None, "a file, a list of prompts, or a mapping with a path and columns")
    """The prompts to audit; not needed for a model without text."""
    detectors: list[DetectorSpec] = _setting(
        [DetectorSpec(name="magnitude")], "a list of detector names, or mappings with a name"
    )
    """Detectors; all of them watch one and the same trajectory."""
    seeds: Annotated[int, SEEDS] = _setting(4, SEEDS)
    """Generations per prompt, with seeds 0 … n - 1; the first seeds of a larger audit are those of a smaller one."""
    base_seed: Annotated[int, SEED] = _setting(0, SEED)
    """Another base gives other starting noises."""
    seed_mode: Literal["shared", "per-prompt"] = _setting("shared", "'shared' or 'per-prompt'")
    """shared: all prompts start from one bank of noises, which halves the work of the first step; per-prompt: from their own."""
    guidance: Annotated[float | None, GUIDANCE] = _setting(None, GUIDANCE)
    """Classifier-free guidance scale; by default the model's own."""
    steps: Annotated[int, STEPS] = _setting(50, STEPS)
    """Length of the sampler's schedule (not how many of its steps are run: that is what the detectors need)."""
    controls: list[Control] = _setting([], f"a list of controls: {', '.join(get_args(Control))}")
    """What the score is tested against besides ordinary prompts, where labels are known: ``case-fold`` and ``title-case`` add
    the labeled prompts in other letters, ``swap`` adds another caption of each memorized picture; ``within-family`` and
    ``matched`` compare prompts that are there. Any of them brings the table of AUCs (docs/controls.md)."""
    batch_size: Annotated[Literal["auto"] | int, COUNT] = _setting("auto", f"'auto' or {COUNT.words}")
    """Samples per batch; auto starts high and halves when memory runs out."""
    images: bool = _setting(False, "true or false")
    """Run whole trajectories and keep the pictures."""
    reference: str | None = _setting(None, "the path of a reference set")
    """Reference pictures in which the nearest to each generated one is looked up; needs images."""
    measure: str | None = _setting(None, "the path of a picture or of a folder of pictures")
    """Pictures that are measured after the prompts, with the same model: how strongly is each stored (docs/measure.md)?"""
    captions: str | None = _setting(None, "the path of a JSONL file of image and caption")
    """Captions of the pictures that are measured, as JSONL of ``image`` and ``caption``; by default prompts are learned."""
    measure_preset: MeasureSpec = _setting(MeasureSpec(), "improved, official, or a mapping with a name")
    """How they are measured; ``{name: improved, updates: 500, beta: 0.85}`` changes what it names."""
    calibration: str | None = _setting(None, "the path of a thresholds.json, or of the run folder that holds it")
    """Scores of ordinary prompts of the same model, made by ``mnemoscope calibrate``: its run folder, or the file in it."""
    accept_threshold: bool = _setting(False, "true or false")
    """Use the calibration although it was made under another setting; the differences are noted in the run."""
    out: str | None = _setting(None, "the path of a folder")
    """The run folder; by default one under ``runs/`` named after the model and the settings."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = _setting(
        None, "'float64', 'float32', 'float16' or 'bfloat16'"
    )
    """Precision of the model; by default chosen by the device."""
    device: str | None = _setting(None, "a device such as cpu, cuda or cuda:1")
    """Where the model runs; by default a GPU if there is one."""
    max_errors: Annotated[int | float, SIZE] = _setting(20, "a count such as 20, or a share below 1 such as 0.05")
    """Stop as soon as more samples than this have failed."""
    limit: Annotated[int | None, COUNT] = _setting(None, COUNT)
    """Only the first so many prompts: for trying things out."""
    shard: str | None = _setting(None, "k/m with 0 ≤ k < m such as 0/4, or 'env'")
    """Do share k of m; env takes k and m from RANK and WORLD_SIZE, as launchers set them."""
    notes: list[str] = _setting([], "a list of sentences")
    """Anything a reader of the run should know."""

    def __init__(self, **settings: Any):
        try:
            super().__init__(**settings)
        except ValidationError as e:
            raise _sentence(e) from None

    @model_validator(mode="before")
    @classmethod
    def _can_be_kept(cls, settings: Any) -> Any:
        for name, value in settings.items() if isinstance(settings, Mapping) else ():
            if name != "prompts":  # whose texts are judged where they are read, each with its place
                require_utf8(value, name)
            elif isinstance(value, str | Path | Mapping):
                require_utf8(value.get("path") if isinstance(value, Mapping) else value, name)
        return settings

    @field_validator("model_options")
    @classmethod
    def _without_gaps(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not redaction.is_complete(value):
            raise UsageError(
                "model_options come from a record, which keeps no secret; give the value, or leave the option out."
            )
        redaction.remember(value)
        return value

    @field_validator("detectors", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Mapping)) else value

    @field_validator("controls", mode="before")
    @classmethod
    def _separate_names(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
            return value
        names = list(dict.fromkeys(name.strip() for part in given for name in part.split(",")))
        if unknown := [name for name in names if name not in get_args(Control)]:
            raise UnknownName("control", unknown[0], get_args(Control))
        return names

    @field_validator("max_errors")
    @classmethod
    def _count_or_share(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("neither a count nor a share")
        return value

    @field_validator("detectors")
    @classmethod
    def _names_differ(cls, value: list[DetectorSpec]) -> list[DetectorSpec]:
        names = [spec.label for spec in value]
        if repeated := [n for n in names if names.count(n) > 1]:
            raise UsageError(
                f"two detectors store their scores as {repeated[0]!r}; give one of them another name with `as`."
            )
        if not value:
            raise ValueError("empty")
        return value

    @classmethod
    def from_yaml(cls, path: str | Path, *, anywhere: bool = False, **overrides: Any) -> AuditConfig:
        """Read a YAML file; keyword arguments win over it, and None means not given.

        The file may be somebody else's. It chooses among what is installed and names no program, loads the model with none of the reader's
        secrets, and reads and writes files of its own folder and of the working directory only.

        Args:
            path: The file.
            anywhere: The file is the reader's own: it may name files anywhere, and any option of the loader.
            **overrides: Settings.

        Raises:
            UsageError: it cannot be read, or it names what a document must not choose; the message says how to choose it oneself.
        """
        try:
            content = parse_yaml(read_named(path, LARGEST_YAML)) or {}
        except OSError as e:
            raise UsageError(f"config file {path} cannot be read ({e.strerror or e}); name a YAML file.") from None
        except ParseError as e:
            raise UsageError(f"config file {path} cannot be read ({e}); correct it.") from None
        if not isinstance(content, dict):
            raise UsageError(
                f"config file {path} holds {type(content).__name__}; write settings as `name: value`, one per line."
            )
        if not anywhere:
            _require_harmless(Path(path), content, overrides)
        config = cls(**_merged(content, overrides))
        return config if overrides.get("detectors") is not None else config.with_document_detectors(path)

    def with_document_detectors(self, document: str | Path) -> AuditConfig:
        """The same, with detectors as a document may choose them: no programs, no files.

        Raises:
            UsageError: a detector, or an option of it, that a document must not choose.
        """
        try:
            detectors = [
                spec.model_copy(update={"options": document_options("detector", spec.name, spec.options)})
                if spec.options
                else spec
                for spec in self.detectors
            ]
        except UsageError as e:
            raise UsageError(f"{document}: {e}") from None
        return self.model_copy(update={"detectors": detectors})

    def require_places(self) -> None:
        """Refuse places that cannot be read or written to, before anything expensive is done.

        Raises:
            UsageError: naming the place, and what is wrong with it.
        """
        if self.prompts is not None and self.prompts.path is not None:
            require_readable(self.prompts.path, "file")
        if self.reference is not None:
            require_readable(self.reference, "folder")
        if self.captions is not None:
            require_readable(self.captions, "file")
        for place in (self.measure, self.calibration):
            if place is not None:
                require_readable(place)
        if self.out is not None:
            require_place_for_folder(self.out)

    def stored(self) -> dict[str, Any]:
        """The configuration as plain values without secrets, for the manifest."""
        plain = self.model_dump(mode="json", by_alias=True, exclude={"prompts"})
        return redaction.cleaned(plain | {"prompts": None if self.prompts is None else self.prompts.stored()})

    def with_window(self, steps: int) -> AuditConfig:
        """The same, with this many leading steps for every detector that has a window (takes ``steps``).

        Raises:
            UnknownName: a detector that is not installed.
            UsageError: none of the detectors has a window, or two would become one and the same.
        """
        steps = STEPS.judge("window", steps)
        changed: dict[str, DetectorSpec] = {}
        for spec in self.detectors:
            if "steps" in options_of("detector", spec.name):
                spec = spec.model_copy(update={"options": {**spec.options, "steps": steps}})
                twin = next((k for k, s in changed.items() if (s.name, s.options) == (spec.name, spec.options)), None)
                if twin is not None:
                    raise UsageError(
                        f"window {steps} would make the detectors {twin} and {spec.label} the same; set the steps of each in "
                        f"the config file, and leave --window out."
                    )
            changed[spec.label] = spec
        if not any("steps" in spec.options for spec in changed.values()):
            raise UsageError(f"window is {steps}, and {', '.join(changed)} has no window of steps; leave --window out.")
        return self.model_copy(update={"detectors": list(changed.values())})

    def error_budget(self, asked: int) -> int:
        """How many of ``asked`` samples may fail before the run stops."""
        return self.max_errors if isinstance(self.max_errors, int) else int(self.max_errors * asked)


DOCUMENT_PATHS = ("model", "reference", "measure", "captions", "calibration", "out")
"""Settings that are paths, or may be."""

LOADER_PATHS = ("lora", "unet", "config")
"""Options of the loader that are paths, or may be."""

LOADER_OPTIONS = ("guidance", "local_files_only", "resolution", "revision", "sampler", "variant", *LOADER_PATHS)
"""Options of the loader that a document may choose. The others hold secrets, or say what libraries write and where."""


def _require_harmless(path: Path, content: Mapping[Any, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse what a configuration of somebody else must not choose."""
    chosen = {key: value for key, value in content.items() if overrides.get(key) is None or key == "prompts"}
    for key in DOCUMENT_PATHS:
        _require_reachable(path, key, chosen.get(key))
    prompts = chosen.get("prompts")
    replaced = overrides.get("prompts")
    if not (isinstance(replaced, Mapping) and "path" in replaced) and not isinstance(replaced, (str, Path, list)):
        _require_reachable(path, "prompts", prompts.get("path") if isinstance(prompts, Mapping) else prompts)
    options = chosen.get("model_options")
    for key, value in options.items() if isinstance(options, Mapping) else ():
        if key not in LOADER_OPTIONS:
            raise UsageError(
                f"{path} chooses the loader's option {short(str(key))}, and a configuration file chooses only {', '.join(LOADER_OPTIONS)}; "
                f"give it yourself (--model-option {short(str(key))}=…), or vouch for the file with --trust-config (anywhere=True)."
            )
        for name in _names(value) if key in LOADER_PATHS else ():
            _require_reachable(path, f"model_options.{key}", name)


def _names(value: Any) -> list[Any]:
    """Paths of one file, of several, or of files with scales."""
    return list(value) if isinstance(value, (list, Mapping)) else [value]


def _require_reachable(path: Path, key: str, name: Any) -> None:
    if isinstance(name, str):
        require_reachable(
            path,
            key,
            name,
            "name it yourself on the command line, or vouch for the file with --trust-config (anywhere=True)",
        )


def _merged(content: dict[Any, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    given = {k: v for k, v in overrides.items() if v is not None}
    if isinstance(given.get("prompts"), Mapping) and content.get("prompts") is not None:
        stored = content["prompts"]
        stored = (
            {"path": stored} if isinstance(stored, str) else {"items": stored} if isinstance(stored, list) else stored
        )
        given["prompts"] = {**stored, **given["prompts"]}
    return {str(k): v for k, v in content.items()} | given


def _sentence(error: ValidationError) -> UsageError:
    """The first complaint as one sentence: which setting, which value, what is allowed."""
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if isinstance(part, str)]
    holder, field, key = _find(path)
    if first["type"] == "extra_forbidden":
        parents, name = key.split(".")[:-1], key.split(".")[-1]
        kind = f"setting of {parents[0]}" if parents else "setting"
        return UnknownName(kind, name, [f.alias or own for own, f in holder.model_fields.items()])
    if first["type"] == "missing":
        return UsageError(f"{key} is missing; write, for instance, `{key}: magnitude`.")
    extra = field.json_schema_extra if field is not None else None
    allowed = extra["allowed"] if isinstance(extra, dict) else "a text"
    return UsageError(f"{key} is {shown(first['input'])}, and must be {allowed}.")


PARTS: dict[str, type[_Settings]] = {"prompts": PromptSource, "detectors": DetectorSpec, "measure_preset": MeasureSpec}


def _find(path: list[str]) -> tuple[type[_Settings], Any, str]:
    """The model and the field a complaint is about, and the field's full name. What pydantic adds to a path is no field."""
    holder: type[_Settings] = AuditConfig
    field, key = None, []
    for part in path:
        known = {f.alias or name: f for name, f in holder.model_fields.items()} | holder.model_fields
        if part not in known:
            # An unknown key of this model, or pydantic's name for a branch of a union.
            if field is None or holder is not AuditConfig:
                key.append(part)
            break
        field = known[part]
        key.append(part)
        holder = PARTS.get(part, holder)
    return holder, field, ".".join(key)
