"""Every number that a command takes has a bound, and what lies outside is refused before anything is opened or written."""

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from PIL import Image

from mnemoscope import bounds
from mnemoscope.bounds import Bound
from mnemoscope.cli.main import app

WORDS = ["", "nan", "inf", "-inf", "true", "1e400", "1" + "0" * 400, "-1" + "0" * 18, "9" * 5000]
"""Texts that no option of a command takes for a number."""

TEXTS_WITH_NUMBERS = {
    "audit --batch-size", "audit --max-errors", "audit --shard", "calibrate --batch-size", "explain --at", "measure --scales",
    "serve --thresholds", "train --canaries", "train --filter",
}  # fmt: skip
"""Options that take more than a number; the tests below hold them against their bounds."""

TEXTS = {
    "--api-key-file", "--augment", "--calibration", "--canary-screen", "--caption", "--caption-column", "--captions", "--clean",
    "--column", "--config", "--controls", "--data", "--dedupe", "--descriptor", "--descriptor-option", "--detectors", "--device",
    "--different", "--digest", "--dtype", "--family-column", "--folder", "--format", "--from-log", "--group", "--group-column", "--host",
    "--id-column", "--ids", "--image-column", "--images", "--junit", "--kind", "--label-column", "--levels", "--log", "--lora",
    "--measure", "--measure-preset", "--method", "--mitigation", "--mixed-precision", "--model", "--model-option", "--name", "--notes",
    "--on-error", "--on-hit", "--only", "--option", "--out", "--packet", "--pairs", "--pictures", "--policy", "--prefix", "--preset",
    "--prompt", "--prompts", "--reference", "--regions", "--run", "--running-scores", "--runs", "--schedule", "--screen", "--seed-mode",
    "--source", "--summary", "--swap-column", "--token", "--tracker", "--validation-prompt", "--what", "--with", "--allow-program",
}  # fmt: skip
"""Options without a number, by whatever command."""


def commands(of: typer.Typer = app, *before: str) -> Iterator[tuple[tuple[str, ...], Callable[..., object]]]:
    for command in of.registered_commands:
        yield (*before, command.name or command.callback.__name__.replace("_", "-")), command.callback
    for group in of.registered_groups:
        yield from commands(group.typer_instance, *before, group.name)
    if not before:
        yield (), of.registered_callback.callback


def options() -> Iterator[tuple[tuple[str, ...], str, set[type], typing.Any]]:
    """Command, name, types and settings of every option and argument."""
    for words, function in commands():
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            kind, *settings = typing.get_args(parameter.annotation)
            if parameter.annotation is not inspect.Parameter.empty and settings:
                given = (
                    settings[0].default,
                    *(settings[0].param_decls or ()),
                )  # in an annotation, typer's first word is a name too
                names = [name for name in given if isinstance(name, str) and name.startswith("-")]
                name = names[0] if names else "--" + parameter.name.replace("_", "-")
                yield words, name.partition("/")[0], set(_leaves(kind)), settings[0]


def _leaves(kind: object) -> Iterator[object]:
    parts = typing.get_args(kind)
    return (leaf for part in parts for leaf in _leaves(part)) if parts else iter([kind])


NUMBERS = [
    pytest.param(words, name, settings.parser, id=" ".join([*words, name]))
    for words, name, kinds, settings in options()
    if kinds & {int, float} and not getattr(settings, "count", False)
]


def required(words: tuple[str, ...]) -> list[str]:
    """Arguments without which a command would not begin."""
    (function,) = [function for known, function in commands() if known == words]
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return ["x" for p in parameters if p.default is inspect.Parameter.empty and "policy" not in p.name]


def outside(bound: Bound) -> list[str]:
    """Numbers just beyond the bound, and fractions where whole numbers are meant."""
    step = 1 if bound.whole else 1e-3
    found = [
        bound.low if bound.above else bound.low - step,
        bound.high if bound.below else bound.high * (1 + step) + step,
    ]
    texts = [str(int(n)) if bound.whole else repr(float(n)) for n in found]
    return [*texts, *(["1.5", "1.0"] if bound.whole else [])]


@pytest.fixture
def closed(monkeypatch, tmp_path):
    """A folder in which nothing may be written, and no model, index or socket that could be opened."""
    import mnemoscope.demo.run
    import mnemoscope.models.load
    import mnemoscope.train.trainee  # who imports `load` by name must have done so before it is replaced
    from mnemoscope.models import sources

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(mnemoscope.models.load, "load", refuse)
    monkeypatch.setattr(mnemoscope.models.load, "open_pipeline", refuse)
    for name in ("from_folder", "from_hub", "from_file"):
        monkeypatch.setattr(sources, name, refuse, raising=False)
    monkeypatch.setattr("socket.socket.bind", refuse)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in KEPT) == []


KEPT = ("p.txt", "audit.yaml", "pictures")


