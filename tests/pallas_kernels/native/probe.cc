// y[i] = exp(x[i]), z[i] = silu(x[i]); every kLanes elements are one item of the parallel loop.
#include "common.h"

using namespace pallas_kernels;

static ffi::Error Probe(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y,
                        ffi::ResultBuffer<ffi::F32> z) {
  const int64_t n = static_cast<int64_t>(x.element_count());
  if (n % kLanes != 0) return ffi::Error::InvalidArgument("x must be a multiple of kLanes");
  const float* in = x.typed_data();
  float* exps = y->typed_data();
  float* silus = z->typed_data();
  parallel_for(pool, n / kLanes, [=](int64_t i) {
    const Vec v = load(in + i * kLanes);
    store(exps + i * kLanes, pallas_kernels::exp(v));
    store(silus + i * kLanes, silu(v));
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsProbe, Probe,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
