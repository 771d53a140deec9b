// What the kernels of this folder share: moving rows between memory and the FP32 tiles that they work on.
//
// All products are `brgemm`, oneDNN's kernel for one tile as torch exports it: C [M, N] = A [M, K] · B [K, N], row by
// row, on the calling thread. It generates code for each new shape, so shapes are kept few: tiles at an edge are padded.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace cpu {

using Vec = at::vec::Vectorized<float>;

// Rows that a right operand's layout has side by side (see `multiply`).
template <typename T>
inline constexpr int64_t PAIR = std::is_same_v<T, float> ? 1 : 2;

// Room for values that are written before they are read: std::vector would clear it first, BF16 one by one.
template <typename T>
struct Uncleared : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Uncleared<U>;
  };
  template <typename U>
  void construct(U* at) {
    ::new (at) U;
  }
};
template <typename T>
using Room = std::vector<T, Uncleared<T>>;

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// C [M, N] = A · B, or += if `add`.
inline void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                     int64_t ldc, bool add) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, a, b, c);
}

// The same of BF16 into FP32; B has two rows in one: B[k, n] is b[k / 2 · 2 · ldb + 2 · n + k % 2].
inline void multiply(int64_t M, int64_t N, int64_t K, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                     int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, a, b, c);
}

inline void store(const Vec& x, float* to, int64_t n) { x.store(to, static_cast<int>(n)); }

// Rounded to the nearest, ties to even.
inline void store(const Vec& x, at::BFloat16* to, int64_t n) {
#ifdef __AVX512BF16__
  const auto low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m256i low = at::vec::cvtfp32_bf16(__m512(x));
#endif
  if (n == Vec::size())
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
  else
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << n) - 1), low);
}

inline Vec load(const float* from, int64_t n) { return Vec::loadu(from, static_cast<int>(n)); }

inline Vec load(const at::BFloat16* from, int64_t n) {
  const __m256i low = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
}

// use(where a vector begins in [low, high), how many of it there are)
template <typename Use>
void each(int64_t low, int64_t high, const Use& use) {
  for (; low + Vec::size() <= high; low += Vec::size()) use(low, Vec::size());  // a constant: no masks
  if (low < high) use(low, high - low);
}

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
  Vec sum(0);
  each(0, n, [&](int64_t i, int64_t count) { sum = at::vec::fmadd(load(a + i, count), load(b + i, count), sum); });
  return at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum);
}

// Zeros in [from, to): std::fill writes BF16 one by one.
template <typename T>
void clear(T* from, T* to) {
  std::memset(static_cast<void*>(from), 0, (to - from) * sizeof(T));
}

// dst [rows, width] = scale · src.
template <typename From, typename To>
void copy_rows(const From* src, int64_t ld_src, To* dst, int64_t ld_dst, int64_t rows, int64_t width, float scale = 1) {
  for (int64_t r = 0; r < rows; ++r) {
    const From* const from = src + r * ld_src;
    To* const to = dst + r * ld_dst;
    if constexpr (std::is_same_v<From, To>)
      if (scale == 1) {
        std::copy_n(from, width, to);
        continue;
      }
    each(0, width, [&](int64_t c, int64_t n) { store(Vec(scale) * load(from + c, n), to + c, n); });
  }
}

inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst, int64_t rows, int64_t columns) {
  at::vec::transpose_mxn<float>(src, ld_src, dst, ld_dst, static_cast<int>(rows), static_cast<int>(columns));
}

// out [n] = silu(gate) · up; out may be gate.
inline void swiglu_row(const float* gate, const float* up, float* out, int64_t n) {
  each(0, n, [&](int64_t i, int64_t count) {
    const Vec x = load(gate + i, count);
    store(x / (Vec(1) + x.neg().exp()) * load(up + i, count), out + i, count);
  });
}

// Of BF16: by tiles of 32 × 32.
inline void transpose(const at::BFloat16* src, int64_t ld_src, at::BFloat16* dst, int64_t ld_dst, int64_t rows,
                      int64_t columns) {
  for (int64_t r = 0; r < rows; r += 32)
    for (int64_t c = 0; c < columns; c += 32)
      at::vec::transpose_mxn<at::BFloat16>(src + r * ld_src + c, ld_src, dst + c * ld_dst + r, ld_dst,
                                           static_cast<int>(std::min<int64_t>(32, rows - r)),
                                           static_cast<int>(std::min<int64_t>(32, columns - c)));
}

// B's layout for BF16 of rows [rows, width]; a last odd row has zeros beside it.
inline void pack(const at::BFloat16* src, int64_t ld_src, at::BFloat16* dst, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r += 2) {
    const auto* const even = reinterpret_cast<const uint16_t*>(src + r * ld_src);
    const uint16_t* const odd = even + ld_src;
    auto* const to = reinterpret_cast<uint32_t*>(dst + r * width);
    if (r + 1 < rows)
      for (int64_t c = 0; c < width; ++c) to[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
    else
      for (int64_t c = 0; c < width; ++c) to[c] = even[c];
  }
}

// B's layout of the transpose of src [columns, rows]; ld as in `multiply`.
inline void pack_turned(const float* src, int64_t ld_src, float* dst, int64_t ld_dst, int64_t columns, int64_t rows) {
  transpose(src, ld_src, dst, ld_dst, columns, rows);
}

inline void pack_turned(const at::BFloat16* src, int64_t ld_src, at::BFloat16* dst, int64_t ld_dst, int64_t columns,
                        int64_t rows) {
  transpose(reinterpret_cast<const float*>(src), ld_src / 2, reinterpret_cast<float*>(dst), ld_dst, columns, rows / 2);
}

}  // namespace cpu
