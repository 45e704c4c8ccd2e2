// Layers with a state, for the chunks of a step: a convolution over the last tokens, and a linear recurrence.
//
// A token's results are computed by the same operations in the same order wherever its chunk begins, so no bit depends on
// how a sequence is split. Fused multiply-adds are therefore written out, not left to the compiler, which could choose
// differently in a loop over four tokens and in one over a single token.
#include "common.h"

namespace pallas_kernels {
namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// a * b + c
KERNEL_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;  // these have no instruction for it
#endif
}

// Up to a vector; the rest of it is zero.
KERNEL_INLINE Vec load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float whole[kLanes] = {};
  std::copy(p, p + count, whole);
  return load(whole);
}
KERNEL_INLINE void store_some(float* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  float whole[kLanes];
  store(whole, v);
  std::copy(whole, whole + count, p);
}

// The chunks of a step: chunk s computes positions [starts[s], stops[s]) of the sequence whose states are at places[s], and
// its tokens begin at first_tokens[s] of the batch. One whose place is beyond the pool is padding.
struct Chunks {
  const int32_t *places, *starts, *stops, *first_tokens;
  int64_t count, num_places, num_tokens;

  Chunks(Ints places, Ints starts, Ints stops, Ints first_tokens, int64_t num_places, int64_t num_tokens)
      : places(places.typed_data()),
        starts(starts.typed_data()),
        stops(stops.typed_data()),
        first_tokens(first_tokens.typed_data()),
        count(places.dimensions()[0]),
        num_places(num_places),
        num_tokens(num_tokens) {}

  int64_t length(int64_t s) const {
    const int64_t n = std::min<int64_t>(stops[s] - starts[s], num_tokens - first_tokens[s]);
    return places[s] < 0 || places[s] >= num_places || n < 0 ? 0 : n;
  }

  // Sets the results [T, width] of all tokens that no chunk computes to zero.
  void clear_padding(float* results, int64_t width) const {
    int64_t done = 0;  // chunks lie one after another
    for (int64_t s = 0; s < count; ++s) {
      if (length(s) == 0) continue;
      std::fill(results + done * width, results + std::max<int64_t>(done, first_tokens[s]) * width, 0.0f);
      done = first_tokens[s] + length(s);
    }
    std::fill(results + done * width, results + num_tokens * width, 0.0f);
  }
};

// ---- convolution -----------------------------------------------------------------------------------------------

constexpr int64_t kTokensPerTask = 16;

struct Convolution {
  const float* x;  // [T, stride], of which `channels` columns are read
  int64_t stride, channels, width;
  const float *kernel, *bias;  // [W, C], [C] or null
  bool silu;
  float *y, *tails;  // [T, C], [places, (W - 1) * C]

  // Tokens [begin, end) of a chunk that begins at position `start` and at token `first` of the batch.
  void run(int64_t begin, int64_t end, int64_t start, int64_t first, const float* tail) const {
    const float* sources[16];
    for (int64_t i = begin; i < end; ++i) {
      int64_t num_sources = 1;
      sources[0] = x + (first + i) * stride;
      for (int64_t back = 1; back < width && start + i >= back; ++back) {
        const int64_t position = start + i - back;
        sources[num_sources++] = i >= back ? x + (first + i - back) * stride : tail + position % (width - 1) * channels;
      }
      float* to = y + (first + i) * channels;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t left = channels - c;
        Vec sum = load_some(sources[0] + c, left) * load_some(kernel + (width - 1) * channels + c, left);
        for (int64_t back = 1; back < num_sources; ++back) {
          sum = fma(load_some(sources[back] + c, left), load_some(kernel + (width - 1 - back) * channels + c, left), sum);
        }
        if (bias) sum = sum + load_some(bias + c, left);
        store_some(to + c, silu ? pallas_kernels::silu(sum) : sum, left);
      }
    }
  }

  // Replaces the tail by the inputs of the last tokens of a chunk: that of position p is in row p mod (W - 1).
  void keep(int64_t length, int64_t start, int64_t first, float* tail) const {
    for (int64_t i = std::max<int64_t>(0, length - (width - 1)); i < length; ++i) {
      const float* from = x + (first + i) * stride;
      std::copy(from, from + channels, tail + (start + i) % (width - 1) * channels);
    }
  }
};

