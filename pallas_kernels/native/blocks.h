// Weights in blocks: a few bits per value, and one scale, perhaps also an offset, for `size` consecutive inputs of a column.
//
//      weight = scale * q + offset, in float32
//
// Numbers q are integers, small floats or indices of a table. Without stored offsets, an integer of 4 bits stands for q - 8; integers of 8 bits
// are signed. Products with a weight are those with the float32 (or rounded bfloat16) matrix that it stands for, bit for
// bit: only the form in memory differs.
//
// A panel holds the blocks of its kWidth columns one after another:
//
//      scales [kWidth], offsets [kWidth] if stored, words uint32 [size * bits / 32, kWidth]
//
// A word holds consecutive inputs of one column, the first in the lowest bits.
#pragma once

#include "panels.h"

namespace pallas_kernels {
namespace {

// Scales: float, or these.
struct Half {
  uint16_t bits;
};
struct Exponent {
  uint8_t bits;  // of a power of two, as in float32
};

KERNEL_INLINE Vec as_floats(IntVec bits) { return (Vec)bits; }
KERNEL_INLINE IntVec as_ints(Vec v) { return (IntVec)v; }

KERNEL_INLINE Vec load_scales(const float* p) { return load(p); }

// float16[kLanes] -> float[kLanes], exact.
KERNEL_INLINE Vec load_scales(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t half = p[i].bits, exponent = half >> 10 & 31, fraction = half & 1023;
    // A subnormal number is fraction * 2^-24; the others get float32's bias. Infinity and NaN are not valid scales.
    const uint32_t word = (exponent + 112) << 23 | fraction << 13;
    float x;
    std::memcpy(&x, &word, sizeof x);
    x = exponent ? x : static_cast<float>(fraction) * 5.9604644775390625e-8f;
    v[i] = half >> 15 ? -x : x;
  }
  return v;
#endif
}

// float[kLanes] of exponents, exact.
KERNEL_INLINE Vec load_scales(const Exponent* p) {
  IntVec exponents;
#if defined(__AVX512F__)
  exponents = (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  exponents = (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  for (int i = 0; i < kLanes; ++i) exponents[i] = p[i].bits;
#endif
  // The smallest one is a subnormal number.
  return as_floats((exponents << 23) | ((exponents == 0) & 0x400000));
}

// ---- numbers -----------------------------------------------------------------------------------------------------
//
// A type of number defines how number j of kLanes words becomes a float (`unpack`), and what it is counted from without
// stored offsets (`kMiddle`). It may be greater by a constant, `bias(place(j))`, with one of kPlaces values.

struct Unbiased {
  static constexpr int kPlaces = 1;
  static constexpr int place(int) { return 0; }
  static constexpr float bias(int) { return 0; }
};

// Whole numbers of less than 16 bits are turned into floats by an exponent written above them: bits at `bit` and above of the fraction
// of 2^(23 - bit) add a whole number to it. Two bit operations are cheaper than a shift and a conversion.
KERNEL_INLINE Vec above_power(IntVec words, int mask, int bit) {
  return as_floats((words & (mask << bit)) | ((127 + 23 - bit) << 23));
}
constexpr float power_above(int bit) { return static_cast<float>(1 << (23 - bit)); }

#if defined(__AVX512F__)
struct UInt4 : Unbiased {
  static constexpr int kBits = 4;
  static constexpr float kMiddle = 8;
  static KERNEL_INLINE Vec unpack(IntVec words, int j) {
    // The table lookup ignores all but the lowest four bits, and returns the value as a float.
    const Vec table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return _mm512_permutexvar_ps((__m512i)(words >> (4 * j)), table);
  }
};

struct SInt8 : Unbiased {
  static constexpr int kBits = 8;
  static constexpr float kMiddle = 0;
  static KERNEL_INLINE Vec unpack(IntVec words, int j) {
    return __builtin_convertvector((words << (24 - 8 * j)) >> 24, Vec);
  }
};
#else
// Biases have so few bits that their products with float16 scales are exact.
struct UInt4 {
  static constexpr int kBits = 4;
  static constexpr float kMiddle = 8;
  static constexpr int kPlaces = 3;
  // Two shifts bring all eight numbers to bits 8, 12 and 16.
  static constexpr int place(int j) { return j < 2 ? j : (j - 2) % 3; }
  static constexpr float bias(int place) { return power_above(8 + 4 * place); }
  static KERNEL_INLINE Vec unpack(IntVec words, int j) {
    return above_power(j < 2 ? words << 8 : j < 5 ? words : words >> 12, 15, 8 + 4 * place(j));
  }
};

struct SInt8 {
  static constexpr int kBits = 8;
  static constexpr float kMiddle = 0;
  static constexpr int kPlaces = 1;
  static constexpr int place(int) { return 0; }
  static constexpr float bias(int) { return power_above(8) + 128; }
  static KERNEL_INLINE Vec unpack(IntVec words, int j) {
    words ^= static_cast<int32_t>(0x80808080);  // from -128 on, it becomes a number without sign
    return above_power(j == 0 ? words << 8 : words >> (8 * (j - 1)), 255, 8);
  }
};
#endif

// A sign, two bits of exponent and one of fraction (E2M1).
constexpr float kFloat4[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
// Quantiles of a normal distribution; also in blocks.py.
constexpr float kNormalFloat4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Indices of a table.
template <const float (&Table)[16]>
struct Coded4 : Unbiased {
  static constexpr int kBits = 4;
  static constexpr float kMiddle = 0;
  static KERNEL_INLINE Vec unpack(IntVec words, int j) {
    const IntVec codes = words >> (4 * j);
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps((__m512i)codes, load(Table));  // ignores all but the lowest four bits
#elif defined(__AVX2__)
    // The lookups ignore all but the lowest three bits; the fourth, as the sign, chooses between them.
    const __m256 low = _mm256_permutevar8x32_ps(load(Table), (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps(load(Table + 8), (__m256i)codes);
    return _mm256_blendv_ps(low, high, (__m256)(words << (28 - 4 * j)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(Table);
    const uint8x16x4_t table = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    const IntVec four_bytes = (codes & 15) * 0x04040404 + 0x03020100;
    return (Vec)vqtbl4q_u8(table, (uint8x16_t)four_bytes);
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = Table[codes[i] & 15];
    return v;
#endif
  }
};

using Float4 = Coded4<kFloat4>;
using NormalFloat4 = Coded4<kNormalFloat4>;

// A sign, four bits of exponent and three of fraction (E4M3). NaN is not a valid weight.
struct Float8 : Unbiased {
  static constexpr int kBits = 8;
  static constexpr float kMiddle = 0;
  static KERNEL_INLINE Vec unpack(IntVec words, int j) {
    const IntVec sign = (words << (24 - 8 * j)) & INT32_MIN, code = (words >> (8 * j)) & 127;
    const Vec normal = as_floats((code << 20) + (120 << 23));
    const Vec subnormal = __builtin_convertvector(code, Vec) * 0.001953125f;  // 2^-9
    return as_floats((code < 8 ? as_ints(subnormal) : as_ints(normal)) | sign);
  }
};

// One step of a panel of float32 or bfloat16 values: those of one input, or of two.
KERNEL_INLINE Vec as_step(Float32, const Vec* inputs) { return inputs[0]; }
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
KERNEL_INLINE __m512i as_step(BFloat16, const Vec* inputs) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                               21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(inputs[1], inputs[0]));
}
#endif

// How blocks are read. `Arithmetic` is the storage type whose products they take.
template <class Number, bool Offsets, class Scale, class Arithmetic>
struct BlockFormat {
  using Wide = Arithmetic;
  using Factor = typename Wide::Factor;
  static constexpr int kGroup = Wide::kGroup;
  static constexpr int kPerWord = 32 / Number::kBits;
  // Whether the product of a scale and a bias is exact, so that the bias is subtracted along with the offset.
  static constexpr bool kFolds = std::is_same_v<Scale, Half> && !Offsets;
  static constexpr int kOffsets = kFolds ? Number::kPlaces : 1;
  static constexpr bool kAdds = Offsets || Number::kMiddle != 0 || (kFolds && Number::bias(0) != 0);
  static constexpr int64_t kScaleBytes = kWidth * static_cast<int64_t>(sizeof(Scale)) * (1 + Offsets);
  static constexpr int64_t kWordBytes = kWidth * 4;

  static int64_t block_bytes(int64_t size) { return kScaleBytes + size / kPerWord * kWordBytes; }

  // Calls f(j, v, row) for each step j of a word and vector v of the columns of `Panels` panels, `panel_bytes` apart, with
  // the values as `Wide` has them, and next() after each word.
  template <int Panels, class F, class Next>
  static KERNEL_INLINE void for_each_step(int64_t size, int64_t steps, const char* from, int64_t panel_bytes, F&& f,
                                          Next&& next) {
    constexpr int kAll = Panels * kVecs;
    for (int64_t block = 0; block < steps * kGroup / size; ++block) {
      Vec scale[kAll], offset[kOffsets][kAll];
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) {
        const Scale* scales = reinterpret_cast<const Scale*>(from + v / kVecs * panel_bytes) + v % kVecs * kLanes;
        scale[v] = load_scales(scales);
#pragma GCC unroll 4
        for (int p = 0; p < kOffsets; ++p) {
          const float middle = Number::kMiddle + (kFolds ? Number::bias(p) : 0);
          offset[p][v] = Offsets ? load_scales(scales + kWidth) : scale[v] * -middle;
        }
      }
      from += kScaleBytes;
      for (int64_t word = 0; word < size / kPerWord; ++word, from += kWordBytes) {
        // Not memcpy, which GCC does in halves of an AVX2 register by way of the stack: it took a third of the time.
        IntVec words[kAll];
#pragma GCC unroll 8
        for (int v = 0; v < kAll; ++v) {
          words[v] = reinterpret_cast<const UnalignedIntVec*>(from + v / kVecs * panel_bytes)[v % kVecs];
        }
#pragma GCC unroll 8
        for (int v = 0; v < kAll; ++v) {
#pragma GCC unroll 8
          for (int j = 0; j < kPerWord; j += kGroup) {
            Vec inputs[kGroup];
#pragma GCC unroll 2
            for (int i = 0; i < kGroup; ++i) {
              Vec q = Number::unpack(words[v], j + i);
              const int place = Number::place(j + i);
              if (!kFolds && Number::bias(place) != 0) q -= Number::bias(place);
              inputs[i] = kAdds ? scale[v] * q + offset[kFolds ? place : 0][v] : scale[v] * q;
            }
            f(j / kGroup, v, as_step(Wide{}, inputs));
          }
        }
        next();
      }
    }
  }

  static void widen(int64_t size, int64_t steps, const char* from, typename Wide::Element* to) {
    for_each_step<1>(
        size, steps, from, 0, [&](int j, int v, auto row) { Wide::put(to + (j * kVecs + v) * kLanes * kGroup, row); },
        [&] { to += kPerWord / kGroup * kStep<Wide>; });
  }

  // As `tile` in panels.h, with the columns of `Panels` panels: sums [Rows, Panels, kWidth].
  template <int Rows, int Panels>
  static void tile(int64_t size, int64_t steps, const Factor* a, const char* b, int64_t panel_bytes, float* sums, bool first,
                   const char* ahead, int64_t ahead_step) {
    constexpr int kAll = Panels * kVecs;
    Vec acc[Rows][kAll];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) acc[r][v] = first ? Vec{} : load(sums + (r * kAll + v) * kLanes);
    }
    ahead_step *= kPerWord / kGroup;
    for_each_step<Panels>(
        size, steps, b, panel_bytes,
        [&](int j, int v, auto row) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) acc[r][v] = Wide::multiply_add(acc[r][v], a[j * Rows + r], row);
        },
        [&]() __attribute__((always_inline)) {
          for (int p = 0; p < Panels; ++p) {
            __builtin_prefetch(ahead + p * panel_bytes);
            __builtin_prefetch(ahead + p * panel_bytes + 64);
          }
          ahead += ahead_step;
          a += kPerWord / kGroup * Rows;
        });
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) store(sums + (r * kAll + v) * kLanes, acc[r][v]);
    }
  }
};

