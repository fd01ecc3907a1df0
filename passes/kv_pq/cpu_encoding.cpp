// The nearest centroids of vectors, 64 tokens at a time. See EncoderTables in cpu_kernels.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define PRODUCTS_OF_INTEGERS
#include <immintrin.h>
#endif

namespace effcli {

using at::Tensor;

#if defined(PRODUCTS_OF_INTEGERS)
extern const bool kIntegers = true;
#else
extern const bool kIntegers = false;
#endif

namespace {

#if defined(PRODUCTS_OF_INTEGERS)

// The nearest centroid of one part of several channels in integers of twelve bits: two operations a centroid and pair of
// channels, where floats take five. Both factors of a product are multiples of 16, so the cost |c|^2 / 2 - x c has eight
// bits free, which hold the centroid's number. Returns false where a vector is too long for that.
//   scale [S]: to integers; pairs [pairs][256]: two channels of -c; lengths [256]: |c|^2 / 2 with the number
bool nearest_in_integers(const Column* const* channels, int64_t count, const float* scale, const int32_t* pairs,
                         const int32_t* lengths, int32_t* chosen) {
  constexpr int kMostPairs = 4;
  const int64_t used = (count + 1) / 2;
  if (used > kMostPairs) {
    return false;
  }
  __m512i x[kMostPairs][kVectors];
  __m512 size[kVectors];
  for (int i = 0; i < kVectors; i++) {
    size[i] = _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < used; pair++) {
    for (int i = 0; i < kVectors; i++) {
      __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t side = 0; side < 2 && 2 * pair + side < count; side++) {
        const int64_t c = 2 * pair + side;
        const __m512 scaled = _mm512_mul_ps((__m512)channels[c]->v[i], _mm512_set1_ps(scale[c]));
        size[i] = _mm512_fmadd_ps(scaled, scaled, size[i]);
        both[side] = _mm512_slli_epi32(_mm512_cvtps_epi32(scaled), 4);
      }
      x[pair][i] = _mm512_or_si512(_mm512_and_si512(both[0], _mm512_set1_epi32(0xffff)),
                                   _mm512_slli_epi32(both[1], 16));
    }
  }
  const __m512 longest = _mm512_set1_ps(kLongest * kLongest);
  for (int i = 0; i < kVectors; i++) {
    if (_mm512_cmp_ps_mask(size[i], longest, _CMP_NLE_UQ)) {  // NaN is too long, too
      return false;
    }
  }
  __m512i least[kVectors];
  for (int i = 0; i < kVectors; i++) {
    least[i] = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  }
  const auto search = [&](auto known) {
    for (int64_t centroid = 0; centroid < kCentroids; centroid++) {
      const __m512i length = _mm512_set1_epi32(lengths[centroid]);
      __m512i cost[kVectors] = {length, length, length, length};
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < known; pair++) {
        const __m512i c = _mm512_set1_epi32(pairs[pair * kCentroids + centroid]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) {
          cost[i] = _mm512_dpwssd_epi32(cost[i], x[pair][i], c);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) {
        least[i] = _mm512_min_epi32(least[i], cost[i]);
      }
    }
  };
  switch (used) {
    case 1: search(std::integral_constant<int64_t, 1>{}); break;
    case 2: search(std::integral_constant<int64_t, 2>{}); break;
    case 3: search(std::integral_constant<int64_t, 3>{}); break;
    default: search(std::integral_constant<int64_t, 4>{});
  }
  for (int i = 0; i < kVectors; i++) {
    _mm512_storeu_si512(chosen + i * kLanes, _mm512_and_si512(least[i], _mm512_set1_epi32(0xff)));
  }
  return true;
}

#else

bool nearest_in_integers(const Column* const*, int64_t, const float*, const int32_t*, const int32_t*, int32_t*) {
  return false;
}

#endif

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

}  // namespace

Tensor encode(const Tensor& x, const Tensor& tables, const Tensor& order, const Tensor& first, const Tensor& weight,
              const Tensor& mean, const Tensor& basis, const Tensor& gains, const Tensor& offsets,
              const Tensor& scale, const Tensor& pairs, const Tensor& lengths) {
  const Tensor given = x.to(at::kFloat);
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2), channels = x.size(3);
  const int32_t* places = offsets.const_data_ptr<int32_t>();
  const int64_t codes = places[heads];
  Tensor out = at::empty({batch, length, codes}, x.options().dtype(at::kByte));
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
      const int64_t parts = places[head + 1] - places[head] - (gains.numel() > 0);
      uint8_t* target = to + (row * length + start) * codes + places[head];
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
      const int32_t* bounds = first.const_data_ptr<int32_t>() + head * first.size(1);
      for (int64_t c = 0; c < channels; c++) {
        members[c] = vectors + channel[c];
      }
      const float* scales = kIntegers ? scale.const_data_ptr<float>() + head * channels : nullptr;
      const int32_t* pair = kIntegers ? pairs.const_data_ptr<int32_t>() + head * pairs.stride(0) : nullptr;
      const int32_t* length_of = kIntegers ? lengths.const_data_ptr<int32_t>() + head * lengths.stride(0) : nullptr;
      for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = bounds[part], count = bounds[part + 1] - begin;
        const Column* const* of = members.data() + begin;
        const int32_t* own_pairs = pair;
        pair += (count + 1) / 2 * kCentroids;
        if (kIntegers && count > 1 &&
            nearest_in_integers(of, count, scales + begin, own_pairs, length_of + part * kCentroids, chosen)) {
          for (int64_t token = 0; token < tokens; token++) {
            target[token * codes + part] = static_cast<uint8_t>(chosen[token]);
          }
          continue;
        }
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

}  // namespace effcli
