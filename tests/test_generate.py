"""`python -m serving.generate` from our checkpoints and from the public format."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from model.decode import Decoder
from model.generate import generate, whole_model
from model.sampling import Sampling
from parallel.saved import CheckpointError
from parallel.whole import load_whole_model
from serving.generate import main
from tests.job import ROOT, Job, write_text

SETTINGS = (
    "parallel.pp=1 schedule=one_f_one_b model.mtp_depth=1 steps=4 eval_every=2 eval.sample_tokens=5 sample_tokens=7"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    write_text(folder)
    with Job(folder, "run", SETTINGS, [sys.executable, "train.py"]) as job:
        output = job.finish()
    assert output.count("import ") == 3, "a sample at each evaluation, and one at the end"
    return folder / "run"


def words_of(checkpoint: Path, **settings: object) -> list[str]:
    return [f"checkpoint={checkpoint}", "prompt=import ", *(f"{k}={v}" for k, v in settings.items())]


@pytest.mark.slow
def test_generation_from_every_kind_of_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    model = load_whole_model(run)
    forward = whole_model(Decoder(model.stage, model.max_length))
    tokens = list(generate(forward, list(b"import "), 20, model.max_length, Sampling(0)))
    wanted = "import " + bytes(t for t in tokens if t < 256).decode(errors="replace")
    export = [sys.executable, "-m", "training.hf", "export", str(run), str(tmp_path / "hf"), "--format", "fp32"]
    subprocess.run(export, cwd=ROOT, check=True, capture_output=True)
    for checkpoint in (run, newest, tmp_path / "hf"):
        for drafts in ("false", "true"):
            assert main(words_of(checkpoint, tokens=20, temperature=0, drafts=drafts)) == 0
            out, err = capsys.readouterr()
            assert out == wanted + "\n"
            assert ("accepted" in err) == (drafts == "true")
    assert main(words_of(run, tokens=20, seed=3, top_p=0.9)) == 0
    first = capsys.readouterr().out
    assert main(words_of(run, tokens=20, seed=3, top_p=0.9)) == 0
    assert capsys.readouterr().out == first
    stop = first[15]
    assert main([*words_of(run, tokens=20, seed=3, top_p=0.9), f"stop=[{stop!r}]"]) == 0
    assert capsys.readouterr().out == "import " + first[7:].split(stop)[0] + "\n"
    assert main(words_of(run, tokens=200)) == 2
    assert "exceed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_server_starts_from_a_run(run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"checkpoint={run}", f"port={port}", "api_key=k", "drafts=true", "cache_tokens=512"]
    command = [sys.executable, "-m", "serving.server", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == f"serving run on http://127.0.0.1:{port}\n"
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=8)
            assert client.completions.create(model="run", prompt="a", max_tokens=5).usage.completion_tokens <= 5
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) in (0, -signal.SIGINT)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["prompt=a"], "checkpoint=… must be given"),
        (words_of(tmp_path), "neither a run with checkpoints"),
        (words_of(tmp_path, temperature=-1), "temperature=-1"),
        (words_of(tmp_path, colour=1), "'colour' is unknown"),
        (words_of(tmp_path, device="tpu"), "device='tpu'"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="COMPLETE"):
        load_whole_model(tmp_path)
    assert main(["--help"]) == 0
    assert "temperature=0.7" in capsys.readouterr().out
