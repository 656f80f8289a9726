"""The command line: what a person types, what it prints, and how it ends."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mnemoscope
from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.run import Progress
from mnemoscope.cli import main as cli
from mnemoscope.cli import screen
from mnemoscope.cli.pairs import model_options

COMMANDS = [
    "demo",
    "check",
    "explain",
    "audit",
    "calibrate",
    "report",
    "ls",
    "doctor",
    "gate",
    "index",
    "duplicates",
    "view",
]


@pytest.mark.parametrize(
    "module",
    ["mnemoscope", "mnemoscope.records.store", "mnemoscope.stats", "mnemoscope.report.html", "mnemoscope.cli.main"],
)
def test_opens_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_module_of_the_working_directory_is_imported(tmp_path):
    (tmp_path / "typer.py").write_text("open('ran', 'w')")
    done = subprocess.run([sys.executable, "-m", "mnemoscope", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert "Quick start: mnemoscope demo" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert "Quick start: mnemoscope demo" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_runs_it(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: mnemoscope {command}" in out


def test_options_are_the_names_of_the_configuration():
    columns = {"column", "id_column", "group_column", "label_column", "family_column", "swap_column"}
    renamed = {"window", "model_option", "lora"}  # an option of the magnitude; what is handed to the loader
    fields = set(AuditConfig.model_fields) - {"model_options"}
    assert cli.AUDIT_OPTIONS - columns - renamed == fields


def test_lora_files_and_their_scales():
    found = model_options(["revision=main"], ["a.safetensors", "b.safetensors=0.5", "c=d.safetensors"])
    assert found == {"revision": "main", "lora": {"a.safetensors": 1.0, "b.safetensors": 0.5, "c=d.safetensors": 1.0}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["adit"], "No such command 'adit'"),
        (["audit", "demo", "--promts", "x"], "No such option: --promts"),
        (["check", "demo"], "Missing argument 'prompt'"),
        (["ls", "detectrs"], "no list named 'detectrs'. Did you mean 'detectors'?"),
        (["ls", "prompts", "--group", "plantd"], "Did you mean 'planted'?"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["report", "nowhere", "--format", "pdf"], "no report format named 'pdf'"),
        (["audit", "demo", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (
            ["audit", "demo", "--prompts", "x.txt", "--seeds", "0"],
            "'--seeds': it is '0', and must be a whole number from 1",
        ),
        (["audit", "demo", "--prompts", "x.txt", "--model-option", "revision"], "write name=value"),
        (["audit", "demo", "--prompts", "x.txt", "--lora", "a", "--model-option", "lora=b"], "both name a LoRA"),
        (["audit", "nowhere/model.safetensors", "--prompts", "x.txt"], "check the path"),
        (["audit", "model.ckpt", "--prompts", "x.txt"], "safetensors"),
        (["audit", "demo", "--prompts", "x.txt", "--dtype", "float12"], "float32"),
        (["audit", "demo", "--prompts", "x.txt", "--detectors", "magnitud"], "Did you mean 'magnitude'?"),
        (["calibrate", "demo", "--prompts", "x.txt", "--detectors", "magnitud"], "Did you mean 'magnitude'?"),
        (["calibrate", "demo", "--prompts", "x.txt", "--fresh"], "--fresh needs --out"),
        (
            ["audit", "demo", "--prompts", "x.txt", "--window", "0"],
            "'--window': it is '0', and must be a whole number from 1 to 1000",
        ),
        (["check", "demo", "x", "--calibration", "nothing"], "nothing holds no thresholds.json"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_2(run, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a red apple\n")
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    (tmp_path / "nothing").mkdir()
    code, out, err = run(*words)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""


def test_unknown_setting_in_yaml_gets_a_suggestion(run, tmp_path):
    (tmp_path / "audit.yaml").write_text("model: demo\nprompts: x.txt\nguidence: 3\n")
    code, _, err = run("audit", "--config", tmp_path / "audit.yaml")
    assert code == 2
    assert "Did you mean 'guidance'?" in err


def test_ls_and_doctor_print_json(run):
    found = json.loads(run("ls", "detectors", "--json")[1])
    assert {
        "name": "magnitude",
        "needs": "text, guidance above 1",
        "costs": "1 forward per sample, 1 per seed",
        "package": "mnemoscope",
        "from": "mnemoscope.detect.magnitude:Magnitude",
    } in found
    prompts = json.loads(run("ls", "prompts", "--group", "planted", "--json")[1])
    assert len(prompts) == 120
    facts = json.loads(run("doctor", "--json")[1])
    assert "text-to-image" in facts["bundled models"]
    assert "torch" in facts


PLUGINS = """
class Backward:
    needs = frozenset({"grad", "patience"})
    costs = "a backward pass per step"

