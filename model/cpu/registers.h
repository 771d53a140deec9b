// Products whose results stay in registers until they are done: up to 6 rows × 64 columns of C = A · B, on one thread.
//
// Any number of rows, and any depth, without code generated for it and without rows of zeros; who calls says where the
// operands lie, and may have memory fetched that comes next, since a tile takes longer than memory does.
//
// A unit is what one instruction multiplies: a number of FP32, or two of BF16 that follow each other along the depth.

#pragma once

#include "tiles.h"

namespace cpu {

constexpr int64_t HIGH = 6, LANES = 16, BROAD = 64;  // rows of a tile, columns of a vector and of a tile at most

template <typename T>
using Unit = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;

template <typename T>
const Unit<T>* units(const T* x) {
  return reinterpret_cast<const Unit<T>*>(x);
}

inline __m512 read(const float* b) { return _mm512_loadu_ps(b); }
inline __m512i read(const uint32_t* b) { return _mm512_loadu_si512(b); }

inline __m512 add_product(__m512 sum, float a, __m512 b) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum); }

inline __m512 add_product(__m512 sum, uint32_t a, __m512i b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                          reinterpret_cast<__m512bh>(b));
#else
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512 even_b = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
  const __m512 odd_b = _mm512_castsi512_ps(_mm512_and_si512(b, odd));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a << 16))), even_b, sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a & 0xffff0000))), odd_b, sum);
#endif
}

// Where a left operand's units lie: row i of depth d is at[i · row + d · step].
template <typename T>
struct Left {
  const Unit<T>* at;
  int64_t row, step;
};

// What becomes of a tile: it is stored, stored past the caches (in lines of 64 bytes), or added to what is there. Rows
// lie ld apart.
template <typename T>
struct Store {
  T* to;
  int64_t ld;
  void put(int64_t i, int64_t j, __m512 sum) const { store(Vec(sum), to + i * ld + j, LANES); }
};

struct StorePast {
  float* to;
  int64_t ld;
  void put(int64_t i, int64_t j, __m512 sum) const { _mm512_stream_ps(to + i * ld + j, sum); }
};

struct Add {
  float* to;
  int64_t ld;
  void put(int64_t i, int64_t j, __m512 sum) const {
    float* const at = to + i * ld + j;
    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sum));
  }
};

template <typename T, int M, int W, typename To>
void tile(const Left<T>& a, const Unit<T>* b, int64_t ld, int64_t depth, const To& to) {
  __m512 sums[M][W];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) sums[i][j] = _mm512_setzero_ps();
  const Unit<T>* from = a.at;
  for (int64_t d = 0; d < depth; ++d, b += ld, from += a.step) {
    decltype(read(b)) rows[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) rows[j] = read(b + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) sums[i][j] = add_product(sums[i][j], from[i * a.row], rows[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) to.put(i, j * LANES, sums[i][j]);
}

template <typename T, int W, typename To>
void tile_of(int64_t rows, const Left<T>& a, const Unit<T>* b, int64_t ld, int64_t depth, const To& to) {
  switch (rows) {
    case 1: return tile<T, 1, W>(a, b, ld, depth, to);
    case 2: return tile<T, 2, W>(a, b, ld, depth, to);
    case 3: return tile<T, 3, W>(a, b, ld, depth, to);
    case 4: return tile<T, 4, W>(a, b, ld, depth, to);
    case 5: return tile<T, 5, W>(a, b, ld, depth, to);
    default: return tile<T, 6, W>(a, b, ld, depth, to);
  }
}

// C [rows, width] = A · B over `depth` units: at most 6 rows; width 16, 32, 48 or 64. B's rows of units lie ld apart.
template <typename T, typename To>
void multiply_tile(int64_t rows, int64_t width, const Left<T>& a, const Unit<T>* b, int64_t ld, int64_t depth,
                   const To& to) {
  switch (width / LANES) {
    case 1: return tile_of<T, 1>(rows, a, b, ld, depth, to);
    case 2: return tile_of<T, 2>(rows, a, b, ld, depth, to);
    case 3: return tile_of<T, 3>(rows, a, b, ld, depth, to);
    default: return tile_of<T, 4>(rows, a, b, ld, depth, to);
  }
}

// Memory that is wanted soon, as rows of bytes; fetched into the cache a part at a time.
class Soon {
  const char* at_ = nullptr;
  int64_t stride_ = 0, lines_ = 0, left_ = 0, column_ = 0;  // lines_: of one row

 public:
  Soon() = default;
  template <typename T>
  Soon(const T* at, int64_t ld, int64_t rows, int64_t width)
      : at_(reinterpret_cast<const char*>(at)), stride_(ld * sizeof(T)), lines_((width * sizeof(T) + 63) / 64),
        left_(rows * lines_) {}

  int64_t left() const { return left_; }

  void fetch(int64_t count) {
    for (count = std::min(count, left_), left_ -= count; count > 0; --count) {
      _mm_prefetch(at_ + column_ * 64, _MM_HINT_T1);
      if (++column_ == lines_) column_ = 0, at_ += stride_;
    }
  }
};

}  // namespace cpu
