"""The server over real HTTP: the official client, streams, refusals, hanging up, metrics."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import openai
import pytest
import torch
import uvicorn

from model.config import ModelConfig
from model.sampling import Sampling
from parallel.whole import empty_model
from serving.api import ChatBody, ChatMessage, chat
from serving.app import create_app
from serving.engine import CacheSize, Engine
from serving.guard import ServerSettings, settings_of
from serving.scheduler import Limits
from serving.sequence import Request
from serving.server import main
from serving.server_options import ServerOptions
from serving.tokenizers import Bytes
from serving.worker import Worker
from tests.alone import run_alone
from tests.test_decode import CONFIG

KEY = "sesame"
BYTES: ModelConfig = replace(CONFIG, vocab_size=257)
PROMPT = "import "


class Running:
    """A server in a thread of its own, on a free port."""

    def __init__(self, sequences: int = 4, waiting: int = 4, drafts: bool = True) -> None:
        model = empty_model(BYTES, "fp32", seed=3)
        self.engine = Engine(model, 256, CacheSize(128, 8), Limits(sequences, 64, waiting), drafts)
        self.worker = Worker(self.engine, Bytes())
        app = create_app(self.worker, ServerSettings("tiny", KEY, max_body=10_000))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=3))
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)

    def expected(self, prompt: str, count: int) -> str:
        e = Engine(empty_model(BYTES, "fp32", seed=3), 256, CacheSize(128, 8))
        return Bytes().decode(run_alone(e, Request("a", tuple(prompt.encode()), count, Sampling(0))))

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? ([-+.e\d]+)$", text, re.M))


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with Running() as server:
        yield server


def test_completions_through_the_official_client(running: Running) -> None:
    client = running.client
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert whole.choices[0].text == running.expected(PROMPT, 20)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (7, 20, 27)
    options = {"include_usage": True}
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True,
                                            stream_options=options))  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 20
    assert len(chunks) > 5
    by_tokens = client.completions.create(model="tiny", prompt=list(PROMPT.encode()), max_tokens=20, temperature=0)
    assert by_tokens.choices[0].text == whole.choices[0].text


def test_several_prompts_and_choices(running: Running) -> None:
    ask = {"model": "tiny", "max_tokens": 12, "temperature": 0.9, "seed": 7, "extra_body": {"top_k": 30}}
    many = running.client.completions.create(prompt=["a", "bc"], n=2, **ask)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert many.usage.prompt_tokens == 3
    again = running.client.completions.create(prompt=["a", "bc"], n=2, stream=True, **ask)
    texts = [""] * 4
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in many.choices]
    assert texts[0] != texts[1]


def test_chat_and_stop_strings(running: Running) -> None:
    prompt = "user: hello\n\nassistant:"
    wanted = running.expected(prompt, 30)
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 30}
    create = running.client.chat.completions.create
    reply = create(**ask)
    assert reply.choices[0].message.content == wanted
    stop = wanted[11:13]
    stopped = create(**ask, stop=stop)
    assert stopped.choices[0].message.content == wanted.split(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = list(create(**ask, stop=[stop, "never"], stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted.split(stop)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert create(**{**ask, "messages": parts}).choices[0].message.content == wanted
    assert [m.id for m in running.client.models.list()] == ["tiny"]


BAD = {
    "prompt: Field required": {"prompt": None},
    "max_tokens=0": {"max_tokens": 0},
    "exceed the 256 tokens": {"max_tokens": 1000},
    "temperature=-1": {"temperature": -1},
    "top_p=2": {"top_p": 2},
    "top_k=-1": {"top_k": -1},
    "empty": {"prompt": ""},
    "outside of 0": {"prompt": [300]},
    "stop string": {"stop": [""]},
    "n: Input should be less than": {"n": 1000},
    "'colour' is unknown": {"colour": 1},
    "logprobs=3 is not supported": {"logprobs": 3},
    "more than 64 choices": {"prompt": ["a"] * 40, "n": 2},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_request_is_refused_with_its_reason(running: Running, reason: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, **BAD[reason]}
    response = running.http.post("/v1/completions", json={k: v for k, v in body.items() if v is not None})
    assert response.status_code == 400, response.text
    assert reason in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_null_is_as_good_as_absent(running: Running) -> None:
    """As in OpenAI's own servers, which some clients rely on."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    nothing = dict.fromkeys(("n", "stream", "stream_options", "top_k", "top_p", "seed", "stop", "logprobs", "user"))
    plain, nulls = (running.http.post("/v1/completions", json=json) for json in (body, {**body, **nothing}))
    assert nulls.status_code == 200, nulls.text
    assert nulls.json()["choices"] == plain.json()["choices"]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": None}}
    assert running.http.post("/v1/completions", json=streamed).text.endswith("data: [DONE]\n\n")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 6, **nothing}
    assert running.http.post("/v1/chat/completions", json=chat).status_code == 200
    unknown = running.http.post("/v1/completions", json={**body, "colour": None})
    assert (unknown.status_code, "'colour' is unknown" in unknown.text) == (400, True)
    required = running.http.post("/v1/completions", json={**body, "prompt": None})
    assert (required.status_code, "prompt: Field required" in required.text) == (400, True)


