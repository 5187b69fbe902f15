// A decoder layer of the Llama family on a CPU, over the packed segment where it lies.
//
// Why this exists: weights are read as the checkpoint stores them, [outputs, inputs] by rows. A library wants its own
// packed copy of them to be fast, which would double the memory of a replica or take the bytes away that it serves to
// peers (ADR 0015). Rows are what a dot product wants anyway: few tokens are computed as dot products over rows that
// stream from memory once; many tokens turn a few rows at a time into a panel that stays in the cache.
//
// No header of torch or Python: a C interface over plain pointers, compiled in seconds with any C++17 compiler that has
// GNU vector extensions (gcc, clang). OpenMP's symbols come from the runtime that torch has loaded, so that there is
// one pool of threads. Activations inside a layer are float; hidden states and KV have the dtype of the weights.
//
// Shapes: T tokens, H query heads, G kv heads, D numbers a head.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;            // floats in a register
constexpr int TOKENS = 12;       // tokens of a panel's tile; with two registers each they fill the register file
constexpr int DOT_ROWS = 4, DOT_TOKENS = 6;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int TOKENS = 6;
constexpr int DOT_ROWS = 3, DOT_TOKENS = 4;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int TOKENS = 12;
constexpr int DOT_ROWS = 4, DOT_TOKENS = 6;
#else
constexpr int W = 4;
constexpr int TOKENS = 6;
constexpr int DOT_ROWS = 3, DOT_TOKENS = 4;
#endif
constexpr int PANEL = 2 * W;     // rows of the weights that a panel holds
constexpr int DOT_MAX = 20;      // tokens up to which dot products are faster than panels (measured)
constexpr int KEYS = 64;         // keys that attention looks at together
constexpr int QUERY_ROWS = 64;   // rows of queries that share a panel of keys

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 { uint16_t bits; };

inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }

inline vf load(const bf16* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, vf v) {
  vu bits = (vu)v;  // to nearest even, as torch rounds; a NaN stays one
  vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  vu nan = (vu)(v != v);
  vh half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0u), vh);
  std::memcpy(p, &half, sizeof half);
}

inline float number(float x) { return x; }
inline float number(bf16 x) { uint32_t bits = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &bits, 4); return f; }
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

template <int distance>
inline vf crossed(vf v) {
  vi lanes;
  for (int i = 0; i < W; i++) lanes[i] = i ^ distance;
  return __builtin_shuffle(v, lanes);
}

inline float sum(vf v) {
#if defined(__AVX512F__)
  v += crossed<8>(v);
#endif
  if (W > 4) v += crossed<4>(v);
  v += crossed<2>(v);
  v += crossed<1>(v);
  return v[0];
}

// e^x for x <= 88, within 2 units of the last place; 0 below -87. Range reduction by ln 2 in two parts (Cody-Waite).
inline vf exponential(vf x) {
  vi dead = x < -87.0f;
  x = (vf)(((vi)x & ~dead) | ((vi)splat(-87.0f) & dead));
  vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number in the lowest bits
  vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi scale = (((vi)shifted - 0x4B400000) + 127) << 23;
  return (vf)((vi)(p * (vf)scale) & ~dead);
}

// ---- Matrices: y[t, n] = sum_k x[t, k] w[n, k] -----------------------------------------------------------------

// Few tokens: rows stream, each loaded once for a tile of tokens.
template <int ROWS, int COUNT, class T>
inline void dot_tile(const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t k, float* y, int64_t ldy) {
  vf acc[COUNT][ROWS];
  for (int t = 0; t < COUNT; t++)
    for (int r = 0; r < ROWS; r++) acc[t][r] = vf{};
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    vf row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = load(w + r * ldw + i);
    for (int t = 0; t < COUNT; t++) {
      vf token = load(x + t * ldx + i);
      for (int r = 0; r < ROWS; r++) acc[t][r] += token * row[r];
    }
  }
  for (int t = 0; t < COUNT; t++)
    for (int r = 0; r < ROWS; r++) {
      float total = sum(acc[t][r]);
      for (int64_t j = i; j < k; j++) total += x[t * ldx + j] * number(w[r * ldw + j]);
      y[t * ldy + r] = total;
    }
}