class Long:
    needs = frozenset({"uncond"})
    steps_needed = 10

class Own:
    needs = frozenset()
    def __init__(self, reference): ...
    @property
    def steps_needed(self): ...
"""


def test_plugins_say_what_they_need_and_cost(run, tmp_path, monkeypatch):
    (tmp_path / "some_plugins.py").write_text(PLUGINS)
    package = tmp_path / "some_plugins-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugins\nVersion: 1.0\n")
    entries = "".join(f"{name.lower()} = some_plugins:{name}\n" for name in ("Backward", "Long", "Own", "Missing"))
    (package / "entry_points.txt").write_text(f"[mnemoscope.detectors]\n{entries}")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run("ls", "detectors", "--json")
    assert code == 0
    found = {d["name"]: (d["needs"], d["costs"]) for d in json.loads(out) if d["package"] == "some-plugins"}
    assert found.pop("missing")[0].startswith("cannot be loaded (AttributeError: ")
    assert found == {
        "backward": ("gradients, patience", "a backward pass per step"),
        "long": ("text, guidance above 1", "19 forwards per sample, 1 per seed"),
        "own": ("nothing", "by its options"),
    }


def test_logs_come_on_request(run):
    assert run("ls", "targets")[2] == ""
    assert "INFO mnemoscope.cli.main: mnemoscope -v ls targets\n" in run("-v", "ls", "targets")[2]
    assert "Traceback" not in run("-v", "report", "nowhere")[2]
    code, out, err = run("-vv", "report", "nowhere")
    assert (code, out) == (2, "")
    assert re.search(r"DEBUG mnemoscope\.cli\.main: .*\nTraceback", err)
    assert err.splitlines()[-1].startswith("mnemoscope: nowhere holds no run")


@pytest.mark.parametrize("value", ["1", "0"])
def test_debugging_is_a_switch(run, monkeypatch, value):
    monkeypatch.setenv("MNEMOSCOPE_DEBUG", value)
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "report", "nowhere"])
    with pytest.raises(mnemoscope.MnemoscopeError if value == "1" else SystemExit):
        cli.main()


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_honored(run, monkeypatch, capsys, no_color):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with screen.progress("audit") as update:
        update(Progress(done=1, asked=2, errors=0, hits=0, seconds=1.0, eta=1.0))
    out, err = capsys.readouterr()
    assert "audit" in err
    assert bool(re.search(r"\x1b\[[\d;]*(3\d|9\d)[\d;]*m", err)) is not no_color
    out = run("ls", "targets")[1]
    assert "\t" not in out
    assert "stable-diffusion  mnemoscope" in out
    assert not re.search(r"\x1b\[[\d;]*(3\d|9\d)[\d;]*m", out)


def test_piped_tables_are_tab_separated(run):
    lines = run("ls", "targets")[1].splitlines()
    assert lines[0] == "name\tpackage\tfrom"
    assert any(line.startswith("stable-diffusion\t") for line in lines)
    assert not any("\x1b" in line for line in lines)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red apple\na blue car\n\n" + "very " * 200 + "long prompt\n", encoding="utf-8")
    return file


def test_audit_from_the_command_line(run, tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["audit", "demo", "--prompts", prompts, "--seeds", 2, "--out", "runs/a", "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    first = json.loads(out)
    assert first["prompts"] == 3
    assert first["rows"] == 6
    assert "3 prompts were scored" in first["headline"]
    assert any(s.startswith("1 prompt has more tokens than the encoder can see") for s in first["not_tested"])
    # The report is written all the same, and stderr says where; stdout is one document.
    assert "Run: runs/a   Report: runs/a/report.html\n" in err
    assert (tmp_path / "runs/a/report.html").is_file()
    # Scores are those of the method, prompt by prompt, and the worst comes first. The file's empty line is no prompt.
    target = mnemoscope.load("demo")
    scores = {f["prompt"]: f["score"] for f in first["worst"]}
    expected = {text: mnemoscope.check(target, text, seeds=2).score for text in scores}
    assert scores == pytest.approx(expected, rel=1e-4)
    assert len(set(scores.values())) == 3
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    # The same command continues: nothing is left to do, and nothing changes.
    rows = (tmp_path / "runs/a/samples.jsonl").read_bytes()
    code, out, _ = run(*words)
    assert code == 0
    assert json.loads(out)["worst"] == first["worst"]
    assert (tmp_path / "runs/a/samples.jsonl").read_bytes() == rows
    # Other settings are refused by name, and --fresh takes a new folder.
    code, out, err = run(*words[:-1], "--guidance", 5)
    assert (code, "guidance" in err) == (2, True)
    # Without --json the same is said in words, with a table that is tab-separated when piped.
    code, out, _ = run(*words[:-1])
    assert code == 0
    assert "\nscore\tp\tcopies\tprompt\tnearest\n" in out
    assert out.endswith("\nRun: runs/a   Report: runs/a/report.html\n")
    code, _, _ = run(*words, "--guidance", 5, "--fresh")
    assert (code, (tmp_path / "runs/a-2/run.json").is_file()) == (0, True)
    # Reports are written from the folder alone.
    code, out, _ = run("report", "runs/a", "--format", "markdown")
    assert code == 0
    assert "a red apple" in (tmp_path / out.strip()).read_text(encoding="utf-8")


def test_calibrate_then_audit(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captions = [r["caption"] for r in json.loads(run("ls", "prompts", "--group", "ordinary", "--json")[1])]
    (tmp_path / "ordinary.txt").write_text("\n".join(captions[:60]), encoding="utf-8")
    code, out, err = run(
        "calibrate", "demo", "--prompts", "ordinary.txt", "--seeds", 1, "--fpr", 0.05, "--out", "runs/o"
    )
    assert code == 0, err
    assert "from 60 ordinary prompts" in out
    assert out.endswith("use it with: mnemoscope audit … --calibration runs/o\n")
    template = json.loads(run("ls", "prompts", "--group", "template", "--json")[1])
    worst = [r["caption"] for r in template if "card with" in r["caption"]][:40:8]
    (tmp_path / "p.txt").write_text("\n".join(worst), encoding="utf-8")
    words = ["audit", "demo", "--prompts", "p.txt", "--calibration", "runs/o", "--json"]
    code, out, err = run(*words, "--seeds", 1, "--out", "runs/p")
    assert code == 0, err
    assert json.loads(out)["above_threshold"]["k"] >= 3
    code, _, err = run(*words, "--seeds", 2, "--out", "runs/q")
    assert code == 2
    assert "seeds" in err


def test_calibrate_on_traffic(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traffic.txt").write_text("\n".join(f"prompt {i}" for i in range(30)), encoding="utf-8")
    words = ["calibrate", "demo", "--fpr", 0.1]
    own = ["--seeds", 1, "--seed-mode", "per-prompt"]
    code, out, err = run(*words, "--prompts", "traffic.txt", "--unlabelled", *own, "--out", "runs/t")
    assert code == 0, err
    assert "at 10 % alarms" in out
    assert "from 30 scores of unlabelled traffic" in out
    stored = json.loads((tmp_path / "runs/t/thresholds.json").read_bytes())
    assert "unlabelled traffic" in stored["source"]

    lines = [{"name": "", "score": s, "t": 981.0} for s in stored["scores"]]
    (tmp_path / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run(*words, "--from-log", "guard.jsonl")
    assert code == 0, err
    assert "Written to guard/thresholds.json; use it with: mnemoscope.guard(pipe, 'guard/thresholds.json')" in out
    logged = json.loads((tmp_path / "guard/thresholds.json").read_bytes())
    assert {k: logged[k] for k in logged if k != "source"} == {k: stored[k] for k in stored if k != "source"}
    code, _, err = run(*words, "--from-log", "guard.jsonl", "--steps", 25)
    assert (code, "start at t = 981, and 25 steps start at t = 961" in err) == (2, True)
    code, _, err = run(*words, "--from-log", "guard.jsonl", "--seeds", 1)
    assert (code, "leave out --prompts" in err) == (2, True)
    (tmp_path / "guard.jsonl").write_text(
        "".join(json.dumps({**line, "name": str(i % 2)}) + "\n" for i, line in enumerate(lines))
    )
    code, _, err = run(*words, "--from-log", "guard.jsonl")
    assert (code, "written by several guards (0, 1)" in err) == (2, True)


def test_several_detectors_are_calibrated_and_fresh_starts_over(run, tmp_path, official_wen, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(9)), encoding="utf-8")
    (tmp_path / "two.yaml").write_text("detectors: [magnitude, {name: magnitude, steps: 2, as: two}]\nprompts: p.txt\n")
    words = ["calibrate", official_wen / "model", "--seeds", 1, "--fpr", 0.1, "--out", "runs/o"]
    code, out, err = run(*words, "--config", "two.yaml")
    assert code == 0, err
    assert out.endswith("--calibration runs/o (for magnitude; for another: runs/o/thresholds-NAME.json)\n")
    files = {p.name: json.loads(p.read_bytes())["detector"] for p in (tmp_path / "runs/o").glob("thresholds*")}
    assert files == {"thresholds.json": "magnitude", "thresholds-two.json": "two"}
    # One detector is another request: refused, with the advice to start over, which works.
    words += ["--prompts", "p.txt", "--detectors", "magnitude", "--json"]
    code, _, err = run(*words)
    assert (code, "--fresh" in err) == (2, True)
    code, out, err = run(*words, "--fresh")
    assert code == 0, err
    assert json.loads(out).keys() == {"magnitude"}
    assert "Written to runs/o-2;" in err
    assert (tmp_path / "runs/o-2/thresholds.json").is_file()


def test_a_threshold_of_another_setting_is_used_only_if_accepted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["check", "demo", "a red apple", "--seeds", 2, "--json"]
    plain, accepted = (json.loads(run(*words, *more)[1]) for more in ([], ["--accept-threshold"]))
    assert (plain["threshold"], plain["accepted"]) == (None, [])
    assert accepted["threshold"] > 0
    assert "seeds: was 4, now 2" in accepted["accepted"]
    assert "of a calibration made under another setting (" in accepted["words"]
    assert plain["score"] == accepted["score"]


def test_dry_run_counts_forwards_and_writes_nothing(run, tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("audit", "demo", "--prompts", prompts, "--seeds", 4, "--dry-run")
    assert code == 0
    assert "3 prompts × 4 seeds = 12 samples, 16 denoiser forwards" in out
    assert list(tmp_path.iterdir()) == []


def test_a_share_is_planned_as_it_is_run_and_a_window_keeps_the_detectors_of_the_file(
    run, tmp_path, official_wen, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    (tmp_path / "audit.yaml").write_text("prompts: p.txt\nseeds: 2\ndetectors: [{name: magnitude, as: lead}]\n")
    words = ["audit", official_wen / "model", "--config", "audit.yaml", "--window", 2, "--out", "runs/a"]
    planned = 0
    for share in ("0/2", "1/2"):
        code, out, err = run(*words, "--shard", share, "--dry-run", "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["settings"]["detectors"] == [{"name": "magnitude", "options": {"steps": 2}, "as": "lead"}]
        planned += found["plan"]["samples"]
        before = rows(tmp_path / "runs/a")
        run(*words, "--shard", share)
        done = rows(tmp_path / "runs/a")[len(before) :]
        assert found["plan"]["samples"] == len(done) < 6
        # Two forwards a step; the first null prediction is shared by all prompts of a seed.
        assert found["plan"]["forwards"] == 3 * len(done) + len({r["seed"] for r in done})
    assert planned == 6
    assert all(r["scores"].keys() == {"lead"} for r in rows(tmp_path / "runs/a"))
    code, out, _ = run(*words, "--shard", "0/2", "--dry-run")
    assert f"3 prompts × 2 seeds = 6 samples, of which share 0/2 is {6 - len(done)}, " in out


def rows(folder: Path) -> list[dict]:
    """Rows of a run as they lie on disk, shard after shard."""
    lines = [line for f in sorted(folder.glob("samples*.jsonl")) for line in f.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts this in the background has it ignored
from mnemoscope.audit.batch import Examiner
from mnemoscope.cli.main import main
examine = Examiner.rows
Examiner.rows = lambda *batch: (time.sleep(0.1), examine(*batch))[1]
main()
"""


