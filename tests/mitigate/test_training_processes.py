"""Two processes under accelerate are one: the same gradients as a single process on the whole batch, and no deadlock."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


def single() -> dict:
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train(lambda model: model, lambda loss: loss.backward(), 0, 1)


def test_two_processes_train_as_one(tmp_path, ranks):
    pytest.importorskip("accelerate")
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), str(tmp_path / "state")],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for out, env in zip(outs, ranks, strict=True)
    ]
    try:
        ends = [process.communicate(timeout=240)[1] for process in running]  # a deadlock would wait for ever
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ends
    alone = single()
    for out in outs:
        found = json.loads(out.read_text())
        assert found.pop("processes") == 2
        assert found.pop("resumed") is True
        assert set(found) == set(alone)
        for what, values in alone.items():
            assert found[what] == pytest.approx(values, rel=1e-5, abs=1e-7), what
    assert alone["kept: nobody keeps any"] == [0, 0, 0]
    assert alone["kept: one rank keeps none"][-1] == 2
    assert alone["kept: one rank keeps none"] != alone["batch: one rank keeps none"]
