// Product-quantized keys and values on the CPU: attention over codes, and encoding. See cpu_kernels.py for the tables.
//
// Attention, a block of 64 tokens of one KV head at a time, every vector register holding one channel of 16 tokens:
//
//   codes (64 x codes bytes) --transpose--> codes of each part, side by side
//     --look up--> keys [channel][64 tokens], in L1 --turn by position in the block-->
//     --x queries of all heads that share them, turned back by the block's position--> scores --> weights, running max
//   and the same look-up for values, summed by weight into [row][channel][16 lanes]; lanes are summed at the end.
//
// A key's rotation by its position is that of its block, undone on the query once, and that within its block, whose
// table of 64 positions never leaves the cache. Vectors are the compiler's own (GCC and Clang), for any target.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define TABLES_IN_REGISTERS
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int64_t kCentroids = 256;
constexpr int64_t kBlock = 64;  // tokens; ROPE_BLOCK in cpu_kernels.py
constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = kBlock / kLanes;
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Float16 __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int16 __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

struct Column {  // one channel, or one row of scores, of a block of tokens
  Float16 v[kVectors];
};

#if defined(__clang__)
#define INTERLEAVE_LOW(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define INTERLEAVE_LOW(a, b) \
  __builtin_shuffle(a, b, Bytes16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define INTERLEAVE_HIGH(a, b) \
  __builtin_shuffle(a, b, Bytes16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

inline Float16 broadcast(float x) {
  return Float16{} + x;
}

inline float sum(Float16 x) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) {
    total += x[i];
  }
  return total;
}

// e^x to 2 ulp for x at most 88; 0 below -87.
inline Float16 exponential(Float16 x) {
  const Float16 floor = broadcast(-87.0f), bounded = x > floor ? x : floor;
  const Float16 shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Float16 n = (bounded * 1.44269504f + shifter) - shifter;
  const Float16 r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Float16 p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int16 exponent = (__builtin_convertvector(n, Int16) + 127) << 23;
  Float16 power;
  std::memcpy(&power, &exponent, sizeof(power));
  return x > floor ? p * power : Float16{};
}

// cap * tanh(x / cap)
inline Float16 capped(Float16 x, float cap) {
  Float16 twice = x * (2 / cap);
  twice = twice > broadcast(40.0f) ? broadcast(40.0f) : twice;
  return cap * (1.0f - 2.0f / (exponential(twice) + 1.0f));
}

// ---------------------------------------------------------------------------------------------------- look-up

#if defined(TABLES_IN_REGISTERS)

// Centroids of one channel as three planes of 256 bytes, the upper three bytes of each float, rounded: a plane is four
// registers, and a look-up in it two permutations, where a gather would load one value at a time.
constexpr int64_t kPlanes = 3;
constexpr int64_t kEntry = kPlanes * kCentroids;

// Where bytes are put together again, tokens come out in another order; so codes are laid out in this one.
constexpr int64_t token_at(int64_t position) {
  return position / 4 % 4 * 16 + position / 16 * 4 + position % 4;
}

inline void look_up(const uint8_t* planes, const uint8_t* codes, Column& channel, Column&) {
  const __m512i index = _mm512_loadu_si512(codes);
  const __mmask64 upper = _mm512_movepi8_mask(index);
  __m512i bytes[kPlanes];
  for (int plane = 0; plane < kPlanes; plane++, planes += kCentroids) {
    const __m512i low =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(planes), index, _mm512_loadu_si512(planes + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(planes + 128), index, _mm512_loadu_si512(planes + 192));
    bytes[plane] = _mm512_mask_blend_epi8(upper, low, high);
  }
  const __m512i zero = _mm512_setzero_si512();
  const __m512i lower_low = _mm512_unpacklo_epi8(zero, bytes[0]), lower_high = _mm512_unpackhi_epi8(zero, bytes[0]);
  const __m512i upper_low = _mm512_unpacklo_epi8(bytes[1], bytes[2]);
  const __m512i upper_high = _mm512_unpackhi_epi8(bytes[1], bytes[2]);
  _mm512_store_si512(&channel.v[0], _mm512_unpacklo_epi16(lower_low, upper_low));
  _mm512_store_si512(&channel.v[1], _mm512_unpackhi_epi16(lower_low, upper_low));
  _mm512_store_si512(&channel.v[2], _mm512_unpacklo_epi16(lower_high, upper_high));
  _mm512_store_si512(&channel.v[3], _mm512_unpackhi_epi16(lower_high, upper_high));
}

