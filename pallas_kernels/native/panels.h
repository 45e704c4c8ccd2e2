// Products of activations and weights stored in panels, shared by the matmul kernels.
//
// A panel holds kWidth output columns of a weight, one step of the contraction axis after another:
//
//      w [K, N]                      panels [ceil(N / kWidth), steps, kWidth, group]
//      |<- kWidth ->|<- kWidth ->|   so that a tile reads one unbroken stream of memory
//
// A step holds one value per column. Where the CPU multiplies pairs of bfloat16 values (AVX512_BF16), it holds two for
// bfloat16 and int8 weights; activations are then rounded to bfloat16, and sums stay in float32.
//
// Every output is one chain of multiply-adds over the steps, regardless of the tile, the thread and the number of rows.
// The result of a row is therefore bit-identical whichever rows it is batched with.
#pragma once

#include <string>

#include "common.h"

namespace pallas_kernels {
namespace {

// Accumulators use kMaxRows * kVecs of the 32 (AVX-512, NEON) or 16 vector registers; the rest hold a row of the panel.
#if defined(__AVX512F__)
constexpr int kVecs = 2, kMaxRows = 14;
#elif defined(__aarch64__)
constexpr int kVecs = 4, kMaxRows = 6;
#else
constexpr int kVecs = 2, kMaxRows = 6;
#endif
constexpr int kWidth = kVecs * kLanes;
// Steps of a panel processed in one pass: 2048 * 32 floats are 256 KB, which fits in part of the L2 cache.
constexpr int64_t kDepth = 2048;
// Bytes of activations that one work item reads per panel: they should stay in the L2 or L3 cache.
constexpr int64_t kChunkBytes = 1 << 20;
// Bytes of short panels that a thread takes at once when there is one row.
constexpr int64_t kRunBytes = 1 << 16;
// How far a single tile prefetches in its own panel: one memory page, where the hardware prefetcher stops.
constexpr int64_t kNearBytes = 4096;

// ---- storage types ---------------------------------------------------------------------------------------------
//
// A storage type defines how kLanes columns of a step are loaded into a register (`get`), how they are multiplied by a
// factor, i.e. the activations of one row and step (`multiply_add`), and which storage type a panel is unpacked to when
// several row blocks share it (`Wide`).

struct Float32 {
  using Element = float;
  using Factor = float;
  using Wide = Float32;
  static constexpr int kGroup = 1;
  static KERNEL_INLINE Vec get(const float* p) { return load(p); }
  static KERNEL_INLINE Vec multiply_add(Vec sum, float x, Vec row) { return splat(x) * row + sum; }
  static void put(float* p, Vec row) { store(p, row); }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

struct BFloat16 {
  using Element = uint16_t;
  using Factor = uint32_t;  // two adjacent values along the contraction axis
  using Wide = BFloat16;
  static constexpr int kGroup = 2;
  static KERNEL_INLINE __m512i get(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static KERNEL_INLINE Vec multiply_add(Vec sum, uint32_t x, __m512i row) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
  }
  static void put(uint16_t* p, __m512i row) { _mm512_storeu_si512(p, row); }
};

struct Int8 {
  using Element = int8_t;
  using Factor = uint32_t;
  using Wide = BFloat16;  // exact: int8 has no more significant bits than bfloat16
  static constexpr int kGroup = 2;
  static KERNEL_INLINE __m512i get(const int8_t* p) {
    return (__m512i)_mm512_cvtne2ps_pbh(load_int8(p + kLanes), load_int8(p));
  }
  static KERNEL_INLINE Vec multiply_add(Vec sum, uint32_t x, __m512i row) {
    return BFloat16::multiply_add(sum, x, row);
  }
};

#else

struct BFloat16 {
  using Element = uint16_t;
  using Factor = float;
  using Wide = Float32;
  static constexpr int kGroup = 1;
  static KERNEL_INLINE Vec get(const uint16_t* p) { return load_bfloat16(p); }
  static KERNEL_INLINE Vec multiply_add(Vec sum, float x, Vec row) { return Float32::multiply_add(sum, x, row); }
};

struct Int8 {
  using Element = int8_t;
  using Factor = float;
  using Wide = Float32;
  static constexpr int kGroup = 1;
  static KERNEL_INLINE Vec get(const int8_t* p) { return load_int8(p); }
  static KERNEL_INLINE Vec multiply_add(Vec sum, float x, Vec row) { return Float32::multiply_add(sum, x, row); }
};

#endif

// The number of steps of a contraction over `depth` values.
template <class Weight>
constexpr int64_t num_steps(int64_t depth) {
  return (depth + Weight::kGroup - 1) / Weight::kGroup;
}

// The number of elements in one step of a panel.
template <class Weight>
constexpr int64_t kStep = kWidth * Weight::kGroup;

// Unpacks `steps` steps of a panel to the storage type `Weight::Wide`.
template <class Weight>
void widen(const typename Weight::Element* from, int64_t steps, typename Weight::Wide::Element* to) {
  for (int64_t i = 0; i < steps * kStep<Weight>; i += kLanes * Weight::kGroup) Weight::Wide::put(to + i, Weight::get(from + i));
}

// ---- tiles -----------------------------------------------------------------------------------------------------

// sums[Rows][kWidth] (+)= a @ b, with factors a [steps, Rows] and a part b [steps, kWidth] of a panel. `ahead` points to
// memory that will be needed soon; each step prefetches `ahead_step` bytes of it into the cache.
template <int Rows, class Weight>
void tile(int64_t steps, const typename Weight::Factor* a, const typename Weight::Element* b, float* sums, bool first,
          const char* ahead, int64_t ahead_step) {
  Vec acc[Rows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = first ? Vec{} : load(sums + r * kWidth + v * kLanes);
  }
  for (int64_t k = 0; k < steps; ++k) {
    decltype(Weight::get(b)) row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = Weight::get(b + v * kLanes * Weight::kGroup);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Weight::multiply_add(acc[r][v], a[r], row[v]);
    }
    // Two cache lines, since a step of an AVX-512 panel is at most that long.
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 64);
    ahead += ahead_step;
    a += Rows;
    b += kStep<Weight>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(sums + r * kWidth + v * kLanes, acc[r][v]);
  }
}

template <class Weight>
using Tile = void (*)(int64_t, const typename Weight::Factor*, const typename Weight::Element*, float*, bool, const char*,
                      int64_t);

template <class Weight, size_t... I>
Tile<Weight> tile_among(int64_t rows, std::index_sequence<I...>) {
  static constexpr Tile<Weight> table[] = {tile<I + 1, Weight>...};
  return table[rows - 1];
}

// Returns the tile function for `rows` rows, 1 to kMaxRows.
template <class Weight>
Tile<Weight> tile_for(int64_t rows) {
  return tile_among<Weight>(rows, std::make_index_sequence<kMaxRows>{});
}

// Weights of one storage type in panels [num_panels, steps, kWidth, group].
template <class Storage>
struct Dense {
  using Element = typename Storage::Element;
  using Wide = typename Storage::Wide;
  using Factor = typename Storage::Factor;
  static constexpr int kGroup = Storage::kGroup;
  static constexpr bool kPairs = false;

