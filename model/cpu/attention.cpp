// Attention from projected heads on a CPU, forward and backward: softmax(q · kᵀ) · v, causal, inside each document.
//
// A task is one head of one sequence, on one thread: it rotates and lays out the head's queries, keys and values once,
// in the dtype in which they come, and then works on blocks of them that stay in the cache. Products are of that dtype
// into FP32; scores, softmax and all sums are FP32. Blocks that no query may see are skipped. Forward
// keeps the logarithm of each row's sum of exponentials; backward makes the probabilities again from that, transposed
// (keys × queries), so that every product reads its operands row by row.
// Prompts in generation have a forward of their own (prompts.cpp).
//
// Shapes: B sequences, S positions (P: padded to whole blocks), H heads; per head N channels without position, R rotary
// ones, Q = N + R, V of values.

#include <torch/library.h>

#include "softmax.h"

namespace {

using namespace cpu;
using at::BFloat16;
using at::Tensor;

constexpr int64_t NARROW = 64, WIDE = 128;  // a block of scores: forward has 64 queries × 128 keys, backward the reverse

struct Sizes {
  int64_t B, S, H, N, R, V, P;
  float scale;  // of the scores
  int64_t Q() const { return N + R; }
  int64_t ld() const { return P + 16; }  // of what is transposed: not a power of two, for the cache's sake
};

// What a head's width is rounded up to, with zeros: BF16's right operands have pairs of rows.
template <typename T>
int64_t even(int64_t width) {
  return round_up(width, PAIR<T>);
}

Sizes sizes_of(const Tensor& q_up, const Tensor& kv_up, const Tensor& k_rope, int64_t heads, double scale) {
  const int64_t R = k_rope.size(2), N = q_up.size(2) / heads - R, V = kv_up.size(2) / heads - N;
  return {q_up.size(0), q_up.size(1), heads, N, R, V, round_up(q_up.size(1), WIDE), static_cast<float>(scale)};
}

// Where the documents of a sequence lie: each position's document is [first, end).
struct Documents {
  const int64_t *first, *end;
};

// The angles of a sequence, [S, R / 2].
struct Angles {
  const float *cos, *sin;
};

// Turn the channel pairs of x [S, R] by the angles × direction, in place.
template <typename T>
void rotate(T* x, int64_t ld, const Angles& angles, const Sizes& z, float direction) {
  const int64_t pairs = z.R / 2;
  for (int64_t s = 0; s < z.S; ++s)
    for (int64_t p = 0; p < pairs; ++p) {
      T* const pair = x + s * ld + 2 * p;
      const float even = pair[0], odd = pair[1];
      const float cos = angles.cos[s * pairs + p], sin = direction * angles.sin[s * pairs + p];
      pair[0] = even * cos - odd * sin;
      pair[1] = even * sin + odd * cos;
    }
}

// Room for [P, width], with zeros below row S and in a column that only makes the width even.
template <typename T>
Room<T> padded(int64_t width, const Sizes& z) {
  const int64_t ld = even<T>(width);
  Room<T> room(z.P * ld);
  clear(room.data() + (ld > width ? 0 : z.S * ld), room.data() + room.size());
  return room;
}

// One head: q and k [P, Q], v [P, V], with zeros below row S and in columns that only make the width even.
template <typename T>
struct Head {
  Room<T> q, k, v;

  Head(const T* q_up, const T* kv_up, const T* k_rope, const Angles& angles, const Sizes& z)
      : q(padded<T>(z.Q(), z)), k(padded<T>(z.Q(), z)), v(padded<T>(z.V, z)) {
    const int64_t Q = even<T>(z.Q()), kv = z.N + z.V;
    copy_rows(q_up, z.H * z.Q(), q.data(), Q, z.S, z.Q());
    copy_rows(kv_up, z.H * kv, k.data(), Q, z.S, z.N);
    copy_rows(k_rope, z.R, k.data() + z.N, Q, z.S, z.R);
    copy_rows(kv_up + z.N, z.H * kv, v.data(), even<T>(z.V), z.S, z.V);
    rotate(q.data() + z.N, Q, angles, z, 1);
    rotate(k.data() + z.N, Q, angles, z, 1);
  }
};

// x [P, width] as [width, ld].
template <typename T>
Room<T> transposed(const Room<T>& x, int64_t width, const Sizes& z) {
  Room<T> result(width * z.ld());
  transpose(x.data(), width, result.data(), z.ld(), z.P, width);
  return result;
}

// The same as a right operand.
template <typename T>
Room<T> transposed_right(const Room<T>& x, int64_t width, const Sizes& z) {
  Room<T> result(width * z.ld());
  pack_turned(x.data(), width, result.data(), z.ld(), z.P, width);
  return result;
}

// x [P, width] as a right operand; FP32 is one as it is.
template <typename T>
struct Right {
  Room<T> packed;
  const T* at;