def test_other_refusals(running: Running) -> None:
    good = {"model": "tiny", "prompt": PROMPT}
    post = running.http.post
    assert post("/v1/completions", json={**good, "model": "gpt"}).status_code == 404
    assert post("/v1/nothing", json=good).status_code == 404
    assert running.http.get("/v1/completions").status_code == 405
    for path, half in (
        ("completions", rb'"prompt": "\ud800"'),
        ("chat/completions", rb'"messages": [{"role": "user", "content": "\ud800"}]'),
    ):
        sent = post(
            f"/v1/{path}", content=b'{"model": "tiny", %s}' % half, headers={"Content-Type": "application/json"}
        )
        assert "not valid Unicode" in sent.json()["error"]["message"]
    assert post("/v1/completions", content=b"{").status_code == 400
    large = post("/v1/completions", json={**good, "prompt": "x" * 20_000})
    assert large.status_code == 413
    assert "larger than 10000" in large.json()["error"]["message"]
    assert post("/v1/completions", content=iter([b"{}"])).status_code == 411
    for header in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Bearer ключ".encode()}):
        assert httpx.post(f"{running.url}/v1/completions", json=good, headers=header).status_code == 401
    assert httpx.get(f"{running.url}/v1/whatever").status_code == 401
    assert "whatever" not in httpx.get(f"{running.url}/metrics").text, "strangers could fill the memory with names"
    with pytest.raises(openai.BadRequestError, match="max_tokens=0"):
        running.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="tools"):
        running.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


def test_a_client_that_hangs_up_frees_its_cache(running: Running) -> None:
    """While streaming, and while waiting for the whole."""
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 240}
    for streaming in (True, False):
        made = running.engine.counters.made
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as line:
            body = json.dumps({**ask, "stream": streaming}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            line.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda made=made: running.engine.counters.made > made + 2)
            assert running.engine.pool.used
        wait_until(lambda: running.engine.pool.used == 0)
        assert running.engine.idle
        assert running.engine.counters.made < made + 240, "it was computed to its end"


def test_an_answer_without_a_limit_fits_the_cache() -> None:
    worker = Worker(Engine(empty_model(BYTES, "fp32", seed=3), 256, CacheSize(8, 8)), Bytes())
    body = ChatBody(model="tiny", messages=[ChatMessage(role="user", content="hello")])
    (request,) = chat(body, worker.tokenizer, worker.max_length).requests
    assert len(request.prompt) + request.max_tokens == 64
    worker.engine.check(request)


def test_metrics_say_what_happens(running: Running) -> None:
    before = running.metric("serving_made_tokens_total")
    running.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0)
    assert running.metric("serving_made_tokens_total") == before + 30
    assert running.metric("serving_cache_tokens") == 128 * 8
    assert running.metric("serving_cache_used_tokens") == running.metric("serving_waiting") == 0
    assert running.metric("serving_first_token_seconds_count") > 0
    assert running.metric("serving_between_tokens_seconds_count") > 0
    assert running.metric("serving_requests_total") > 0
    loads = running.engine.decoder.loads
    assert running.metric("serving_expert_tokens_total") == sum(int(load.sum()) for load in loads.values()) > 0
    assert running.metric("serving_expert_imbalance") > len(loads)
    assert running.metric("serving_accepted_tokens_total") == running.engine.counters.accepted


def test_a_full_queue_and_a_broken_engine_are_said_so() -> None:
    with Running(sequences=1, waiting=1) as server:
        answers: list[int] = []

        def ask() -> None:
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200}
            answers.append(server.http.post("/v1/completions", json=body).status_code)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(set(answers)) == [200, 429]
        assert answers.count(200) >= 2
        torch.nn.init.zeros_(server.engine.decoder.stage.head.weight)
        server.engine.decoder.cache.latents = torch.zeros(0)  # now every step fails
        response = server.http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT})
        assert response.status_code == 503
        assert "Traceback" not in response.json()["error"]["message"]
        assert server.http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT}).status_code == 503
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "IndexError" in health.json()["reason"]


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    cases = (
        (["port=1"], "checkpoint=… must be given"),
        (["checkpoint=/none"], "neither a run"),
        (["checkpoint=/none", "cache_tokens=3"], "does not hold a page"),
        (["checkpoint=/none", "batch_tokens=3"], "batch_tokens=3"),
        (["checkpoint=/none", "threads=-1"], "threads=-1"),
    )
    for words, message in cases:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="port=70000"):
        settings_of(ServerOptions(checkpoint="x", port=70000), "x")
    assert main(["--help"]) == 0
    assert "host=127.0.0.1" in capsys.readouterr().out
