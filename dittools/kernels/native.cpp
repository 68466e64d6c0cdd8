// Block-sparse attention on the CPU: one file, plain C ABI, OpenMP, no torch or Python headers.
//
// One task is one (batch, head, query block). Keys are transposed once per call into panels, values
// are read in place where their layout allows. A task walks its list in groups of whole blocks: the
// scores of a group stay in the L2 cache, get cut (bit tiles, key bias, ragged tail), go through one
// max / exp2 / sum pass with one rescale of the output, and multiply the values.
// Compiled once per instruction set; with AMX, bf16 calls use tiles, all other calls the fp32 core.
// Scores are kept raw (query times key); scale * log2(e) enters in the exp2 as one fused step.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define WITH_AMX 1
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, VECS = 4, ROWS = 6;
#elif defined(__AVX2__)
constexpr int LANES = 8, VECS = 2, ROWS = 6;
#else
constexpr int LANES = 4, VECS = 2, ROWS = 6;
#endif
constexpr int SUB = LANES * VECS;   // keys of one score tile, head dims of one output tile
constexpr int CHUNK = 48;           // query rows that share one pass over a group, fp32 core
constexpr int AMX_CHUNK = 32;       // the same for AMX: two tiles of 16 rows
constexpr int GROUP = 512;          // keys per softmax pass; their scores fit the L2 cache
constexpr int AMX_GROUP = 1024;     // fewer rows share a pass, so more keys fit
constexpr int MAX_BLOCK = 512;      // keys of one block; native.py refuses larger ones
constexpr int MAX_STRIPS = (AMX_GROUP > MAX_BLOCK ? AMX_GROUP : MAX_BLOCK) / 32;
constexpr int KEY_STEP = 128;       // keys per pass over values: 128 x 64 floats fit the L1 cache
constexpr int64_t WAVE_BYTES = int64_t(64) << 20;  // panels held at a time, one head at least
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vfu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

extern "C" {
// Strides count elements, last dimension contiguous; native.py declares the same fields.
struct DittoolsCall {
  int64_t abi;  // sizeof(DittoolsCall)
  const void *query, *key, *value;
  void *out;
  float *lse;          // [B, H, S] by lse_stride, or null
  const float *bias;   // per key slot before ordering, natural-log units, or null
  const int32_t *indptr, *full_end, *block, *tile;
  const uint8_t *tiles;
  const int64_t *order;  // [order heads, order_slots] token of each slot, -1 for padding, or null
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3], lse_stride[3];  // b, h, s
  int64_t bias_stride[2], order_stride;  // 0 where shared
  int64_t batch, heads, mask_heads, q_len, k_len, dim;  // lengths in tokens
  int64_t order_slots, order_tokens;
  int64_t q_block, kv_block, q_blocks, kv_blocks;
  int32_t dtype, threads, use_amx, has_tiles;
  float scale;
};
}

namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- small vector helpers -------------------------------------------------------------------

inline vf splat(float x) { return x - vf{}; }  // "vf{} + x" would cost a real addition
inline vf load(const float *p) { return *reinterpret_cast<const vfu *>(p); }
inline void store(float *p, vf x) { *reinterpret_cast<vfu *>(p) = x; }
inline vf pick(vi cond, vf a, vf b) { return cond ? a : b; }

// 2^t for t <= 0 up to rounding; NaN stays NaN, -inf gives exactly 0.
// Relative minimax fits of 2^f on [0, 1): degree 5 errs 7.5e-8, degree 4 errs 2.6e-6.
template <int DEGREE>
inline vf poly2(vf f) {
  if constexpr (DEGREE == 5) {
    vf p = splat(0.001877576658607653f);
    p = p * f + 0.00898934013064897f;
    p = p * f + 0.05582631801958191f;
    p = p * f + 0.24015361705577165f;
    p = p * f + 0.693153073198849f;
    return p * f + 0.9999999250635496f;
  } else {
    vf p = splat(0.013534167748429388f);
    p = p * f + 0.0520114609325532f;
    p = p * f + 0.24144275670109727f;
    p = p * f + 0.6930038345049994f;
    return p * f + 1.0000025933697358f;
  }
}

template <int DEGREE>
inline vf exp2v(vf t) {
#if defined(__AVX512DQ__)
  vf f = (vf)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t); 0 for -inf
  return (vf)_mm512_scalef_ps((__m512)poly2<DEGREE>(f), (__m512)t);
#else
  vf clamped = pick(t < -126.0f, splat(-126.0f), t);
  vi n = __builtin_convertvector(clamped, vi);
  vf f = clamped - __builtin_convertvector(n, vf);
  vi below = f < 0.0f;  // truncation went up: -1 where it did
  n += below;
  f -= __builtin_convertvector(below, vf);
  vf power = (vf)((n + 127) << 23);
  return pick(t < -126.0f, vf{}, poly2<DEGREE>(f) * power);
#endif
}

inline float exp2s(float t) { return t == 0.0f ? 1.0f : exp2v<5>(splat(t))[0]; }

inline float max_of(vf x) {
  float best = x[0];
  for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
  return best;
}

inline float sum_of(vf x) {
  float parts[LANES];
  memcpy(parts, &x, sizeof parts);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// ---- conversions ----------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t to_bf16(float x) {  // round to nearest even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  const float tiny = float(rest) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
#endif
}

inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000u) {  // subnormal: scale by 2^24, round by the addition of 1.5 * 2^23
    const float shifted = from_bits(bits) * 16777216.0f + 12582912.0f;
    uint32_t out;
    memcpy(&out, &shifted, 4);
    return uint16_t(sign | (out & 0x7ff));
  }
  const uint32_t rounded = bits - (112u << 23) + 0xfff + ((bits >> 13) & 1);
  return uint16_t(sign | (rounded >> 13));
#endif
}

