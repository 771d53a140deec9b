// The small functions of the model on a CPU, each one pass over its rows: RMSNorm and SwiGLU, forward and backward, and
// the loss of a row of logits. Operands are FP32 or BF16; between reading and writing all is FP32.
//
// Shapes: R rows, D and F widths, V vocabulary. Rows of an operand may lie apart, as those of a part of a wider matrix do.

#include <torch/library.h>

#include <cmath>
#include <limits>

#include "tiles.h"

namespace {

using namespace cpu;
using at::BFloat16;
using at::Tensor;

constexpr int64_t GRAIN = 1 << 13;  // values below which a second thread does not pay

float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
}

// run(a value of the tensor's type), as FP32 and BF16 have one kernel.
template <typename Run>
void by_type(const Tensor& x, const Run& run) {
  TORCH_CHECK(x.stride(-1) == 1 || x.size(-1) == 1, "a row's values lie apart");
  x.scalar_type() == at::kBFloat16 ? run(BFloat16()) : run(float());
}

// x [R, D] / rms(x) · weight [D].
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t R = x.size(0), D = x.size(1), ld = x.stride(0);
  Tensor result = at::empty({R, D}, x.options());
  const float* const w = weight.const_data_ptr<float>();
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = x.const_data_ptr<T>();
    T* const to = result.data_ptr<T>();
    at::parallel_for(0, R, std::max<int64_t>(1, GRAIN / D), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* const row = from + r * ld;
        const Vec scale(1 / std::sqrt(dot(row, row, D) / D + static_cast<float>(eps)));
        each(0, D, [&](int64_t d, int64_t n) { store(load(row + d, n) * scale * load(w + d, n), to + r * D + d, n); });
      }
    });
  });
  return result;
}

// With s = 1 / rms(x): (s · (dy ∘ w) − x · s³ · mean(dy ∘ w ∘ x) [R, D], Σ s · (dy ∘ x) over the rows [D]).
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, double eps) {
  const int64_t R = x.size(0), D = x.size(1), ld = x.stride(0), ld_dy = dy.stride(0);
  Tensor dx = at::empty({R, D}, x.options()), sums = at::zeros({at::get_num_threads(), D}, weight.options());
  const float* const w = weight.const_data_ptr<float>();
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T *const from = x.const_data_ptr<T>(), *const slopes = dy.const_data_ptr<T>();
    T* const to = dx.data_ptr<T>();
    at::parallel_for(0, R, std::max<int64_t>(1, GRAIN / D), [&](int64_t begin, int64_t end) {
      float* const dw = sums.data_ptr<float>() + at::get_thread_num() * D;
      for (int64_t r = begin; r < end; ++r) {
        const T *const row = from + r * ld, *const slope = slopes + r * ld_dy;
        Vec both(0);
        each(0, D, [&](int64_t d, int64_t n) {
          both = at::vec::fmadd(load(row + d, n) * load(slope + d, n), load(w + d, n), both);
        });
        const float s = 1 / std::sqrt(dot(row, row, D) / D + static_cast<float>(eps));
        const Vec scale(s), along(s * s * s * sum_of(both) / D);
        each(0, D, [&](int64_t d, int64_t n) {
          const Vec value = load(row + d, n), scaled = load(slope + d, n) * scale;
          store(scaled * load(w + d, n) - value * along, to + r * D + d, n);
          store(load(dw + d, n) + scaled * value, dw + d, n);
        });
      }
    });
  });
  return {dx, sums.sum(0)};
}

// silu(gate) · up [· the row's gate] of rows [gate | up]: [R, 2 F] → [R, F].
Tensor swiglu(const Tensor& gate_up, const std::optional<Tensor>& gates) {
  const int64_t R = gate_up.size(0), F = gate_up.size(1) / 2, ld = gate_up.stride(0);
  Tensor result = at::empty({R, F}, gate_up.options());
  const float* const shares = gates ? gates->const_data_ptr<float>() : nullptr;
  by_type(gate_up, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = gate_up.const_data_ptr<T>();
    T* const to = result.data_ptr<T>();
    at::parallel_for(0, R, std::max<int64_t>(1, GRAIN / F / 4), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* const row = from + r * ld;
        const Vec share(shares ? shares[r] : 1.f);
        each(0, F, [&](int64_t f, int64_t n) {
          const Vec x = load(row + f, n);
          store(x / (Vec(1) + x.neg().exp_u20()) * load(row + F + f, n) * share, to + r * F + f, n);
        });
      }
    });
  });
  return result;
}

