// The two passes of the class-sharded head over blocks of rows that stay in the cache, for the plain case on a CPU:
// float32 or bfloat16 rows and products, SGD with momentum, one row per class. The mathematics, with every symbol, is in fused.py and
// row_optimizer.py, whose torch code is the reference for this file; native.py builds it and hands over the tensors.
//
// A thread takes one contiguous share of the rows, in blocks: a block's rows are gathered, normalised, multiplied and
// summed up while they are in the second-level cache. The shares depend on the number of threads alone, so that a run
// repeats itself to the last bit. The matrix products are the BLAS's that torch came with (`sgemm`, or
// `gemm_bf16bf16f32` of rounded blocks), called for one block by one thread.
//
// Templates: R is what rows and momentum are stored in, C what the products take; both float or Short (bfloat16).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

typedef void (*Gemm)(const char*, const char*, const int*, const int*, const int*, const float*, const void*,
                     const int*, const void*, const int*, const float*, float*, const int*);
typedef uint16_t Short;  // the upper half of a float

extern "C" struct Step {
  int64_t count, dim, batch, threads;  // rows n of this step, D, B
  int64_t short_rows, short_products;  // whether R and C are bfloat16
  void *rows, *momentum;               // (R, D) tables of R; momentum is null where μ is 0
  const int64_t* index;                // (n) places in the tables; null: all of them, in place
  const float* missed;                 // (n, 4) what each row missed, [[a, b], [c, d]]; with index
  float* kept;                         // (n, D) the gathered rows; with index
  const void *scaled, *unit;           // (B, D) s·x and x, of C
  float *products, *inverse;           // (n, B) s·‖w‖·cos, or null: not kept; (n) 1/‖w‖
  const float* log_weight;             // (n) or null
  float shift, scale;
  int64_t targets;                     // P samples whose class is here, by ascending place
  const int64_t *target_place, *target_sample;
  double* sums;                        // (threads, B) Σ exp over the negatives
  // second pass
  const float *log_sum, *target_pull, *target_cosine;  // (B), (P), (P)
  float coefficient, mu, decay, lr;
  float* dx;                           // (threads, B, D)
  int64_t extras;                      // rows that get a further gradient, by ascending place
  const int64_t* extra_place;
  const float* extra;                  // (extras, D)
  const int32_t *noise_row, *noise_column;  // (n), (2, D) for rows and momentum in bfloat16, else null
  // LCE
  const float* centers;                // (R, D) or null
  const uint8_t* mask;                 // (R)
  float *center_cosine;                // (n)
  double* alignment;                   // (threads)
  int64_t drawn;                       // the first so many rows have an alignment term
  float share, attraction;             // C/S, and λ_a·gradient / number of centres
};

