// From codes to channels of vectors, a block of tokens at a time.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "cpu_vectors.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define TABLES_IN_REGISTERS
#include <immintrin.h>
#endif

namespace effcli {

using at::Tensor;

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

struct Side {  // of keys or of values; see Tables in cpu_kernels.py
  explicit Side(const std::vector<Tensor>& given)
      : tables(given[0]), entries(given[1]), gain(given[2]), means(given[3]), inverses(given[4]), offsets(given[5]) {
    TORCH_CHECK(tables.is_contiguous() && tables.dim() == 4 && tables.nbytes() == tables.size(0) * count() * kEntry);
    TORCH_CHECK(entries.is_contiguous() && entries.dim() == 3 && entries.scalar_type() == at::kInt);
    TORCH_CHECK(offsets.is_contiguous() && offsets.numel() == heads() + 1 && offsets.scalar_type() == at::kInt);
  }
  int64_t heads() const { return tables.size(0); }
  int64_t first(int64_t head) const { return offsets.const_data_ptr<int32_t>()[head]; }  // of a token's codes
  int64_t width(int64_t head) const { return first(head + 1) - first(head); }
  int64_t widest() const {
    int64_t most = 0;
    for (int64_t head = 0; head < heads(); head++) {
      most = std::max(most, width(head));
    }
    return most;
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

  const Tensor tables, entries, gain, means, inverses, offsets;
};

struct Codes {
  explicit Codes(const Tensor& codes) : data(codes.const_data_ptr<uint8_t>()), tensor(codes) {
    TORCH_CHECK(codes.dim() == 3 && codes.stride(2) == 1, "codes have shape (B, T, codes), bytes side by side");
  }
  const uint8_t* at(int64_t row, int64_t slot) const {
    return data + row * tensor.stride(0) + slot * tensor.stride(1);
  }
  const uint8_t* data;
  const Tensor tensor;
};

// What one thread works in: a block of decoded vectors and its codes.
struct Workspace {
  Workspace(int64_t channels, int64_t widest)
      : channels(channels), vectors(channels + 1), turned(channels), copy(kBlock * widest), codes(widest * kBlock) {}
  const int64_t channels;
  std::vector<Column> vectors;  // [channels + 1]: the last is where missing second channels go
  std::vector<Column> turned;
  Column added[2];  // residual centroids
  std::vector<uint8_t> copy;
  std::vector<uint8_t> codes;  // [codes][kBlock]
};

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

inline void transpose(const uint8_t* from, int64_t stride, int64_t width, uint8_t* to) {
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

// Centroids of tokens [first, last) of the block at a slot into work.vectors, and their gains; the other tokens' are
// unspecified.
inline void decode(const Side& side, const Codes& all, int64_t batch, int64_t head, int64_t slot, int64_t first,
                   int64_t last, Workspace& work, Column& gain) {
  const int64_t width = side.width(head);
  const uint8_t* codes = all.at(batch, slot) + side.first(head);
  int64_t stride = all.tensor.stride(1);
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
    const uint8_t* own = work.codes.data() + entry[0] * kBlock;
    if (entry[1] <= work.channels) {
      look_up(table, own, work.vectors[entry[1]], work.vectors[entry[2]]);
      continue;
    }
    look_up(table, own, work.added[0], work.added[1]);
    for (int64_t which = 0; which < 2 && entry[1 + which] > work.channels; which++) {
      Column& refined = work.vectors[entry[1 + which] - work.channels - 1];
      for (int i = 0; i < kVectors; i++) {
        refined.v[i] += work.added[which].v[i];
      }
    }
  }
  if (const float* gains = side.gains(head)) {
    const uint8_t* chosen = work.codes.data() + (width - 1) * kBlock;
    for (int64_t position = 0; position < kBlock; position++) {
      const int64_t token = token_at(position);
      gain.v[token / kLanes][token % kLanes] = gains[chosen[position]];
    }
  }
}

}  // namespace effcli
