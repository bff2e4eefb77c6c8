"""Seeded mutations of good rows, files, model folders and configs; each must load, or be refused in our words.

Shared by the test, which makes a few rounds, and ``benchmarks/faults/fuzz.py``, which makes as many as it is told.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import yaml
from hostile import door
from hostile.rows import KINDS

from lit_rlhf.data import DataError
from lit_rlhf.models import load_causal, load_scalar, load_tokenizer
from lit_rlhf.rewards import RewardError

NUMBERS = (0, -1, 1, 2**31, 2**63, 10**400, -0.5, 1e-30, 1e308, float("nan"), float("inf"))
WORDS = (
    "",
    " ",
    "\n",
    "\0",
    "a",
    "5",
    "null",
    "nan",
    "[",
    "{",
    "~",
    "..",
    "/",
    "{x}",
    "<s>",
    "</s>",
    "\ud800",
    "😀" * 9,
)
LISTS = ([], [None], [[]], [1, 2], ["a", "b"], [{"role": "user", "content": "a"}], [{"role": None}])
ROLES = ({"role": "user"}, [{"role": "assistant", "content": ["a"]}], {}, {"": 1}, {"class_path": "os.system"})
NASTY: list[Any] = [None, True, False, *NUMBERS, *WORDS, *LISTS, *ROLES, "x" * 10_000]
SECONDS = 60  # a round may take
TARGETS = {"row": 40, "file": 40, "folder": 8, "config": 12}
# What a run may end with besides: it is not finite, or a reward is wrong; both say where.
RUNS = (FloatingPointError, RewardError)


class Fuzz:
    """Rounds of mutations.

    Args:
        folder: an empty one, to work in.
        seed: of everything that is drawn.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        door.make_workspace(folder)
        self.kinds, self.tokenizer = dict(KINDS), str(folder / "base")
        self.files = self._good_files()

    def run(self, rounds: int, only: str | None = None) -> None:
        """Make so many rounds, of one target or of all."""
        for number in range(rounds):
            names = [only] if only else list(TARGETS)
            (target,) = self.draw.choices(names, [TARGETS[name] for name in names])
            signal.signal(signal.SIGALRM, _late)
            signal.alarm(SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ended = getattr(self, f"_{target}")()
            except Exception as error:
                ended = "fault"
                last = traceback.extract_tb(error.__traceback__)[-1]
                self.faults.append(
                    f"round {number}, {target}: {type(error).__name__}: {str(error)[:300]} ({last.filename})"
                )
                shutil.rmtree(self.folder / f"fault{number}", ignore_errors=True)
                if (self.folder / "case").exists():
                    shutil.copytree(self.folder / "case", self.folder / f"fault{number}")
            finally:
                signal.alarm(0)
            self.counts[target, ended] += 1

    def table(self) -> str:
        """How the rounds ended, as a table."""
        rows = ["| target | rounds | loaded | refused | faults |", "| --- | --- | --- | --- | --- |"]
        for target in TARGETS:
            ends = [self.counts[target, end] for end in ("loaded", "refused", "fault")]
            rows.append(f"| {target} | {sum(ends)} | {' | '.join(map(str, ends))} |")
        return "\n".join(rows)

    # -- targets: each returns how it ended, or raises what nobody should see ------------------------------------------

    def _row(self) -> str:
        kind = self.draw.choice(list(KINDS))
        bad = self._mutated(KINDS[kind][1])
        lines = [json.dumps(KINDS[kind][1])] * 2 + [json.dumps(bad)]
        path = self._fresh() / "rows.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return self._read(KINDS[kind][0], path)

    def _file(self) -> str:
        name = self.draw.choice(list(self.files))
        path = self._fresh() / name
        if isinstance(self.files[name], Path):
            shutil.copytree(self.files[name], path)
            spoilt = self.draw.choice(sorted(path.iterdir()))
            spoilt.write_bytes(self._spoilt(spoilt.read_bytes()))
        else:
            path.write_bytes(self._spoilt(self.files[name]))
        return self._read(KINDS["pair"][0], path)

    def _folder(self) -> str:
        path = self._fresh() / "model"
        shutil.copytree(self.folder / "base", path)
        spoilt = self.draw.choice(sorted(path.iterdir()))
        if spoilt.suffix == ".json" and self.draw.random() < 0.7:
            text = json.dumps(self._mutated(json.loads(spoilt.read_text(encoding="utf-8"))))
            spoilt.write_text(text, encoding="utf-8")
        else:
            spoilt.write_bytes(self._spoilt(spoilt.read_bytes()))
        try:
            load_tokenizer(str(path))
            self.draw.choice((load_causal, load_scalar))(str(path))
        except (ValueError, FileNotFoundError) as error:
            return self._in_words(error, str(path))
        return "loaded"

    def _config(self) -> str:
        stage = self.draw.choice(("sft", "reward", "ppo", "grpo"))
        whole = door.config(stage)
        whole["model"]["init_args"] |= {"optim": {"lr": 1e-3, "betas": [0.9, 0.95], "warmup_steps": 1}, "seed": 0}
        text = yaml.safe_dump(self._mutated(whole), allow_unicode=False).encode("utf-8", "replace")
        if self.draw.random() < 0.4:
            text = self._spoilt(yaml.safe_dump(whole).encode())
        (self._fresh() / "bad.yaml").write_bytes(text)
        bounded = {"max_steps": 1, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "logger": "false"}
        last = [f"--trainer.{key}={value}" for key, value in {**bounded, "default_root_dir": "runs"}.items()]
        found = door.run(self.folder, ["fit", "--config", "case/bad.yaml", *last, "--export.folder", "out"])
        if isinstance(found.code, BaseException):
            if isinstance(found.code, RUNS):
                return "refused"
            raise found.code
        if found.code and not found.is_door:
            raise AssertionError(f"exit code {found.code}: {found.said}")
        return "refused" if found.code else "loaded"

    # -- how -------------------------------------------------------------------------------------------------------

    def _fresh(self) -> Path:
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        (self.folder / "case").mkdir()
        return self.folder / "case"

    def _read(self, kind: type, path: Path) -> str:
        data = kind(str(path), tokenizer=self.tokenizer, val_fraction=0, max_dropped=0.99)
        try:
            data.setup("fit")
        except DataError as error:
            return self._in_words(error, str(path))
        return "loaded"

    @staticmethod
    def _in_words(error: Exception, name: str) -> str:
        if name not in str(error) or len(str(error)) > 1500:
            raise AssertionError(f"does not name {name}, or too long: {error}") from error
        return "refused"

    def _good_files(self) -> dict[str, Any]:
        rows = [KINDS["pair"][1]] * 3
        lines = ("\n".join(map(json.dumps, rows)) + "\n").encode()
        datasets.Dataset.from_list(rows).to_parquet(str(self.folder / "good.parquet"))
        datasets.Dataset.from_list(rows).save_to_disk(str(self.folder / "good"))
        return {
            "rows.jsonl": lines,
            "rows.json": json.dumps(rows).encode(),
            "rows.csv": b"prompt,chosen,rejected\n" + b'"Q, R",a,"b ""c"""\n' * 3,
            "rows.jsonl.gz": gzip.compress(lines, mtime=0),
            "rows.parquet": (self.folder / "good.parquet").read_bytes(),
            "rows": self.folder / "good",
        }

    def _mutated(self, good: Any) -> Any:
        """A copy with one to three places changed: another value, a key less, a key more, a value twice."""
        whole = copy.deepcopy(good)
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            places = list(_places(whole))
            if not places:
                return self.draw.choice(NASTY)
            owner, key = self.draw.choice(places)
            how = self.draw.choice(("swap", "swap", "swap", "take", "wrap", "text", "add"))
            if how == "swap":
                owner[key] = copy.deepcopy(self.draw.choice(NASTY))
            elif how == "take":
                del owner[key]
            elif how == "wrap":
                owner[key] = self.draw.choice(([owner[key]], {"a": owner[key]}, [owner[key]] * 2))
            elif how == "text":
                owner[key] = str(owner[key])
            elif isinstance(owner, dict):
                owner[f"{key}{self.draw.choice(('', 's', '.x', ' ', 'é'))}x"] = owner[key]
        return whole

    def _spoilt(self, good: bytes) -> bytes:
        """The bytes with some flipped, cut off, taken out, put in or doubled."""
        whole = bytearray(good)
        for _ in range(self.draw.choice((1, 1, 2, 4))):
            at, size = self.draw.randrange(len(whole) + 1), self.draw.choice((1, 2, 8, 64))
            how = self.draw.choice(("flip", "flip", "cut", "take", "put", "double"))
            if how == "flip" and at < len(whole):
                whole[at] ^= 1 << self.draw.randrange(8)
            elif how == "cut":
                del whole[at:]
            elif how == "take":
                del whole[at : at + size]
            elif how == "put":
                whole[at:at] = self.draw.choice((b"\0", b"\xff", b'"', b"{", b"[", b"\n", b",", b"\r", b"&a *a "))
            else:
                whole[at:at] = whole[at : at + size]
        return bytes(whole)


def _places(value: Any) -> Any:
    """Every (owner, key) within nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            if sys.getsizeof(inner) < 10_000:
                yield from _places(inner)


def _late(*args: object) -> None:
    raise TimeoutError(f"a round took more than {SECONDS} seconds")