template <int ROWS, class T>
inline void dot_tokens(const float* x, int64_t ldx, int64_t tokens, const T* w, int64_t ldw, int64_t k, float* y,
                       int64_t ldy) {
  int64_t t = 0;
  for (; t + DOT_TOKENS <= tokens; t += DOT_TOKENS)
    dot_tile<ROWS, DOT_TOKENS>(x + t * ldx, ldx, w, ldw, k, y + t * ldy, ldy);
  for (; t + 2 <= tokens; t += 2) dot_tile<ROWS, 2>(x + t * ldx, ldx, w, ldw, k, y + t * ldy, ldy);
  for (; t < tokens; t++) dot_tile<ROWS, 1>(x + t * ldx, ldx, w, ldw, k, y + t * ldy, ldy);
}

template <class T>
void dot_rows(const float* x, int64_t ldx, int64_t tokens, const T* w, int64_t ldw, int64_t rows, int64_t k, float* y,
              int64_t ldy) {
  int64_t r = 0;
  if (tokens == 1)  // more rows at once: more streams from memory
    for (; r + 4 <= rows; r += 4) dot_tile<4, 1>(x, ldx, w + r * ldw, ldw, k, y + r, ldy);
  for (; r + DOT_ROWS <= rows; r += DOT_ROWS) dot_tokens<DOT_ROWS>(x, ldx, tokens, w + r * ldw, ldw, k, y + r, ldy);
  for (; r < rows; r++) dot_tokens<1>(x, ldx, tokens, w + r * ldw, ldw, k, y + r, ldy);
}

// W rows of W numbers each, transposed in registers: distances 1, 2, 4, ... exchange ever larger blocks.
template <int distance>
inline void transpose(vf* v) {
  vi low, high;
  for (int i = 0; i < W; i++) {
    low[i] = i & distance ? W + i - distance : i;
    high[i] = i & distance ? W + i : i + distance;
  }
  for (int i = 0; i < W; i++)
    if (!(i & distance)) {
      vf a = v[i], b = v[i + distance];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + distance] = __builtin_shuffle(a, b, high);
    }
  if constexpr (2 * distance < W) transpose<2 * distance>(v);
}

// Rows [0, rows) of w, rows <= PANEL, as panel[k][PANEL], float; missing rows are 0.
template <class T>
void pack(const T* w, int64_t ldw, int64_t rows, int64_t k, float* panel) {
  for (int half = 0; half < 2; half++) {
    int64_t i = 0;
    const T* first = w + half * W * ldw;
    int64_t here = std::clamp<int64_t>(rows - half * W, 0, W);
    for (; i + W <= k; i += W) {
      vf block[W];
      for (int r = 0; r < W; r++) block[r] = r < here ? load(first + r * ldw + i) : vf{};
      transpose<1>(block);
      for (int r = 0; r < W; r++) store(panel + (i + r) * PANEL + half * W, block[r]);
    }
    for (; i < k; i++)
      for (int r = 0; r < W; r++) panel[i * PANEL + half * W + r] = r < here ? number(first[r * ldw + i]) : 0.0f;
  }
}

template <int COUNT>
inline void panel_tile(const float* x, int64_t ldx, const float* panel, int64_t k, float* y, int64_t ldy, bool add) {
  vf acc[COUNT][2];
  for (int t = 0; t < COUNT; t++) acc[t][0] = acc[t][1] = vf{};
  for (int64_t i = 0; i < k; i++) {
    vf low = load(panel + i * PANEL), high = load(panel + i * PANEL + W);
    for (int t = 0; t < COUNT; t++) {
      vf token = splat(x[t * ldx + i]);
      acc[t][0] += token * low;
      acc[t][1] += token * high;
    }
  }
  for (int t = 0; t < COUNT; t++) {
    float* row = y + t * ldy;
    store(row, add ? load(row) + acc[t][0] : acc[t][0]);
    store(row + W, add ? load(row + W) + acc[t][1] : acc[t][1]);
  }
}