  Right(const Room<T>& x, int64_t width, const Sizes& z) : at(x.data()) {
    if constexpr (PAIR<T> > 1) {
      packed.resize(x.size());
      pack(x.data(), width, packed.data(), z.P, width);
      at = packed.data();
    }
  }
};

// out [S, V] with rows ld apart, and lse [S].
template <typename T>
void forward_head(const Head<T>& head, const Documents& documents, const Sizes& z, T* out, int64_t ld_out, float* lse) {
  const int64_t Q = even<T>(z.Q()), V = even<T>(z.V), ld = z.ld();
  const Room<T> k_t = transposed_right(head.k, Q, z);
  const Right<T> v(head.v, V, z);
  Room<float> scores(NARROW * ld), sums(NARROW * V);
  Room<T> low_shares(PAIR<T> > 1 ? NARROW * ld : 0);
  T* const shares = PAIR<T> > 1 ? low_shares.data() : reinterpret_cast<T*>(scores.data());
  std::vector<Exponentials> found(NARROW);
  for (int64_t row = 0; row < z.S; row += NARROW) {
    const int64_t rows = std::min(NARROW, z.S - row);
    const int64_t first = documents.first[row] / WIDE * WIDE, end = round_up(row + rows, NARROW);
    const auto width = [&](int64_t key) { return std::min(WIDE, end - key); };
    for (int64_t key = first; key < end; key += WIDE)
      multiply(NARROW, width(key), Q, &head.q[row * Q], Q, &k_t[key * PAIR<T>], ld, &scores[key - first], ld, false);
    for (int64_t r = 0; r < NARROW; ++r) {
      const int64_t low = r < rows ? documents.first[row + r] - first : 0, high = r < rows ? row + r + 1 - first : 0;
      found[r] = exponentiate(&scores[r * ld], shares + r * ld, low, high, end - first, z.scale);
      if (r < rows) lse[row + r] = found[r].max + std::log(found[r].sum);
    }
    for (int64_t key = first; key < end; key += WIDE)
      multiply(NARROW, V, width(key), shares + key - first, ld, v.at + key * V, V, sums.data(), V, key > first);
    for (int64_t r = 0; r < rows; ++r)
      copy_rows(&sums[r * V], V, out + (row + r) * ld_out, ld_out, 1, z.V, 1 / found[r].sum);
  }
}

// What backward has of a block, each [64 keys, up to 128 queries]: scores and the shares' gradients, and made of these the
// shares p and the scores' gradients ds, the latter also as a right operand. FP32 has them in place.
template <typename T>
struct Block {
  static constexpr bool LOW = PAIR<T> > 1;
  Room<float> scores, dp;
  Room<T> low_p, low_ds, low_right;
  T *p, *ds, *ds_right;

  Block()
      : scores(NARROW * WIDE), dp(NARROW * WIDE), low_p(LOW ? NARROW * WIDE : 0), low_ds(low_p.size()),
        low_right(low_p.size()), p(LOW ? low_p.data() : reinterpret_cast<T*>(scores.data())),
        ds(LOW ? low_ds.data() : reinterpret_cast<T*>(dp.data())), ds_right(LOW ? low_right.data() : ds) {}