  const Element* data;
  int64_t steps;

  int64_t panel_bytes() const { return steps * step_bytes(); }
  int64_t step_bytes() const { return kStep<Storage> * static_cast<int64_t>(sizeof(Element)); }
  const char* part(int64_t panel, int64_t step) const {
    return reinterpret_cast<const char*>(data) + panel * panel_bytes() + step * step_bytes();
  }

  // With several row blocks, unpacking a panel once pays off. With one, elements are widened as they are loaded.
  bool widens(int64_t num_blocks, int64_t) const { return !std::is_same_v<Storage, Wide> && num_blocks > 1; }

  void widen(const char* from, int64_t num_steps, typename Wide::Element* to) const {
    if constexpr (!std::is_same_v<Storage, Wide>) {
      pallas_kernels::widen<Storage>(reinterpret_cast<const Element*>(from), num_steps, to);
    }
  }

  void multiply(int64_t rows, int64_t num_steps, const Factor* a, const char* b, float* sums, bool first,
                const char* ahead, int64_t ahead_step) const {
    tile_for<Storage>(rows)(num_steps, a, reinterpret_cast<const Element*>(b), sums, first, ahead, ahead_step);
  }
};

// ---- activations -----------------------------------------------------------------------------------------------

// The factors of kLanes steps starting at x. Only `left` values exist; the rest are zero.
template <class Weight>
KERNEL_INLINE Vec factors(const float* x, int64_t left) {
  if constexpr (Weight::kGroup == 1) {
    if (left >= kLanes) return load(x);
    Vec v{};
    for (int i = 0; i < left; ++i) v[i] = x[i];
    return v;
  } else {
#if defined(__AVX512BF16__)
    const auto mask = [](int64_t n) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(n, 0, kLanes)) - 1); };
    const Vec low = _mm512_maskz_loadu_ps(mask(left), x), high = _mm512_maskz_loadu_ps(mask(left - kLanes), x + kLanes);
    return (Vec)_mm512_cvtne2ps_pbh(high, low);
