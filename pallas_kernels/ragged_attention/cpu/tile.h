// Building blocks of CPU attention: tile sizes, element types of the cache, and the micro-kernel.
#pragma once

#include <limits>

#include "common.h"

namespace pallas_kernels {
namespace {

constexpr int kTile = 64;      // keys per tile; their transpose (16 KB at D = 64) shares the L1 cache with the values
constexpr int kSegment = 256;  // keys per segment, the smallest part of a context that one thread processes
constexpr int kMaxRows = 192;  // query rows per unit: enough to amortize the transpose, few enough for the L2 cache
constexpr int kGroups = kTile / kLanes;

// A micro-kernel has kBlockRows x kBlockVecs vector accumulators, which leaves registers for the operands.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVecs = 4;  // 32 registers
#else
constexpr int kBlockVecs = 2;  // 16 registers
#endif
static_assert(kGroups % kBlockVecs == 0, "a tile must be a whole number of micro-kernels");

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- element types of the cache --------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

KERNEL_INLINE Vec load_as_float(const float* p) { return load(p); }
KERNEL_INLINE Vec load_as_float(const BFloat16* p) {
  const IntVec wide = __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), IntVec) << 16;
  Vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
KERNEL_INLINE float to_float(float x) { return x; }
KERNEL_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
void convert(const float* from, float* to, int n) { std::memcpy(to, from, n * sizeof(float)); }
void convert(const float* from, BFloat16* to, int n) {
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    // Rounds to nearest, ties to even. A NaN keeps its sign and becomes quiet.
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i].bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

// ---- vector helpers --------------------------------------------------------------------------------------------

template <int Step, size_t... I>
KERNEL_INLINE Vec swap_lanes(Vec v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int(I ^ Step)...);
}

KERNEL_INLINE float largest(Vec v) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  if constexpr (kLanes > 8) v = max(v, swap_lanes<8>(v, lanes));
  if constexpr (kLanes > 4) v = max(v, swap_lanes<4>(v, lanes));
  v = max(v, swap_lanes<2>(v, lanes));
  v = max(v, swap_lanes<1>(v, lanes));
  return v[0];
}

KERNEL_INLINE float exp_of(float x) { return exp(splat(x))[0]; }

KERNEL_INLINE Vec tanh_of(Vec x) {
  const Vec size = max(x, -x);
  const Vec e = exp(-2.0f * size);
  const Vec y = (1.0f - e) / (1.0f + e);
  return x < Vec{} ? -y : y;
}

KERNEL_INLINE Vec lane_numbers() {
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// ---- micro-kernel ----------------------------------------------------------------------------------------------

// Rows of b at a constant distance.
struct Strided {
  const float* start;
  int64_t stride;

  const float* row(int i) const { return start + i * stride; }
  template <int V>
  KERNEL_INLINE void prefetch(int) const {}
};

// Rows of b anywhere in memory, from column `offset` on. Row i of `ahead` is prefetched while row i is multiplied.
struct Scattered {
  const float* const* rows;
  int64_t offset;
  const void* const* ahead;
  int64_t ahead_offset, ahead_step;  // in bytes: of the first column, and of one vector

  const float* row(int i) const { return rows[i] + offset; }
  template <int V>
  KERNEL_INLINE void prefetch(int i) const {
    const char* from = static_cast<const char*>(ahead[i]) + ahead_offset;
    for (int v = 0; v < V; ++v) __builtin_prefetch(from + v * ahead_step, 0, 2);
  }
};

// c[r, :] += sum over i in [begin, end), in ascending order, of a[r, i] * b.row(i)[:], for R rows and V vectors of
// columns. Not inlined: each shape is compiled once, whatever the cache holds.
template <int R, int V, class Rows>
__attribute__((noinline)) void multiply_add(const float* a, int64_t lda, int begin, int end, Rows b, float* c, int64_t ldc,
                                            bool from_zero) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = from_zero ? Vec{} : load(c + r * ldc + v * kLanes);
  }
  for (int i = begin; i < end; ++i) {
    b.template prefetch<V>(i);
    const float* row = b.row(i);
    Vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(row + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const float x = a[r * lda + i];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x * columns[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
  }
}

// Calls f with the numbers of rows and vectors as compile-time constants.
template <int V, class F>
KERNEL_INLINE void with_rows(int num_rows, F&& f) {
  switch (num_rows) {
    case 1: return f(std::integral_constant<int, 1>(), std::integral_constant<int, V>());
    case 2: return f(std::integral_constant<int, 2>(), std::integral_constant<int, V>());
    case 3: return f(std::integral_constant<int, 3>(), std::integral_constant<int, V>());
    case 4: return f(std::integral_constant<int, 4>(), std::integral_constant<int, V>());
    case 5: return f(std::integral_constant<int, 5>(), std::integral_constant<int, V>());
    default: return f(std::integral_constant<int, 6>(), std::integral_constant<int, V>());
  }
}

template <class F>
KERNEL_INLINE void with_shape(int num_rows, int num_vecs, F&& f) {
  if constexpr (kBlockVecs == 4) {
    if (num_vecs == 4) return with_rows<4>(num_rows, f);
    if (num_vecs == 3) return with_rows<3>(num_rows, f);
  }
  if (num_vecs == 2) return with_rows<2>(num_rows, f);
  return with_rows<1>(num_rows, f);
}

}  // namespace
}  // namespace pallas_kernels