void row_to_float(const void *base, int64_t offset, int64_t n, int32_t dtype, float *to) {
  if (dtype == F32) {
    memcpy(to, static_cast<const float *>(base) + offset, size_t(n) * 4);
    return;
  }
  const uint16_t *from = static_cast<const uint16_t *>(base) + offset;
  if (dtype == BF16)
    for (int64_t i = 0; i < n; i++) to[i] = from_bits(uint32_t(from[i]) << 16);
  else
    for (int64_t i = 0; i < n; i++) to[i] = half_to_float(from[i]);
}

void row_from_float(const float *from, int64_t n, int32_t dtype, void *base, int64_t offset) {
  if (dtype == F32) {
    memcpy(static_cast<float *>(base) + offset, from, size_t(n) * 4);
    return;
  }
  uint16_t *to = static_cast<uint16_t *>(base) + offset;
  if (dtype == BF16)
    for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
  else
    for (int64_t i = 0; i < n; i++) to[i] = float_to_half(from[i]);
}

// ---- transposing LANES x LANES words in registers --------------------------------------------

template <int H, int... I>
inline void swap_halves(vf &a, vf &b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const vf low = __builtin_shufflevector(a, b, ((I & H) == 0 ? I : LANES + I - H)...);
  const vf high = __builtin_shufflevector(a, b, ((I & H) == 0 ? I + H : LANES + I)...);
#else
  const vf low = __builtin_shuffle(a, b, vi{((I & H) == 0 ? I : LANES + I - H)...});
  const vf high = __builtin_shuffle(a, b, vi{((I & H) == 0 ? I + H : LANES + I)...});
#endif
  a = low;
  b = high;
}

template <int H>
inline void transpose_stage(vf *rows) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if ((i & H) == 0)
        swap_halves<H>(rows[i], rows[i + H], std::make_integer_sequence<int, LANES>{});
    transpose_stage<H / 2>(rows);
  }
}

// from: LANES row pointers; to[c * stride + r] = from[r][c] for LANES columns
inline void transpose(const float *const *from, int64_t column, float *to, int64_t stride) {
  vf rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) rows[i] = load(from[i] + column);
  transpose_stage<LANES / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(to + i * stride, rows[i]);
}

// ---- memory ---------------------------------------------------------------------------------

struct Buffer {  // grows, is kept between calls, 64-byte aligned
  char *data = nullptr;
  size_t size = 0;
  char *reserve(size_t bytes) {
    if (bytes > size) {
      release();
      data = static_cast<char *>(std::aligned_alloc(64, size_t(round_up(int64_t(bytes), 64))));
      if (!data) throw std::bad_alloc();
      size = bytes;
    }
    return data;
  }
  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
  ~Buffer() { release(); }
};

thread_local Buffer wave_buffer, task_buffer;

struct FlushDenormals {  // weights that small are nothing, and they cost a trap each
#if defined(__x86_64__)
  const unsigned control = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(control | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(control); }
#else
  FlushDenormals() {}
#endif
};

// ---- the plan of one call -------------------------------------------------------------------

constexpr uint8_t HAS_BIAS = 1, BAD_VALUE = 2;

struct Plan {
  const DittoolsCall &c;
  bool amx, in_place;
  int64_t q_slots, k_slots;       // lengths in slot space
  int64_t width;                  // columns of one key block in the score buffer
  int64_t k_dim, v_dim;           // padded head dims of the key panels and of the values
  int64_t key_bytes, value_bytes; // of one block
  int64_t head_bytes, wave_heads;
  float sign, c_log2;             // factor on the query; factor on the scores inside exp2
  bool with_bias;
  int64_t group_blocks;

  explicit Plan(const DittoolsCall &call) : c(call) {
#if defined(WITH_AMX)
    amx = c.use_amx && c.dtype == BF16;
#else
    amx = false;
#endif
    const int64_t extra = c.k_len - c.order_tokens;
    q_slots = c.order ? c.order_slots : c.q_len;
    k_slots = c.order ? c.order_slots + extra : c.k_len;
    width = round_up(c.kv_block, amx ? 32 : LANES);
    k_dim = amx ? round_up(c.dim, 32) : c.dim;
    v_dim = round_up(c.dim, amx ? 16 : LANES);
    with_bias = c.bias || (c.order && c.order_slots > c.order_tokens);
    in_place = !amx && c.dtype == F32 && !c.order && !with_bias && c.dim % LANES == 0;
    const int64_t word = amx ? 2 : 4;
    key_bytes = round_up(width * k_dim * word, 64);
    value_bytes = in_place ? 0 : round_up((amx ? width : c.kv_block) * v_dim * word, 64);
    const int64_t bias_bytes = with_bias ? width * 4 : 0;
    head_bytes = round_up(c.kv_blocks * (key_bytes + value_bytes + bias_bytes + 1), 64);
    wave_heads = std::max<int64_t>(1, std::min(c.batch * c.heads, WAVE_BYTES / head_bytes));
    sign = c.scale > 0 ? 1.0f : (c.scale < 0 ? -1.0f : 0.0f);
    c_log2 = (c.scale == 0 ? 1.0f : std::fabs(c.scale)) * LOG2E;
    group_blocks = std::max<int64_t>(1, (amx ? AMX_GROUP : GROUP) / width);
  }
  char *key_panel(char *head, int64_t block) const { return head + block * key_bytes; }
  char *value_panel(char *head, int64_t block) const {
    return head + c.kv_blocks * key_bytes + block * value_bytes;
  }
  float *bias_line(char *head, int64_t block) const {
    return reinterpret_cast<float *>(head + c.kv_blocks * (key_bytes + value_bytes)) +
           block * width;
  }
  uint8_t *flags(char *head) const {
    return reinterpret_cast<uint8_t *>(head + c.kv_blocks * (key_bytes + value_bytes +
                                                             (with_bias ? width * 4 : 0)));
  }
  int64_t real_keys(int64_t block) const {
    return std::min(c.kv_block, k_slots - block * c.kv_block);
  }
  int64_t q_token(int64_t head, int64_t slot) const {
    return c.order ? c.order[head * c.order_stride + slot] : slot;
  }
  int64_t k_token(int64_t head, int64_t slot) const {
    if (!c.order) return slot;
    if (slot >= c.order_slots) return slot - c.order_slots + c.order_tokens;
    return c.order[head * c.order_stride + slot];
  }
};

