"""Two processes go on bit for bit; another number of them goes on with the same rows, and sensibly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faults import exact, exact_cases, exact_ranks
from pair import run_launched

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    exact_cases.write_files(folder)
    return folder


@pytest.fixture(scope="module")
def out(model_folder, rows, tmp_path_factory) -> Path:
    """What all the processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    run_launched(Path(exact_ranks.__file__), model_folder, str(rows), str(folder), *exact_ranks.POINTS)
    return folder


def tape(out: Path, name: str, which: str, rank: int = 0) -> tuple[int, list[exact.Event]]:
    return torch.load(out / f"{name}-{which}-{rank}")


@pytest.mark.parametrize("name", exact_ranks.POINTS)
def test_two_fresh_processes_go_on_bit_for_bit(name, out):
    for rank in (0, 1):
        (_, whole), (begin, resumed) = tape(out, name, "whole", rank), tape(out, name, "resumed", rank)
        assert 0 < begin < len(whole)
        assert exact.first_difference(exact.rest_of(whole, begin), resumed) == ""
    drawn = [tape(out, name, "resumed", rank)[1][0][-1] for rank in (0, 1)]
    assert drawn[0] != drawn[1] or name in ("sft", "reward margin")  # only rewards draw different numbers of times


def rows_read(*tapes: list[exact.Event]) -> list[str]:
    """Rows of all batches of all processes."""
    return sorted(row for events in tapes for event in events if event[0] == "batch" for row in event[2])


def test_each_row_of_the_epoch_is_read_once_when_more_processes_go_on_and_fewer_again(model_folder, rows, out):
    """4 rows by one process, 8 by two, 8 by one. The Trainer's own count of batches would end each part elsewhere."""
    _, one = tape(out, "sft", "one")
    parts = [tape(out, "sft", "widened", rank) for rank in (0, 1)]
    begin = parts[0][0]
    epoch = rows_read(one)
    assert len(epoch) == 20
    assert rows_read(one[:begin], *(events for _, events in parts)) == epoch
    last = exact.kept(out / "sft" / "widened")[1]
    narrowed = exact_ranks.play("sft", model_folder, rows, out / "sft" / "narrowed", 2, last, max_epochs=1)
    before = [events[: narrowed.begin] for _, events in parts]
    assert rows_read(one[:begin], *before, narrowed.events) == epoch
    assert [event[0] for event in narrowed.events].count("validation") == 2  # the epoch ended as an epoch does


def test_with_as_many_rows_a_step_another_number_of_processes_goes_the_same_way(model_folder, rows, out):
    """Responses are the same ones, so only the order of sums differs."""
    folder = out / "grpo calm"
    wanted = exact.end_of(exact.kept(folder / "one")[-1])["state_dict"]
    last = exact.kept(folder / "widened")[1]
    exact_ranks.play("grpo calm", model_folder, rows, folder / "narrowed", 4, last, max_epochs=1)
    for which in ("widened", "narrowed"):
        found = exact.end_of(exact.kept(folder / which)[-1])["state_dict"]
        assert found["episodes"] == wanted["episodes"] == 32
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
