// The tokens of a row among which its draw is decided: those whose exponential race may be the fastest.
//
// Token i finishes after -log(1 - u[i]) / weight[i], and u <= -log(1 - u), so that weight / u bounds its speed from above.
// Nearly all tokens are excluded by this bound, without a logarithm.
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
constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};

// Whether any element is not 0.
KERNEL_INLINE bool any(IntVec v) {
  uint64_t words[sizeof v / 8], all = 0;
  std::memcpy(words, &v, sizeof v);
  for (uint64_t word : words) all |= word;
  return all != 0;
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
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int distance = kRotations[group % 2][i];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        high[v] = high[v] + low[v];
        low[v] = high[v] ^ ((low[v] << distance) | (low[v] >> (32 - distance)));
      }
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
    some = IntVec{};
    for (int v = 0; v < kVectors; ++v) {
      low[v] = high[v] ^ low[v];
      // Halves are exact as signed integers, from which CPUs without AVX-512 can convert.
      const IntVec upper = IntVec(low[v] >> 16), lower = IntVec(low[v] & 0xFFFFu);
      const Vec u = (__builtin_convertvector(upper, Vec) * 65536.0f + __builtin_convertvector(lower, Vec) + 0.5f) * 0x1p-32f;
      may_win[v] = __builtin_convertvector(weight[v], Vec) * (1 + kTolerance) >= u * found.slowest;
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

// The lowest index of the largest value; that of a row with NaN is some index.
int32_t argmax(const float* x, int64_t length) {
  Vec largest = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) largest = max(load(x + i), largest);
  float most = max_element(largest);
  for (; i < length; ++i) most = x[i] > most ? x[i] : most;
  for (i = 0; i + kLanes <= length; i += kLanes) {
    const IntVec equal = load(x + i) == splat(most);
    int32_t some = 0;
    for (int lane = 0; lane < kLanes; ++lane) some |= equal[lane];
    if (some) break;
  }
  for (; i < length; ++i) {
    if (x[i] == most) return int32_t(i);
  }
  return int32_t(length - 1);
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
  const int64_t rows_per_task = std::max<int64_t>(1, 4096 / length);  // smaller tasks do not pay for another thread
  const auto run = [&](int64_t task) {
    for (int64_t r = task * rows_per_task; r < std::min(rows, (task + 1) * rows_per_task); ++r) {
      int32_t* to = ids->typed_data() + r * kCandidates;
      if (is_drawn.typed_data()[r]) {
        const int32_t* key = keys.typed_data() + 2 * r;
        race(weights.typed_data() + r * length, length, uint32_t(key[0]), uint32_t(key[1]), to);
      } else {
        std::fill(to, to + kCandidates, argmax(logits.typed_data() + r * length, length));
      }
    }
  };
  parallel_for(pool, (rows + rows_per_task - 1) / rows_per_task, run);
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