ffi::Error convolution(ffi::ThreadPool pool, int64_t column, bool silu, Floats x, Floats kernel, Floats bias, Floats tails,
                       Ints places, Ints starts, Ints stops, Ints first_tokens, ffi::ResultBuffer<ffi::F32> y,
                       ffi::ResultBuffer<ffi::F32> new_tails) {
  const int64_t num_tokens = x.dimensions()[0], stride = x.dimensions()[1];
  const int64_t width = kernel.dimensions()[0], channels = kernel.dimensions()[1];
  const auto pool_dims = tails.dimensions();
  if (column + channels > stride || width < 2 || width > 16 || pool_dims[1] != (width - 1) * channels) {
    return ffi::Error::InvalidArgument("pallas_kernels_convolution: the arrays have incompatible shapes");
  }
  const Chunks chunks(places, starts, stops, first_tokens, pool_dims[0], num_tokens);
  float* pool_data = new_tails->typed_data();
  if (pool_data != tails.typed_data()) std::copy(tails.typed_data(), tails.typed_data() + tails.element_count(), pool_data);
  const Convolution conv{x.typed_data() + column,
                         stride,
                         channels,
                         width,
                         kernel.typed_data(),
                         bias.element_count() ? bias.typed_data() : nullptr,
                         silu,
                         y->typed_data(),
                         pool_data};
  chunks.clear_padding(conv.y, channels);
  // A task is some tokens of a chunk. The first of a chunk reads its tail and then replaces it; no other reads it.
  const int64_t first_task_tokens = std::max(kTokensPerTask, width - 1);
  const auto num_tasks = [&](int64_t s) {
    const int64_t n = chunks.length(s);
    return n == 0 ? 0 : 1 + std::max<int64_t>(0, n - first_task_tokens + kTokensPerTask - 1) / kTokensPerTask;
  };
  int64_t total = 0;
  for (int64_t s = 0; s < chunks.count; ++s) total += num_tasks(s);
  const auto run = [&](int64_t task) {
    int64_t s = 0;
    for (; task >= num_tasks(s); ++s) task -= num_tasks(s);
    const int64_t start = chunks.starts[s], first = chunks.first_tokens[s], length = chunks.length(s);
    const int64_t begin = task == 0 ? 0 : first_task_tokens + (task - 1) * kTokensPerTask;
    const int64_t end = std::min(length, task == 0 ? first_task_tokens : begin + kTokensPerTask);
    float* tail = conv.tails + static_cast<int64_t>(chunks.places[s]) * (width - 1) * channels;
    conv.run(begin, end, start, first, tail);
    if (task == 0) conv.keep(length, start, first, tail);
  };
  if (total > 4) {
    parallel_for(pool, total, run);
  } else {
    for (int64_t task = 0; task < total; ++task) run(task);
  }
  return ffi::Error::Success();
}

// ---- linear recurrence -----------------------------------------------------------------------------------------

// One head of one chunk: S = a S + k u^T and out = S^T q for each token, with u = gain v or gain (v - a S^T k).
struct Head {
  const float *q, *k, *v, *decay, *gain;  // of the first token
  int64_t key_stride, value_stride, gate_stride;  // between tokens; results have that of the values
  float *state, *out;  // [D, row], [tokens, Dv]
  int64_t key_dim, value_dim, row;

  Vec rate(int64_t t) const { return exp(splat(decay[t * gate_stride])); }