// Weights with the interface of `Dense` in panels.h, in blocks of any format.
template <class Arithmetic>
struct Blocks {
  using Wide = Arithmetic;
  using Factor = typename Wide::Factor;
  static constexpr int kGroup = Wide::kGroup;
  // Unpacking costs more than reading, so with more rows it is done once for all of them.
  static constexpr int kDirectRows = 4;
  static constexpr bool kPairs = true;

  const char* data;
  int64_t size;         // inputs of a block
  int64_t depth;        // inputs of a panel, a multiple of `size`
  int64_t block_bytes;  // 0: there are no blocks of this format and size
  void (*widen_panel)(int64_t, int64_t, const char*, typename Wide::Element*);
  using Tile = void (*)(int64_t, int64_t, const Factor*, const char*, int64_t, float*, bool, const char*, int64_t);
  Tile tiles[kDirectRows];
  Tile pair;  // one row, two panels

  // The numbers of the formats are also in blocks.py.
  Blocks(int64_t format, const void* data, int64_t size, int64_t depth)
      : data(static_cast<const char*>(data)), size(size), depth(depth), block_bytes(0) {
    if (size <= 0 || kDepth % size) return;
    switch (format) {
      case 0: use<BlockFormat<UInt4, false, Half, Wide>>(); break;
      case 1: use<BlockFormat<UInt4, true, Half, Wide>>(); break;
      case 2: use<BlockFormat<UInt4, true, float, Wide>>(); break;
      case 3: use<BlockFormat<SInt8, false, Half, Wide>>(); break;
      case 4: use<BlockFormat<SInt8, false, float, Wide>>(); break;
      case 5: use<BlockFormat<SInt8, true, float, Wide>>(); break;
      case 6: use<BlockFormat<Float4, false, Exponent, Wide>>(); break;
      case 7: use<BlockFormat<Float4, false, float, Wide>>(); break;
      case 8: use<BlockFormat<Float8, false, float, Wide>>(); break;
      case 9: use<BlockFormat<NormalFloat4, false, float, Wide>>(); break;
    }
  }

