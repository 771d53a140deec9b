"""The corpus on disk, the order, the packing, and which rank trains on what."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import IGNORE, MicroBatch
from model.tokenizer import EOD, ByteTokenizer
from training.corpus import SPLITS, Corpus, prepare_corpus
from training.data import BatchPlan, PackedDataset
from training.order import permute

untimed = settings(deadline=None)  # a busy machine is not a bug


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def documents(corpus: Corpus, split: str) -> list[bytes]:
    tokens = corpus.tokens(split).tolist()
    assert tokens[-1] == EOD
    ends = [i for i, token in enumerate(tokens) if token == EOD]
    return [bytes(tokens[a:b]) for a, b in zip([0, *(e + 1 for e in ends)], ends, strict=False)]


# --- the corpus ---


def test_tokenizer_round_trip() -> None:
    tokenizer = ByteTokenizer()
    text = "naïve — 深\n"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode([*tokens, tokenizer.eod]) == text
    assert tokenizer.decode([0xC3, 65]) == "\ufffdA"
    with pytest.raises(ValueError):
        tokenizer.decode([257])


def test_standard_library_corpus(tmp_path: Path) -> None:
    corpus = prepare_corpus(None, tmp_path, 0.05)
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    paths = {file["path"] for split in SPLITS for file in manifest[f"{split}_files"]}
    assert {"dataclasses.py", "asyncio/queues.py"} <= paths
    assert not any("site-packages" in path or "/test" in path or "__pycache__" in path for path in paths)
    total = corpus.train_tokens + corpus.val_tokens
    assert total > 5_000_000
    assert 0.01 < corpus.val_tokens / total < 0.2
    assert total == sum(file["size"] + 1 for split in SPLITS for file in manifest[f"{split}_files"])
    assert len(paths) == corpus.num_files == len(manifest["train_files"]) + len(manifest["val_files"])


def test_folder_corpus_holds_each_text_file_once(tmp_path: Path) -> None:
    texts = {f"part{i // 10}/{i}.md": f"file {i}: ä\r\n".encode() * (i + 1) for i in range(60)}
    noise = {"image.png": b"\x89PNG\0", "latin1.txt": b"caf\xe9", "cut.txt": "é".encode()[:1], "empty.txt": b""}
    hidden = {".git/config": b"text", ".env": b"text", "__pycache__/x.py": b"text", "runs/metrics.jsonl": b"{}"}
    source = write(tmp_path / "text", {**texts, **noise, **hidden})
    os.mkfifo(tmp_path / "text" / "pipe")
    (tmp_path / "text" / "dangling").symlink_to("nowhere")
    cache = tmp_path / "text" / "cache"

    corpus = prepare_corpus(source, cache, 0.2, exclude=[tmp_path / "text" / "runs"])
    train, val = documents(corpus, "train"), documents(corpus, "val")
    assert sorted(train + val) == sorted(texts.values())
    assert 3 <= len(val) <= 25
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert set(manifest["skipped"]) == set(noise)
    write(tmp_path / "text" / "runs", {"metrics.jsonl": b"{} {}"})
    assert prepare_corpus(source, cache, 0.2, exclude=[tmp_path / "text" / "runs"]) == corpus

    more = write(tmp_path / "text", {"another.txt": b"a new file"})
    wider = prepare_corpus(more, cache, 0.2, exclude=[tmp_path / "text" / "runs"])
    assert set(train) <= set(documents(wider, "train"))
    assert set(val) <= set(documents(wider, "val"))


def test_changed_folder_is_rebuilt_and_unchanged_one_is_not(tmp_path: Path) -> None:
    source = write(tmp_path / "text", {f"{i}.txt": b"some text" for i in range(8)})
    first = prepare_corpus(source, tmp_path / "cache", 0.25)
    written = (first.folder / "train.bin").stat().st_mtime_ns
    assert prepare_corpus(source, tmp_path / "cache", 0.25) == first
    assert (first.folder / "train.bin").stat().st_mtime_ns == written

    write(tmp_path / "text", {"3.txt": b"Some text"})
    os.utime(tmp_path / "text" / "3.txt", ns=(1, 1))
    second = prepare_corpus(source, tmp_path / "cache", 0.25)
    assert second.folder != first.folder
    assert second.digest != first.digest

    copy = write(tmp_path / "copy", {f"{i}.txt": b"some text" for i in range(8)})
    assert prepare_corpus(copy, tmp_path / "cache", 0.25).digest == first.digest
    assert prepare_corpus(copy, tmp_path / "cache", 0.6).digest != first.digest


@pytest.mark.parametrize("text", [b"one line\n" * 401, b"x" * 1000, b"x" + "深".encode() * 300])
def test_a_single_file_is_cut(tmp_path: Path, text: bytes) -> None:
    source = write(tmp_path / "text", {"book.txt": text})
    for path in (source, f"{source}/book.txt"):
        corpus = prepare_corpus(path, tmp_path / "cache", 0.1)
        (train,), (val,) = documents(corpus, "train"), documents(corpus, "val")
        assert train + val == text
        assert train.decode() and val.decode()
        assert train.endswith(b"\n") == (b"\n" in text)
        assert 0.05 < len(val) / len(text) <= 0.11


def test_half_built_corpus_is_replaced_and_damage_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "text", {"a.txt": b"abc" * 100})
    write(tmp_path / "cache" / "building", {"train.bin": b"abandoned", "else": b""})
    corpus = prepare_corpus(source, tmp_path / "cache", 0.5)
    assert sorted(p.name for p in corpus.folder.iterdir()) == ["manifest.json", "train.bin", "val.bin"]
    os.truncate(corpus.folder / "val.bin", 10)
    with pytest.raises(ValueError, match=r"val\.bin has 10 bytes.*delete"):
        prepare_corpus(source, tmp_path / "cache", 0.5)


def test_bad_sources(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="nowhere does not exist"):
        prepare_corpus(str(tmp_path / "nowhere"), cache, 0.1)
    with pytest.raises(ValueError, match="no files"):
        prepare_corpus(str(tmp_path / "none"), cache, 0.1)
    with pytest.raises(ValueError, match="0 text files"):
        prepare_corpus(write(tmp_path / "binary", {"a": b"\0", "b": b"\xff"}), cache, 0.1)
    with pytest.raises(ValueError, match=r"1 text files.*too little"):
        prepare_corpus(write(tmp_path / "short", {"a": b"x"}), cache, 0.1)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"data\.val_fraction="):
            prepare_corpus(None, cache, fraction)


def _prepare(source: str, cache: Path, barrier: multiprocessing.Barrier, results: multiprocessing.Queue) -> None:
    barrier.wait()
    corpus = prepare_corpus(source, cache, 0.2)
    results.put((corpus, (corpus.folder / "train.bin").stat().st_ino))


def test_many_processes_build_one_corpus(tmp_path: Path) -> None:
    source = write(tmp_path / "text", {f"{i}.txt": os.urandom(2000).hex().encode() for i in range(300)})
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (source, tmp_path / "cache", barrier, results)
    processes = [context.Process(target=_prepare, args=arguments, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert len(set(found)) == 1
    assert all(process.exitcode == 0 for process in processes)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted([".lock", found[0][0].folder.name])


# --- the order ---


@untimed
@given(size=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@untimed
@given(size=st.integers(1, 2**50), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_stays_inside_and_apart(size: int, key: int, data: st.DataObject) -> None:
    i, j = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    images = permute(i, size, key), permute(j, size, key)
    assert all(0 <= image < size for image in images)
    assert (images[0] == images[1]) == (i == j)


def test_permute_shuffles() -> None:
    size = 1000
    orders = [[permute(i, size, key) for i in range(size)] for key in range(4)]
    expected = np.arange(size)
    for a in range(4):
        assert abs(np.corrcoef(expected, orders[a])[0, 1]) < 0.15
        for b in range(a):
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.15
    counts = np.bincount([permute(0, 10, key) for key in range(5000)], minlength=10)
    assert counts.min() > 400 and counts.max() < 600
    with pytest.raises(ValueError, match=r"index 5 is outside \[0, 5\)"):
        permute(5, 5, 0)


# --- the packing ---

streams = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=20).map(
    lambda docs: np.array([token for doc in docs for token in [*doc, EOD]], dtype="<u2")
)


@untimed
@given(stream=streams, seq_len=st.integers(2, 9), seed=st.integers(0, 5))
def test_packing(stream: np.ndarray, seq_len: int, seed: int) -> None:
    if len(stream) <= seq_len:
        with pytest.raises(ValueError, match=r"lower data\.seq_len"):
            PackedDataset(stream, seq_len, seed)
        return
    dataset = PackedDataset(stream, seq_len, seed)
    for epoch in range(2):
        rows = [dataset.row_of(epoch * dataset.num_rows + i) for i in range(dataset.num_rows)]
        assert sorted(rows) == list(range(dataset.num_rows))
    # In stream order, an epoch's inputs are the stream, and every token but those after an EOD is a target once.
    batch = dataset.micro_batch(range(dataset.num_rows))
    n = dataset.num_rows * seq_len
    assert n + seq_len > len(stream) - 1 >= n
    assert batch.tokens_BS.flatten().tolist() == stream[:n].tolist()
    expected = [IGNORE if a == EOD else b for a, b in zip(stream[:n].tolist(), stream[1 : n + 1].tolist(), strict=True)]
    assert batch.targets_BS.flatten().tolist() == expected
    for tokens, numbers, positions in zip(batch.tokens_BS, batch.documents_BS, batch.positions_BS, strict=True):
        document = position = 0
        for s in range(seq_len):
            assert (int(numbers[s]), int(positions[s])) == (document, position)
            is_end = int(tokens[s]) == EOD
            document, position = (document + 1, 0) if is_end else (document, position + 1)


def test_short_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len=1 is too short"):
        PackedDataset(np.zeros(10, "<u2"), 1, 0)


def test_tensors_are_int64_and_own_their_memory(tmp_path: Path) -> None:
    corpus = prepare_corpus(write(tmp_path / "text", {"a.txt": b"abcdefgh" * 99}), tmp_path / "cache", 0.2)
    dataset = PackedDataset(corpus.tokens("train"), 16, 0)
    batch = dataset.sample(3)
    before = dataset.sample(3).tokens_BS
    for tensor in (batch.tokens_BS, batch.targets_BS, batch.documents_BS, batch.positions_BS):
        assert tensor.dtype == torch.int64 and tensor.shape == (1, 16) and tensor.is_contiguous()
        tensor.fill_(7)  # raises if the tensor were a view of the read-only file
    assert torch.equal(dataset.sample(3).tokens_BS, before)


# --- who trains on what ---

STREAM = np.tile(np.array([*range(30), EOD], dtype="<u2"), 50)


def same(left: MicroBatch, right: MicroBatch) -> bool:
    return torch.equal(left.tokens_BS, right.tokens_BS) and torch.equal(left.targets_BS, right.targets_BS)


@untimed
@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**40))
def test_a_step_depends_on_nothing_but_seed_and_step(step: int, seed: int) -> None:
    plan = BatchPlan(micro_batch_size=2, num_micro_batches=3, dp_size=2)
    used, fresh = PackedDataset(STREAM, 8, seed), PackedDataset(STREAM, 8, seed)
    for t in range(3):
        plan.step_batch(used, t, 1)
    for left, right in zip(plan.step_batch(used, step, 1), plan.step_batch(fresh, step, 1), strict=True):
        assert same(left, right)


def test_seed_and_epoch_change_the_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        dataset = PackedDataset(STREAM, 8, seed)
        return [dataset.row_of(epoch * dataset.num_rows + i) for i in range(dataset.num_rows)]

    orders = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@untimed
@given(dp_log=st.integers(0, 3), step=st.integers(0, 100), micro_batch_size=st.integers(1, 3))
def test_layout_does_not_change_a_step(dp_log: int, step: int, micro_batch_size: int) -> None:
    dataset = PackedDataset(STREAM, 8, seed=3)
    serial = BatchPlan(micro_batch_size, num_micro_batches=8)
    dp_size = 2**dp_log
    split = BatchPlan(micro_batch_size, num_micro_batches=8 // dp_size, dp_size=dp_size)
    assert serial.global_batch_size == split.global_batch_size
    for batch in ("step_batch", "validation_batch"):
        arguments = (step,) if batch == "step_batch" else ()
        expected = getattr(serial, batch)(dataset, *arguments)
        for d in range(dp_size):
            for m, found in enumerate(getattr(split, batch)(dataset, *arguments, dp_rank=d)):
                assert same(found, expected[m * dp_size + d])


def test_steps_use_each_row_of_an_epoch_once() -> None:
    dataset = PackedDataset(np.arange(8 * 12 + 1).astype("<u2"), 8, seed=0)  # no document ends: rows are distinct
    plan = BatchPlan(micro_batch_size=2, num_micro_batches=2)
    steps = [row for t in range(3) for batch in plan.step_batch(dataset, t) for row in batch.tokens_BS[:, 0].tolist()]
    assert sorted(steps) == [8 * i for i in range(12)]


def test_validation_rows_are_spread_and_fixed() -> None:
    dataset = PackedDataset(np.arange(8 * 100 + 1).astype("<u2"), 8, seed=0)
    batches = BatchPlan(micro_batch_size=5, num_micro_batches=2).validation_batch(dataset)
    assert [row // 8 for batch in batches for row in batch.tokens_BS[:, 0].tolist()] == list(range(0, 100, 10))
    few = PackedDataset(np.arange(8 * 2 + 1).astype("<u2"), 8, seed=0)
    batches = BatchPlan(micro_batch_size=3, num_micro_batches=2).validation_batch(few)
    assert [row // 8 for batch in batches for row in batch.tokens_BS[:, 0].tolist()] == [0, 0, 0, 1, 1, 1]


def test_bad_plans() -> None:
    dataset = PackedDataset(STREAM, 8, 0)
    with pytest.raises(ValueError, match="num_micro_batches=0"):
        BatchPlan(1, 0)
    with pytest.raises(ValueError, match="dp_rank=2 is outside"):
        BatchPlan(1, 1, dp_size=2).step_batch(dataset, 0, dp_rank=2)
    with pytest.raises(ValueError, match="step=-1"):
        BatchPlan(1, 1).step_batch(dataset, -1)