#else

constexpr int64_t kPlanes = 0;
constexpr int64_t kEntry = kCentroids * 2 * sizeof(float);

constexpr int64_t token_at(int64_t position) {
  return position;
}

// Two channels of one part: table is [256][2] floats.
inline void look_up(const uint8_t* table, const uint8_t* codes, Column& first, Column& second) {
  float* a = reinterpret_cast<float*>(first.v);
  float* b = reinterpret_cast<float*>(second.v);
  for (int64_t token = 0; token < kBlock; token++) {
    float both[2];
    std::memcpy(both, table + codes[token] * sizeof(both), sizeof(both));
    a[token] = both[0];
    b[token] = both[1];
  }
}

#endif

// ---------------------------------------------------------------------------------------------------- tables

struct Side {  // of keys or of values; see Tables in cpu_kernels.py
  explicit Side(const std::vector<Tensor>& given)
      : tables(given[0]), entries(given[1]), gain(given[2]), means(given[3]), inverses(given[4]) {
    TORCH_CHECK(tables.is_contiguous() && tables.dim() == 4 && tables.nbytes() == tables.size(0) * count() * kEntry);
    TORCH_CHECK(entries.is_contiguous() && entries.dim() == 3 && entries.scalar_type() == at::kInt);
  }
  int64_t count() const { return tables.size(1); }
  const uint8_t* table(int64_t head) const {
    return static_cast<const uint8_t*>(tables.const_data_ptr()) + head * count() * kEntry;
  }
  const int32_t* entry(int64_t head) const { return entries.const_data_ptr<int32_t>() + head * count() * 3; }
  static const float* of(const Tensor& all, int64_t head) {
    return all.numel() == 0 ? nullptr : all.const_data_ptr<float>() + head * all.stride(0);
  }
  const float* gains(int64_t head) const { return of(gain, head); }
  const float* mean(int64_t head) const { return of(means, head); }
  const float* inverse(int64_t head) const { return of(inverses, head); }

  const Tensor tables, entries, gain, means, inverses;
};

struct Codes {
  explicit Codes(const Tensor& codes) : data(codes.const_data_ptr<uint8_t>()), tensor(codes) {
    TORCH_CHECK(codes.dim() == 4 && codes.stride(3) == 1, "codes have shape (B, H, T, codes), bytes side by side");
  }
  const uint8_t* at(int64_t row, int64_t head, int64_t slot) const {
    return data + row * tensor.stride(0) + head * tensor.stride(1) + slot * tensor.stride(2);
  }
  int64_t width() const { return tensor.size(3); }
  const uint8_t* data;
  const Tensor tensor;
};

// What one thread works in: a block of decoded vectors and its codes.
struct Workspace {
  Workspace(int64_t channels, int64_t widest)
      : vectors(channels + 1), turned(channels), copy(kBlock * widest), codes(widest * kBlock) {}
  std::vector<Column> vectors;  // [channels + 1]: the last is where missing second channels go
  std::vector<Column> turned;
  std::vector<uint8_t> copy;
  std::vector<uint8_t> codes;  // [codes][kBlock]
};

// ---------------------------------------------------------------------------------------------------- decoding

// 16 tokens x 16 codes, from `position` on; `to` has rows of kBlock.
inline void transpose16(const uint8_t* from, int64_t stride, int64_t position, uint8_t* to) {
  Bytes16 rows[16], next[16];
  for (int i = 0; i < 16; i++) {
    std::memcpy(&rows[i], from + token_at(position + i) * stride, 16);
  }
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < 8; i++) {
      next[2 * i] = INTERLEAVE_LOW(rows[i], rows[i + 8]);
      next[2 * i + 1] = INTERLEAVE_HIGH(rows[i], rows[i + 8]);
    }
    for (int i = 0; i < 16; i++) {
      rows[i] = next[i];
    }
  }
  for (int i = 0; i < 16; i++) {
    std::memcpy(to + i * kBlock + position, &rows[i], 16);
  }
}

