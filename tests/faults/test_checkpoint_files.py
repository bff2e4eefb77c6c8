"""Checkpoint files: whole or not there, known when damaged, and nothing in them is ever run."""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lit_rlhf import checkpoints
from lit_rlhf.callbacks import SafeCheckpointIO
from lit_rlhf.checkpoints import CheckpointError, last_good, link, newest, read, write
from lit_rlhf.commands.resume import to_resume_from
from lit_rlhf.export import export, stage_class


def state(step: int, rows: int = 50) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"state_dict": {"w": torch.randn(rows, generator=generator)}, "global_step": step}


@contextmanager
def little_room(size: int = 8_192):
    """The system refuses files of more than ``size`` bytes, as it refuses any on a full disk."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_is_written_is_read(tmp_path):
    write(state(1), tmp_path / "a" / "one.ckpt")
    assert torch.equal(read(tmp_path / "a" / "one.ckpt")["state_dict"]["w"], state(1)["state_dict"]["w"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.ckpt"]


def test_a_disk_without_room_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "one.ckpt"
    write(state(1), path)
    with little_room(), pytest.raises(OSError, match="too large"):
        write(state(2, rows=100_000), path)
    assert read(path)["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["one.ckpt"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_until_the_file_is_on_the_disk_the_old_one_has_its_name(moment, tmp_path, monkeypatch):
    path, order = tmp_path / "one.ckpt", []
    write(state(1), path)
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args, name=name, real=real):
            order.append(name)
            if name == moment:
                assert read(path)["global_step"] == 1
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(checkpoints.os, name, noted)
    with pytest.raises(OSError, match="No space"):
        write(state(2), path)
    assert order == ["fsync", "replace"][: len(order)]
    assert read(path)["global_step"] == 1


def test_a_link_is_replaced_and_never_followed(tmp_path):
    write(state(1), tmp_path / "step=1.ckpt")
    link(tmp_path / "step=1.ckpt", tmp_path / "last.ckpt")
    write(state(2), tmp_path / "step=2.ckpt")
    link(tmp_path / "step=2.ckpt", tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").is_symlink()
    assert read(tmp_path / "last.ckpt")["global_step"] == 2
    write(state(3), tmp_path / "last.ckpt")
    assert [read(tmp_path / f"step={i}.ckpt")["global_step"] for i in (1, 2)] == [1, 2]
    assert newest([tmp_path])[0].name == "last.ckpt"  # a file now


def test_any_flipped_bit_and_any_cut_is_noticed_or_changes_nothing(tmp_path):
    write(state(1), tmp_path / "good.ckpt")
    good, bad, noticed = (tmp_path / "good.ckpt").read_bytes(), tmp_path / "bad.ckpt", 0
    draw = random.Random(0)
    for trial in range(120):
        data = bytearray(good)
        if trial < 80:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        bad.unlink(missing_ok=True)
        bad.write_bytes(data)
        checkpoints._fault.cache_clear()
        try:
            found = read(bad)
        except CheckpointError:
            noticed += 1
        else:
            assert torch.equal(found["state_dict"]["w"], state(1)["state_dict"]["w"])
    assert noticed > 60
    offset = good.index(state(1)["state_dict"]["w"].numpy().tobytes())
    bad.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
    assert not torch.equal(torch.load(bad, weights_only=True)["state_dict"]["w"], state(1)["state_dict"]["w"])
    with pytest.raises(CheckpointError, match=r"bad.ckpt is damaged: the checksum of .*data/0 is wrong"):
        read(bad)


class Trap:
    """A pickle that leaves a folder where it is opened."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_strangers_pickle_is_refused_and_not_run(tmp_path, model_folder):
    touched, archive, plain = tmp_path / "touched", tmp_path / "archive.ckpt", tmp_path / "plain.ckpt"
    torch.save({**state(1), "callbacks": Trap(touched)}, archive)
    plain.write_bytes(pickle.dumps(Trap(touched)))
    for path, words in ((archive, r"\(posix.mkdir\)"), (plain, "plain pickle can run code")):
        for way in (read, SafeCheckpointIO().load_checkpoint, lambda path: export(str(path), str(tmp_path / "out"))):
            with pytest.raises(CheckpointError, match=words):
                way(path)
        with pytest.raises(CheckpointError, match=words):
            to_resume_from(str(path), [])
    assert not touched.exists()
    torch.load(archive, weights_only=False)
    assert touched.exists()  # it would have


def test_a_checkpoint_chooses_no_module_to_import(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="not made by a stage"):
        stage_class({"_class_path": "planted.Stage"}, "x.ckpt")


def test_last_goes_back_to_the_last_good_one_and_names_both(tmp_path):
    folders = [tmp_path / f"version_{i}" / "checkpoints" for i in (0, 1)]
    assert to_resume_from("last", folders) is None
    for step, folder in ((1, folders[0]), (2, folders[1]), (3, folders[1])):
        write(state(step), folder / f"step={step}.ckpt")
        os.utime(folder / f"step={step}.ckpt", (step, step))
    for name, age in ((".step=4.ckpt.partial", 0), (".step=1.ckpt.partial", 4000)):
        (folders[1] / name).write_bytes(b"half of one")
        os.utime(folders[1] / name, (time.time() - age,) * 2)
    three = folders[1] / "step=3.ckpt"
    link(three, folders[1] / "last.ckpt")
    assert to_resume_from("last", folders) == str(three)
    assert [path.name for path in folders[1].glob(".*")] == [".step=4.ckpt.partial"]  # the old one was swept away
    three.write_bytes(three.read_bytes()[:-500])
    os.utime(three, (3, 3))
    for asked in ("last", str(folders[1] / "last.ckpt")):
        with pytest.warns(match=r"step=3.ckpt is cut short.*last good checkpoint, .*step=2.ckpt"):
            assert to_resume_from(asked, folders) == str(folders[1] / "step=2.ckpt")
    with pytest.raises(CheckpointError, match=r"(?s)step=3.ckpt is cut short.*--ckpt_path .*step=2.ckpt"):
        to_resume_from(str(three), folders)  # a file by its name is meant
    with pytest.raises(FileNotFoundError, match="is not there"):
        to_resume_from(str(tmp_path / "none.ckpt"), folders)
    for path in newest(folders):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 3 checkpoint"):
        to_resume_from("last", folders)
    assert last_good([], read) == (None, [])


def test_a_failed_save_is_raised_unless_someone_is_forgiving(tmp_path):
    io, path = SafeCheckpointIO(), tmp_path / "file" / "one.ckpt"
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(OSError):  # noqa: PT011 - the words are the system's
        io.save_checkpoint(state(1), path)
    with io.forgiving() as failures, warnings.catch_warnings():
        io.save_checkpoint(state(1), path)
    assert str(path) in failures[0]
    assert "errno" in failures[0]
    with pytest.raises(TypeError):
        io.save_checkpoint(state(1), tmp_path / "a.ckpt", storage_options={})
