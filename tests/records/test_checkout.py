"""The commit of the working directory, read without git: the one that git names, and nothing that a folder says is run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mnemoscope.records.checkout import checkout


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """git, in a checkout with one commit that is the working directory."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    folder = tmp_path / "thesis"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--initial-branch", "main")
    (folder / "prompts.txt").write_text("a cat\n")
    git("add", ".")
    git("commit", "-m", "first")
    return git


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("pack-refs", "--all", "--prune"),
        ("checkout", "--detach"),
        ("checkout", "-b", "a/branch"),
        ("symbolic-ref", "HEAD", "refs/heads/alias"),
        ("worktree", "add", "--detach", "../linked"),
        ("worktree", "add", "../linked"),
    ],
    ids=" ".join,
)
def test_the_commit_is_the_one_that_git_names(
    git: Callable[..., str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    git("symbolic-ref", "refs/heads/alias", "refs/heads/main")
    if words:
        git(*words)
    if words[:1] == ("worktree",):
        monkeypatch.chdir("../linked")
    assert checkout() == {"commit": git("rev-parse", "HEAD"), "dirty": None}


def test_the_variables_of_gits_own_hooks_name_no_other_checkout(
    git: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git("rev-parse", "HEAD")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert checkout() == {"commit": commit, "dirty": None}


def test_no_checkout_and_no_commit(tmp_path: Path, git: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert checkout() is None
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    git("init")
    assert checkout() is None


@pytest.mark.skipif(os.name == "nt", reason="shell commands")
def test_nothing_of_a_folders_git_configuration_runs(tmp_path: Path, git: Callable[..., str]) -> None:
    commit, touch = git("rev-parse", "HEAD"), f"touch '{tmp_path / 'ran'}'"
    Path(".gitattributes").write_text("* filter=x diff=x\n")
    for key in (
        "filter.x.clean",
        "filter.x.process",
        "diff.x.textconv",
        "core.fsmonitor",
        "core.sshCommand",
        "core.pager",
    ):
        git("config", key, f"{touch}; cat")
    for hook in ("post-index-change", "fsmonitor-watchman"):
        Path(".git/hooks", hook).write_text(f"#!/bin/sh\n{touch}\n")
        Path(".git/hooks", hook).chmod(0o755)
    Path("prompts.txt").write_text("a dog\n")
    assert checkout() == {"commit": commit, "dirty": None}
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes that have a name")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HEAD", None),
        ("HEAD", "ref: refs/heads/pipe\n"),
        ("HEAD", "ref: ../../outside\n"),
        ("HEAD", "ref: refs/../../../outside\n"),
        ("HEAD", "ref: refs/heads/loop\n"),
        ("HEAD", "ref: refs/heads/\0\n"),
        ("HEAD", "a" * 5000),
        ("HEAD", "no commit\n"),
        ("commondir", "\0"),
        ("commondir", "/nowhere\n"),
    ],
)
def test_a_repository_made_to_mislead_has_no_commit(
    tmp_path: Path, git: Callable[..., str], name: str, text: str | None
) -> None:
    (tmp_path / "outside").write_text("a" * 40)
    os.mkfifo(".git/refs/heads/pipe")
    Path(".git/refs/heads/loop").write_text("ref: refs/heads/loop\n")
    Path(".git", name).unlink(missing_ok=True)
    if text is None:
        os.mkfifo(Path(".git", name))
    else:
        Path(".git", name).write_text(text)
    assert checkout() is None