def test_ctrl_c_says_what_is_saved_and_the_same_command_continues(run, tmp_path, official_wen, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(40)), encoding="utf-8")
    words = ["-v", "audit", official_wen / "model", "--prompts", "p.txt", "--seeds", 2, "--batch-size", 1]
    words = [str(w) for w in (*words, "--out", "runs/a")]
    file = tmp_path / "runs/a/samples.jsonl"
    with subprocess.Popen([sys.executable, "-c", SLOW, *words], stdout=-1, stderr=-1, text=True) as process:
        deadline = time.monotonic() + 300
        while not file.exists() or file.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    saved = file.read_bytes()
    assert 3 <= saved.count(b"\n") < 80
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == (
        f"mnemoscope: stopped; {len(saved.splitlines())} of 80 samples are saved; the same command continues"
    )
    assert "Traceback" not in err
    code, _, err = run(*words)
    assert code == 0
    assert f"{80 - len(saved.splitlines())} of 80 samples to do" in err
    assert file.read_bytes().startswith(saved)
    assert len({r["id"] for r in rows(file.parent)}) == 80


def test_check_prints_score_words_and_pictures(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("check", "demo", "a red apple", "--steps", 4, "--images", "--out", "pictures", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["scores"]) == 4
    assert found["tokens"]
    assert len(list((tmp_path / "pictures").glob("*.webp"))) == 4
    assert "memorized" not in found["words"]
    code, out, _ = run("check", "demo", "")
    assert code == 0
    assert "score 0.000" in out


def test_offline_is_set_before_the_hub_is_imported():
    code = (
        "import sys; sys.argv = ['mnemoscope', '--offline', 'check', 'somebody/model', 'x']\n"
        "from mnemoscope.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cache" in done.stderr


def test_audit_against_a_reference_set(run, tmp_path, monkeypatch):
    """Pictures that a first audit made are found again by a second one that starts from the same noises."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a red apple\n", encoding="utf-8")
    words = ["audit", "demo", "--prompts", "one.txt", "--steps", 3, "--json"]
    assert run(*words, "--seeds", 1, "--images", "--out", "runs/a")[0] == 0
    code, _, err = run("index", "build", "runs/a/images", "--out", "refs")
    assert code == 0, err
    code, _, err = run(*words, "--seeds", 2, "--reference", "refs", "--out", "runs/b")
    assert code == 0, err
    same, other = sorted(mnemoscope.Run("runs/b").rows(), key=lambda row: row.seed)
    assert same.nearest.similarity == pytest.approx(1, abs=1e-3)
    assert other.nearest.similarity < same.nearest.similarity
    assert same.nearest.copy_found is None  # the set has no threshold of its own yet
    assert (tmp_path / "runs/b" / same.nearest.file).is_file()
    # A folder of few pictures serves as it is, with a threshold that is said.
    code, _, err = run(*words, "--seeds", 1, "--reference", "runs/a/images", "--out", "runs/c")
    assert (code, "mnemoscope index build" in err) == (0, True)
    (row,) = mnemoscope.Run("runs/c").rows()
    assert row.nearest.copy_found
    (tmp_path / "empty").mkdir()
    code, _, err = run(*words, "--reference", "empty", "--out", "runs/d")
    assert (code, "holds no index (no manifest.json); make one with `mnemoscope index build`" in err) == (2, True)
