"""Detect, decide and act inside the user's own pipeline, while it serves.

The score is the magnitude of Wen et al. 2024 at the first step, from the pair of predictions that classifier-free guidance makes
anyway: a generation that passes costs one transfer of a few numbers off the device, and comes out bit for bit as without the guard.
In a batch each row is judged alone, and rows that pass keep their bits whatever happens to others.

    guarded = mnemoscope.guard(pipe, "runs/ordinary", on_hit="mitigate")
    images = guarded("a prompt").images

A score above the threshold is evidence, not a verdict: at a calibrated rate, ordinary prompts exceed it too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..detect.calibrate import Calibration, setting_of
from ..detect.magnitude import magnitude, per_dimension
from ..errors import CannotAudit, MnemoscopeError, ModelFault, UnknownName, UsageError
from ..mitigate.base import CHANGES, Generation, Mitigation, build, key_of, require
from ..mitigate.pipeline import Guided
from ..models.base import Condition, Target
from ..models.identity import plain
from ..models.sampling import same_where
from ..models.steer import Call, Order, frozen, steer, target_around
from ..records.files import open_to_append
from ..types import Latents, PerSample
from .drift import LEAST, Drift, Look
from .metrics import Metrics

__all__ = ["Decision", "Guard", "GuardError", "Refused", "guard"]

log = logging.getLogger(__name__)

POLICIES = ("observe", "mitigate", "refuse")
DONE = {"observe": "observed", "mitigate": "mitigated", "refuse": "refused"}
UNFINISHED = "unfinished"
"""What counters call rows that were not drawn to the end: given up, failed, or beside one that was refused."""
STRENGTH = ("passed", "observed", "mitigated", "failed-open", UNFINISHED, "refused")
"""Actions, the strongest last: it names a generation."""
PROMPT = "prompt"
"""The mitigation that optimizes the prompt's embedding."""
IN_PLACE = frozenset({"prompt", "embedding", "guidance"})
"""What a mitigation may change in a generation that has begun."""
CURE = "`mnemoscope calibrate MODEL --prompts ordinary.txt --seeds 1 --seed-mode per-prompt`"
"""A pipeline makes one generation from a noise of its own; so must the calibration."""


@dataclass(frozen=True)
class Decision:
    """What was decided on one row of a generation.

    Attributes:
        row: Its place in the batch.
        score: The magnitude at the first step; None where the guard failed before there was one.
        threshold: The guard's.
        p: Conformal p-value of the score; None: the threshold is a bare number.
        hit: Whether the score is above the threshold.
        action: ``passed``, ``observed``, ``mitigated``, ``refused`` or ``failed-open``.
        mitigation: Name of what was done to it, or None.
        seconds: What deciding took for the whole generation, mitigation and the wait for the device included.
        prompt: The text, if the guard was told to keep it.
    """

    row: int
    score: float | None
    threshold: float
    p: float | None
    hit: bool
    action: str
    mitigation: str | None = None
    seconds: float = 0.0
    prompt: str | None = None


class Refused(MnemoscopeError):
    """A generation was stopped at its first step, because the policy refuses at least one of its rows."""

    def __init__(self, decisions: Sequence[Decision]):
        self.decisions = list(decisions)
        rows = [str(d.row) for d in decisions if d.action == "refused"]
        whole = f" The whole batch of {len(decisions)} was stopped, for a pipeline cannot return part of it; leave these rows out."
        super().__init__(
            f"refused: row{'s' if len(rows) > 1 else ''} {', '.join(rows)} scored above the threshold {decisions[0].threshold:.4g}."
            + (whole if len(decisions) > 1 else "")
        )


class GuardError(MnemoscopeError):
    """The guard could not do its work, and it was told to fail closed; the cause is attached."""


Policy = str | Callable[[Decision], str]


@runtime_checkable
class Stream(Protocol):
    """Somewhere text can be written."""

    def write(self, text: str, /) -> object:
        """Take a line."""
        ...


