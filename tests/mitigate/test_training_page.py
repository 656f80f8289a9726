"""docs/training.md is run: the loop on a tiny UNet, with LoRA, and a look at canaries in the middle of training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mnemoscope.mitigate.canaries import CanaryPlan, CanaryWatch
from mnemoscope.mitigate.training import MemorizationFilter
from mnemoscope.models.steer import frozen
from mnemoscope.records.canaries import Canary, Planted

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def surroundings(pipe, parameters=None):
    """What the page says is the reader's own."""
    unet = pipe.unet.train()

    def encode(prompts):
        ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.text_encoder(ids)[0]

    generator = torch.Generator().manual_seed(0)
    tokens = encode(["a cat", "two dogs", ""])
    batches = [(torch.randn(3, 4, 8, 8, generator=generator), tokens, torch.arange(3)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters or unet.parameters(), lr=0.1)
    return {
        "torch": torch,
        "unet": unet,
        "scheduler": pipe.scheduler,
        "encode": encode,
        "batches": batches,
        "optimizer": optimizer,
    }


def the_block() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return block


def test_the_loop_of_the_page_trains(build_pipe):
    block = the_block()
    assert len([line for line in block.splitlines() if line.strip()]) <= 13
    names = surroundings(build_pipe("sd"))
    before = [p.detach().clone() for p in names["unet"].parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(block, names)
    assert any(not torch.equal(a, b) for a, b in zip(before, names["unet"].parameters(), strict=True))
    assert names["kept"].weights.tolist() == [1, 1, 1]
    assert names["kept"].sizes[2] == 0


def test_lora_of_peft_is_filtered_as_it_is(build_pipe):
    peft = pytest.importorskip("peft")
    pipe = build_pipe("sd")
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    names = surroundings(pipe, trained)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(the_block(), names)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    x, t, tokens = torch.ones(1, 4, 8, 8), torch.tensor([500]), names["encode"](["a cat"])
    memory = MemorizationFilter.of_unet(pipe.unet, pipe.scheduler, names["encode"]([""]), 2.0)

    def size():
        with torch.no_grad():
            return float(memory(x, t, pipe.unet(x, t, tokens, return_dict=False)[0]).sizes)

    with_lora = size()
    with torch.no_grad():
        for p in trained:
            p.mul_(20)
    assert size() != pytest.approx(with_lora, rel=1e-3)


def test_looking_at_canaries_leaves_the_training_as_it_was(build_pipe, adapt):
    pipe = build_pipe("sd")
    pipe.unet.train()
    pipe.unet.conv_in.requires_grad_(False)
    before = [p.requires_grad for p in pipe.unet.parameters()]
    plan = CanaryPlan(Planted(rows=2, seed=0, canaries=[Canary(row=0, copies=0), Canary(row=1, copies=4)]))
    watch = CanaryWatch(
        plan, ["a cat", "two dogs"], copied=lambda images, rows: images.flatten(1).mean(1) > 2, seeds=1, steps=2
    )
    with frozen(pipe.unet):
        assert not watch.look(adapt(pipe), 10)
    assert [p.requires_grad for p in pipe.unet.parameters()] == before
    assert pipe.unet.training
    assert [level.copied for level in watch.history[0].levels] == [0, 0]


def test_names_on_the_page_exist():
    for module, names in re.findall(r"from (mnemoscope[\w.]*) import ([\w, ]+)", PAGE):
        exec(f"from {module} import {names}", {})
