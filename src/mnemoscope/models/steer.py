"""Change what a user's own pipeline does with single samples, while it runs.

A driver is told when the pipeline has encoded the prompts, may exchange the prompts' embeddings before a call of the denoiser, and
the predictions after it. Pipeline, scheduler and weights stay as they are, a driver that changes nothing leaves the pictures bit
for bit the same, and when the block ends, however it ends, nothing of it is left.

Only the thread that opened the block is steered, and of its denoiser calls only those of this pipeline: they are the ones that
follow its encoding of prompts on one and the same schedule. Pipelines that share a denoiser (``from_pipe``) therefore never meet.

A rule for the guidance scale needs no access to the pipeline's own scale g: with ε_c′ = ε_∅ + (g′/g)·(ε_c − ε_∅) in place of ε_c,
the pipeline arrives at ε_∅ + g′·(ε_c − ε_∅) by itself.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from ..errors import CannotAudit
from ..types import Latents
from .host import DiffusersTarget, Origin
from .load import adapter_for

__all__ = ["Call", "Driver", "Order", "frozen", "hidden", "steer", "target_around", "unseen"]


@dataclass(frozen=True)
class Order:
    """What a pipeline was asked for, known once it has encoded the prompts.

    Attributes:
        rows: Samples of the generation.
        prompts: Their prompts, in the batch's order; None where only embeddings were given.
        guided: Whether classifier-free guidance is on, so that each call is a pair.
        negative: Which samples are compared with something else than the empty prompt, or with an embedding nobody can tell.
        empty: Encodes the empty prompt as the pipeline does here, ``[1, token, dim]``.
    """

    rows: int
    prompts: tuple[str, ...] | None
    guided: bool
    negative: tuple[bool, ...]
    empty: Callable[[], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a pipeline's denoiser, seen as samples.

    Attributes:
        order: What the generation was asked for.
        index: Which step of the generation; 0 is on pure noise.
        t: The model's time, where the pipeline has it: reading it may wait for the device.
        times: The times of all steps from this one on.
        guidance: The pipeline's guidance scale.
        x: What the denoiser is shown, one row per sample.
        null: The embedding of its other half: the empty or the negative prompt, ``[batch, token, dim]``; None while guidance is off.
        prompt: The prompts' embeddings, ``[batch, token, dim]``, as the pipeline gave them.
        others: Names of further inputs that the denoiser was given.
        predict: The raw output for other rows of x and other embeddings, all else as in this call. Unseen by hooks, not compiled.
    """

    order: Order
    index: int
    t: Tensor
    times: Shaped[Tensor, " step"]
    guidance: float
    x: Latents
    null: Tensor | None
    prompt: Tensor
    others: tuple[str, ...]
    predict: Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Driver(Protocol):
    """Decides, call by call, what is exchanged. An exception ends the generation and reaches the caller."""

    def begin(self, order: Order) -> None:
        """A generation begins. The text encoder has just run, so that encoding more is cheap here, under offloading too."""
        ...

    def tokens(self, call: Call) -> Tensor | None:
        """Other embeddings for the prompts of this call, ``[batch, token, dim]``; None: as they are."""
        ...

    def outputs(self, call: Call, uncond: Latents, cond: Latents) -> Latents | None:
        """Other raw outputs for the prompts of this call; None: as they are. Not asked while guidance is off."""
        ...


_here = threading.local()
"""Whether this thread's denoiser calls are a driver's own."""


@contextmanager
def unseen() -> Iterator[None]:
    """Denoiser calls inside, in this thread, are nobody's business: a driver runs the model itself."""
    before = getattr(_here, "unseen", False)
    _here.unseen = True
    try:
        yield
    finally:
        _here.unseen = before


def hidden() -> bool:
    """Whether the denoiser call that is under way in this thread is a driver's own."""
    return getattr(_here, "unseen", False)


@contextmanager
def steer(pipe: Any, driver: Driver) -> Iterator[None]:
    """Let ``driver`` decide inside the block, in this thread.

    Args:
        pipe: A diffusers pipeline of a class that mnemoscope can load. A denoiser that is compiled, either way, is steered outside the
            compiled graph.
        driver: Told of every generation of this pipeline.

    Raises:
        CannotAudit: the pipeline's batch layout is not known.
    """
    _require_unet(pipe)
    seat = _Seat(pipe, driver)
    with _around(pipe, "encode_prompt", seat.ordered), _listening(pipe.unet, seat):
        yield


def _require_unet(pipe: Any) -> None:
    if (part := adapter_for(type(pipe)).denoiser) != "unet":
        raise CannotAudit(
            f"{type(pipe).__name__} has a {part} in place of a UNet: it can be watched, and audited with mnemoscope's own loop, but not "
            f"steered while it runs so far."
        )