def guard(
    pipe: Any,
    thresholds: float | int | Calibration | str | Path,
    *,
    on_hit: Policy = "observe",
    mitigation: str | Mapping[str, Any] | Mitigation = "prompt",
    on_error: str = "open",
    log: Stream | Callable[[str], object] | str | Path | None = None,
    log_prompts: bool = False,
    metrics: Metrics | None = None,
    name: str = "",
    accept: bool = False,
    drift: Drift | bool = True,
) -> Guard:
    """Put a guard on a diffusers pipeline; it acts where it is called instead of the pipeline, or inside its ``with``.

    Args:
        pipe: The pipeline. It is not changed: attached or not, outside a guarded call it is as it was.
        thresholds: A number; a :class:`~mnemoscope.Calibration`; or the path of a ``thresholds.json`` or of its run folder. A
            calibration must fit the pipeline: weights, adapters, precision, size, first time of the schedule, one seed of each
            prompt's own.
        on_hit: What becomes of rows above the threshold. ``observe``: counted only. ``mitigate``: prepared anew by the mitigation,
            from the same noise, while the pipeline runs on. ``refuse``: the generation ends with :class:`Refused`. Or a callable,
            given the :class:`Decision` and answering with one of these words.
        mitigation: Name, ``{"name": …, "options": {…}}``, or an object. ``prompt`` without options stops at the median of the calibration's
            scores, or at half of a bare threshold.
        on_error: ``open``: where the guard itself fails the generation passes, counted; ``closed``: it ends with
            :class:`GuardError`.
        log: Gets one JSON line per decision: a writable text stream, a callable, or the path of a file that lines are added to.
        log_prompts: Keep prompts in decisions and log lines; without it their text goes nowhere.
        metrics: Shared with other guards; default: its own.
        name: What metrics and log call this guard.
        accept: Use a calibration that does not fit; :attr:`Guard.accepted` and each log line say in what.
        drift: Compares passed scores with the calibration's; True: with the defaults of :class:`~mnemoscope.serve.drift.Drift`.

    Raises:
        UsageError: an argument makes no sense, the log cannot be written, or the calibration does not fit this pipeline.
        CannotAudit: this pipeline cannot be guarded, or not in this way.
    """
    return Guard(
        pipe, thresholds, on_hit=on_hit, mitigation=mitigation, on_error=on_error, log=log, log_prompts=log_prompts,
        metrics=metrics, name=name, accept=accept, drift=drift,
    )  # fmt: skip


