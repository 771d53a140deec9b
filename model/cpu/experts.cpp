// The routed experts of a layer on a CPU, for generation, in one call: which experts, and what they give.
//
//     y[t] = Σ_k gate[t, k] · down_e · (silu(gate_e · x[t]) ∘ up_e · x[t])        e = slot[t, k]
//
// A task is up to 64 rows of one expert, on one thread. Weights are [out, in], so a product is weight · rowsᵀ: rows are
// columns in it, and are turned once on their way in and once on their way out. One to four rows are plain dot products,
// which read the weights as fast as memory gives them. Each row's result has a place of its own, and a token adds up its
// own in the order of its choice: no sum depends on which thread was first.
//
// Shapes: T tokens, D hidden size, F width of an expert, E experts here, K experts per token.

#include <torch/library.h>

#include <atomic>
#include <cmath>

#include "tiles.h"

namespace {

using namespace cpu;
using at::Tensor;

constexpr int64_t MOST = 64, TILE = 16, FEW = 4;  // rows of a task, a multiple of which, and how few are dot products

struct Task {
  int64_t expert, begin, rows;  // pairs order[begin, begin + rows)
};

struct Sizes {
  int64_t T, D, F, E, K;
};

// Pairs (token, choice) sorted by expert, cut into tasks. A pair is number token · K + choice.
struct Plan {
  std::vector<int64_t> order;
  std::vector<Task> tasks;
  std::vector<size_t> units;  // where those begin that one thread does in a row, and the end

  Plan(const int64_t* slots, const Sizes& z) : order(z.T * z.K) {
    std::vector<int64_t> next(z.E + 1);
    for (int64_t pair = 0; pair < z.T * z.K; ++pair) ++next[slots[pair] + 1];
    for (int64_t e = 0; e < z.E; ++e) {
      const int64_t begin = next[e], rows = next[e + 1], parts = (rows + MOST - 1) / MOST;
      next[e + 1] += begin;
      const int64_t step = parts ? round_up((rows + parts - 1) / parts, TILE) : 0;
      for (int64_t from = 0; from < rows; from += step)
        tasks.push_back({e, begin + from, std::min(step, rows - from)});
    }
    for (int64_t pair = 0; pair < z.T * z.K; ++pair) order[next[slots[pair]]++] = pair;
    const bool many = z.E >= 8 * at::get_num_threads();  // so many experts that one thread may have all of one
    for (size_t i = 0; i < tasks.size(); ++i)
      if (!many || i == 0 || tasks[i].expert != tasks[i - 1].expert) units.push_back(i);
    units.push_back(tasks.size());
  }
};

// y [M, N] = x [M, K] · weight [N, K]ᵀ.
template <int M>
void dots(const float* x, const float* weight, float* y, int64_t N, int64_t K) {
  for (int64_t n = 0; n < N; ++n) {
    Vec sums[M];
    for (Vec& sum : sums) sum = Vec(0);
    for (int64_t k = 0; k < K; k += Vec::size()) {
      const int count = static_cast<int>(std::min<int64_t>(Vec::size(), K - k));
      const Vec w = Vec::loadu(weight + n * K + k, count);
      for (int m = 0; m < M; ++m) sums[m] = at::vec::fmadd(w, Vec::loadu(x + m * K + k, count), sums[m]);
    }
    for (int m = 0; m < M; ++m)
      y[m * N + n] = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, sums[m]);
  }
}

// What a thread works with.
struct Scratch {
  std::vector<float> rows, x, h, y;

  explicit Scratch(const Sizes& z) : rows(MOST * z.D), x(MOST * z.D), h(MOST * 2 * z.F), y(MOST * z.D) {}
};

// Of up to FEW rows in scratch.rows [M, D]; the result replaces them.
template <int M>
void few_rows(Scratch& s, const float* gate_up, const float* down, const Sizes& z) {
  dots<M>(s.rows.data(), gate_up, s.h.data(), 2 * z.F, z.D);
  for (int64_t m = 0; m < M; ++m) {
    const float* const h = &s.h[m * 2 * z.F];
    swiglu_row(h, h + z.F, &s.x[m * z.F], z.F);
  }
  dots<M>(s.x.data(), down, s.rows.data(), z.D, z.F);
}

// Of up to MOST rows in scratch.rows [·, D]; the result replaces them. Shapes are kept few: width is padded.
void many_rows(Scratch& s, int64_t rows, const float* gate_up, const float* down, const Sizes& z) {
  const int64_t width = round_up(rows, TILE);
  std::fill(&s.rows[rows * z.D], s.rows.data() + width * z.D, 0.f);
  transpose(s.rows.data(), z.D, s.x.data(), width, width, z.D);
  multiply(2 * z.F, width, z.D, gate_up, z.D, s.x.data(), width, s.h.data(), width, false);
  swiglu_row(s.h.data(), &s.h[z.F * width], s.h.data(), z.F * width);
  multiply(z.D, width, z.F, down, z.F, s.h.data(), width, s.y.data(), width, false);
  transpose(s.y.data(), width, s.rows.data(), z.D, z.D, width);
}

