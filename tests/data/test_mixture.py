"""Several sources as one: what an epoch reads of each, every row's turn, exact resume, splits, what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.data import DataError, PreferenceData, PromptData, SFTData
from lit_rlhf.data.mixture import Mixture, sources_of


@pytest.fixture
def two(rows_file) -> tuple[str, str]:
    """Two files of prompts: six rows called a0 … a5 and ten called b0 … b9."""
    return tuple(
        rows_file([{"prompt": f"{name}{i}", "user": i} for i in range(count)], f"{name}.jsonl")
        for name, count in (("a", 6), ("b", 10))
    )


@pytest.fixture
def make(tokenizer_folder):
    def build(kind, train, **knobs):
        data = kind(train, **{"val_fraction": 0, "batch_size": 2, "tokenizer": tokenizer_folder, **knobs})
        data.setup("fit")
        return data

    return build


def epoch_of(data) -> list[str]:
    return [prompt for batch in data.train_dataloader() for prompt in batch.prompts]


def test_without_weights_every_row_is_read_once_and_the_sources_are_shuffled_together(make, two):
    rows = epoch_of(make(PromptData, list(two)))
    assert sorted(rows) == sorted([*(f"a{i}" for i in range(6)), *(f"b{i}" for i in range(10))])
    assert len({row[0] for row in rows[:8]}) == len({row[0] for row in rows[8:]}) == 2


def test_a_weight_is_how_often_an_epoch_reads_a_source(make, two, caplog):
    data = make(PromptData, [{"path": two[0], "weight": 2.5}, {"path": two[1], "weight": 0.2}])
    assert f"an epoch reads {two[0]} 15 (88.2 %), {two[1]} 2 (11.8 %)" in caplog.text
    data.position.seek(0, 0)
    epochs = []
    loader = data.train_dataloader()
    for _ in range(10):
        epochs.append([prompt for batch in loader for prompt in batch.prompts])
    assert {len(epoch) for epoch in epochs} == {16}  # 17 rows, in full batches
    data = make(PromptData, [{"path": two[0], "weight": 2.5}, {"path": two[1], "weight": 0.2}], batch_size=17)
    loader = data.train_dataloader()
    epochs = [Counter(next(iter(loader)).prompts) for _ in range(10)]
    assert all(2 <= epoch[f"a{i}"] <= 3 for epoch in epochs for i in range(6))
    read = sum(epochs, Counter())
    assert {read[f"a{i}"] for i in range(6)} == {25}  # 2.5 times 10, each of them
    assert {read[f"b{i}"] for i in range(10)} == {2}  # no row is left out for good


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0.01, 4)), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_row_has_its_turn_and_the_order_is_a_function_of_seed_and_epoch(sources, epochs, seed):
    mixture = Mixture.of(*zip(*sources, strict=True))
    read: Counter[int] = Counter()
    for epoch in range(epochs):
        order = mixture.order(seed, epoch)
        assert order == mixture.order(seed, epoch)
        assert len(order) == len(mixture)
        read.update(order)
    first = 0
    for size, count in zip(mixture.sizes, mixture.counts, strict=True):
        times = [read[first + i] for i in range(size)]
        assert sum(times) == epochs * count
        assert max(times) - min(times) <= 1
        first += size
    assert not [i for i in read if i >= first]


def test_each_pass_over_a_source_is_in_a_new_order():
    mixture = Mixture.of([20, 20], [0.5, 0.5])
    halves = [frozenset(mixture.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 2, 4)]
    assert len(set(halves)) == 6
    first, second = ({i % 20 for i in halves[0] if i // 20 == source} for source in (0, 1))
    assert first != second  # two sources of one length are not cut alike


def test_one_source_is_read_as_it_always_was():
    expected = torch.randperm(9, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)).tolist()
    assert Mixture.of([9], [1.0]).order(seed=3, epoch=2) == expected


def test_a_mixture_goes_on_within_an_epoch_and_after_it(make, two):
    train = [{"path": two[0], "weight": 0.5}, two[1]]
    data = make(PromptData, train)
    loader = data.train_dataloader()
    batches = [batch.prompts for _ in range(3) for batch in loader]
    for done in (2, 6, 9):
        again = make(PromptData, train)
        resumed = again.train_dataloader()
        again.load_state_dict({"epoch": done // 6, "rows": 2 * (done % 6)})
        left = [batch.prompts for _ in range(4) for batch in resumed][: 18 - done]
        assert left == batches[done:], done


def test_sources_may_be_of_different_kinds(make, rows_file):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    train = [rows_file([{"messages": talk}], "m.jsonl"), rows_file([{"text": "ab"}], "t.jsonl")]
    data = make(SFTData, train)
    batch = next(iter(data.train_dataloader()))
    texts = {data.tokenizer.decode(ids[mask]) for ids, mask in zip(batch.ids, batch.loss_mask, strict=True)}
    assert texts == {"yo</s>", "b</s>"}


def test_a_column_that_a_source_lacks_is_none_in_its_rows(make, rows_file):
    train = [
        rows_file([{"prompt": "p", "answer": "3"}], "x.jsonl"),
        rows_file([{"prompt": "q", "hint": "h"}], "y.jsonl"),
    ]
    batch = next(iter(make(PromptData, train).train_dataloader()))
    answers = dict(zip(batch.prompts, zip(batch.columns["answer"], batch.columns["hint"], strict=True), strict=True))
    assert answers == {"p": ("3", None), "q": (None, "h")}


def test_a_margin_stands_in_all_sources_or_in_none(make, rows_file):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    train = [rows_file([pair], "x.jsonl"), rows_file([{**pair, "margin": 1}], "y.jsonl")]
    with pytest.raises(DataError, match='some sources have a column "margin" and others none'):
        make(PreferenceData, train)
    assert len(next(iter(make(PreferenceData, [train[0], {"path": train[0], "split": "s"}]).train_dataloader()))) == 2


def test_one_user_stands_on_one_side_whichever_source_he_is_in(make, two):
    data = make(PromptData, list(two), val_fraction=0.3, split_by="user", seed=1)
    sides = [{data._train[i][0][1:] for i in range(len(data._train))}, {row[0][1:] for row in data._val}]
    assert not sides[0] & sides[1]
    assert len(data._train) + len(data._val) == 16


def test_validation_reads_every_row_of_several_sources_once(make, two):
    data = make(PromptData, two[0], val=list(two), val_batch_size=4)
    assert [p for batch in data.val_dataloader() for p in batch.prompts] == [
        *(f"a{i}" for i in range(6)),
        *(f"b{i}" for i in range(10)),
    ]
    with pytest.raises(DataError, match="val: a weight has no meaning here"):
        make(PromptData, two[0], val=[{"path": two[1], "weight": 2}])


def test_limits_count_rows_of_each_source(make, two):
    data = make(PromptData, list(two), val_fraction=0.2, limit=3, val_limit=1)
    assert Counter(row[0][0] for row in data._train) == {"a": 3, "b": 3}
    assert 1 <= len(data._val) <= 2


def test_a_wrong_row_is_named_by_its_own_file(make, two, rows_file):
    bad = rows_file([{"prompt": "x"}, {"prompt": ""}], "bad.jsonl")
    with pytest.raises(DataError, match=r'bad.jsonl, line 2: column "prompt"'):
        make(PromptData, [two[0], bad])
    with pytest.raises(DataError, match=r'b.jsonl has no column "usr"; did you mean user\?'):
        make(PromptData, list(two)[::-1], val_fraction=0.2, split_by="usr")


def test_a_split_may_be_named_for_one_source(make, two, tmp_path):
    for name in ("train", "test"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
    data = make(PromptData, [{"path": str(tmp_path / "d"), "split": "test"}, str(tmp_path / "d")], batch_size=2)
    assert sorted(epoch_of(data)) == ["test", "train"]
    data = make(PromptData, [{"path": str(tmp_path / "d")}, two[0]], val=str(tmp_path / "d"), val_split="test")
    assert [row[0] for row in data._val] == ["test"]


def test_a_source_that_is_all_held_out_is_named(make, rows_file):
    files = [rows_file([{"prompt": f"{n}{i}"} for i in range(n)], f"{n}.jsonl") for n in (1, 3)]
    with pytest.raises(DataError, match=r"1.jsonl: all of its rows are held out; lower val_fraction, or name val"):
        make(PromptData, files, val_fraction=0.7, seed=0)


@pytest.mark.parametrize(
    ("train", "error"),
    [
        ([], "train: expected a path or a list of at least one source"),
        ({"path": "a"}, "train: expected a path or a list of at least one source"),
        ([3], "train, source 1: expected a path, or path and perhaps weight and split, got 3"),
        (["a", {"weight": 1}], r"train, source 2: expected a path, or path .* got {'weight': 1}"),
        (
            [{"path": "a", "wieght": 1}],
            r'train, source 1 \(a\): no key "wieght" is known; known are path, weight, split',
        ),
        (["a", {"path": "a", "weight": 2}], "train, source 2: a is named twice; to read it twice give it weight: 2"),
        *(
            ([{"path": "a", "weight": weight}], r"train, source 1 \(a\): weight is .*; expected a number above 0")
            for weight in (0, -1.0, float("nan"), float("inf"), "2", True)
        ),
    ],
)
def test_sources_that_make_no_sense_are_refused(train, error):
    with pytest.raises(DataError, match=error):
        sources_of(train, "train")


def test_a_missing_path_is_named(make, two):
    with pytest.raises(DataError, match=r"c.jsonl does not exist .*did you mean"):
        make(PromptData, [two[0], {"path": two[1].replace("b.jsonl", "c.jsonl"), "weight": 2}])
