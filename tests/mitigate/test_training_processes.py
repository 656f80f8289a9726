"""Two processes under accelerate are one: the same gradients as a single process on the whole batch, and no deadlock."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
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


def test_two_processes_train_as_one(tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), str(tmp_path / "state")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
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
