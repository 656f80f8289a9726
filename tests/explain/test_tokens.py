"""Explanations against formulas, finite differences and the official code's numbers, and what they promise of their work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mnemoscope.detect.calibrate import Calibration
from mnemoscope.detect.magnitude import Magnitude, gradient, magnitude
from mnemoscope.errors import CannotAudit, ModelFault, UnknownName, UsageError
from mnemoscope.explain.tokens import (
    METHODS,
    PATH_POINTS,
    Block,
    Explainer,
    explain_prompt,
    official_significance,
    significance,
)
from mnemoscope.explain.words import without
from mnemoscope.models.base import Condition
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.load import load
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.sampling import denoise, null_output

DOUBLE = {"dtype": torch.float64}
CLOSED = {
    "gaussian": lambda: Gaussian.tiny(**DOUBLE),
    "gaussian-flow": lambda: Gaussian.tiny(space="velocity", **DOUBLE),
    "gaussian-v": lambda: Gaussian.tiny(v_prediction=True, **DOUBLE),
    "mixture": lambda: Mixture.tiny(rare=0.1, **DOUBLE),
}
PROMPTS = ["two dogs on a beach", "the mona lisa", "a cat"]
SENTENCES = ["a red dog on a field", "three white dots", "cat, cat"]


@pytest.fixture(params=CLOSED)
def world(request):
    return CLOSED[request.param]()


@pytest.fixture
def double(build_pipe, adapt):
    """A tiny network in float64, where differences are derivatives."""
    return adapt(build_pipe("sd").to(torch.float64))


def first_step(target, n=2):
    """Noise, time, and the null prediction in the target's space."""
    noise, plan = target.noise(range(n)), target.schedule(50)
    t, x = plan.timesteps[0], plan.start(noise)
    return x, t, target.to_space(null_output(target, noise, target.encode([""])), x, t)


def numbers(explanation):
    return torch.tensor([*(w.value for w in explanation.words), explanation.extra.value], dtype=torch.float64)


def close(a, b, **options):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(numbers(left), numbers(right), **{"rtol": 1e-4, "atol": 1e-6, **options})


# The definition.


def test_significance_is_the_closed_form(world):
    """SS_i = mean over seeds of ‖∂L/∂e_i‖₂, with formulas that know nothing of autograd."""
    n = 3
    x, t, _ = first_step(world, n)
    for prompt, found in zip(PROMPTS, Explainer(world, seeds=n).explain(PROMPTS, "wen"), strict=True):
        exact = world.significance(x, t, world.encode([prompt]).expand(n)).mean(0)
        torch.testing.assert_close(numbers(found)[:-1], exact[: len(found.words)], rtol=1e-9, atol=1e-12)
        assert found.extra.value == 0  # padding has no share


def test_significance_is_averaged_over_steps_of_the_guided_trajectory(world):
    at, cond = (0, 2, 5), world.encode(["a cat"]).expand(2)
    steps = list(denoise(world, world.noise(range(2)), cond, world.encode([""]), steps=6, guidance=3.0))
    times = world.schedule(6).timesteps
    exact = torch.stack([world.significance(steps[i].x, times[i], cond) for i in at]).mean((0, 1))
    run = Explainer(world, seeds=2, at=at, steps=6, guidance=3.0)
    (found,) = run.explain(["a cat"], "wen")
    torch.testing.assert_close(numbers(found)[:2], exact[:2], rtol=1e-8, atol=1e-12)
    sizes = torch.stack([magnitude(steps[i].cond, steps[i].uncond) for i in at]).mean(0)
    torch.testing.assert_close(torch.tensor(found.scores, dtype=torch.float64), sizes, rtol=1e-9, atol=0)


