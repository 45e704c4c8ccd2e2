// Draws from rows of logits: exponentials and their exact sums, and the tokens of a row among which its draw is decided,
// which are those whose exponential race may be the fastest.
//
// Token i finishes after -log(1 - u[i]) / weight[i], and u <= -log(1 - u), so that weight / u bounds its speed from above.
// Nearly all tokens are excluded by this bound, without a logarithm.
#include <cfloat>
#include <cmath>

#include "common.h"

namespace pallas_kernels {
namespace {

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr int kCandidates = 4;  // a fifth within kTolerance of the fastest has a probability below 1e-18
// More than speeds in float32 deviate from exact ones, whoever computes their logarithm: 64 units in the last place.
constexpr float kTolerance = 1.0f / (1 << 18);

constexpr int kVectors = 4;  // that are computed side by side

// Whether any element is not 0.
KERNEL_INLINE bool any(IntVec v) {
#if defined(__AVX__) && !defined(__AVX512F__)
  return !_mm256_testz_si256(__m256i(v), __m256i(v));
#endif
  uint64_t words[sizeof v / 8], all = 0;
  std::memcpy(words, &v, sizeof v);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// Each word rotated to the left.
template <int kDistance, class Word>
KERNEL_INLINE Word rotate(Word x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Without an instruction for it, a rotation is two shifts, which many CPUs can do only one at a time.
  if constexpr (std::is_same_v<Word, Words>) {
    if constexpr (kDistance == 16 || kDistance == 24) {
      typedef char Bytes __attribute__((vector_size(32)));
      constexpr int k = (32 - kDistance) / 8;
#define PALLAS_WORD(w) 4 * w + k % 4, 4 * w + (k + 1) % 4, 4 * w + (k + 2) % 4, 4 * w + (k + 3) % 4
      constexpr Bytes order = {PALLAS_WORD(0), PALLAS_WORD(1), PALLAS_WORD(2), PALLAS_WORD(3),
                               PALLAS_WORD(0), PALLAS_WORD(1), PALLAS_WORD(2), PALLAS_WORD(3)};
#undef PALLAS_WORD
      return Words(_mm256_shuffle_epi8(__m256i(x), __m256i(order)));
    }
    if constexpr (kDistance == 17) {
      const Words half = rotate<16>(x);
      return (half + half) - Words(IntVec(half) < 0);  // a comparison that holds is -1
    }
    if constexpr (kDistance == 26) {
      const Words most = rotate<24>(x), twice = most + most;
      return (twice + twice) | (most >> 30);
    }
  }
#endif
  return (x << kDistance) | (x >> (32 - kDistance));
}

template <int kDistance, class Word, int N>
KERNEL_INLINE void mix(Word (&high)[N], Word (&low)[N]) {
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    high[v] = high[v] + low[v];
    low[v] = high[v] ^ rotate<kDistance>(low[v]);
  }
}

// The two words of Threefry-2x32 with 20 rounds for [0, counter + distance], where entry v of the results is at the
// distance v * kLanes. Word is a number or a vector.
template <class Word, int N>
KERNEL_INLINE void threefry(uint32_t first, uint32_t second, Word counter, Word (&high)[N], Word (&low)[N]) {
  const uint32_t keys[3] = {first, second, first ^ second ^ 0x1BD11BDAu};
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    low[v] = counter + (second + uint32_t(v * kLanes));
    high[v] = Word{} + first;
  }
#pragma GCC unroll 5
  for (int group = 0; group < 5; ++group) {
    if (group % 2 == 0) {
      mix<13>(high, low), mix<15>(high, low), mix<26>(high, low), mix<6>(high, low);
    } else {
      mix<17>(high, low), mix<29>(high, low), mix<16>(high, low), mix<24>(high, low);
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      high[v] = high[v] + keys[(group + 1) % 3];
      low[v] = low[v] + (keys[(group + 2) % 3] + uint32_t(group) + 1u);
    }
  }
}

// A uniform number in (0, 1), finely spaced near 0.
KERNEL_INLINE float uniform(uint32_t bits) { return (static_cast<float>(bits) + 0.5f) * 0x1p-32f; }

// Tokens that may be the fastest, in ascending order.
struct Race {
  int32_t ids[kCandidates];
  float speeds[kCandidates];
  int count = 0;
  float slowest = 0;  // that can still be the fastest

