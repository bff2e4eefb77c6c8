"""The three data modules: every shape of row, every knob, and rows that are wrong."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from lit_rlhf.data import DataError, PreferenceData, PromptData, SFTData
from lit_rlhf.data.sources import load_rows

HI = [{"role": "user", "content": "hi"}]
TALK = [*HI, {"role": "assistant", "content": "yo"}]


@pytest.fixture
def make(rows_file, tokenizer_folder):
    """A function that sets up a data module over rows, all of them for training in batches of all."""

    def build(kind, rows, **knobs):
        knobs = {"val_fraction": 0, "batch_size": max(1, len(rows)), "tokenizer": tokenizer_folder, **knobs}
        data = kind(rows_file(rows), **knobs)
        data.setup("fit")
        return data

    return build


def texts(data, batch_ids, mask) -> list[str]:
    return [data.tokenizer.decode(ids[counts]) for ids, counts in zip(batch_ids, mask, strict=True)]


def batch_of(data):
    return next(iter(data.train_dataloader()))


SHAPES = {
    "messages": ([{"messages": TALK}], "<s><user>hi<assistant>yo</s>", "yo</s>"),
    "text pair": ([{"prompt": "a ", "completion": "b"}], "a b</s>", "b</s>"),
    "chat pair": ([{"prompt": HI, "completion": TALK[1:]}], "<s><user>hi<assistant>yo</s>", "yo</s>"),
    "mixed pair": ([{"prompt": HI, "completion": "yo"}], "<s><user>hi<assistant>yo</s>", "yo</s>"),
    "text": ([{"text": "ab"}], "ab</s>", "b</s>"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_sft_takes_every_shape(make, shape):
    rows, whole, learned = SHAPES[shape]
    data = make(SFTData, rows)
    batch = batch_of(data)
    assert texts(data, batch.ids, batch.mask) == [whole]
    assert texts(data, batch.ids, batch.loss_mask) == [learned]


def test_sft_batches_are_padded_on_the_right_and_masked_by_length(make):
    data = make(SFTData, [{"text": "abcd"}, {"text": "a</s>"}], seed=1)
    batch = batch_of(data)
    assert batch.ids.dtype == torch.long
    assert sorted(batch.mask.sum(dim=1).tolist()) == [2, 5]
    assert (batch.ids[~batch.mask] == tiny.PAD).all()
    assert not (batch.loss_mask & ~batch.mask).any()
    assert all(row[0] or not row.any() for row in batch.mask)


def test_padding_with_eos_leaves_the_masks_alone(rows_file, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "t")
    rows = rows_file([{"text": "abcd"}, {"text": "ab"}])
    data = SFTData(rows, val_fraction=0, batch_size=2, tokenizer=str(tmp_path / "t"))
    data.setup()
    batch = batch_of(data)
    assert (batch.ids[~batch.mask] == tiny.EOS).all()
    assert batch.loss_mask.sum(dim=1).sort().values.tolist() == [2, 4]


def test_columns_and_templates_spare_rewriting_files(make):
    rows = [{"question": "1+1?", "answer": "2", "kind": "sum"}]
    data = make(SFTData, rows, prompt_column="question", completion_column="answer")
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["1+1?2</s>"]
    data = make(SFTData, rows, prompt_template="{kind}: {question} {{", completion_column="answer")
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["sum: 1+1? {2</s>"]
    data = make(SFTData, rows, prompt_column="question", completion_column="answer", chat=True)
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["<s><user>1+1?<assistant>2</s>"]
    data = make(SFTData, rows, prompt_column="question", completion_column="answer", system_prompt="Sum.")
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["<s><system>Sum.<user>1+1?<assistant>2</s>"]
    data = make(SFTData, [{"story": "x"}], text_column="story")
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["x</s>"]
    data = make(SFTData, [{"talk": TALK}], messages_column="talk", system_prompt="S")
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["<s><system>S<user>hi<assistant>yo</s>"]


def test_a_given_chat_template_becomes_the_tokenizers(make):
    data = make(PromptData, [{"prompt": "hi"}], chat=True, chat_template="dialogue")
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["<s>\n\nHuman: hi\n\nAssistant:"]
    assert "Human" in data.tokenizer.chat_template


@pytest.mark.parametrize("field", ["{question.__class__}", "{question[0]}", "{}", "{question:>9}", "{question"])
def test_a_prompt_template_reaches_into_nothing(make, field):
    with pytest.raises(DataError, match=r"prompt_template: "):
        make(PromptData, [{"question": "q"}], prompt_template=field)


def test_a_field_without_a_column_names_the_nearest(make):
    with pytest.raises(DataError, match=r'no column "questoin"; did you mean question\?'):
        make(PromptData, [{"question": "q"}], prompt_template="{questoin}")


def test_sft_learns_what_learn_says(make):
    rows = [{"messages": [*TALK, *TALK]}]
    counts = [
        int(batch_of(make(SFTData, rows, learn=how)).loss_mask.sum()) for how in ("completion", "assistant", "all")
    ]
    assert counts[0] == 3
    assert counts[1] == 6
    assert counts[2] > 20


# --- too long ---------------------------------------------------------------------------------------------------------

LONG = [{"text": "x" * 9}] * 9 + [{"text": "x" * 100}]


def test_sft_too_long_is_an_error_cut_or_dropped(make):
    with pytest.raises(DataError, match=r'line 10: 101 tokens are more than max_length=10; .*"truncate" or "drop"'):
        make(SFTData, LONG, max_length=10)
    cut = make(SFTData, LONG, max_length=10, too_long="truncate")
    assert (cut.truncated, sum(cut.dropped.values())) == (1, 0)
    ids = batch_of(cut).ids
    assert ids.shape == (10, 10)
    assert (ids[:, -1] == tiny.EOS).sum() == 9  # a cut text has not ended
    dropped = make(SFTData, LONG, max_length=10, too_long="drop", batch_size=9)
    assert dropped.dropped == {"longer than max_length=10": 1}
    with pytest.raises(DataError, match=r"1 of 10 rows would be dropped .*max_dropped=0.05"):
        make(SFTData, LONG, max_length=10, too_long="drop", max_dropped=0.05)


def test_sft_that_is_cut_before_anything_learned_is_dropped(make):
    rows = [{"prompt": "x" * 20, "completion": "y"}, {"prompt": "x", "completion": "y"}]
    data = make(SFTData, rows, max_length=10, too_long="truncate", max_dropped=0.5, batch_size=1)
    assert data.dropped == {"with nothing to learn within max_length": 1}


def test_prompts_too_long_are_an_error_cut_on_the_left_or_dropped(make):
    rows = [{"prompt": "<s>abcdef", "n": 1}, {"prompt": "ab", "n": 2}]
    with pytest.raises(DataError, match=r'line 1: 7 tokens are more than max_prompt_length=4; .*"truncate_left"'):
        make(PromptData, rows, max_prompt_length=4)
    data = make(PromptData, rows, max_prompt_length=4, too_long="truncate_left")
    batch = batch_of(data)
    by_row = dict(zip(batch.columns["n"], texts(data, batch.ids, batch.mask), strict=True))
    assert by_row == {1: "<s>def", 2: "ab"}
    assert data.truncated == 1
    data = make(PromptData, rows, max_prompt_length=4, too_long="drop", max_dropped=0.5, batch_size=1)
    assert batch_of(data).columns == {"n": (2,)}


def test_pairs_too_long_lose_the_start_of_the_prompt_and_never_a_response(make):
    rows = [
        {"prompt": "<s>abcdef", "chosen": "xy", "rejected": "z"},
        {"prompt": "a", "chosen": "z" * 9, "rejected": "y"},
    ]
    with pytest.raises(DataError, match=r'line 1: 10 tokens are more than max_length=6; .*"truncate_left"'):
        make(PreferenceData, rows, max_length=6)
    data = make(PreferenceData, rows, max_length=6, too_long="truncate_left", max_dropped=0.5, batch_size=1)
    batch = batch_of(data)
    assert texts(data, batch.ids, batch.mask) == ["<s>efxy</s>", "<s>defz</s>"]
    assert data.dropped == {"with a response that alone fills max_length=6": 1}
    with pytest.raises(DataError, match="2 longer than max_length=6"):
        make(PreferenceData, rows, max_length=6, too_long="drop")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_and_carry_the_other_columns(make):
    rows = [{"prompt": "abc", "answer": "1", "extra": [1, None]}, {"prompt": HI, "answer": None, "extra": []}]
    data = make(PromptData, rows)
    batch = batch_of(data)
    first = batch.prompts.index("abc")
    assert batch.prompts[1 - first] == HI
    assert batch.columns["answer"][first] == "1"
    assert batch.columns["extra"][first] == [1, None]
    assert set(batch.columns) == {"answer", "extra"}
    assert batch.mask[:, -1].all()
    assert batch.mask[first].sum() == 3
    assert (batch.ids[~batch.mask] == tiny.PAD).all()
    assert texts(data, batch.ids, batch.mask)[1 - first] == "<s><user>hi<assistant>"


def test_prompt_words_are_the_first_words_as_they_stand(make):
    rows = [{"text": " Once  upon\na time."}, {"text": "too short"}, {"text": "Just three words"}]
    data = make(PromptData, rows, prompt_column="text", prompt_words=3, max_dropped=0.7, batch_size=1)
    assert batch_of(data).prompts == (" Once  upon\na",)
    assert batch_of(data).columns == {"text": (" Once  upon\na time.",)}
    assert data.dropped == {"of no more than prompt_words=3 words": 2}


def test_duplicate_prompts_all_arrive(make):
    data = make(PromptData, [{"prompt": "same", "i": i} for i in range(6)])
    assert sorted(batch_of(data).columns["i"]) == list(range(6))


def test_a_column_that_rewards_get_from_elsewhere_is_refused(make):
    with pytest.raises(DataError, match='"completions" from the sampler; rename that column'):
        make(PromptData, [{"prompt": "a", "completions": "b"}])


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_give_two_rows_and_one_comparison_each(make):
    rows = [{"prompt": "p", "chosen": c, "rejected": "bad", "margin": m} for c, m in (("good", 1), ("fine", 0.5))]
    data = make(PreferenceData, rows)
    batch = batch_of(data)
    assert batch.ids.shape[0] == 4
    said = texts(data, batch.ids, batch.mask)
    pairs = {(said[b], said[w], m) for b, w, m in zip(batch.better, batch.worse, batch.margin.tolist(), strict=True)}
    assert pairs == {("pgood</s>", "pbad</s>", 1.0), ("pfine</s>", "pbad</s>", 0.5)}
    assert batch.groups.tolist() == [0, 1]
    assert batch_of(make(PreferenceData, [{"prompt": "p", "chosen": "a", "rejected": "b"}])).margin is None


def test_other_column_names_and_chat_reach_pairs(make):
    rows = [{"q": "hi", "win": "yo", "lose": "no"}]
    data = make(PreferenceData, rows, prompt_column="q", chosen_column="win", rejected_column="lose", chat=True)
    batch = batch_of(data)
    assert texts(data, batch.ids, batch.mask) == ["<s><user>hi<assistant>yo</s>", "<s><user>hi<assistant>no</s>"]


def test_without_a_prompt_the_common_beginning_is_one(make):
    spoken = [{"chosen": TALK, "rejected": [*HI, {"role": "assistant", "content": "no"}]}]
    data = make(PreferenceData, spoken)
    assert texts(data, (b := batch_of(data)).ids, b.mask) == [
        "<s><user>hi<assistant>yo</s>",
        "<s><user>hi<assistant>no</s>",
    ]
    written = [{"chosen": "Q: hi\nA: yours", "rejected": "Q: hi\nA: young"}]  # "you" belongs to the responses
    data = make(PreferenceData, written, max_length=9, too_long="truncate_left")
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["A: yours</s>", "A: young</s>"]


def test_ranked_responses_are_compared_best_first_without_ties(make):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]}]
    batch = batch_of(make(PreferenceData, rows))
    assert batch.ids.shape[0] == 3
    assert list(zip(batch.better.tolist(), batch.worse.tolist(), strict=True)) == [(0, 1), (0, 2)]
    rows = [{"prompt": "p", "responses": ["a", "b", "c"]}, {"prompt": "p", "responses": ["d", "e"]}]
    batch = batch_of(make(PreferenceData, rows))
    assert len(batch) == 2
    assert batch.ids.shape[0] == 5
    assert sorted(batch.groups.tolist().count(g) for g in (0, 1)) == [1, 3]
    for better, worse in zip(batch.better, batch.worse, strict=True):
        assert batch.ids[better][1] < batch.ids[worse][1]  # letters in order, so best first


def test_rankings_of_several_sizes_share_a_batch_and_each_response_stands_once(make):
    """K 4, 2 and 3 (with a tie); every response's length is told without its prompt."""
    rows = [
        {"prompt": "pppp", "responses": ["a", "bb", "ccc", "dddd"], "ranks": [0, 1, 2, 3]},
        {"prompt": "p", "responses": ["e", "f"], "ranks": [7, 2]},
        {"prompt": "p", "responses": ["g", "h", "i"], "ranks": [1, 1, 0.5]},
    ]
    data = make(PreferenceData, rows, batch_size=3)
    batch = PreferenceData.collate(data.encode(load_rows(data.hparams.train)), pad=0)
    assert len(batch) == 3
    written = texts(data, batch.ids, batch.mask)
    assert written == [f"{row['prompt']}{r}</s>" for row in rows for r in row["responses"]]
    assert batch.lengths.tolist() == [len(r) + 1 for row in rows for r in row["responses"]]
    better = [(written[b][-5], written[w][-5]) for b, w in zip(batch.better, batch.worse, strict=True)]
    assert better == [*itertools.combinations("abcd", 2), ("f", "e"), ("i", "g"), ("i", "h")]
    assert batch.groups.tolist() == [0] * 6 + [1] + [2] * 2
    assert [written[i][-5] for i in batch.best.nonzero()] == ["a", "f", "i"]