class Guard:
    """See :func:`guard`. One guard may serve several threads; each thread needs a pipeline of its own, as diffusers asks.

    Attributes:
        metrics: What it counts.
        accepted: In what the calibration does not fit, where that was accepted.
        drift: What watches passed scores, or None.
    """

    def __init__(
        self,
        pipe: Any,
        thresholds: float | int | Calibration | str | Path,
        *,
        on_hit: Policy = "observe",
        mitigation: str | Mapping[str, Any] | Mitigation = "prompt",
        on_error: str = "open",
        log: Stream | Callable[[str], object] | str | Path | None = None,
        log_prompts: bool = False,
        metrics: Metrics | None = None,
        name: str = "",
        accept: bool = False,
        drift: Drift | bool = True,
    ):
        if on_error not in ("open", "closed"):
            raise UnknownName("way to fail", on_error, ("open", "closed"))
        if not callable(on_hit) and on_hit not in POLICIES:
            raise UnknownName("policy", on_hit, POLICIES)
        self.pipe, self.on_hit, self.closed, self.name = pipe, on_hit, on_error == "closed", name
        self.target = target_around(pipe)
        if not self.target.has_text:
            raise CannotAudit(f"{self.target.name} takes no text, so no prompt can be judged.")
        self.fit = _Fit.of(pipe, thresholds, accept)
        self.mitigation = None
        if callable(on_hit) or on_hit == "mitigate":
            self.mitigation = _in_place(self._aimed(mitigation), pipe)
        self.metrics = Metrics() if metrics is None else metrics
        self.metrics.attached(name, self.threshold)
        self.drift = self._watcher(drift)
        self._log, self._log_prompts = _file_at(log) if isinstance(log, (str, Path)) else log, log_prompts
        self._writing, self._local = threading.Lock(), threading.local()

    @property
    def threshold(self) -> float:
        """A score above it is a hit."""
        return self.fit.threshold

    @property
    def accepted(self) -> list[str]:
        """In what the calibration does not fit."""
        return self.fit.accepted

    @property
    def last(self) -> list[Decision]:
        """Decisions on the newest generation of this thread, one per row; empty before there is one."""
        return list(getattr(self._local, "last", []))

    def _aimed(self, mitigation: str | Mapping[str, Any] | Mitigation) -> str | Mapping[str, Any] | Mitigation:
        """The optimization of the prompt, unless it is told where to stop: at the median of ordinary scores, and where they are not known
        at half the threshold. Published targets are of Stable Diffusion 1 and mean nothing for another model."""
        if mitigation != PROMPT and mitigation != {"name": PROMPT}:
            return mitigation
        calibration = self.fit.calibration
        aim = 0.5 * self.threshold if calibration is None else median(calibration.record.scores)
        at = float(per_dimension(torch.tensor(aim, dtype=torch.float64), self.target.latent_shape))
        return {"name": PROMPT, "options": {"target": at} if at > 0 else {}}

    def _watcher(self, drift: Drift | bool) -> Drift | None:
        calibration = self.fit.calibration
        if isinstance(drift, Drift):
            return drift
        if not drift or calibration is None or len(calibration.record.scores) < 2 * LEAST:
            return None
        return Drift(calibration)

    # Attaching

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline under guard.

        Raises:
            Refused: the policy refuses a row.
            GuardError: the guard failed, and fails closed.
        """
        with self:
            seat: _Seat = self._local.seat
            before = seat.judged
            try:
                result = self.pipe(*args, **kwargs)
            except BaseException:
                seat.is_broken = True
                raise
            if seat.judged == before:
                seat.fail(
                    CannotAudit(f"no denoising step of {type(self.pipe).__name__} was seen; it cannot be guarded.")
                )
            return result

    def __enter__(self) -> Guard:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:
            self._refresh()
            seat, stack = _Seat(self), ExitStack()
            stack.enter_context(steer(self.pipe, seat))
            self._local.seat, self._local.stack = seat, stack
        self._local.depth = depth + 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._local.depth -= 1
        if self._local.depth == 0:
            self._local.seat.count()
            self._local.stack.close()
            del self._local.seat, self._local.stack

    def _refresh(self) -> None:
        """The target on what the pipeline is made of now."""
        if _plain(self.pipe.unet) is not self.target.unet or self.fit.scheduler is not self.pipe.scheduler:
            self.target, self.fit.scheduler = target_around(self.pipe), self.pipe.scheduler

    # What a seat reports

    def decide(self, decisions: list[Decision], times: Sequence[float]) -> None:
        """Log and remember the decisions on a generation."""
        self._local.last = decisions
        self._write(decisions, times)
        if self.drift is not None:
            with self._reporting():
                for look in self.drift.add([d.score for d in decisions if d.score is not None and not d.hit]):
                    self._looked(look)

    def count(self, decisions: Sequence[Decision], drawn: bool) -> None:
        """Count a generation, when it has ended, by what became of its rows."""
        rows = Counter(d.action if drawn or d.action == "refused" else UNFINISHED for d in decisions)
        action = max(rows, key=STRENGTH.index)
        scores = [d.score for d in decisions if d.score is not None]
        self.metrics.decided(self.name, action, rows, scores, self.threshold, decisions[0].seconds)

    def amend(self, decisions: list[Decision], times: Sequence[float]) -> None:
        """Decisions that could not be carried through: remembered and logged."""
        self._local.last = decisions
        self._write(decisions, times, amended=True)

    def failed(self, error: Exception) -> None:
        """Count a failure of the guard.

        Raises:
            GuardError: it fails closed.
        """
        self.metrics.failed(self.name, type(error).__name__)
        how = "closed" if self.closed else "open"
        # Without the message of a library's error: it may quote the prompt.
        why = str(error) if isinstance(error, MnemoscopeError) else type(error).__name__
        log.warning("guard %s failed %s: %s", self.name or self.target.name, how, why)
        if self.closed:
            raise GuardError(f"the guard failed, and it fails closed: {error}") from error

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """What was decided is carried out even where it cannot be reported, unless the guard fails closed."""
        try:
            yield
        except Exception as error:
            self.failed(error)

    def _looked(self, look: Look) -> None:
        self.metrics.drifted(self.name, look.p, look.alarm)
        if look.alarm:
            log.warning("guard %s: drift, %s", self.name or self.target.name, look.words)

    def _write(self, decisions: Sequence[Decision], times: Sequence[float], **more: Any) -> None:
        if self._log is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        lines = []
        for d in decisions:
            facts: dict[str, Any] = {
                "time": now,
                "name": self.name,
                **vars(d),
                "t": times[0] if times else None,
                **more,
            }
            if d.prompt is None:
                del facts["prompt"]
            if self.accepted:
                facts["accepted"] = self.accepted
            lines.append(json.dumps(facts, allow_nan=False) + "\n")
        write: Callable[[str], object] = self._log if callable(self._log) else self._log.write
        with self._reporting(), self._writing:
            for line in lines:
                write(line)
            getattr(self._log, "flush", lambda: None)()

    def text_of(self, order: Order | None, row: int) -> str | None:
        """The prompt of a row, if it may be kept."""
        return order.prompts[row] if self._log_prompts and order is not None and order.prompts is not None else None


def _file_at(path: str | Path) -> Callable[[str], object]:
    """What adds lines to a file. It is opened for each, so that it may be moved away meanwhile.

    Raises:
        UsageError: it cannot be written.
    """

    def add(line: str) -> None:
        with open_to_append(path) as file:
            file.write(line)

    try:
        add("")
    except OSError as e:
        raise UsageError(
            f"the log {path} cannot be written ({e.strerror or e}); name a file in a folder that exists."
        ) from None
    return add


def _in_place(mitigation: str | Mapping[str, Any] | Mitigation, pipe: Any) -> Mitigation:
    """The mitigation, if a generation that has begun can still be given it."""
    if isinstance(mitigation, str):
        mitigation = build(mitigation)
    elif isinstance(mitigation, Mapping):
        mitigation = build(str(mitigation.get("name", "")), mitigation.get("options"))
    if late := sorted(mitigation.changes - IN_PLACE):
        what = CHANGES.get(late[0], late[0])
        raise CannotAudit(
            f"{mitigation.name} changes {what}, which a running pipeline cannot be given any more; guard with a mitigation that changes "
            f"{CHANGES['embedding']} or {CHANGES['guidance']} (prompt, delayed-guidance), or sample with mnemoscope.mitigate."
        )
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        raise CannotAudit(
            f"{type(pipe).__name__} starts from a picture instead of noise, on which mitigations are not made; use on_hit='observe' "
            f"or 'refuse'."
        )
    return mitigation


@dataclass
class _Fit:
    """The threshold, and what a generation must be like for it to mean something."""

    threshold: float
    calibration: Calibration | None
    accepted: list[str]
    scheduler: Any
    t: float | None = None
    """Time of the first step under the calibration; None: anything goes."""
    size: tuple[int, ...] = ()
    level: tuple[float, ...] = ()
    """α and σ there."""
    unet: Any = None
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, pipe: Any, thresholds: float | int | Calibration | str | Path, accept: bool) -> _Fit:
        if isinstance(thresholds, str | Path):
            thresholds = Calibration.load(thresholds)
        if not isinstance(thresholds, Calibration):
            if isinstance(thresholds, bool) or not math.isfinite(thresholds):
                raise UsageError(
                    f"threshold {thresholds!r} is no finite number; give one, or the file of a calibration."
                )
            return cls(float(thresholds), None, [], pipe.scheduler)
        found, target = _compared(pipe, thresholds, accept)
        if accept:
            return cls(thresholds.threshold, thresholds, found, pipe.scheduler)
        t = float(target.schedule(thresholds.record.setting["steps"]).timesteps[0])
        return cls(
            thresholds.threshold, thresholds, [], pipe.scheduler, t, target.latent_shape, _level(target, t), _plain(pipe.unet),
            _adapters(pipe),
        )  # fmt: skip

    def require(self, pipe: Any, target: Target, call: Call, t: float) -> None:
        """Refuse to judge a generation that differs from those of the calibration."""
        if self.t is None:
            return
        scale = (getattr(pipe, "cross_attention_kwargs", None) or {}).get("scale", 1)
        unlike = (
            f"it starts at t = {t:g}, the calibration at {self.t:g}" if t != self.t
            else f"its latents are {tuple(call.x.shape[1:])}, the calibration's {self.size}" if tuple(call.x.shape[1:]) != self.size
            else "it skips layers of the text encoder (clip_skip)" if getattr(pipe, "clip_skip", None) is not None
            else f"it scales its LoRAs by {scale:g} (cross_attention_kwargs)" if scale != 1 and self.adapters
            else "another denoiser is in the pipeline than when the guard was made" if _plain(pipe.unet) is not self.unet
            else "other LoRAs are loaded than when the guard was made" if _adapters(pipe) != self.adapters
            else f"its noise schedule has α, σ = {_level(target, t)}, the calibration's {self.level}" if _level(target, t) != self.level
            else None
        )  # fmt: skip
        if unlike:
            raise CannotAudit(
                f"this generation is not of the kind that was calibrated: {unlike}; run it as it was, recalibrate with {CURE} and "
                f"its own --steps, or pass accept=True."
            )


def _compared(pipe: Any, calibration: Calibration, accept: bool) -> tuple[list[str], Any]:
    """In what a calibration does not fit a pipeline, and a target like the one that was calibrated."""
    was, where = calibration.record.setting, getattr(calibration, "name", "the calibration")
    weights = [p for m in pipe.components.values() if isinstance(m, nn.Module) for p in m.parameters()]
    if any(p.is_meta for p in weights):
        if accept:
            return ["weights: not compared, they are offloaded"], None
        raise UsageError(
            f"the weights are offloaded one by one and cannot be compared with {where}; make the guard before "
            f"enable_sequential_cpu_offload(), or pass accept=True."
        )
    if not ({"target", "steps", "guidance", "window", "seeds"} <= was.keys() and isinstance(was["target"], dict)):
        raise UsageError(f"{where} does not say what its scores depend on; make one with {CURE}.")
    size = was["target"].get("resolution")
    options = {"resolution": size if isinstance(size, int) else tuple(size)} if size else {}
    target = target_around(pipe, sampler="ddim", **options)
    # The scale of guidance and the length of the schedule move a first step through its time alone, which each generation shows.
    now = setting_of(
        plain(target.identity()), guidance=was["guidance"], steps=was["steps"], window=(0, 1), seeds=1, seed_mode="per-prompt"
    )  # fmt: skip
    found = calibration.check(now, detector="magnitude", accept=True)
    if found and not accept:
        raise UsageError(
            f"{where} does not fit this pipeline, which makes one generation from a noise of its own ({'; '.join(found)}); make one with "
            f"{CURE}, or pass accept=True to use it all the same."
        )
    return found, target


def _level(target: Target, t: float) -> tuple[float, ...]:
    time = torch.tensor(int(t) if t == int(t) else t)
    return tuple(round(float(v), 6) for v in target.alpha_sigma(time))


def _plain(unet: Any) -> Any:
    """The denoiser without the wrapper of torch.compile."""
    return getattr(unet, "_orig_mod", unet)


def _adapters(pipe: Any) -> tuple[str, ...]:
    """Names of the LoRAs that are loaded."""
    modules = (getattr(pipe, "unet", None), getattr(pipe, "text_encoder", None))
    return tuple(sorted(name for m in modules for name in getattr(m, "peft_config", None) or ()))


class _Seat:
    """The driver of one thread's guarded pipeline."""

    def __init__(self, guard: Guard):
        self.guard, self.judged = guard, 0
        self._forget()

    def _forget(self) -> None:
        self.order: Order | None = None
        self.empty: Tensor | None = None
        self.decisions: list[Decision] = []
        self.times: list[float] = []
        self.over = self.settled = False
        self.is_broken = False
        self.calls_left = 0
        self.rows: Tensor | None = None
        self.embedded: Tensor | None = None
        self.guided: Guided | None = None

    # Driver

    def begin(self, order: Order) -> None:
        """A generation begins, and the one before has ended."""
        self.count()
        self._forget()
        self.order = order
        with self._safely():
            if any(order.negative) and order.guided:
                self.empty = order.empty()

    def tokens(self, call: Call) -> Tensor | None:
        """The embeddings of mitigated rows."""
        self.calls_left = len(call.times) - 1
        if self.over:
            return None
        with self._safely():
            if call.index == 0:
                _require_pair(call, self.guard.pipe)
            elif self.embedded is not None:
                return _with_rows(call.prompt, self.rows, self.embedded)
        return None

    def outputs(self, call: Call, uncond: Latents, cond: Latents) -> Latents | None:
        """Judges at the first step; guides mitigated rows."""
        if self.over:
            return None
        with self._safely():
            return self._judge(call, uncond, cond) if call.index == 0 else self._guide(call, uncond, cond)
        return None

    def count(self) -> None:
        """The generation has ended: count it, if it was decided on."""
        if self.settled:
            self.guard.count(self.decisions, drawn=self.calls_left == 0 and not self.is_broken)
            self.settled = False

    # The decision

    def _judge(self, call: Call, uncond: Latents, cond: Latents) -> Latents | None:
        began, guard, n = time.perf_counter(), self.guard, call.order.rows
        null, tokens = self._null(call, uncond)
        score = self._score(call, cond, null, tokens)
        # The only transfer of a generation that passes.
        numbers = torch.cat([score, call.times.to(score)]).tolist()
        scores, self.times = numbers[:n], numbers[n:]
        for row, value in enumerate(scores):
            if not math.isfinite(value):
                raise ModelFault(
                    f"row {row} predicted NaN or infinity at the first step; load the model in float32 or bfloat16."
                )
        guard.fit.require(guard.pipe, guard.target, call, self.times[0])
        self.decisions = self._decisions(scores)
        words = {d.row: self._word(d) for d in self.decisions if d.hit}
        if "refuse" in words.values():
            # Of a batch that is stopped, nothing is mitigated.
            self._settle({row: "refused" if word == "refuse" else "observed" for row, word in words.items()}, began)
            raise Refused(self.decisions)
        actions, other = {row: DONE[word] for row, word in words.items()}, None
        if chosen := [row for row, word in words.items() if word == "mitigate"]:
            try:
                other = self._mitigate(call, uncond, cond, null, tokens, chosen)
            except Exception as error:
                self._settle(actions | dict.fromkeys(chosen, "failed-open"), began)
                self.fail(error)
                return None
        self._settle(actions, began)
        return other

    def _null(self, call: Call, uncond: Latents) -> tuple[Latents, Tensor]:
        """What the empty prompt predicts for each row, and its embedding; rows with a negative prompt cost a forward each."""
        assert call.null is not None
        if self.empty is None:
            return uncond, call.null
        rows = torch.tensor([i for i, other in enumerate(call.order.negative) if other], device=call.x.device)
        empty = self.empty.to(call.null).expand(len(rows), -1, -1)
        if empty.shape[1:] != call.null.shape[1:]:
            raise CannotAudit(
                f"the prompts' embeddings have {call.null.shape[1]} tokens and the empty prompt's {empty.shape[1]}, so the score with a "
                f"negative prompt would compare two kinds of embedding; leave the negative prompt out."
            )
        return _with_rows(uncond, rows, call.predict(call.x[rows], empty)), _with_rows(call.null, rows, empty)

    def _score(self, call: Call, cond: Latents, null: Latents, tokens: Tensor) -> PerSample:
        same = (tokens == call.prompt).flatten(1).all(1)
        to_space, t = self.guard.target.to_space, call.t
        return magnitude(to_space(same_where(same, null, cond), call.x, t), to_space(null, call.x, t))

    def _decisions(self, scores: Sequence[float]) -> list[Decision]:
        guard, calibration = self.guard, self.guard.fit.calibration
        p = [None] * len(scores) if calibration is None else calibration.p_values(list(scores)).tolist()
        return [
            Decision(
                row, score, guard.threshold, p[row], score > guard.threshold, "passed", prompt=guard.text_of(self.order, row)
            )
            for row, score in enumerate(scores)
        ]  # fmt: skip

    def _word(self, decision: Decision) -> str:
        on_hit = self.guard.on_hit
        word = on_hit(replace(decision, action="observed")) if callable(on_hit) else on_hit
        if word not in POLICIES:
            raise UnknownName("policy", str(word), POLICIES)
        return word

    def _settle(self, actions: Mapping[int, str], began: float | None = None) -> None:
        """The decisions as they came out, logged."""
        seconds, used = 0.0 if began is None else time.perf_counter() - began, self.guard.mitigation
        self.decisions = [
            replace(
                d, action=(action := actions.get(d.row, d.action)), seconds=seconds,
                mitigation=used.name if used is not None and action == "mitigated" else None,
            )
            for d in self.decisions
        ]  # fmt: skip
        self.judged, self.settled = self.judged + 1, True
        self.guard.decide(self.decisions, self.times)

    # Mitigation

    def _mitigate(
        self, call: Call, uncond: Latents, cond: Latents, null: Latents, tokens: Tensor, chosen: Sequence[int]
    ) -> Latents:
        """The predictions with the mitigated rows' first ones made anew; later calls are set up."""
        guard, mitigation = self.guard, self.guard.mitigation
        assert mitigation is not None
        target, pipe = guard.target, guard.pipe
        if target.device.type == "meta":
            raise CannotAudit(
                "the weights are offloaded one by one, and a mitigation runs the denoiser by itself; use enable_model_cpu_offload(), or "
                "on_hit='observe' or 'refuse'."
            )
        steps = int(getattr(pipe.scheduler, "num_inference_steps", None) or len(self.times))
        plan = target.schedule(steps)
        t = plan.timesteps[0]
        # Predictions of the pipeline are those of the target where both start alike.
        alike = float(t) == self.times[0] and not getattr(pipe, "cross_attention_kwargs", None)
        rows = torch.tensor(list(chosen), device=call.x.device)
        freeze = frozen(target.unet) if "grad" in mitigation.needs else nullcontext()
        # Out of inference mode, for whose tensors no gradient can be had; gradients stay with those who ask for them.
        with torch.inference_mode(False), torch.no_grad(), freeze:
            x = call.x[rows].clone()
            noise = x / plan.scale(plan.start(torch.ones(1, 1, 1, 1)), t).to(x.device)
            texts = None if call.order.prompts is None else tuple(call.order.prompts[i] for i in chosen)
            before = Generation(
                noise, Condition(call.prompt[rows].clone()), Condition(tokens[rows[:1]].clone()), texts, _keys(noise, texts),
                steps, call.guidance, null[rows].clone() if alike else None, cond[rows].clone() if alike else None,
            )  # fmt: skip
            require(mitigation, before)
            after = mitigation.prepare(target, before)
            self._take(before, after, call, rows)
            first = after.first_cond if alike else None
            if first is None:
                first = call.predict(x, after.cond.tokens.to(call.prompt.dtype))
        cond = _with_rows(cond, rows, first)
        guided = self._guide(call, uncond, cond)
        return cond if guided is None else guided

    def _take(self, before: Generation, after: Generation, call: Call, rows: Tensor) -> None:
        """Set up what later calls exchange."""
        name = self.guard.mitigation.name if self.guard.mitigation else ""
        if after.noise is not before.noise or after.cond.extra:
            raise CannotAudit(
                f"{name} changed more than embeddings and guidance, which a running pipeline cannot follow."
            )
        if after.cond.tokens.shape != before.cond.tokens.shape:
            raise CannotAudit(
                f"{name} makes embeddings of {after.cond.tokens.shape[1]} tokens, and this pipeline runs on "
                f"{before.cond.tokens.shape[1]}; give it the prompt as text."
            )
        if after.guidance != call.guidance and float(getattr(self.guard.pipe, "guidance_rescale", 0.0)):
            raise CannotAudit(f"{name} changes the guidance scale, which guidance_rescale would undo; set that to 0.")
        self.rows = rows
        wanted = after.guidance
        self.guided = None if wanted is None or wanted == call.guidance else Guided(self.guard.target, wanted)
        self.embedded = None if after.cond is before.cond else after.cond.tokens

    def _guide(self, call: Call, uncond: Latents, cond: Latents) -> Latents | None:
        """Mitigated rows' predictions, moved so that the pipeline arrives at the rule's guidance; None: there is no rule."""
        if self.guided is None or self.rows is None:
            return None
        rows = self.rows
        moved = self.guided(call.x[rows], call.t, self.times[call.index], call.guidance, uncond[rows], cond[rows])
        return _with_rows(cond, rows, moved)

    # Failure

    def fail(self, error: Exception) -> None:
        """The guard failed: the rest of the generation passes unguarded, counted, or it ends here.

        Raises:
            GuardError: the guard fails closed.
        """
        self.over = True
        self.guard.failed(error)
        if not self.settled:
            rows = range(1 if self.order is None else self.order.rows)
            unknown = [Decision(row, None, self.guard.threshold, None, False, "passed") for row in rows]
            self.decisions = self.decisions or unknown
            self._settle({d.row: "failed-open" for d in self.decisions if d.hit or d.score is None})
        elif any(d.action == "mitigated" for d in self.decisions):
            self.decisions = [
                replace(d, action="failed-open") if d.action == "mitigated" else d for d in self.decisions
            ]
            self.guard.amend(self.decisions, self.times)

    def _safely(self) -> _Safely:
        return _Safely(self)