// (gradient of [gate | up] [R, 2 F], of the rows' gates [R] if there are any).
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate_up, const std::optional<Tensor>& gates) {
  const int64_t R = gate_up.size(0), F = gate_up.size(1) / 2, ld = gate_up.stride(0), ld_dy = dy.stride(0);
  Tensor result = at::empty({R, 2 * F}, gate_up.options());
  Tensor dgates = at::empty({gates ? R : 0}, gate_up.options().dtype(at::kFloat));
  const float* const shares = gates ? gates->const_data_ptr<float>() : nullptr;
  float* const dshares = dgates.data_ptr<float>();
  by_type(gate_up, [&](auto zero) {
    using T = decltype(zero);
    const T *const from = gate_up.const_data_ptr<T>(), *const slopes = dy.const_data_ptr<T>();
    T* const all = result.data_ptr<T>();
    at::parallel_for(0, R, std::max<int64_t>(1, GRAIN / F / 4), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T *const row = from + r * ld, *const slope = slopes + r * ld_dy;
        T* const to = all + r * 2 * F;
        const Vec share(shares ? shares[r] : 1.f), one(1);
        Vec sums(0);
        each(0, F, [&](int64_t f, int64_t n) {
          const Vec x = load(row + f, n), up = load(row + F + f, n), d = load(slope + f, n);
          const Vec sigmoid = one / (one + x.neg().exp_u20()), silu = x * sigmoid;
          sums = at::vec::fmadd(d * silu, up, sums);  // beyond the row's end d is 0
          store(d * share * up * sigmoid * (one + x * (one - sigmoid)), to + f, n);
          store(d * share * silu, to + F + f, n);
        });
        if (shares) dshares[r] = sum_of(sums);
      }
    });
  });
  return {result, dgates};
}

// Replaces logits [R, V] by p − onehot(target); (−log p(target) [R], log Σ exp logits [R]), FP32.
std::tuple<Tensor, Tensor> token_losses(Tensor logits, const Tensor& targets) {
  const int64_t R = logits.size(0), V = logits.size(1);
  Tensor losses = at::empty({R}, logits.options().dtype(at::kFloat)), lse = at::empty_like(losses);
  const int64_t* const wanted = targets.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < R; ++r)
    TORCH_CHECK(wanted[r] >= 0 && wanted[r] < V, "target ", wanted[r], " is not in a vocabulary of ", V);
  float *const loss = losses.data_ptr<float>(), *const log_sum = lse.data_ptr<float>();
  by_type(logits, [&](auto zero) {
    using T = decltype(zero);
    T* const all = logits.data_ptr<T>();
    at::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* const row = all + r * V;
        Vec most(-std::numeric_limits<float>::infinity()), sums(0);
        each(0, V, [&](int64_t v, int64_t n) { most = Vec::set(most, at::vec::maximum(most, load(row + v, n)), n); });
        const float max = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, most);
        each(0, V, [&](int64_t v, int64_t n) { sums = Vec::set(sums, sums + (load(row + v, n) - Vec(max)).exp_u20(), n); });
        log_sum[r] = max + std::log(sum_of(sums));
        const float target = row[wanted[r]];
        loss[r] = log_sum[r] - target;
        each(0, V, [&](int64_t v, int64_t n) { store((load(row + v, n) - Vec(log_sum[r])).exp_u20(), row + v, n); });
        row[wanted[r]] = std::expm1(target - log_sum[r]);
      }
    });
  });
  return {losses, lse};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("rms_norm", &rms_norm);
  library.def("rms_norm_backward", &rms_norm_backward);
  library.def("swiglu", &swiglu);
  library.def("swiglu_backward", &swiglu_backward);
  library.def("token_losses(Tensor(a!) logits, Tensor targets) -> (Tensor, Tensor)", &token_losses);
}
