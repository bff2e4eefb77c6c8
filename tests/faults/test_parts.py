"""A checkpoint in parts: whole or not there, known when damaged, cut anew for any number of processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf import checkpoint_parts
from lit_rlhf.checkpoint_parts import Pieces, begin, finish, map_any, read_any, unfinished, write_own
from lit_rlhf.checkpoints import CheckpointError, newest, sweep, write
from lit_rlhf.commands.resume import to_resume_from
from lit_rlhf.strategies import FSDP2Strategy

WEIGHT, BIAS = torch.arange(21.0).view(7, 3), torch.arange(2.0)


class Part:
    """What one of several processes holds of a tensor."""

    def __init__(self, whole: torch.Tensor, rank: int, world: int) -> None:
        each = -(-len(whole) // world)  # as torch.chunk cuts; the last ones may have nothing
        self.first = min(rank * each, len(whole))
        self.rows = whole[self.first : self.first + each]
        self.full_tensor = None


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_parts, "own_rows", lambda part: (part.rows, part.first))


def saved(folder: Path, world: int = 3, step: int = 1, writers: int | None = None, done: bool = True) -> Path:
    """Write a checkpoint as ``world`` processes do; perhaps only some of them come to it."""
    path, rest = folder / f"step={step}.ckpt", {}
    begin(path)
    for rank in range(world if writers is None else writers):
        weights = {
            "weight": Part(WEIGHT + step, rank, world),
            "bias": Part(BIAS, rank, world),
            "count": torch.tensor(step),
        }
        tree: dict[str, Any] = {
            "state_dict": weights,
            "optimizer_states": [{"state": {0: {"exp_avg": Part(BIAS, rank, world)}}}],
        }
        rest = write_own({**tree, "global_step": step}, path, rank, world)
    if done:
        finish(rest, path, world)
    os.utime(path if done else unfinished(path), (step, step))
    return path


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_what_is_written_in_parts_is_read_whole(world, tmp_path):
    found = read_any(saved(tmp_path, world))
    assert torch.equal(found["state_dict"]["weight"], WEIGHT + 1)
    assert torch.equal(found["state_dict"]["bias"], BIAS)
    assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"], BIAS)
    assert (int(found["state_dict"]["count"]), found["global_step"]) == (1, 1)
    assert "parts" not in found


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("others", [1, 2, 4, 5, 7, 9])
def test_another_number_of_processes_finds_its_rows(world, others, tmp_path):
    pieces = map_any(saved(tmp_path, world))["state_dict"]["weight"]
    assert isinstance(pieces, Pieces)
    assert pieces.shape == WEIGHT.shape
    for rank in range(others):
        part = Part(WEIGHT + 1, rank, others)
        assert torch.equal(pieces[part.first : part.first + len(part.rows)], part.rows)


@pytest.mark.parametrize("writers", [0, 1, 2, 3])
def test_a_save_that_was_cut_off_is_none(writers, tmp_path):
    """Until every process has written, the folder has another name, and the one before it is the last."""
    good = saved(tmp_path, step=1)
    saved(tmp_path, step=2, writers=writers, done=False)
    assert newest([tmp_path]) == [good]
    assert to_resume_from("last", [tmp_path]) == str(good)


def test_a_checkpoint_is_written_over(tmp_path):
    """The step is saved once more after its validation; what a save that was cut off left there goes."""
    saved(tmp_path, world=3)
    saved(tmp_path, world=3, writers=2, done=False)
    path = saved(tmp_path, world=2)
    assert sorted(one.name for one in path.iterdir()) == ["00000-of-00002.ckpt", "00001-of-00002.ckpt", "meta.ckpt"]
    assert [one.name for one in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert torch.equal(read_any(path)["state_dict"]["weight"], WEIGHT + 1)


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    """As ``last.ckpt`` is, where the newest is not among the best."""
    good = saved(tmp_path, step=1)
    (tmp_path / "step=2.ckpt").symlink_to(good.name)
    saved(tmp_path, step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    assert [int(read_any(tmp_path / f"step={step}.ckpt")["global_step"]) for step in (1, 2)] == [1, 2]


def test_the_name_is_on_the_disk_when_a_save_returns(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoint_parts, "flush", lambda folder: seen.append((folder, sorted(os.listdir(folder)))))
    saved(tmp_path)
    assert seen == [(tmp_path, ["step=1.ckpt"])]


def test_what_a_kill_left_of_writing_over_is_swept(tmp_path, monkeypatch):
    path, rename = saved(tmp_path), os.replace

    def killed(source: Path, place: Path) -> None:
        if Path(place) == path:
            raise KeyboardInterrupt
        rename(source, place)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    for one in left:
        os.utime(one, (1, 1))
    sweep([tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_checkpoint_is_let_go(tmp_path):
    """Else a checkpoint that was removed would hold its place on the disk until the run ends."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    path, strategy = tmp_path / "step=1.ckpt", FSDP2Strategy()
    write({"state_dict": {}, "optimizer_states": [optimizer.state_dict()]}, path)
    strategy.optimizers = [torch.optim.AdamW([weight])]
    checkpoint, maps = map_any(path), Path("/proc/self/maps")
    assert not maps.exists() or str(path) in maps.read_text()
    strategy.load_optimizer_state_dict(checkpoint)
    del checkpoint
    (state,) = strategy.optimizers[0].state.values()
    assert state["step"] == 1
    assert torch.equal(state["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert not maps.exists() or str(path) not in maps.read_text()


def test_object_stores_take_files_and_no_parts(monkeypatch):
    with pytest.raises(MisconfigurationException, match="save_parts: false"):
        FSDP2Strategy(save_parts=True).save_checkpoint({}, "s3://bucket/step=1.ckpt")
    strategy = FSDP2Strategy()
    monkeypatch.setattr(strategy.checkpoint_io, "load_checkpoint", lambda path: {"from": path})
    assert strategy.load_checkpoint("s3://bucket/step=1.ckpt") == {"from": "s3://bucket/step=1.ckpt"}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    for place in range(len(raw) // 4, len(raw) // 2):  # a single one may fall between the archive's members
        raw[place] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["00001-of-00003.ckpt", "meta.ckpt"])
@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-30]), Path.unlink])
def test_damage_in_any_part_leads_back_to_the_last_good_one(name, harm, tmp_path, recwarn):
    good, bad = saved(tmp_path, step=1), saved(tmp_path, step=2)
    harm(bad / name)
    os.utime(bad, (2, 2))
    assert to_resume_from("last", [tmp_path]) == str(good)
    if (bad / "meta.ckpt").is_file():
        assert any(str(good) in str(warning.message) and str(bad) in str(warning.message) for warning in recwarn)
        with pytest.raises(CheckpointError, match=str(good)):
            to_resume_from(str(bad), [tmp_path])


def test_the_link_to_parts_is_followed(tmp_path):
    from lit_rlhf.checkpoints import link

    path = saved(tmp_path)
    link(path, tmp_path / "last.ckpt")
    assert to_resume_from(str(tmp_path / "last.ckpt"), [tmp_path]) == str(path)
