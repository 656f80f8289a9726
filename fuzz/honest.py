"""What is altered: small documents of every kind, made by the commands themselves, each when the first kind asks for it."""

from __future__ import annotations

import json
import random
from functools import cached_property
from pathlib import Path

from .children import Child, run

SEEDS, STEPS = 2, 4
PROMPTS = (4, 2)
"""Of pictures that the bundled model has seen most often, and never."""

ORDINARY = 12
FALSE_POSITIVES = 0.2
LOGGED = 16
SIDE = 64
PICTURES = 6

POLICY = """\
version: 1
requires: {prompts: ">= 4", seeds: ">= 2", status: done, calibrated: true}
rules:
  - {name: few copies, metric: copies.share, max: 0.9, level: fail}
  - {name: known leaks, metric: copies.count, in: leaks.jsonl, max: 4, level: fail}
  - {name: suspicious prompts, metric: detect.magnitude.share, max: 0.9, level: warn}
waivers:
  - {id: 9f2c, why: "public-domain logo", by: release-team, until: 2099-03-01}
"""

CONFIG = """\
model: demo
prompts: {items: [a red apple, a blue bird], column: null}
seeds: 2
steps: 4
guidance: 3.0
detectors: [{name: magnitude, steps: 2}]
batch_size: auto
images: false
seed_mode: shared
controls: [title-case]
max_errors: 20
notes: [a note]
measure_preset: {name: improved, updates: 10}
out: out
"""


