// Products of rows sorted by expert with their experts' weights on a CPU, and the weights' gradients.
//
// A task is one panel of columns of one expert's result (of its weight's gradient: some of its rows), on one thread,
// which takes the next task when it is done: threads meet once per call, not once per expert. A panel of the weight is
// laid out once as tiles want it, and stays in the cache for all of the expert's rows; the next task's panel is fetched
// meanwhile. Gradients are added where they accumulate, once for as many rows as the cache holds, and fetched ahead, or
// written if they are the first: with few rows per expert memory is what takes long.
//
// Shapes: R rows, E experts; a product y [R, N] = x [R, K] · weight[e] [K, N]; a gradient [E, N, K] (+)= dy[R, N]ᵀ · x [R, K].
// N and K are multiples of 16.

#include <torch/library.h>

#include <atomic>

#include "registers.h"

namespace {

using namespace cpu;
using at::BFloat16;
using at::Tensor;

constexpr int64_t CHUNK = 1024;     // rows of a task of a product
constexpr int64_t DEEP = 128;       // units of depth that a gradient's tile has about, and at most half more
constexpr int64_t MANY = 8;         // experts from which on a task may be all of one's gradient
constexpr int64_t MOST[] = {256, 512};  // rows of a gradient in a task, with few experts and with many

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

// Call work(task, the thread's next task or −1, buffers) for each task, on all threads; each makes buffers of its own.
template <typename Make, typename Work>
void share_out(int64_t tasks, const Make& make, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto buffers = make();
    for (int64_t task = next++; task < tasks;) {
      const int64_t following = next++;
      work(task, following < tasks ? following : -1, buffers);
      task = following;
    }
  });
}

template <typename T>
void pack_panel(const T* src, int64_t ld_src, T* dst, int64_t rows, int64_t width) {
  if constexpr (PAIR<T> > 1)
    pack(src, ld_src, dst, rows, width);
  else
    copy_rows(src, ld_src, dst, width, rows, width);
}

// The weights of a call, expert by expert: [K, N], or `turned`: they lie as [N, K].
template <typename T>
struct Weights {
  const T* at;
  bool turned;
  int64_t K, N;

  // Columns [column, column + width) of an expert's, as a right operand with rows of units `width` apart.
  void panel(int64_t expert, int64_t column, int64_t width, T* to) const {
    const T* const weight = at + expert * N * K;
    turned ? pack_turned(weight + column * K, K, to, width, width, K) : pack_panel(weight + column, N, to, K, width);
  }

  Soon soon(int64_t expert, int64_t column, int64_t width) const {
    const T* const weight = at + expert * N * K;
    return turned ? Soon(weight + column * K, K, width, K) : Soon(weight + column, N, K, width);
  }
};

template <typename T>
void products(const T* x, const Weights<T>& weights, const std::vector<Group>& groups, T* out) {
  const int64_t K = weights.K, N = weights.N, panels = (N + BROAD - 1) / BROAD;
  share_out(groups.size() * panels, [&] { return Room<T>(K * BROAD); }, [&](int64_t task, int64_t following, Room<T>& panel) {
    const auto column = [&](int64_t of) { return of % panels * BROAD; };
    const auto width = [&](int64_t of) { return std::min(BROAD, N - column(of)); };
    const auto [expert, start, rows] = groups[task / panels];
    const int64_t first = column(task), wide = width(task), tiles = (rows + HIGH - 1) / HIGH;
    weights.panel(expert, first, wide, panel.data());
    Soon soon;
    if (following >= 0) soon = weights.soon(groups[following / panels].expert, column(following), width(following));
    const int64_t part = (soon.left() + tiles - 1) / tiles;
    for (int64_t row = 0; row < rows; row += HIGH) {
      soon.fetch(part);
      const Left<T> left{units(x + (start + row) * K), K / PAIR<T>, 1};
      const Store<T> to{out + (start + row) * N + first, N};
      multiply_tile(std::min(HIGH, rows - row), wide, left, units(panel.data()), wide, K / PAIR<T>, to);
    }
  });
}

template <typename T>
struct Buffers {
  Room<T> dy, x;
};

