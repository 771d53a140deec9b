"""The public checkpoint format: round trips, streaming, transformers as the other reader, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from benchmarks.peer import our_model, weights_of
from model.batch import MicroBatch
from model.config import ModelConfig
from model.fp8.quantize import quantize_blocks
from model.hf import entries, from_hf_config, to_hf_config
from model.hf_files import FormatError, PublicCheckpoint, write_checkpoint
from model.names import named_routers

CONFIG = ModelConfig(
    vocab_size=61, num_layers=3, num_dense_layers=1, hidden_size=48, dense_ffn_size=40, num_heads=2, query_rank=12,
    key_value_rank=10, head_dim=8, rope_dim=4, value_dim=8, num_experts=8, experts_per_token=3, expert_ffn_size=24,
    num_groups=4, groups_per_token=2, mtp_depth=1, init_std=0.1,
)  # fmt: skip


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    model = our_model(config, "fp32", seed).stages[0]
    generator = torch.Generator().manual_seed(seed)
    for router in named_routers(model).values():
        router.bias_E.copy_(0.2 * torch.randn(config.num_experts, generator=generator))
    return weights_of(model)


def export(folder: Path, weights: dict[str, Tensor], config: ModelConfig = CONFIG, variant: str = "bf16") -> Path:
    write_checkpoint(folder, config, lambda names: {n: weights[n] for n in names}, variant, 128, shard_bytes=40_000)
    return folder


def empty_like(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(value, torch.nan) for name, value in weights.items()}


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, query_rank=0, num_shared_experts=2, mtp_depth=2)])
@pytest.mark.parametrize("variant", ["bf16", "fp32"])
def test_a_round_trip_is_bit_equal(tmp_path: Path, config: ModelConfig, variant: str) -> None:
    weights = random_weights(config)
    if variant == "bf16":
        weights = {n: v if n.endswith("bias_E") else v.bfloat16().float() for n, v in weights.items()}
    first = PublicCheckpoint(export(tmp_path / "a", weights, config, variant))
    assert len(set(first.files.values())) > 3
    back = empty_like(weights)
    first.load_into(config, back)
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    export(tmp_path / "b", back, config, variant)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_fp8_round_trip(tmp_path: Path) -> None:
    """Exactly what the blocks hold, and the same bytes when it is written again."""
    weights = random_weights(CONFIG)
    checkpoint = PublicCheckpoint(export(tmp_path / "a", weights, variant="fp8"))
    back = empty_like(weights)
    checkpoint.load_into(CONFIG, back)
    for entry in entries(CONFIG):
        original, read = weights[entry.ours][entry.rows], back[entry.ours][entry.rows]
        if entry.is_linear:
            assert torch.equal(read, quantize_blocks(original).dequantize())
            assert float((read - original).abs().max() / original.abs().max()) < 2**-4
        elif not entry.ours.endswith("bias_E"):
            assert torch.equal(read, original.bfloat16().float())
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert settings["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (300, 130), (129, 5)])
def test_blocks_have_their_own_scales(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[:1] *= 1000
    blocks = quantize_blocks(weight)
    quantised, scale = blocks.values, blocks.scales
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            assert scale[i, j] == weight[block].abs().max() / 448
            assert torch.equal(quantised[block].float(), (weight[block] / scale[i, j]).to(torch.float8_e4m3fn).float())
    assert torch.equal(quantize_blocks(torch.zeros(shape)).values.float(), torch.zeros(shape))


def batch_of(tokens: list[list[int]]) -> MicroBatch:
    rows = torch.tensor(tokens)
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    return MicroBatch(rows, rows, torch.zeros_like(rows), positions)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, rope_factor=4.0, rope_original_length=32)])
def test_an_exported_model_generates_the_same_tokens_in_transformers(tmp_path: Path, config: ModelConfig) -> None:
    replica = our_model(config, "fp32", seed=3)
    model = replica.stages[0]
    export(tmp_path / "hf", weights_of(model), config, "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    prompt = [5, 17, 40, 2, 33]
    wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)[0].tolist()
    tokens = list(prompt)
    for _ in range(40):
        tokens.append(int(model.logits(batch_of([tokens]))[0, -1].argmax()))
    assert tokens == wanted
    assert len(set(tokens)) > 5


def test_transformers_reads_our_mtp_layer(tmp_path: Path) -> None:
    """Its draft model, loaded from our export, has the hidden state and the loss of our MTP module."""
    replica = our_model(CONFIG, "fp32", seed=3)
    export(tmp_path / "hf", weights_of(replica.stages[0]), CONFIG, "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]  # it knows the full model's number only, 61
    draft = MtpModel.from_pretrained(theirs)
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = theirs.model(tokens[:, :-2]).last_hidden_state
        positions = torch.arange(1, 11).unsqueeze(0)
        cache = MtpCache(config=theirs.config.get_mtp_config())
        out = draft.forward_layer(0, hidden, positions, cache, input_ids=tokens[:, 1:-1])
        wanted = torch.nn.functional.cross_entropy(theirs.lm_head(out)[0], tokens[0, 2:])
    positions = torch.arange(11).unsqueeze(0)
    mb = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(positions), positions, 1 / 11, (1 / 10,))
    ours = replica.pipeline.step([mb])[0][1]
    assert abs(float(ours) - float(wanted)) <= 2e-5 * float(wanted)


# -- errors ------------------------------------------------------------------------------------------------------------


def one_file(folder: Path) -> dict[str, Tensor]:
    """Turn an export into one file without an index; returns its tensors."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    return tensors