// y[t, 0..PANEL) for all tokens.
template <int COUNT = TOKENS>
inline void panel_tokens(const float* x, int64_t ldx, int64_t tokens, const float* panel, int64_t k, float* y,
                         int64_t ldy, bool add = false) {
  int64_t t = 0;
  for (; t + COUNT <= tokens; t += COUNT) panel_tile<COUNT>(x + t * ldx, ldx, panel, k, y + t * ldy, ldy, add);
  if constexpr (COUNT > 1)
    if (t < tokens) panel_tokens<COUNT / 2>(x + t * ldx, ldx, tokens - t, panel, k, y + t * ldy, ldy, add);
}

float* scratch(size_t numbers) {
  static thread_local std::vector<float> memory;
  if (memory.size() < numbers) memory.resize(numbers);
  return memory.data();
}

template <class T>
void rows_of(const float* x, int64_t tokens, const T* w, int64_t rows, int64_t k, float* y, int64_t ldy) {
  if (tokens <= DOT_MAX) {
    dot_rows(x, k, tokens, w, k, rows, k, y, ldy);
    return;
  }
  float* panel = scratch(k * PANEL + tokens * PANEL);
  float* edge = panel + k * PANEL;
  for (int64_t r = 0; r < rows; r += PANEL) {
    int64_t here = std::min<int64_t>(PANEL, rows - r);
    pack(w + r * k, k, here, k, panel);
    if (here == PANEL) {
      panel_tokens(x, k, tokens, panel, k, y + r, ldy);
      continue;
    }
    panel_tokens(x, k, tokens, panel, k, edge, PANEL);
    for (int64_t t = 0; t < tokens; t++) std::copy_n(edge + t * PANEL, here, y + t * ldy + r);
  }
}

struct Matrix { const void* weight; const void* bias; int64_t rows; };

// All matrices of a group side by side: y[t, rows of all]. Called by every thread of a team.
template <class T>
void project(const float* x, int64_t tokens, int64_t k, const Matrix* parts, int count, float* y, int64_t ldy) {
  constexpr int64_t SHARE = 2 * PANEL;  // rows that a thread takes at once
  int64_t shares[4] = {0};
  for (int i = 0; i < count; i++) shares[i + 1] = shares[i] + (parts[i].rows + SHARE - 1) / SHARE;
#pragma omp for schedule(dynamic, 1)
  for (int64_t share = 0; share < shares[count]; share++) {
    int part = 0;
    int64_t column = 0;
    while (share >= shares[part + 1]) column += parts[part++].rows;
    int64_t first = (share - shares[part]) * SHARE, rows = std::min(SHARE, parts[part].rows - first);
    float* out = y + column + first;
    rows_of(x, tokens, static_cast<const T*>(parts[part].weight) + first * k, rows, k, out, ldy);
    if (const T* bias = static_cast<const T*>(parts[part].bias))
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) out[t * ldy + r] += number(bias[first + r]);
  }
}

// ---- Norms and rotary embeddings -------------------------------------------------------------------------------

template <class X, class T>
void norm(const X* x, const T* weight, int64_t n, float eps, float* y) {
  vf squares{};
  float tail = 0;
  int64_t i = 0;
  for (; i + W <= n; i += W) squares += load(x + i) * load(x + i);
  for (int64_t j = i; j < n; j++) tail += number(x[j]) * number(x[j]);
  float factor = 1.0f / std::sqrt((sum(squares) + tail) / float(n) + eps);
  for (i = 0; i + W <= n; i += W) store(y + i, load(x + i) * factor * load(weight + i));
  for (; i < n; i++) y[i] = number(x[i]) * factor * number(weight[i]);
}

