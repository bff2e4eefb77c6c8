"""Mutate good rows, files, model folders and configs at random: each must load, or be refused in our words.

    python benchmarks/faults/fuzz.py --rounds 5000

Prints a table of how the rounds ended, and what nobody should have seen. The same seed makes the same rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests"), str(Path(__file__).resolve().parents[2])]

from hostile.fuzz import TARGETS, Fuzz  # noqa: E402


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one target in place of all four")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    fuzz = Fuzz(folder, args.seed)
    fuzz.run(args.rounds, args.only)
    print("\n".join([fuzz.table(), *fuzz.faults]))
    if fuzz.faults:
        print(f"the files of each fault: {folder}/fault…")
    sys.exit(bool(fuzz.faults))


if __name__ == "__main__":
    main()