def test_a_row_of_ties_only_is_dropped_and_counted(make):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": ranks} for ranks in ([1, 1, 1], [0, 1, 2])]
    data = make(PreferenceData, rows, max_dropped=0.5, batch_size=1)
    assert data.dropped == {"with nothing to compare (responses equal or tied)": 1}
    assert batch_of(data).better.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match=r"1 of 2 rows would be dropped \(1 with nothing to compare"):
        make(PreferenceData, rows)


def test_pairs_that_say_nothing_are_dropped_and_counted(make):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": ""}]
    data = make(PreferenceData, rows, max_dropped=0.5, batch_size=1)
    assert data.dropped == {"with nothing to compare (responses equal or tied)": 1}
    assert texts(data, (b := batch_of(data)).ids, b.mask) == ["pa</s>", "p</s>"]


# --- rows that are wrong ----------------------------------------------------------------------------------------------

GOOD_SFT = {"prompt": "p", "completion": "c"}
GOOD_PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
HOSTILE = [
    (SFTData, {"text": "t"}, {"text": ""}, 'column "text": the text is empty'),
    (SFTData, {"text": "t"}, {"text": "  \n"}, 'column "text": the text is empty'),
    (SFTData, {"text": "t"}, {"text": None}, 'column "text": expected text, got nothing; fill it or remove the row'),
    (SFTData, {"text": "t"}, {}, 'column "text": expected text, got nothing'),
    (SFTData, {"text": "t"}, {"text": 5}, "column \"text\": expected text, got int '5'"),
    (SFTData, {"text": "t"}, {"text": "<s>"}, "no token of it would be learned"),
    (SFTData, GOOD_SFT, {"prompt": "p", "completion": ""}, 'column "completion": the text is empty'),
    (SFTData, GOOD_SFT, {"prompt": None, "completion": "c"}, 'column "prompt": expected text or a list of messages'),
    (SFTData, GOOD_SFT, {"prompt": "p", "completion": TALK[1:]}, "the prompt is text but the completion is messages"),
    (SFTData, GOOD_SFT, {"prompt": HI, "completion": HI}, "its last message must be from the assistant"),
    (SFTData, {"messages": TALK}, {"messages": []}, 'column "messages": the list of messages is empty'),
    (SFTData, {"messages": TALK}, {"messages": "hi"}, 'column "messages": expected a list of messages, got str'),
    (SFTData, {"messages": TALK}, {"messages": ["hi"]}, "expected message 1 to be"),
    (SFTData, {"messages": TALK}, {"messages": [{"from": "human", "value": "hi"}]}, 'message 1 to have a "role"'),
    (
        SFTData,
        {"messages": TALK},
        {"messages": [*HI, {"role": "assistant", "content": None}]},
        "message 2 to have text",
    ),
    (SFTData, {"messages": TALK}, {"messages": HI}, "the last message is from 'user', not from the assistant"),
    (PromptData, {"prompt": "p"}, {"prompt": ""}, 'column "prompt": the text is empty'),
    (PromptData, {"prompt": "p"}, {"prompt": 3.5}, "expected text or a list of messages, got float"),
    (PromptData, {"prompt": "p"}, {"prompt": []}, "the list of messages is empty"),
    (PromptData, {"prompt": "p"}, {"prompt": {"role": "user"}}, "expected text or a list of messages, got dict"),
    (PreferenceData, GOOD_PAIR, {**GOOD_PAIR, "chosen": None}, 'column "chosen": expected text or a list'),
    (PreferenceData, GOOD_PAIR, {**GOOD_PAIR, "rejected": 1}, 'column "rejected": expected text or a list'),
    (
        PreferenceData,
        {**GOOD_PAIR, "margin": 1},
        {**GOOD_PAIR, "margin": "x"},
        'column "margin": expected a finite number',
    ),
    (PreferenceData, {**GOOD_PAIR, "margin": 1}, GOOD_PAIR, 'column "margin": expected a finite number, got nothing'),
    (PreferenceData, {"chosen": "a b", "rejected": "a c"}, {"chosen": "b", "rejected": "c"}, "no common beginning"),
    (PreferenceData, {"chosen": TALK, "rejected": TALK}, {"chosen": TALK, "rejected": "x y"}, "both be text or both"),
]


