// Products of rows sorted by expert with their experts' weights on a CPU, and the weights' gradients.
//
// A task is one panel of columns of one expert's result (of its weight's gradient: one panel of rows), on one thread,
// which takes the next task when it is done: threads meet once per call, not once per expert. A panel of the weight is
// laid out once as oneDNN's product of one tile wants it, and stays in the cache for all of the expert's rows. Gradients
// are added where they accumulate. Experts' numbers of rows are new every time, and tiles must not be: the last rows of
// an expert go through a buffer with zeros below them.
//
// Shapes: R rows, E experts; a product y [R, N] = x [R, K] · weight[e] [K, N]; a gradient [E, N, K] += dy[R, N]ᵀ · x [R, K].

#include <torch/library.h>

#include <atomic>

#include "tiles.h"

namespace {

using namespace cpu;
using at::BFloat16;
using at::Tensor;

constexpr int64_t ROWS = 64, PANEL = 64, WIDE = 128, STEP = 32, MANY = 8, CHUNK = 1024;

struct Group {
  int64_t expert, start, rows;
};

// Every expert that has rows, in chunks of at most so many; there must be `all` in all.
std::vector<Group> groups_of(at::IntArrayRef counts, int64_t all, int64_t chunk) {
  std::vector<Group> groups;
  int64_t start = 0;
  for (int64_t expert = 0; expert < static_cast<int64_t>(counts.size()); ++expert)
    for (int64_t left = counts[expert]; left > 0;) {
      const int64_t rows = std::min(left, chunk);
      groups.push_back({expert, start, rows});
      start += rows, left -= rows;
    }
  TORCH_CHECK(start == all, "the experts' counts have ", start, " rows, the tensor ", all);
  return groups;
}

// Call work(task, buffers) for each task, on all threads; Buffers are a thread's own.
template <typename Buffers, typename Work>
void share_out(int64_t tasks, const Buffers& empty, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    Buffers buffers = empty;
    for (int64_t task = next++; task < tasks; task = next++) work(task, buffers);
  });
}

template <typename T>
struct Buffers {
  std::vector<T> panel, rows;
  std::vector<float> tile;
};

// The weight's panel [K, width] from column `column` on, as `multiply` wants it: (where it is, its leading dimension).
// `turned`: the weight lies as [N, K], not as [K, N].
template <typename T>
std::pair<const T*, int64_t> panel_of(const T* weight, bool turned, int64_t K, int64_t N, int64_t column, int64_t width,
                                      std::vector<T>& panel) {
  if (turned) {
    pack_turned(weight + column * K, K, panel.data(), width, width, K);
    return {panel.data(), width};
  }
  if constexpr (std::is_same_v<T, float>) {
    return {weight + column, N};
  } else {
    pack(weight + column, N, panel.data(), K, width);
    return {panel.data(), width};
  }
}

template <typename T>
void products(const T* x, const T* weights, bool turned, const std::vector<Group>& groups, int64_t K, int64_t N, T* out) {
  const int64_t panels = (N + PANEL - 1) / PANEL;
  const Buffers<T> empty{std::vector<T>(K * PANEL), std::vector<T>(ROWS * K), std::vector<float>(ROWS * PANEL)};
  share_out(groups.size() * panels, empty, [&](int64_t task, Buffers<T>& own) {
    const auto [expert, start, rows] = groups[task / panels];
    const int64_t column = task % panels * PANEL, width = std::min(PANEL, N - column);
    const auto [panel, ld] = panel_of(weights + expert * N * K, turned, K, N, column, width, own.panel);
    for (int64_t row = 0; row < rows; row += ROWS) {
      const int64_t height = std::min(ROWS, rows - row);
      const T* from = x + (start + row) * K;
      T* to = out + (start + row) * N + column;
      if (height < ROWS) {
        std::copy(from, from + height * K, own.rows.begin());
        clear(own.rows.data() + height * K, own.rows.data() + round_up(height, STEP) * K);
        from = own.rows.data();
      }
      if (std::is_same_v<T, float> && height == ROWS) {
        multiply(ROWS, width, K, from, K, panel, ld, reinterpret_cast<float*>(to), N, false);
      } else {
        multiply(round_up(height, STEP), width, K, from, K, panel, ld, own.tile.data(), width, false);
        copy_rows(own.tile.data(), width, to, N, height, width);
      }
    }
  });
}

