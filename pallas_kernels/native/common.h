// Shared by all native kernels: the vector type of this CPU, a parallel loop, and scratch memory.
//
// Portable C++17 with the vector extensions of GCC and Clang, compiled for the machine it runs on.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "ffi.h"

namespace pallas_kernels {

namespace ffi = xla::ffi;

// ---- vectors -------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE, NEON
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
// The same vectors for memory that may be unaligned and may hold other types.
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t UnalignedIntVec __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
typedef int8_t UnalignedBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

#define KERNEL_INLINE inline __attribute__((always_inline))
// Visible in a library that hides everything else.
#define KERNEL_EXPORT extern "C" __attribute__((visibility("default")))

KERNEL_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
KERNEL_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
// Compilers can simplify x - 0 to x for every x, but not 0 + x, which differs for x = -0.
KERNEL_INLINE Vec splat(float x) { return x - Vec{}; }

// int8[kLanes] -> float[kLanes], exact. Uses intrinsics because GCC 12 converts the generic form element by element.
KERNEL_INLINE Vec load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  const int16x8_t halves = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves)));
#else
  return __builtin_convertvector(*reinterpret_cast<const UnalignedBytes*>(p), Vec);
#endif
}

// bfloat16[kLanes] -> float[kLanes], exact.
KERNEL_INLINE Vec load_bfloat16(const uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    v[i] = x;
  }
  return v;
#endif
}

KERNEL_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
KERNEL_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

KERNEL_INLINE float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}
KERNEL_INLINE float max_element(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <int Step, bool High, size_t... I>
KERNEL_INLINE Vec exchange(Vec a, Vec b, std::index_sequence<I...>) {
  // Interleaves the elements of a and b whose index has bit `Step` clear (Low) or set (High).
  return High ? __builtin_shufflevector(a, b, ((I & Step) ? int(I) + kLanes : int(I) + Step)...)
              : __builtin_shufflevector(a, b, ((I & Step) ? int(I) + kLanes - Step : int(I))...);
}

template <int Step>
KERNEL_INLINE void transpose_step(Vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const Vec a = rows[i], b = rows[i + Step];
    rows[i] = exchange<Step, false>(a, b, lanes);
    rows[i + Step] = exchange<Step, true>(a, b, lanes);
  }
}

// rows[i][j] becomes rows[j][i].
KERNEL_INLINE void transpose(Vec (&rows)[kLanes]) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (kLanes > 4) transpose_step<4>(rows);
  if constexpr (kLanes > 8) transpose_step<8>(rows);
}

// e^x for x below 88.3, with a relative error below 2e-7; 0 for x below -87.3. NaN stays NaN.
KERNEL_INLINE Vec exp_below_overflow(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  // ln 2 in two parts, so that n * ln 2 loses no bits.
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < splat(-87.33654f) ? Vec{} : p * power;
}

// e^x, with x clamped at 88.37626 so that the result stays finite (near 2.4e38).
KERNEL_INLINE Vec exp(Vec x) {
  const Vec largest = splat(88.37626f);
  return exp_below_overflow(x > largest ? largest : x);
}

// x * sigmoid(x)
KERNEL_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// ---- scratch memory ------------------------------------------------------------------------------------------

// A thread-local buffer, one per `Tag`, 64-byte aligned and reused by later calls. Its contents are undefined.
template <class Tag>
inline float* scratch(size_t num_floats) {
  struct Holder {
    float* data = nullptr;
    size_t size = 0;
    ~Holder() { std::free(data); }
  };
  thread_local Holder holder;
  if (holder.size < num_floats) {
    std::free(holder.data);
    holder.data = nullptr;
    holder.size = 0;
    void* data = nullptr;
    if (posix_memalign(&data, 64, num_floats * sizeof(float)) != 0) throw std::bad_alloc();
    holder.data = static_cast<float*>(data);
    holder.size = num_floats;
  }
  return holder.data;
}

// ---- parallel loop -------------------------------------------------------------------------------------------

KERNEL_INLINE void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `condition()` holds; after 4096 iterations it yields the core between checks.
template <class Condition>
inline void wait_until(Condition&& condition) {
  for (int i = 0; !condition(); ++i) {
    if (i < 4096) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

// Calls body(i) once for every i in [0, count), on the calling thread and on threads of XLA's pool.
//
// Threads claim items in ascending order from one counter, so the calling thread can process all of them by itself and
// never waits for a busy pool: it waits only for items that another thread has started. A pool task that starts after
// that finds no items left and touches nothing but the shared counter, which it keeps alive itself.
// An item may therefore wait for an item with a lower number (which has already started), but never for a higher one.
// `body` must not throw.
template <class Body>
inline void parallel_for(ffi::ThreadPool& pool, int64_t count, Body&& body) {
  if (count <= 0) return;
  const int64_t num_extra = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (num_extra <= 0) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  using Function = std::remove_reference_t<Body>;
  struct State {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> num_done{0};
    int64_t count;
    Function* body;

    void work() {
      for (;;) {
        const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        if (i >= count) return;
        (*body)(i);
        num_done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto state = std::make_shared<State>();
  state->count = count;
  state->body = &body;
  for (int64_t i = 0; i < num_extra; ++i) pool.Schedule([state] { state->work(); });
  state->work();
  wait_until([&] { return state->num_done.load(std::memory_order_acquire) == count; });
}

}  // namespace pallas_kernels
