"""Makes the scripts of benchmarks/speed importable: they import one another by bare names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "speed"))