  // Zero where masked. The block begins at this key and this row of queries.
  void differentiate(int64_t key, int64_t row, const Documents& documents, const Sizes& z, const float* lse,
                     const float* delta) {
    for (int64_t k = 0; k < NARROW; ++k) {
      const int64_t position = key + k, at = k * WIDE;
      const bool real = position < z.S;
      const int64_t low = real ? std::clamp<int64_t>(position - row, 0, WIDE) : 0;
      const int64_t high = real ? std::clamp<int64_t>(documents.end[position] - row, low, WIDE) : 0;
      for (T* x : {p + at, ds + at}) {
        clear(x, x + low);
        clear(x + high, x + WIDE);
      }
      each(low, high, [&](int64_t r, int64_t n) {
        const Vec score = Vec(z.scale) * load(&scores[at + r], n), slope = load(&dp[at + r], n) - load(delta + row + r, n);
        const Vec share = (score - load(lse + row + r, n)).exp_u20();
        store(share, p + at + r, n);
        store(share * slope, ds + at + r, n);
      });
      const bool alone = high > low && documents.first[position] == position && position >= row;
      if (alone) ds[at + low] = 0;  // a document's first query sees one key, whose share is 1 whatever the score
    }
    if constexpr (LOW) pack(ds, WIDE, ds_right, NARROW, WIDE);
  }
};

// Gradients of q (transposed), k and v of one head, all FP32; q's and k's still without the scores' scale.
struct HeadGrads {
  std::vector<float> dq_t, dk, dv;
};

template <typename T>
HeadGrads backward_head(const Head<T>& head, const Room<T>& dout, const Documents& documents, const Sizes& z,
                        const float* lse, const float* delta) {
  const int64_t Q = even<T>(z.Q()), V = even<T>(z.V), ld = z.ld();
  const Room<T> q_t = transposed_right(head.q, Q, z), dout_t = transposed_right(dout, V, z);
  const Room<T> k_t = transposed(head.k, Q, z);
  const Right<T> q(head.q, Q, z), dy(dout, V, z);
  HeadGrads grads{std::vector<float>(Q * ld), std::vector<float>(z.P * Q), std::vector<float>(z.P * V)};
  Block<T> block;
  for (int64_t key = 0; key < z.S; key += NARROW) {
    const int64_t end = documents.end[std::min(key + NARROW, z.S) - 1];
    for (int64_t row = key; row < end; row += WIDE) {
      const int64_t at = row * PAIR<T>, width = std::min(WIDE, z.P - row);
      multiply(NARROW, width, Q, &head.k[key * Q], Q, &q_t[at], ld, block.scores.data(), WIDE, false);
      multiply(NARROW, width, V, &head.v[key * V], V, &dout_t[at], ld, block.dp.data(), WIDE, false);
      block.differentiate(key, row, documents, z, lse, delta);
      multiply(NARROW, V, width, block.p, WIDE, dy.at + row * V, V, &grads.dv[key * V], V, true);
      multiply(NARROW, Q, width, block.ds, WIDE, q.at + row * Q, Q, &grads.dk[key * Q], Q, true);
      multiply(Q, width, NARROW, &k_t[key], ld, block.ds_right, WIDE, &grads.dq_t[row], ld, true);
    }
  }
  return grads;
}

// The operands of one call, and where those of a task (a head of a sequence) begin.
template <typename T>
struct Call {
  Sizes z;
  const T *q_up, *kv_up, *k_rope;
  const float *cos, *sin;
  const int64_t *first, *end;

  Call(const Tensor& q, const Tensor& kv, const Tensor& rope, const Tensor& cosines, const Tensor& sines,
       const Tensor& firsts, const Tensor& ends, int64_t heads, double factor)
      : z(sizes_of(q, kv, rope, heads, factor)), q_up(q.const_data_ptr<T>()), kv_up(kv.const_data_ptr<T>()),
        k_rope(rope.const_data_ptr<T>()), cos(cosines.const_data_ptr<float>()), sin(sines.const_data_ptr<float>()),
        first(firsts.const_data_ptr<int64_t>()), end(ends.const_data_ptr<int64_t>()) {}

  int64_t start(int64_t task) const { return task / z.H * z.S; }
  int64_t number(int64_t task) const { return task % z.H; }
  Documents documents(int64_t task) const { return {first + start(task), end + start(task)}; }
  Angles angles(int64_t task) const { return {cos + start(task) * z.R / 2, sin + start(task) * z.R / 2}; }
  // Of a tensor [B, S, H · width], the head's first row.
  template <typename U>
  U* of(U* x, int64_t task, int64_t width) const {
    return x + start(task) * z.H * width + number(task) * width;
  }
  Head<T> head(int64_t task) const {
    return {of(q_up, task, z.Q()), of(kv_up, task, z.N + z.V), k_rope + start(task) * z.R, angles(task), z};
  }
};

template <typename T>
void forward(const Call<T>& call, T* out, float* lse) {
  const Sizes& z = call.z;
  at::parallel_for(0, z.B * z.H, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t task = begin; task < stop; ++task)
      forward_head(call.head(task), call.documents(task), z, call.of(out, task, z.V), z.H * z.V, lse + task * z.S);
  });
}