void transpose(const uint8_t* from, int64_t stride, int64_t width, uint8_t* to) {
  if (width < 16) {
    for (int64_t position = 0; position < kBlock; position++) {
      for (int64_t code = 0; code < width; code++) {
        to[code * kBlock + position] = from[token_at(position) * stride + code];
      }
    }
    return;
  }
  for (int64_t code = 0; code < width; code += 16) {
    const int64_t first = std::min(code, width - 16);
    for (int64_t position = 0; position < kBlock; position += 16) {
      transpose16(from + first, stride, position, to + first * kBlock);
    }
  }
}

// Centroids of tokens [first, last) of a block into work.vectors, and their gains; the other tokens' are unspecified.
void decode(const Side& side, int64_t head, const uint8_t* codes, int64_t stride, int64_t width, int64_t first,
            int64_t last, Workspace& work, Column& gain) {
  if (first > 0 || last < kBlock) {
    std::fill(work.copy.begin(), work.copy.end(), 0);
    for (int64_t token = first; token < last; token++) {
      std::memcpy(work.copy.data() + token * width, codes + token * stride, width);
    }
    codes = work.copy.data();
    stride = width;
  }
  transpose(codes, stride, width, work.codes.data());
  const uint8_t* table = side.table(head);
  const int32_t* entry = side.entry(head);
  for (int64_t i = 0; i < side.count(); i++, entry += 3, table += kEntry) {
    look_up(table, work.codes.data() + entry[0] * kBlock, work.vectors[entry[1]], work.vectors[entry[2]]);
  }
  if (const float* gains = side.gains(head)) {
    const uint8_t* chosen = work.codes.data() + (width - 1) * kBlock;
    for (int64_t position = 0; position < kBlock; position++) {
      const int64_t token = token_at(position);
      gain.v[token / kLanes][token % kLanes] = gains[chosen[position]];
    }
  }
}

// ---------------------------------------------------------------------------------------------------- products

// out[d] = sum over c of matrix[c][d] in[c]
void multiply(const Column* in, const float* matrix, int64_t channels, Column* out) {
  for (int64_t d = 0; d < channels; d++) {
    Column total{};
    for (int64_t c = 0; c < channels; c++) {
      const float factor = matrix[c * channels + d];
      for (int i = 0; i < kVectors; i++) {
        total.v[i] += factor * in[c].v[i];
      }
    }
    out[d] = total;
  }
}

template <int N>
void score_rows(const Column* keys, int64_t channels, const float* queries, Column* scores) {
  Float16 total[N][kVectors] = {};
  for (int64_t c = 0; c < channels; c++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Float16 q = broadcast(queries[n * channels + c]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) {
        total[n][i] += q * keys[c].v[i];
      }
    }
  }
  for (int n = 0; n < N; n++) {
    for (int i = 0; i < kVectors; i++) {
      scores[n].v[i] = total[n][i];
    }
  }
}

template <int N>
void weigh_rows(const Column* values, int64_t channels, const Column* weights, Float16* sums) {
  for (int64_t c = 0; c < channels; c++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      Float16 total = sums[n * channels + c];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) {
        total += weights[n].v[i] * values[c].v[i];
      }
      sums[n * channels + c] = total;
    }
  }
}

// Calls f.template operator()<N>(first row) for runs of up to 4 rows.
template <typename F>
void by_rows(int64_t rows, F f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    f(std::integral_constant<int, 4>{}, row);
  }
  switch (rows - row) {
    case 3:
      return f(std::integral_constant<int, 3>{}, row);
    case 2:
      return f(std::integral_constant<int, 2>{}, row);
    case 1:
      return f(std::integral_constant<int, 1>{}, row);
  }
}