void rotate(float* x, int64_t d, const float* cos, const float* sin) {
  int64_t half = d / 2, i = 0;
  for (; i + W <= half; i += W) {
    vf low = load(x + i), high = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, low * c - high * s);
    store(x + half + i, high * c + low * s);
  }
  for (; i < half; i++) {
    float low = x[i], high = x[half + i];
    x[i] = low * cos[i] - high * sin[i];
    x[half + i] = high * cos[i] + low * sin[i];
  }
}

template <class T>
void put_row(T* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; i++) put(to + i, from[i]);
}

}  // namespace

extern "C" {

struct LcShape {
  int64_t hidden, heads, kv_heads, head_dim, inner, bfloat16;
  float eps, scale;
};

struct LcLayer {
  Matrix qkv[3], output, gate_up[2], down;
  const void *input_norm, *post_norm, *query_norm, *key_norm;
  int64_t window;  // 0: none
};

struct LcBatch {
  int64_t tokens, requests, pages_widest, page_size;
  const int32_t *pages, *stops, *offsets;
  const int64_t* slots;
  const float *cos, *sin;  // [T, D / 2]
};

}  // extern "C"

namespace {

// ---- Attention -------------------------------------------------------------------------------------------------

// Softmax that is corrected when a larger score comes (FlashAttention's recurrence), for some rows of queries.
struct Running {
  float top[QUERY_ROWS], total[QUERY_ROWS];
};

// One request, one kv head, queries [first, first + count): row = query * group + head of the group.
template <class T>
struct Task {
  const LcShape& shape;
  const LcBatch& batch;
  const T *keys, *values;
  int64_t request, head, first, count, window;

