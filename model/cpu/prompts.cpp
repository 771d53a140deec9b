// Attention of whole prompts in generation on a CPU, from their latents: softmax(q · kᵀ) · v, causal, FP32, forward alone.
//
// A task is one head of one prompt, on one thread: it makes the head's queries, keys (at once transposed) and values and
// works on blocks of queries; all of it stays in the cache of a core. What tasks share is laid out once per call.
//
// Shapes: B prompts of S tokens (P: padded to whole blocks), H heads; per head N channels without position, R rotary
// ones, Q = N + R, V of values; latents of K (queries) and C channels.

#include <torch/library.h>

#include "softmax.h"

namespace {

using namespace cpu;
using at::Tensor;

constexpr int64_t FEW = 32, NARROW = 64, WIDE = 128;  // rows of a block of queries, of a product's tile; keys of a block

struct Sizes {
  int64_t S, N, R, V, P;
  int64_t Q() const { return N + R; }
  int64_t ld() const { return P + 16; }  // of what is transposed: not a power of two, for the cache's sake
};

// The angles of a prompt, [S, R / 2].
struct Angles {
  const float *cos, *sin;
};

// What a thread computes a head's attention in, for one block of queries.
struct Block {
  std::vector<float> scores, sums;
  std::vector<Exponentials> found;

