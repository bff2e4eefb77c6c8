"""A reward model behind an HTTP server: vLLM, Text Embeddings Inference, or any that speaks JSON."""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Literal

from lit_rlhf.rewards.patient import check_patience
from lit_rlhf.rewards.post import HTTPError, check_address, post_json
from lit_rlhf.rewards.protocol import RewardError
from lit_rlhf.rewards.template import fields_of, fill, numbers_at
from lit_rlhf.rewards.waiting import GaveUpError, patiently

# What is sent, and where the scores stand in the answer.
# vllm: POST /classify (docs.vllm.ai, "Classification API"); use_activation: false asks for the score as it is, not
#     through a sigmoid or softmax.
# tei: POST /predict (text-embeddings-inference, router/src/http/types.rs: PredictRequest, Prediction).
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "vllm": ({"input": "$texts", "use_activation": False}, "data.*.probs"),
    "tei": ({"inputs": [["$text"]], "raw_scores": True, "truncate": False}, "*.score"),
}


class HTTPReward:
    """Score responses by a reward model that a server holds; several such rewards run at the same time.

    A response is sent as text: prompt and completion one after the other; a conversation as a chat template writes it,
    without the token it begins with, which servers add themselves. The model must give one number a response.

    Args:
        url: the endpoint, for instance ``http://localhost:8000/classify``: https, or http on this machine. Redirects
            are not followed.
        form: what the server speaks: ``vllm`` (its ``/classify``), ``tei`` (Text Embeddings Inference, its
            ``/predict``), or ``json``, which ``request`` and ``answer`` describe.
        model: the model's name, sent as ``model`` to servers that ask for it.
        request: under ``json`` the body. In it "$texts", "$prompts", "$completions" and "$messages" become lists of one
            a response; a list of one entry that holds "$text", "$prompt", "$completion" or "$conversation" is repeated
            for each response.
        answer: under ``json`` where the scores stand: keys with points between them, ``*`` for each response, for
            instance ``results.*.score``. Entries that have an ``index`` are put into its order.
        tokenizer: hub id or folder whose chat template writes conversations; the policy's if null.
        token_env: name of the environment variable that holds a bearer token, read at every request and kept nowhere.
        allow_http: allow plain http to another machine: prompts, answers and the token can be read on the way.
        batch_size: responses a request.
        concurrent: requests at a time.
        seconds: wall-clock limit of a request.
        retries: further tries of a request where that may help: no connection, too slow, 429, 5xx, no JSON.
        pause: seconds before the first retry; twice as long before each further one.
        name: what it is logged as.

    Raises:
        ValueError: an address that is not allowed, or a setting out of its range.
    """

    def __init__(
        self,
        url: str,
        form: Literal["vllm", "tei", "json"] = "vllm",
        model: str | None = None,
        request: dict[str, Any] | None = None,
        answer: str | None = None,
        tokenizer: str | None = None,
        token_env: str | None = None,
        allow_http: bool = False,
        batch_size: int = 32,
        concurrent: int = 4,
        seconds: float = 60.0,
        retries: int = 3,
        pause: float = 1.0,
        name: str = "http_reward",
    ) -> None:
        check_address(url, allow_http)
        check_patience("HTTPReward", seconds, retries, pause)
        for knob, value in (("batch_size", batch_size), ("concurrent", concurrent)):
            if value < 1:
                raise ValueError(f"HTTPReward: {knob} is {value}, expected 1 or more")
        body, self.answer = _form(form, request, answer)
        self.request = body if model is None else {"model": model, **body}
        self.asked = fields_of(self.request)
        if not self.asked & {"texts", "completions", "messages"}:
            raise ValueError("HTTPReward: request sends no responses: it has no $texts, $completions or $messages")
        fill(self.request, {field: ["…"] for field in self.asked})  # says now what does not fit
        self.url, self.tokenizer, self.token_env, self.name = url, tokenizer, token_env, name
        self.batch_size, self.concurrent = batch_size, concurrent
        self.seconds, self.retries, self.pause = seconds, retries, pause
        self._writer: Any = None

    def bind(self, tokenizer: Any) -> None:
        """Take the policy's tokenizer for its chat template, unless another one was named."""
        if self.tokenizer is None:
            self._writer = tokenizer

    async def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        """Score each of B completions.

        Raises:
            RewardError: the server cannot be reached, is too slow, refuses, or answers with anything but one finite
                number a response; the message says which, and how often it was tried.
        """
        fields = self._fields(prompts, completions)
        gate = asyncio.Semaphore(self.concurrent)
        starts = range(0, len(completions), self.batch_size)
        tasks = [asyncio.create_task(self._batch(fields, start, gate)) for start in starts]
        try:
            return [score for part in await asyncio.gather(*tasks) for score in part]
        finally:
            for task in tasks:  # after one has failed the others are of no use
                task.cancel()

    async def _batch(self, fields: dict[str, list[Any]], start: int, gate: asyncio.Semaphore) -> list[float]:
        part = {name: values[start : start + self.batch_size] for name, values in fields.items()}
        rows = len(next(iter(part.values())))
        post = functools.partial(
            post_json, self.url, fill(self.request, part), token_env=self.token_env, seconds=self.seconds
        )
        try:
            async with gate:
                found = await patiently(
                    post,
                    seconds=self.seconds,
                    retries=self.retries,
                    pause=self.pause,
                    worth_a_retry=lambda error: isinstance(error, HTTPError) and error.passing,
                )
            return numbers_at(found, self.answer, rows)
        except (GaveUpError, HTTPError, ValueError) as error:
            which = f"reward {self.name!r} at {self.url}, rows {start} to {start + rows - 1}"
            raise RewardError(f"{which}: {error}") from None

    def _fields(self, prompts: list[Any], completions: list[str]) -> dict[str, list[Any]]:
        """What the request asks for, one a response."""
        pairs = list(zip(prompts, completions, strict=True))
        fields: dict[str, list[Any]] = {"prompts": prompts, "completions": completions}
        if self.asked & {"texts", "messages"}:
            fields["messages"] = [_conversation(prompt, completion) for prompt, completion in pairs]
        if "texts" in self.asked:
            talks = fields["messages"]
            fields["texts"] = [
                prompt + completion if isinstance(prompt, str) else self._written(talk)
                for (prompt, completion), talk in zip(pairs, talks, strict=True)
            ]
        return {name: fields[name] for name in self.asked}

    def _written(self, talk: list[dict[str, Any]]) -> str:
        if self._writer is None and self.tokenizer is not None:
            from lit_rlhf.models import load_tokenizer

            self._writer = load_tokenizer(self.tokenizer)
        if getattr(self._writer, "chat_template", None) is None:
            raise RewardError(
                f"reward {self.name!r}: the prompts are conversations, and there is no chat template to write them "
                "with: set tokenizer to the reward model's"
            )
        text: str = self._writer.apply_chat_template(talk, tokenize=False)
        return text.removeprefix(self._writer.bos_token or "")


def _conversation(prompt: Any, completion: str) -> list[dict[str, Any]]:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*before, {"role": "assistant", "content": completion}]


def _form(form: str, request: dict[str, Any] | None, answer: str | None) -> tuple[dict[str, Any], str]:
    """The body to send and the path to the scores."""
    if form == "json":
        if request is None or answer is None:
            raise ValueError("HTTPReward: form 'json' needs request (what to send) and answer (where the scores are)")
        if answer.split(".").count("*") != 1:
            raise ValueError(f"HTTPReward: answer is {answer!r}, expected a path with one *, as in results.*.score")
        return request, answer
    if form not in FORMS:
        raise ValueError(f"HTTPReward: form is {form!r}, expected one of {', '.join(FORMS)}, json")
    if request is not None or answer is not None:
        raise ValueError(f"HTTPReward: request and answer go with form 'json', not with {form!r}")
    return FORMS[form]