def test_gradient_is_a_finite_difference_on_a_network(double):
    x, t, uncond = first_step(double)
    cond = double.encode(["three white dots"]).expand(2)
    size, slope, _ = gradient(double, x, t, cond, uncond)
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for _ in range(3):
        v = torch.randn(cond.tokens.shape, generator=generator, dtype=torch.float64)
        ends = [gradient(double, x, t, replace(cond, tokens=cond.tokens + s * step * v), uncond)[0] for s in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((slope * v).sum((1, 2)), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(size, magnitude(double.predict(x, t, cond), uncond).detach())


def test_words_of_several_tokens_are_one_block(double):
    (found,) = Explainer(double, seeds=2).explain(["three white dots"], "wen")
    x, t, uncond = first_step(double)
    slope = gradient(double, x, t, double.encode(["three white dots"]).expand(2), uncond)[1]
    for word in found.words:
        block = slope[:, list(word.positions)].flatten(1).norm(dim=1).mean()
        assert word.value == pytest.approx(float(block), rel=1e-9)
        if len(word.positions) == 1:
            assert word.value == pytest.approx(float(significance(slope)[:, word.positions[0]].mean()), rel=1e-9)


@pytest.mark.parametrize("i", range(4))
def test_the_official_numbers_at_the_first_step(official_wen, i):
    reference = json.loads((official_wen / "reference.json").read_text())
    noise = load_file(official_wen / "tensors.safetensors")[f"xT.{i}"]
    target, prompt = load(official_wen / "model"), reference["prompts"][i]
    t = target.schedule(50).timesteps[0]
    uncond = null_output(target, noise, target.encode([""]))
    size, slope, _ = gradient(target, noise, t, target.encode([prompt]).expand(4), uncond)
    expected = torch.tensor(reference["rows"][i]["token_grad_step0_joint_over_2n"])
    torch.testing.assert_close(official_significance(size, slope), expected, rtol=1e-4, atol=1e-6)

    run = Explainer(target)
    run.noise = noise  # the reference's own noise, in place of the bank
    (found,) = run.explain([prompt], "wen-official")
    for word in [*found.words, found.extra]:
        assert word.value == pytest.approx(float(expected[list(word.positions)].norm()), rel=1e-4)


# The other methods.


def test_integrated_gradients_add_up_to_the_score(double):
    for found in Explainer(double, seeds=2).explain(SENTENCES, "integrated-gradients"):
        assert float(numbers(found).sum()) == pytest.approx(found.score, rel=2e-2)


def test_gradient_times_input_is_the_slope_of_the_path(double):
    """Σ_i (e_i − e_∅,i)·∂L/∂e_i = dL/dα at α = 1, by a finite difference."""
    x, t, uncond = first_step(double)
    null, prompt, step = double.encode([""]), "three white dots", 1e-6
    cond = double.encode([prompt]).expand(2)
    (found,) = Explainer(double, seeds=2).explain([prompt], "gradient-input")

    def size(share):
        return gradient(double, x, t, replace(cond, tokens=torch.lerp(null.tokens, cond.tokens, share)), uncond)[
            0
        ].mean()

    slope = float(size(1 + step) - size(1 - step)) / (2 * step)
    assert float(numbers(found).sum()) == pytest.approx(slope, rel=1e-4)


def test_leave_one_out_is_the_drop_of_the_score(double):
    run = Explainer(double, seeds=2)
    (found,) = run.explain(["a red dog"], "leave-one-out")
    for word in found.words:
        left = run.scores([without("a red dog", [word])])
        assert word.value == pytest.approx(found.score - float(left.mean()), abs=1e-9)
    assert found.forwards == 2 * (len(found.words) + 2)
    assert found.backwards == 0


def test_edit_is_the_slope_towards_the_edited_prompt(double):
    """⟨∂L/∂e at the middle, e − e′⟩, where the word's own places are compared with the padding that filled the end."""
    prompt = "a red dog"
    (found,) = Explainer(double, seeds=2).explain([prompt], "edit")
    x, t, uncond = first_step(double)
    cond, null = double.encode([prompt]), double.encode([""])
    middle = replace(cond, tokens=(cond.tokens + null.tokens) / 2)
    slope = gradient(double, x, t, middle.expand(2), uncond)[1].mean(0)
    for word in found.words:
        edited = double.encode([without(prompt, [word])]).tokens[0]
        length = len(edited)
        others = [i for i in range(length) if i not in word.positions]
        order = [*others, *word.positions]  # the original's positions, in the order of the edited prompt
        change = cond.tokens[0][order] - edited
        assert word.value == pytest.approx(float((slope[order] * change).sum()), rel=1e-7)


def test_edit_finds_the_word_that_matters(world):
    """In a world of words with known shares a dropped word makes another prompt; its score is what is estimated."""
    run = Explainer(world)
    for method in ("edit", "leave-one-out"):
        (found,) = run.explain(["the mona lisa"], method)
        assert [w.text for w in found.words] == ["the", "mona", "lisa"]
        assert all(w.value > 0 for w in found.words)  # any edit makes a memorized prompt an ordinary one


# What all of them promise.


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_order_do_not_matter(target_of, method):
    target = target_of("sd")
    together = Explainer(target, seeds=2).explain(SENTENCES, method)
    turned = Explainer(target, seeds=2, batch_size=3).explain(SENTENCES[::-1], method)[::-1]
    alone = [Explainer(target, seeds=2).explain([p], method)[0] for p in SENTENCES]
    close(together, turned, rtol=1e-3)
    close(together, alone, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "forwards", "backwards"),
    [
        ("wen", 1, 1),
        ("wen-official", 1, 1),
        ("gradient-input", 1, 1),
        ("edit", 2, 1),
        ("integrated-gradients", PATH_POINTS + 1, PATH_POINTS),
    ],
)
def test_work_at_the_first_step(target_of, method, forwards, backwards):
    target, n = target_of("sd"), 4
    run = Explainer(target, seeds=n)
    before = target.forwards
    found = run.explain(SENTENCES, method)
    assert {(e.forwards, e.backwards) for e in found} == {(n * forwards, n * backwards)}
    assert run.backwards == n * backwards * len(SENTENCES)
    assert target.forwards - before == n * forwards * len(SENTENCES) + n  # the null prediction, once
    before = target.forwards
    run.explain(SENTENCES[:1], method)
    assert target.forwards - before == n * forwards


def test_later_steps_cost_their_trajectory_once(target_of):
    target, n = target_of("sd"), 2
    (found,) = Explainer(target, seeds=n, at=(0, 3), steps=10).explain(SENTENCES[:1], "wen")
    assert (
        found.forwards == n * (2 * 4 - 1) + 2 * n
    )  # four guided steps, the first null prediction is cached; two gradients
    assert found.backwards == 2 * n


def test_grad_mode_and_weights_are_left_as_found(build_pipe, adapt):
    target = adapt(build_pipe("sd"))
    target.unet.conv_in.weight.requires_grad_()  # somebody is training
    before = {name: p.requires_grad for name, p in target.unet.named_parameters()}
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            Explainer(target, seeds=1).explain(["a cat"])
            assert torch.is_grad_enabled() is mode
    assert {name: p.requires_grad for name, p in target.unet.named_parameters()} == before
    assert all(p.grad is None for p in target.unet.parameters())


def test_the_condition_of_the_caller_is_not_touched(double):
    x, t, uncond = first_step(double)
    cond = double.encode(["a cat"]).expand(2)
    before = cond.tokens.clone()
    gradient(double, x, t, cond, uncond)
    assert torch.equal(cond.tokens, before)
    assert not cond.tokens.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_the_empty_prompt_scores_0_and_has_no_words(target_of, method):
    found = Explainer(target_of("sd"), seeds=2).explain(["", "a cat"], method)
    assert found[0].score == 0
    assert found[0].words == ()
    assert found[0].extra.value == 0
    assert found[1].score > 0


def test_coarse_models_keep_their_gradient(build_pipe, adapt):
    """In bfloat16 the ranking of a float32 model survives."""
    fine = Explainer(adapt(build_pipe("sd")), seeds=2).explain(["three white dots"], "wen")[0]
    coarse = Explainer(adapt(build_pipe("sd").to(torch.bfloat16)), seeds=2).explain(["three white dots"], "wen")[0]
    assert [w.text for w in coarse.ranked] == [w.text for w in fine.ranked]
    torch.testing.assert_close(numbers(coarse), numbers(fine), rtol=0.2, atol=1e-3)


def test_scores_are_the_detectors(target_of):
    target = target_of("sd")
    run = Explainer(target, seeds=2, at=(0, 1, 2), steps=5, guidance=3.0)
    detector = Magnitude(steps=3)
    for step in denoise(
        target, target.noise([0, 1]), target.encode(["a cat"]).expand(2), target.encode([""]), steps=5, guidance=3.0
    ):
        detector.update(step)
    torch.testing.assert_close(run.scores(["a cat"])[0], detector.compute(), rtol=1e-4, atol=1e-6)
    assert run.scores([]).shape == (0, 2)


def test_a_prompt_longer_than_the_window(target_of):
    found = explain_prompt(target_of("sd"), "a red dog " * 60, seeds=1)
    assert found.dropped > 0
    assert f"{found.dropped} tokens at the end were cut off" in found.sentence
    assert all(w.positions for w in found.words)


def test_alignment_of_prompts_with_several_encoders():
    """Two encoders stand one after the other; an edit moves tokens inside its own block only."""
    from mnemoscope.explain.tokens import _block_end
    from mnemoscope.models.base import Piece

    one = [Piece("", "start"), Piece("a", "text", 0, 1), Piece("", "end"), Piece("", "padding")]
    pieces = [*one, Piece("a", "text", 0, 1), Piece("", "end")]
    assert _block_end(pieces, 1) == 4
    assert _block_end(pieces, 4) == 6
    assert _block_end(one + one, 1) == 4
    assert _block_end([*one, *one[2:]], 1) == 4  # an encoder that is left out stands as an end and padding


def test_block_members_are_words_and_the_rest(target_of):
    block = Block(target_of("sd"), ["cat, cat", ""], 1)
    assert [w.text for w in block.words[0]] == ["cat", ",", "cat"]
    covered = block.member[0].sum(0)
    assert covered[0] == 0  # the start token belongs to nobody
    assert bool((covered[1:] == 1).all())
    assert bool((block.member[1, :-1] == 0).all())


# Words.


def test_an_explanation_speaks(target_of):
    (found,) = Explainer(target_of("sd"), seeds=2).explain(["<b>cat"])
    assert "not calibrated" in found.sentence
    assert found.above is None
    assert "over 2 seeds" in repr(found)
    page = found._repr_html_()
    assert "&lt;b&gt;cat" in page
    assert "<b>cat<" not in page
    document = json.loads(json.dumps(found.to_dict()))
    assert [w["text"] for w in document["words"]] == ["<", "b", ">", "cat"]
    shares = [share for _, share in found.shares(special=True)]
    assert max(map(abs, shares)) == 1
    assert len(shares) == 5
    assert found.ranked[0].value == max(w.value for w in found.words)


def test_a_calibration_judges_the_score(target_of):
    target, run = target_of("sd"), Explainer(target_of("sd"), seeds=2)
    ordinary = run.scores([f"an ordinary prompt number {i}" for i in range(120)]).mean(1).tolist()
    from mnemoscope.detect.calibrate import setting_of

    setting = setting_of(
        target.identity(), guidance=target.guidance, steps=50, window=(0, 1), seeds=2, seed_mode="shared"
    )
    calibration = Calibration.fit(ordinary, setting, detector="magnitude", fpr=0.05)
    (found,) = run.explain(["a cat"], calibration=calibration)
    assert found.p == calibration.p_value(found.score)
    assert found.above is calibration.above(found.score)
    assert "at 5 % FPR (p = " in found.sentence
    with pytest.raises(UsageError, match="another setting"):
        Explainer(target, seeds=3).explain(["a cat"], calibration=calibration)
    (accepted,) = Explainer(target, seeds=3).explain(["a cat"], calibration=calibration, accept_threshold=True)
    assert "another setting" in accepted.sentence
    with pytest.raises(UsageError, match="leading steps"):
        Explainer(target, seeds=2, at=(3,)).explain(["a cat"], calibration=calibration)


def test_one_sentence_for_each_mistake(target_of):
    target = target_of("sd")
    with pytest.raises(UnknownName, match="Did you mean 'edit'"):
        explain_prompt(target, "a cat", method="edits")
    with pytest.raises(UsageError, match="0 to 49"):
        Explainer(target, at=50)
    with pytest.raises(UsageError, match="seeds is 0, and must be a whole number from 1"):
        Explainer(target, seeds=0)
    with pytest.raises(UsageError, match="first step alone"):
        Explainer(target, at=(0, 1)).explain(["a cat"], "wen-official")
    with pytest.raises(CannotAudit, match="no words to explain"):
        Explainer(target_of("pixel"))


def test_nan_is_a_fault(build_pipe, adapt):
    target = adapt(build_pipe("sd"))
    target.unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(ModelFault, match="NaN"):
        Explainer(target, seeds=1).explain(["a cat"])
    with pytest.raises(ModelFault, match="NaN"):
        Explainer(target, seeds=1).scores(["a cat"])  # what the studio's edits and suggestions are ranked by


def test_conditions_are_repeated_row_by_row():
    from mnemoscope.explain.tokens import repeat

    rows = repeat(Condition(torch.arange(2.0).view(2, 1, 1)), 3)
    assert rows.tokens.flatten().tolist() == [0, 0, 0, 1, 1, 1]
