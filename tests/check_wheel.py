"""Install the built wheel into an empty folder and use it from there, without this checkout on the path.

    python tests/check_wheel.py FOLDER_WITH_ONE_WHEEL

Third-party packages come from the running environment; mnemoscope itself must come from the wheel.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import importlib.metadata, pathlib, sys
import mnemoscope
from mnemoscope.demo.world import World
home = pathlib.Path(mnemoscope.__file__).resolve()
assert str(home).startswith(sys.argv[1]), f"imported from {home}"
assert World().reference.threshold, "the bundled world is not in the wheel"
names = {e.name for e in importlib.metadata.entry_points(group="mnemoscope.detectors")}
assert "magnitude" in names, names
assert mnemoscope.load("demo-unconditional").has_text is False
print("wheel works:", mnemoscope.__version__, World())
"""


def main() -> None:
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, str(wheel)]
        subprocess.run(pip, check=True)
        home = str(Path(place).resolve())
        subprocess.run([sys.executable, "-c", CODE, home], check=True, cwd=home, env={**os.environ, "PYTHONPATH": home})
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
