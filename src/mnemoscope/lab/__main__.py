"""One command for each study; each goes on where it was stopped, and replaces its block of a page.

python -m mnemoscope.lab copies demo-unconditional      score against number of copies, members against others
python -m mnemoscope.lab replication demo-unconditional the bound against brute force
python -m mnemoscope.lab membership demo-unconditional  memorization is not membership
python -m mnemoscope.lab steps CHECKPOINTS              score against training steps, over a folder of pipelines
python -m mnemoscope.lab sizes demo-unconditional       score against training-set size; trains three models first
python -m mnemoscope.lab duplication demo               how often a picture is drawn, by its number of copies
python -m mnemoscope.lab protection demo                what protections of a fine-tuning are worth (--pictures: training seeds)
python -m mnemoscope.lab forgetting demo                the same, of pictures that are stored already
python -m mnemoscope.lab samplers demo-unconditional    what other samplers make of the noise that was found
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..terminal import guard
from . import duplication, pages, protection, sizes, stored

STUDIES = {
    "copies": stored.copies,
    "replication": stored.replication,
    "membership": stored.membership,
    "steps": stored.training_steps,
    "sizes": sizes.sizes,
    "samplers": stored.samplers,
    "duplication": duplication.duplication,
    "protection": protection.protection,
    "forgetting": protection.forgetting,
}


def main() -> None:
    """Command line."""
    guard()
    p = argparse.ArgumentParser(
        prog="mnemoscope.lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("study", choices=STUDIES)
    p.add_argument("model", nargs="?", default="demo-unconditional", help="a bundled model, or a folder of checkpoints")
    p.add_argument(
        "--pictures", type=int, default=8, help="of each level; of protection and forgetting: training seeds"
    )
    p.add_argument(
        "--work", type=Path, default=Path("build/lab"), help="where results are kept; the same command continues"
    )
    p.add_argument("--page", type=Path, default=Path("docs/studies"), help="folder of the pages")
    args = p.parse_args()
    finding = STUDIES[args.study](args.model, args.work, args.pictures)
    pages.write(args.page, finding)


if __name__ == "__main__":
    main()
