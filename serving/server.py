"""An OpenAI-compatible server: `python -m serving.server checkpoint=runs/default`.

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "default", "prompt": "import ", "max_tokens": 50}'

Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics. It listens on this machine alone
unless host= says otherwise, and asks for a key if there is one (api_key=, or better the variable SERVING_API_KEY).
"""

from __future__ import annotations

import sys

from parallel.saved import CheckpointError
from serving.engine import CacheSize, Engine
from serving.load import load_served, use_cpu
from serving.options import parse_options, usage
from serving.scheduler import Limits
from serving.server_options import ServerOptions


def serve(options: ServerOptions) -> None:
    """Load and serve until a signal. Raises ValueError or CheckpointError for what cannot be served."""
    try:
        import uvicorn

        from serving.app import create_app
        from serving.guard import settings_of
        from serving.worker import Worker
    except ImportError as error:
        raise ValueError(f"the server needs more packages: pip install 'dualpipe-stack[serve]' ({error})") from error
    use_cpu(options.threads)
    limits = Limits(options.max_sequences, options.batch_tokens, options.waiting)
    limits.check(options.drafts)
    if options.page_size < 1 or options.cache_tokens < options.page_size:
        raise ValueError(f"cache_tokens={options.cache_tokens} does not hold a page of page_size={options.page_size}")
    cache = CacheSize(options.cache_tokens // options.page_size, options.page_size)
    model = load_served(
        options.checkpoint, options.precision, options.device, options.ema, options.max_length, options.compile
    )
    engine = Engine(model.stage, model.max_length, cache, limits, options.drafts)
    settings = settings_of(options, model.name)
    app = create_app(Worker(engine, model.tokenizer), settings)
    print(f"serving {settings.name} on http://{options.host}:{options.port}", flush=True)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=5)


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage(__doc__, ServerOptions))
        return 0 if words else 2
    try:
        serve(parse_options(ServerOptions, words))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