struct Rope {  // [pairs][kBlock] for positions in a block, [blocks][pairs] for first positions of blocks
  explicit Rope(const std::vector<Tensor>& given)
      : pairs(given.empty() ? 0 : given[0].size(0)),
        cos(pairs ? reinterpret_cast<const Column*>(given[0].const_data_ptr<float>()) : nullptr),
        sin(pairs ? reinterpret_cast<const Column*>(given[1].const_data_ptr<float>()) : nullptr),
        block_cos(pairs ? given[2].const_data_ptr<float>() : nullptr),
        block_sin(pairs ? given[3].const_data_ptr<float>() : nullptr),
        blocks(pairs ? given[2].size(0) : 0),
        order(pairs ? given[4].const_data_ptr<int32_t>() : nullptr) {}

  void turn(Column* keys) const {
    for (int64_t p = 0; p < pairs; p++) {
      Column &a = keys[p], &b = keys[p + pairs];
      for (int i = 0; i < kVectors; i++) {
        const Float16 x = a.v[i], y = b.v[i];
        a.v[i] = x * cos[p].v[i] - y * sin[p].v[i];
        b.v[i] = y * cos[p].v[i] + x * sin[p].v[i];
      }
    }
  }
  void turn_back(const float* query, int64_t block, int64_t channels, float* out) const {
    const float *c = block_cos + block * pairs, *s = block_sin + block * pairs;
    for (int64_t p = 0; p < pairs; p++) {
      out[p] = query[p] * c[p] + query[p + pairs] * s[p];
    }
    for (int64_t p = 0; p < pairs; p++) {
      out[p + pairs] = query[p + pairs] * c[p] - query[p] * s[p];
    }
    std::copy(query + 2 * pairs, query + channels, out + 2 * pairs);
  }

  const int64_t pairs;
  const Column *cos, *sin;
  const float *block_cos, *block_sin;
  const int64_t blocks;
  const int32_t* order;
};

// ---------------------------------------------------------------------------------------------------- attention

struct Softmax {  // of one row, so far: lanes of the sum are kept apart
  float maximum = kNone;
  Float16 total{};

  // Turns scores into weights and returns what earlier sums must be multiplied by.
  float add(Column& scores, int64_t first, int64_t last) {
    if (first > 0 || last < kBlock) {
      for (int64_t token = 0; token < kBlock; token++) {
        if (token < first || token >= last) {
          scores.v[token / kLanes][token % kLanes] = kNone;
        }
      }
    }
    Float16 highest = scores.v[0];
    for (int i = 1; i < kVectors; i++) {
      highest = scores.v[i] > highest ? scores.v[i] : highest;
    }
    float next = maximum;
    for (int i = 0; i < kLanes; i++) {
      next = std::max(next, highest[i]);
    }
    const float factor = std::exp(maximum - next);  // 0 for the first block
    Float16 added{};
    for (int i = 0; i < kVectors; i++) {
      scores.v[i] = exponential(scores.v[i] - next);
      added += scores.v[i];
    }
    total = total * factor + added;
    maximum = next;
    return factor;
  }
};

struct Problem {
  const Side keys, values;
  const Rope rope;
  const Codes key_codes, value_codes;
  const int64_t rows, channels;  // query rows of a KV head, of all the query heads that share it
  const float softcap;