#endif
  }
}

// out[k * rows + r] = the factor of row r at step k, for at most kMaxRows rows of x [rows, depth].
template <class Weight>
void pack_rows(const float* x, int64_t rows, int64_t depth, typename Weight::Factor* out) {
  constexpr int kGroups = (kMaxRows + kLanes - 1) / kLanes;
  static_assert(sizeof(*out) == sizeof(float), "a factor fills a lane");
  const int64_t steps = num_steps<Weight>(depth);
  float* to = reinterpret_cast<float*>(out);
  float* const end = to + rows * steps;
  for (int64_t step = 0; step < steps; step += kLanes) {
    const int64_t at = step * Weight::kGroup;
    const int count = static_cast<int>(std::min<int64_t>(kLanes, steps - step));
    Vec columns[kGroups][kLanes];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t r = g * kLanes + i;
        columns[g][i] = r < rows ? factors<Weight>(x + r * depth + at, depth - at) : Vec{};
      }
      transpose(columns[g]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i, to += rows) {
      if (i >= count) break;
      for (int g = 0; g * kLanes < rows; ++g) {
        // A full vector store spills into the next step, which then overwrites the excess. Past the last step, another
        // thread may be writing, so only the valid part is stored.
        float* lane = to + g * kLanes;
        if (lane + kLanes <= end) {
          store(lane, columns[g][i]);
        } else {
          std::memcpy(lane, &columns[g][i], std::min<int64_t>(end - lane, kLanes) * sizeof(float));
        }
      }
    }
  }
}

// ---- results ---------------------------------------------------------------------------------------------------

// Writes the sums of a tile to y[row, columns of the panel].
struct Output {
  const float* residual;  // like y, or null
  float* y;               // [M, n]
  int64_t n;
  bool gated;  // a panel holds kWidth / 2 gate columns, then the matching up columns

  // `scales` holds one scale per column of the panel, or is null.
  void write(int64_t row, int64_t panel, const float* sums, const float* scales) const {
    const int vecs = gated ? kVecs / 2 : kVecs;
    for (int v = 0; v < vecs; ++v) {
      const int64_t column = (panel * vecs + v) * kLanes;
      const int64_t valid = std::min<int64_t>(n - column, kLanes);
      if (valid <= 0) return;
      Vec value = scaled(sums, scales, v);
      if (gated) value = silu(value) * scaled(sums, scales, v + vecs);
      const int64_t at = row * n + column;
      if (valid == kLanes) {
        if (residual) value += load(residual + at);
        store(y + at, value);
      } else {
        for (int64_t i = 0; i < valid; ++i) y[at + i] = residual ? value[i] + residual[at + i] : value[i];
      }
    }
  }

  static KERNEL_INLINE Vec scaled(const float* sums, const float* scales, int v) {
    const Vec sum = load(sums + v * kLanes);
    return scales ? sum * load(scales + v * kLanes) : sum;
  }
};

// Calls f. Returns an error that names `kernel` if it runs out of memory.
template <class F>
ffi::Error with_memory(const char* kernel, F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(kernel) + ": out of memory for packed activations");
  }
}

// Calls f with the storage type of `type`. Returns an error that names `kernel` if the type is not supported.
template <class F>
ffi::Error with_storage(ffi::DataType type, const char* kernel, F&& f) {
  return with_memory(kernel, [&] {
    switch (type) {
      case ffi::F32: return f(Float32{});
      case ffi::BF16: return f(BFloat16{});
      case ffi::S8: return f(Int8{});
      default: return ffi::Error::InvalidArgument(std::string(kernel) + ": weights must be float32, bfloat16 or int8");
    }
  });
}

}  // namespace
}  // namespace pallas_kernels
