"""``mnemoscope gate`` from folders to exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import typer

from mnemoscope.cli import gate as command
from mnemoscope.cli import main as cli
from mnemoscope.detect.calibrate import Calibration
from mnemoscope.records import Manifest, Nearest, Row, Run, Score, sample_id
from mnemoscope.records.store import Writer, digest

SETTING = {"guidance": 7.5, "steps": 50}


def prompt_of(i: int) -> str:
    """Prompts of which no two are near-duplicates."""
    return digest(i)


def write_run(
    folder, n=59, copies=(), *, above=(), seeds=2, shard=None, calibrated=True, broken=(), prompts=None, **manifest
) -> Path:
    """A run of n prompts; of ``shard`` (k, m) only every m-th. ``prompts`` replaces the text of single ones."""
    facts = {"config": {"seeds": seeds, "prompts": {"path": "p.txt"}}, "setting": SETTING, "asked": n * seeds}
    k, m = shard or (0, 1)
    status = "done" if m == 1 else "incomplete"
    run = Run.open(folder, Manifest(**({"status": status} | facts | manifest)))
    rows = []
    for i in range(k, n, m):
        text = (prompts or {}).get(i, prompt_of(i))
        for seed in range(seeds):
            head = {
                "id": sample_id(text, seed, SETTING),
                "prompt_id": f"p{i}",
                "prompt": text,
                "seed": seed,
            }
            if i in broken:
                rows.append(Row(**head, status="error", error="ModelFault: NaN"))
                continue
            similarity = 0.95 if i in copies and seed == 0 else 0.5
            nearest = Nearest(
                reference="1", similarity=similarity, descriptor="pixels", threshold=0.9, copy_found=similarity > 0.9
            )
            score = Score(value=9.0 if i in above else 1.0, space="eps", per_step=[1.0])
            rows.append(Row(**head, status="ok", scores={"magnitude": score}, nearest=nearest))
    with Writer(run, None if shard is None else k) as writer:
        writer.append(rows)
    if calibrated:
        scores = [1 + i / 1000 for i in range(199)]
        made = Calibration.fit(scores, SETTING | {"seeds": seeds}, detector="magnitude", fpr=0.01)
        made.save(run.folder / "thresholds.json")
    return run.folder


POLICY = """
version: 1
requires: {prompts: ">= 59", seeds: ">= 2", calibrated: true}
rules:
  - {name: no copies, metric: copies.share, max_upper95: 0.05}
  - {name: suspicious, metric: detect.magnitude.share, max: 0.05, level: warn}
"""


@pytest.fixture
def gate(monkeypatch, capsys, tmp_path):
    """Call the command on an app of its own; gives exit code, stdout and stderr."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command.gate)
    app.command(name="other")(lambda: None)  # with one command alone, typer would drop its name
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(cli.screen, "QUIET", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(POLICY)

    def call(*words, policy="p.yaml"):
        monkeypatch.setattr(sys, "argv", ["mnemoscope", "gate", *map(str, words), "--policy", policy])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def test_a_clean_run_passes_and_everything_says_so(gate):
    write_run("runs/rc")
    code, out, err = gate("runs/rc", "--junit", "gate.xml", "--summary", "summary.md")
    assert code == 0, err
    assert out.splitlines()[0] == "status\tcheck\tresult"
    assert "rc passes all 6 checks." in out
    assert "no copy found among 59 prompts (95 % upper bound 4.95 %, allowed 5 %)" in out
    stored = json.loads(Path("runs/rc/gate.json").read_text(encoding="utf-8"))
    assert (stored["status"], stored["exit_code"], stored["headline"]) == ("pass", 0, "rc passes all 6 checks.")
    assert ET.parse("gate.xml").getroot().get("failures") == "0"
    assert "**rc passes all 6 checks.**" in Path("summary.md").read_text(encoding="utf-8")


def test_a_copy_fails_and_the_summary_is_appended_to(gate):
    write_run("runs/rc", copies=[3], above=range(20))
    Path("summary.md").write_text("# What an earlier step said\n")
    code, out, _ = gate("runs/rc", "--summary", "summary.md", "--out", "elsewhere/verdict.json", "--json")
    assert code == 1
    found = json.loads(out)
    assert found == json.loads(Path("elsewhere/verdict.json").read_text(encoding="utf-8"))
    checks = {check["name"]: check for check in found["checks"]}
    assert (checks["no copies"]["status"], checks["suspicious"]["status"]) == ("fail", "warn")
    (find,) = checks["no copies"]["finds"]
    assert (find["id"], "in 1 of 2 seeds" in find["words"]) == ("p3", True)
    page = Path("summary.md").read_text(encoding="utf-8")
    assert page.startswith("# What an earlier step said\n")
    assert "rc fails 1 of 6 checks: no copies" in page


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ({"n": 20}, "20 can never show 5 %: that takes 59"),
        ({"broken": [7]}, "the run is incomplete with 116 of 118 samples"),
        ({"asked": 500}, "118 of 500 samples"),
        ({"status": "running"}, "the run is running"),
        ({"calibrated": False}, "the run has no threshold"),
        ({"seeds": 1}, "1 seed is there"),
        ({"accepted": ["guidance: was 7.5, now 3"]}, "the threshold was made under another setting (guidance"),
    ],
)
def test_what_cannot_be_judged_is_no_pass(gate, made, sentence):
    write_run("runs/rc", **made)
    code, out, _ = gate("runs/rc")
    assert code == 3
    assert sentence in out
    assert "cannot be judged, which is no pass" in out