  int64_t group() const { return shape.heads / shape.kv_heads; }
  int64_t position(int64_t query) const {  // of a query of this request
    return batch.stops[request] - (batch.offsets[request + 1] - batch.offsets[request]) + query;
  }
  int64_t lowest(int64_t query) const { return window ? std::max<int64_t>(0, position(query) - window + 1) : 0; }
  const T* row(const T* cache, int64_t at) const {
    int64_t page = batch.pages[request * batch.pages_widest + at / batch.page_size];
    return cache + ((page * batch.page_size + at % batch.page_size) * shape.kv_heads + head) * shape.head_dim;
  }
};

// Scores of `rows` queries and `keys` keys from `start` on, one key after the other: for few rows.
template <class T>
void scores_by_dots(const Task<T>& task, const float* q, int64_t rows, int64_t start, int64_t keys, float* scores) {
  int64_t d = task.shape.head_dim;
  for (int64_t j = 0; j < keys; j++) {
    const T* key = task.row(task.keys, start + j);
    for (int64_t r = 0; r < rows; r++) {
      vf acc{};
      int64_t i = 0;
      for (; i + W <= d; i += W) acc += load(q + r * d + i) * load(key + i);
      float total = sum(acc);
      for (; i < d; i++) total += q[r * d + i] * number(key[i]);
      scores[r * KEYS + j] = total;
    }
  }
}

template <class T>
void gather(const Task<T>& task, const T* cache, int64_t start, int64_t keys, float* to) {
  int64_t d = task.shape.head_dim;
  for (int64_t j = 0; j < keys; j++) {
    const T* from = task.row(cache, start + j);
    int64_t i = 0;
    for (; i + W <= d; i += W) store(to + j * d + i, load(from + i));
    for (; i < d; i++) to[j * d + i] = number(from[i]);
  }
}

// Masks, then turns scores into weights; scales what was summed up before.
template <class T>
void weigh(const Task<T>& task, int64_t rows, int64_t start, int64_t keys, float* scores, Running& run, float* out) {
  int64_t d = task.shape.head_dim;
  for (int64_t r = 0; r < rows; r++) {
    float* row = scores + r * KEYS;
    int64_t query = task.first + r / task.group();
    int64_t low = std::clamp<int64_t>(task.lowest(query) - start, 0, keys);
    int64_t high = std::clamp<int64_t>(task.position(query) + 1 - start, low, keys);
    float top = run.top[r];
    for (int64_t j = low; j < high; j++) top = std::max(top, row[j] *= task.shape.scale);
    for (int64_t j = 0; j < low; j++) row[j] = -INFINITY;
    for (int64_t j = high; j < KEYS; j++) row[j] = -INFINITY;
    if (low == high) {
      std::fill_n(row, KEYS, 0.0f);
      continue;
    }
    float kept = run.top[r] == -INFINITY ? 0.0f : std::exp(run.top[r] - top);
    vf total{};
    for (int64_t j = 0; j < KEYS; j += W) {
      vf weight = exponential(load(row + j) - top);
      store(row + j, weight);
      total += weight;
    }
    run.total[r] = run.total[r] * kept + sum(total);
    run.top[r] = top;
    if (kept != 1.0f)
      for (int64_t i = 0; i < d; i++) out[r * d + i] *= kept;
  }
}

// out[rows, D] += weights[rows, KEYS] values[keys, D], for few rows.
template <class T>
void add_values(const Task<T>& task, const float* weights, int64_t rows, int64_t start, int64_t keys, float* out) {
  int64_t d = task.shape.head_dim;
  for (int64_t j = 0; j < keys; j++) {
    const T* value = task.row(task.values, start + j);
    for (int64_t r = 0; r < rows; r++) {
      float weight = weights[r * KEYS + j];
      int64_t i = 0;
      for (; i + W <= d; i += W) store(out + r * d + i, load(out + r * d + i) + weight * load(value + i));
      for (; i < d; i++) out[r * d + i] += weight * number(value[i]);
    }
  }
}

// The same two products for many rows, by panels of a gathered block of keys or values.
void scores_by_panels(const float* q, int64_t rows, const float* keys, int64_t count, int64_t d, float* panel,
                      float* scores) {
  for (int64_t j = 0; j < count; j += PANEL) {
    pack(keys + j * d, d, std::min<int64_t>(PANEL, count - j), d, panel);
    panel_tokens(q, d, rows, panel, d, scores + j, KEYS);
  }
}

void add_values_by_panels(const float* weights, int64_t rows, const float* values, int64_t keys, int64_t d,
                          float* panel, float* out) {
  for (int64_t i = 0; i < d; i += PANEL) {
    for (int64_t j = 0; j < keys; j++) std::copy_n(values + j * d + i, PANEL, panel + j * PANEL);
    panel_tokens(weights, KEYS, rows, panel, keys, out + i, d, true);
  }
}

template <class T>
void attend(const Task<T>& task, const float* qkv, int64_t ld, float* attended) {
  int64_t d = task.shape.head_dim, group = task.group(), rows = task.count * group;
  bool panels = rows >= 8 && d % PANEL == 0;
  float* q = scratch((2 * QUERY_ROWS + 3 * KEYS) * d + QUERY_ROWS * KEYS + KEYS * PANEL);
  float *out = q + QUERY_ROWS * d, *block = out + QUERY_ROWS * d, *panel = block + KEYS * d;
  float* scores = panel + std::max<int64_t>(KEYS, d) * PANEL;
  Running run;
  int64_t token = task.batch.offsets[task.request] + task.first;
  for (int64_t r = 0; r < rows; r++) {
    const float* from = qkv + (token + r / group) * ld + (task.head * group + r % group) * d;
    std::copy_n(from, d, q + r * d);
    run.top[r] = -INFINITY, run.total[r] = 0;
  }
  std::fill_n(out, rows * d, 0.0f);
  int64_t stop = task.position(task.first + task.count - 1) + 1;
  for (int64_t start = task.lowest(task.first); start < stop; start += KEYS) {
    int64_t keys = std::min<int64_t>(KEYS, stop - start);
    if (panels) {
      gather(task, task.keys, start, keys, block);
      scores_by_panels(q, rows, block, keys, d, panel, scores);
      weigh(task, rows, start, keys, scores, run, out);
      gather(task, task.values, start, keys, block);
      add_values_by_panels(scores, rows, block, keys, d, panel, out);
    } else {
      scores_by_dots(task, q, rows, start, keys, scores);
      weigh(task, rows, start, keys, scores, run, out);
      add_values(task, scores, rows, start, keys, out);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    float* to = attended + (token + r / group) * task.shape.heads * d + (task.head * group + r % group) * d;
    for (int64_t i = 0; i < d; i++) to[i] = out[r * d + i] / run.total[r];
  }
}

// ---- The two halves of a layer ---------------------------------------------------------------------------------

template <class T>
void prepare_heads(const LcShape& s, const LcLayer& l, const LcBatch& b, float* qkv, int64_t ld, T* keys, T* values) {
  int64_t d = s.head_dim;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < b.tokens; t++) {
    float* row = qkv + t * ld;
    for (int64_t h = 0; h < s.heads + s.kv_heads; h++) {
      const T* weight = static_cast<const T*>(h < s.heads ? l.query_norm : l.key_norm);
      if (weight) norm(row + h * d, weight, d, s.eps, row + h * d);
      rotate(row + h * d, d, b.cos + t * (d / 2), b.sin + t * (d / 2));
    }
    int64_t width = s.kv_heads * d;
    put_row(keys + b.slots[t] * width, row + s.heads * d, width);
    put_row(values + b.slots[t] * width, row + s.heads * d + width, width);
  }
}

template <class T>
void attend_all(const LcShape& s, const LcLayer& l, const LcBatch& b, const float* qkv, int64_t ld, const T* keys,
                const T* values, float* attended) {
  int64_t block = std::max<int64_t>(1, QUERY_ROWS / (s.heads / s.kv_heads));
  int64_t longest = 0;
  for (int64_t r = 0; r < b.requests; r++) longest = std::max<int64_t>(longest, b.offsets[r + 1] - b.offsets[r]);
  int64_t blocks = (longest + block - 1) / block;
#pragma omp for schedule(dynamic, 1) collapse(3)
  for (int64_t i = 0; i < blocks; i++)
    for (int64_t r = 0; r < b.requests; r++)
      for (int64_t h = 0; h < s.kv_heads; h++) {
        int64_t first = i * block, count = std::min<int64_t>(block, b.offsets[r + 1] - b.offsets[r] - first);
        if (count > 0) attend(Task<T>{s, b, keys, values, r, h, first, count, l.window}, qkv, ld, attended);
      }
}

template <class T>
void normed(const LcShape& s, int64_t tokens, const T* x, const void* weight, float* y) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < tokens; t++)
    norm(x + t * s.hidden, static_cast<const T*>(weight), s.hidden, s.eps, y + t * s.hidden);
}