// ---- packing keys and values ----------------------------------------------------------------

template <typename T>
bool all_finite(const T *row, int64_t n);

template <>
bool all_finite<float>(const float *row, int64_t n) {
  uint32_t bad = 0;
  const uint32_t *bits = reinterpret_cast<const uint32_t *>(row);
  for (int64_t i = 0; i < n; i++) bad |= uint32_t((bits[i] & 0x7f800000u) == 0x7f800000u);
  return !bad;
}

template <>
[[maybe_unused]] bool all_finite<uint16_t>(const uint16_t *row, int64_t n) {
  uint16_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= uint16_t((row[i] & 0x7f80u) == 0x7f80u);
  return !bad;
}

// Token of every key slot of a block, -1 where nothing stands or the bias drops it.
uint8_t block_tokens(const Plan &p, char *head_data, int64_t b, int64_t h, int64_t block,
                     int64_t *token) {
  const auto &c = p.c;
  const int64_t first = block * c.kv_block, real = p.real_keys(block);
  uint8_t flag = 0;
  float *line = p.with_bias ? p.bias_line(head_data, block) : nullptr;
  for (int64_t j = 0; j < p.width; j++) {
    token[j] = j < real ? p.k_token(h, first + j) : -1;
    if (!line) continue;
    float bias = token[j] < 0 ? NEG_INF : 0.0f;
    if (c.bias && token[j] >= 0)
      bias = c.bias[b * c.bias_stride[0] + h * c.bias_stride[1] + token[j]] * (LOG2E / p.c_log2);
    line[j] = bias;
    if (bias == NEG_INF) token[j] = -1;
    if (!(bias == 0.0f) && j < real) flag = HAS_BIAS;
  }
  return flag;
}

uint8_t pack_floats(const Plan &p, char *head_data, int64_t b, int64_t h, int64_t block,
                    const int64_t *token, float *scratch) {
  const auto &c = p.c;
  float *panel = reinterpret_cast<float *>(p.key_panel(head_data, block));
  const int64_t padded = round_up(c.dim, LANES);
  const int64_t k_base = b * c.key_stride[0] + h * c.key_stride[1];
  for (int64_t j0 = 0; j0 < p.width; j0 += LANES) {
    const float *rows[LANES];
    for (int i = 0; i < LANES; i++) {
      const int64_t t = token[j0 + i];
      float *own = scratch + i * padded;
      rows[i] = own;
      if (t < 0)
        memset(own, 0, size_t(padded) * 4);
      else if (c.dtype == F32)
        rows[i] = static_cast<const float *>(c.key) + k_base + t * c.key_stride[2];
      else
        row_to_float(c.key, k_base + t * c.key_stride[2], c.dim, c.dtype, own);
    }
    const int64_t s0 = j0 / SUB * SUB, w = std::min<int64_t>(SUB, p.width - s0);
    float *to = panel + s0 * c.dim + (j0 - s0);
    int64_t d = 0;
    for (; d + LANES <= c.dim; d += LANES) transpose(rows, d, to + d * w, w);
    for (; d < c.dim; d++)
      for (int i = 0; i < LANES; i++) to[d * w + i] = rows[i][d];
  }
  uint8_t flag = 0;
  const int64_t v_base = b * c.value_stride[0] + h * c.value_stride[1];
  float *values = reinterpret_cast<float *>(p.value_panel(head_data, block));
  for (int64_t j = 0; j < p.real_keys(block); j++) {
    const float *row = static_cast<const float *>(c.value) + v_base + token[j] * c.value_stride[2];
    if (!p.in_place) {
      float *to = values + j * p.v_dim;
      if (token[j] < 0) {
        memset(to, 0, size_t(p.v_dim) * 4);
      } else {
        row_to_float(c.value, v_base + token[j] * c.value_stride[2], c.dim, c.dtype, to);
        for (int64_t d = c.dim; d < p.v_dim; d++) to[d] = 0.0f;
      }
      row = to;
    }
    if (c.has_tiles && !all_finite(row, c.dim)) flag |= BAD_VALUE;
  }
  return flag;
}

#if defined(WITH_AMX)
// Keys as [16 keys][D / 2 pairs][16] words, values as [32 keys][16 dims] tiles of key pairs.
uint8_t pack_bf16(const Plan &p, char *head_data, int64_t b, int64_t h, int64_t block,
                  const int64_t *token, float *scratch) {
  const auto &c = p.c;
  const uint16_t *key = static_cast<const uint16_t *>(c.key);
  const uint16_t *value = static_cast<const uint16_t *>(c.value);
  float *panel = reinterpret_cast<float *>(p.key_panel(head_data, block));
  const int64_t pairs = p.k_dim / 2, k_base = b * c.key_stride[0] + h * c.key_stride[1];
  const int64_t v_base = b * c.value_stride[0] + h * c.value_stride[1];
  for (int64_t j0 = 0; j0 < p.width; j0 += 16) {
    const float *rows[16];
    for (int i = 0; i < 16; i++) {
      const int64_t t = token[j0 + i];
      float *own = scratch + i * pairs;
      const uint16_t *from = key + k_base + t * c.key_stride[2];
      rows[i] = own;
      if (t >= 0 && c.dim == p.k_dim) {
        rows[i] = reinterpret_cast<const float *>(from);
        continue;
      }
      memset(own, 0, size_t(p.k_dim) * 2);
      if (t >= 0) memcpy(own, from, size_t(c.dim) * 2);
    }
    for (int64_t d = 0; d < pairs; d += 16)
      transpose(rows, d, panel + j0 * pairs + d * 16, 16);
  }
  uint8_t flag = 0;
  uint16_t *values = reinterpret_cast<uint16_t *>(p.value_panel(head_data, block));
  uint16_t *own = reinterpret_cast<uint16_t *>(scratch);
  for (int64_t j = 0; j < p.width; j += 2) {
    const uint16_t *rows[2];
    for (int i = 0; i < 2; i++) {
      const int64_t t = token[j + i];
      const uint16_t *from = value + v_base + t * c.value_stride[2];
      if (t >= 0 && c.has_tiles && !all_finite(from, c.dim)) flag |= BAD_VALUE;
      rows[i] = own + i * p.v_dim;
      if (t >= 0 && c.dim == p.v_dim) {
        rows[i] = from;
        continue;
      }
      memset(own + i * p.v_dim, 0, size_t(p.v_dim) * 2);
      if (t >= 0) memcpy(own + i * p.v_dim, from, size_t(c.dim) * 2);
    }
    uint16_t *to = values + j / 32 * 32 * p.v_dim + (j % 32) / 2 * 32;
    for (int64_t d = 0; d < p.v_dim; d += 16) {
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows[0] + d)));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows[1] + d)));
      _mm512_store_si512(to + d * 32, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
  return flag;
}
#endif

