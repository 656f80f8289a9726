"""Documents of strangers that name a program, a model, or a file elsewhere: nothing of it runs, and nothing of it is opened.

The program here is a TorchScript network that leaves a file behind as soon as it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnemoscope import programs
from mnemoscope.similarity.pixels import Pixels

RAN = "ran"


class Program(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trace = torch.from_file(self.path, True, 4, dtype=torch.uint8)
        trace.copy_(torch.tensor([114, 97, 110, 10], dtype=torch.uint8))
        return torch.ones([x.size(0), 48], dtype=torch.float32) * trace[0].float()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures, prompts, and the program p.pt; no program is allowed afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "_ALLOWED", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Program(str(tmp_path / RAN))).save("p.pt")
    Path("pictures").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{i}.png")
    Path("prompts.txt").write_text("a red apple\n")
    return tmp_path


def sha256() -> str:
    return hashlib.sha256(Path("p.pt").read_bytes()).hexdigest()


def name_the_program(file: Path, *keys: str | int) -> None:
    """Write the program and its own hash into a JSON document, as the descriptor options at these keys."""
    document = json.loads(file.read_text())
    place = document
    for key in keys:
        place = place[key]
    place |= {"weights": "p.pt", "sha256": sha256()}
    file.write_text(json.dumps(document))


@pytest.fixture
def index(run, here: Path) -> Path:
    """An index that says it was made by the program."""
    assert (
        run("index", "build", "pictures", "--out", "index", "--descriptor", "pixels", "--descriptor-option", "side=4")[
            0
        ]
        == 0
    )
    manifest = json.loads(Path("index/manifest.json").read_text())
    identity = {"descriptor": "sscd", "weights": f"sha256:{sha256()}", "preprocessing": "authors-320"}
    name = f"sscd-{sha256()[:8]}/authors-320"
    manifest["descriptor"] = {"name": name, "identity": identity, "maker": "sscd", "options": {}}
    Path("index/manifest.json").write_text(json.dumps(manifest))
    name_the_program(Path("index/manifest.json"), "descriptor", "options")
    return here / "index"


@pytest.mark.parametrize(
    "words",
    [
        ("index", "query", "index", "pictures/0.png"),
        ("index", "build", "pictures", "--out", "index"),
        ("duplicates", "index"),
        ("audit", "demo", "--prompts", "prompts.txt", "--reference", "index", "--seeds", 1, "--steps", 2, "--out", "run"),
    ],
)  # fmt: skip
def test_an_index_does_not_choose_a_program(run, index, words):
    code, _, err = run(*words)
    assert code == 2
    assert f"the document asks for the program p.pt (TorchScript, SHA-256 {sha256()})" in err
    assert "--allow-program FILE=SHA256" in err
    assert not Path(RAN).exists()


def test_the_reader_may_allow_it_by_file_and_hash_wherever_the_document_says_it_lies(run, index):
    Path("mine.pt").write_bytes(Path("p.pt").read_bytes())
    Path("p.pt").write_bytes(b"what the document's path leads to is not looked at")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have another format
        hash_of_mine = hashlib.sha256(Path("mine.pt").read_bytes()).hexdigest()
        code, _, err = run("--allow-program", f"mine.pt={hash_of_mine}", "index", "query", "index", "pictures/0.png")
    assert (code, Path(RAN).exists()) == (0, True), err


def test_a_descriptor_of_another_length_is_a_sentence(run, index):
    """The manifest may claim a descriptor that gives vectors of another length."""
    manifest = json.loads(Path("index/manifest.json").read_text())
    manifest["descriptor"]["name"] = "pixels-16"
    manifest["descriptor"] |= {"identity": Pixels().identity(), "maker": "pixels", "options": {}}
    Path("index/manifest.json").write_text(json.dumps(manifest))
    code, _, err = run("index", "query", "index", "pictures/0.png")
    assert (code, "holds vectors of 48 numbers, and pixels-16 gives 768" in err) == (2, True), err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("p.pt", "cannot be read"),
        ("nowhere.pt=00", "the program nowhere.pt cannot be read"),
        ("p.pt=00", "and 00 was given; compare it with what its publisher states"),
    ],
)
def test_another_hash_allows_nothing(run, index, given, says):
    code, _, err = run("--allow-program", given, "index", "query", "index", "pictures/0.png")
    assert (code, says in err, Path(RAN).exists()) == (2, True, False), err


def density() -> str:
    options = f"{{weights: p.pt, sha256: {sha256()}}}"
    return f"detectors: [{{name: density, descriptor: sscd, descriptor_options: {options}}}]\n"


def test_a_configuration_does_not_choose_a_program(run, here):
    Path("c.yaml").write_text(
        "model: demo\nprompts: [a red apple]\nseeds: 2\nsteps: 2\nimages: true\nout: run\n" + density()
    )
    code, _, err = run("audit", "--config", "c.yaml")
    assert (code, "asks for the program p.pt" in err, Path(RAN).exists()) == (2, True, False), err
    code, _, err = run("audit", "--config", "c.yaml", "--trust-config")  # which is about files, not about programs
    assert (code, "asks for the program p.pt" in err, Path(RAN).exists()) == (2, True, False), err


def test_a_run_and_a_packet_do_not_choose_a_program(run, here):
    words = ("--detectors", "density", "--images", "--seeds", 2, "--steps", 2, "--out", "run")
    assert run("audit", "demo", "--prompts", "prompts.txt", *words)[0] == 0
    document = Path("run/run.json")
    manifest = json.loads(document.read_text())
    manifest["config"]["detectors"][0]["options"] = {"descriptor": "sscd", "descriptor_options": {}}
    document.write_text(json.dumps(manifest))
    name_the_program(document, "config", "detectors", 0, "options", "descriptor_options")
    assert run("pack", "run", "--out", "run.zip")[0] == 0
    for evidence in ("run", "run.zip"):
        code, _, err = run("replay", evidence, "--all")
        assert (code, "asks for the program p.pt" in err, Path(RAN).exists()) == (2, True, False), err


@pytest.mark.parametrize("words", [("replay",), ("regions",)])
@pytest.mark.parametrize("name", ["somebody/model", "/tmp/model", "model"])
def test_a_run_does_not_choose_what_is_opened(run, here, monkeypatch, words, name):
    assert run("audit", "demo", "--prompts", "prompts.txt", "--seeds", 1, "--steps", 2, "--out", "run")[0] == 0
    document = Path("run/run.json")
    manifest = json.loads(document.read_text())
    manifest["config"] |= {"model": name, "model_options": {"revision": "refs/pr/1", "cache_dir": "elsewhere"}}
    document.write_text(json.dumps(manifest))
    monkeypatch.setattr("mnemoscope.models.load.open_pipeline", lambda *_, **__: pytest.fail("opened"))
    code, _, err = run(*words, "run")
    assert code == 2
    assert f"run says that it was made with {name} with revision=refs/pr/1, cache_dir=elsewhere" in err
    assert "name the model yourself with --model" in err


def test_of_recorded_options_only_numbers_and_samplers_are_used(run, here):
    assert run("audit", "demo", "--prompts", "prompts.txt", "--seeds", 1, "--steps", 2, "--out", "run")[0] == 0
    document = Path("run/run.json")
    manifest = json.loads(document.read_text())
    manifest["config"]["model_options"] = {
        "sampler": "ddim",
        "lora": "/nowhere.safetensors",
        "cache_dir": "x",
        "token": "x",
    }
    document.write_text(json.dumps(manifest))
    code, out, err = run("replay", "run", "--all")
    assert (code, "1 the same" in out) == (0, True), err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("prompts: ../secret.txt", "names '../secret.txt' as prompts"),
        ("prompts: {path: /etc/hostname}", "names '/etc/hostname' as prompts"),
        ("prompts: link.txt", "names 'link.txt' as prompts"),
        ("prompts: .ssh/key", "names '.ssh/key' as prompts"),
        ("out: ../elsewhere", "names '../elsewhere' as out"),
        ("reference: ~/pictures", "names '~/pictures' as reference"),
        ("model: ../model", "names '../model' as model"),
        ("model_options: {lora: {/a.safetensors: 1.0}}", "names '/a.safetensors' as model_options.lora"),
        ("model_options: {token: secret}", "chooses the loader's option token"),
        ("model_options: {proxies: {https: 'http://elsewhere'}}", "chooses the loader's option proxies"),
        ("model_options: {cache_dir: x}", "chooses the loader's option cache_dir"),
        ("captions: sent/pipe", "names 'sent/pipe' as captions, which is neither a file nor a folder"),
        ("calibration: sent/pipe", "names 'sent/pipe' as calibration, which is neither a file nor a folder"),
    ],
)
def test_a_configuration_reads_and_writes_beside_itself_only(run, here, line, says):
    Path("secret.txt").write_text("secret\n")
    shutil.rmtree(".ssh", ignore_errors=True)
    sent = Path("work/sent")
    sent.mkdir(parents=True)
    work = Path("work").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        Path("link.txt").symlink_to("../secret.txt")
        Path(".ssh").mkdir()
        Path(".ssh/key").write_text("secret\n")
        os.mkfifo("sent/pipe")
        Path("sent/c.yaml").write_text(f"{line}\nseeds: 1\n")
        model = () if line.startswith("model:") else ("demo",)
        code, _, err = run("audit", *model, "--config", "sent/c.yaml", "--dry-run")
    assert (code, says in err, "--trust-config" in err) == (2, True, True), err


def test_a_configuration_names_files_beside_it_and_below_the_working_directory(run, here):
    Path("sent").mkdir()
    Path("sent/c.yaml").write_text("model: demo\nprompts: prompts.txt\nseeds: 1\nsteps: 2\nout: sent/run\n")
    assert run("audit", "--config", "sent/c.yaml")[0] == 0
    assert Path("sent/run/run.json").exists()
    # The reader's own word goes beyond that.
    Path("away").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("away")
        words = ("audit", "--config", "../sent/c.yaml", "--out", "../elsewhere", "--prompts", "../prompts.txt")
        assert run(*words)[0] == 0
        Path("../sent/c.yaml").write_text("model: demo\nprompts: ../prompts.txt\nseeds: 1\nsteps: 2\nout: ../third\n")
        assert run("audit", "--config", "../sent/c.yaml")[0] == 2
        assert run("audit", "--config", "../sent/c.yaml", "--trust-config")[0] == 0


def test_a_policy_reads_beside_itself_only(run, here):
    assert run("audit", "demo", "--prompts", "prompts.txt", "--seeds", 1, "--steps", 2, "--out", "run")[0] == 0
    Path("policies").mkdir()
    rule = "{name: leaks, metric: detect.magnitude.count, in: %s, max: 0}"
    for name in ("/etc/hostname", "../../secret.txt"):
        Path("policies/p.yaml").write_text(f"version: 1\nrules: [{rule % name}]\n")
        code, _, err = run("gate", "run", "--policy", "policies/p.yaml")
        assert (code, "lies outside of its folder" in err) == (2, True), err


def test_a_list_of_pictures_names_those_beside_it_only(run, here):
    Image.new("RGB", (8, 8)).save(here / "secret.png")
    Path("sent").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("sent")
        Path("pairs.jsonl").write_text('{"image": "../secret.png", "caption": "x"}\n')
        code, _, err = run("redteam", "demo", "--pairs", "pairs.jsonl", "--copy-threshold", 0.9)
    assert (code, "lies outside of its folder" in err) == (2, True), err


def test_a_packet_with_a_foreign_model_is_not_opened(run, here):
    assert run("audit", "demo", "--prompts", "prompts.txt", "--seeds", 1, "--steps", 2, "--out", "run")[0] == 0
    document = Path("run/run.json")
    manifest = json.loads(document.read_text())
    manifest["config"]["model"] = "somebody/model"
    document.write_text(json.dumps(manifest))
    assert run("pack", "run", "--out", "run.zip")[0] == 0
    assert zipfile.is_zipfile("run.zip")
    code, _, err = run("replay", "run.zip")
    assert (code, "made with somebody/model" in err) == (2, True), err


@pytest.mark.parametrize(
    "line",
    [
        "prompts: {path: !!binary L2V0Yy9ob3N0bmFtZQ==}",
        "out: !!binary L3RtcC94",
        "out: !!timestamp 2024-01-01",
        "model_options: {lora: !!set {? /a}}",
    ],
)
def test_a_configuration_holds_plain_values_only(run, here, line):
    Path("c.yaml").write_text(f"{line}\nseeds: 1\n")
    for trust in ((), ("--trust-config",)):
        code, _, err = run("audit", "demo", "--config", "c.yaml", "--dry-run", *trust)
        assert (code, "line 1 has a tag (!name); write a plain value" in err) == (2, True), err


def test_a_run_that_says_strange_things_of_its_model_and_seeds_ends_in_a_sentence(run, here):
    assert run("audit", "demo", "--prompts", "prompts.txt", "--seeds", 1, "--steps", 2, "--out", "run")[0] == 0
    document = Path("run/run.json")
    manifest = json.loads(document.read_text())
    manifest["config"] |= {"model": ["demo"], "seeds": 10**12}
    document.write_text(json.dumps(manifest))
    assert run("replay", "run")[0] == 2
    code, _, err = run("replay", "run", "--model", "demo", "--all")
    assert (code, "seeds is 1000000000000" in err) == (2, True), err


STRANGE = [
    [{}],
    [{"kind": "files", "prefix": 5}],
    [{"kind": "folder", "path": ["x"]}],
    [{"kind": "files", "x": "y"}],
]


@pytest.mark.parametrize("sources", STRANGE)
@pytest.mark.parametrize(
    "words", [("info", "index"), ("query", "index", "pictures/0.png"), ("locate", "index", "pictures")]
)
def test_an_index_with_strange_sources_is_a_sentence(run, here, words, sources):
    assert run("index", "build", "pictures", "--out", "index", "--descriptor", "pixels")[0] == 0
    document = Path("index/manifest.json")
    document.write_text(json.dumps(json.loads(document.read_text()) | {"sources": sources}))
    code, _, err = run("index", *words)
    assert (code, "sources" in err) == (2, True), err
