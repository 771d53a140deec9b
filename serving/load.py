"""A model ready to be served: the weights, the tokenizer, and the length that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from model.cpu.allocator import keep_freed_memory
from model.cpu.kernels import kernels, suits
from model.stage import ModelStage
from parallel.whole import load_whole_model
from serving.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class ServedModel:
    """name: the run or folder that it came from. max_length: the longest sequence, prompt and answer."""

    name: str
    stage: ModelStage
    tokenizer: Tokenizer
    max_length: int


def load_served(
    checkpoint: str,
    precision: str,
    device: str = "auto",
    averaged: bool = False,
    max_length: int = 0,
    compile: str = "off",
) -> ServedModel:
    """Load a run, a checkpoint or a public folder. max_length 0: as long as it was trained for.

    compile   on: with our C++ kernels (`wants_kernels`)
    Raises ValueError or CheckpointError, saying what is wrong.
    """
    check_max_length(max_length)
    where = resolve_device(device)
    cpp = wants_kernels(compile, precision, where)
    path = Path(checkpoint)
    model = load_whole_model(path, precision, where, averaged, cpp)
    tokenizer = load_tokenizer(model.folder, model.stage.config)
    return ServedModel(path.resolve().name, model.stage, tokenizer, max_length or model.max_length)


def use_cpu(threads: int) -> None:
    """So many threads (0 = torch's default), and freed memory is kept. Raises ValueError for less."""
    if threads < 0:
        raise ValueError(f"threads={threads} must be 0 (torch's default) or more")
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()


def wants_kernels(compile: str, precision: str, device: torch.device) -> bool:
    """Whether generation is to use the C++ kernels of model/cpu; if so, they are there after this, which may take a
    quarter of a minute. Raises ValueError where they cannot be made, or would not be used.
    """
    if compile not in ("on", "off"):
        raise ValueError(f"compile={compile!r} is unknown; choose on or off")
    if compile == "off":
        return False
    if precision != "fp32" or not suits(torch.empty(0, device=device)):
        here = f"precision={precision} on {device.type}"
        raise ValueError(
            f"compile=on is for precision=fp32 on a CPU with AVX-512, not for {here} here; use compile=off"
        )
    try:
        kernels()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return True


def check_max_length(max_length: int) -> None:
    if max_length < 0:
        raise ValueError(f"max_length={max_length} must be 0 (as trained) or more")


def resolve_device(name: str) -> torch.device:
    """auto: the GPU if there is one. Raises ValueError for an unknown name, or cuda without a GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is unknown; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but this torch sees no GPU; use device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
