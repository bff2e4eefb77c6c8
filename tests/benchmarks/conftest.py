"""Makes the scripts of benchmarks importable: those of a folder import one another by bare names."""

import sys
from pathlib import Path

for folder in ("speed", "algorithms", "scale"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / folder))
