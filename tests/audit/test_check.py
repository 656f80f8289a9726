"""One prompt, looked at closely, on a world whose answers are known."""

import json
import math

import pytest
import torch

from mnemoscope.audit.check import check
from mnemoscope.detect.calibrate import Calibration, setting_of
from mnemoscope.detect.magnitude import magnitude
from mnemoscope.errors import CannotAudit, UsageError
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.sampling import denoise
from mnemoscope.similarity.reference import ReferenceSet


@pytest.fixture(scope="module")
def world():
    return Gaussian.world(prompts=["a cat"], memorized=["the mona lisa"], latent_shape=(3, 16, 16))


def test_scores_are_those_of_the_loop(world):
    found = check(world, "the mona lisa", seeds=3, window=2, steps=10)
    cond, null = world.encode(["the mona lisa"]).expand(3), world.encode([""])
    steps = denoise(world, world.noise([0, 1, 2]), cond, null, steps=10)
    expected = torch.stack([magnitude(s.cond, s.uncond) for s, _ in zip(steps, range(2), strict=False)]).mean(0)
    assert torch.allclose(torch.tensor(found.scores), expected)
    assert found.score == pytest.approx(expected.mean().item())
    assert found.forwards == 3 * 2 * 2
    assert found.images is None
    assert "not calibrated" in found.words


def test_first_seeds_of_more_are_those_of_fewer(world):
    assert check(world, "a cat", seeds=4).scores[:2] == pytest.approx(check(world, "a cat", seeds=2).scores)
    assert check(world, "a cat", seeds=[3]).scores[0] == pytest.approx(check(world, "a cat", seeds=4).scores[3])


def test_the_empty_prompt_scores_exactly_zero(world):
    assert check(world, "").score == 0


def test_copies_are_found_where_they_are(world):
    memory = world.decode(world.mean(world.encode(["the mona lisa"])))
    reference = ReferenceSet.of(["mona", "other"], torch.cat([memory, torch.rand(1, 3, 16, 16)]))
    reference.threshold = 0.9
    hit = check(world, "the mona lisa", reference=reference)
    assert [m.reference for m in hit.nearest] == ["mona"] * 4
    assert "copy found in 4 of 4 seeds" in hit.words
    assert "no copy found in 4 seeds" in check(world, "a cat", reference=reference).words
    assert len(json.dumps(hit.to_dict())) > 100
    assert hit._repr_html_().count("<img ") == 4


def test_a_picture_on_the_threshold_is_no_copy(world):
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = ReferenceSet.of(["a"], torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    at = reference.similarities(pictures).item()
    found = []
    for threshold in (at, math.nextafter(at, -1)):
        reference.threshold = threshold
        found.append(reference.nearest(pictures)[0].copy_found)
    assert found == [False, True]


def test_html_is_escaped(world):
    assert "<script>" not in check(world, "<script>")._repr_html_()


def test_calibration_gives_p_and_refuses_to_travel(world):
    setting = setting_of(
        world.identity(), guidance=world.guidance, steps=50, window=(0, 1), seeds=4, seed_mode="shared"
    )
    ordinary = [check(world, f"ordinary {i}").score for i in range(99)]
    calibration = Calibration.fit(ordinary, setting, detector="magnitude", fpr=0.01)
    found = check(world, "the mona lisa", calibration=calibration)
    assert found.p == calibration.p_value(found.score)
    assert found.above is (found.score > calibration.threshold)
    assert "threshold at 1 % FPR" in found.words
    with pytest.raises(UsageError, match="seeds"):
        check(world, "a cat", seeds=2, calibration=calibration)
    with pytest.raises(UsageError, match=r"seeds: was 4, now \[4, 5, 6, 7\]"):
        check(world, "a cat", seeds=[4, 5, 6, 7], calibration=calibration)
    assert not found.borderline
    # The prompt that set the threshold is on it, hence not above it.
    on = max(range(99), key=ordinary.__getitem__)
    at = check(world, f"ordinary {on}", calibration=calibration)
    assert (at.score, at.above, at.p, at.borderline) == (calibration.threshold, False, 0.02, True)
    assert "not above threshold at 1 % FPR (p = 0.02), borderline: within rounding of it" in at.words
    assert at.to_dict()["borderline"] is True


def test_bad_requests_get_a_sentence(world):
    with pytest.raises(UsageError, match="seeds is 0, and must be a whole number from 1"):
        check(world, "a cat", seeds=0)
    with pytest.raises(CannotAudit, match="takes no text"):
        check(Gaussian.tiny(has_text=False), "a cat")