  // Partial sums over blocks [begin, end) of a sequence; position 0 is at slot `origin`, slots [start, stop) count.
  void attend(int64_t batch, int64_t head, int64_t origin, int64_t start, int64_t stop, int64_t begin, int64_t end,
              const float* queries, const float* bias, float* out, float* maxima, float* totals) const {
    Workspace work(channels, std::max(key_codes.width(), value_codes.width()));
    std::vector<Column> scores(rows);
    std::vector<Float16> sums(rows * channels, Float16{});
    std::vector<Softmax> softmax(rows);
    std::vector<float> turned(rope.pairs ? rows * channels : 0);
    Column gain;
    for (int64_t block = begin; block < end; block++) {
      const int64_t slot = origin + block * kBlock;
      const int64_t first = std::max<int64_t>(0, start - slot), last = std::min(kBlock, stop - slot);
      decode(keys, head, key_codes.at(batch, head, slot), key_codes.tensor.stride(2), key_codes.width(), first, last,
             work, gain);
      const float* asked = queries;
      Column* decoded = work.vectors.data();
      const bool gained = keys.gains(head) != nullptr;
      if (rope.pairs) {
        if (gained) {
          for (int64_t c = 0; c < channels; c++) {
            for (int i = 0; i < kVectors; i++) {
              decoded[c].v[i] *= gain.v[i];
            }
          }
        }
        if (const float* inverse = keys.inverse(head)) {
          multiply(decoded, inverse, channels, work.turned.data());
          decoded = work.turned.data();
        }
        if (const float* mean = keys.mean(head)) {
          for (int64_t c = 0; c < channels; c++) {
            for (int i = 0; i < kVectors; i++) {
              decoded[c].v[i] += mean[c];
            }
          }
        }
        rope.turn(decoded);
        for (int64_t row = 0; row < rows; row++) {
          rope.turn_back(queries + row * channels, block, channels, turned.data() + row * channels);
        }
        asked = turned.data();
      }
      by_rows(rows, [&](auto n, int64_t row) {
        score_rows<n.value>(decoded, channels, asked + row * channels, scores.data() + row);
      });
      for (int64_t row = 0; row < rows; row++) {
        for (int i = 0; i < kVectors; i++) {
          Float16& score = scores[row].v[i];
          score = gained && !rope.pairs ? score * gain.v[i] + bias[row] : score + bias[row];
          score = softcap > 0 ? capped(score, softcap) : score;
        }
        const float factor = softmax[row].add(scores[row], first, last);
        if (factor != 1) {
          for (int64_t c = 0; c < channels; c++) {
            sums[row * channels + c] *= factor;
          }
        }
      }
      decode(values, head, value_codes.at(batch, head, slot), value_codes.tensor.stride(2), value_codes.width(), first,
             last, work, gain);
      if (values.gains(head)) {
        for (int64_t row = 0; row < rows; row++) {
          for (int i = 0; i < kVectors; i++) {
            scores[row].v[i] *= gain.v[i];
          }
        }
      }
      by_rows(rows, [&](auto n, int64_t row) {
        weigh_rows<n.value>(work.vectors.data(), channels, scores.data() + row, sums.data() + row * channels);
      });
    }
    for (int64_t row = 0; row < rows; row++) {
      maxima[row] = softmax[row].maximum;
      totals[row] = sum(softmax[row].total);
      for (int64_t c = 0; c < channels; c++) {
        out[row * channels + c] = sum(sums[row * channels + c]);
      }
    }
  }
};

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key_codes, const Tensor& value_codes,
                                  std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<Tensor> rope,
                                  const Tensor& start, int64_t stop, const Tensor& offset, double scale,
                                  double softcap) {
  const int64_t batch = query.size(0), query_heads = query.size(1), length = query.size(2), channels = query.size(3);
  const int64_t heads = key_codes.size(1), group = query_heads / heads, rows = group * length;
  const Problem problem{Side(keys), Side(values), Rope(rope), Codes(key_codes), Codes(value_codes), rows, channels,
                        static_cast<float>(softcap)};
  TORCH_CHECK(query_heads == group * heads, query_heads, " query heads do not share ", heads, " KV heads evenly");
  TORCH_CHECK(stop <= key_codes.size(2) && stop <= value_codes.size(2), "stop ", stop, " is past the codes held");
  const Tensor asked = query.to(at::kFloat).contiguous();
  const Tensor starts = start.to(at::kLong).contiguous(), offsets = offset.to(at::kLong).contiguous();
  const int64_t *first_slot = starts.const_data_ptr<int64_t>(), *left = offsets.const_data_ptr<int64_t>();
  const int64_t most_splits = std::max<int64_t>(1, at::get_num_threads());
  const int64_t pairs = batch * heads, splits = pairs >= 8 * most_splits ? 1 : most_splits;

  auto options = asked.options();
  Tensor prepared = at::empty({pairs, rows, channels}, options), bias = at::empty({pairs, rows}, options);
  Tensor sums = at::empty({splits, pairs, rows, channels}, options);
  Tensor maxima = at::empty({splits, pairs, rows}, options), totals = at::empty({splits, pairs, rows}, options);
  Tensor out = at::empty({batch, query_heads, length, channels}, options);
  Tensor lse = at::empty({batch, query_heads, length}, options);
  const float* given = asked.const_data_ptr<float>();  // rows of a KV head are side by side already
  float *p_query = prepared.mutable_data_ptr<float>(), *p_bias = bias.mutable_data_ptr<float>();
  float *p_sums = sums.mutable_data_ptr<float>(), *p_maxima = maxima.mutable_data_ptr<float>();
  float *p_totals = totals.mutable_data_ptr<float>(), *p_out = out.mutable_data_ptr<float>();
  float* p_lse = lse.mutable_data_ptr<float>();

  // Queries in the codebooks' space: scaled, in order of rotated pairs or multiplied by `inverse`.
  for (int64_t pair = 0; pair < pairs; pair++) {
    const float *inverse = problem.keys.inverse(pair % heads), *mean = problem.keys.mean(pair % heads);
    for (int64_t row = 0; row < rows; row++) {
      const float* from = given + (pair * rows + row) * channels;
      float *to = p_query + (pair * rows + row) * channels, constant = 0;
      for (int64_t c = 0; c < channels; c++) {
        if (problem.rope.pairs) {
          to[c] = from[problem.rope.order[c]] * scale;
          continue;
        }
        constant += mean ? from[c] * mean[c] : 0;
        float total = inverse ? 0 : from[c];
        for (int64_t d = 0; inverse && d < channels; d++) {
          total += inverse[c * channels + d] * from[d];
        }
        to[c] = total * scale;
      }
      p_bias[pair * rows + row] = constant * scale;
    }
  }
  at::parallel_for(0, splits * pairs, 1, [&](int64_t task, int64_t last_task) {
    for (; task < last_task; task++) {
      const int64_t split = task / pairs, pair = task % pairs, row = pair / heads;
      const int64_t origin = problem.rope.pairs ? left[row] : 0;
      TORCH_CHECK(origin >= 0 && first_slot[row] >= origin, "start ", first_slot[row], " is before offset ", origin);
      const int64_t low = (first_slot[row] - origin) / kBlock;
      const int64_t high = first_slot[row] < stop ? (stop - origin + kBlock - 1) / kBlock : low;
      TORCH_CHECK(!problem.rope.pairs || high <= problem.rope.blocks, "the rotation table ends before slot ", stop);
      const int64_t begin = low + (high - low) * split / splits, end = low + (high - low) * (split + 1) / splits;
      problem.attend(row, pair % heads, origin, first_slot[row], stop, begin, end, p_query + pair * rows * channels,
                     p_bias + pair * rows, p_sums + task * rows * channels, p_maxima + task * rows,
                     p_totals + task * rows);
    }
  });
  at::parallel_for(0, pairs * rows, 16, [&](int64_t index, int64_t last_index) {
    std::vector<float> merged(channels);
    for (; index < last_index; index++) {
      const int64_t head = index / rows % heads;
      float maximum = kNone, total = 0;
      for (int64_t split = 0; split < splits; split++) {
        maximum = std::max(maximum, p_maxima[split * pairs * rows + index]);
      }
      std::fill(merged.begin(), merged.end(), 0.0f);
      float* to = p_out + index * channels;
      if (maximum == kNone) {
        std::fill(to, to + channels, 0.0f);
        p_lse[index] = kNone;
        continue;
      }
      for (int64_t split = 0; split < splits; split++) {
        const int64_t at = split * pairs * rows + index;
        const float factor = std::exp(p_maxima[at] - maximum);
        total += factor * p_totals[at];
        for (int64_t c = 0; c < channels; c++) {
          merged[c] += factor * p_sums[at * channels + c];
        }
      }
      p_lse[index] = maximum + std::log(total);
      const float *inverse = problem.values.inverse(head), *mean = problem.values.mean(head);
      for (int64_t d = 0; d < channels; d++) {
        to[d] = mean ? mean[d] : 0;
      }
      for (int64_t c = 0; c < channels; c++) {
        const float value = merged[c] / total;
        if (!inverse) {
          to[c] += value;
          continue;
        }
        for (int64_t d = 0; d < channels; d++) {
          to[d] += value * inverse[c * channels + d];
        }
      }
    }
  });
  return {out, lse};
}

