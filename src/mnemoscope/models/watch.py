"""Look inside a user's own pipeline while it runs.

A forward hook on the denoiser sees every call; the pipeline, its scheduler and its weights stay as they are, and the pictures
come out bit for bit the same. (Step callbacks would not do: diffusers does not show them the noise prediction.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..errors import CannotAudit, UsageError
from ..types import Step
from .load import adapter_for
from .sampling import same_where
from .steer import hidden


class Steps(Sequence[Step]):
    """What a watched pipeline did: a list of :class:`~mnemoscope.types.Step`, in the order of its denoiser calls.

    A step's ``x_next`` is filled in when the next call arrives; the last step of a generation keeps None. Each generation
    starts again at index 0; :attr:`runs` has them apart.
    """

    def __init__(self) -> None:
        self._steps: list[Step] = []

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...

    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        self._require()
        return self._steps[index]

    def __iter__(self) -> Iterator[Step]:
        self._require()
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def runs(self) -> list[list[Step]]:
        """The steps of each generation."""
        self._require()
        starts = [i for i, step in enumerate(self._steps) if step.index == 0]
        return [self._steps[a:b] for a, b in zip(starts, [*starts[1:], len(self._steps)], strict=True)]

    def _require(self) -> None:
        if not self._steps:
            raise UsageError("No steps seen: the pipeline ran outside `with watch(pipe)`, or has not run yet.")

    def _append(self, step: Step) -> None:
        if step.index:
            self._steps[-1] = replace(self._steps[-1], x_next=step.x)
        self._steps.append(step)


@contextmanager
def watch(pipe: Any, *observers: Any) -> Iterator[Steps]:
    """Record every denoising step of a pipeline that runs inside the ``with``.

        with watch(pipe) as steps:
            image = pipe("a photo of a cat").images[0]

    Args:
        pipe: A diffusers pipeline of a class that mnemoscope can load. It is not changed.
        *observers: Detectors (anything with ``update``) or callables; each is given every step at once, its ``x_next`` still
            None. A detector scores one generation; for several use ``steps.runs``.

    Yields:
        :class:`Steps`. Predictions are ε (of a rectified flow u), float32. ``uncond`` is the pipeline's own second prediction,
        which belongs to the empty prompt unless a negative prompt was given; None while guidance is off (1 or less).

    Raises:
        CannotAudit: the pipeline's batch layout is not known.
    """
    steps = Steps()
    hook = _Hook(pipe, [steps._append, *(getattr(o, "update", o) for o in observers)])
    handle = hook.denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield steps
    finally:
        handle.remove()


class _Hook:
    """Turns one call of the denoiser into a Step."""

    def __init__(self, pipe: Any, observers: Sequence[Callable[[Step], object]]):
        self.pipe, self.observers = pipe, observers
        self.adapter = adapter_for(type(pipe))
        self.denoiser = getattr(pipe, self.adapter.denoiser)
        self.process = self.adapter.process(pipe.scheduler, type(pipe).__name__)
        self.signature = inspect.signature(self.denoiser.forward)
        self.plan: Tensor | None = None
        self.index = 0

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if hidden():  # a guard's own calls are no steps of the pipeline
            return
        call = self.signature.bind(*args, **kwargs).arguments
        if call.get("skip_layers") is not None:  # a weakened second look at the same step, for guidance by layers
            return
        output = result[0].detach()
        # A scheduler makes new timesteps for each generation, and holding these keeps their identity from being reused.
        self.index = 0 if self.plan is not self.pipe.scheduler.timesteps else self.index + 1
        self.plan = self.pipe.scheduler.timesteps
        told = [value for name in self.adapter.told if (value := call.get(name)) is not None]
        step = self._step(call[self.adapter.shown].detach(), call["timestep"], output, told)
        for observe in self.observers:
            observe(step)

    def _step(self, x: Tensor, t: Any, output: Tensor, told: Sequence[Tensor]) -> Step:
        t = torch.as_tensor(t).flatten()[0].cpu()  # some pipelines repeat it for each row
        out_u = None
        if told and self.adapter.guided(self.pipe):
            # The first half of the batch is unconditional, and both halves show the denoiser the same x.
            if len(x) % 2:
                raise CannotAudit(
                    f"{type(self.pipe).__name__} calls its denoiser with {len(x)} samples, which do not split into two halves."
                )
            (x, _), (out_u, output) = x.chunk(2), output.chunk(2)
            same = [(null == prompt).flatten(1).all(1) for null, prompt in (value.chunk(2) for value in told)]
            output = same_where(torch.stack(same).all(0), out_u, output)
        x = x.clone()  # the pipeline may go on to change its own
        cond = self.process.to_space(output, x, t)
        uncond = None if out_u is None else self.process.to_space(out_u, x, t)
        return Step(self.index, float(t), x, cond, uncond, None, self.process.space)
