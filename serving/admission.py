"""Which requests can be served at all: checked at the door, before anything is computed for them."""

from __future__ import annotations

from serving.sequence import Request


class Refused(ValueError):
    """A request that cannot be served as it is; the message says why."""


class Busy(RuntimeError):
    """The queue is full."""


def check_request(request: Request, vocabulary: int, max_length: int) -> None:
    """Raise Refused for a request that no engine of this model can serve. max_length: tokens of prompt and answer."""
    if not request.prompt:
        raise Refused("the prompt is empty")
    if request.max_tokens < 1:
        raise Refused(f"max_tokens={request.max_tokens} must be at least 1")
    if not all(0 <= token < vocabulary for token in request.prompt):
        raise Refused(f"the prompt has tokens outside of 0 … {vocabulary - 1}")
    if len(request.prompt) + request.max_tokens > max_length:
        raise Refused(
            f"{len(request.prompt)} tokens of prompt and max_tokens={request.max_tokens} exceed the "
            f"{max_length} tokens that this model serves"
        )
    try:
        request.sampling.check()
    except ValueError as error:
        raise Refused(str(error)) from None


def check_cache(request: Request, cache_tokens: int, page_size: int) -> None:
    """Raise Refused for a request that does not fit into an engine's cache even alone."""
    total = len(request.prompt) + request.max_tokens
    if -(-total // page_size) * page_size > cache_tokens:
        raise Refused(
            f"{len(request.prompt)} tokens of prompt and max_tokens={request.max_tokens} exceed the cache of "
            f"{cache_tokens} tokens"
        )


def check_prompt_cache(request: Request, cache_tokens: int, page_size: int) -> None:
    """Raise Refused for a prompt that does not fit into the cache of an engine that only reads prompts."""
    if -(-len(request.prompt) // page_size) * page_size > cache_tokens:
        raise Refused(f"{len(request.prompt)} tokens of prompt exceed the cache for prompts of {cache_tokens} tokens")
