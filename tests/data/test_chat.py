"""Messages and text become tokens and loss masks: borders, BOS, EOS, and templates of every kind."""

from __future__ import annotations

import pytest
import tiny

from lit_rlhf.data import chat
from lit_rlhf.data.templates import set_template

USER = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
TALK = [USER, YO, {"role": "user", "content": "é?"}, {"role": "assistant", "content": "ok"}]
CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Only the last turn gets an empty thought, as with Qwen3: earlier beginnings do not render as parts of the whole.
THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
)
SHOUTING = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | upper }}!{{ loop.length }}{% endfor %}"


def learned_text(tokenizer, ids, learned) -> list[str]:
    """The runs of learned tokens, as text."""
    runs, run = [], []
    for token, counts in [*zip(ids, learned, strict=True), (None, False)]:
        if counts:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_text_prompt_keeps_the_tokenizers_bos_and_loses_its_eos(bos_tokenizer, tokenizer):
    assert chat.encode_prompt(bos_tokenizer, "a") == [tiny.BOS, *chat.encode_prompt(tokenizer, "a")]


def test_text_that_begins_with_bos_gets_no_second(bos_tokenizer):
    assert chat.encode_prompt(bos_tokenizer, "<s>a") == chat.encode_prompt(bos_tokenizer, "a")


def test_rendered_messages_get_no_second_bos_and_no_eos(bos_tokenizer):
    ids = chat.encode_prompt(bos_tokenizer, [USER])
    assert bos_tokenizer.decode(ids) == "<s><user>hi<assistant>"


def test_completion_border_is_where_the_prompt_alone_ends(bos_tokenizer):
    head, tail = chat.encode_completion(bos_tokenizer, "ab", "c")
    assert head == chat.encode_prompt(bos_tokenizer, "ab")
    assert bos_tokenizer.decode(tail) == "c</s>"
    assert tail.count(tiny.EOS) == 1


@pytest.mark.parametrize(("prompt", "completion"), [("a: ", "42"), ("a:", " 42"), ("ab", "cd"), ("a:\n", "x")])
def test_prompt_tokens_are_those_of_the_prompt_alone_even_where_tokens_would_merge(
    merging_tokenizer, prompt, completion
):
    head, tail = chat.encode_completion(merging_tokenizer, prompt, completion)
    assert head == merging_tokenizer(prompt, add_special_tokens=False).input_ids
    assert merging_tokenizer.decode(head + tail) == f" {prompt}{completion}</s>"


def test_tokens_may_merge_inside_the_completion(merging_tokenizer):
    _, tail = chat.encode_completion(merging_tokenizer, "a:", " 42")
    assert merging_tokenizer.convert_ids_to_tokens(tail) == ["▁4", "2", "</s>"]


def test_prompt_and_completion_are_tokenised_in_one_piece_where_they_can(merging_tokenizer):
    """Alone the completion would get a blank in front, and what may stand before it merges with it."""
    _, tail = chat.encode_completion(merging_tokenizer, "b:", "z")
    assert merging_tokenizer.convert_ids_to_tokens(tail) == ["z", "</s>"]


def test_text_is_learned_with_its_eos_but_without_its_first_token(bos_tokenizer):
    ids, learned = chat.encode_example(bos_tokenizer, text="ab")
    assert bos_tokenizer.decode(ids) == "<s>ab</s>"
    assert learned == [False, True, True, True]


def test_text_that_ends_with_eos_gets_no_second(tokenizer):
    ids, _ = chat.encode_example(tokenizer, text="ab</s>")
    assert ids[-1] == tiny.EOS
    assert ids.count(tiny.EOS) == 1


@pytest.mark.parametrize("text", ["", "<s>"])
def test_nothing_to_learn_in_empty_text_is_an_error_that_says_why(bos_tokenizer, text):
    with pytest.raises(ValueError, match="no token of it would be learned: the text is empty"):
        chat.encode_example(bos_tokenizer, text=text)


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, CHATML, THINKING, MARKED, "dialogue"])
def test_every_assistant_turn_is_learned_with_its_eos_and_nothing_else(tokenizer, template):
    set_template(tokenizer, template)
    ids, learned = chat.encode_example(tokenizer, messages=TALK, learn="assistant")
    assert [text.strip() for text in learned_text(tokenizer, ids, learned)] == ["yo</s>", "ok</s>"]


def test_of_three_turns_every_assistant_token_and_end_is_learned_and_no_other(tokenizer):
    """Said token by token, the user's own end tokens and the words of an assistant in a user's mouth included."""
    turns = [("user", "a"), ("assistant", "b c"), ("user", "b c</s>"), ("assistant", "b c"), ("user", "e")]
    turns = [("system", "s"), *turns, ("assistant", "<user>b c")]
    ids, learned = chat.encode_example(
        tokenizer, messages=[{"role": r, "content": c} for r, c in turns], learn="assistant"
    )
    expected_ids, expected = [tiny.BOS], [False]
    for role, content in turns:
        parts = [(f"<{role}>", False), (content + ("</s>" if role == "assistant" else ""), role == "assistant")]
        for text, counts in parts:
            part = tokenizer(text, add_special_tokens=False).input_ids
            expected_ids += part
            expected += [counts] * len(part)
    assert ids == expected_ids
    assert learned == expected
    assert sum(learned) == len("b c" + "b c" + "<user>b c") + 3


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, CHATML, THINKING, "dialogue"])
def test_the_last_turn_alone_is_learned_by_default(tokenizer, template):
    set_template(tokenizer, template)
    ids, learned = chat.encode_example(tokenizer, messages=TALK)
    assert [text.strip() for text in learned_text(tokenizer, ids, learned)] in (["ok</s>"], ["</think>ok</s>"])
    assert ids[-1] == tiny.EOS


