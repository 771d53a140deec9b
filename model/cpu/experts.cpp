// The routed experts of a layer on a CPU, for generation, in one call: which experts, and what they give.
//
//     y[t] = Σ_k gate[t, k] · down_e · (silu(gate_e · x[t]) ∘ up_e · x[t])        e = slot[t, k]
//
// A task is up to 64 rows of one expert, on one thread. Weights are [out, in], so a product is weight · rowsᵀ: rows are
// columns in it, and are turned once on their way in and once on their way out. One to four rows are plain dot products,
// which read the weights as fast as memory gives them. Each row's result has a place of its own, beside those of its
// task, and a token adds up its own in the order of its choice: no sum depends on which thread was first.
//
// Shapes: T tokens, D hidden size, F width of an expert, E experts here, K experts per token.

#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <optional>

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

// Pairs (token, choice) sorted by expert, cut into tasks. A pair is number token · K + choice; order[place[pair]] is pair.
struct Plan {
  std::vector<int64_t> order, place;
  std::vector<Task> tasks;
  std::vector<size_t> units;  // where those begin that one thread does in a row, and the end

  Plan(const int64_t* slots, const Sizes& z) : order(z.T * z.K), place(z.T * z.K) {
    std::vector<int64_t> next(z.E + 1);
    for (int64_t pair = 0; pair < z.T * z.K; ++pair) ++next[slots[pair] + 1];
    for (int64_t e = 0; e < z.E; ++e) {
      const int64_t begin = next[e], rows = next[e + 1], parts = (rows + MOST - 1) / MOST;
      next[e + 1] += begin;
      const int64_t step = parts ? round_up((rows + parts - 1) / parts, TILE) : 0;
      for (int64_t from = 0; from < rows; from += step)
        tasks.push_back({e, begin + from, std::min(step, rows - from)});
    }
    for (int64_t pair = 0; pair < z.T * z.K; ++pair) {
      place[pair] = next[slots[pair]]++;
      order[place[pair]] = pair;
    }
    // So many experts that one thread may have all of one; but the last tasks are shared out singly, to end together.
    const size_t threads = at::get_num_threads(), single = static_cast<size_t>(z.E) >= 8 * threads ? 4 * threads : tasks.size();
    for (size_t i = 0; i < tasks.size(); ++i)
      if (i + single >= tasks.size() || i == 0 || tasks[i].expert != tasks[i - 1].expert) units.push_back(i);
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

  explicit Scratch(const Sizes& z) : rows(MOST * z.D), x(MOST * std::max(z.D, z.F)), h(MOST * 2 * z.F), y(MOST * z.D) {}
};

// y [M, D] of up to FEW rows x [M, D].
template <int M>
void few_rows(Scratch& s, const float* x, float* y, const float* gate_up, const float* down, const Sizes& z) {
  dots<M>(x, gate_up, s.h.data(), 2 * z.F, z.D);
  for (int64_t m = 0; m < M; ++m) {
    const float* const h = &s.h[m * 2 * z.F];
    swiglu_row(h, h + z.F, &s.x[m * z.F], z.F);
  }
  dots<M>(s.x.data(), down, y, z.D, z.F);
}

// y [rows, D] of up to MOST rows x [rows, D]; x may be scratch.rows. Shapes are kept few: width is padded.
void many_rows(Scratch& s, int64_t rows, const float* x, float* y, const float* gate_up, const float* down,
               const Sizes& z) {
  const int64_t width = round_up(rows, TILE);
  const bool whole = rows == width;
  if (!whole) {
    if (x != s.rows.data()) std::copy_n(x, rows * z.D, s.rows.data());
    std::fill(&s.rows[rows * z.D], s.rows.data() + width * z.D, 0.f);
    x = s.rows.data();
  }
  transpose(x, z.D, s.x.data(), width, width, z.D);
  multiply(2 * z.F, width, z.D, gate_up, z.D, s.x.data(), width, s.h.data(), width, false);
  swiglu_row(s.h.data(), &s.h[z.F * width], s.h.data(), z.F * width);
  multiply(z.D, width, z.F, down, z.F, s.h.data(), width, s.y.data(), width, false);
  transpose(s.y.data(), width, whole ? y : s.rows.data(), z.D, z.D, width);
  if (!whole) std::copy_n(s.rows.data(), rows * z.D, y);
}

void run(Scratch& s, int64_t rows, const float* x, float* y, const float* gate_up, const float* down, const Sizes& z) {
  switch (rows) {
    case 1: return few_rows<1>(s, x, y, gate_up, down, z);
    case 2: return few_rows<2>(s, x, y, gate_up, down, z);
    case 3: return few_rows<3>(s, x, y, gate_up, down, z);
    case 4: return few_rows<4>(s, x, y, gate_up, down, z);
    default: many_rows(s, rows, x, y, gate_up, down, z);
  }
}

// y [T, D] = base [T, D] (if given) + Σ_k gates [T, K] · the token's parts; the sum over k is made first.
void add_up(const float* gates, const float* parts, const Plan& plan, const float* base, float* y, const Sizes& z) {
  at::parallel_for(0, z.T, 16, [&](int64_t begin, int64_t end) {
    const auto part = [&](int64_t pair) { return parts + plan.place[pair] * z.D; };
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t pair = (t + 1) * z.K; t + 1 < end && pair < (t + 2) * z.K; ++pair)  // they lie anywhere: ask early
        for (int64_t d = 0; d < z.D; d += Vec::size()) __builtin_prefetch(part(pair) + d);
      for (int64_t d = 0; d < z.D; d += Vec::size()) {
        const int count = static_cast<int>(std::min<int64_t>(Vec::size(), z.D - d));
        Vec sum = Vec(gates[t * z.K]) * Vec::loadu(part(t * z.K) + d, count);
        for (int64_t k = 1; k < z.K; ++k)
          sum = sum + Vec(gates[t * z.K + k]) * Vec::loadu(part(t * z.K + k) + d, count);
        (base ? Vec::loadu(base + t * z.D + d, count) + sum : sum).store(y + t * z.D + d, count);
      }
    }
  });
}