  void enter(int32_t id, int32_t weight, uint32_t bits) {
    const double u = std::min(uniform(bits), 1 - 0x1p-24f);
    const float speed = static_cast<float>(weight / -std::log1p(-u));
    if (speed < slowest) return;
    slowest = std::max(slowest, speed * (1 - kTolerance));
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      if (speeds[i] < slowest) continue;
      ids[kept] = ids[i];
      speeds[kept++] = speeds[i];
    }
    count = kept;
    if (count == kCandidates) return;
    ids[count] = id;
    speeds[count++] = speed;
  }
};

void race(const int32_t* weights, int64_t length, uint32_t first, uint32_t second, int32_t* ids) {
  Race found;
  Words lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= length; i += kVectors * kLanes) {
    IntVec weight[kVectors], some{};
    for (int v = 0; v < kVectors; ++v) {
      weight[v] = IntVec(*reinterpret_cast<const UnalignedInts*>(weights + i + v * kLanes));
      some |= weight[v];
    }
    if (!any(some)) continue;
    // Each round waits for the one before: several vectors side by side keep the CPU busy.
    Words high[kVectors], low[kVectors];
    threefry(first, second, lanes + uint32_t(i), high, low);
    IntVec may_win[kVectors];
    const float limit = found.slowest * ((1 - kTolerance) * 0x1p-31f);
    some = IntVec{};
    for (int v = 0; v < kVectors; ++v) {
      low[v] = high[v] ^ low[v];
      // Not above u, apart from rounding. CPUs without AVX-512 convert only signed integers.
      const Vec half = __builtin_convertvector(IntVec(low[v] >> 1), Vec);
      may_win[v] = __builtin_convertvector(weight[v], Vec) >= half * limit;
      some |= may_win[v];
    }
    if (!any(some)) continue;
    for (int v = 0; v < kVectors; ++v) {
      if (!any(may_win[v])) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (may_win[v][lane] && weight[v][lane] > 0) {
          found.enter(int32_t(i) + v * kLanes + lane, weight[v][lane], low[v][lane]);
        }
      }
    }
  }
  for (; i < length; ++i) {
    if (weights[i] <= 0) continue;
    uint32_t high[1], low[1];
    threefry(first, second, uint32_t(i), high, low);
    found.enter(int32_t(i), weights[i], high[0] ^ low[0]);
  }
  for (int k = 0; k < kCandidates; ++k) ids[k] = found.count ? found.ids[std::min(k, found.count - 1)] : 0;
}

// The largest value that is not NaN.
float maximum(const float* x, int64_t length) {
  Vec largest = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) largest = max(load(x + i), largest);
  float most = max_element(largest);
  for (; i < length; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// to[i] = e^((x[i] - largest) / divisor). All exponentials are computed here, by one instruction sequence, so that a row has
// the same ones wherever they are needed.
__attribute__((noinline)) void exponentials(const float* x, int64_t length, float largest, float divisor, float* to) {
  const Vec most = splat(largest);
  for (int64_t i = 0; i < length; i += kLanes) {
    const size_t count = static_cast<size_t>(std::min<int64_t>(kLanes, length - i));
    Vec v{};
    if (count == kLanes) {
      v = load(x + i);
    } else {
      std::memcpy(&v, x + i, count * sizeof(float));
    }
    v = v == most ? Vec{} : v - most;  // because inf - inf is NaN
    if (divisor != 1) v = v / divisor;
    v = exp_below_overflow(v);
    if (count == kLanes) {
      store(to + i, v);
    } else {
      std::memcpy(to + i, &v, count * sizeof(float));
    }
  }
}

// The sum of ratios of at most 1, the same to the last bit in whatever order it is computed: each is 39 bits in three digits,
// whose sums are exact.
float exact_sum(const float* ratios, int64_t length) {
  constexpr float kBase = 1 << 13;
  IntVec digits[3] = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    Vec rest = load(ratios + i);
#pragma GCC unroll 3
    for (int place = 0; place < 3; ++place) {
      rest = rest * kBase;
      const IntVec digit = __builtin_convertvector(rest, IntVec);
      digits[place] += digit;
      rest -= __builtin_convertvector(digit, Vec);
    }
  }
  uint32_t sums[3] = {};
  for (int place = 0; place < 3; ++place) {
    for (int lane = 0; lane < kLanes; ++lane) sums[place] += static_cast<uint32_t>(digits[place][lane]);
  }
  for (; i < length; ++i) {
    float rest = ratios[i];
    for (int place = 0; place < 3 && rest <= kBase; ++place) {  // not for NaN
      rest *= kBase;
      const int32_t digit = static_cast<int32_t>(rest);
      sums[place] += static_cast<uint32_t>(digit);
      rest -= static_cast<float>(digit);
    }
  }
  return (static_cast<float>(sums[2]) * 0x1p-39f + static_cast<float>(sums[1]) * 0x1p-26f) + static_cast<float>(sums[0]) * 0x1p-13f;
}

