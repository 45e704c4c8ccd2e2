// RMSNorm and LayerNorm of the rows of a matrix. Every row is computed by the same instructions, so its result depends
// only on the row itself.
#include <cmath>

#include "common.h"

namespace pallas_kernels {
namespace {

using Floats = ffi::Buffer<ffi::F32>;

// The sum of f(x[i]) over a row, in an order that depends only on the length of the row.
template <class F>
KERNEL_INLINE float reduce(const float* x, int64_t length, F f) {
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
    even += f(load(x + i));
    odd += f(load(x + i + kLanes));
  }
  if (i + kLanes <= length) {
    even += f(load(x + i));
    i += kLanes;
  }
  float total = sum(even + odd);
  for (; i < length; ++i) total += f(splat(x[i]))[0];
  return total;
}

// Normalizes one row with its own weight and bias (which may be null).
void norm_row(const float* x, int64_t length, const float* weight, const float* bias, float eps, float offset, bool centered,
              float* y) {
  const float mean = centered ? reduce(x, length, [](Vec v) { return v; }) / length : 0.0f;
  const float square = reduce(x, length, [mean](Vec v) {
    const Vec apart = v - mean;
    return apart * apart;
  });
  const float scale = 1.0f / std::sqrt(square / length + eps);
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    const Vec scaled = (load(x + i) - mean) * scale * (load(weight + i) + offset);
    store(y + i, bias ? scaled + load(bias + i) : scaled);
  }
  for (; i < length; ++i) {
    const float scaled = (x[i] - mean) * scale * (weight[i] + offset);
    y[i] = bias ? scaled + bias[i] : scaled;
  }
}

// x and y are [M, E]. Rows from num_rows on are padding; their results are zero. Remaining arguments: the weight
// f32[P * E], of which part r % P applies to row r, then an optional bias with the same layout.
ffi::Error norm(ffi::ThreadPool pool, float eps, float offset, bool centered, Floats x, ffi::Buffer<ffi::S32> num_rows,
                ffi::RemainingArgs others, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t num = x.dimensions()[0], length = x.dimensions()[1];
  const float *weight = nullptr, *bias = nullptr;
  int64_t period = 1;
  for (size_t i = 0; i < others.size(); ++i) {
    const ffi::ErrorOr<Floats> other = others.get<Floats>(i);
    if (!other.has_value()) return other.error();
    const int64_t count = other->element_count();
    if (i > 1 || count % length || (i == 1 && count != period * length)) {
      return ffi::Error::InvalidArgument("pallas_kernels_norm: rows, weight and bias have incompatible shapes");
    }
    period = count / length;
    (i == 0 ? weight : bias) = other->typed_data();
  }
  if (!weight || period == 0 || num % period) {
    return ffi::Error::InvalidArgument("pallas_kernels_norm: rows and weight have incompatible shapes");
  }
  const int64_t used = std::clamp<int64_t>(num_rows.typed_data()[0], 0, num);
  std::memset(y->typed_data() + used * length, 0, (num - used) * length * sizeof(float));
  const int64_t rows_per_task = std::max<int64_t>(1, 32768 / length);  // smaller tasks do not pay for another thread
  const auto run = [&](int64_t task) {
    for (int64_t r = task * rows_per_task; r < std::min(used, (task + 1) * rows_per_task); ++r) {
      const int64_t part = r % period * length;
      norm_row(x.typed_data() + r * length, length, weight + part, bias ? bias + part : nullptr, eps, offset, centered,
               y->typed_data() + r * length);
    }
  };
  parallel_for(pool, (used + rows_per_task - 1) / rows_per_task, run);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsNorm, pallas_kernels::norm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Attr<bool>("centered")
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
