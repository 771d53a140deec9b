"""Text from trained weights: `python -m serving.generate checkpoint=runs/default prompt="import "`.

checkpoint is a run, one of its checkpoints, or a folder in the public format (config.json and safetensors). Other keys
and their defaults: `python -m serving.generate --help`. Text appears as it is made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from model.sampling import Sampling
from parallel.saved import CheckpointError
from serving.engine import CacheSize, Engine
from serving.load import ServedModel, load_served, use_cpu
from serving.options import parse_options, usage
from serving.sequence import Request
from serving.text import TextStream


@dataclass
class GenerateOptions:
    checkpoint: str = MISSING  # a run, a checkpoint, or a folder in the public format
    prompt: str = MISSING
    tokens: int = 200  # at most so many new ones
    temperature: float = 0.7  # 0 = always the likeliest token
    top_k: int = 0  # only so many of the likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    seed: int = 0
    stop: list[str] = field(default_factory=list)  # texts before which to stop, e.g. stop=["\n\n"]
    drafts: bool = False  # guess ahead with the MTP module (the output's distribution stays the same)
    ema: bool = False  # use the moving average of the weights
    precision: str = "fp32"  # fp32 | bf16 | fp64 | fp8
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads; 0 = torch's default
    compile: str = "off"  # on: C++ kernels for FP32 on a CPU with AVX-512, built at the first start
    max_length: int = 0  # longest sequence, prompt and answer; 0 = as trained


def stream(model: ServedModel, engine: Engine, request: Request, stop: list[str]) -> Iterator[str]:
    """The text of one request, piece by piece. Raises Refused if it cannot be served."""
    text = TextStream(model.tokenizer, stop)
    engine.add(request)
    while not engine.idle and not text.stopped:
        for event in engine.step():
            yield text.push(event.tokens)
            if text.stopped:
                engine.cancel(request.id)
    yield text.close()


def run(options: GenerateOptions) -> None:
    """Load, generate, print; with drafts, say on stderr how many were right."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    sampling.check()
    use_cpu(options.threads)
    model = load_served(
        options.checkpoint, options.precision, options.device, options.ema, options.max_length, options.compile
    )
    prompt = tuple(model.tokenizer.encode(options.prompt))
    page_size = 16
    cache = CacheSize(-(-(len(prompt) + max(1, options.tokens)) // page_size), page_size)
    engine = Engine(model.stage, model.max_length, cache, drafts=options.drafts)
    request = Request("0", prompt, options.tokens, sampling, model.tokenizer.eod)
    engine.check(request)
    print(options.prompt, end="", flush=True)
    for piece in stream(model, engine, request, options.stop):
        print(piece, end="", flush=True)
    print()
    if options.drafts:
        counters = engine.counters
        print(f"drafts: {counters.accepted} of {counters.drafted} accepted ({counters.acceptance:.0%}), "
              f"{counters.made} tokens in {counters.steps} steps", file=sys.stderr)  # fmt: skip


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage(__doc__, GenerateOptions))
        return 0 if words else 2
    try:
        run(parse_options(GenerateOptions, words))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