class _Safely:
    """What goes wrong inside is the guard's failure, never the pipeline's; a refusal is none."""

    def __init__(self, seat: _Seat):
        self.seat = seat

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, Refused | GuardError):
            return False
        self.seat.fail(error)
        return True


def _require_pair(call: Call, pipe: Any) -> None:
    if call.null is None:
        raise CannotAudit(
            f"{type(pipe).__name__} runs without classifier-free guidance, so there is no prediction without the prompt to compare with; "
            f"set guidance_scale above 1, for instance 7.5."
        )
    if call.others:
        raise CannotAudit(
            f"the denoiser is given {', '.join(call.others)} beside the prompt, which moves the score by itself; only the prompt alone "
            f"can be judged."
        )


def _with_rows(whole: Tensor, rows: Tensor | None, part: Tensor) -> Tensor:
    """``whole`` with some rows exchanged; the others keep their bits."""
    assert rows is not None
    changed = whole.clone()
    changed[rows] = part.to(whole)
    return changed


def _keys(noise: Tensor, prompts: Sequence[str] | None) -> tuple[int, ...]:
    """From noise and prompt: the same generation gets the same random draws."""
    rows = noise.float().cpu().numpy()
    seeds = [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big") >> 1 for row in rows]
    return tuple(key_of(prompts[i] if prompts else "", seed) for i, seed in enumerate(seeds))
