"""A folder of measured pictures as ``mnemoscope measure`` leaves it, made of nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from mnemoscope.records.measures import draw_file, target_file

PRESET = {"name": "improved", "updates": 300, "steps": 16, "scales": [1.0, 3.0], "draws": 8}
REQUEST: dict[str, Any] = {
    "target": {"name": "tiny", "source": "/models/tiny", "fingerprint": "0123456789abcdef", "dtype": "float32"},
    "preset": PRESET,
    "descriptor": {"descriptor": "fingerprint"},
    "beta": 0.85,
    "guidance": 3.0,
    "command": "mnemoscope measure tiny pictures",
    "versions": {"mnemoscope": "0.1.0"},
    "started": "2026-03-01T10:00:00+00:00",
}
CURVE = [[50, 0.09, 1.0, 0.02, 0.3], [100, 0.05, 0.5, 0.05, 0.6], [150, 0.04, 0.4, 0.04, 0.91]]


def reproduced(score: float, **changes: Any) -> dict[str, Any]:
    """A result of a picture that came back."""
    found = {
        "preset": "improved", "passed": True, "score": score, "nats": 768 * score, "paid": score, "similarity": 0.91, "loss": 0.04,
        "prompt": "given", "scale": 3.0, "update": 150, "succeeded": [31, 32], "rate": [0.97, 0.84, 1.0], "at_least": 0.012,
        "forwards": 4000, "backwards": 2400, "curve": CURVE,
    }  # fmt: skip
    return found | changes


def censored(paid: float, **changes: Any) -> dict[str, Any]:
    """A result of a picture that did not."""
    nothing = {
        "passed": False,
        "score": None,
        "nats": None,
        "paid": paid,
        "similarity": 0.42,
        "scale": None,
        "update": 300,
    }
    return reproduced(paid) | nothing | {"succeeded": None, "rate": None, "at_least": None} | changes


def write(folder: Path, entries: dict[str, dict[str, Any]], **changes: Any) -> Path:
    """A folder with these pictures by id; each has ``result`` and may have ``image``, ``caption``, ``companions``, ``status``."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "measure.json").write_text(json.dumps(REQUEST | {"asked": list(entries)} | changes), encoding="utf-8")
    for i, (name, entry) in enumerate(entries.items()):
        kept = {"id": name, "image": f"{name}.png", "caption": None} | entry
        (folder / "pictures" / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
        color = (40 * i % 255, 120, 200)
        Image.new("RGB", (16, 16), color).save(folder / target_file(name))
        if entry["result"] is not None:
            for k in range(4):
                Image.new("RGB", (16, 16), color).save(folder / draw_file(name, k))
    return folder
