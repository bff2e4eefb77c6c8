"""A reward model behind a server: a real one, in a thread, that answers well, badly, slowly, or not at all."""

from __future__ import annotations

import copy
import http.server
import json
import math
import pickle
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import tiny
import torch
import yaml
from pair import free_port
from test_combine import PROMPTS, rollout
from test_yaml import parse

from lit_rlhf.batch import Rollout
from lit_rlhf.rewards import HTTPReward, RewardError, Rewards

TEXT = ("prompt one ", "prompt two ")


def rows(prompts=TEXT) -> Rollout:
    return rollout().with_(prompts=prompts)


class Server(http.server.ThreadingHTTPServer):
    """Answers the first requests as ``script`` says, the others by ``answer``; keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = []  # of each request: (status, body) or seconds to sleep
        self.bodies: list = []
        self.headers: list = []
        self.answer = vllm
        self.url = f"http://127.0.0.1:{self.server_port}/classify"

    def handle_error(self, request, client_address) -> None:
        """A client that has given up is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        server.headers.append(dict(self.headers))
        todo = server.script.pop(0) if server.script else None
        if isinstance(todo, float):
            time.sleep(todo)
            todo = None
        status, text = todo or (200, json.dumps(server.answer(body)))
        data = text.encode()
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", str(len(data) + (10 if text.endswith("cut") else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Quiet."""


def vllm(body) -> dict:
    """As vLLM's /classify answers: not in order."""
    found = [
        {"index": i, "label": "LABEL_0", "probs": [float(len(text))], "num_classes": 1}
        for i, text in enumerate(body["input"])
    ]
    return {"id": "classify-1", "object": "list", "created": 1, "model": "m", "data": found[::-1], "usage": {}}


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()


def score(url: str, prompts=TEXT, **knobs) -> list[float]:
    knobs = {"pause": 0.01, "seconds": 5, **knobs}
    return Rewards([HTTPReward(url, **knobs)])(rows(prompts))[0].tolist()


# -- what is sent, and how the answer is read -------------------------------------------------------------------------


def test_vllm(server):
    assert score(server.url, model="judge") == [14.0, 21.0]
    assert server.bodies == [
        {"model": "judge", "input": ["prompt one two", "prompt two it is four"], "use_activation": False}
    ]
    assert "Authorization" not in server.headers[0]


def test_text_embeddings_inference(server):
    server.answer = lambda body: [[{"score": float(len(text)), "label": "LABEL_0"}] for (text,) in body["inputs"]]
    assert score(server.url, form="tei") == [14.0, 21.0]
    assert score(server.url, form="tei", batch_size=1) == [14.0, 21.0]
    assert server.bodies[0] == {
        "inputs": [["prompt one two"], ["prompt two it is four"]],
        "raw_scores": True,
        "truncate": False,
    }


def test_any_json(server):
    server.answer = lambda body: {"result": {"scores": [float(len(item["talk"])) for item in body["items"]]}}
    request = {"items": [{"talk": "$conversation", "said": "$completion"}], "all": "$prompts", "n": [1]}
    assert score(server.url, PROMPTS, form="json", request=request, answer="result.scores.*") == [2.0, 3.0]
    assert server.bodies[0] == {
        "items": [
            {
                "talk": [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "two"}],
                "said": "two",
            },
            {"talk": [*PROMPTS[1], {"role": "assistant", "content": "it is four"}], "said": "it is four"},
        ],
        "all": [PROMPTS[0], PROMPTS[1]],
        "n": [1],
    }


def test_a_conversation_is_written_by_the_chat_template_without_its_first_token(server, model_folder):
    rewards = Rewards([HTTPReward(server.url)])
    with pytest.raises(RewardError, match=r"no chat template.*set tokenizer"):
        rewards(rows(PROMPTS))
    rewards.bind(tiny.tiny_tokenizer())
    rewards(rows(PROMPTS))
    written = "<user>first<user>And  2\n+ 2?<assistant>it is four</s>"
    assert server.bodies[-1]["input"] == ["What is 1 + 1?two", written]
    named = HTTPReward(server.url, tokenizer=model_folder)
    named.bind(None)
    Rewards([named])(rows(PROMPTS))
    assert server.bodies[-1]["input"][1] == written