// ---------------------------------------------------------------------------------------------------- encoding

// The nearest centroid of a part of one channel: table is 255 ascending middles, infinity, 256 numbers of centroids.
// Counting the middles below a value takes two operations a centroid, and needs neither gathers nor branches.
void nearest_of_one(const Column& x, const float* table, int32_t* chosen) {
  Int16 below[kVectors] = {};
  for (int64_t centroid = 0; centroid < kCentroids; centroid++) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      below[i] -= x.v[i] > broadcast(table[centroid]);  // a true comparison is -1
    }
  }
  for (int64_t token = 0; token < kBlock; token++) {
    chosen[token] = static_cast<int32_t>(table[kCentroids + below[token / kLanes][token % kLanes]]);
  }
}

// The nearest centroid of one part, S channels, for 64 tokens: table is [256][S + 1], -2 weight centroid and length.
template <int S>
void nearest(const Column* const* channels, const float* table, int32_t* chosen) {
  constexpr int kAtOnce = S <= 4 ? 4 : 2;
  for (int start = 0; start < kVectors; start += kAtOnce) {
    Float16 x[S][kAtOnce], least[kAtOnce];
    Int16 index[kAtOnce];
    for (int i = 0; i < kAtOnce; i++) {
      for (int s = 0; s < S; s++) {
        x[s][i] = channels[s]->v[start + i];
      }
      least[i] = broadcast(std::numeric_limits<float>::infinity());
      index[i] = Int16{};
    }
    const float* row = table;
    for (int32_t centroid = 0; centroid < kCentroids; centroid++, row += S + 1) {
      const Int16 number = Int16{} + centroid;
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; i++) {
        Float16 distance = broadcast(row[S]);
#pragma GCC unroll 8
        for (int s = 0; s < S; s++) {
          distance += x[s][i] * row[s];
        }
        index[i] = distance < least[i] ? number : index[i];
        least[i] = distance < least[i] ? distance : least[i];
      }
    }
    for (int i = 0; i < kAtOnce; i++) {
      std::memcpy(chosen + (start + i) * kLanes, &index[i], sizeof(Int16));
    }
  }
}