namespace {

const int64_t BLOCK = 256;  // with a block's rows, gradient and products near a mebibyte at D = 512, B = 128: the quickest
const float MASKED = -1e20f;

// exp to about one unit in the last place, zero below the smallest normal number; x ≤ 88.
inline float exponential(float x) {
  const float n = std::rint(x * 1.44269504088896341f);
  const float f = std::fma(n, -1.428606765330187e-06f, std::fma(n, -0.693145751953125f, x));
  float p = 1.9875691500e-4f;
  p = std::fma(p, f, 1.3981999507e-3f);
  p = std::fma(p, f, 8.3334519073e-3f);
  p = std::fma(p, f, 4.1665795894e-2f);
  p = std::fma(p, f, 1.6666665459e-1f);
  p = std::fma(p, f, 5.0000001201e-1f);
  p = std::fma(p * f, f, f + 1.0f);
  const int32_t bits = (static_cast<int32_t>(std::max(n, -126.0f)) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

inline float wide(float x) { return x; }

inline float wide(Short x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline Short nearest(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<Short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `value` as it is stored; bfloat16 takes either neighbour, with the probability that makes the mean exact.
inline void store(float* to, float value, int32_t, int32_t) { *to = value; }

inline void store(Short* to, float value, int32_t row, int32_t column) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t noise = (static_cast<uint32_t>(row ^ column) * 2654435761u) >> 16;  // Knuth's multiplicative hash
  *to = static_cast<Short>((bits + noise) >> 16);
}

// n numbers in the products' type: in place, or rounded into `to`.
inline const float* narrowed(const float* from, int64_t, float*) { return from; }

inline const Short* narrowed(const float* from, int64_t n, Short* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = nearest(from[i]);
  return to;
}

// n stored numbers as floats: in place, or in `to`.
inline float* widened(float* from, int64_t, float*) { return from; }

inline float* widened(const Short* from, int64_t n, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = wide(from[i]);
  return to;
}

template <class T>
std::unique_ptr<T[]> space(bool needed, int64_t n) {
  return std::unique_ptr<T[]>(new T[needed ? n : 1]);
}

inline float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// c (m, n) = alpha·op(a)·b + beta·c in row-major order, where op transposes when `turned`: a is (k, m) then.
template <class C>
void product(Gemm gemm, bool a_turned, bool b_turned, int64_t m, int64_t n, int64_t k, const C* a, const C* b,
             float beta, float* c) {
  const int M = m, N = n, K = k, lda = a_turned ? m : k, ldb = b_turned ? k : n;
  const float one = 1;
  gemm(b_turned ? "T" : "N", a_turned ? "T" : "N", &N, &M, &K, &one, b, &ldb, a, &lda, &beta, c, &N);
}

struct Share {
  int64_t first, last;
};

Share share_of(const Step& s, int64_t thread) {
  const int64_t blocks = (s.count + BLOCK - 1) / BLOCK;
  return {std::min(s.count, blocks * thread / s.threads * BLOCK),
          std::min(s.count, blocks * (thread + 1) / s.threads * BLOCK)};
}

template <class T>
void prefetch(const T* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// Rows [first, last) brought up to date, into `kept`.
template <class R>
void gather_rows(const Step& s, int64_t first, int64_t last) {
  const int64_t D = s.dim;
  const R *rows = static_cast<const R*>(s.rows), *momentum = static_cast<const R*>(s.momentum);
  for (int64_t r = first; r < last; r++) {
    if (r + 1 < last) {
      prefetch(rows + s.index[r + 1] * D, D);
      if (momentum) prefetch(momentum + s.index[r + 1] * D, D);
    }
    const R *w = rows + s.index[r] * D, *v = momentum ? momentum + s.index[r] * D : w;
    const float a = s.missed[4 * r], b = momentum ? s.missed[4 * r + 1] : 0.0f;
    float* out = s.kept + r * D;
#pragma omp simd
    for (int64_t i = 0; i < D; i++) out[i] = a * wide(w[i]) + b * wide(v[i]);
  }
}

const int64_t* from(const int64_t* places, int64_t count, int64_t first) {
  return std::lower_bound(places, places + count, first);
}

// s·‖w‖·cos of a block, the samples' own classes masked out.
template <class C>
void block_products(const Step& s, Gemm gemm, const C* w, int64_t first, int64_t last, float* out) {
  product(gemm, false, true, last - first, s.batch, s.dim, w, static_cast<const C*>(s.scaled), 0, out);
  for (int64_t t = from(s.target_place, s.targets, first) - s.target_place; t < s.targets && s.target_place[t] < last; t++)
    out[(s.target_place[t] - first) * s.batch + s.target_sample[t]] = MASKED;
}

float offset(const Step& s, int64_t row) { return s.log_weight ? s.log_weight[row] : 0.0f; }

// The rows of a block as floats, after `gather_rows` where there is an index.
template <class R>
const float* block_rows(const Step& s, int64_t first, int64_t last, float* buffer) {
  if (s.index) return s.kept + first * s.dim;
  return widened(static_cast<R*>(s.rows) + first * s.dim, (last - first) * s.dim, buffer);
}

template <class R, class C>
void first_pass(const Step& s, Gemm gemm, int64_t thread) {
  const int64_t D = s.dim, B = s.batch;
  const Share mine = share_of(s, thread);
  const auto wide_rows = space<float>(sizeof(R) == 2 && !s.index, BLOCK * D);
  const auto narrow_rows = space<C>(sizeof(C) == 2, BLOCK * D);
  std::unique_ptr<float[]> own(new float[BLOCK * B]), partial(new float[B]);
  double* sums = s.sums + thread * B;
  double alignment = 0;
  for (int64_t first = mine.first; first < mine.last; first += BLOCK) {
    const int64_t last = std::min(first + BLOCK, mine.last);
    if (s.index) gather_rows<R>(s, first, last);
    const float* w = block_rows<R>(s, first, last, wide_rows.get());
    float* z = s.products ? s.products + first * B : own.get();
    block_products(s, gemm, narrowed(w, (last - first) * D, narrow_rows.get()), first, last, z);
    std::fill_n(partial.get(), B, 0.0f);
    for (int64_t r = first; r < last; r++, w += D, z += B) {
      const float inverse = 1 / std::max(std::sqrt(dot(w, w, D)), 1e-12f), shift = s.shift - offset(s, r);
      s.inverse[r] = inverse;
      float* sum = partial.get();
      if (s.centers && s.index && r + 1 < last) prefetch(s.centers + s.index[r + 1] * D, D);
#pragma omp simd
      for (int64_t b = 0; b < B; b++) sum[b] += exponential(z[b] * inverse - shift);
      if (s.centers) {
        const int64_t place = s.index ? s.index[r] : r;
        const bool counts = s.mask[place] && r < s.drawn;
        s.center_cosine[r] = counts ? dot(w, s.centers + place * D, D) * inverse : 0.0f;
        if (counts) alignment += (1.0 - s.center_cosine[r]) * s.share;
      }
    }
    for (int64_t b = 0; b < B; b++) sums[b] += partial[b];
  }
  if (s.centers) s.alignment[thread] = alignment;
}

// Q (n, B) in place of the products of a block, and the rows' radial parts.
void block_weights(const Step& s, int64_t first, int64_t last, float* z, float* radial) {
  const int64_t B = s.batch;
  const float* log_sum = s.log_sum;  // a pointer read inside keeps the compiler (GCC 12) from using vectors
  int64_t t = from(s.target_place, s.targets, first) - s.target_place;
  for (int64_t r = first; r < last; r++, z += B) {
    const float inverse = s.inverse[r], weight = offset(s, r), factor = s.coefficient * inverse;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t b = 0; b < B; b++) {
      const float cosine = z[b] * inverse, q = exponential(cosine - log_sum[b] + weight) * factor;
      sum += q * cosine;
      z[b] = q;
    }
    sum /= inverse * s.scale;
    for (; t < s.targets && s.target_place[t] == r; t++) {
      z[s.target_sample[t]] = s.target_pull[t] * inverse;
      sum += s.target_pull[t] * s.target_cosine[t];
    }
    radial[r - first] = -sum * inverse * inverse;
  }
}

// v ← μ·v + g + (radial + λ)·w − pull·o, w ← w − η·v, both written to the tables; without momentum v comes from `none`,
// D zeros, and goes to the D numbers behind them. A gathered row's momentum, brought up to date, is a sum of the stored
// one and of the row that `gather_rows` made.
template <class R>
void descend(const Step& s, int64_t r, const float* w, const float* gradient, float radial, R* none) {
  const int64_t D = s.dim, place = s.index ? s.index[r] : r;
  R *to_w = static_cast<R*>(s.rows) + place * D;
  R* to_v = s.momentum ? static_cast<R*>(s.momentum) + place * D : none + D;
  const R* v = s.momentum ? to_v : none;
  const bool rounds = sizeof(R) == 2;
  const int32_t noise = rounds ? s.noise_row[r] : 0;
  const int32_t *of_w = s.noise_column, *of_v = of_w + D;
  const float lr = s.lr;
  float pull = 0, from_v = s.momentum ? s.mu : 0.0f, from_w = s.decay;
  if (s.index && s.momentum) {
    const float* m = s.missed + 4 * r;
    from_w += s.mu * (m[2] / m[0]);
    from_v *= m[3] - m[1] * m[2] / m[0];
  }
  if (s.centers && s.mask[place] && r < s.drawn) {
    pull = s.attraction * s.share * s.inverse[r];
    radial += pull * s.center_cosine[r] * s.inverse[r];
  }
  from_w += radial;
  if (pull != 0) {
    const float* o = s.centers + place * D;
#pragma omp simd
    for (int64_t i = 0; i < D; i++) {
      const float moved = gradient[i] + from_v * wide(v[i]) + from_w * w[i] - pull * o[i];
      store(to_w + i, w[i] - lr * moved, noise, rounds ? of_w[i] : 0);
      store(to_v + i, moved, noise, rounds ? of_v[i] : 0);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < D; i++) {
    const float moved = gradient[i] + from_v * wide(v[i]) + from_w * w[i];
    store(to_w + i, w[i] - lr * moved, noise, rounds ? of_w[i] : 0);
    store(to_v + i, moved, noise, rounds ? of_v[i] : 0);
  }
}

template <class R, class C>
void second_pass(const Step& s, Gemm gemm, int64_t thread) {
  const int64_t D = s.dim, B = s.batch;
  const Share mine = share_of(s, thread);
  const R *rows = static_cast<const R*>(s.rows), *momentum = static_cast<const R*>(s.momentum);
  const auto own = space<float>(true, BLOCK * B), gradient = space<float>(true, BLOCK * D);
  const auto wide_rows = space<float>(sizeof(R) == 2 && !s.index, BLOCK * D);
  const auto narrow_rows = space<C>(sizeof(C) == 2, BLOCK * D), narrow_q = space<C>(sizeof(C) == 2, BLOCK * B);
  const std::unique_ptr<R[]> none(new R[2 * D]());
  float radial[BLOCK], *dx = s.dx + thread * D * B;
  for (int64_t first = mine.first; first < mine.last; first += BLOCK) {
    const int64_t last = std::min(first + BLOCK, mine.last), n = last - first;
    const float* w = block_rows<R>(s, first, last, wide_rows.get());
    const C* narrow = narrowed(w, n * D, narrow_rows.get());
    float *z = own.get(), *g = gradient.get();
    if (s.products)
      z = s.products + first * B;
    else
      block_products(s, gemm, narrow, first, last, z);
    block_weights(s, first, last, z, radial);
    const C* q = narrowed(z, n * B, narrow_q.get());
    product(gemm, true, false, B, D, n, q, narrow, 1, dx);
    product(gemm, false, false, n, D, B, q, static_cast<const C*>(s.unit), 0, g);
    for (int64_t e = from(s.extra_place, s.extras, first) - s.extra_place; e < s.extras && s.extra_place[e] < last; e++) {
      float* to = g + (s.extra_place[e] - first) * D;
      for (int64_t i = 0; i < D; i++) to[i] += s.extra[e * D + i];
    }
    for (int64_t r = first; r < last; r++, w += D, g += D) {
      if (s.index && r + 1 < last) {
        prefetch(rows + s.index[r + 1] * D, D);
        if (momentum) prefetch(momentum + s.index[r + 1] * D, D);
        if (s.centers) prefetch(s.centers + s.index[r + 1] * D, D);
      }
      descend<R>(s, r, w, g, radial[r - first], none.get());
    }
  }
}

typedef void (*Pass)(const Step&, Gemm, int64_t);

void run(const Step& s, Gemm gemm, Pass pass) {
#pragma omp parallel for num_threads(s.threads) schedule(static, 1)
  for (int64_t thread = 0; thread < s.threads; thread++) pass(s, gemm, thread);
}

}  // namespace

extern "C" void lce_first_pass(const Step* step, Gemm gemm) {
  const Pass passes[2][2] = {{first_pass<float, float>, first_pass<float, Short>},
                             {first_pass<Short, float>, first_pass<Short, Short>}};
  run(*step, gemm, passes[step->short_rows != 0][step->short_products != 0]);
}

extern "C" void lce_second_pass(const Step* step, Gemm gemm) {
  const Pass passes[2][2] = {{second_pass<float, float>, second_pass<float, Short>},
                             {second_pass<Short, float>, second_pass<Short, Short>}};
  run(*step, gemm, passes[step->short_rows != 0][step->short_products != 0]);
}

extern "C" int64_t lce_step_size() { return sizeof(Step); }
