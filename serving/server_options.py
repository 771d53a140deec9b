"""The keys of the servers' command lines. Nothing here needs torch, so that a supervisor starts in no time."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


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
    compile: str = "off"  # on: C++ kernels for FP32 on a CPU with AVX-512, built at the first start