  // N tokens from t on, for the V vectors of the state's columns from c on.
  template <int N, int V>
  KERNEL_INLINE void plain(int64_t t, int64_t c) const {
    Vec u[N][V], sum[N][V], a[N];
    const float *keys[N], *queries[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      a[n] = rate(t + n);
      keys[n] = k + (t + n) * key_stride;
      queries[n] = q + (t + n) * key_stride;
      const Vec g = splat(gain[(t + n) * gate_stride]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const int64_t at = c + i * kLanes;
        u[n][i] = g * load_some(v + (t + n) * value_stride + at, value_dim - at);
        sum[n][i] = Vec{};
      }
    }
    float* s = state + c;
    for (int64_t d = 0; d < key_dim; ++d, s += row) {
      Vec x[V];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) x[i] = load(s + i * kLanes);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Vec key = splat(keys[n][d]), query = splat(queries[n][d]);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          x[i] = fma(key, u[n][i], a[n] * x[i]);
          sum[n][i] = fma(query, x[i], sum[n][i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) store(s + i * kLanes, x[i]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const int64_t at = c + i * kLanes;
        store_some(out + (t + n) * value_stride + at, sum[n][i], value_dim - at);
      }
    }
  }

  // All tokens by the delta rule. While the state is updated by one token, its product with the key of the next is summed.
  template <int V>
  KERNEL_INLINE void delta(int64_t length, int64_t c) const {
    Vec product[V] = {};
    const float* s = state + c;
    for (int64_t d = 0; d < key_dim; ++d, s += row) {
      const Vec key = splat(k[d]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) product[i] = fma(key, load(s + i * kLanes), product[i]);
    }
    for (int64_t t = 0; t < length; ++t) {
      const float *keys = k + t * key_stride, *queries = q + t * key_stride;
      const float* next = t + 1 < length ? keys + key_stride : keys;  // after the last one, its product is not used
      const Vec a = rate(t), g = splat(gain[t * gate_stride]);
      Vec u[V], sum[V] = {}, following[V] = {};
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const int64_t at = c + i * kLanes;
        u[i] = g * fma(-a, product[i], load_some(v + t * value_stride + at, value_dim - at));
      }
      float* place = state + c;
      for (int64_t d = 0; d < key_dim; ++d, place += row) {
        const Vec key = splat(keys[d]), query = splat(queries[d]), later = splat(next[d]);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          const Vec x = fma(key, u[i], a * load(place + i * kLanes));
          store(place + i * kLanes, x);
          sum[i] = fma(query, x, sum[i]);
          following[i] = fma(later, x, following[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const int64_t at = c + i * kLanes;
        store_some(out + t * value_stride + at, sum[i], value_dim - at);
        product[i] = following[i];
      }
    }
  }

  template <int V>
  KERNEL_INLINE void columns(int64_t length, int64_t c, bool is_delta) const {
    if (is_delta) return delta<V>(length, c);
    int64_t t = 0;
    constexpr int kWide = kLanes == 16 && V % 2 == 0 ? 2 : 1;  // as many as the registers hold for four tokens
    for (; t + 4 <= length; t += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < V; i += kWide) plain<4, kWide>(t, c + i * kLanes);
    }
    for (; t < length; ++t) plain<1, V>(t, c);
  }

  void run(int64_t length, bool is_delta) const {
    int64_t c = 0;
    for (; c + 4 * kLanes <= row; c += 4 * kLanes) columns<4>(length, c, is_delta);
    for (; c + 2 * kLanes <= row; c += 2 * kLanes) columns<2>(length, c, is_delta);
    for (; c < row; c += kLanes) columns<1>(length, c, is_delta);
  }
};

struct PaddedState {};

