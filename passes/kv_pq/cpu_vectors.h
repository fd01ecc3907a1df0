// What the CPU operator computes with: one channel of a block of 64 tokens, in the compiler's own vectors.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace effcli {

constexpr int64_t kCentroids = 256;
constexpr int64_t kBlock = 64;  // tokens; ROPE_BLOCK in cpu_kernels.py
constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = kBlock / kLanes;
constexpr float kLongest = 2047;  // of a vector in integers of twelve bits; LONGEST in cpu_kernels.py
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

// out[d] = sum over c of matrix[c][d] in[c]
inline void multiply(const Column* in, const float* matrix, int64_t channels, Column* out) {
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

}  // namespace effcli
