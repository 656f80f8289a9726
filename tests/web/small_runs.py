"""Runs to look at: small ones and hostile ones made here, and ``synthetic_run`` of the report's tests beside them."""

from __future__ import annotations

from pathlib import Path

from mnemoscope.records.schema import Manifest, Nearest, Row, Score
from mnemoscope.records.store import Run, Writer

HOSTILE = {
    "tag": "<script>window.hit=1</script><img src=x onerror=window.hit=1>",
    "attribute": "\"><svg onload=window.hit=1><style>*{display:none}</style>'",
    "single": "' onfocus='window.hit=1' autofocus='",
    "template": "{{ 7*7 }} {% raw %} ${7*7}",
    "script end": "</script></style></title></textarea><base href=//evil.example>",
    "override": "\u202egnp.exe صورة",
    "nul": "nul \x00 escape \x1b[31m",
    "address": "javascript:window.hit=1",
    "path": "../../../etc/passwd",
    "long": "word " * 3000,
    "empty": "",
}
"""Prompts, ids, groups and notes that would like to be more than text."""


def row(prompt: str, seed: int = 0, score: float = 1.0, similarity: float | None = None, **changes: object) -> Row:
    """One sample that is ok, or what ``changes`` makes of it."""
    near = (
        None
        if similarity is None
        else Nearest(
            reference="17", similarity=similarity, descriptor="pixels", threshold=0.9, copy_found=similarity > 0.9
        )
    )
    facts = {
        "id": f"{prompt[:12]}-{seed}",
        "prompt_id": prompt[:12],
        "prompt": prompt,
        "seed": seed,
        "status": "ok",
        "scores": {"magnitude": Score(value=score, space="eps", per_step=[score, score / 2])},
        "nearest": near,
    }
    return Row(**(facts | changes))


def write(folder: Path, rows: list[Row], shard: int | None = None, **manifest: object) -> Run:
    """A run with these rows; where there is one, they are appended."""
    facts = {"status": "running", "asked": 100, "target": {"name": "tiny"}, "started": "2026-10-02T09:14:05+00:00"}
    run = Run.open(folder, Manifest(**(facts | manifest)))
    with Writer(run, shard) as out:
        out.append(rows)
    return run


def write_hostile(folder: Path) -> None:
    """One run in which everything that is text is hostile, the run's own name included."""
    rows = []
    for i, text in enumerate(HOSTILE.values()):
        near = Nearest(
            reference=text, similarity=0.95, descriptor=text or "d", threshold=0.9, copy_found=True, file=text
        )
        facts = {"id": f"{text[:200]}{i}", "prompt_id": text, "group": text, "note": text, "error": text}
        rows.append(row(text, nearest=near, image=text or None, **facts))
        rows.append(row(text, seed=1, status="error", scores={}, **{**facts, "id": f"{i}{text[:200]}"}))
    attack = HOSTILE["tag"].replace("/", "")  # a folder's name has no slash
    write(
        folder / f"{attack} #?&",
        rows,
        command=HOSTILE["tag"],
        notes=list(HOSTILE.values()),
        target={"name": HOSTILE["attribute"]},
        config={HOSTILE["tag"]: HOSTILE["attribute"]},
        setting={HOSTILE["tag"]: HOSTILE["single"]},
    )
