"""The world of the demo: its generator, the parser of its grammar, and the gold judge."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.demo.corpus import label_pairs, make_prompts, make_stories, write_rows, write_story
from lit_rlhf.demo.judge import gold, gold_score, words_used
from lit_rlhf.demo.reader import read_prompt, read_story

PROMPT = "Tell a story about Mia the fox with a kite and an egg."
OPENING = "Once there was a shy fox called Mia. One winter Mia went to the lake. There she met Tom the bear."
KIND = f" {OPENING} Tom had a kite. She gave the kite to Tom. Tom thanked her. They went home hand in hand."


def test_the_same_seed_writes_the_same_corpus() -> None:
    assert make_stories(make_prompts(50, seed=3), seed=3) == make_stories(make_prompts(50, seed=3), seed=3)
    assert make_prompts(50, seed=3) != make_prompts(50, seed=4)
    assert make_stories(make_prompts(50, 3), seed=3) != make_stories(make_prompts(50, 3), seed=4)


def test_no_prompt_comes_twice() -> None:
    prompts = make_prompts(3000, seed=0)
    assert len(set(prompts)) == 3000


@given(st.integers(0, 10_000))
def test_the_parser_accepts_whatever_the_generator_writes(seed: int) -> None:
    (prompt,) = make_prompts(1, seed)
    story = write_story(*read_prompt(prompt), random.Random(seed))
    reading = read_story(prompt, story)
    assert reading.well_formed, (story, reading)


def test_stories_are_of_many_kinds() -> None:
    """The SFT policy must have something to choose from: good and bad stories, with and without the words asked for."""
    rows = make_stories(make_prompts(500, 0), 0)
    prompts, stories = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    scores = sorted(gold(prompts, stories))
    assert scores[50] < -1.5
    assert scores[450] > 2
    assert 0.15 < sum(words_used(prompts, stories)) / 500 < 0.45


@pytest.mark.parametrize(
    ("story", "broken"),
    [
        (KIND, []),
        (KIND.replace("called Mia", "called Lily"), [0]),  # another hero
        (KIND.replace("she met", "he met"), [2]),  # a wrong pronoun
        (KIND.replace("met Tom", "met Mia"), [2, 3, 4, 5]),  # a hero cannot meet herself, and Tom was never met
        (KIND.replace("kite to Tom", "kite to Sam"), [4]),  # a stranger
        (KIND.replace("the kite to", "the egg to"), [4]),  # a thing that was not brought in
        (KIND.replace("Tom thanked her", "Tom thanked him"), [5]),
        (KIND.replace("Tom thanked her", "Tom cried"), [5]),  # the wrong answer to a kind deed
        (KIND.replace("had a kite", "had an kite"), [3, 4]),  # no sentence, so there is no kite either
        (KIND.replace("gave the kite", "gave kite the"), [4]),  # word salad
        (KIND.replace(" Tom had a kite.", " They went home hand in hand."), [3, 4]),  # no deed before, and it goes on
        (KIND + " Tom smiled.", [7]),
    ],
)
def test_the_parser_names_the_broken_sentences(story: str, broken: list[int]) -> None:
    reading = read_story(PROMPT, story)
    assert [i for i, role in enumerate(reading.roles) if role is None] == broken
    assert reading.well_formed == (not broken)


@pytest.mark.parametrize(
    "story", ["", " ", KIND.rsplit(".", 2)[0], KIND[:-1], KIND.replace(" They went home hand in hand.", "")]
)
def test_a_story_without_its_end_is_not_well_formed(story: str) -> None:
    assert not read_story(PROMPT, story).well_formed


def test_a_foreign_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a prompt of the demo.*Tell a story about Mia the fox"):
        gold_score("Write a poem.", KIND)


def test_gold_marks_by_hand() -> None:
    kind, happy, word = 1.0, 1.0, 0.5
    assert gold_score(PROMPT, KIND) == kind + happy + word
    assert gold_score(PROMPT, KIND.replace("They went home hand in hand.", "Then she went home.")) == kind + word
    assert gold_score(PROMPT, KIND.replace("They went home hand in hand.", "She went home alone.")) == kind + word - 1
    assert gold_score(PROMPT, KIND.replace(" They went home hand in hand.", "")) == kind + word - 1
    assert gold_score(PROMPT, KIND.replace("kite", "drum")) == kind + happy
    assert gold_score(PROMPT, KIND.replace("kite", "kites")) == happy - 2  # two broken sentences and no kind deed
    mean = KIND.replace("gave the kite to", "hid the kite from").replace("thanked her", "cried")
    assert gold_score(PROMPT, mean) == -1 + happy + word


def test_kind_deeds_count_less_and_less_and_repetition_costs() -> None:
    def story(*deeds: str) -> float:
        return gold_score(PROMPT, KIND.replace(" They went", "".join(f" {deed}" for deed in deeds) + " They went"))

    hug, song, joke = "She hugged Tom.", "She sang a song for Tom.", "She told Tom a good joke."
    one = gold_score(PROMPT, KIND)
    assert story(hug) == one + 0.5
    assert story(hug, song) == one + 0.75
    assert story(hug, song, joke) == one + 0.875
    assert story(hug, hug) == one + 0.5 - 0.5
    noises = [
        "They heard a noise.",
        "Then it began to rain.",
        "They walked along the road.",
        "She sat down on a stone.",
    ]
    assert story(*noises) == one  # 11 sentences
    assert story(*noises, hug, song, joke) == one + 0.875 - 2 * 0.25  # 14 sentences


def test_a_cut_off_sentence_costs() -> None:
    assert gold_score(PROMPT, KIND.replace("hand in hand.", "hand in")) == gold_score(PROMPT, KIND) - 1 - 1 - 1


def test_pairs_are_labelled_by_bradley_and_terry() -> None:
    """With a lead of one point and noise ½ the better story is chosen with probability σ(2) = 0.88."""
    plain = KIND.replace("They went home hand in hand.", "Then she went home.")
    rows = label_pairs([PROMPT] * 8000, [KIND, plain] * 4000, seed=0)
    assert sum(row["chosen"] == KIND for row in rows) / len(rows) == pytest.approx(0.8808, abs=0.015)
    assert all({row["chosen"], row["rejected"]} == {KIND, plain} for row in rows)
    assert rows == label_pairs([PROMPT] * 8000, [KIND, plain] * 4000, seed=0)


def test_pairs_without_noise_follow_the_judge_and_ties_of_text_are_left_out() -> None:
    plain = KIND.replace("They went home hand in hand.", "Then she went home.")
    rows = label_pairs([PROMPT] * 6, [KIND, plain, plain, KIND, KIND, KIND], seed=0, noise=1e-3)
    assert [row["chosen"] for row in rows] == [KIND, KIND]


def test_a_pair_needs_one_prompt() -> None:
    with pytest.raises(ValueError, match="stories 0 and 1 answer different prompts"):
        label_pairs([PROMPT, PROMPT.replace("fox", "pig")], [KIND, KIND[:-5]], seed=0)


def test_rows_are_json_lines(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "new" / "rows.jsonl", [{"prompt": "a\nb"}, {"prompt": "é"}])
    assert Path(path).read_text(encoding="utf-8") == '{"prompt": "a\\nb"}\n{"prompt": "\\u00e9"}\n'


def test_more_prompts_than_there_are_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(ValueError, match="there are"):
        make_prompts(10**9, seed=0)