void pack_block(const Plan &p, char *head_data, int64_t bh, int64_t block) {
  const int64_t b = bh / p.c.heads, h = bh % p.c.heads;
  const size_t row_bytes = size_t(round_up(std::max(p.k_dim, p.v_dim) * 4, 64));
  char *space = task_buffer.reserve(size_t(p.width) * 8 + 64 + row_bytes * 16);
  int64_t *token = reinterpret_cast<int64_t *>(space);
  float *scratch = reinterpret_cast<float *>(space + round_up(p.width * 8, 64));
  uint8_t flag = block_tokens(p, head_data, b, h, block, token);
#if defined(WITH_AMX)
  flag |= p.amx ? pack_bf16(p, head_data, b, h, block, token, scratch)
                : pack_floats(p, head_data, b, h, block, token, scratch);
#else
  flag |= pack_floats(p, head_data, b, h, block, token, scratch);
#endif
  p.flags(head_data)[block] = flag;
}

// ---- one group of kept blocks ---------------------------------------------------------------

struct Entry {
  const char *key, *value;    // panel of keys; values, packed or in place
  int64_t value_stride;       // floats from key to key, fp32 core only
  int64_t real;               // keys that exist
  int64_t column;             // first column in the score buffer
  const float *bias;          // raw-score units, or null
  const uint8_t *bits;        // bit tile of the whole query block, or null
  const char *bad;            // the original values when `value` is a copy without its NaN and inf
};

struct Task {                 // memory of one thread
  float *query, *scores, *out, *top, *sum;  // top: running maximum times c_log2
  uint16_t *weights;          // bf16 probabilities, AMX only
  char *clean;                // values without NaN and inf, one block
  int64_t score_stride, weight_stride;
};

inline unsigned lane_bits(const uint8_t *row, int64_t bytes, int64_t column) {
  const int64_t at = column / 8;
  if constexpr (LANES == 16)
    return unsigned(at < bytes ? row[at] : 0) | unsigned(at + 1 < bytes ? row[at + 1] << 8 : 0);
  if constexpr (LANES == 8) return at < bytes ? row[at] : 0u;
  return at < bytes ? (row[at] >> (column % 8)) & 15u : 0u;
}

// Whether some of the rows keep some of the keys; what nobody keeps is not computed at all.
inline bool any_kept(const Plan &p, const Entry &e, int64_t row0, int64_t rows, int64_t key0,
                     int64_t keys) {
  if (!e.bits) return true;
  const int64_t bytes = (p.c.kv_block + 7) / 8, end = std::min(bytes, (key0 + keys + 7) / 8);
  const uint8_t *from = e.bits + row0 * bytes + key0 / 8;
  uint32_t any = 0;
  if (end - key0 / 8 == 4) {
    for (int64_t r = 0; r < rows; r++) {
      uint32_t word;
      memcpy(&word, from + r * bytes, 4);
      any |= word;
    }
    return any != 0;
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < end - key0 / 8; i++) any |= from[r * bytes + i];
  return any != 0;
}

// Drop what the bit tile, the key bias and the ragged tail exclude from `keys` keys of an entry,
// whose scores start at `column`; row0 counts in the query block.
void cut_scores(const Plan &p, const Task &t, const Entry &e, int64_t row0, int64_t rows,
                int64_t key0, int64_t keys, int64_t column) {
  vi lane;
  for (int i = 0; i < LANES; i++) lane[i] = 1 << i;
  const int64_t bytes = (p.c.kv_block + 7) / 8;
  for (int64_t r = 0; r < rows; r++) {
    float *line = t.scores + r * t.score_stride + column;
    if (e.bias)
      for (int64_t j = 0; j < keys; j += LANES) {
        const vf add = load(e.bias + key0 + j);
        store(line + j, pick(add == NEG_INF, splat(NEG_INF), load(line + j) + add));
      }
    if (e.bits) {
      const uint8_t *bits = e.bits + (row0 + r) * bytes;
      for (int64_t j = 0; j < keys; j += LANES) {
        const vi keep = (vi{} + int32_t(lane_bits(bits, bytes, key0 + j))) & lane;
        store(line + j, pick(keep != 0, load(line + j), splat(NEG_INF)));
      }
    }
    for (int64_t j = std::max<int64_t>(0, e.real - key0); j < keys; j++) line[j] = NEG_INF;
  }
}

void multiply_row(float *row, int64_t n, float factor) {
  for (int64_t d = 0; d < n; d += LANES) store(row + d, load(row + d) * factor);
}