def test_shards_are_one_audit(gate):
    parts = [write_run(f"runs/rc-{k}", copies=[4], shard=(k, 3)) for k in range(3)]
    assert gate(*parts)[0] == 1
    for some in (parts[:2], parts[::2]):
        code, out, _ = gate(*some)
        assert code == 3
        assert "cannot be judged: the run is incomplete with" in out


def test_near_duplicate_prompts_are_one_case_unless_the_policy_knows_better(gate):
    write_run("runs/rc", n=60, prompts={1: prompt_of(0) + " photo", 2: prompt_of(0) + " print"})
    code, out, _ = gate("runs/rc")
    assert code == 3
    assert "58 clusters of 60 prompts" in out
    Path("p.yaml").write_text(POLICY + "clusters: none\n")
    assert gate("runs/rc")[0] == 0


def test_files_are_looked_for_beside_the_policy(gate):
    write_run("runs/rc", copies=[3, 4])
    write_run("policies/runs/v1", copies=[3])
    Path("policies/leaks.txt").write_text(prompt_of(3) + "\n" + prompt_of(5) + "\n")
    rules = """
version: 1
rules:
  - {name: leaks, metric: copies.count, in: leaks.txt, max: 0}
  - {name: not worse, metric: copies.count, baseline: runs/v1, max_increase: 0}
"""
    Path("policies/p.yaml").write_text(rules)
    code, out, _ = gate("runs/rc", "--json", policy="policies/p.yaml")
    assert code == 1
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert [find["id"] for find in checks["leaks"]["finds"]] == ["p3"]
    assert [find["id"] for find in checks["not worse"]["finds"]] == ["p4"]
    write_run("policies/runs/v2", seeds=1)
    Path("policies/p.yaml").write_text(rules.replace("runs/v1", "runs/v2").replace("max: 0", "max: 1"))
    code, out, _ = gate("runs/rc", policy="policies/p.yaml")
    assert code == 3
    assert "v2 was audited otherwise (seeds: was 1, now 2)" in out