@contextmanager
def _listening(unet: Any, seat: _Seat) -> Iterator[None]:
    if getattr(unet, "_compiled_call_impl", None) is not None:
        # Module.compile() takes hooks into the graph when it is traced and ignores later ones: go around the compiled call.
        with _around(unet, "_compiled_call_impl", seat.called):
            yield
        return
    handles = [
        unet.register_forward_pre_hook(seat.before, with_kwargs=True),
        unet.register_forward_hook(seat.after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seat:
    """Where a driver sits: finds this thread's calls of one pipeline and splits them into samples."""

    def __init__(self, pipe: Any, driver: Driver):
        self.pipe, self.driver, self.thread = pipe, driver, threading.get_ident()
        self.guided = adapter_for(type(pipe)).guided
        self.unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
        self.signature = inspect.signature(self.unet.forward)
        self.asked = inspect.signature(pipe.encode_prompt)
        self.order: Order | None = None
        self.first: Tensor | None = None
        """The time of the generation's first call; None until then. Held, so that its memory is not used again."""
        self.index = 0
        self.call: Call | None = None

    @property
    def _elsewhere(self) -> bool:
        return threading.get_ident() != self.thread or hidden()

    # A generation

    def ordered(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``encode_prompt``, which each generation of the pipeline calls once."""
        encoded = inner(*args, **kwargs)
        if not self._elsewhere:
            self.order, self.first, self.call = self._order(inner, encoded[0], args, kwargs), None, None
            with unseen():
                self.driver.begin(self.order)
        return encoded

    def _order(
        self, inner: Callable[..., Any], encoded: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Order:
        given, rows = self.asked.bind(*args, **kwargs).arguments, len(encoded)

        def each(text: Any) -> tuple[str, ...]:
            texts = [text] if isinstance(text, str) else list(text)
            return tuple(t for t in texts for _ in range(rows // len(texts)))

        known = given.get("prompt_embeds") is None and given.get("prompt") is not None
        against = given.get("negative_prompt")
        if given.get("negative_prompt_embeds") is not None:
            negative = (True,) * rows
        else:
            negative = (False,) * rows if against is None else tuple(text != "" for text in each(against))
        same = {k: given[k] for k in ("lora_scale", "clip_skip") if k in given}

        def empty() -> Tensor:
            return inner("", given.get("device"), 1, False, **same)[0]

        prompts = each(given["prompt"]) if known else None
        return Order(rows, prompts, self.guided(self.pipe), negative, empty)

    # Its denoiser calls

    def called(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the denoiser's compiled call. A driver's own calls have other shapes, and are not worth compiling for."""
        if threading.get_ident() == self.thread and hidden():
            return self.unet._call_impl(*args, **kwargs)
        args, kwargs = self.before(self.unet, args, kwargs) or (args, kwargs)
        result = inner(*args, **kwargs)
        other = self.after(self.unet, args, kwargs, result)
        return result if other is None else other

    # While another thread takes its hooks out, PyTorch may call ours without keywords: that is never a call of our own thread.

    def before(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Forward pre-hook."""
        if self._elsewhere or kwargs is None:
            return None
        self.call = call = self._seen(self.signature.bind(*args, **kwargs).arguments)
        if call is None:
            return None
        with unseen():
            other = self.driver.tokens(call)
        if other is None:
            return None
        bound = self.signature.bind(*args, **kwargs)
        tokens = bound.arguments["encoder_hidden_states"].clone()
        tokens[-len(other) :] = other.to(tokens.dtype)
        if "encoder_hidden_states" in kwargs:  # passed as before, for the sake of a compiled denoiser
            return args, {**kwargs, "encoder_hidden_states": tokens}
        bound.arguments["encoder_hidden_states"] = tokens
        return bound.args, bound.kwargs

    def after(self, unet: nn.Module, args: tuple[Any, ...], kwargs: Any, result: Any = None) -> Any:
        """Forward hook."""
        call = self.call
        if self._elsewhere or result is None or call is None or call.null is None:
            return None
        uncond, cond = result[0].chunk(2)
        with unseen():
            other = self.driver.outputs(call, uncond, cond)
        if other is None:
            return None
        # A clone keeps the memory format, on which the bits of later steps depend.
        sample = result[0].clone()
        sample[len(uncond) :] = other.to(sample.dtype)
        return (sample, *result[1:]) if isinstance(result, tuple) else type(result)(sample=sample)

    def _seen(self, given: Mapping[str, Any]) -> Call | None:
        """This call, if it belongs to the generation that was ordered."""
        if self.order is None:
            return None
        t = torch.as_tensor(given["timestep"])
        if self.first is None:
            self.first, self.index = t, 0
        elif self._same_schedule(t):
            self.index += 1
        else:
            return None
        left = self._steps - self.index
        if left < 1:
            return None
        times = t.as_strided((left,), (1,), t.storage_offset()) if _among_others(t) else t.reshape(1)
        n, x, tokens = self.order.rows, given["sample"].detach(), given["encoder_hidden_states"]
        # A callback may switch guidance off on the way: then the batch is no longer doubled.
        null = tokens[:n] if self.order.guided and len(x) == 2 * n else None
        fixed = {k: v for k, v in given.items() if k not in ("sample", "encoder_hidden_states", "return_dict")}
        others = tuple(sorted(k for k, v in fixed.items() if v is not None and k not in KNOWN))

        def predict(x: Tensor, tokens: Tensor) -> Tensor:
            return self.unet.forward(sample=x, encoder_hidden_states=tokens, return_dict=False, **fixed)[0]

        g = float(getattr(self.pipe, "guidance_scale", 1.0))
        return Call(self.order, self.index, t, times, g, x[-n:], null, tokens[-n:], others, predict)

    @property
    def _steps(self) -> int:
        """How many calls the generation makes."""
        return int(self.pipe.num_timesteps)

    def _same_schedule(self, t: Tensor) -> bool:
        """A pipeline's times are views of one tensor, its own; a sibling's lie elsewhere."""
        if self.first is None or not _among_others(self.first):
            return True
        return t.untyped_storage().data_ptr() == self.first.untyped_storage().data_ptr()


KNOWN = frozenset({"timestep", "cross_attention_kwargs"})
"""Inputs of a denoiser beside x and prompt that say nothing about what is drawn."""


def _among_others(t: Tensor) -> bool:
    return t.untyped_storage().nbytes() > t.element_size()


# Replaced attributes


class _Layers:
    """A callable attribute with others around it."""

    def __init__(self, inner: Callable[..., Any], own: bool):
        self.inner, self.own = inner, own
        self.around: tuple[Callable[..., Any], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.inner
        for layer in self.around:
            call = partial(layer, call)
        return call(*args, **kwargs)


_lock = threading.RLock()


@contextmanager
def _around(owner: Any, name: str, layer: Callable[..., Any]) -> Iterator[None]:
    """Calls of ``owner.name`` go through ``layer(inner, *args, **kwargs)``; in whatever order blocks close, what was there returns."""
    with _lock:
        layers = vars(owner).get(name)
        if not isinstance(layers, _Layers):
            layers = _Layers(getattr(owner, name), name in vars(owner))
            object.__setattr__(owner, name, layers)
        layers.around = (*layers.around, layer)
    try:
        yield
    finally:
        with _lock:
            layers.around = tuple(other for other in layers.around if other != layer)
            if not layers.around and vars(owner).get(name) is layers:
                if layers.own:
                    object.__setattr__(owner, name, layers.inner)
                else:
                    object.__delattr__(owner, name)


# The model of a running pipeline


def target_around(pipe: Any, **options: Any) -> DiffusersTarget:
    """A target on a pipeline's own modules, which stay as they are: neither frozen nor put in eval mode, and not compiled for it.

    Args:
        pipe: A diffusers pipeline of a class that mnemoscope can load.
        options: Those of its adapter. Without ``sampler``: the pipeline's own if it draws no noise, else DDIM.

    Raises:
        CannotAudit: as :func:`mnemoscope.load`.
    """
    _require_unet(pipe)
    adapter, origin = adapter_for(type(pipe)), Origin(name=type(pipe).__name__)
    modules = {m for m in pipe.components.values() if isinstance(m, nn.Module)}
    with _lock:
        put_back = _flags(modules)
        try:
            target = None
            if "sampler" not in options:
                with suppress(CannotAudit):
                    target = adapter(pipe, origin=origin, sampler="own", **options)
            target = target or adapter(pipe, origin=origin, **options)
        finally:
            put_back()
    target.unet = getattr(target.unet, "_orig_mod", target.unet)
    return target


_frozen: WeakKeyDictionary[nn.Module, tuple[int, Callable[[], None]]] = WeakKeyDictionary()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Weights take no gradient inside, in whatever threads; afterwards each is as it was."""
    with _lock:
        users, put_back = _frozen.get(module) or (0, _flags({module}))
        _frozen[module] = users + 1, put_back
        module.requires_grad_(False)
    try:
        yield
    finally:
        with _lock:
            users, put_back = _frozen.pop(module)
            if users > 1:
                _frozen[module] = users - 1, put_back
            else:
                put_back()


def _flags(modules: set[nn.Module]) -> Callable[[], None]:
    """Remembers which weights take gradients and which modules train; the call puts it back."""
    weights = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    training = [(part, part.training) for module in modules for part in module.modules()]

    def put_back() -> None:
        for p, wanted in weights:
            p.requires_grad_(wanted)
        for part, was in training:
            part.training = was

    return put_back
