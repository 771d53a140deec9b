"""The Triton kernels compiled for Hopper (sm_90) and Blackwell (sm_100), on a machine without a GPU.

The backend is really called, on CPU tensors, with a driver in Triton's place that says which GPU to compile for and
launches nothing. So what is compiled is what a GPU would be given. Triton brings NVIDIA's assembler with it: its report
says how many registers a kernel takes, and whether any had to be spilled to memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is for Linux only", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model.fp8.backends import make_backend
from model.fp8.quantize import Quantized, quantize_blocks, quantize_tiles, quantize_transposed
from model.fp8.triton_backend import TritonBackend

FP8_PRODUCT = {90: r"wgmma\.mma_async\S*\.m64n\d+k32\.f32\.e4m3\.e4m3", 100: r"tcgen05\.mma\S*kind::f8f6f4"}


class Driver:
    """Compiles for a GPU of this compute capability; has none."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """The backend, and what the last call compiled."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.backend = TritonBackend()
        self.kernels: list[Any] = []

    @property
    def last(self) -> Any:
        return self.kernels[-1]

    def report(self) -> tuple[int, int]:
        """Registers of a thread of the last kernel, and bytes spilled by it."""
        ptx = self.last.asm["ptx"]
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        assembler = tools / ("ptxas" if self.capability < 100 else "ptxas-blackwell")
        target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
        command = [assembler, "-v", "--gpu-name", target, "/dev/stdin", "-o", "/dev/null"]
        run = subprocess.run(command, input=ptx, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        spilled = [int(size) for size in re.findall(r"(\d+) bytes spill", run.stderr)]
        assert len(spilled) == 2, run.stderr
        return int(re.search(r"Used (\d+) registers", run.stderr)[1]), sum(spilled)


@pytest.fixture(params=[90, 100], ids=["sm_90", "sm_100"])
def compiler(request: Any, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: divmod(request.param, 10))
    compiler = Compiler(request.param)
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        compiler.kernels.append(run(self, *args, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(request.param))
    return compiler


def transposed(x: torch.Tensor, counts: list[int] | None = None) -> Quantized:
    made = quantize_transposed(x, counts)
    return Quantized(made.values.contiguous(), made.scales.contiguous())


def multiply(backend: TritonBackend, product: str, rows: int, odd: int) -> None:
    N, K, counts = 256 + odd, 384 + odd, [rows // 2, 0, rows - rows // 2]
    x, w, dy = torch.zeros(rows, K), torch.zeros(N, K), torch.zeros(rows, N)
    w_EOI = torch.zeros(3, N, K)
    match product:
        case "fprop":
            backend.gemm(quantize_tiles(x), quantize_blocks(w))
        case "dgrad":
            backend.gemm(quantize_tiles(dy), quantize_blocks(w).transposed())
        case "wgrad":
            backend.add_wgrad(torch.zeros_like(w), transposed(dy), transposed(x))
        case "experts fprop":
            backend.grouped_gemm(quantize_tiles(x), quantize_blocks(w_EOI), counts)
        case "experts dgrad":
            backend.grouped_gemm(quantize_tiles(dy), quantize_blocks(w_EOI).transposed(), counts)
        case "experts wgrad":
            backend.add_grouped_wgrad(torch.zeros_like(w_EOI), transposed(dy, counts), transposed(x, counts), counts)


@pytest.mark.parametrize("odd", [0, 5], ids=["even", "odd"])
@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("product", ["fprop", "dgrad", "wgrad", "experts fprop", "experts dgrad", "experts wgrad"])
def test_products_run_on_fp8_tensor_cores_and_are_promoted(
    compiler: Compiler, product: str, rows: int, odd: int
) -> None:
    multiply(compiler.backend, product, rows, odd)
    ttir, ptx = compiler.last.asm["ttir"], compiler.last.asm["ptx"]
    # One product of 128 of K, which begins at zero ...
    dots = re.findall(r"tt\.dot .*, %(\w+), .* : tensor<(\d+)x128xf8E4M3FN> \* tensor<128x(\d+)xf8E4M3FN>", ttir)
    assert len(dots) == ttir.count("tt.dot") == 1
    start, m, n = dots[0]
    assert f"%{start} = arith.constant dense<0.000000e+00> : tensor<{m}x{n}xf32>" in ttir
    # ... is 4 instructions of 32 of K, after which every sum of the block is carried on in FP32.
    instructions = len(re.findall(FP8_PRODUCT[compiler.capability], ptx))
    assert instructions and instructions % 4 == 0
    promotions = len(re.findall(r"fma\.rn\.f32 ", ptx)) + 2 * len(re.findall(r"fma\.rn\.f32x2 ", ptx))
    sums = int(m) * int(n) // (32 * compiler.last.metadata.num_warps)  # of a thread
    assert promotions >= sums * instructions // 4
    registers, spilled = compiler.report()
    assert spilled == 0
    assert registers <= 255


def quantise(backend: TritonBackend, kind: str, x: torch.Tensor, power_of_two: bool) -> None:
    match kind:
        case "tiles":
            backend.quantize(x, power_of_two)
        case "transposed":
            backend.quantize_transposed(x, None, power_of_two)
        case "transposed from FP8":
            backend.requantize_transposed(quantize_tiles(x), [100, 0, len(x) - 100], power_of_two)
        case "weight":
            backend.quantize_weight(x.float(), power_of_two)
        case "SwiGLU":
            backend.swiglu_quantize(x, torch.ones(len(x)) if power_of_two else None, power_of_two)
        case "permute":
            backend.permute_quantize(x, torch.zeros(300, dtype=torch.int64), power_of_two)


@pytest.mark.parametrize(("width", "power_of_two"), [(512, False), (300, True)], ids=["even", "odd power_of_two"])
@pytest.mark.parametrize("kind", ["tiles", "transposed", "transposed from FP8", "weight", "SwiGLU", "permute"])
def test_quantisation_rounds_in_hardware(compiler: Compiler, kind: str, power_of_two: bool, width: int) -> None:
    quantise(compiler.backend, kind, torch.zeros(512, width, dtype=torch.bfloat16), power_of_two)
    ptx = compiler.last.asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert "div.rn.f32" in ptx  # as IEEE says and torch does: the fast division would differ in the last bit
    assert ".ftz" not in ptx  # small numbers are not flushed to zero
    assert compiler.report()[1] == 0


def test_an_old_gpu_and_a_missing_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*precision\.backend=reference"):
        make_backend("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"capability 9 and 10\) only; NVIDIA A100 has \(8, 0\)"):
        make_backend("triton")


def test_without_triton_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model.fp8.triton_backend", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[triton\]'"):
        make_backend("triton")
