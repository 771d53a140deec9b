"""What an engine makes of one request that it has for itself: what tests compare with."""

from __future__ import annotations

import torch

from serving.engine import Engine
from serving.sequence import Request


def run_alone(engine: Engine, request: Request) -> list[int]:
    """All tokens of one request."""
    engine.add(request)
    tokens: list[int] = []
    with torch.inference_mode():
        while not engine.idle:
            for event in engine.step():
                tokens += event.tokens
    return tokens