// grad [N, K] += dyᵀ · x over the group's rows, for the rows of grad from `first` on, `height` of them.
template <typename T>
void add_gradient(const T* dy, const T* x, int64_t rows, int64_t K, int64_t N, int64_t first, int64_t height, float* grad,
                  Buffers<T>& own) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, depth = left >= WIDE ? WIDE : left >= STEP ? left / STEP * STEP : STEP;
    const int64_t real = std::min(left, depth);
    if (real < depth) clear(own.rows.data(), own.rows.data() + height * depth);
    transpose(dy + row * N + first, N, own.rows.data(), depth, real, height);
    const T* from = x + row * K;
    int64_t ld = K;
    if constexpr (std::is_same_v<T, float>) {
      if (real < depth) {
        std::copy(from, from + real * K, own.panel.begin());
        clear(own.panel.data() + real * K, own.panel.data() + depth * K);
        from = own.panel.data();
      }
    } else {
      pack(from, K, own.panel.data(), real, K);
      if (real < depth) {
        clear(own.panel.data() + round_up(real, 2) * K, own.panel.data() + depth * K);
      }
      from = own.panel.data();
    }
    for (int64_t m = 0; m < height; m += ROWS)
      for (int64_t k = 0; k < K; k += WIDE)
        multiply(std::min(ROWS, height - m), std::min(WIDE, K - k), depth, own.rows.data() + m * depth, depth,
                 from + k * (std::is_same_v<T, float> ? 1 : 2), ld, grad + (first + m) * K + k, K, true);
    row += depth;
  }
}

template <typename T>
void gradients(const T* dy, const T* x, const std::vector<Group>& groups, int64_t K, int64_t N, float* grads) {
  const int64_t part = groups.size() < MANY ? std::min(N, WIDE) : N;  // each part lays x out anew
  const int64_t parts = (N + part - 1) / part;
  const Buffers<T> empty{std::vector<T>(WIDE * K), std::vector<T>(part * WIDE), {}};
  share_out(groups.size() * parts, empty, [&](int64_t task, Buffers<T>& own) {
    const auto [expert, start, rows] = groups[task / parts];
    const int64_t first = task % parts * part;
    add_gradient(dy + start * N, x + start * K, rows, K, N, first, std::min(part, N - first), grads + expert * N * K, own);
  });
}

// x [R, K] times each expert's weight [E, K, N], which may be the transposed view of one [E, N, K] → [R, N].
Tensor grouped_product(const Tensor& x, const Tensor& weight, at::IntArrayRef counts) {
  const bool turned = weight.stride(2) != 1;
  const int64_t K = weight.size(1), N = weight.size(2);
  const std::vector<Group> groups = groups_of(counts, x.size(0), CHUNK);
  Tensor out = at::empty({x.size(0), N}, x.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    products(x.const_data_ptr<T>(), weight.const_data_ptr<T>(), turned, groups, K, N, out.data_ptr<T>());
  };
  x.scalar_type() == at::kBFloat16 ? run(BFloat16()) : run(float());
  return out;
}

// grad [E, N, K] (FP32) += dyᵀ · x by expert.
void add_grouped_weight_grads(Tensor grad, const Tensor& dy, const Tensor& x, at::IntArrayRef counts) {
  const std::vector<Group> groups = groups_of(counts, x.size(0), x.size(0));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    gradients(dy.const_data_ptr<T>(), x.const_data_ptr<T>(), groups, x.size(1), dy.size(1), grad.data_ptr<float>());
  };
  x.scalar_type() == at::kBFloat16 ? run(BFloat16()) : run(float());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("grouped_product", &grouped_product);
  library.def("add_grouped_weight_grads(Tensor(a!) grad, Tensor dy, Tensor x, int[] counts) -> ()",
              &add_grouped_weight_grads);
}