// Turn one row of scores into weights, update its running maximum and sum, rescale its output.
// to16: weights go there as bf16; otherwise they replace the scores.
void softmax_row(const Plan &p, const Task &t, float *line,
                 [[maybe_unused]] uint16_t *to16, int64_t columns, int64_t row) {
  vf best[4] = {splat(NEG_INF), splat(NEG_INF), splat(NEG_INF), splat(NEG_INF)};
  int64_t j = 0;
  for (; j + 4 * LANES <= columns; j += 4 * LANES)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      const vf s = load(line + j + u * LANES);
      best[u] = pick(s > best[u], s, best[u]);  // a NaN score leaves the maximum alone
    }
  for (; j < columns; j += LANES) {
    const vf s = load(line + j);
    best[0] = pick(s > best[0], s, best[0]);
  }
  best[0] = pick(best[1] > best[0], best[1], best[0]);
  best[2] = pick(best[3] > best[2], best[3], best[2]);
  const float old_top = t.top[row];
  float top = max_of(pick(best[2] > best[0], best[2], best[0])) * p.c_log2;
  top = top > old_top ? top : old_top;
  if (top > old_top && old_top != NEG_INF) {
    const float alpha = exp2s(old_top - top);
    t.sum[row] *= alpha;
    multiply_row(t.out + row * p.v_dim, p.v_dim, alpha);
  }
  t.top[row] = top;
  const vf shift = splat(top == NEG_INF ? 0.0f : top), c = splat(p.c_log2);
  vf sums[2] = {vf{}, vf{}};
#if defined(WITH_AMX)
  if (to16) {  // columns are a multiple of 32 here
#pragma GCC unroll 2
    for (j = 0; j < columns; j += 32) {
      const vf low = exp2v<4>(load(line + j) * c - shift);
      const vf high = exp2v<4>(load(line + j + 16) * c - shift);
      sums[0] += low;
      sums[1] += high;
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      memcpy(to16 + j, &both, 64);
    }
    t.sum[row] += sum_of(sums[0] + sums[1]);
    return;
  }
#endif
  for (j = 0; j + 2 * LANES <= columns; j += 2 * LANES)
#pragma GCC unroll 2
    for (int u = 0; u < 2; u++) {
      const vf w = exp2v<5>(load(line + j + u * LANES) * c - shift);
      store(line + j + u * LANES, w);
      sums[u] += w;
    }
  for (; j < columns; j += LANES) {
    const vf w = exp2v<5>(load(line + j) * c - shift);
    store(line + j, w);
    sums[0] += w;
  }
  t.sum[row] += sum_of(sums[0] + sums[1]);
}

// ---- fp32 core ------------------------------------------------------------------------------