def test_batches_go_at_the_same_time_and_come_back_in_order(server):
    many = rows().select(torch.tensor([0, 1] * 3))
    server.script = [0.3] * 6
    started = time.perf_counter()
    scores, _ = Rewards([HTTPReward(server.url, batch_size=1, concurrent=6)])(many)
    assert scores.tolist() == [14.0, 21.0] * 3
    assert time.perf_counter() - started < 1.2
    assert sorted(len(body["input"]) for body in server.bodies) == [1] * 6
    server.script = [0.1] * 6
    started = time.perf_counter()
    Rewards([HTTPReward(server.url, batch_size=1, concurrent=1)])(many)
    assert time.perf_counter() - started > 0.6


# -- faults -----------------------------------------------------------------------------------------------------------

HTML = "<html><body>502 Bad Gateway</body></html>"


@pytest.mark.parametrize(
    "fault", [(500, "oops"), (503, HTML), (429, "slow down"), (200, HTML), (200, '{"data": [{"ind cut'), 1.5]
)
def test_a_passing_fault_is_tried_again(server, fault):
    server.script = [fault, fault]
    assert score(server.url, retries=2, seconds=1) == [14.0, 21.0]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((500, "out of memory"), "failed 2 times.*status 500, expected 200. The answer begins 'out of memory'"),
        ((200, HTML), "failed 2 times.*no JSON; it begins '<html>"),
        ((200, '{"data": [{"ind cut'), "failed 2 times.*IncompleteRead"),
        ((200, ""), "failed 2 times.*no JSON"),
        (1.5, "failed 2 times.*(no answer within 1 seconds|Timeout)"),
    ],
)
def test_one_that_stays_is_named(server, fault, said):
    server.script = [fault, fault]
    with pytest.raises(RewardError, match=f"reward 'http_reward' at {server.url}, rows 0 to 1: {said}"):
        score(server.url, retries=1, seconds=1)
    assert len(server.bodies) == 2


def one(value) -> str:
    return json.dumps({"data": [{"probs": [1.0]}, {"probs": value}]})


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, "no such path", "status 404, expected 200"),
        (401, "who are you", "status 401"),
        (302, "", "status 302; redirects are not followed"),
        (200, one([math.nan]), "score of response 1 is nan"),
        (200, one([None]), "is null, which is how some servers write NaN"),
        (200, one([1e999]), "is inf"),
        (200, one(["0.5"]), "is '0.5', expected a finite number"),
        (200, one([True]), "is True"),
        (200, one([0.1, 0.9]), "2 numbers for response 1, but a reward model gives one"),
        (200, one([]), "0 numbers for response 1"),
        (200, '{"data": [{"probs": [1.0]}]}', "1 scores for 2 responses"),
        (200, '{"data": [{"index": 0, "probs": [1]}, {"index": 0, "probs": [2]}]}', "index is not 0 to 1"),
        (200, '{"error": "model not loaded"}', "there is no 'data' in .*model not loaded"),
        (200, "[1.0, 2.0]", r"there is no 'data' in \[1.0, 2.0\]"),
        (200, '{"data": {"a": 1}}', "no list of scores"),
        (200, "null", "there is no 'data' in null"),
    ],
)
def test_an_answer_that_no_retry_can_mend_is_an_error_at_once(server, status, body, said):
    server.script = [(status, body)]
    with pytest.raises(RewardError, match=said):
        score(server.url, retries=5)
    assert len(server.bodies) == 1


def test_a_server_that_is_down():
    port = free_port()
    with pytest.raises(RewardError, match=f"127.0.0.1:{port}.*failed 2 times.*ConnectionError"):
        score(f"http://127.0.0.1:{port}/classify", retries=1)


def test_a_server_that_trickles_is_cut_off_by_the_wall_clock():
    """Each byte comes in time, the whole never does."""

    def trickle() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(30):
            time.sleep(0.05)
            connection.sendall(b" ")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        started = time.perf_counter()
        with pytest.raises(RewardError, match=r"no answer within 0.3 seconds"):
            score(f"http://127.0.0.1:{listener.getsockname()[1]}", seconds=0.3, retries=0)
        assert time.perf_counter() - started < 1.0
        thread.join()


# -- secrets and addresses --------------------------------------------------------------------------------------------

