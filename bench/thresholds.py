"""Make the thresholds that come with the bundled model, from every second ordinary caption at the first step.

python bench/thresholds.py       a few seconds; writes thresholds.json (audits: four seeds of a shared bank) and
                                 guard-thresholds.json (a guard: one noise of each prompt's own) beside the model
"""

import sys
import tempfile

from mnemoscope import AuditConfig, World, calibrate, load
from mnemoscope.demo.world import THRESHOLDS


def main() -> None:
    # The other half stays for whoever wants to test the threshold.
    captions = [r.caption for r in World().captions("ordinary")][::2]
    target, wanted = load("demo"), sys.argv[1:] or list(THRESHOLDS)
    for kind in wanted:
        options = {"seeds": 1, "seed_mode": "per-prompt"} if kind == "guard" else {}
        with tempfile.TemporaryDirectory() as folder:
            config = AuditConfig(model="demo", prompts=captions, out=f"{folder}/run", **options)
            _, found = calibrate(config, target=target)
        record = found["magnitude"].record
        record.source = f"{len(captions)} ordinary captions of the bundled world (every second one)"
        found["magnitude"].save(THRESHOLDS[kind])
        print(kind, record.threshold, record.interval)


if __name__ == "__main__":
    main()