void run(Scratch& s, int64_t rows, const float* gate_up, const float* down, const Sizes& z) {
  switch (rows) {
    case 1: return few_rows<1>(s, gate_up, down, z);
    case 2: return few_rows<2>(s, gate_up, down, z);
    case 3: return few_rows<3>(s, gate_up, down, z);
    case 4: return few_rows<4>(s, gate_up, down, z);
    default: many_rows(s, rows, gate_up, down, z);
  }
}

// y [T, D] of x [T, D], gates [T, K], slots [T, K] in [0, E), gate_up [E, 2 F, D] and down [E, D, F]: FP32, row by row.
Tensor experts(const Tensor& x, const Tensor& gates, const Tensor& slots, const Tensor& gate_up, const Tensor& down) {
  const Sizes z{x.size(0), x.size(1), down.size(2), down.size(0), slots.size(1)};
  const float *from = x.const_data_ptr<float>(), *gate = gates.const_data_ptr<float>();
  const float *first = gate_up.const_data_ptr<float>(), *second = down.const_data_ptr<float>();
  const Plan plan(slots.const_data_ptr<int64_t>(), z);
  Tensor each = at::empty({z.T * z.K, z.D}, x.options()), y = at::empty({z.T, z.D}, x.options());
  float *const parts = each.data_ptr<float>(), *const sums = y.data_ptr<float>();
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Scratch s(z);
    for (size_t unit = next++; unit + 1 < plan.units.size(); unit = next++)
      for (size_t i = plan.units[unit]; i < plan.units[unit + 1]; ++i) {
        const Task& task = plan.tasks[i];
        const int64_t* pairs = &plan.order[task.begin];
        for (int64_t r = 0; r < task.rows; ++r) std::copy_n(from + pairs[r] / z.K * z.D, z.D, &s.rows[r * z.D]);
        run(s, task.rows, first + task.expert * 2 * z.F * z.D, second + task.expert * z.D * z.F, z);
        for (int64_t r = 0; r < task.rows; ++r) std::copy_n(&s.rows[r * z.D], z.D, parts + pairs[r] * z.D);
      }
  });
  at::parallel_for(0, z.T, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t k = 0; k < z.K; ++k) {
        const Vec share(gate[t * z.K + k]);
        for (int64_t d = 0; d < z.D; d += Vec::size()) {
          const int count = static_cast<int>(std::min<int64_t>(Vec::size(), z.D - d));
          const Vec part = share * Vec::loadu(parts + (t * z.K + k) * z.D + d, count);
          (k ? Vec::loadu(sums + t * z.D + d, count) + part : part).store(sums + t * z.D + d, count);
        }
      }
  });
  return y;
}

// The best `count` of values [0, n), ties to the lower index, in order; they are replaced by −∞.
void best(float* values, int64_t n, int64_t count, int64_t* chosen) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t at = 0;
    float most = values[0];
    for (int64_t j = 1; j < n; ++j) {
      const bool more = values[j] > most;
      at = more ? j : at;
      most = more ? values[j] : most;
    }
    chosen[i] = at;
    values[at] = -INFINITY;
  }
}

// As `choose_experts` of model/router.py: biased [T, E] → [T, K].
Tensor choose(const Tensor& biased, int64_t groups, int64_t groups_per_token, int64_t experts_per_token) {
  const int64_t T = biased.size(0), E = biased.size(1), width = E / groups;
  Tensor result = at::empty({T, experts_per_token}, biased.options().dtype(at::kLong));
  const float* const all = biased.const_data_ptr<float>();
  int64_t* const out = result.data_ptr<int64_t>();
  at::parallel_for(0, T, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> values(E), sums(groups), open(E);
    std::vector<int64_t> two(2), kept(groups_per_token);
    for (int64_t t = begin; t < end; ++t) {
      std::copy_n(all + t * E, E, values.begin());
      std::copy_n(all + t * E, E, open.begin());
      if (groups_per_token < groups) {
        std::fill(open.begin(), open.end(), -INFINITY);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t used = std::min<int64_t>(2, width);
          best(&values[g * width], width, used, two.data());
          sums[g] = 0;
          for (int64_t i = 0; i < used; ++i) sums[g] += all[t * E + g * width + two[i]];
        }
        best(sums.data(), groups, groups_per_token, kept.data());
        for (const int64_t g : kept) std::copy_n(all + t * E + g * width, width, &open[g * width]);
      }
      best(open.data(), E, experts_per_token, out + t * experts_per_token);
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("experts", &experts);
  library.def("choose_experts", &choose);
}
