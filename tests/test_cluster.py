"""Prefill and decode in separate processes under torchrun: equality, lost processes, back-pressure, mistakes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from model.sampling import Sampling
from serving.cluster import main
from serving.tokenizers import Bytes
from tests.serving_cluster import Cluster, write_model

PROMPTS = ["import ", "a", "def f(x):\n    return " * 6, "x" * 77, "The quick brown fox jumps over ", "0123456789" * 20]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cluster") / "model")


@pytest.fixture(scope="module")
def separated(checkpoint: Path) -> Iterator[Cluster]:
    with Cluster(checkpoint, 3, "prefill=1 decode=2 page_size=8 prefill_page_size=5 prefill_batch_tokens=48") as c:
        yield c


@dataclass
class Stream:
    """One streamed completion, read in a thread. error: the message of an error event; done: it ended as it should."""

    cluster: Cluster
    prompt: str
    tokens: int
    text: str = ""
    events: int = 0
    error: str = ""
    done: bool = False

    def read(self) -> None:
        body = {"model": "tiny", "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "stream": True}
        with self.cluster.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    self.error = event["error"]["message"] if "error" in event else ""
                    self.text += event["choices"][0]["text"] if "choices" in event else ""
                    self.events += 1


def start(cluster: Cluster, count: int, tokens: int) -> tuple[list[Stream], list[threading.Thread]]:
    streams = [Stream(cluster, PROMPTS[i % len(PROMPTS)], tokens) for i in range(count)]
    threads = [threading.Thread(target=stream.read) for stream in streams]
    for thread in threads:
        thread.start()
    return streams, threads


def check_fates(streams: list[Stream], threads: list[threading.Thread], *errors: str) -> tuple[int, int]:
    """Every request either is right to its end or has one of these errors. (failed, succeeded)."""
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for stream in streams:
        assert stream.done != bool(stream.error)
        wanted = Bytes().decode(stream.cluster.expected(stream.prompt, stream.tokens))
        if stream.done:
            assert stream.text == wanted
        else:
            assert any(error in stream.error for error in errors), stream.error
            assert wanted.startswith(stream.text.rstrip("\ufffd"))
    failed = sum(not stream.done for stream in streams)
    return failed, len(streams) - failed


def test_tokens_are_those_of_one_engine(separated: Cluster) -> None:
    """Many at once, over two decode processes and other pages than one engine's; greedy and with a seed."""
    handed = separated.metric("serving_handovers_total")
    cases = [(p, n, {}, Sampling(0)) for p in PROMPTS for n in (1, 2, 30)]
    cases += [(p, 20, {"temperature": 0.8, "seed": 5, "top_p": 0.9}, Sampling(0.8, 0, 0.9, 5)) for p in PROMPTS]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: separated.ask(case[0], case[1], **case[2]), cases))
    for (prompt, count, _, sampling), answer in zip(cases, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == Bytes().decode(separated.expected(prompt, count, sampling))
    more_than_one = sum(count > 1 for _, count, *_ in cases)
    assert separated.metric("serving_handovers_total") - handed == more_than_one
    separated.wait_until(lambda: separated.metric("serving_cache_used_tokens") == 0)
    made = [separated.metric("serving_made_tokens_total", f'process="{i}",side="decode"') for i in range(2)]
    assert min(made) > 0, "one of the two has done everything"
    assert separated.metric("serving_read_tokens_total", 'side="decode"') == 0
    read, total = separated.metric("serving_read_tokens_total", 'side="prefill"'), sum(len(p) for p, *_ in cases)
    assert total - len(cases) <= read <= total, "the last token of a prompt does not count when it is read alone"
    assert separated.metric("serving_processes", 'side="decode"') == 2
    assert separated.metric("serving_expert_tokens_total", 'side="prefill"') > 0


def test_the_official_client_and_refusals(separated: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{separated.url}/v1", api_key="any", max_retries=0)
    chunks = list(client.completions.create(model="tiny", prompt="import ", max_tokens=20, temperature=0, stream=True))
    text = "".join(c.choices[0].text for c in chunks)
    assert text == Bytes().decode(separated.expected("import ", 20))
    stop = text[7:9]
    stopped = client.completions.create(model="tiny", prompt="import ", max_tokens=20, temperature=0, stop=stop)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text.split(stop)[0], "stop")
    with pytest.raises(openai.BadRequestError, match="exceed the 512 tokens"):
        client.completions.create(model="tiny", prompt="x" * 500, max_tokens=100)
    assert separated.http.get("/health").json() == {"status": "ok"}
    separated.wait_until(lambda: separated.metric("serving_cache_used_tokens") == 0)


def test_a_client_that_hangs_up_frees_its_cache(separated: Cluster) -> None:
    made = separated.metric("serving_made_tokens_total")
    body = {"model": "tiny", "prompt": "import ", "max_tokens": 500, "stream": True}
    with separated.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    separated.wait_until(lambda: separated.metric("serving_made_tokens_total") > made)
    separated.wait_until(lambda: separated.metric("serving_cache_used_tokens") == 0)
    assert separated.metric("serving_made_tokens_total") < made + 500


@pytest.mark.parametrize("side", ["decode", "prefill"])
def test_a_killed_process_fails_only_what_it_held(separated: Cluster, side: str) -> None:
    """kill -9 under load: what it held fails with an error to the client, the rest goes on, and it comes back."""
    lost = separated.metric("serving_lost_requests_total")
    losses = separated.metric("serving_process_losses_total", f'side="{side}"')
    streams, threads = start(separated, 12, 300)
    separated.wait_until(lambda: all(s.events > 3 for s in streams))
    late, late_threads = start(separated, 6, 20) if side == "prefill" else ([], [])
    separated.engine(side, 0).kill()
    failed, succeeded = check_fates(streams, threads, f"{side} process 0 that held this request has died")
    died, broke = "prefill process 0 that held this request has died", "the link from prefill process 0 to decode"
    late_failed, _ = check_fates(late, late_threads, died, broke)  # a broken link may be seen before the death
    if side == "decode":
        assert failed > 0
        assert succeeded > 0
    else:
        assert failed == 0, "decode goes on without the prefill process"
    print(f"{side} process killed: {failed + late_failed} of {len(streams + late)} requests failed")
    assert separated.metric("serving_lost_requests_total") - lost == failed + late_failed
    assert separated.metric("serving_process_losses_total", f'side="{side}"') == losses + 1
    assert separated.ask("import ", 20).status_code == 200
    wanted = {"decode": 2, "prefill": 1}[side]
    separated.wait_until(lambda: separated.metric("serving_processes", f'side="{side}"') == wanted)
    separated.wait_until(lambda: separated.metric("serving_cache_used_tokens") == 0)
    streams, threads = start(separated, 12, 30)
    assert check_fates(streams, threads, "") == (0, 12)


@pytest.mark.alone
def test_a_frozen_process_fails_only_what_it_held(checkpoint: Path) -> None:
    """SIGSTOP under load: its connections stay open, and yet what it held fails in bounded time, and it comes back."""
    silence = 3.0
    with Cluster(checkpoint, 3, f"prefill=1 decode=2 page_size=8 silence={silence}") as cluster:
        streams, threads = start(cluster, 12, 300)
        cluster.wait_until(lambda: all(s.events > 3 for s in streams))
        frozen = cluster.engine("decode", 0)
        frozen.suspend()
        began = time.monotonic()
        failed, succeeded = check_fates(streams, threads, "decode process 0 that held this request has given no sign")
        assert time.monotonic() - began < 10 * silence, "with the tokens of the others"
        assert failed > 0
        assert succeeded > 0
        print(f"decode process frozen: {failed} of 12 requests failed")
        assert cluster.metric("serving_lost_requests_total") == failed
        assert cluster.ask("import ", 20).status_code == 200
        cluster.wait_until(lambda: cluster.metric("serving_processes", 'side="decode"') == 2)
        assert cluster.engine("decode", 0).pid != frozen.pid
        assert "has given no sign of life for 3 s" in cluster.output
        streams, threads = start(cluster, 12, 30)
        assert check_fates(streams, threads, "") == (0, 12)


def test_a_full_decode_side_holds_the_prompts_back(checkpoint: Path) -> None:
    """Two prefill processes, one small decode process: read prompts wait, then the queue, then 429; nothing is lost."""
    keys = "prefill=2 decode=1 max_sequences=2 cache_tokens=512 prefill_sequences=2 prefill_cache_tokens=400 waiting=4"
    with Cluster(checkpoint, 3, keys) as cluster:
        cluster.ask("a", 3)
        streams, threads = start(cluster, 10, 120)  # 2 are decoded, 4 are with the prefill processes, 4 wait
        cluster.wait_until(lambda: cluster.metric("serving_front_held") == 4)
        cluster.wait_until(lambda: cluster.metric("serving_front_waiting") == 4)
        refused = cluster.ask("import ", 5)
        assert refused.status_code == 429
        assert "at most 10 may" in refused.json()["error"]["message"]
        assert cluster.metric("serving_lost_requests_total") == 0
        assert check_fates(streams, threads, "") == (0, 10)
        assert cluster.ask("x" * 401, 5).status_code == 400, "it fits no prefill process"
        assert cluster.ask("import ", 5).status_code == 200


def test_processes_that_do_both(checkpoint: Path) -> None:
    with Cluster(checkpoint, 2, "prefill=0 decode=0 together=2 drafts=true batch_tokens=64") as cluster:
        streams, threads = start(cluster, 8, 40)
        assert check_fates(streams, threads, "") == (0, 8)
        made = [cluster.metric("serving_made_tokens_total", f'process="{i}"') for i in range(2)]
        cluster.wait_until(lambda: cluster.metric("serving_made_tokens_total") == 8 * 40)
        assert cluster.metric("serving_handovers_total") == 0
        assert len(made) == 2


def test_experts_that_decode_processes_share(checkpoint: Path) -> None:
    """EP 1 in prefill, EP 2 in decode. When one dies the other reads the lost experts and goes on; then it is back."""
    with Cluster(
        checkpoint,
        3,
        "prefill=1 decode=2 decode_ep=2 page_size=8 decode_redundant=2 placement_every=16 overlap=true overlap_rows=2",
    ) as cluster:
        for round_ in range(2):
            streams, threads = start(cluster, 12, 30)
            assert check_fates(streams, threads, "") == (0, 12)
            assert cluster.metric("serving_read_tokens_total", 'side="decode"') == 0
            if round_:
                break
            streams, threads = start(cluster, 12, 300)
            cluster.wait_until(lambda streams=streams: all(s.events > 3 for s in streams))
            cluster.engine("decode", 1).kill()
            failed, succeeded = check_fates(streams, threads, "decode process 1 that held this request has died")
            assert failed > 0
            assert succeeded > 0
            print(f"one of two that share experts killed: {failed} of 12 requests failed")
            assert cluster.metric("serving_lost_requests_total") == failed
            cluster.wait_until(lambda: cluster.metric("serving_processes", 'side="decode"') == 2)
        assert cluster.metric("serving_process_losses_total") == 1


MISTAKES = {
    "checkpoint=… must be given": ["prefill=1"],
    "'prefil' is unknown": ["checkpoint=x", "prefil=1"],
    "prefill=2 decode=2 makes 4 processes, but torchrun started 3": ["checkpoint=x", "prefill=2", "decode=2"],
    "prefill=3 decode=0: there must be": ["checkpoint=x", "prefill=3", "decode=0"],
    "together=3 goes with": ["checkpoint=x", "together=3", "prefill=1"],
    "prefill=-1": ["checkpoint=x", "prefill=-1"],
    "decode_ep=3 must be at least 1 and divide decode=2": ["checkpoint=x", "decode=2", "decode_ep=3"],
    "decode_redundant=-1": ["checkpoint=x", "decode=2", "decode_redundant=-1"],
    "backend='mpi' is unknown; choose one of gloo, nccl": ["checkpoint=x", "decode=2", "backend=mpi"],
    "overlap=true needs processes that share experts": ["checkpoint=x", "decode=2", "overlap=true"],
    "overlap_rows=0": ["checkpoint=x", "decode=2", "decode_ep=2", "overlap=true", "overlap_rows=0"],
    "compile='fast' is unknown; choose on or off": ["checkpoint=x", "decode=2", "compile=fast"],
    "silence=-1.0": ["checkpoint=x", "decode=2", "silence=-1"],
    "timeout=0.0": ["checkpoint=x", "decode=2", "timeout=0"],
    "prefill_sequences=0": ["checkpoint=x", "decode=2", "prefill_sequences=0"],
    "prefill_cache_tokens=3 does not hold": ["checkpoint=x", "decode=2", "prefill_cache_tokens=3"],
    "batch_tokens=3 must be at least 16": ["checkpoint=x", "decode=2", "batch_tokens=3"],
    "neither a run": ["checkpoint=/none", "decode=2"],
}


@pytest.mark.parametrize("reason", MISTAKES)
def test_mistakes_end_it_at_once(reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                 ) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(MISTAKES[reason]) == 2
    assert reason in capsys.readouterr().err


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["checkpoint=x"]) == 2
    assert "torchrun --nproc-per-node 3" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "prefill_sequences=4" in capsys.readouterr().out