template <class T>
void add_to(const LcShape& s, int64_t tokens, const T* x, const float* delta, T* y) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    int64_t i = t * s.hidden, end = i + s.hidden;
    for (; i + W <= end; i += W) store(y + i, load(x + i) + load(delta + i));
    for (; i < end; i++) put(y + i, number(x[i]) + delta[i]);
  }
}

void silu_mul(int64_t tokens, int64_t n, float* gate_up) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    float *gate = gate_up + t * 2 * n, *up = gate + n;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      vf g = load(gate + i);
      vf capped = (vf)(((vi)g & (vi)(g > -87.0f)) | ((vi)splat(-87.0f) & (vi)(g <= -87.0f)));
      store(gate + i, g / (1.0f + exponential(-capped)) * load(up + i));
    }
    for (; i < n; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  }
}

template <class T>
void attention_half(const LcShape& s, const LcLayer& l, const LcBatch& b, const T* x, T* y, T* keys, T* values,
                    float* work) {
  int64_t ld = (s.heads + 2 * s.kv_heads) * s.head_dim, width = s.heads * s.head_dim;
  float *a = work, *qkv = a + b.tokens * std::max(s.hidden, width), *delta = qkv + b.tokens * ld;
#pragma omp parallel
  {
    normed(s, b.tokens, x, l.input_norm, a);
    project<T>(a, b.tokens, s.hidden, l.qkv, 3, qkv, ld);
    prepare_heads(s, l, b, qkv, ld, keys, values);
    attend_all(s, l, b, qkv, ld, keys, values, a);
    project<T>(a, b.tokens, width, &l.output, 1, delta, s.hidden);
    add_to(s, b.tokens, x, delta, y);
  }
}

