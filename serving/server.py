"""An OpenAI-compatible server: `python -m serving.server checkpoint=runs/default`.

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "default", "prompt": "import ", "max_tokens": 50}'

Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics. It listens on this machine alone
unless host= says otherwise, and asks for a key if there is one (api_key=, or better the variable SERVING_API_KEY).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields

import torch
from omegaconf import MISSING

from parallel.saved import CheckpointError
from serving.engine import CacheSize, Engine
from serving.load import load_served
from serving.options import parse_options
from serving.scheduler import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServerOptions:
    checkpoint: str = MISSING  # a run, a checkpoint, or a folder in the public format
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""  # "" = that of SERVING_API_KEY, if there is one
    name: str = ""  # of the model; "" = that of the folder
    max_length: int = 0  # longest sequence, prompt and answer; 0 = as trained
    max_sequences: int = 16  # computed at once
    waiting: int = 256  # requests in the queue before more are refused with 429
    batch_tokens: int = 512  # per step
    cache_tokens: int = 16384
    page_size: int = 16  # tokens
    max_body: int = 1048576  # bytes of a request
    drafts: bool = False  # guess ahead with the MTP module
    ema: bool = False  # use the moving average of the weights
    precision: str = "fp32"  # fp32 | bf16 | fp64 | fp8
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads; 0 = torch's default


def serve(options: ServerOptions) -> None:
    """Load and serve until a signal. Raises ValueError or CheckpointError for what cannot be served."""
    try:
        import uvicorn

        from serving.app import create_app
        from serving.guard import ServerSettings
        from serving.worker import Worker
    except ImportError as error:
        raise ValueError(f"the server needs more packages: pip install 'dualpipe-stack[serve]' ({error})") from error
    if options.threads:
        torch.set_num_threads(options.threads)
    key = options.api_key or os.environ.get("SERVING_API_KEY", "")
    if options.host not in LOOPBACK and not key:
        print(f"warning: host={options.host} lets anybody who reaches it use this server; set SERVING_API_KEY",
              file=sys.stderr)  # fmt: skip
    limits = Limits(options.max_sequences, options.batch_tokens, options.waiting)
    limits.check(options.drafts)
    if options.page_size < 1 or options.cache_tokens < options.page_size:
        raise ValueError(f"cache_tokens={options.cache_tokens} does not hold a page of page_size={options.page_size}")
    cache = CacheSize(options.cache_tokens // options.page_size, options.page_size)
    model = load_served(options.checkpoint, options.precision, options.device, options.ema, options.max_length)
    engine = Engine(model.stage, model.max_length, cache, limits, options.drafts)
    settings = ServerSettings(options.name or model.name, key, options.max_body)
    app = create_app(Worker(engine, model.tokenizer), settings)
    print(f"serving {settings.name} on http://{options.host}:{options.port}", flush=True)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=5)


def usage() -> str:
    keys = "\n".join(f"    {f.name}={'' if f.default is MISSING else f.default}" for f in fields(ServerOptions))
    return f"{(__doc__ or '').strip()}\n\n{keys}"


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    try:
        serve(parse_options(ServerOptions, words))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