// dk_rope [B, H, S, R]: each head's part, still turned.
template <typename T>
void backward(const Call<T>& call, const T* dout, const T* out, const float* lse, T* dq_up, T* dkv_up, float* dk_rope) {
  const Sizes& z = call.z;
  const int64_t Q = even<T>(z.Q()), V = even<T>(z.V), kv = z.N + z.V;
  at::parallel_for(0, z.B * z.H, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t task = begin; task < stop; ++task) {
      Room<T> dy = padded<T>(z.V, z);
      Room<float> delta(z.P), dq(z.P * Q);
      copy_rows(call.of(dout, task, z.V), z.H * z.V, dy.data(), V, z.S, z.V);
      for (int64_t s = 0; s < z.S; ++s) delta[s] = dot(&dy[s * V], call.of(out, task, z.V) + s * z.H * z.V, z.V);
      const HeadGrads grads =
          backward_head(call.head(task), dy, call.documents(task), z, lse + task * z.S, delta.data());
      transpose(grads.dq_t.data(), z.ld(), dq.data(), Q, Q, z.P);
      rotate(dq.data() + z.N, Q, call.angles(task), z, -1);
      copy_rows(dq.data(), Q, call.of(dq_up, task, z.Q()), z.H * z.Q(), z.S, z.Q(), z.scale);
      copy_rows(grads.dk.data(), Q, call.of(dkv_up, task, kv), z.H * kv, z.S, z.N, z.scale);
      copy_rows(grads.dk.data() + z.N, Q, dk_rope + task * z.S * z.R, z.R, z.S, z.R, z.scale);
      copy_rows(grads.dv.data(), V, call.of(dkv_up, task, kv) + z.N, z.H * kv, z.S, z.V);
    }
  });
}

// (out [B, S, H · V] in the dtype of the heads, lse [B, H, S]).
std::tuple<Tensor, Tensor> attend(const Tensor& q_up, const Tensor& kv_up, const Tensor& k_rope, const Tensor& cos,
                                  const Tensor& sin, const Tensor& first, const Tensor& end, int64_t heads,
                                  double scale) {
  const Sizes z = sizes_of(q_up, kv_up, k_rope, heads, scale);
  Tensor out = at::empty({z.B, z.S, heads * z.V}, q_up.options());
  Tensor lse = at::empty({z.B, heads, z.S}, cos.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call(q_up, kv_up, k_rope, cos, sin, first, end, heads, scale);
    forward(call, out.data_ptr<T>(), lse.data_ptr<float>());
  };
  q_up.scalar_type() == at::kBFloat16 ? run(BFloat16()) : run(float());
  return {out, lse};
}

// Gradients of q_up, kv_up, and of k_rope by heads [B, H, S, R], in FP32 and still turned.
std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& dout, const Tensor& out, const Tensor& lse,
                                                   const Tensor& q_up, const Tensor& kv_up, const Tensor& k_rope,
                                                   const Tensor& cos, const Tensor& sin, const Tensor& first,
                                                   const Tensor& end, int64_t heads, double scale) {
  Tensor dq_up = at::empty_like(q_up), dkv_up = at::empty_like(kv_up);
  Tensor dk_rope = at::empty({q_up.size(0), heads, q_up.size(1), k_rope.size(2)}, cos.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call(q_up, kv_up, k_rope, cos, sin, first, end, heads, scale);
    backward(call, dout.const_data_ptr<T>(), out.const_data_ptr<T>(), lse.const_data_ptr<float>(), dq_up.data_ptr<T>(),
             dkv_up.data_ptr<T>(), dk_rope.data_ptr<float>());
  };
  q_up.scalar_type() == at::kBFloat16 ? run(BFloat16()) : run(float());
  return {dq_up, dkv_up, dk_rope};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepseek_cpu, library) {
  library.def("attend", &attend);
  library.def("attend_backward", &attend_backward);
}
