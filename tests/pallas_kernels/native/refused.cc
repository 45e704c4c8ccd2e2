// A handler of a version that no XLA accepts.
#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* PallasKernelsNorm(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr) {
    auto* extension = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
    extension->metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, 0, 99};
  }
  return nullptr;
}