// grad [N, K] += dyᵀ · x over the group's rows, or = if it is `fresh`, for the rows of grad from `first` on, `height` of
// them. What is written once, and not soon read, goes past the caches: else memory is read before it is written.
template <typename T>
void add_gradient(const T* dy, const T* x, int64_t rows, int64_t K, int64_t N, int64_t first, int64_t height, float* grad,
                  bool fresh, Buffers<T>& own) {
  constexpr int64_t deep = DEEP * PAIR<T>;
  const int64_t passes = std::max<int64_t>(1, (rows + deep / 2 - 1) / deep);  // all of grad is read and written in each
  const int64_t chunk = round_up((rows + passes - 1) / passes, PAIR<T>);
  const bool past = passes == 1 && reinterpret_cast<uintptr_t>(grad) % 64 == 0;
  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t real = std::min(chunk, rows - row), depth = (real + PAIR<T> - 1) / PAIR<T>;
    pack_panel(dy + row * N + first, N, own.dy.data(), real, height);
    for (int64_t k = 0; k < K; k += BROAD) {
      const int64_t width = std::min(BROAD, K - k);
      pack_panel(x + row * K + k, K, own.x.data(), real, width);
      for (int64_t n = 0; n < height; n += HIGH) {
        float* const to = grad + (first + n) * K + k;
        const auto multiply = [&](const auto& result) {
          const Left<T> left{units(own.dy.data()) + n, 1, height};
          multiply_tile(std::min(HIGH, height - n), width, left, units(own.x.data()), width, depth, result);
        };
        if (fresh && row == 0) {
          past ? multiply(StorePast{to, K}) : multiply(Store<float>{to, K});
        } else {
          Soon(to + HIGH * K, K, std::min(HIGH, height - n - HIGH), width).fetch(HIGH * BROAD);
          multiply(Add{to, K});
        }
      }
    }
  }
}

template <typename T>
void gradients(const T* dy, const T* x, const std::vector<Group>& groups, int64_t K, int64_t N, float* grads, bool fresh) {
  const bool many = groups.size() >= MANY;
  const int64_t shares = many ? 1 : 2 * at::get_num_threads();  // each lays x out anew
  const int64_t part = std::min(MOST[many], round_up((N + shares - 1) / shares, HIGH)), parts = (N + part - 1) / part;
  const int64_t most = DEEP * PAIR<T> * 3 / 2;
  const auto buffers = [&] { return Buffers<T>{Room<T>(most * part), Room<T>(most * BROAD)}; };
  share_out(groups.size() * parts, buffers, [&](int64_t task, int64_t, Buffers<T>& own) {
    const auto [expert, start, rows] = groups[task / parts];
    const int64_t first = task % parts * part;
    add_gradient(dy + start * N, x + start * K, rows, K, N, first, std::min(part, N - first), grads + expert * N * K,
                 fresh, own);
    _mm_sfence();  // what went past the caches comes before what the thread writes next
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
    products(x.const_data_ptr<T>(), Weights<T>{weight.const_data_ptr<T>(), turned, K, N}, groups, out.data_ptr<T>());
  };
  x.scalar_type() == at::kBFloat16 ? run(BFloat16()) : run(float());
  return out;
}

// grad [E, N, K] (FP32) += dyᵀ · x by expert, or = if it is `fresh`: then there may be anything in it.
void add_grouped_weight_grads(Tensor grad, const Tensor& dy, const Tensor& x, at::IntArrayRef counts, bool fresh) {
  const std::vector<Group> groups = groups_of(counts, x.size(0), x.size(0));
  for (size_t expert = 0; fresh && expert < counts.size(); ++expert)
    if (counts[expert] == 0) grad[expert].zero_();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    gradients(dy.const_data_ptr<T>(), x.const_data_ptr<T>(), groups, x.size(1), dy.size(1), grad.data_ptr<float>(),
                 fresh);
  };
  x.scalar_type() == at::kBFloat16 ? run(BFloat16()) : run(float());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("grouped_product", &grouped_product);
  library.def("add_grouped_weight_grads(Tensor(a!) grad, Tensor dy, Tensor x, int[] counts, bool fresh) -> ()",
              &add_grouped_weight_grads);
}
