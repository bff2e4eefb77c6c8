"""One rank that fails takes the others down, within seconds and by name; uneven rows are each counted once."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from faults import ranks, runs, uneven
from pair import free_port
from torch.distributed import HashStore

from lit_rlhf.callbacks import RankWatch, rank_links
from lit_rlhf.callbacks.rank_links import Links

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")


@pytest.mark.parametrize(
    ("plans", "said", "limit"),
    [
        ([None, ("reading the data", "raise")], "LookupError: planted (", 15),
        ([("scoring", "wait"), ("sampling", "raise")], "LookupError: planted (", 15),  # one waits in no collective
        ([None, ("the update", "raise")], "LookupError: planted (", 15),
        ([("validation", "raise"), None], "LookupError: planted (", 15),
        ([None, ("the update", "SIGKILL")], "its process has ended without a word", 15),
        ([None, ("scoring", "SIGSTOP")], "no sign of life for", 25),
    ],
    ids=["data", "sampling", "update", "validation", "kill", "stop"],
)
def test_the_others_end_within_seconds_and_name_the_rank(plans, said, limit, folder, server, request):
    here = folder / request.node.callspec.id
    here.mkdir()
    codes, seconds = ranks.two(server, here, plans, "--ranks.silence", "4", "--trainer.val_check_interval", "2")
    guilty = next(rank for rank, plan in enumerate(plans) if plan and plan[1] != "wait")
    other = 1 - guilty
    text = (here / f"said{other}").read_text()
    assert codes[other] == 1, text
    assert seconds < limit
    reason = next(line for line in text.splitlines() if f"rank {guilty} of 2 (" in line and "said" not in line)
    assert said in reason
    if plans[guilty][1] == "raise":
        assert codes[guilty] == 1
        assert "LookupError: planted" in (here / f"said{guilty}").read_text()
        assert "ranks.py:" in reason  # where
    print(f"{request.node.callspec.id}: {seconds:.1f} s: {reason}")


@pytest.fixture
def pair(monkeypatch):
    """Connected links of two ranks in this process, which does not end with them."""
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(rank_links, "OWN", 0.1)
    monkeypatch.setattr(rank_links, "GRACE", 0.1)
    monkeypatch.setattr(rank_links, "BEAT", 0.2)
    store = HashStore()
    both = [Links(rank, 2, store, "127.0.0.1", 2.0, []) for rank in (0, 1)]
    for links in both:
        links.start()
    wait_for(lambda: all(links._writers for links in both))
    yield both
    for links in both:
        links.close()
        links.join(10)
    assert not any(links.is_alive() for links in both)


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_failure_is_heard_at_once_and_passed_on(pair):
    zero, one = pair
    one.tell("failed", "rank 1 of 2: the reason")
    assert zero.failed.wait(1)
    assert zero.failure == "rank 1 of 2: the reason"
    wait_for(lambda: one.failure == zero.failure)  # rank 0 passes it on


def test_a_goodbye_is_no_failure(pair):
    zero, one = pair
    zero.tell("bye")
    zero.close()
    wait_for(lambda: not one._writers)
    assert not one.failed.wait(0.3)


def test_a_closed_connection_is_a_death_and_one_closed_after_a_word_is_not(pair):
    zero, one = pair
    one.tell("left", "rank 1 of 2: SystemExit: 143")
    one.close()
    wait_for(lambda: not zero._writers)
    assert not zero.failed.wait(0.3)


def test_a_process_that_dies_without_a_word(pair):
    zero, one = pair
    one._loop.call_soon_threadsafe(one._writers[0].transport.abort)
    assert zero.failed.wait(2)
    assert "without a word" in zero.failure or "connection broke" in zero.failure


def test_a_rank_that_falls_silent_is_missed(pair):
    zero, one = pair
    wait_for(lambda: one._places)
    zero._loop.call_soon_threadsafe(time.sleep, 3.5)
    assert one.failed.wait(5)
    assert "rank 0 of 2 (127.0.0.1): no sign of life for 2 seconds; it was at " in one.failure
    assert "test_ranks.py" in one.failure
    assert not zero.failure.startswith("rank 1")  # it was held up itself


def test_a_job_that_was_suspended_as_a_whole_misses_nobody(pair):
    """Longer than the limit; the one that wakes first has heard nothing for as long."""
    for links, seconds in zip(pair, (3.0, 3.3), strict=True):
        links._loop.call_soon_threadsafe(time.sleep, seconds)
    assert not pair[0].failed.wait(4.5)
    assert not pair[1].failed.is_set()


def test_a_stranger_is_not_listened_to(pair):
    zero, _ = pair
    port = json.loads(zero.store.get("address"))[0]
    for words in (b'["no token", 1, "me"]\n["failed", "x"]\n', b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"7\n"):
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(words)
            assert stranger.recv(1) == b""  # hung up
    assert not zero.failed.is_set()
    assert list(zero._writers) == [1]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_other_machines_find_rank_0_by_either_protocol(address):
    """A host's name may stand for an IPv4 or an IPv6 address: both lead to the one port that is told."""
    if address == "::1" and not socket.has_dualstack_ipv6():
        address = "127.0.0.1"
    with rank_links.listening(everywhere=True) as listener:
        port = listener.getsockname()[1]
        socket.create_connection((address, port), 5).close()


def test_silence_must_be_a_time():
    with pytest.raises(ValueError, match=r"ranks\.silence is -1"):
        RankWatch(silence=-1)


@pytest.fixture(scope="module")
def on_two(folder: Path, server) -> list[dict]:
    """What each of two processes found, on rows that do not divide."""
    port = free_port()
    both = [server.Process(target=uneven.run_rank, args=(rank, port, str(folder))) for rank in (0, 1)]
    for process in both:
        process.start()
    deadline = time.monotonic() + 240
    while (alive := [p for p in both if p.is_alive()]) and time.monotonic() < deadline:
        if any(p.exitcode for p in both):
            break
        time.sleep(0.1)
    for process in alive:
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    return [json.loads((folder / f"uneven{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(("stage", "holds"), uneven.CASES)
def test_every_held_out_row_counts_once_on_any_number_of_processes(stage, holds, folder, on_two):
    """One row on two ranks, three (a smaller last batch), five: as one process counts them."""
    alone = uneven.held_out(stage, holds, folder)
    for found in on_two:
        two = found[f"{stage}-{holds}"]
        assert two.keys() == alone.keys()
        for key, value in alone.items():
            if key.endswith("/std") or (key == "val/score" and holds > 1):
                continue  # a mean over batches; a sample of so many rows a process
            assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("stage", runs.STAGES)
def test_three_rows_on_two_ranks_train_as_one_process_does_and_one_row_is_refused(stage, folder, on_two):
    alone = uneven.weights_after(stage, 3, 2, folder)
    for rank, found in enumerate(on_two):
        torch.testing.assert_close(torch.load(folder / f"{stage}.rank{rank}.pt"), alone, atol=1e-5, rtol=0)
        said = found[f"{stage}-too-few"]
        assert "1 training rows do not fill one batch: batch_size=1 on 2 process(es) takes 2" in said