TOKEN = "s3cr3t-t0ken"


def test_the_token_is_sent_and_stands_nowhere_else(server, monkeypatch, tmp_path):
    monkeypatch.setenv("SCORER_TOKEN", f"{TOKEN}\n")
    reward = HTTPReward(server.url, token_env="SCORER_TOKEN", retries=0)
    Rewards([reward])(rows())
    assert server.headers[0]["Authorization"] == f"Bearer {TOKEN}"
    kept = repr(vars(reward)).encode() + pickle.dumps(copy.deepcopy(reward))
    assert TOKEN.encode() not in kept
    for status in (401, 500, 200):
        server.script = [(status, f"bad token {TOKEN}")]  # a server that echoes it
        with pytest.raises(RewardError, match=r"bad token \*\*\*") as caught:
            Rewards([reward])(rows())
        chain, error = "", caught.value
        while error is not None:
            chain, error = chain + str(error), error.__cause__ or error.__context__
        assert TOKEN not in chain


def test_a_token_that_is_missing_or_none_is_said_without_showing_it(server, monkeypatch):
    with pytest.raises(RewardError, match="environment variable SCORER_TOKEN, which token_env names, is not set"):
        score(server.url, token_env="SCORER_TOKEN")
    monkeypatch.setenv("SCORER_TOKEN", f"{TOKEN}\nX-Other: 1")
    with pytest.raises(RewardError, match="no token is made of") as caught:
        score(server.url, token_env="SCORER_TOKEN")
    assert TOKEN not in str(caught.value)
    assert not server.bodies


def test_no_password_is_taken_from_netrc_and_no_proxy_on_this_machine(server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert score(server.url) == [14.0, 21.0]
    monkeypatch.setattr("lit_rlhf.rewards.post.is_here", lambda url: False)  # another machine, its proxy aside
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert score(server.url, allow_http=True) == [14.0, 21.0]
    assert not [headers for headers in server.headers if "Authorization" in headers]


@pytest.mark.parametrize("url", ["https://judge.example/classify", "http://localhost:1/a", "http://[::1]:8000/b"])
def test_allowed_addresses(url):
    assert HTTPReward(url).url == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://judge.example/classify", "plain http to another machine"),
        ("http://localhost.judge.example/", "plain http to another machine"),
        ("http://10.0.0.1:8000/", "plain http to another machine"),
        ("ftp://localhost/", "expected https"),
        ("localhost:8000/classify", "expected https"),
        (f"https://me:{TOKEN}@judge.example/", "holds a user"),
        (f"https://judge.example/?key={TOKEN}", "a query"),
    ],
)
def test_refused_addresses(url, said):
    with pytest.raises(ValueError, match=said) as caught:
        HTTPReward(url)
    assert TOKEN not in str(caught.value)


def test_plain_http_can_be_allowed():
    assert HTTPReward("http://10.0.0.1:8000/", allow_http=True).url == "http://10.0.0.1:8000/"


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"form": "json"}, "needs request"),
        ({"form": "grpc"}, "form is 'grpc'"),
        ({"request": {}}, "go with form 'json'"),
        ({"form": "json", "request": {"a": "$texts"}, "answer": "scores"}, r"one \*"),
        ({"form": "json", "request": {"a": "$prompts"}, "answer": "*"}, "sends no responses"),
        ({"form": "json", "request": {"a": "$txts"}, "answer": "*"}, "request has '\\$txts'; there are: "),
        ({"form": "json", "request": {"a": "$text"}, "answer": "*"}, "put it into a list of one entry"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"concurrent": 0}, "concurrent is 0"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        HTTPReward("http://localhost:8000", **knobs)


def test_it_stands_in_yaml_and_is_logged_by_its_name(server):
    settings = {"url": server.url, "form": "json", "request": {"q": ["$text"]}, "answer": "*", "name": "gold"}
    entry = {"class_path": "lit_rlhf.rewards.HTTPReward", "init_args": settings}
    rewards = parse(yaml.safe_dump({"rewards": [entry]})).rewards
    server.answer = lambda body: [1.0] * len(body["q"])
    scores, parts = rewards(rows())
    assert scores.tolist() == [1.0, 1.0]
    assert list(parts) == ["gold"]
