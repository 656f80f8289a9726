"""Altered documents, strange requests and kills, all from one seed: what is wrong with the answers, as a table.

    make fuzz                                       everything, at most 15 minutes on 2 cores
    make fuzz SEED=7 KIND=packets MINUTES=2         one kind, other inputs
    python -m fuzz --kind packets --only 1234       one input again, with everything that was said, and its files kept

Exit code 0: nothing was wrong; 1: something was, or there was no time for all inputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .honest import Honest
from .table import markdown, put_in, show
from .tries import Kind, Try


def kinds() -> list[Kind]:
    """All kinds."""
    from . import documents, kills, lists, servers, values

    return [*documents.KINDS, *lists.KINDS, *values.KINDS, *servers.KINDS, *kills.KINDS]


def load_everything() -> None:
    """Import what commands import, and read their options, once for all tries."""
    import importlib
    import pkgutil

    import typer

    import mnemoscope
    from mnemoscope.cli import main as cli

    skipped = ("mnemoscope.__main__", "mnemoscope.lab", "mnemoscope.demo.train", "mnemoscope.studio")
    for module in pkgutil.walk_packages(mnemoscope.__path__, "mnemoscope."):
        if not module.name.startswith(skipped):
            importlib.import_module(module.name)
    for name in (
        "diffusers",
        "transformers",
        "scipy.stats",
        "sklearn.feature_extraction.text",
        "pyarrow.parquet",
        "PIL.WebPImagePlugin",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that a fork shares what it does not change
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]


def main() -> None:
    """Parse, try, tell."""
    args = _arguments()
    began = time.monotonic()
    every = kinds()
    chosen = [kind for kind in every if not args.kind or kind.name in args.kind]
    if unknown := set(args.kind or ()) - {kind.name for kind in every}:
        sys.exit(f"no kind named {sorted(unknown)[0]!r}; there are {', '.join(kind.name for kind in every)}")
    top = Path(args.folder or tempfile.mkdtemp(prefix="mnemoscope-fuzz-"))
    top.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = os.environ["XDG_STATE_HOME"] = str(top)
    os.environ["TMPDIR"] = tempfile.tempdir = str(top)
    load_everything()
    honest = Honest(top / "honest")
    for kind in chosen:
        kind.prepare(honest)
    print(f"{len(chosen)} kinds, originals in {honest.folder} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    if args.only is not None:
        sys.exit(_try_again(chosen, honest, args.seed, args.only, top))
    plan = planned(chosen, args.inputs, args.seed)
    results = try_all(plan, honest, args, top, began + 60 * args.minutes)
    document = show(results, chosen, len(plan), args.seed, time.monotonic() - began)
    for file, text in ((args.json, json.dumps(document, indent=2) + "\n"), (args.markdown, markdown(document))):
        if file is not None:
            put_in(text, file)
    if args.folder is None:
        shutil.rmtree(top, ignore_errors=True)
    sys.exit(0 if document["clean"] and document["complete"] else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument(
        "--inputs", type=int, help="about so many, shared among the kinds; default: as docs/fuzz.md states"
    )
    parser.add_argument("--kind", action="append", help="only this one; repeatable")
    parser.add_argument("--only", type=int, help="only the input of this number")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="keep everything here")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--markdown", type=Path, help="file for the table, such as docs/fuzz.md")
    return parser.parse_args()


def planned(chosen: Sequence[Kind], inputs: int | None, seed: int) -> list[tuple[Kind, int]]:
    """Kinds and numbers, mixed so that a run that ends early has tried all kinds."""
    share = 1.0 if inputs is None else inputs / sum(kind.inputs for kind in chosen)
    plan = [(kind, number) for kind in chosen for number in range(max(1, round(share * kind.inputs)))]
    random.Random(seed).shuffle(plan)
    return plan


def attempt(kind: Kind, number: int, honest: Honest, seed: int, folder: Path) -> Try:
    """One try, in a folder that is made for it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    t = Try(random.Random(f"{seed}/{kind.name}/{number}"), folder)
    kind.attempt(honest, t)
    return t


def _try_again(chosen: Sequence[Kind], honest: Honest, seed: int, number: int, top: Path) -> int:
    failed = 0
    for kind in chosen:
        folder = top / f"{kind.name.replace(' ', '-')}-{number}"
        t = attempt(kind, number, honest, seed, folder)
        print(f"{kind.name} {number}: {'; '.join(t.words)}\nfiles: {folder}")
        for name, outcome in t.outcomes:
            print(
                f"\n$ mnemoscope {name}\nexit code {outcome.code}, {outcome.seconds:.1f} s\n{outcome.out[:4000]}\n{outcome.err[:20000]}"
            )
        for column, words in t.faults:
            print(f"{column}: {words}")
        failed += bool(t.faults)
        kind.close()
    return 1 if failed else 0


def try_all(
    plan: Sequence[tuple[Kind, int]], honest: Honest, args: argparse.Namespace, top: Path, deadline: float
) -> list[dict[str, Any]]:
    """All tries, by several processes; those for which there is no time are left out."""
    fork = multiprocessing.get_context("fork")
    place = fork.Value("i", 0)
    files = [top / f"results-{i}.jsonl" for i in range(args.workers)]
    workers = [
        fork.Process(target=_work, args=(plan, honest, args.seed, top / f"try-{i}", file, place, deadline))
        for i, file in enumerate(files)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("a worker ended by an error of its own, which stands above")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _spent() -> float:
    """Seconds of a processor that this process and its ended children have taken."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _work(
    plan: Sequence[tuple[Kind, int]], honest: Honest, seed: int, folder: Path, file: Path, place: Any, deadline: float
) -> None:
    with file.open("w") as results:
        while time.monotonic() < deadline:
            with place.get_lock():
                at, place.value = place.value, place.value + 1
            if at >= len(plan):
                break
            kind, number = plan[at]
            began = _spent()
            try:
                t = attempt(kind, number, honest, seed, folder)
            except Exception as error:
                raise RuntimeError(f"--kind {kind.name!r} --only {number}") from error
            facts = {"kind": kind.name, "number": number, "words": t.words, "faults": t.faults, "kills": t.kills}
            results.write(json.dumps({**facts, "seconds": _spent() - began}) + "\n")
            results.flush()
    for kind in {kind.name: kind for kind, _ in plan}.values():
        kind.close()


if __name__ == "__main__":
    main()