// The same for any number of channels.
void nearest_of_many(const Column* const* channels, int64_t count, const float* table, int32_t* chosen) {
  Column least;
  Int16 index[kVectors] = {};
  for (int i = 0; i < kVectors; i++) {
    least.v[i] = broadcast(std::numeric_limits<float>::infinity());
  }
  for (int32_t centroid = 0; centroid < kCentroids; centroid++, table += count + 1) {
    for (int i = 0; i < kVectors; i++) {
      Float16 distance = broadcast(table[count]);
      for (int64_t s = 0; s < count; s++) {
        distance += channels[s]->v[i] * table[s];
      }
      index[i] = distance < least.v[i] ? Int16{} + centroid : index[i];
      least.v[i] = distance < least.v[i] ? distance : least.v[i];
    }
  }
  std::memcpy(chosen, index, sizeof(index));
}

// See EncoderTables in cpu_kernels.py.
Tensor encode(const Tensor& x, const Tensor& tables, const Tensor& order, const Tensor& first, const Tensor& weight,
              const Tensor& mean, const Tensor& basis, const Tensor& gains) {
  const Tensor given = x.to(at::kFloat);
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2), channels = x.size(3);
  const int64_t parts = first.size(1) - 1, codes = parts + (gains.numel() > 0);
  Tensor out = at::empty({batch, heads, length, codes}, x.options().dtype(at::kByte));
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const float* from = given.const_data_ptr<float>();
  const int64_t blocks = (length + kBlock - 1) / kBlock;
  at::parallel_for(0, batch * heads * blocks, 1, [&](int64_t task, int64_t last_task) {
    std::vector<Column> y(channels), rotated(basis.numel() ? channels : 0);
    std::vector<const Column*> members(channels);
    int32_t chosen[kBlock];
    for (; task < last_task; task++) {
      const int64_t row = task / blocks / heads, head = task / blocks % heads, start = task % blocks * kBlock;
      const int64_t tokens = std::min(kBlock, length - start);
      const float* subtracted = mean.const_data_ptr<float>() + head * channels;
      for (int64_t c = 0; c < channels; c++) {
        const float* source = from + row * given.stride(0) + head * given.stride(1) + c * given.stride(3);
        float* target = reinterpret_cast<float*>(y[c].v);
        for (int64_t token = 0; token < tokens; token++) {
          target[token] = source[(start + token) * given.stride(2)] - subtracted[c];
        }
        std::fill(target + tokens, target + kBlock, 0.0f);
      }
      Column* vectors = y.data();
      if (basis.numel()) {
        multiply(vectors, basis.const_data_ptr<float>() + head * channels * channels, channels, rotated.data());
        vectors = rotated.data();
      }
      uint8_t* target = to + ((row * heads + head) * length + start) * codes;
      if (gains.numel()) {
        const float* weights = weight.const_data_ptr<float>() + head * channels;
        const float *begin = gains.const_data_ptr<float>() + head * 2 * kCentroids, *middle = begin + kCentroids;
        Column energy{}, inverse{};
        float total = 0;
        for (int64_t c = 0; c < channels; c++) {
          total += weights[c];
          for (int i = 0; i < kVectors; i++) {
            energy.v[i] += vectors[c].v[i] * vectors[c].v[i] * weights[c];
          }
        }
        for (int64_t token = 0; token < kBlock; token++) {
          const float root = std::sqrt(energy.v[token / kLanes][token % kLanes] / total);
          const int64_t level = std::lower_bound(middle, middle + kCentroids - 1, root) - middle;
          inverse.v[token / kLanes][token % kLanes] = 1 / begin[level];
          if (token < tokens) {
            target[token * codes + parts] = static_cast<uint8_t>(level);
          }
        }
        for (int64_t c = 0; c < channels; c++) {
          for (int i = 0; i < kVectors; i++) {
            vectors[c].v[i] *= inverse.v[i];
          }
        }
      }
      const int32_t* channel = order.const_data_ptr<int32_t>() + head * channels;
      const int32_t* bounds = first.const_data_ptr<int32_t>() + head * (parts + 1);
      for (int64_t c = 0; c < channels; c++) {
        members[c] = vectors + channel[c];
      }
      for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = bounds[part], count = bounds[part + 1] - begin;
        const Column* const* of = members.data() + begin;
        const float* table = tables.const_data_ptr<float>() + head * tables.stride(0) + (begin + part) * kCentroids;
        switch (count) {
          case 1: nearest_of_one(*of[0], table, chosen); break;
          case 2: nearest<2>(of, table, chosen); break;
          case 3: nearest<3>(of, table, chosen); break;
          case 4: nearest<4>(of, table, chosen); break;
          case 5: nearest<5>(of, table, chosen); break;
          case 6: nearest<6>(of, table, chosen); break;
          case 7: nearest<7>(of, table, chosen); break;
          case 8: nearest<8>(of, table, chosen); break;
          default: nearest_of_many(of, count, table, chosen);
        }
        for (int64_t token = 0; token < tokens; token++) {
          target[token * codes + part] = static_cast<uint8_t>(chosen[token]);
        }
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(effcli_kv_pq, library) {
  library.def("planes() -> int", [] { return kPlanes; });
  library.def(
      "attend(Tensor query, Tensor key_codes, Tensor value_codes, Tensor[] keys, Tensor[] values, Tensor[] rope, "
      "Tensor start, int stop, Tensor offset, float scale, float softcap) -> (Tensor, Tensor)");
  library.def(
      "encode(Tensor x, Tensor tables, Tensor order, Tensor first, Tensor weight, Tensor mean, Tensor basis, "
      "Tensor gains) -> Tensor");
}

TORCH_LIBRARY_IMPL(effcli_kv_pq, CPU, library) {
  library.impl("attend", &attend);
  library.impl("encode", &encode);
}
