"""The steps of a training: forward, filter, backward, logs, looks and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import ModelFault
from ..mitigate.visits import WorstImage, write_worst
from ..records.store import OutFolder
from .card import write_captions, write_card
from .checkpoint import Checkpoints, StepLog, weights_explained
from .config import TrainConfig
from .draws import Draws, Visits
from .looks import VALIDATION, Canaries, validate
from .prepare import Prepared
from .state import State
from .trainee import Average

__all__ = ["Loop", "Progress", "Trained", "rate_at"]

WORST = 100
"""Images in ``worst.jsonl``."""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        done: Steps.
        asked: Steps in all.
        eta: Seconds that remain, at the speed so far.
        talk: Loss, and the share of samples that was kept.
        note: What just happened and is worth a line.
        unit: What is counted.
    """

    done: int
    asked: int
    eta: float | None
    talk: str
    note: str | None = None
    unit: str = "steps"


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        folder: Where everything is.
        result: The LoRA file or the pipeline folder.
        steps: How many were made.
        stopped: Whether copies of canaries ended it before its time.
        pictures: How many were trained on.
        left_out: How many could not be.
        loss: Mean over the last tenth of the steps.
        kept: Share of samples that were in the loss, over all steps.
        worst: Images with the highest running scores; empty: none were kept.
    """

    folder: Path
    result: Path
    steps: int
    stopped: bool
    pictures: int
    left_out: int
    loss: float
    kept: float
    worst: tuple[WorstImage, ...]


class Loop:
    """One training between its first and its last step.

    Args:
        prepared: What it works with.
        accelerator: Processes, devices, precision.
        progress: Called after every reading of losses.
    """

    def __init__(self, prepared: Prepared, accelerator: Accelerator, progress: Callable[[Progress], None]):
        self.p, self.accelerator, self.progress = prepared, accelerator, progress
        self.config, self.folder = prepared.config, prepared.folder
        config, trainee = self.config, prepared.trainee
        weights = trainee.weights()
        optimizer = torch.optim.AdamW(
            weights.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.unet, self.optimizer = accelerator.prepare(trainee.unet.train(), optimizer)
        scores = None if prepared.memory is None else prepared.memory.scores
        average = Average(weights, config.ema_decay) if config.ema else None
        self.state = State(trainee, weights, optimizer, average, scores, accelerator.scaler)
        self.draws = Draws(
            prepared.split.listing, trainee.target.latent_shape, horizon=trainee.scheduler.config["num_train_timesteps"],
            seed=config.seed, flip=config.flip, dropout=config.caption_dropout,
        )  # fmt: skip
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep)
        self.losses = StepLog(self.folder / "losses.jsonl")
        self.standing = OutFolder(self.folder)
        self.canaries = self._canaries()
        self.pending: list[Tensor] = []

    def run(self, command: str) -> Trained:
        """Train to the end, and write the result and its card."""
        step = self._resume()
        if self.config.tracker:
            plain = {k: v for k, v in self.p.settings.items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers("mnemoscope", plain)
        began, first = time.perf_counter(), step
        while step < self.config.steps and not self.state.stopped:
            self._step(step)
            step += 1
            last = step == self.config.steps
            looks, saves = self._looks_due(step, last), last or step % self.config.save_every == 0
            if last or looks or saves or step % self.config.log_every == 0:
                talk = self._read_losses(step)
                note = self._look(step, last) if looks else None
                pace = (time.perf_counter() - began) / (step - first)
                self.progress(Progress(step, self.config.steps, pace * (self.config.steps - step), talk, note))
            if saves or self.state.stopped:
                self._save(step)
        return self._finish(step, command)

    # One step

    def _step(self, step: int) -> None:
        config, n = self.config, self.config.batch_size * self.accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(config, step)
        readings = []
        for part in range(config.accumulate):
            start = (step * config.accumulate + part) * n + self.accelerator.process_index * config.batch_size
            visits = self.draws.visits(start, config.batch_size)
            # Gradients are exchanged once per step, with the last of its parts.
            alone = part + 1 < config.accumulate
            with self.accelerator.no_sync(self.unet) if alone else nullcontext():
                loss, kept = self._loss(visits)
                self.accelerator.backward(loss / config.accumulate)
            readings.append(torch.stack([loss.detach(), kept / n]))
        reading = torch.stack(readings).mean(0)
        self._update(reading[1])
        if self.state.average is not None:
            self.state.average.update(step)
        self.pending.append(reading)

    def _loss(self, visits: Visits) -> tuple[Tensor, Tensor]:
        """The loss of this process's samples, and how many of those of all processes are in it."""
        device, objective = self.accelerator.device, self.p.objective
        x0 = self.p.latents.draw(visits.rows, visits.mirrored, visits.posterior).to(device, non_blocking=True)
        noise, t = visits.noise.to(device, non_blocking=True), visits.t.to(device, non_blocking=True)
        tokens = self.p.captions.tokens(visits.rows, visits.blank, visits.places)
        x = objective.noised(x0, noise, t)
        output = self.unet(x, t, tokens, return_dict=False)[0]
        each = objective.losses(output, x0, noise, t)
        if self.p.memory is None:
            return each.mean(), torch.full_like(each[0], float(len(each) * self.accelerator.num_processes)).detach()
        kept = self.p.memory(x, t, output, cond=tokens, ids=visits.rows)
        return kept.mean(each), kept.kept

    def _update(self, kept: Tensor) -> None:
        """Move the weights, unless nothing was kept: momentum and weight decay would move them even then."""
        if self.accelerator.scaler is None:
            # AdamW leaves weights and moments alone where this is 1, without anybody waiting for the device.
            self.state.optimizer.found_inf = (kept == 0).float()  # type: ignore[attr-defined]
        elif self.p.memory is not None and not bool(kept > 0):  # a gradient scaler waits for the device anyway
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.accelerator.clip_grad_norm_(list(self.state.weights.values()), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # Between steps

    def _read_losses(self, step: int) -> str:
        """Write down what was measured since the last reading, and sum it up; the only time that the device is waited for."""
        found = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist()
        self.pending.clear()
        first = step - len(found)
        lines = [
            {"step": first + i + 1, "loss": loss, "kept": kept, "lr": rate_at(self.config, first + i)}
            for i, (loss, kept) in enumerate(found)
        ]
        for line in lines:
            if not math.isfinite(line["loss"]):
                raise ModelFault(
                    f"the loss at step {line['step']} is {line['loss']}: begin anew in another --out with a smaller lr, or with "
                    f"bf16 instead of fp16."
                )
        if self.accelerator.is_main_process:
            self.standing.require("train.json")
            self.losses.append(lines)
        if self.config.tracker:
            for line in lines:
                self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))
        talk = f"loss {sum(line['loss'] for line in lines) / len(lines):.4f}"
        if self.p.memory is not None:
            talk += f", {100 * sum(line['kept'] for line in lines) / len(lines):.0f} % kept"
        return talk

    def _looks_due(self, step: int, last: bool) -> bool:
        return self._validation_due(step, last) or self._canaries_due(step, last)

    def _validation_due(self, step: int, last: bool) -> bool:
        every = self.config.validate_every or self.config.save_every
        return bool(self.config.validation_prompts) and (last or step % every == 0)

    def _canaries_due(self, step: int, last: bool) -> bool:
        every = self.config.canaries_every or self.config.save_every
        return self.canaries is not None and (last or step % every == 0)

    def _look(self, step: int, last: bool) -> str:
        """By every process, so that none waits for another beyond what a network forgives; the main one's word counts."""
        main, stop, notes = self.accelerator.is_main_process, False, []
        with self.state.averaged(), self.p.trainee.asked() as target:
            if self._validation_due(step, last) and main:
                found = validate(target, self.config.validation_prompts, step, self.folder / "validation")
                notes += [f"{line['prompt'][:40]!r} has magnitude {line['magnitude']:.3f}" for line in found]
            if self.canaries is not None and self._canaries_due(step, last):
                stop = self.canaries.look(target, step, write=main)
                notes.append(f"canaries: {self.canaries.words()}")
        told = self.accelerator.gather(torch.tensor([float(stop)], device=self.accelerator.device))
        self.state.stopped = bool(told[0] > 0)
        return f"step {step}: {'; '.join(notes)}"

    def _canaries(self) -> Canaries | None:
        plan, config = self.p.split.plan, self.config
        if plan is None:
            return None
        captions = [self.p.data.pictures[c.row].captions[0] for c in plan.canaries]
        return Canaries(
            plan, captions, self.p.trainee.target, self.p.latents, descriptor=config.descriptor,
            threshold=config.canary_threshold, screen=config.canary_screen, history=self.folder / "canary-history.jsonl",
        )  # fmt: skip

    # States

    def _resume(self) -> int:
        """Take up the last checkpoint; says how many steps are done."""
        latest = self.checkpoints.latest()
        step = 0 if latest is None else latest[0]
        if latest is not None:
            self.state.restore(latest[1])
        if self.canaries is not None:
            self.canaries.go_on_from(step)
        if self.accelerator.is_main_process:
            self.losses.cut(step)
            if (shown := StepLog(self.folder / "validation" / VALIDATION)).path.is_file():
                shown.cut(step)
        self.accelerator.wait_for_everyone()
        return step

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.write(step, self.state.fill)
        self.accelerator.wait_for_everyone()

    def _finish(self, step: int, command: str) -> Trained:
        """Write the result. Every process knows what was trained; one writes."""
        p, lines = self.p, self.losses.read()
        tail = lines[-max(1, len(lines) // 10) :]
        scores = self.state.scores
        worst = tuple(scores.worst(WORST)) if scores is not None else ()
        lora = self.config.lora is not None
        trained = Trained(
            folder=self.folder,
            result=self.folder / ("pytorch_lora_weights.safetensors" if lora else "pipeline"),
            steps=step,
            stopped=self.state.stopped,
            pictures=len(set(p.split.listing)),
            left_out=p.found.left_out,
            loss=sum(line["loss"] for line in tail) / len(tail),
            kept=sum(line["kept"] for line in lines) / len(lines),
            worst=worst,
        )
        if self.accelerator.is_main_process:
            with self.state.averaged(), weights_explained(self.folder):
                p.trainee.save(self.folder)
            names = [picture.id for picture in p.data.pictures]
            if scores is not None:
                write_worst(self.folder / "worst.jsonl", worst, names)
            write_captions(self.folder / "captions.jsonl", p.data, p.split)
            readings = self.canaries.watch.history if self.canaries is not None else []
            write_card(p, trained, readings, self.accelerator.num_processes, command)
        self.accelerator.wait_for_everyone()
        return trained


def rate_at(config: TrainConfig, step: int) -> float:
    """The learning rate of a step."""
    done = step / config.steps
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[config.schedule]
    return config.learning_rate * rise * fall