ffi::Error recurrence(ffi::ThreadPool pool, bool is_delta, Floats q, Floats k, Floats v, Floats decay, Floats gain,
                      Floats states, Ints places, Ints starts, Ints stops, Ints first_tokens,
                      ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> new_states) {
  const auto of_keys = k.dimensions(), of_values = v.dimensions(), of_pool = states.dimensions();
  const int64_t num_tokens = of_keys[0], key_heads = of_keys[1], key_dim = of_keys[2];
  const int64_t heads = of_values[1], value_dim = of_values[2];
  if (of_values[0] != num_tokens || heads % key_heads || q.element_count() != k.element_count() || of_pool[1] != heads ||
      of_pool[2] != key_dim || of_pool[3] != value_dim || decay.element_count() != static_cast<size_t>(num_tokens * heads) ||
      gain.element_count() != decay.element_count()) {
    return ffi::Error::InvalidArgument("pallas_kernels_recurrence: the arrays have incompatible shapes");
  }
  const Chunks chunks(places, starts, stops, first_tokens, of_pool[0], num_tokens);
  float* pool_data = new_states->typed_data();
  if (pool_data != states.typed_data()) {
    std::copy(states.typed_data(), states.typed_data() + states.element_count(), pool_data);
  }
  chunks.clear_padding(out->typed_data(), heads * value_dim);
  const int64_t row = (value_dim + kLanes - 1) / kLanes * kLanes, share = heads / key_heads;
  const auto run = [&](int64_t task) {
    const int64_t s = task / heads, h = task % heads, length = chunks.length(s);
    if (length == 0) return;
    const int64_t first = chunks.first_tokens[s];
    const int64_t of_key = first * key_heads * key_dim + h / share * key_dim;
    const int64_t of_value = first * heads * value_dim + h * value_dim, of_gate = first * heads + h;
    float* kept = pool_data + (chunks.places[s] * heads + h) * key_dim * value_dim;
    // What a slot contains before position 0 is not read: it may be anything.
    if (chunks.starts[s] == 0) std::fill(kept, kept + key_dim * value_dim, 0.0f);
    float* state = kept;
    if (row != value_dim) {  // with rows of whole vectors
      state = scratch<PaddedState>(key_dim * row);
      std::fill(state, state + key_dim * row, 0.0f);
      for (int64_t d = 0; d < key_dim; ++d) std::copy(kept + d * value_dim, kept + (d + 1) * value_dim, state + d * row);
    }
    const Head head{q.typed_data() + of_key,
                    k.typed_data() + of_key,
                    v.typed_data() + of_value,
                    decay.typed_data() + of_gate,
                    gain.typed_data() + of_gate,
                    key_heads * key_dim,
                    heads * value_dim,
                    heads,
                    state,
                    out->typed_data() + of_value,
                    key_dim,
                    value_dim,
                    row};
    head.run(length, is_delta);
    if (state != kept) {
      for (int64_t d = 0; d < key_dim; ++d) std::copy(state + d * row, state + d * row + value_dim, kept + d * value_dim);
    }
  };
  int64_t work = 0;  // numbers of states that are updated
  for (int64_t s = 0; s < chunks.count; ++s) work += chunks.length(s) * heads * key_dim * value_dim;
  constexpr int64_t kSerial = 1 << 16;  // for less, another thread does not pay
  if (work > kSerial) {
    parallel_for(pool, chunks.count * heads, run);
  } else {
    for (int64_t task = 0; task < chunks.count * heads; ++task) run(task);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallas_kernels

#define PALLAS_KERNELS_FLOATS .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
#define PALLAS_KERNELS_CHUNKS           \
  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>() \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>() \
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>() \
      .Ret<xla::ffi::Buffer<xla::ffi::F32>>() \
      .Ret<xla::ffi::Buffer<xla::ffi::F32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsConvolution, pallas_kernels::convolution,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("column")
                                  .Attr<bool>("silu") PALLAS_KERNELS_FLOATS PALLAS_KERNELS_FLOATS PALLAS_KERNELS_FLOATS
                                      PALLAS_KERNELS_FLOATS PALLAS_KERNELS_CHUNKS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsRecurrence, pallas_kernels::recurrence,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("is_delta") PALLAS_KERNELS_FLOATS PALLAS_KERNELS_FLOATS PALLAS_KERNELS_FLOATS
                                      PALLAS_KERNELS_FLOATS PALLAS_KERNELS_FLOATS PALLAS_KERNELS_FLOATS
                                          PALLAS_KERNELS_CHUNKS);