KERNEL_INLINE IntVec round_to_int(Vec v) {
#if defined(__AVX512F__)
  return IntVec(_mm512_cvtps_epi32(__m512(v)));
#elif defined(__AVX__)
  return IntVec(_mm256_cvtps_epi32(__m256(v)));
#elif defined(__SSE2__)
  return IntVec(_mm_cvtps_epi32(__m128(v)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return IntVec(vcvtnq_s32_f32(float32x4_t(v)));
#else
  IntVec rounded;
  for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(std::nearbyint(v[i]));
  return rounded;
#endif
}

// to[i] = ratios[i] * scale, rounded to the nearest integer.
void masses(const float* ratios, int64_t length, float scale, int32_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    const IntVec rounded = round_to_int(load(ratios + i) * scale);
    std::memcpy(to + i, &rounded, sizeof rounded);
  }
  for (; i < length; ++i) to[i] = static_cast<int32_t>(std::nearbyint(ratios[i] * scale));
}

// How many values are above a limit.
int32_t count_above(const float* x, int64_t length, float limit) {
  IntVec above{};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) above -= IntVec(load(x + i) > splat(limit));
  int32_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += above[lane];
  for (; i < length; ++i) count += x[i] > limit;
  return count;
}

// The lowest index of the largest value; that of a row with NaN is some index.
int32_t first_at(const float* x, int64_t length, float most) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    if (any(load(x + i) == splat(most))) break;
  }
  for (; i < length; ++i) {
    if (x[i] == most) return int32_t(i);
  }
  return int32_t(length - 1);
}

int32_t first_largest(const float* x, int64_t length) { return first_at(x, length, maximum(x, length)); }

// Calls run(r) for every row.
template <class Run>
void for_rows(ffi::ThreadPool& pool, int64_t rows, int64_t length, const Run& run) {
  const int64_t size = std::max<int64_t>(1, 4096 / length);  // rows of a task: smaller ones do not pay for another thread
  parallel_for(pool, (rows + size - 1) / size, [&](int64_t task) {
    for (int64_t r = task * size; r < std::min(rows, (task + 1) * size); ++r) run(r);
  });
}

// logits and weights are [R, V], keys u32[R, 2] as s32, is_drawn s32[R]; ids is [R, kCandidates]. A row that is not drawn
// gets the index of its largest logit.
ffi::Error candidates(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> weights,
                      ffi::Buffer<ffi::S32> keys, ffi::Buffer<ffi::S32> is_drawn, ffi::ResultBuffer<ffi::S32> ids) {
  const int64_t rows = weights.dimensions()[0], length = weights.dimensions()[1];
  if (logits.element_count() != rows * length || keys.element_count() != 2 * rows || is_drawn.element_count() != rows ||
      ids->element_count() != rows * kCandidates) {
    return ffi::Error::InvalidArgument("pallas_kernels_draw: logits, weights and rows have incompatible shapes");
  }
  for_rows(pool, rows, length, [&](int64_t r) {
    int32_t* to = ids->typed_data() + r * kCandidates;
    if (is_drawn.typed_data()[r]) {
      const int32_t* key = keys.typed_data() + 2 * r;
      race(weights.typed_data() + r * length, length, uint32_t(key[0]), uint32_t(key[1]), to);
    } else {
      std::fill(to, to + kCandidates, first_largest(logits.typed_data() + r * length, length));
    }
  });
  return ffi::Error::Success();
}

// logits are [R, V], largest and divisors f32[R]; ratios are e^((logits - largest) / divisors), [R, V].
ffi::Error ratios(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> largest,
                  ffi::Buffer<ffi::F32> divisors, ffi::ResultBuffer<ffi::F32> ratios) {
  const int64_t rows = logits.dimensions()[0], length = logits.dimensions()[1];
  if (largest.element_count() != rows || divisors.element_count() != rows || ratios->element_count() != rows * length) {
    return ffi::Error::InvalidArgument("pallas_kernels_draw_ratios: logits and rows have incompatible shapes");
  }
  for_rows(pool, rows, length, [&](int64_t r) {
    exponentials(logits.typed_data() + r * length, length, largest.typed_data()[r], divisors.typed_data()[r],
                 ratios->typed_data() + r * length);
  });
  return ffi::Error::Success();
}

