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
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "cpu_decoding.h"

namespace effcli {

Tensor encode(const Tensor& x, const Tensor& tables, const Tensor& order, const Tensor& first, const Tensor& weight,
              const Tensor& mean, const Tensor& basis, const Tensor& gains,
              const Tensor& offsets, const Tensor& scale, const Tensor& pairs, const Tensor& lengths);
extern const bool kIntegers;  // both of cpu_encoding.cpp

namespace {

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
    Workspace work(channels, std::max(keys.widest(), values.widest()));
    std::vector<Column> scores(rows);
    std::vector<Float16> sums(rows * channels, Float16{});
    std::vector<Softmax> softmax(rows);
    std::vector<float> turned(rope.pairs ? rows * channels : 0);
    Column gain;
    for (int64_t block = begin; block < end; block++) {
      const int64_t slot = origin + block * kBlock;
      const int64_t first = std::max<int64_t>(0, start - slot), last = std::min(kBlock, stop - slot);
      decode(keys, key_codes, batch, head, slot, first, last, work, gain);
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
      decode(values, value_codes, batch, head, slot, first, last, work, gain);
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
  const int64_t heads = keys[0].size(0), group = query_heads / heads, rows = group * length;
  const Problem problem{Side(keys), Side(values), Rope(rope), Codes(key_codes), Codes(value_codes), rows, channels,
                        static_cast<float>(softcap)};
  TORCH_CHECK(query_heads == group * heads, query_heads, " query heads do not share ", heads, " KV heads evenly");
  TORCH_CHECK(stop <= key_codes.size(1) && stop <= value_codes.size(1), "stop ", stop, " is past the codes held");
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

}  // namespace
}  // namespace effcli

TORCH_LIBRARY(effcli_kv_pq, library) {
  library.def("planes() -> int", [] { return effcli::kPlanes; });
  library.def("integers() -> bool", [] { return effcli::kIntegers; });
  library.def(
      "attend(Tensor query, Tensor key_codes, Tensor value_codes, Tensor[] keys, Tensor[] values, Tensor[] rope, "
      "Tensor start, int stop, Tensor offset, float scale, float softcap) -> (Tensor, Tensor)");
  library.def(
      "encode(Tensor x, Tensor tables, Tensor order, Tensor first, Tensor weight, Tensor mean, Tensor basis, "
      "Tensor gains, Tensor offsets, Tensor scale, Tensor pairs, Tensor lengths) -> Tensor");
}

TORCH_LIBRARY_IMPL(effcli_kv_pq, CPU, library) {
  library.impl("attend", &effcli::attend);
  library.impl("encode", &effcli::encode);
}
