"""What a document of somebody else may choose of a plugin: numbers and switches, never a path or a program."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import pytest

from mnemoscope import plugins, programs
from mnemoscope.errors import MnemoscopeError, UnknownName, UsageError

KINDS = ("detector", "descriptor", "measure", "mitigation", "caption_score")
OPTIONS = [
    (kind, name, option)
    for kind in KINDS
    for name in plugins.installed(kind)
    for option in inspect.signature(plugins.find(kind, name)).parameters
]


@pytest.fixture(autouse=True)
def no_program_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_ALLOWED", {})


@pytest.mark.parametrize(
    "value", ["/etc/hostname", "p.pt", "../x", {"weights": "p.pt"}, [["p.pt"]], ["p.pt"], [0] * 99, float("nan")]
)
@pytest.mark.parametrize(("kind", "name", "option"), OPTIONS)
def test_no_option_of_an_installed_plugin_takes_a_path_from_a_document(
    kind: str, name: str, option: str, value: Any
) -> None:
    with pytest.raises(MnemoscopeError):
        plugins.document_options(
            kind, name, {option: value, **({"sha256": "0" * 64} if name == "sscd" and option != "sha256" else {})}
        )


def test_numbers_and_switches_are_taken() -> None:
    assert plugins.document_options("detector", "magnitude", {"steps": [2, 5]}) == {"steps": [2, 5]}
    assert plugins.document_options("descriptor", "pixels", {"side": 8}) == {"side": 8}
    assert plugins.document_options("descriptor", "fingerprint", {"weights": None}) == {"weights": None}
    options = {"descriptor": "pixels", "near": 0.9, "count": "clique", "descriptor_options": {"side": 8}}
    assert plugins.document_options("detector", "density", options) == options
    assert plugins.document_options("descriptor", "sscd", {"preset": "authors-288"})["weights"] == "mixup-int8"


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(UnknownName, match="magnitude"):
        plugins.document_options("detector", "magnitud", {})
    with pytest.raises(UnknownName, match="steps"):
        plugins.document_options("detector", "magnitude", {"step": 1})
    with pytest.raises(UnknownName, match="preset"):
        plugins.document_options("descriptor", "sscd", {"preset": "authors-289"})


def test_a_value_that_a_document_must_not_choose_is_named_with_the_cure() -> None:
    with pytest.raises(
        UsageError, match="chooses weights of the descriptor fingerprint, and is trusted with numbers and switches only"
    ):
        plugins.document_options("descriptor", "fingerprint", {"weights": "x.safetensors"})


def test_a_program_that_the_reader_allowed_stands_for_the_one_that_is_named(tmp_path: Any) -> None:
    file = tmp_path / "mine.pt"
    file.write_bytes(b"a program")
    with pytest.raises(UsageError, match="compare it with what its publisher states"):
        programs.allow_program(file, "0" * 64)
    sha256 = hashlib.sha256(b"a program").hexdigest()
    programs.allow_program(file, sha256.upper())
    options = plugins.document_options("descriptor", "sscd", {"weights": "/nowhere.pt", "sha256": sha256})
    assert options == {"weights": str(file), "preset": "authors-320", "sha256": sha256}
