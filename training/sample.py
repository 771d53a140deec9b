"""Text from trained weights: `python -m training.sample runs/default "import "`.

Loads the newest checkpoint of a run into one process, whatever layout wrote it, and goes on byte by byte. For more than
a look at a small model there is `python -m serving.generate`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model.decode import Decoder
from model.generate import generate, whole_model
from model.sampling import Sampling
from model.tokenizer import ByteTokenizer
from parallel.saved import CheckpointError
from parallel.whole import load_whole_model


def sample_text(
    path: Path, prompt: str, count: int, temperature: float = 0.7, seed: int = 0, averaged: bool = False
) -> str:
    """The prompt and what the model of a run or checkpoint makes of it."""
    sampling = Sampling(temperature, seed=seed)
    sampling.check()
    model, tokenizer = load_whole_model(path, averaged=averaged), ByteTokenizer()
    forward = whole_model(Decoder(model.stage, model.max_length))
    tokens = generate(forward, tokenizer.encode(prompt), count, model.max_length, sampling)
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
    try:
        sampling = (options.tokens, options.temperature, options.seed, options.ema)
        print(sample_text(options.run, options.prompt, *sampling))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