class Honest:
    """The originals below one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _made(self, *words: object) -> str:
        outcome = run(self.folder, *words, cpu_seconds=120)
        if outcome.code != 0:
            raise RuntimeError(
                f"mnemoscope {' '.join(map(str, words))}: exit code {outcome.code}\n{outcome.err[-3000:]}"
            )
        return outcome.out

    @cached_property
    def pictures(self) -> Path:
        """A folder of captioned pictures."""
        from PIL import Image

        folder = self.folder / "pictures"
        folder.mkdir()
        for i in range(PICTURES):
            small = Image.frombytes("RGB", (4, 4), random.Random(i).randbytes(48))
            small.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(folder / f"p{i}.png")
        lines = [json.dumps({"file_name": f"p{i}.png", "text": f"picture {i} of dots"}) for i in range(PICTURES)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    @cached_property
    def encoded(self) -> dict[str, bytes]:
        """One picture in every format that is read."""
        import io

        from PIL import Image

        with Image.open(self.pictures / "p0.png") as opened:
            image = opened.convert("RGB")
        found = {}
        ways: dict[str, dict[str, object]] = {
            "png": {}, "jpeg": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}, "webp": {},
            "gif": {"save_all": True, "append_images": [image.rotate(90)]}, "tiff": {"compression": "tiff_lzw"}, "bmp": {},
        }  # fmt: skip
        for name, options in ways.items():
            kept = io.BytesIO()
            image.save(kept, name, **options)
            found[name] = kept.getvalue()
        return found

    @cached_property
    def index(self) -> Path:
        """A reference set."""
        self._made("index", "build", self.pictures, "--out", "index")
        return self.folder / "index"

    @cached_property
    def nearest(self) -> list[tuple[str, float]]:
        """What the index answers for its second picture."""
        out = self._made("index", "query", self.index, self.pictures / "p1.png", "--json")
        return [(m["reference"], m["similarity"]) for m in json.loads(out)["pictures"][0]["nearest"]]

    @cached_property
    def prompts(self) -> Path:
        """A list of prompts with labels."""
        from mnemoscope.demo.world import World

        world = World()
        known, unknown = PROMPTS
        chosen = [("planted", c) for c in world.captions("planted")[-known:]]
        chosen += [("heldout", c) for c in world.captions("heldout")[:unknown]]
        lines = [{"id": c.id, "prompt": c.caption, "group": name, "label": name == "planted"} for name, c in chosen]
        file = self.folder / "prompts.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        ordinary = [c.caption for c in world.captions("ordinary")[:ORDINARY]]
        (self.folder / "ordinary.txt").write_text("\n".join(ordinary) + "\n")
        return file

    @cached_property
    def calibration(self) -> Path:
        """A run that has made a threshold."""
        prompts = self.prompts.with_name("ordinary.txt")
        setting = ("--seeds", SEEDS, "--steps", STEPS)
        self._made(
            "calibrate", "demo", "--prompts", prompts, *setting, "--fpr", FALSE_POSITIVES, "--out", "calibration"
        )
        return self.folder / "calibration"

    @cached_property
    def run(self) -> Path:
        """A calibrated run with pictures, labels and copies."""
        chosen = ("--prompts", self.prompts, "--calibration", self.calibration, "--images")
        self._made("audit", "demo", *chosen, "--seeds", SEEDS, "--steps", STEPS, "--out", "run")
        return self.folder / "run"

    @property
    def samples(self) -> int:
        """Rows of that run."""
        return sum(PROMPTS) * SEEDS

    @cached_property
    def packet(self) -> Path:
        """The run as a packet."""
        self._made("pack", self.run, "--out", "packet.zip")
        return self.folder / "packet.zip"

    @cached_property
    def noted(self) -> str:
        """The digest of the packet."""
        return str(json.loads(self._made("verify", self.packet, "--json"))["digest"])

    @property
    def measured(self) -> list[Path]:
        """Pictures that are measured."""
        return [self.pictures / f"p{i}.png" for i in range(2)]

    @cached_property
    def measure(self) -> Path:
        """A folder of measured pictures."""
        brief = ("--updates", 2, "--steps", 2, "--beta", 0.0, "--caption", "dots", "--with", "denoising-loss")
        self._made("measure", self.model, *self.measured, *brief, "--out", "measure")
        return self.folder / "measure"

    @cached_property
    def policy(self) -> Path:
        """A policy, with the list that it names."""
        (self.folder / "leaks.jsonl").write_bytes(self.prompts.read_bytes())
        file = self.folder / "policy.yaml"
        file.write_text(POLICY)
        return file

    @cached_property
    def config(self) -> Path:
        """A configuration of an audit."""
        file = self.folder / "config.yaml"
        file.write_text(CONFIG)
        return file

    @cached_property
    def model(self) -> Path:
        """A model with few weights, made in a process of its own: threads of torch would not survive a fork."""
        outcome = Child(lambda: save_small_model(self.folder / "model"), self.folder).wait()
        if outcome.code != 0:
            raise RuntimeError(outcome.err[-3000:])
        return self.folder / "model"

    @cached_property
    def thresholds(self) -> Path:
        """A threshold of the small model."""
        prompts = self.prompts.with_name("ordinary.txt")
        setting = ("--seeds", 1, "--steps", 2)
        self._made("calibrate", self.model, "--prompts", prompts, *setting, "--fpr", FALSE_POSITIVES, "--out", "small")
        return self.folder / "small" / "thresholds.json"

    @cached_property
    def log(self) -> Path:
        """What a guard has logged of the small model."""
        outcome = Child(lambda: write_log(self.model, self.folder / "guard.jsonl"), self.folder).wait()
        if outcome.code != 0:
            raise RuntimeError(outcome.err[-3000:])
        return self.folder / "guard.jsonl"

    @cached_property
    def lora(self) -> Path:
        """A LoRA of the small model."""
        brief = ("--lora", 2, "--steps", 1, "--batch-size", 2, "--save-every", 1)
        self._made("train", self.model, self.pictures, *brief, "--out", "trained")
        return next(p for p in sorted((self.folder / "trained").rglob("*.safetensors")) if "lora" in p.name)


def save_small_model(folder: Path) -> None:
    """Save a text-to-image model of random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from mnemoscope.models.load import open_pipeline

    bundled = open_pipeline("demo")[0]
    torch.manual_seed(0)
    text = CLIPTextConfig(**bundled.text_encoder.config.to_dict() | {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16,
    })  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=bundled.tokenizer, unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)


def write_log(model: Path, file: Path) -> None:
    """Draw a few pictures behind a guard."""
    import torch

    import mnemoscope
    from mnemoscope.models.load import open_pipeline

    pipe = open_pipeline(str(model))[0]
    with file.open("w", encoding="utf-8") as lines:
        guarded = mnemoscope.guard(pipe, 1e9, log=lines)
        for seed in range(LOGGED):
            chance = torch.Generator().manual_seed(seed)
            guarded(f"a cat {seed}", num_inference_steps=2, generator=chance, output_type="latent")
