// Splits a fused projection [T, H + 2K, D] into queries, keys and values and rotates the queries and keys, in one pass
// over the data. (Compiled from separate operations, it would slice, multiply and concatenate.)
#include "common.h"

namespace pallas_kernels {
namespace {

using Floats = ffi::Buffer<ffi::F32>;

// Rotates each pair (x[i], x[i + pairs]) of one head by its angle i. Elements after the pairs are copied unchanged.
void rotate(const float* x, const float* cos, const float* sin, int64_t pairs, int64_t dim, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    const Vec first = load(x + i), second = load(x + pairs + i), c = load(cos + i), s = load(sin + i);
    store(y + i, first * c - second * s);
    store(y + pairs + i, second * c + first * s);
  }
  for (; i < pairs; ++i) {
    const float first = x[i], second = x[pairs + i];
    y[i] = first * cos[i] - second * sin[i];
    y[pairs + i] = second * cos[i] + first * sin[i];
  }
  std::copy(x + 2 * pairs, x + dim, y + 2 * pairs);
}

ffi::Error rotary(ffi::ThreadPool pool, Floats qkv, Floats cos, Floats sin, ffi::ResultBuffer<ffi::F32> q,
                  ffi::ResultBuffer<ffi::F32> k, ffi::ResultBuffer<ffi::F32> v) {
  const auto dims = qkv.dimensions(), angles = cos.dimensions();
  const int64_t num_tokens = dims[0], dim = dims[2], pairs = angles[1];
  const int64_t heads = q->dimensions()[1], kv_heads = k->dimensions()[1];
  if (dims[1] != heads + 2 * kv_heads || angles[0] != num_tokens || 2 * pairs > dim) {
    return ffi::Error::InvalidArgument(
        "pallas_kernels_rotary: projection, angles and results have incompatible shapes");
  }
  constexpr int64_t kTokens = 16;  // per task: smaller tasks do not pay for another thread
  const auto run = [&](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(num_tokens, (task + 1) * kTokens); ++t) {
      const float* from = qkv.typed_data() + t * dims[1] * dim;
      const float* c = cos.typed_data() + t * pairs;
      const float* s = sin.typed_data() + t * pairs;
      const auto rotate_heads = [&](float* to, int64_t count) {
        for (int64_t h = 0; h < count; ++h, from += dim) rotate(from, c, s, pairs, dim, to + h * dim);
      };
      rotate_heads(q->typed_data() + t * heads * dim, heads);
      rotate_heads(k->typed_data() + t * kv_heads * dim, kv_heads);
      std::copy(from, from + kv_heads * dim, v->typed_data() + t * kv_heads * dim);
    }
  };
  const int64_t num_tasks = (num_tokens + kTokens - 1) / kTokens;
  if (num_tasks > 4) {
    parallel_for(pool, num_tasks, run);
  } else {
    for (int64_t task = 0; task < num_tasks; ++task) run(task);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsRotary, pallas_kernels::rotary,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