// y [T, D] of x [T, D], gates [T, K], slots [T, K] in [0, E), gate_up [E, 2 F, D] and down [E, D, F]: FP32, row by row;
// added to base [T, D] if there is one.
Tensor experts(const Tensor& x, const Tensor& gates, const Tensor& slots, const Tensor& gate_up, const Tensor& down,
               const std::optional<Tensor>& base) {
  const Sizes z{x.size(0), x.size(1), down.size(2), down.size(0), slots.size(1)};
  const float *const from = x.const_data_ptr<float>();
  const float *const first = gate_up.const_data_ptr<float>(), *const second = down.const_data_ptr<float>();
  const Plan plan(slots.const_data_ptr<int64_t>(), z);
  Tensor each = at::empty({z.T * z.K, z.D}, x.options()), y = at::empty({z.T, z.D}, x.options());
  float* const parts = each.data_ptr<float>();
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Scratch s(z);
    for (size_t unit = next++; unit + 1 < plan.units.size(); unit = next++)
      for (size_t i = plan.units[unit]; i < plan.units[unit + 1]; ++i) {
        const Task& task = plan.tasks[i];
        const int64_t* pairs = &plan.order[task.begin];
        const float* rows = from + task.begin * z.D;  // a single expert's lie so already
        if (z.E > 1) {
          for (int64_t r = 0; r < task.rows; ++r) std::copy_n(from + pairs[r] / z.K * z.D, z.D, &s.rows[r * z.D]);
          rows = s.rows.data();
        }
        run(s, task.rows, rows, parts + task.begin * z.D, first + task.expert * 2 * z.F * z.D,
            second + task.expert * z.D * z.F, z);
      }
  });
  add_up(gates.const_data_ptr<float>(), parts, plan, base ? base->const_data_ptr<float>() : nullptr, y.data_ptr<float>(), z);
  return y;
}

// The best of what was offered, ties to the first, in order.
struct Best {
  std::vector<float> values;
  std::vector<int64_t> chosen;

  explicit Best(int64_t count) : values(count), chosen(count) {}

  void clear() {
    std::fill(values.begin(), values.end(), -INFINITY);
    std::fill(chosen.begin(), chosen.end(), 0);
  }
  void offer(float value, int64_t number) {
    size_t place = values.size() - 1;
    if (!(value > values[place])) return;
    for (; place > 0 && value > values[place - 1]; --place)
      values[place] = values[place - 1], chosen[place] = chosen[place - 1];
    values[place] = value, chosen[place] = number;
  }
};

// As `choose_experts` of model/router.py: biased [T, E] → [T, K]. There NaN sorts before every number, here as infinity.
Tensor choose(const Tensor& biased, int64_t groups, int64_t groups_per_token, int64_t experts_per_token) {
  const int64_t T = biased.size(0), E = biased.size(1), width = E / groups;
  Tensor result = at::empty({T, experts_per_token}, biased.options().dtype(at::kLong));
  const float* const all = biased.const_data_ptr<float>();
  int64_t* const out = result.data_ptr<int64_t>();
  at::parallel_for(0, T, 64, [&](int64_t begin, int64_t end) {
    Best best_groups(groups_per_token), best(experts_per_token);
    for (int64_t t = begin; t < end; ++t) {
      const auto score = [scores = all + t * E](int64_t e) { return std::isnan(scores[e]) ? INFINITY : scores[e]; };
      best_groups.clear();
      best.clear();
      for (int64_t g = 0; g < groups; ++g) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * width; e < (g + 1) * width; ++e) {
          second = std::max(second, std::min(first, score(e)));
          first = std::max(first, score(e));
        }
        best_groups.offer(width > 1 ? first + second : first, g);
      }
      std::sort(best_groups.chosen.begin(), best_groups.chosen.end());
      for (const int64_t g : best_groups.chosen)
        for (int64_t e = g * width; e < (g + 1) * width; ++e) best.offer(score(e), e);
      std::copy(best.chosen.begin(), best.chosen.end(), out + t * experts_per_token);
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("experts(Tensor x, Tensor gates, Tensor slots, Tensor gate_up, Tensor down, Tensor? base=None) -> Tensor",
              &experts);
  library.def("choose_experts", &choose);
}
