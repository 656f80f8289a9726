"""The command line: what a person types, what it prints, and how it ends."""

import json
import subprocess
import sys

import pytest

from mnemoscope.audit.config import AuditConfig
from mnemoscope.cli import main as cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command in this process; gives exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnemoscope", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    monkeypatch.setattr(cli.screen, "QUIET", False)
    return call


COMMANDS = ["demo", "check", "audit", "calibrate", "report", "ls", "doctor"]


@pytest.mark.parametrize(
    "module",
    ["mnemoscope", "mnemoscope.records.store", "mnemoscope.stats", "mnemoscope.report.html", "mnemoscope.cli.main"],
)
def test_opens_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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
    columns = {"column", "id_column", "group_column", "label_column"}
    renamed = {"window", "model_option"}  # an option of the magnitude; name=value pairs of model_options
    fields = set(AuditConfig.model_fields) - {"model_options", "reference"}
    assert cli.AUDIT_OPTIONS - columns - renamed == fields


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
        (["audit", "demo", "--prompts", "x.txt", "--seeds", "0"], "seeds is 0"),
        (["audit", "demo", "--prompts", "x.txt", "--model-option", "revision"], "write name=value"),
        (["audit", "nowhere/model.safetensors", "--prompts", "x.txt"], "check the path"),
        (["audit", "model.ckpt", "--prompts", "x.txt"], "safetensors"),
        (["audit", "demo", "--prompts", "x.txt", "--dtype", "float12"], "float32"),
        (["audit", "demo", "--prompts", "x.txt", "--detectors", "magnitud"], "Did you mean 'magnitude'?"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_2(run, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a red apple\n")
    (tmp_path / "model.ckpt").write_bytes(b"PK")
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
    assert {"name": "magnitude", "package": "mnemoscope", "from": "mnemoscope.detect.magnitude:Magnitude"} in found
    prompts = json.loads(run("ls", "prompts", "--group", "planted", "--json")[1])
    assert len(prompts) == 120
    facts = json.loads(run("doctor", "--json")[1])
    assert "text-to-image" in facts["bundled models"]
    assert "torch" in facts


def test_piped_tables_are_tab_separated(run):
    lines = run("ls", "targets")[1].splitlines()
    assert lines[0] == "name\tpackage\tfrom"
    assert any(line.startswith("stable-diffusion\t") for line in lines)


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
    assert any("cut off" in s or "longer" in s or "token" in s for s in first["not_tested"])
    # The same command continues: nothing is left to do, and nothing changes.
    rows = (tmp_path / "runs/a/samples.jsonl").read_bytes()
    code, out, _ = run(*words)
    assert code == 0
    assert json.loads(out)["worst"] == first["worst"]
    assert (tmp_path / "runs/a/samples.jsonl").read_bytes() == rows
    # Other settings are refused by name, and --fresh takes a new folder.
    code, _, err = run(*words[:-1], "--guidance", 5)
    assert (code, "guidance" in err) == (2, True)
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
    template = json.loads(run("ls", "prompts", "--group", "template", "--json")[1])
    worst = [r["caption"] for r in template if "card with" in r["caption"]][:40:8]
    (tmp_path / "p.txt").write_text("\n".join(worst), encoding="utf-8")
    words = ["audit", "demo", "--prompts", "p.txt", "--calibration", "runs/o/thresholds.json", "--json"]
    code, out, err = run(*words, "--seeds", 1, "--out", "runs/p")
    assert code == 0, err
    assert json.loads(out)["above_threshold"]["k"] >= 3
    code, _, err = run(*words, "--seeds", 2, "--out", "runs/q")
    assert code == 2
    assert "seeds" in err


def test_dry_run_counts_forwards_and_writes_nothing(run, tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("audit", "demo", "--prompts", prompts, "--seeds", 4, "--dry-run")
    assert code == 0
    assert "3 prompts × 4 seeds = 12 samples, 16 denoiser forwards" in out
    assert list(tmp_path.iterdir()) == []


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