  template <class Format>
  void use() {
    if (size % Format::kPerWord) return;
    block_bytes = Format::block_bytes(size);
    widen_panel = Format::widen;
    tiles[0] = Format::template tile<1, 1>;
    tiles[1] = Format::template tile<2, 1>;
    tiles[2] = Format::template tile<3, 1>;
    tiles[3] = Format::template tile<4, 1>;
    pair = Format::template tile<1, 2>;
  }

  // Whether an array with these axes within a panel holds such blocks.
  bool stored_as(int64_t num_blocks, int64_t bytes, int64_t one) const {
    return block_bytes && depth % size == 0 && num_blocks == depth / size && bytes == block_bytes && one == 1;
  }
  int64_t panel_bytes() const { return depth / size * block_bytes; }
  int64_t step_bytes() const { return block_bytes * kGroup / size; }
  const char* part(int64_t panel, int64_t step) const {
    return data + panel * panel_bytes() + step * kGroup / size * block_bytes;
  }
  bool widens(int64_t num_blocks, int64_t rows) const { return num_blocks > 1 || rows > kDirectRows; }
  void widen(const char* from, int64_t steps, typename Wide::Element* to) const { widen_panel(size, steps, from, to); }
  void multiply(int64_t rows, int64_t steps, const Factor* a, const char* b, float* sums, bool first, const char* ahead,
                int64_t ahead_step) const {
    tiles[rows - 1](size, steps, a, b, 0, sums, first, ahead, ahead_step);
  }
  // One row with the panel at b, and the next one if `both`. Prefetches the panels after them.
  void multiply_row(int64_t steps, const Factor* a, const char* b, float* sums, bool first, bool both) const {
    (both ? pair : tiles[0])(size, steps, a, b, panel_bytes(), sums, first, b + 2 * panel_bytes(), step_bytes());
  }
};

}  // namespace
}  // namespace pallas_kernels
