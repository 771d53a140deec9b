// The small functions of generation on a CPU, each one pass over its rows: RMSNorm and SwiGLU, FP32.
//
// Shapes: R rows, D and F widths. Rows of an operand may lie apart, as those of a part of a wider matrix do.

#include <torch/library.h>

#include <cmath>

#include "tiles.h"

namespace {

using namespace cpu;
using at::Tensor;

constexpr int64_t GRAIN = 1 << 13;  // values below which a second thread does not pay

// x [R, D] / rms(x) · weight [D].
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t R = x.size(0), D = x.size(1), ld = x.stride(0);
  Tensor result = at::empty({R, D}, x.options());
  const float *const from = x.const_data_ptr<float>(), *const w = weight.const_data_ptr<float>();
  float* const to = result.data_ptr<float>();
  at::parallel_for(0, R, std::max<int64_t>(1, GRAIN / D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* const row = from + r * ld;
      Vec sums(0);
      for (int64_t d = 0; d < D; d += Vec::size()) {
        const Vec v = Vec::loadu(row + d, std::min<int64_t>(Vec::size(), D - d));
        sums = at::vec::fmadd(v, v, sums);
      }
      const float sum = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, sums);
      const Vec scale(1 / std::sqrt(sum / D + static_cast<float>(eps)));
      for (int64_t d = 0; d < D; d += Vec::size()) {
        const int count = static_cast<int>(std::min<int64_t>(Vec::size(), D - d));
        (Vec::loadu(row + d, count) * scale * Vec::loadu(w + d, count)).store(to + r * D + d, count);
      }
    }
  });
  return result;
}

// silu(gate) · up of rows [gate | up]: [R, 2 F] → [R, F].
Tensor swiglu(const Tensor& gate_up) {
  const int64_t R = gate_up.size(0), F = gate_up.size(1) / 2, ld = gate_up.stride(0);
  Tensor result = at::empty({R, F}, gate_up.options());
  const float* const from = gate_up.const_data_ptr<float>();
  float* const to = result.data_ptr<float>();
  at::parallel_for(0, R, std::max<int64_t>(1, GRAIN / F / 4), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) swiglu_row(from + r * ld, from + r * ld + F, to + r * F, F);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("rms_norm", &rms_norm);
  library.def("swiglu", &swiglu);
}