struct RowScratch;

// Everything about a row whose logits nothing but a temperature changes; see `in_one_pass` in __init__.py.
ffi::Error one_pass(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> seeds,
                    ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::F32> temperature, ffi::Buffer<ffi::S32> targets, ffi::Buffer<ffi::S32> wants_logprobs,
                    ffi::ResultBuffer<ffi::S32> ids, ffi::ResultBuffer<ffi::S32> weights, ffi::ResultBuffer<ffi::S32> bits,
                    ffi::ResultBuffer<ffi::S32> ranks,
                    ffi::ResultBuffer<ffi::F32> largest, ffi::ResultBuffer<ffi::F32> totals,
                    ffi::ResultBuffer<ffi::F32> raw_totals) {
  const int64_t rows = logits.dimensions()[0], length = logits.dimensions()[1];
  if (seeds.element_count() != rows || positions.element_count() != rows || temperature.element_count() != rows || targets.element_count() != rows ||
      wants_logprobs.element_count() != 1 || ids->element_count() != rows * kCandidates ||
      weights->element_count() != rows * kCandidates || bits->element_count() != rows * kCandidates || ranks->element_count() != rows * kCandidates ||
      largest->element_count() != rows || totals->element_count() != rows || raw_totals->element_count() != rows) {
    return ffi::Error::InvalidArgument("pallas_kernels_draw_one_pass: logits and rows have incompatible shapes");
  }
  const bool wants = wants_logprobs.typed_data()[0] != 0;
  for_rows(pool, rows, length, [&](int64_t r) {
    const float* x = logits.typed_data() + r * length;
    const float degrees = temperature.typed_data()[r], divisor = std::max(degrees, FLT_MIN);
    const int32_t target = targets.typed_data()[r];
    const bool is_drawn = degrees > 0, is_given = target >= 0 && target < length;
    int32_t* id = ids->typed_data() + r * kCandidates;
    int32_t* weight = weights->typed_data() + r * kCandidates;
    int32_t* bit = bits->typed_data() + r * kCandidates;
    int32_t* rank = ranks->typed_data() + r * kCandidates;
    std::fill(weight, weight + kCandidates, 0);
    std::fill(bit, bit + kCandidates, 0);
    std::fill(rank, rank + kCandidates, 0);
    const float most = maximum(x, length);
    float* of_row = scratch<RowScratch>(static_cast<size_t>(2 * length));
    float total = 1;
    if (is_drawn) {
      exponentials(x, length, most, divisor, of_row);
      total = exact_sum(of_row, length);
    }
    if (is_given) {
      std::fill(id, id + kCandidates, target);
    } else if (is_drawn) {
      int32_t* mass = reinterpret_cast<int32_t*>(of_row + length);
      masses(of_row, length, 0x1p30f / total, mass);
      uint32_t first[1], second[1], high[1], low[1];  // the key of a seed, to which the position is folded in
      threefry(0, uint32_t(seeds.typed_data()[r]), uint32_t(positions.typed_data()[r]), first, second);
      race(mass, length, first[0], second[0], id);
      for (int k = 0; k < kCandidates; ++k) {
        threefry(first[0], second[0], uint32_t(id[k]), high, low);
        weight[k] = mass[id[k]];
        bit[k] = int32_t(high[0] ^ low[0]);
      }
    } else {
      std::fill(id, id + kCandidates, first_at(x, length, most));
    }
    float raw_total = total;
    if (wants && !(is_drawn && divisor == 1)) {
      exponentials(x, length, most, 1, of_row);
      raw_total = exact_sum(of_row, length);
    }
    for (int k = 0; wants && k < kCandidates; ++k) {
      rank[k] = k && id[k] == id[k - 1] ? rank[k - 1] : 1 + count_above(x, length, x[id[k]]);
    }
    largest->typed_data()[r] = most;
    totals->typed_data()[r] = total;
    raw_totals->typed_data()[r] = raw_total;
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsDraw, pallas_kernels::candidates,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsDrawRatios, pallas_kernels::ratios,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsDrawOnePass, pallas_kernels::one_pass,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
