"""YAML = flags = keyword arguments, and sentences for what is not allowed."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from mnemoscope import plugins
from mnemoscope.audit.config import AuditConfig, DetectorSpec, PromptSource
from mnemoscope.audit.prompts import Prompt
from mnemoscope.errors import UnknownName, UsageError

YAML = """
model: demo
prompts: {path: prompts.jsonl, column: caption}
detectors: [magnitude, {name: magnitude, steps: 1, as: first_step}]
seeds: 2
guidance: 7.5
batch_size: auto
"""


def test_yaml_and_keywords_fill_the_same_object(tmp_path: Path) -> None:
    (tmp_path / "audit.yaml").write_text(YAML)
    from_file = AuditConfig.from_yaml(tmp_path / "audit.yaml")
    by_hand = AuditConfig(
        model="demo",
        prompts=PromptSource(path="prompts.jsonl", column="caption"),
        detectors=["magnitude", DetectorSpec(name="magnitude", options={"steps": 1}, alias="first_step")],
        seeds="2",
        guidance=7.5,
    )
    assert from_file == by_hand
    assert [d.label for d in from_file.detectors] == ["magnitude", "first_step"]
    assert AuditConfig(**from_file.stored()) == from_file


def test_flags_win_and_none_is_not_given(tmp_path: Path) -> None:
    (tmp_path / "audit.yaml").write_text(YAML)
    config = AuditConfig.from_yaml(tmp_path / "audit.yaml", seeds=8, guidance=None, prompts={"group_column": "kind"})
    assert (config.seeds, config.guidance) == (8, 7.5)
    assert config.prompts == PromptSource(path="prompts.jsonl", column="caption", group_column="kind")
    (tmp_path / "short.yaml").write_text("prompts: prompts.txt")
    short = AuditConfig.from_yaml(tmp_path / "short.yaml", prompts={"column": "caption"})
    assert short.prompts == PromptSource(path="prompts.txt", column="caption")
    (tmp_path / "empty.yaml").write_text("")
    assert AuditConfig.from_yaml(tmp_path / "empty.yaml") == AuditConfig()


def test_every_setting_says_what_it_means_and_what_it_may_be() -> None:
    for model in (AuditConfig, PromptSource, DetectorSpec):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert field.is_required() or field.json_schema_extra["allowed"], name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seeds": "four"}, "seeds is 'four', and must be a whole number from 1 to 100,000,000."),
        ({"seeds": 0}, "seeds is 0, and must be a whole number from 1 to 100,000,000."),
        ({"steps": 1.5}, "steps is 1.5, and must be a whole number from 1 to 1000."),
        ({"guidance": float("nan")}, "guidance is nan, and must be a number above 0 and at most 1000."),
        ({"batch_size": 0}, "batch_size is 0, and must be 'auto' or a whole number from 1 to 1,000,000,000."),
        ({"batch_size": "big"}, "batch_size is 'big', and must be 'auto' or a whole number from 1 to 1,000,000,000."),
        ({"max_errors": 1.5}, "max_errors is 1.5, and must be a count such as 20, or a share below 1 such as 0.05."),
        ({"seed_mode": "own"}, "seed_mode is 'own', and must be 'shared' or 'per-prompt'."),
        ({"images": "perhaps"}, "images is 'perhaps', and must be true or false."),
        ({"prompts": 3}, "prompts is 3, and must be a file, a list of prompts, or a mapping with a path and columns."),
        ({"prompts": {"path": 3}}, "prompts.path is 3, and must be the path of a prompt file."),
        ({"detectors": []}, "detectors is [], and must be a list of detector names, or mappings with a name."),
        ({"detectors": [3]}, "detectors is 3, and must be a list of detector names, or mappings with a name."),
        ({"detectors": [{"steps": 1}]}, "detectors.name is missing; write, for instance, `detectors.name: magnitude`."),
        (
            {"detectors": ["magnitude", "magnitude"]},
            "two detectors store their scores as 'magnitude'; give one of them another name with `as`.",
        ),
    ],
)
def test_what_is_not_allowed_is_one_sentence(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as e:
        AuditConfig(**given)
    assert str(e.value) == says


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seedz": 3}, "no setting named 'seedz'. Did you mean 'seeds'? Known: accept_threshold, base_seed, "),
        (
            {"prompts": {"path": "x", "id_colum": "c"}},
            "no setting of prompts named 'id_colum'. Did you mean 'id_column'?",
        ),
    ],
)
def test_unknown_settings_get_a_suggestion(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownName) as e:
        AuditConfig(**given)
    assert str(e.value).startswith(says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("seeds: [", "line 2 is not YAML: did not find"),
        ("- seeds", "holds list; write settings as `name: value`, one per line."),
        ("sedes: 3", "Did you mean 'seeds'?"),
        ("a: !!python/object:os.system x", "line 1 has a tag (!name)"),
        (b"\xff\xfe\xfa", "line 1 is no UTF-8"),
    ],
)
def test_damaged_yaml_is_one_sentence(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "audit.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as e:
        AuditConfig.from_yaml(path)
    assert says in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match="cannot be read"):
        AuditConfig.from_yaml(tmp_path / "nowhere.yaml")


def test_prompts_are_a_path_or_a_list_but_not_both() -> None:
    assert [p.text for p in PromptSource(items=["a", Prompt("x", "b")]).read()] == ["a", "b"]
    for source in (PromptSource(), PromptSource(path="a.txt", items=["a"])):
        with pytest.raises(UsageError, match="either a path or a list"):
            source.read()


def test_a_long_list_of_prompts_is_stored_as_its_hash() -> None:
    stored = AuditConfig(prompts=[f"prompt {i}" for i in range(1000)]).stored()["prompts"]
    assert stored["items"] == 1000
    assert len(str(stored)) < 100
    assert stored != AuditConfig(prompts=[f"prompt {-i}" for i in range(1000)]).stored()["prompts"]


def test_error_budget_is_a_count_or_a_share() -> None:
    assert AuditConfig(max_errors=3).error_budget(1000) == 3
    assert AuditConfig(max_errors=0.05).error_budget(1000) == 50
    assert AuditConfig(max_errors=0).error_budget(1000) == 0


class Fixed:
    """A plugin without a window."""


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**plugins.installed("detector"), "fixed": EntryPoint("fixed", f"{__name__}:Fixed", "mnemoscope.detectors")}
    monkeypatch.setattr(plugins, "installed", lambda kind: known)


def test_a_window_is_for_the_detectors_that_have_one(plugin: None) -> None:
    assert AuditConfig().with_window(3) == AuditConfig(detectors=[{"name": "magnitude", "steps": 3}])
    given = AuditConfig(detectors=["fixed", {"name": "magnitude", "steps": 9, "as": "lead"}], seeds=2)
    expected = AuditConfig(detectors=["fixed", {"name": "magnitude", "steps": 3, "as": "lead"}], seeds=2)
    assert given.with_window(3) == expected


@pytest.mark.parametrize(
    ("detectors", "says"),
    [
        (["fixed"], "window is 3, and fixed has no window of steps; leave --window out."),
        (
            ["magnitude", {"name": "magnitude", "steps": 9, "as": "lead"}],
            "window 3 would make the detectors magnitude and lead the same; set the steps of each in the config file, and leave "
            "--window out.",
        ),
        (["magnitud"], "no detector named 'magnitud'. Did you mean 'magnitude'?"),
    ],
)
def test_a_window_that_fits_nobody_is_refused(plugin: None, detectors: list[Any], says: str) -> None:
    with pytest.raises(UsageError) as e:
        AuditConfig(detectors=detectors).with_window(3)
    assert str(e.value).startswith(says)