def test_a_template_that_rewrites_the_opening_still_shows_where_the_answer_is(tokenizer):
    tokenizer.chat_template = THINKING.replace("[assistant]<think>", "[assistant]<thinking>")
    ids, learned = chat.encode_example(tokenizer, messages=TALK)
    assert learned_text(tokenizer, ids, learned) == ["ok</s>"]


@pytest.mark.parametrize("learn", ["completion", "assistant"])
def test_a_template_that_hides_the_answer_is_refused(tokenizer, learn):
    tokenizer.chat_template = SHOUTING
    with pytest.raises(ValueError, match=r"changes the assistant's words.*generation"):
        chat.encode_example(tokenizer, messages=TALK, learn=learn)


def test_markers_that_enclose_nothing_are_an_error_that_says_so(tokenizer):
    tokenizer.chat_template = MARKED.replace("{{ m['content'] }}{% endgeneration %}", "{% endgeneration %}.")
    with pytest.raises(ValueError, match=r"no token of it would be learned.*markers"):
        chat.encode_example(tokenizer, messages=TALK, learn="assistant")


def test_a_templates_line_break_behind_the_last_eos_is_cut(tokenizer):
    tokenizer.chat_template = CHATML
    ids, _ = chat.encode_example(tokenizer, messages=TALK)
    assert tokenizer.decode(ids).endswith("[assistant]ok</s>")


def test_eos_is_added_and_learned_where_the_template_has_none(tokenizer):
    tokenizer.chat_template = CHATML.replace("</s>", "")
    for learn in ("completion", "assistant"):
        ids, learned = chat.encode_example(tokenizer, messages=TALK, learn=learn)
        assert ids[-1] == tiny.EOS
        assert learned[-1]


def test_all_learns_every_token_but_the_first(tokenizer):
    ids, learned = chat.encode_example(tokenizer, messages=TALK, learn="all")
    assert learned == [False] + [True] * (len(ids) - 1)


def test_prompt_messages_and_completion_text_give_the_conversations_tokens(tokenizer):
    apart, counts = chat.encode_example(tokenizer, prompt=[USER], completion="yo")
    whole, learned = chat.encode_example(tokenizer, messages=[USER, YO])
    assert (apart, counts) == (whole, learned)


def test_assistant_turns_of_a_prompt_are_learned_when_asked(tokenizer):
    ids, learned = chat.encode_example(tokenizer, prompt=TALK[:3], completion="ok", learn="assistant")
    assert learned_text(tokenizer, ids, learned) == ["yo</s>", "ok</s>"]


@pytest.mark.parametrize(
    ("messages", "learn", "why"),
    [
        ([USER], "completion", "the last message is from 'user'"),
        ([USER], "assistant", "no message has the role assistant"),
        ([YO], "completion", "nothing stands before"),
    ],
)
def test_a_conversation_without_an_answer_is_an_error_that_says_why(tokenizer, messages, learn, why):
    with pytest.raises(ValueError, match=why):
        chat.encode_example(tokenizer, messages=messages, learn=learn)


def test_messages_without_a_template_name_the_knob(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="set chat_template"):
        chat.encode_prompt(tokenizer, [USER])


def test_a_template_that_refuses_says_what_it_said(tokenizer):
    set_template(tokenizer, "dialogue")
    with pytest.raises(ValueError, match="this template knows the roles"):
        chat.encode_prompt(tokenizer, [{"role": "wizard", "content": "?"}])


def test_the_dialogue_template_is_that_of_hh(tokenizer):
    set_template(tokenizer, "dialogue")
    text = tokenizer.decode(chat.encode_prompt(tokenizer, TALK[:3]))
    assert text == "<s>\n\nHuman: hi\n\nAssistant: yo</s>\n\nHuman: é?\n\nAssistant:"


def test_a_template_may_be_text_or_a_file(tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    for given in (CHATML, str(tmp_path / "chat.jinja")):
        set_template(tokenizer, given)
        assert tokenizer.decode(chat.encode_prompt(tokenizer, [USER])) == "[user]hi</s>\n[assistant]"
    with pytest.raises(ValueError, match="existing file"):
        set_template(tokenizer, "chatml")


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        chat.encode_example(tokenizer, text="ab")


def test_keeping_the_end_keeps_bos():
    tokenizer = tiny.tiny_tokenizer()
    assert chat.keep_end(tokenizer, [tiny.BOS, 5, 6, 7], 3) == [tiny.BOS, 6, 7]
    assert chat.keep_end(tokenizer, [5, 6, 7, 8], 3) == [6, 7, 8]
    assert chat.keep_end(tokenizer, [5, 6], 3) == [5, 6]


def test_unicode_survives(tokenizer):
    ids, learned = chat.encode_example(tokenizer, prompt="né 🦊", completion=" 東京 ﬁn")
    assert tokenizer.decode(ids) == "né 🦊 東京 ﬁn</s>"
    assert tokenizer.decode([i for i, counts in zip(ids, learned, strict=True) if counts]) == " 東京 ﬁn</s>"


def test_prompts_as_text_for_people():
    assert chat.prompt_text("a") == "a"
    assert chat.prompt_text([USER, YO]) == "user: hi\nassistant: yo"