def test_waivers_hold_until_they_end(gate):
    write_run("runs/rc", n=70, copies=[3])
    waiver = "waivers:\n  - {id: p3, why: a logo, by: me, until: %s}\n"
    Path("p.yaml").write_text(POLICY + waiver % "2999-01-01")
    code, out, _ = gate("runs/rc")
    assert code == 0
    assert "Waived: p3 by me until 2999-01-01: a logo." in out
    Path("p.yaml").write_text(POLICY + waiver % "2001-01-01")
    code, out, _ = gate("runs/rc")
    assert code == 1
    assert "the waiver of p3 by me until 2001-01-01: a logo has ended" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no run to judge"),
        (["nowhere"], "nowhere holds no run"),
        (["runs/rc", "runs/other"], "are no shards of one audit"),
        (["runs/ordinary"], "is a calibration"),
        (["runs/rc", "--summary", "runs"], "runs is a folder; name a file"),
        (["runs/rc", "--self-test", "--junit", "x.xml"], "--self-test"),
    ],
)
def test_a_wrong_command_is_exit_2(gate, words, sentence):
    write_run("runs/rc")
    write_run("runs/other", n=30)
    write_run("runs/ordinary", kind="calibrate")
    code, out, err = gate(*words)
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (POLICY.replace("max_upper95", "max_uper95"), "Did you mean 'max_upper95'?"),
        (
            POLICY.replace("detect.magnitude", "detect.magnitud"),
            "no score in this run named 'magnitud'. Did you mean 'magnitude'?",
        ),
        (POLICY.replace("max: 0.05", "max: 0, in: leaks.txt"), "leaks.txt does not exist"),
    ],
)
def test_a_wrong_policy_is_exit_2(gate, text, sentence):
    write_run("runs/rc")
    Path("p.yaml").write_text(text)
    code, out, err = gate("runs/rc")
    assert (code, out) == (2, "")
    assert sentence in err


def test_dry_run_says_how_many_prompts_each_rule_needs(gate):
    Path("p.yaml").write_text(POLICY.replace(">= 59", ">= 10"))
    code, out, err = gate("--dry-run")
    assert code == 0
    assert "no copies\tfail\tcopies.share\t0.05 (95 % upper bound)\t59" in out.splitlines()
    assert "can never hold on fewer than 59 prompts" in err
    assert json.loads(gate("--dry-run", "--json")[1])["needs"][0] == {"rule": "no copies", "least_prompts": 59}


def test_self_test_on_a_given_run(gate):
    write_run("runs/bad", copies=range(20), above=range(20))
    code, out, _ = gate("runs/bad", "--self-test")
    assert code == 0
    assert "The self-test passes: on bad, which has memorized, 1 of 1 rule of level fail fails" in out
    Path("p.yaml").write_text(POLICY.replace("max_upper95: 0.05", "max_upper95: 0.9"))
    code, out, err = gate("runs/bad", "--self-test")
    assert code == 1
    assert "would let anything through" in out
    assert "rule 'no copies' does not fail there" in err
    assert json.loads(gate("runs/bad", "--self-test", "--json")[1])["self_test"]["silent"] == ["no copies"]
    assert not list(Path("runs/bad").glob("gate.json"))


def test_self_test_audits_the_bundled_model_once(gate, monkeypatch):
    from mnemoscope.demo import run as demo

    made = []

    def audit(folder, **more):
        made.append(folder)
        shutil.rmtree(folder, ignore_errors=True)
        write_run(folder, copies=range(20), kind="demo")

    monkeypatch.setattr(demo, "demo", audit)
    write_run("runs/demo", kind="demo", status="interrupted")
    assert gate("--self-test")[0] == 0
    assert gate("--self-test")[0] == 0
    assert made == [Path("runs/demo")]


def test_interrupting_the_self_test_is_130(gate, monkeypatch):
    from mnemoscope.demo import run as demo

    def audit(folder, **more):
        raise KeyboardInterrupt("stopped; 3 of 9 samples are saved; the same command continues")

    monkeypatch.setattr(demo, "demo", audit)
    code, _, err = gate("--self-test")
    assert code == 130
    assert "3 of 9 samples are saved" in err


def test_needs_no_torch(tmp_path):
    write_run(tmp_path / "rc")
    (tmp_path / "p.yaml").write_text(POLICY)
    code = f"""
import sys
from pathlib import Path
import typer
from mnemoscope.cli.gate import gate
try:
    gate([Path({str(tmp_path / "rc")!r})], policy=Path({str(tmp_path / "p.yaml")!r}))
except typer.Exit as end:
    assert end.exit_code == 0
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