@pytest.mark.parametrize(("kind", "good", "bad", "error"), HOSTILE)
def test_a_wrong_row_is_named_with_file_line_and_column(make, kind, good, bad, error):
    with pytest.raises(DataError) as caught:
        make(kind, [good, bad], max_dropped=0.9)
    assert error in str(caught.value)
    assert "rows.jsonl, line 2: " in str(caught.value)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "p", "responses": ["a"]}, 'column "responses": expected a list of two or more'),
        ({"prompt": "p", "responses": "a b"}, 'column "responses": expected a list of two or more'),
        ({"prompt": "p", "responses": None}, 'column "responses": expected a list of two or more'),
        ({"prompt": "p", "responses": ["a", 2]}, r'column "responses\[1\]": expected text or a list'),
        ({"prompt": "p", "responses": [None, "a"]}, r'column "responses\[0\]": expected text .* got nothing'),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, 'column "ranks": expected 2 numbers'),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": None}, 'column "ranks": expected 2 numbers'),
        (
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]},
            r'column "ranks\[1\]": expected a finite number',
        ),
        ({"prompt": "p", "responses": ["a", "b"], "margin": 1}, '"margin" belongs to chosen and rejected'),
    ],
)
def test_wrong_ranks_are_named(make, row, error):
    with pytest.raises(DataError, match=error):
        make(PreferenceData, [row])


@pytest.mark.parametrize("kind", [SFTData, PreferenceData, PromptData])
def test_unknown_columns_name_the_nearest(make, kind):
    with pytest.raises(DataError, match=r"did you mean prompt_text\? It has: prompt_text, label") as caught:
        make(kind, [{"prompt_text": "a", "label": 1}], prompt_column="prompt_txt")
    assert "prompt_txt" in str(caught.value)


def test_a_prompt_that_the_assistant_ends_is_refused(make):
    with pytest.raises(DataError, match="the prompt ends with the assistant, so there is nothing to answer"):
        make(PromptData, [{"prompt": TALK}])


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"too_long": "shorten"}, "too_long must be one of error, truncate_left, drop, got 'shorten'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"prompt_words": 2, "prompt_template": "{prompt}"}, "prompt_words and prompt_template exclude each other"),
        ({"tokenizer": "./no/such/folder"}, "the folder ./no/such/folder does not exist"),
        ({"tokenizer": None}, "no tokenizer: set the data module's tokenizer"),
    ],
)
def test_wrong_knobs_are_refused(make, knobs, error):
    with pytest.raises(ValueError, match=error):
        make(PromptData, [{"prompt": "p"}], **knobs)
