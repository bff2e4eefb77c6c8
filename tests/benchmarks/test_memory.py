"""The memory table counts what there is."""

from __future__ import annotations

import argparse

import memory
import pytest

SHAPE = argparse.Namespace(hidden=64, layers=2, vocabulary=300, rank=4, rows=2, tokens=4)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("memory")
    base = 4 * memory.save_models(SHAPE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        counts = {kind: memory.work(kind, "one", folder, SHAPE) for kind in memory.NETWORKS}
    return counts | {"base": {"weights": base}}


def test_each_row_holds_as_many_bases_as_it_says(found):
    base = found["base"]["weights"]
    adapters = found["lora"]["gradients"] / 2
    heads, tables = 4 * SHAPE.hidden, 4096  # heads count in both; rotary tables, counters
    for kind, (bases, guests) in {"full": (4, 0), "lora": (4, 2), "off": (3, 2), "roles": (1, 3)}.items():
        expected = bases * base + guests * adapters + 2 * heads
        assert found[kind]["weights"] == pytest.approx(expected, abs=tables), kind
    assert found["lora"]["gradients"] == found["roles"]["gradients"] < found["full"]["gradients"] == 2 * base + heads
    for kind in memory.NETWORKS:
        assert found[kind]["optimizer state"] == pytest.approx(2 * found[kind]["gradients"], abs=512)
        assert found[kind]["peak"] > 0
