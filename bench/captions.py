"""How well the bundled world's own image–text score knows its world, on pictures it was not trained on.

python bench/captions.py      a few seconds; writes docs/descriptors.md
"""

import torch

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import World, stats
from mnemoscope.similarity.captions import WorldCaptions

FIRST = (1, 5, 20)


def main() -> None:
    world, score = World(), WorldCaptions()
    captions = list(dict.fromkeys(r.caption for r in world.rows))
    texts = score.texts(captions)
    groups = {
        "planted and recaptioned concepts in the other style": world.of("twin"),
        "held-out concepts in the Fluent style": [r for r in world.of("heldout") if r.style == "fluent"],
        "for comparison: planted pictures, which it was trained on": world.of("planted"),
    }
    table, facts = [], {"machine": machine(), "score": score.name, "captions": len(captions), "groups": {}}
    for name, rows in groups.items():
        s = score.pictures(world.pictures(r.picture for r in rows)) @ texts.T
        own = s.gather(1, torch.tensor([[captions.index(r.caption)] for r in rows]))
        rank = (s > own).sum(1)
        found = [stats.clopper_pearson(int((rank < k).sum()), len(rows)) for k in FIRST]
        table.append([name, str(len(rows)), *(f"{f.value:.0%} [{f.low:.0%}, {f.high:.0%}]" for f in found)])
        facts["groups"][name] = [round(f.value, 4) for f in found]
    text = "\n\n".join([
        f"Measured by `python bench/captions.py` on {machine()} ({score.name}): is the right caption among the first k of "
        f"{len(captions)}? Chance is {1 / len(captions):.2%} for the first.",
        markdown_table(["pictures", "n", *(f"first {k}" for k in FIRST)], table),
    ])  # fmt: skip
    write_block(DOCS / "descriptors.md", "measured-captions", text, facts)


if __name__ == "__main__":
    main()
