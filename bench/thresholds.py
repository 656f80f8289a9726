"""Make the thresholds that come with the bundled model: first step, four seeds, every second ordinary caption.

python bench/thresholds.py       a few seconds; writes thresholds.json beside the model
"""

import tempfile
from pathlib import Path

from mnemoscope import AuditConfig, World, calibrate, load
from mnemoscope.demo.world import ASSETS


def main() -> None:
    # The other half stays for whoever wants to test the threshold.
    captions = [r.caption for r in World().captions("ordinary")][::2]
    with tempfile.TemporaryDirectory() as folder:
        config = AuditConfig(model="demo", prompts=captions, out=f"{folder}/run")
        _, found = calibrate(config, target=load("demo"))
    record = found["magnitude"].record
    record.source = f"{len(captions)} ordinary captions of the bundled world (every second one)"
    found["magnitude"].save(Path(ASSETS) / "thresholds.json")
    print(record.threshold, record.interval)


if __name__ == "__main__":
    main()