def refused(run: Callable[..., tuple[int, str, str]], *words: object) -> str:
    code, out, err = run(*words)
    sentence = [line for line in err.splitlines() if line.startswith("mnemoscope: ")]
    assert code == 2, (words, out, err)
    assert len(sentence) == 1, err
    assert "Traceback" not in err
    assert out == ""
    assert len(sentence[0]) < 400
    return sentence[0]


def test_every_option_is_known_to_hold_a_number_or_none():
    """A new option of text is listed here, once somebody has looked whether a number can stand in it."""
    unknown = [
        " ".join([*words, name])
        for words, name, kinds, _ in options()
        if kinds & {str, Path} and name not in TEXTS and " ".join([*words, name]) not in TEXTS_WITH_NUMBERS
    ]
    assert unknown == []


@pytest.mark.parametrize(("words", "name", "parser"), NUMBERS)
def test_a_number_outside_its_bound_is_refused_before_anything_is_opened(run, closed, words, name, parser):
    bound = getattr(parser, "bound", None)
    assert isinstance(bound, Bound), "give it a bound: number_option(BOUND, …)"
    for text in [*WORDS, *outside(bound)]:
        with pytest.raises(typer.BadParameter, match=re.escape(bound.words)):
            parser(text)
    sentence = refused(run, *words, *required(words), name, "nan")
    assert name in sentence
    assert bound.words in sentence


TEXT_CASES = {
    "audit --batch-size": ("audit", "demo", "--prompts", "p.txt", "--batch-size"),
    "audit --max-errors": ("audit", "demo", "--prompts", "p.txt", "--max-errors"),
    "audit --shard": ("audit", "demo", "--prompts", "p.txt", "--dry-run", "--shard"),
    "calibrate --batch-size": ("calibrate", "demo", "--prompts", "p.txt", "--batch-size"),
    "explain --at": ("explain", "demo", "x", "--at"),
    "measure --scales": ("measure", "demo", "pictures", "--scales"),
    "serve --thresholds": ("serve", "demo", "--port", "0", "--thresholds"),
    "train --canaries": ("train", "demo", "pictures", "--canaries"),
    "train --filter": ("train", "demo", "pictures", "--filter"),
}


@pytest.mark.parametrize("text", ["nan", "-inf", "1e400", "-1", "1" + "0" * 400, "-1" + "0" * 18])
@pytest.mark.parametrize("option", sorted(TEXTS_WITH_NUMBERS))
def test_a_text_that_holds_a_number_is_refused_too(run, closed, option, text):
    if option == "serve --thresholds" and text == "-1":
        pytest.skip("a score may be below 0")
    (closed / "p.txt").write_text("a red apple\n")
    (closed / "pictures").mkdir()
    sentence = refused(run, *TEXT_CASES[option], text)
    assert option.split()[-1].strip("-").split("-")[0] in sentence


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("redteam", "demo", "--mitigation", "prompt", "--option", "target=nan"),
            "target of the mitigation prompt is 'nan'",
        ),
        (
            ("redteam", "demo", "--mitigation", "prompt", "--option", "target=.nan"),
            "target of the mitigation prompt is '.nan'",
        ),
        (
            ("redteam", "demo", "--mitigation", "random-tokens", "--option", "count=true"),
            "count of the mitigation random-tokens is True",
        ),
        (
            ("redteam", "demo", "--mitigation", "random-tokens", "--option", "count="),
            "count is None, and must be a whole number",
        ),
        (
            ("index", "build", "pictures", "--descriptor", "pixels", "--descriptor-option", "side=true"),
            "side of the descriptor pixels",
        ),
        (
            ("index", "build", "pictures", "--descriptor", "pixels", "--descriptor-option", "side=2.5"),
            "side of the descriptor pixels",
        ),
        (("measure", "demo", "pictures", "--descriptor", "pixel", "--beta", "0.5"), "Did you mean 'pixels'?"),
        (("measure", "demo", "pictures", "--preset", "fast"), "no preset named 'fast'"),
        (
            ("calibrate", "demo", "--prompts", "p.txt", "--fpr", "0.01"),
            "1 ordinary scores cannot state a false-positive rate of 0.01",
        ),
        (("serve", "demo", "--steps", "200"), "--steps 200 is more than --max-steps 100"),
        (("explain", "demo", "x", "--at", "0-60"), "--at names step 60, and the sampler's steps are 0 to 49"),
        (("check", "demo", "x", "--window", "60"), "--window 60 is more than the --steps 50 that there are"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_known_without_a_model_is_said_without_one(run, closed, words, says):
    (closed / "p.txt").write_text("a red apple\n")
    (closed / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(closed / "pictures" / "a.png")
    assert says in refused(run, *words)


def test_the_upper_ends_of_bounds_are_numbers_that_a_machine_counts_with():
    for name, bound in vars(bounds).items():
        if isinstance(bound, Bound):
            assert bound.low < bound.high < 2**63, name
            assert not bound.admits(float("nan")), name
            assert not bound.admits(True), name
            assert not bound.admits("1"), name
            assert not bound.admits(10**400), name
