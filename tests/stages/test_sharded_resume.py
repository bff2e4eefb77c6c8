"""Checkpoints of sharded runs: gone on from bit for bit, by any number of processes, in one file or in parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pair import run_pair
from safetensors.torch import load_file
from stages import sharded_resume

from lit_rlhf.checkpoint_parts import read_any
from lit_rlhf.checkpoints import CheckpointError
from lit_rlhf.export import export

FORMS = ("file", "parts")


@pytest.fixture(scope="module")
def kept(sharded_folders, tmp_path_factory) -> tuple[Path, dict, list[dict]]:
    """Where two processes saved, what one process ends with, and what each of the two does."""
    out, alone = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("alone")
    one = {name: sharded_resume.go(name, str(sharded_folders), alone / name) for name in sharded_resume.CASES}
    run_pair(Path(sharded_resume.__file__), out, str(sharded_folders), str(out), str(alone))
    return out, one, [torch.load(out / f"found_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sharded_resume.CASES)
def test_a_run_that_went_on_ends_where_it_would_have(name, form, kept):
    _, _, ranks = kept
    for found in ranks:
        assert torch.equal(found[name, form, "went on"], found[name, form, "whole run"])


@pytest.mark.parametrize("name", sharded_resume.CASES)
def test_two_go_on_from_the_file_of_one(name, kept):
    _, one, (found, _) = kept
    torch.testing.assert_close(found[name, "from one process"], one[name], atol=2e-7, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sharded_resume.CASES)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_one_goes_on_from_what_two_saved(name, form, kept, sharded_folders, tmp_path):
    out, one, _ = kept
    found = sharded_resume.go(name, str(sharded_folders), tmp_path, ckpt_path=str(out / name / form / "step=1.ckpt"))
    torch.testing.assert_close(found, one[name], atol=2e-7, rtol=0)


@pytest.mark.parametrize("name", sharded_resume.CASES)
def test_parts_hold_what_the_file_holds(name, kept):
    """Whole weights in the file, half of the rows in each part; frozen networks in neither."""
    out, _, _ = kept
    file, parts = (read_any(out / name / form / "step=2.ckpt") for form in FORMS)
    assert file["state_dict"].keys() == parts["state_dict"].keys()
    for key, value in file["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    assert not any("rewards" in key or ("reference" in key and name != "grpo") for key in file["state_dict"])
    slots = [one["optimizer_states"][0]["state"] for one in (file, parts)]
    for number, own in slots[0].items():
        for key, value in own.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(slots[1][number][key])), (number, key)


def test_a_folder_of_parts_is_exported_like_a_file(kept, tmp_path):
    out, _, _ = kept
    found = []
    for form in FORMS:
        export(str(out / "ppo_lora" / form / "step=2.ckpt"), str(tmp_path / form))
        found.append(load_file(tmp_path / form / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_part_that_cannot_be_written_costs_one_checkpoint(kept):
    """All processes give it up and remove the other parts; the run goes on and saves the next."""
    out, _, ranks = kept
    said = ranks[0]["full disk"]["said"]
    assert re.search(r"NOT SAVED at step 1: .*step=1.ckpt: No space left on device \(process 1\) \(errno 28\)", said)
    for found in ranks:
        assert torch.equal(found["full disk"]["weights"], found["sft", "parts", "whole run"])
    assert [path.name for path in (out / "full").iterdir()] == ["step=2.ckpt"]


def test_a_part_that_is_missing_is_named(kept, tmp_path):
    import shutil

    out, _, _ = kept
    copy = tmp_path / "step=1.ckpt"
    shutil.copytree(out / "sft" / "parts" / "step=1.ckpt", copy)
    (copy / "00001-of-00002.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"step=1.ckpt lacks 00001-of-00002.ckpt"):
        read_any(copy)
