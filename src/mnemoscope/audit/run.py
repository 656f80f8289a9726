"""The loop over samples: what is asked, minus what is known, batch by batch into the run folder.

The same command continues a run that was stopped, at whatever instant. A prompt that fails becomes a row and the others go on.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import redaction
from ..bounds import LONGEST, RATE, within
from ..detect.base import AnyDetector
from ..detect.calibrate import Calibration, read_log
from ..detect.magnitude import Magnitude
from ..errors import RunError, UsageError
from ..models.base import Target
from ..records.schema import Row
from ..records.store import MEASURES, Run, Writer, write_whole
from ..records.table import prompt_scores
from ..stats import require_enough
from .batch import Examiner, Reference, Sample, batch_size
from .comparisons import measure
from .config import AuditConfig
from .generations import compare_generations
from .measures import Measured
from .plan import measure_speed as measure_speed
from .plan import plan as plan
from .request import Request, calibration_setting, now
from .request import load as load
from .stored import Job, in_words

__all__ = ["Progress", "audit", "calibrate", "calibrate_on_log", "load", "measure_speed", "plan"]

log = logging.getLogger(__name__)

SAVE_EVERY = 10.0
"""Seconds between updates of the manifest while a run goes on, so that a kill loses little of its counts."""


@dataclass(frozen=True)
class Progress:
    """How far an audit is; handed to ``progress`` after every batch.

    Attributes:
        done: Samples of this process that have a row, with those of earlier sessions.
        asked: Samples that are this process' to do.
        errors: Samples that failed in this session.
        hits: Prompts of this session with a copy found or, once all their seeds are in, a score above the threshold.
        seconds: Time of this session.
        eta: Seconds that remain, at the speed so far.
        note: What just happened and is worth a line, for instance that memory ran out.
    """

    done: int
    asked: int
    errors: int
    hits: int
    seconds: float
    eta: float
    note: str | None = None


def audit(
    config: AuditConfig,
    *,
    target: Target | None = None,
    detectors: Sequence[AnyDetector] | None = None,
    reference: Reference | None = None,
    progress: Callable[[Progress], None] | None = None,
    kind: Literal["audit", "check", "demo", "calibrate"] = "audit",
    command: str = "",
) -> Run:
    """Score every prompt with every seed, and leave a run folder.

    P prompts with n seeds over K steps cost P·n·(2K − 1) + n denoiser forwards: all prompts start from the same n noises and
    share the null prediction on them. Detection at the first step costs P·n + n. Pictures that are to be measured come last, into
    ``measures/`` of the run folder.

    Args:
        config: What is asked.
        target: The model, already loaded; default: the one that ``config.model`` names.
        detectors: Fresh detectors to use instead of ``config.detectors``.
        reference: Pictures in which the nearest to each generated one is looked up; needs ``config.images``.
        progress: Called after every batch.
        kind: What the manifest calls this run.
        command: The command line that repeats it.

    Returns:
        The run. Its status is ``done`` if every sample has a score, else ``incomplete``: samples failed, too many of them
        failed, or other shards are still to come. The same call continues it and tries failed samples again; rows that are
        there take over the ids, groups and labels that their prompts have now.

    Raises:
        UsageError: the request cannot be carried out as it stands; nothing has been computed.
        CannotAudit: this model cannot be audited in this way; nothing has been computed.
        RunError: the folder belongs to other settings, is in use or damaged, or its disk is full.
        KeyboardInterrupt: stopped by the user; its text says how much is saved.
    """
    request = Request.of(config, target, detectors, reference)
    pictures = None if kind == "calibrate" else Job.of(config, request.target)
    run = request.open(kind, command)
    run.amend({s.id: s.prompt.facts for s in request.samples})
    with Writer(run, request.shard) as writer:
        if request.calibration is not None:
            request.calibration.save(run.folder / "thresholds.json")
        else:  # of an earlier call that asked for it; its rows would be judged by what nobody asked for
            (run.folder / "thresholds.json").unlink(missing_ok=True)
        session = Session(request, writer, reference, progress)
        with _told(session):
            session.work()
    with _told(session):  # the rows are nobody's now, so that they can be amended
        compare_generations(run, request.detectors, (s.id for s in request.samples), request.target.device)
    session.close()
    if kind != "calibrate" and run.manifest.status == "done":
        _store_controls(run, bool(config.controls))
    if pictures is not None and run.manifest.status == "done":
        pictures.measure(run.folder / MEASURES, command=command, progress=_noted(progress))
    return run


def _noted(progress: Callable[[Progress], None] | None) -> Callable[[int, int, Measured], None]:
    """Tells of each picture that is measured in the way in which an audit tells of its batches."""
    began = time.perf_counter()

    def told(done: int, asked: int, m: Measured) -> None:
        if progress is not None:
            spent = time.perf_counter() - began
            progress(Progress(done, asked, 0, 0, spent, spent / done * (asked - done), in_words(m)))

    return told


@contextmanager
def _told(session: Session) -> Iterator[None]:
    """Whatever ends a session is written down in the run."""
    try:
        yield
    except KeyboardInterrupt:
        ok = session.close(interrupted=True)
        raise KeyboardInterrupt(
            f"stopped; {ok} of {len(session.request.samples)} samples are saved; the same command continues"
        ) from None
    except BaseException as error:
        session.notes.append(f"stopped by an error ({type(error).__name__}: {error})")
        with suppress(RunError):  # the disk may be full: the first sentence is the one to read
            session.close()
        raise


def _store_controls(run: Run, table: bool) -> None:
    """``controls.json``: what the wording of labeled prompts alone achieves, to stand beside every AUC, and what is left of it
    where the controls that were asked for hold."""
    found = measure(run, table=table)
    if found is None:  # of an earlier call that had labels
        (run.folder / "controls.json").unlink(missing_ok=True)
    else:
        write_whole(run.folder / "controls.json", found.to_json().encode())


@within(fpr=RATE, confidence=RATE)
def calibrate(
    config: AuditConfig,
    *,
    fpr: float = 0.01,
    confidence: float = 0.95,
    target: Target | None = None,
    detectors: Sequence[AnyDetector] | None = None,
    progress: Callable[[Progress], None] | None = None,
    command: str = "",
    unlabelled: bool = False,
) -> tuple[Run, dict[str, Calibration]]:
    """Audit ordinary prompts and turn their scores into thresholds.

    Args:
        config: An audit of ordinary prompts: of the kind that will be audited, and known not to be memorized.
        fpr: Stated false-positive rate of the threshold.
        confidence: Of the threshold's interval.
        target: As for :func:`audit`.
        detectors: As for :func:`audit`.
        progress: As for :func:`audit`.
        command: As for :func:`audit`.
        unlabelled: The prompts are a host's own traffic: the rate is a budget of alarms (:meth:`Calibration.of_traffic`).

    Returns:
        The run, and a calibration for each detector by the name of its score. The first is written to ``thresholds.json`` in the
        run folder, others to ``thresholds-<name>.json``.

    Raises:
        RunError: the run did not get a score for every sample, so nothing should be concluded from it.
        UsageError: too few prompts for the rate.
    """
    # Controls would add prompts that are no sample of ordinary ones.
    config = config.model_copy(update={"controls": [], "measure": None, "captions": None})
    request = Request.of(config, target, detectors)
    require_enough(len(request.prompts), fpr)  # prompts cost much, and thresholds of too few are none
    run = audit(
        config, target=request.target, detectors=detectors, progress=progress, kind="calibrate", command=command
    )
    if run.manifest.status != "done":
        raise RunError(
            f"{run.folder} is {run.manifest.status}, and a threshold needs every score; repeat the command to complete it."
        )
    found: dict[str, Calibration] = {}
    for name, detector in request.detectors.items():
        scores = [p.score for p in prompt_scores(run.rows(), name)]
        source = f"{len(scores)} prompts from {request.prompts.source}"
        setting = calibration_setting(config, request.target, detector)
        given: dict[str, Any] = {"detector": name, "confidence": confidence, "source": source}
        found[name] = (
            Calibration.of_traffic(scores, setting, budget=fpr, **given)
            if unlabelled
            else Calibration.fit(scores, setting, fpr=fpr, **given)
        )
        found[name].save(run.folder / ("thresholds.json" if len(found) == 1 else f"thresholds-{name}.json"))
    return run, found


@within(fpr=RATE, confidence=RATE)
def calibrate_on_log(
    config: AuditConfig, log: str | Path, *, fpr: float = 0.01, confidence: float = 0.95, target: Target | None = None
) -> tuple[Path, Calibration]:
    """Turn what a guard logged into a threshold at a budget of alarms; nothing is generated.

    Args:
        config: The model, the length of its schedule, and where to write; one seed of each generation's own is what a guard scores.
        log: JSON lines of one guard of this model.
        fpr: Share of the traffic above the threshold, at most.
        confidence: Of the threshold's interval.
        target: As for :func:`audit`.

    Returns:
        The file that was written, and the calibration.

    Raises:
        UsageError: the log is damaged, of several guards, or of other first steps; or it is too short for the rate.
    """
    found = read_log(log)
    require_enough(len(found.scores), fpr)
    config = config.model_copy(update={"seeds": 1, "seed_mode": "per-prompt"}).with_window(1)
    target = load(config) if target is None else target
    t = float(target.schedule(config.steps).timesteps[0])
    if len(found.names) > 1:
        raise UsageError(
            f"{log} was written by several guards ({_in_short(found.names)}); give one file for each model."
        )
    if other := sorted(found.times - {t}):
        raise UsageError(
            f"{log} holds generations that start at t = {other[0]:g}, and {config.steps} steps start at t = {t:g}; give their --steps."
        )
    folder = Path(config.out) if config.out else Path(log).with_suffix("")
    made = Calibration.of_traffic(
        found.scores, calibration_setting(config, target, Magnitude(1)), detector=Magnitude.name, budget=fpr, confidence=confidence,
        source=f"{len(found.scores)} generations in {Path(log).name}",
    )  # fmt: skip
    return made.save(folder / "thresholds.json"), made


def _in_short(names: set[str]) -> str:
    """Names as a sentence repeats them, however many and however long they are."""
    some = [name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in sorted(names)[:5]]
    return ", ".join(some) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Session:
    """One process working on one run."""

    def __init__(
        self,
        request: Request,
        writer: Writer,
        reference: Reference | None,
        progress: Callable[[Progress], None] | None,
    ):
        finished = writer.run.finished()
        self.request, self.writer, self.run, self.progress = request, writer, writer.run, progress
        self.todo = [s for s in request.share if s.id not in finished]
        self.size = batch_size(request.config, request.target)
        log.info(
            "%s: %d of %d samples to do, %d at a time", writer.run.folder, len(self.todo), len(request.share), self.size
        )
        self.notes = list(request.notes)
        self.began = time.perf_counter()
        self.errors = self.worked = 0
        self._hits: set[str] = set()
        self._scores: dict[str, list[float]] = {}
        self._note: str | None = None
        self._saved, self._counted = self.began, request.target.forwards
        self.examiner = Examiner(
            request.target,
            request.detectors,
            request.config,
            [s.prompt.text for s in self.todo],
            writer.save,
            reference,
        )

    def work(self) -> None:
        """Everything that is to do, until it is done or too much has failed."""
        budget = self.request.config.error_budget(len(self.request.samples))
        while self.worked < len(self.todo):
            rows = self.attempt(self.todo[self.worked : self.worked + self.size])
            self.writer.append(rows)
            self.worked += len(rows)
            self.count(rows)
            if self.errors > budget:
                self.notes.append(f"stopped after {self.errors} failed samples (max_errors allows {budget})")
                return

    def attempt(self, batch: Sequence[Sample]) -> list[Row]:
        """Rows of a batch. If it fails, each of its samples is tried alone, so that only those at fault fail."""
        try:
            return self.examiner.rows(batch)
        except RunError:
            raise
        except torch.OutOfMemoryError as e:
            error: Exception = e.with_traceback(None)  # its frames hold the tensors that did not fit
        except Exception as e:
            error = e
        if len(batch) == 1:
            where = "".join(traceback.format_exception(error))
            log.info("sample %s failed\n%s", batch[0].id, redaction.text(where))
            return [self.examiner.failed(batch[0], error)]
        if not isinstance(error, torch.OutOfMemoryError):
            return [row for sample in batch for row in self.attempt([sample])]
        self.halve(len(batch))
        rows: list[Row] = []
        while len(rows) < len(batch):  # a part may halve the size again
            rows += self.attempt(batch[len(rows) : len(rows) + self.size])
        return rows

    def halve(self, size: int) -> None:
        """Smaller batches from now on."""
        self.size = size // 2
        self._note = f"out of memory at batch {size}; continuing with {self.size}"
        self.notes.append(self._note)
        if self.request.target.device.type == "cuda":
            torch.cuda.empty_cache()

    def count(self, rows: Sequence[Row]) -> None:
        """Tell the caller, and now and then the manifest."""
        self.errors += sum(row.status == "error" for row in rows)
        for row in rows:
            self._judge(row)
        spent = time.perf_counter() - self.began
        if time.perf_counter() - self._saved > SAVE_EVERY:
            self.run.update(forwards=self._uncounted())
            self._saved = time.perf_counter()
        if self.progress is not None:
            left = len(self.todo) - self.worked
            asked = len(self.request.share)
            eta = spent / self.worked * left
            self.progress(Progress(asked - left, asked, self.errors, len(self._hits), spent, eta, self._note))
        self._note = None

    def close(self, *, interrupted: bool = False) -> int:
        """Write down how it went; returns the number of samples with a score, of all shards."""
        tally = self.run.tally()
        self.run.update(
            status="interrupted" if interrupted else "done" if tally.complete else "incomplete",
            ended=now(),
            forwards=self._uncounted(),
            machine=self.run.manifest.machine | {"batch_size": self.size},
            notes=[*self.notes, *tally.notes],
        )
        return tally.ok

    def _uncounted(self) -> int:
        """Forwards since the last time somebody asked."""
        before, self._counted = self._counted, self.request.target.forwards
        return self._counted - before

    def _judge(self, row: Row) -> None:
        if row.nearest is not None and row.nearest.copy_found:
            self._hits.add(row.prompt_id)
        calibration = self.request.calibration
        if calibration is None or row.status == "error":
            return
        score = row.scores.get(calibration.record.detector)
        if score is None:  # it comes when all seeds are there
            return
        scores = self._scores.setdefault(row.prompt_id, [])
        scores.append(score.value)
        if len(scores) == self.request.config.seeds:
            if calibration.above(sum(scores) / len(scores)):
                self._hits.add(row.prompt_id)
            del self._scores[row.prompt_id]