template <int R, int V>
void score_tile(const float *q, int64_t q_stride, const float *k, int64_t dim, float *s,
                int64_t s_stride) {
  vf acc[R][V] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < dim; d++) {
    vf keys[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) keys[v] = load(k + d * (V * LANES) + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const vf x = splat(q[r * q_stride + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] += x * keys[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(s + r * s_stride + v * LANES, acc[r][v]);
}

template <int R, int V>
void output_tile(const float *w, int64_t w_stride, const float *value, int64_t v_stride,
                 int64_t keys, float *o, int64_t o_stride) {
  vf acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = load(o + r * o_stride + v * LANES);
#pragma GCC unroll 2
  for (int64_t j = 0; j < keys; j++) {
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) x[v] = load(value + j * v_stride + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const vf p = splat(w[r * w_stride + j]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] += p * x[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(o + r * o_stride + v * LANES, acc[r][v]);
}

// Tables over [rows - 1][vectors - 1], so that a ragged edge runs the same code as the middle.
using TileFn = void (*)(const float *, int64_t, const float *, int64_t, float *, int64_t);
using OutFn = void (*)(const float *, int64_t, const float *, int64_t, int64_t, float *, int64_t);

template <int... I>
TileFn score_fn(int rows, int vecs, std::integer_sequence<int, I...>) {
  static const TileFn table[] = {score_tile<I / VECS + 1, I % VECS + 1>...};
  return table[(rows - 1) * VECS + vecs - 1];
}

template <int... I>
OutFn output_fn(int rows, int vecs, std::integer_sequence<int, I...>) {
  static const OutFn table[] = {output_tile<I / VECS + 1, I % VECS + 1>...};
  return table[(rows - 1) * VECS + vecs - 1];
}

using Tiles = std::make_integer_sequence<int, ROWS * VECS>;

void group_floats(const Plan &p, const Task &t, const std::vector<Entry> &entries, int64_t row0,
                  int64_t rows) {
  const int64_t dim = p.c.dim, columns = int64_t(entries.size()) * p.width;
  for (const Entry &e : entries) {
    const float *panel = reinterpret_cast<const float *>(e.key);
    for (int64_t s0 = 0; s0 < p.width; s0 += SUB) {
      const int vecs = int(std::min<int64_t>(SUB, p.width - s0) / LANES);
      for (int64_t r = 0; r < rows; r += ROWS) {
        const int64_t n = std::min<int64_t>(ROWS, rows - r);
        if (any_kept(p, e, row0 + r, n, s0, SUB))  // else cut_scores overwrites what stands there
          score_fn(int(n), vecs, Tiles{})(t.query + (row0 + r) * dim, dim, panel + s0 * dim, dim,
                                          t.scores + r * t.score_stride + e.column + s0,
                                          t.score_stride);
      }
    }
    if (e.bias || e.bits || e.real < p.width)
      cut_scores(p, t, e, row0, rows, 0, p.width, e.column);
  }
  for (int64_t r = 0; r < rows; r++)
    softmax_row(p, t, t.scores + r * t.score_stride, nullptr, columns, row0 + r);
  for (const Entry &e : entries) {
    const int64_t step = e.bits ? KEY_STEP / 4 : KEY_STEP;
    for (int64_t j = 0; j < e.real; j += step)
      for (int64_t d = 0; d < p.v_dim; d += SUB) {
        const int vecs = int(std::min<int64_t>(SUB, p.v_dim - d) / LANES);
        const float *value = reinterpret_cast<const float *>(e.value) + j * e.value_stride + d;
        for (int64_t r = 0; r < rows; r += ROWS) {
          const int64_t n = std::min<int64_t>(ROWS, rows - r);
          if (any_kept(p, e, row0 + r, n, j, step))
            output_fn(int(n), vecs, Tiles{})(
                t.scores + r * t.score_stride + e.column + j, t.score_stride, value,
                e.value_stride, std::min(step, e.real - j), t.out + (row0 + r) * p.v_dim + d,
                p.v_dim);
        }
      }
  }
}

// ---- AMX core -------------------------------------------------------------------------------

#if defined(WITH_AMX)
#define FENCE asm volatile("" ::: "memory")  // the tile intrinsics do not tell they touch memory

struct TileConfig {
  TileConfig(const TileConfig &) = delete;
  TileConfig() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = 64;  // bytes per row
      config[48 + i] = 16;      // rows
    }
    FENCE;
    _tile_loadconfig(config);
  }
  ~TileConfig() { _tile_release(); }
};

// 32 keys of an entry that some of the rows at hand keep; the others get no column at all.
struct Strip {
  const Entry *entry;
  int64_t key0;
};

// Scores of RT * 16 rows against 32 keys.
template <int RT>
void score_tiles_amx(const Plan &p, const uint16_t *q, const Strip &strip, float *s,
                     int64_t s_stride) {
  const int64_t k_dim = p.k_dim, q_bytes = k_dim * 2, tile_bytes = 16 * q_bytes;  // of 16 keys
  const char *keys = strip.entry->key + strip.key0 / 16 * tile_bytes;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (RT == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < k_dim; d += 32) {
    _tile_loadd(4, q + d, q_bytes);
    _tile_loadd(6, keys + d * 32, 64);
    _tile_loadd(7, keys + tile_bytes + d * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (RT == 2) {
      _tile_loadd(5, q + 16 * k_dim + d, q_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, s, s_stride * 4);
  _tile_stored(1, s + 16, s_stride * 4);
  if constexpr (RT == 2) {
    _tile_stored(2, s + 16 * s_stride, s_stride * 4);
    _tile_stored(3, s + 16 * s_stride + 16, s_stride * 4);
  }
}

// Adds RT * 16 rows of weights times DT * 16 head dims of the values of all strips.
template <int RT, int DT>
void output_tiles_amx(const Plan &p, const Task &t, const Strip *strips, int64_t count, float *o,
                      int64_t d) {
  const int64_t o_bytes = p.v_dim * 4, w_bytes = t.weight_stride * 2;
  _tile_loadd(0, o + d, o_bytes);
  if constexpr (DT == 2) _tile_loadd(1, o + d + 16, o_bytes);
  if constexpr (RT == 2) _tile_loadd(2, o + 16 * p.v_dim + d, o_bytes);
  if constexpr (RT == 2 && DT == 2) _tile_loadd(3, o + 16 * p.v_dim + d + 16, o_bytes);
  for (int64_t i = 0; i < count; i++) {
    const uint16_t *weights = t.weights + i * 32;
    const char *value = strips[i].entry->value + (strips[i].key0 * p.v_dim + d * 32) * 2;
    _tile_loadd(4, weights, w_bytes);
    _tile_loadd(6, value, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (DT == 2) {
      _tile_loadd(7, value + 1024, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (RT == 2) {
      _tile_loadd(5, weights + 16 * t.weight_stride, w_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (DT == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, o + d, o_bytes);
  if constexpr (DT == 2) _tile_stored(1, o + d + 16, o_bytes);
  if constexpr (RT == 2) _tile_stored(2, o + 16 * p.v_dim + d, o_bytes);
  if constexpr (RT == 2 && DT == 2) _tile_stored(3, o + 16 * p.v_dim + d + 16, o_bytes);
}

template <int RT>
void group_amx(const Plan &p, const Task &t, const std::vector<Entry> &entries, int64_t row0,
               int64_t rows) {
  const uint16_t *q = reinterpret_cast<const uint16_t *>(t.query) + row0 * p.k_dim;
  Strip strips[MAX_STRIPS];
  int64_t count = 0;
  for (const Entry &e : entries)
    for (int64_t j = 0; j < p.width; j += 32)
      if (e.bad || any_kept(p, e, row0, rows, j, 32)) strips[count++] = {&e, j};
  if (!count) return;
  FENCE;
  for (int64_t i = 0; i < count; i++)
    score_tiles_amx<RT>(p, q, strips[i], t.scores + i * 32, t.score_stride);
  FENCE;
  for (int64_t i = 0; i < count; i++) {
    const Entry &e = *strips[i].entry;
    if (e.bias || e.bits || e.real < strips[i].key0 + 32)
      cut_scores(p, t, e, row0, rows, strips[i].key0, 32, i * 32);
  }
  for (int64_t r = 0; r < rows; r++)
    softmax_row(p, t, t.scores + r * t.score_stride, t.weights + r * t.weight_stride, count * 32,
                row0 + r);
  FENCE;
  float *o = t.out + row0 * p.v_dim;
  int64_t d = 0;
  for (; d + 32 <= p.v_dim; d += 32) output_tiles_amx<RT, 2>(p, t, strips, count, o, d);
  if (d < p.v_dim) output_tiles_amx<RT, 1>(p, t, strips, count, o, d);
  FENCE;
}
#endif

// ---- NaN and inf in values behind bit tiles ---------------------------------------------------

// Where key j, dim d of a value block lies, counted in its own elements.
int64_t value_at(const Plan &p, int64_t stride, int64_t j, int64_t d) {
  if (!p.amx) return j * stride + d;
  return j / 32 * 32 * p.v_dim + d / 16 * 512 + (j % 32) / 2 * 32 + (d % 16) * 2 + j % 2;
}

float value_read(const Plan &p, const char *values, int64_t at) {
  if (!p.amx) return reinterpret_cast<const float *>(values)[at];
  return from_bits(uint32_t(reinterpret_cast<const uint16_t *>(values)[at]) << 16);
}

// Point an entry at a copy of its values in which NaN and inf are 0; add_bad brings them back.
void clean_values(const Plan &p, const Task &t, Entry &e) {
  e.bad = e.value;
  const int64_t keys = p.amx ? p.width : e.real;
  for (int64_t j = 0; j < keys; j++)
    for (int64_t d = 0; d < p.v_dim; d++) {
      const int64_t from = value_at(p, e.value_stride, j, d), to = value_at(p, p.v_dim, j, d);
      const float x = value_read(p, e.bad, from);
      if (p.amx)
        reinterpret_cast<uint16_t *>(t.clean)[to] = std::isfinite(x) ? to_bf16(x) : 0;
      else
        reinterpret_cast<float *>(t.clean)[to] = std::isfinite(x) ? x : 0.0f;
    }
  e.value = t.clean;
}

void add_bad(const Plan &p, const Task &t, const Entry &e, int64_t bad_stride, int64_t row0,
             int64_t rows) {
  const int64_t bytes = (p.c.kv_block + 7) / 8;
  for (int64_t j = 0; j < e.real; j++)
    for (int64_t d = 0; d < p.c.dim; d++) {
      const float x = value_read(p, e.bad, value_at(p, bad_stride, j, d));
      if (std::isfinite(x)) continue;
      for (int64_t r = 0; r < rows; r++) {
        if (!(e.bits[(row0 + r) * bytes + j / 8] >> (j % 8) & 1)) continue;
        if (e.bias && e.bias[j] == NEG_INF) continue;
        const float w = p.amx ? from_bits(uint32_t(t.weights[r * t.weight_stride + e.column + j])
                                          << 16)
                              : t.scores[r * t.score_stride + e.column + j];
        t.out[(row0 + r) * p.v_dim + d] += w * x;
      }
    }
}

// ---- one task -------------------------------------------------------------------------------

void run_group(const Plan &p, const Task &t, std::vector<Entry> &entries, int64_t rows) {
  const int64_t chunk = p.amx ? AMX_CHUNK : CHUNK;
  const int64_t bad_stride = entries[0].value_stride;
  const bool bad = entries.size() == 1 && entries[0].bits && entries[0].bad;
  if (bad) {
    clean_values(p, t, entries[0]);
    entries[0].value_stride = p.v_dim;
  }
  for (int64_t r = 0; r < rows; r += chunk) {
    const int64_t n = std::min(chunk, rows - r);
#if defined(WITH_AMX)
    if (p.amx) {
      n > 16 ? group_amx<2>(p, t, entries, r, n) : group_amx<1>(p, t, entries, r, n);
    } else
#endif
      group_floats(p, t, entries, r, n);
    if (bad) add_bad(p, t, entries[0], bad_stride, r, n);
  }
}

Task make_task(const Plan &p) {
  const int64_t rows = round_up(p.c.q_block, 32), columns = p.group_blocks * p.width;
  const int64_t chunk = p.amx ? AMX_CHUNK : CHUNK;
  Task t;
  t.score_stride = columns + 16;  // off the power of two: rows fall into different cache sets
  t.weight_stride = columns + 32;
  const int64_t sizes[] = {round_up(rows * p.k_dim * 4, 64), chunk * t.score_stride * 4,
                           rows * p.v_dim * 4, round_up(rows * 4, 64), round_up(rows * 4, 64),
                           p.amx ? chunk * t.weight_stride * 2 : 0,
                           p.c.has_tiles ? p.width * p.v_dim * 4 : 0};
  int64_t total = 0;
  for (int64_t size : sizes) total += round_up(size, 64);
  char *at = task_buffer.reserve(size_t(total));
  char *part[7];
  for (int i = 0; i < 7; i++) {
    part[i] = at;
    at += round_up(sizes[i], 64);
  }
  t.query = reinterpret_cast<float *>(part[0]);
  t.scores = reinterpret_cast<float *>(part[1]);
  t.out = reinterpret_cast<float *>(part[2]);
  t.top = reinterpret_cast<float *>(part[3]);
  t.sum = reinterpret_cast<float *>(part[4]);
  t.weights = reinterpret_cast<uint16_t *>(part[5]);
  t.clean = part[6];
  return t;
}

void load_query(const Plan &p, const Task &t, int64_t b, int64_t h, int64_t slot, int64_t rows) {
  const auto &c = p.c;
  const int64_t base = b * c.query_stride[0] + h * c.query_stride[1];
  if (p.amx) {  // rows up to the next full tile are read too
    uint16_t *to = reinterpret_cast<uint16_t *>(t.query);
    memset(to, 0, size_t(round_up(rows, 32) * p.k_dim) * 2);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = p.q_token(h, slot + r);
      if (token < 0 || p.sign == 0) continue;
      const uint16_t *from = static_cast<const uint16_t *>(c.query) + base +
                             token * c.query_stride[2];
      memcpy(to + r * p.k_dim, from, size_t(c.dim) * 2);
      if (p.sign < 0)
        for (int64_t d = 0; d < c.dim; d++) to[r * p.k_dim + d] ^= 0x8000;
    }
    return;
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t token = p.q_token(h, slot + r);
    float *to = t.query + r * c.dim;
    if (token < 0 || p.sign == 0) {
      memset(to, 0, size_t(c.dim) * 4);
      continue;
    }
    row_to_float(c.query, base + token * c.query_stride[2], c.dim, c.dtype, to);
    if (p.sign < 0)
      for (int64_t d = 0; d < c.dim; d++) to[d] = -to[d];
  }
}

void store_output(const Plan &p, const Task &t, int64_t b, int64_t h, int64_t slot, int64_t rows) {
  const auto &c = p.c;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t token = p.q_token(h, slot + r);
    if (token < 0) continue;
    float *row = t.out + r * p.v_dim;
    const float sum = t.sum[r];
    if (sum == 0.0f)
      memset(row, 0, size_t(p.v_dim) * 4);
    else
      multiply_row(row, p.v_dim, 1.0f / sum);
    row_from_float(row, c.dim, c.dtype, c.out,
                   b * c.out_stride[0] + h * c.out_stride[1] + token * c.out_stride[2]);
    if (c.lse)
      c.lse[b * c.lse_stride[0] + h * c.lse_stride[1] + token * c.lse_stride[2]] =
          sum == 0.0f ? NEG_INF
                      : (t.top[r] == NEG_INF ? 0.0f : t.top[r] * LN2) + std::log(sum);
  }
}

void run_task(const Plan &p, char *head_data, int64_t bh, int64_t q_block,
              std::vector<Entry> &entries) {
  const auto &c = p.c;
  const int64_t b = bh / c.heads, h = bh % c.heads, slot = q_block * c.q_block;
  const int64_t rows = std::min(c.q_block, p.q_slots - slot);
  const int64_t line = (c.mask_heads == 1 ? 0 : h) * c.q_blocks + q_block;
  const Task t = make_task(p);
  load_query(p, t, b, h, slot, rows);
  memset(t.out, 0, size_t(round_up(rows, 32) * p.v_dim) * 4);
  std::fill(t.top, t.top + rows, NEG_INF);
  std::fill(t.sum, t.sum + rows, 0.0f);
  entries.clear();
  for (int32_t i = c.indptr[line]; i < c.indptr[line + 1]; i++) {
    const int64_t block = c.block[i];
    const uint8_t flag = p.flags(head_data)[block];
    const int64_t v_at = b * c.value_stride[0] + h * c.value_stride[1] +
                         block * c.kv_block * c.value_stride[2];
    Entry e;
    e.key = p.key_panel(head_data, block);
    e.value = p.in_place ? reinterpret_cast<const char *>(static_cast<const float *>(c.value) + v_at)
                         : p.value_panel(head_data, block);
    e.value_stride = p.in_place ? c.value_stride[2] : p.v_dim;
    e.real = p.real_keys(block);
    e.bias = flag & HAS_BIAS ? p.bias_line(head_data, block) : nullptr;
    e.bits = i < c.full_end[line]
                 ? nullptr
                 : c.tiles + int64_t(c.tile[i]) * c.q_block * ((c.kv_block + 7) / 8);
    const bool alone = e.bits && (flag & BAD_VALUE);  // such a block makes a group of its own
    if (!entries.empty() && (alone || int64_t(entries.size()) == p.group_blocks)) {
      run_group(p, t, entries, rows);
      entries.clear();
    }
    e.bad = alone ? e.value : nullptr;
    e.column = int64_t(entries.size()) * p.width;
    entries.push_back(e);
    if (alone) {
      run_group(p, t, entries, rows);
      entries.clear();
    }
  }
  if (!entries.empty()) run_group(p, t, entries, rows);
  store_output(p, t, b, h, slot, rows);
}

// Tasks of one wave of heads, longest lists first in eight steps, by head within a step.
std::vector<int64_t> wave_order(const Plan &p, int64_t first, int64_t count) {
  const auto &c = p.c;
  std::vector<int64_t> order(size_t(count * c.q_blocks));
  std::vector<int32_t> step(order.size());
  int32_t longest = 1;
  for (int64_t i = 0; i < c.mask_heads * c.q_blocks; i++)
    longest = std::max(longest, c.indptr[i + 1] - c.indptr[i]);
  for (size_t i = 0; i < order.size(); i++) {
    const int64_t h = (first + int64_t(i) / c.q_blocks) % c.heads;
    const int64_t line = (c.mask_heads == 1 ? 0 : h) * c.q_blocks + int64_t(i) % c.q_blocks;
    order[i] = int64_t(i);
    step[i] = int32_t(int64_t(c.indptr[line + 1] - c.indptr[line]) * 8 / longest);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return step[size_t(a)] > step[size_t(b)]; });
  return order;
}

void run(const DittoolsCall &c) {
  const Plan p(c);
  const int64_t heads = c.batch * c.heads;
  char *panels = wave_buffer.reserve(size_t(p.head_bytes * p.wave_heads));
  for (int64_t first = 0; first < heads; first += p.wave_heads) {
    const int64_t count = std::min(p.wave_heads, heads - first);
    const std::vector<int64_t> order = wave_order(p, first, count);
    std::atomic<int64_t> next_pack{0}, next_task{0};
    std::atomic<bool> failed{false};
    const int64_t packs = count * c.kv_blocks, tasks = int64_t(order.size());
    const int threads = int(std::max<int64_t>(1, std::min<int64_t>(c.threads, tasks)));
#pragma omp parallel num_threads(threads)
    {
      const FlushDenormals flush;
      try {
        for (int64_t i; (i = next_pack++) < packs;)
          pack_block(p, panels + i / c.kv_blocks * p.head_bytes, first + i / c.kv_blocks,
                     i % c.kv_blocks);
      } catch (const std::bad_alloc &) {
        failed = true;
      }
#pragma omp barrier
      try {
#if defined(WITH_AMX)
        std::optional<TileConfig> config;
        if (p.amx) config.emplace();
#endif
        std::vector<Entry> entries;
        for (int64_t i; !failed && (i = next_task++) < tasks;) {
          const int64_t at = order[size_t(i)];
          run_task(p, panels + at / c.q_blocks * p.head_bytes, first + at / c.q_blocks,
                   at % c.q_blocks, entries);
        }
      } catch (const std::bad_alloc &) {
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
  }
  if (wave_buffer.size > size_t(4 * WAVE_BYTES)) wave_buffer.release();
}

}  // namespace

extern "C" {

// 1 when this build has AMX and the system lets this process use it, else 0.
int dittools_amx() {
#if defined(WITH_AMX)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return 0;
#endif
}

// 0 done, 1 out of memory, 2 the caller was written for another version of this file.
int dittools_attention(const DittoolsCall *call) {
  if (call->abi != int64_t(sizeof(DittoolsCall))) return 2;
  try {
    run(*call);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}
}