template <class T>
void mlp_half(const LcShape& s, const LcLayer& l, int64_t tokens, const T* x, T* y, float* work) {
  float *a = work, *inner = a + tokens * s.hidden, *delta = inner + 2 * tokens * s.inner;
  float* dense = delta + tokens * s.hidden;
#pragma omp parallel
  {
    normed(s, tokens, x, l.post_norm, a);
    project<T>(a, tokens, s.hidden, l.gate_up, 2, inner, 2 * s.inner);
    silu_mul(tokens, s.inner, inner);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) std::copy_n(inner + t * 2 * s.inner, s.inner, dense + t * s.inner);
    project<T>(dense, tokens, s.inner, &l.down, 1, delta, s.hidden);
    add_to(s, tokens, x, delta, y);
  }
}

template <class T>
void head(int64_t tokens, int64_t hidden, float eps, const T* x, const T* weight, const T* matrix, int64_t rows,
          float* y, float* work) {
  Matrix part{matrix, nullptr, rows};
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) norm(x + t * hidden, weight, hidden, eps, work + t * hidden);
    project<T>(work, tokens, hidden, &part, 1, y, rows);
  }
}

}  // namespace

extern "C" {

// Floats of `work` that the calls below need for that many tokens.
int64_t lc_work(const LcShape* s, int64_t tokens) {
  int64_t width = s->heads * s->head_dim;
  int64_t attention = std::max(s->hidden, width) + (s->heads + 2 * s->kv_heads) * s->head_dim + s->hidden;
  int64_t mlp = 2 * s->hidden + 3 * s->inner;
  return tokens * std::max(attention, mlp);
}

// hidden + attention(norm(hidden)); stores K and V. `keys`, `values`: this layer's [slots, G, D].
void lc_attention(const LcShape* s, const LcLayer* l, const LcBatch* b, const void* x, void* y, void* keys,
                  void* values, float* work) {
  if (s->bfloat16)
    attention_half(*s, *l, *b, (const bf16*)x, (bf16*)y, (bf16*)keys, (bf16*)values, work);
  else
    attention_half(*s, *l, *b, (const float*)x, (float*)y, (float*)keys, (float*)values, work);
}

// hidden + mlp(norm(hidden)).
void lc_mlp(const LcShape* s, const LcLayer* l, int64_t tokens, const void* x, void* y, float* work) {
  if (s->bfloat16)
    mlp_half(*s, *l, tokens, (const bf16*)x, (bf16*)y, work);
  else
    mlp_half(*s, *l, tokens, (const float*)x, (float*)y, work);
}

// Logits [T, rows] of normed hidden states.
void lc_head(const LcShape* s, int64_t tokens, const void* x, const void* weight, const void* matrix, int64_t rows,
             float* y, float* work) {
  if (s->bfloat16)
    head(tokens, s->hidden, s->eps, (const bf16*)x, (const bf16*)weight, (const bf16*)matrix, rows, y, work);
  else
    head(tokens, s->hidden, s->eps, (const float*)x, (const float*)weight, (const float*)matrix, rows, y, work);
}

}  // extern "C"