  explicit Block(const Sizes& z) : scores(FEW * z.ld()), sums(FEW * z.V), found(FEW) {}
};

// out [S, V] with rows ld_out apart; q and v have whole blocks of FEW rows.
void forward_head(const float* q, const float* k_t, const float* v, const Sizes& z, Block& b, float* out,
                  int64_t ld_out) {
  const int64_t Q = z.Q(), ld = z.ld();
  for (int64_t row = 0; row < z.S; row += FEW) {
    const int64_t rows = std::min(FEW, z.S - row);
    const int64_t end = round_up(row + rows, FEW);
    const auto width = [&](int64_t key) { return std::min(WIDE, end - key); };
    for (int64_t key = 0; key < end; key += WIDE)
      multiply(FEW, width(key), Q, q + row * Q, Q, k_t + key, ld, &b.scores[key], ld, false);
    for (int64_t r = 0; r < FEW; ++r) {
      float* const scores = &b.scores[r * ld];
      b.found[r] = exponentiate(scores, scores, 0, r < rows ? row + r + 1 : 0, end, 1.f);
    }
    for (int64_t key = 0; key < end; key += WIDE)
      multiply(FEW, z.V, width(key), &b.scores[key], ld, v + key * z.V, z.V, b.sums.data(), z.V, key > 0);
    for (int64_t r = 0; r < rows; ++r)
      copy_rows(&b.sums[r * z.V], z.V, out + (row + r) * ld_out, ld_out, 1, z.V, 1 / b.found[r].sum);
  }
}

// C [rows, N] = a [rows, K] · b [K, N] in tiles of NARROW rows; the last tile is filled up with zeros.
void multiply_rows(int64_t rows, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, float* c) {
  for (int64_t row = 0; row < rows; row += NARROW) {
    if (rows - row >= NARROW) {
      multiply(NARROW, N, K, a + row * lda, lda, b, N, c + row * N, N, false);
      continue;
    }
    std::vector<float> tile(NARROW * K);
    copy_rows(a + row * lda, lda, tile.data(), K, rows - row, K);
    multiply(NARROW, N, K, tile.data(), K, b, N, c + row * N, N, false);
  }
}

// Even channels first, then odd ones: so a head's rotary channels lie in prompts' attention. R channels, i-th of them.
int64_t channel(int64_t i, int64_t R) { return i < R / 2 ? 2 * i : 2 * i - R + 1; }

// Turn rows of rotary channels that lie so, in place.
void rotate(float* x, int64_t ld, const Angles& angles, const Sizes& z) {
  const int64_t pairs = z.R / 2;
  for (int64_t s = 0; s < z.S; ++s)
    for (int64_t p = 0; p < pairs; p += Vec::size()) {
      const int count = static_cast<int>(std::min<int64_t>(Vec::size(), pairs - p));
      float *const even = x + s * ld + p, *const odd = even + pairs;
      const Vec cos = Vec::loadu(angles.cos + s * pairs + p, count), sin = Vec::loadu(angles.sin + s * pairs + p, count);
      const Vec a = Vec::loadu(even, count), b = Vec::loadu(odd, count);
      (a * cos - b * sin).store(even, count);
      (a * sin + b * cos).store(odd, count);
    }
}

// Attention of B prompts from their latents, forward alone: the heads' projections stay in the cache of a core. All FP32:
// latent_q [B, S, K], latent_kv [B, S, ≥ C] of which the first C channels count, k_rope [B, S, R] not yet turned, the
// weights of the projections [H · (N + R), K] and [H · (N + V), C]; each prompt is one document. [B, S, H · V].
Tensor attend_latents(const Tensor& latent_q, const Tensor& latent_kv, const Tensor& k_rope, const Tensor& query_up,
                      const Tensor& key_value_up, const Tensor& cos, const Tensor& sin, int64_t heads, double scale) {
  const int64_t B = latent_q.size(0), S = latent_q.size(1), K = latent_q.size(2), R = k_rope.size(2);
  const int64_t C = key_value_up.size(1), ld_kv = latent_kv.size(2), Q = query_up.size(0) / heads, N = Q - R;
  const int64_t kv = key_value_up.size(0) / heads, V = kv - N;
  const Sizes z{S, N, R, V, round_up(S, WIDE)};
  const int64_t ld = z.ld();
  // Laid out once for all: latents [B, C, ld] and turned keys [B, R, ld] transposed; W_q [H, K, Q] and W_v [H, C, V] too.
  Tensor out = at::empty({B, S, heads * V}, latent_q.options());
  Tensor columns = at::empty({B, C + R, ld}, latent_q.options());
  Tensor queries = at::empty({heads, K, Q}, latent_q.options()), values = at::empty({heads, C, V}, latent_q.options());
  const float *const q_in = latent_q.const_data_ptr<float>(), *const kv_in = latent_kv.const_data_ptr<float>();
  const float *const w_q = query_up.const_data_ptr<float>(), *const w_kv = key_value_up.const_data_ptr<float>();
  const float* const rope = k_rope.const_data_ptr<float>();
  const float *const cosines = cos.const_data_ptr<float>(), *const sines = sin.const_data_ptr<float>();
  float *const turned = columns.data_ptr<float>(), *const w_q_t = queries.data_ptr<float>();
  float *const w_v_t = values.data_ptr<float>(), *const result = out.data_ptr<float>();
  const auto angles = [&](int64_t b) { return Angles{cosines + b * S * R / 2, sines + b * S * R / 2}; };
  at::parallel_for(0, B + heads, 1, [&](int64_t begin, int64_t stop) {
    std::vector<float> rows(std::max(S * R, Q * K));
    for (int64_t i = begin; i < stop; ++i) {
      if (i < B) {
        float* const to = turned + i * (C + R) * ld;
        transpose(kv_in + i * S * ld_kv, ld_kv, to, ld, S, C);
        for (int64_t s = 0; s < S; ++s)
          for (int64_t r = 0; r < R; ++r) rows[s * R + r] = rope[(i * S + s) * R + channel(r, R)];
        rotate(rows.data(), R, angles(i), z);
        transpose(rows.data(), R, to + C * ld, ld, S, R);
        for (int64_t c = 0; c < C + R; ++c) std::fill(to + c * ld + S, to + (c + 1) * ld, 0.f);
      } else {
        const int64_t h = i - B;
        const float* const from = w_q + h * Q * K;
        for (int64_t q = 0; q < Q; ++q)
          copy_rows(from + (q < N ? q : N + channel(q - N, R)) * K, K, &rows[q * K], K, 1, K, static_cast<float>(scale));
        transpose(rows.data(), K, w_q_t + h * Q * K, Q, Q, K);
        transpose(w_kv + (h * kv + N) * C, C, w_v_t + h * C * V, V, V, C);
      }
    }
  });
  at::parallel_for(0, B * heads, 1, [&](int64_t begin, int64_t stop) {
    Block block(z);
    std::vector<float> q(z.P * Q), k_t(Q * ld), v(z.P * V);
    for (int64_t task = begin; task < stop; ++task) {
      const int64_t b = task / heads, h = task % heads;
      const float* const latents_t = turned + b * (C + R) * ld;
      multiply_rows(S, Q, K, q_in + b * S * K, K, w_q_t + h * Q * K, q.data());
      rotate(q.data() + N, Q, angles(b), z);
      for (int64_t key = 0; key < z.P; key += WIDE)
        multiply(N, WIDE, C, w_kv + h * kv * C, C, latents_t + key, ld, &k_t[key], ld, false);
      std::copy_n(latents_t + C * ld, R * ld, &k_t[N * ld]);
      multiply_rows(S, V, C, kv_in + b * S * ld_kv, ld_kv, w_v_t + h * C * V, v.data());
      forward_head(q.data(), k_t.data(), v.data(), z, block, result + b * S * heads * V + h * V, heads * V);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("attend_latents", &attend_latents);
}
