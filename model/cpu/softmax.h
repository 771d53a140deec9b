// The softmax of attention: a row of scores → exponentials, and what divides them.

#pragma once

#include <limits>

#include "tiles.h"

namespace cpu {

// What is left of a row of scores: its largest one, and Σ exp(score − largest).
struct Exponentials {
  float max, sum;
};

// exp(scale · (score − largest)) of row[low, high) into `to`, which may be the row, zeros in the rest of it [0, size).
template <typename T>
Exponentials exponentiate(const float* row, T* to, int64_t low, int64_t high, int64_t size, float scale) {
  clear(to, to + low);
  clear(to + high, to + size);
  if (low >= high) return {0, 1};
  Vec most(-std::numeric_limits<float>::infinity()), sums(0);
  each(low, high, [&](int64_t i, int64_t n) { most = Vec::set(most, at::vec::maximum(most, Vec::loadu(row + i, n)), n); });
  const float max = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, most);
  each(low, high, [&](int64_t i, int64_t n) {
    const Vec value = (Vec(scale) * (Vec::loadu(row + i, n) - Vec(max))).exp_u20();
    store(value, to + i, n);
    sums = Vec::set(sums, sums + value, n);
  });
  return {scale * max, at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, sums)};
}

}  // namespace cpu