def test_a_missing_extra_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", random_weights(CONFIG))
    tensors = one_file(folder)
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    bent = "model.norm.weight"
    changed = {**tensors, "model.layers.9.extra.weight": torch.zeros(1), bent: torch.zeros(7)}
    del changed[lost]
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(FormatError) as error:
        PublicCheckpoint(folder).check(CONFIG)
    for text in (f"missing: {lost}", "model.layers.9.extra.weight", f"{bent} is (7,), expected (48,)"):
        assert text in str(error.value)


def test_a_model_without_mtp_and_other_bad_input(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    folder = export(tmp_path / "hf", weights)
    with pytest.raises(FormatError, match=r"not part of the model: model\.layers\.3\."):
        PublicCheckpoint(folder).check(replace(CONFIG, mtp_depth=0))
    with pytest.raises(ValueError, match="not empty"):
        export(folder, weights)
    with pytest.raises(ValueError, match=r"fp4.*bf16, fp32, fp8"):
        export(tmp_path / "other", weights, variant="fp4")
    with pytest.raises(ValueError, match="norm_eps"):
        export(tmp_path / "other", weights, replace(CONFIG, norm_eps=1e-5))
    shard = next(folder.glob("model-00002*"))
    shard.unlink()
    with pytest.raises(FormatError, match=shard.name):
        PublicCheckpoint(folder)
    with pytest.raises(FormatError, match=r"config\.json"):
        PublicCheckpoint(tmp_path)


def test_copies_of_the_embedding_and_head_may_be_left_out(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    folder = export(tmp_path / "hf", weights, variant="fp32")
    tensors = one_file(folder)
    copies = [n for n in tensors if n.endswith(("layers.3.embed_tokens.weight", "shared_head.head.weight"))]
    assert len(copies) == 2
    save_file({n: t for n, t in tensors.items() if n not in copies}, folder / "model.safetensors")
    back = empty_like(weights)
    PublicCheckpoint(folder).load_into(CONFIG, back)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


# -- memory ------------------------------------------------------------------------------------------------------------

_STREAM = """
import sys, torch
from pathlib import Path
from tests.test_hf import *

def peak() -> int:
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")

config = replace(CONFIG, hidden_size=512, expert_ffn_size=512, num_layers=6, vocab_size=2000)
shapes = {}
for e in entries(config):
    rows = max(e.rows.stop, shapes.get(e.ours, (0,))[0])
    shapes[e.ours] = (rows, *e.shape[1:])

def source(names):
    return {n: torch.ones(shapes[n]) for n in names}  # zeros would not be in memory before they are written to

write_checkpoint(Path(sys.argv[1]) / "warm", CONFIG, lambda names: {n: random_weights(CONFIG)[n] for n in names})
reset(); before = peak()
shards = write_checkpoint(Path(sys.argv[1]) / "hf", config, source, sys.argv[2], shard_bytes=int(sys.argv[3]))
written = peak() - before
largest = max(s.stat().st_size for s in shards)
reset(); before = peak()
checkpoint = PublicCheckpoint(Path(sys.argv[1]) / "hf")
checkpoint.check(config)
for _, value in checkpoint.read([e for e in entries(config) if not e.is_copy]):
    value.sum()
print(len(shards), largest, written, peak() - before)
"""


@pytest.mark.parametrize(("variant", "shard_bytes"), [("fp32", 60_000_000), ("bf16", 30_000_000), ("fp8", 15_000_000)])
def test_memory_stays_below_twice_the_largest_shard(tmp_path: Path, variant: str, shard_bytes: int) -> None:
    """Of a checkpoint of several shards that is written from FP32 tensors made on demand, and read and dropped."""
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, str(tmp_path), variant, str(shard_bytes)],
        capture_output=True, text=True, check=False, timeout=300, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shards, largest, written, read = (int(word) for word in done.stdout.split())
    assert shards >= 4
    assert written < 2 * largest
    assert read < 2 * largest


def test_yarn_without_its_numbers_is_refused() -> None:
    config = replace(CONFIG, rope_factor=4.0, rope_original_length=32)
    for key in ("factor", "original_max_position_embeddings"):
        values = to_hf_config(config, "float32", 64)
        del values["rope_scaling"][key]
        with pytest.raises(ValueError, match=f"of type yarn without {key}"):
            from_hf_config(values)
