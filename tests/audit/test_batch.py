"""One batch: what is not finite is named, wherever in the trajectory it happens, and its neighbors do not suffer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mnemoscope.audit.batch import Examiner, Sample, _finite
from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.prompts import Prompt
from mnemoscope.models.base import Condition
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.types import Latents, Step

CURE = "load the model in float32 or bfloat16, or check the checkpoint."


class First:
    """A detector that looks at the first step and lets the others pass."""

    name, needs, space, steps_needed = "first", frozenset[str](), None, 1

    def update(self, step: Step) -> None:
        if step.index == 0:
            self.seen = step.cond.flatten(1).norm(dim=1)

    def per_step(self) -> torch.Tensor:
        return self.seen[:, None]

    def compute(self) -> torch.Tensor:
        return self.seen


class Overflow(First):
    """A detector at fault itself."""

    def compute(self) -> torch.Tensor:
        return self.seen * torch.tensor([1.0, float("inf")])


class Broken(Gaussian):
    """A closed-form world whose prediction for one prompt breaks at one step."""

    at: int = 3
    value: float = float("nan")
    prompt: str | None = "a bad one"

    def output(self, x: Latents, t: torch.Tensor, cond: Condition | None) -> Latents:
        out = super().output(x, t, cond)
        if cond is not None and self.prompt is not None and t == self.schedule(5).timesteps[self.at]:
            out[cond.same_as(self.encode([self.prompt]))] = self.value
        return out


@pytest.fixture
def world() -> Broken:
    return Broken.tiny(latent_shape=(3, 8, 8))


def examined(world: Gaussian, detector: Any = None, **settings: Any) -> tuple[list[Any], dict[str, bytes]]:
    """Rows of "a cat" with seed 0 and "a bad one" with seed 7, and the files that were kept."""
    files: dict[str, bytes] = {}
    config = AuditConfig(**{"prompts": [], "steps": 5, "images": True, **settings})
    batch = [
        Sample(str(i), Prompt(str(i), text), seed) for i, (text, seed) in enumerate([("a cat", 0), ("a bad one", 7)])
    ]
    texts = [sample.prompt.text for sample in batch]
    examiner = Examiner(
        world, {"d": detector or First()}, config, texts, lambda n, data: files.setdefault(n, data) and n
    )
    return examiner.rows(batch), files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("at", "t"), [(0, 801), (3, 201), (4, 1)])
def test_a_step_that_no_detector_looked_at_is_named(world: Broken, value: float, at: int, t: int) -> None:
    world.at, world.value = at, value
    (good, bad), files = examined(world)
    assert (good.status, bad.status) == ("ok", "error")
    assert bad.error == (
        f"ModelFault: gaussian predicted NaN or infinity at step {at} (t = {t}) for 'a bad one' with seed 7; {CURE}"
    )
    assert not bad.scores
    assert list(files) == [good.image] == ["images/0.webp"]


def test_a_whole_trajectory_without_fault_is_an_ordinary_row(world: Broken) -> None:
    world.prompt = None
    rows, files = examined(world)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert len(files) == 2


def test_nothing_is_said_about_steps_that_are_not_run(world: Broken) -> None:
    rows, _ = examined(world, images=False)
    assert [row.status for row in rows] == ["ok", "ok"]


def test_a_picture_alone_may_be_at_fault(world: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoencoders overflow in float16 where the denoiser does not."""
    world.prompt = None
    decode = world.decode
    monkeypatch.setattr(world, "decode", lambda x: decode(x) * torch.tensor([1, float("nan")])[:, None, None, None])
    (good, bad), _ = examined(world)
    assert good.status == "ok"
    assert bad.error == (
        f"ModelFault: the picture is not finite, though all 5 steps are, for 'a bad one' with seed 7; {CURE}"
    )


def test_a_detector_alone_may_be_at_fault(world: Broken) -> None:
    world.prompt = None
    (good, bad), _ = examined(world, Overflow())
    assert good.status == "ok"
    assert bad.error == f"ModelFault: d is not finite, though every prediction is, for 'a bad one' with seed 7; {CURE}"


@pytest.mark.parametrize("where", ["cond", "uncond", "x_next"])
def test_every_part_of_a_step_is_looked_at(where: str) -> None:
    parts = {name: torch.zeros(3, 1, 2, 2) for name in ("x", "cond", "uncond", "x_next")}
    parts[where][1, 0, 1, 1] = float("inf")
    assert _finite(Step(0, 1.0, **parts)).tolist() == [True, False, True]
    assert _finite(Step(0, 1.0, **{**parts, where: None if where != "cond" else parts["x"]})).all()


def test_a_prompt_s_tokens_are_counted_once_whatever_the_seeds(world: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(world, "dropped", lambda text: counted.append(text) or 2)
    config = AuditConfig(prompts=[])
    batch = [Sample(f"{text}/{seed}", Prompt(text, text), seed) for text in ("a cat", "a dog") for seed in range(3)]
    examiner = Examiner(world, {"d": First()}, config, ["a cat", "a dog"], lambda name, data: name)
    rows = examiner.rows(batch)
    assert sorted(counted) == ["a cat", "a dog"]
    assert {row.note for row in rows} == {"prompt truncated: the model never saw its last 2 tokens"}
