"""Text from trained weights: `python -m training.sample runs/default "import "`.

Loads the newest checkpoint of a run into one process, whatever layout wrote it, and samples byte by byte with a
full forward pass each: enough to look at a small model. (Serving is a different matter, with caches and batches.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from dualpipe.schedules import make_schedule
from dualpipe.wgrad import WeightGradQueue
from model.batch import MicroBatch
from model.config import ModelConfig
from model.precisions import make_precision
from model.stage import ModelStage
from model.tokenizer import ByteTokenizer
from parallel.build import BuildOptions, build_stages
from parallel.mesh import Layout, Mesh
from parallel.saved import CheckpointError, list_checkpoints, load_weights, read_run_state


def load_model(path: Path, averaged: bool = False) -> tuple[ModelStage, int]:
    """The whole model of a checkpoint on the CPU in FP32, and the sequence length that it was trained with.

    averaged   take the moving average of the weights (optim.ema) instead of the weights
    """
    state = read_run_state(path)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), state.config["model"]))
    assert isinstance(config, ModelConfig)
    precision, dtype = make_precision("fp32")
    mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
    schedule = make_schedule("one_f_one_b", 1, 1)
    stages = build_stages(config, schedule, mesh, precision, BuildOptions(param_dtype=dtype), WeightGradQueue())
    load_weights(path, stages[0], averaged)
    return stages[0], state.config["data"]["seq_len"]


def generate(model: ModelStage, prompt: list[int], count: int, window: int, temperature: float, seed: int) -> list[int]:
    """`count` tokens after the prompt, which must not be empty; only the last `window` tokens are looked at.

    temperature 0 takes the likeliest token every time.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        seen = torch.tensor([tokens[-window:]])
        positions = torch.arange(seen.shape[1]).unsqueeze(0)
        logits = model.logits(MicroBatch(seen, seen, torch.zeros_like(seen), positions))[0, -1]
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            probabilities = torch.softmax(logits.double() / temperature, dim=-1)
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokens[len(prompt) :]


def sample_text(
    path: Path, prompt: str, count: int, temperature: float = 0.7, seed: int = 0, averaged: bool = False
) -> str:
    """The prompt and what the model of a checkpoint makes of it."""
    model, window = load_model(path, averaged)
    tokenizer = ByteTokenizer()
    tokens = generate(model, tokenizer.encode(prompt), count, window, temperature, seed)
    return prompt + tokenizer.decode(tokens)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.sample", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("run", type=Path, help="a run's folder, e.g. runs/default")
    parser.add_argument("prompt", nargs="?", default="import ", help="the text to go on from")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 = always the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights (optim.ema)")
    options = parser.parse_args()
    found = list_checkpoints(options.run / "checkpoints")
    if not found:
        print(f"error: {options.run} has no checkpoint", file=sys.stderr)
        return 2
    try:
        sampling = (options.tokens, options.temperature, options.seed, options.ema)
        print(sample_text(found[-1], options.prompt, *sampling))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
