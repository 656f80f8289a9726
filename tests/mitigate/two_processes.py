"""One of the processes of a distributed training of a tiny model; writes what it saw to a file. Run by test_training_processes.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from mnemoscope.mitigate.timesteps import TimestepThresholds
from mnemoscope.mitigate.training import MemorizationFilter, per_sample
from mnemoscope.mitigate.visits import RunningScores

SHAPE = (2, 4, 4)
CASES = {
    "some": (0.1, 0.2, 0.3, -2.0),
    "one rank keeps none": (0.1, 0.2, 3.0, -2.0),
    "nobody keeps any": (9.0, 8.0, 7.0, 6.0),
}
"""Captions of a batch of four; τ keeps those below 0.5. The second of two processes gets the last two."""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, t: Tensor, tokens: Any) -> Tensor:
        return self.a * x + self.b * getattr(tokens, "tokens", tokens).mean((1, 2))[:, None, None, None]


def clean() -> TimestepThresholds:
    sizes = torch.linspace(0.5, 1.5, 40)
    return TimestepThresholds.fit(sizes, torch.zeros(40), ranges=1, drop=0.05)


def train(prepare: Any, backward: Any, rank: int, world: int) -> dict[str, Any]:
    """Gradients of one step for each case, then the running scores."""
    seen: dict[str, Any] = {}
    for over in ("kept", "batch"):
        model = prepare(Tiny())
        scores = RunningScores(4, clean())
        plain = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        memory = MemorizationFilter(plain, torch.zeros(1, 3, 5), 0.5 * 32**0.5, over=over, scores=scores)
        for name, values in CASES.items():
            generator = torch.Generator().manual_seed(0)
            x, noise = (torch.randn(4, *SHAPE, generator=generator) for _ in range(2))
            tokens, ids, t = torch.tensor(values).view(-1, 1, 1).expand(-1, 3, 5), torch.arange(4), torch.arange(4) * 10
            mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
            x, noise, tokens, ids, t = (v[mine] for v in (x, noise, tokens, ids, t))
            output = model(x, t, tokens)
            found = memory(x, t, output, cond=tokens, ids=ids)
            backward(found.mean(per_sample(output, noise)))
            seen[f"{over}: {name}"] = [float(p.grad) for p in plain.parameters()] + [float(found.kept)]
            model.zero_grad()
        seen[f"{over}: scores"] = scores.scores().tolist()
    return seen


if __name__ == "__main__":
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = train(accelerator.prepare, accelerator.backward, accelerator.process_index, accelerator.num_processes)
    memory = MemorizationFilter(Tiny(), torch.zeros(1, 3, 5), 2.0, scores=RunningScores(4, clean()))
    assert memory.scores is not None
    memory.scores.update(torch.arange(4), torch.linspace(0, 3, 4), torch.zeros(4))
    saved = memory.scores.scores().tolist()
    accelerator.register_for_checkpointing(memory)
    accelerator.save_state(sys.argv[2])
    memory.scores.update(torch.arange(4), torch.zeros(4), torch.zeros(4))
    accelerator.load_state(sys.argv[2])
    found["resumed"] = memory.scores.scores().tolist() == saved != [0, 0, 0, 0]
    found["processes"] = accelerator.num_processes
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(found, file)
    accelerator.end_training()
