// The part of XLA's C++ interface for custom calls that these kernels use, on top of its C interface.
//
// Names and meaning are those of "xla/ffi/api/ffi.h", so a kernel compiles with either header. That one takes three
// seconds to compile in every kernel, and includes streams and locales; this one takes a few tenths of a second.
// Only what has been in the C interface since its version 0.1 is used, which every later version supports.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "xla/ffi/api/c_api.h"

namespace xla::ffi {

enum DataType {
  S8 = XLA_FFI_DataType_S8,
  U8 = XLA_FFI_DataType_U8,
  S32 = XLA_FFI_DataType_S32,
  F32 = XLA_FFI_DataType_F32,
  BF16 = XLA_FFI_DataType_BF16,
};

enum class ErrorCode {
  kInvalidArgument = XLA_FFI_Error_Code_INVALID_ARGUMENT,
  kResourceExhausted = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
  kInternal = XLA_FFI_Error_Code_INTERNAL,
};

// The outcome of a call; without an error it is success.
class Error {
 public:
  Error() = default;
  Error(ErrorCode code, std::string message) : failed_(true), code_(code), message_(std::move(message)) {}

  static Error Success() { return Error(); }
  static Error InvalidArgument(std::string message) { return Error(ErrorCode::kInvalidArgument, std::move(message)); }
  static Error Internal(std::string message) { return Error(ErrorCode::kInternal, std::move(message)); }

  bool failure() const { return failed_; }
  ErrorCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  bool failed_ = false;
  ErrorCode code_ = ErrorCode::kInternal;
  std::string message_;
};

// A value, or the error that there is instead.
template <class T>
class ErrorOr {
 public:
  ErrorOr(T value) : value_(value) {}
  ErrorOr(Error error) : value_(nullptr), error_(std::move(error)) {}

  bool has_value() const { return !error_.failure(); }
  const Error& error() const { return error_; }
  const T* operator->() const { return &value_; }
  const T& operator*() const { return value_; }

 private:
  T value_;
  Error error_;
};

// ---- arrays ----------------------------------------------------------------------------------------------------

class Dimensions {
 public:
  Dimensions(const int64_t* data, size_t size) : data_(data), size_(size) {}
  size_t size() const { return size_; }
  int64_t operator[](size_t i) const { return data_[i]; }

 private:
  const int64_t* data_;
  size_t size_;
};

class AnyBuffer {
 public:
  explicit AnyBuffer(const XLA_FFI_Buffer* buffer) : buffer_(buffer) {}
  DataType element_type() const { return static_cast<DataType>(buffer_->dtype); }
  void* untyped_data() const { return buffer_->data; }
  Dimensions dimensions() const { return {buffer_->dims, static_cast<size_t>(buffer_->rank)}; }
  size_t element_count() const {
    int64_t count = 1;
    for (int64_t i = 0; i < buffer_->rank; ++i) count *= buffer_->dims[i];
    return count;
  }

 private:
  const XLA_FFI_Buffer* buffer_;
};

namespace internal {

template <DataType>
struct Native {
  using Type = void;  // bfloat16 has no C++ type
};
template <>
struct Native<F32> {
  using Type = float;
};
template <>
struct Native<S32> {
  using Type = int32_t;
};
template <>
struct Native<S8> {
  using Type = int8_t;
};

}  // namespace internal

template <DataType type>
class Buffer : public AnyBuffer {
 public:
  explicit Buffer(const XLA_FFI_Buffer* buffer) : AnyBuffer(buffer) {}
  typename internal::Native<type>::Type* typed_data() const {
    return static_cast<typename internal::Native<type>::Type*>(untyped_data());
  }
};

template <class T>
class Result {
 public:
  explicit Result(T value) : value_(value) {}
  T* operator->() { return &value_; }
  T& operator*() { return value_; }

 private:
  T value_;
};

template <DataType type>
using ResultBuffer = Result<Buffer<type>>;

// ---- threads ---------------------------------------------------------------------------------------------------

namespace internal {

inline void destroy(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
}

}  // namespace internal

// XLA's threads for computation.
class ThreadPool {
 public:
  ThreadPool(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context) : api_(api), context_(context) {}

  // Calls f() on a thread of the pool, or on this one if there is no pool.
  template <class F>
  void Schedule(F f) {
    XLA_FFI_ThreadPool_Schedule_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.data = new F(std::move(f));
    args.task = [](void* data) {
      F* task = static_cast<F*>(data);
      (*task)();
      delete task;
    };
    if (XLA_FFI_Error* error = api_->XLA_FFI_ThreadPool_Schedule(&args)) {
      internal::destroy(api_, error);
      args.task(args.data);
    }
  }

  // 0 if there is no pool.
  int64_t num_threads() const {
    int64_t count = 0;
    XLA_FFI_ThreadPool_NumThreads_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.num_threads = &count;
    if (XLA_FFI_Error* error = api_->XLA_FFI_ThreadPool_NumThreads(&args)) internal::destroy(api_, error);
    return count;
  }

 private:
  const XLA_FFI_Api* api_;
  XLA_FFI_ExecutionContext* context_;
};

// ---- decoding a call -------------------------------------------------------------------------------------------

namespace internal {

// Takes the operands of a call one after another. The first that does not fit sets `problem`.
struct Decoder {
  const XLA_FFI_CallFrame* frame;
  const char* const* attributes;  // names, in the order of the binding
  int64_t argument = 0, result = 0;
  const char* problem = nullptr;

  const XLA_FFI_Buffer* take(void** buffers, int64_t count, int64_t& next) {
    static XLA_FFI_Buffer nothing{};
    if (next >= count) {
      problem = "wrong number of arrays";
      return &nothing;
    }
    return static_cast<const XLA_FFI_Buffer*>(buffers[next++]);
  }
  const XLA_FFI_Buffer* check(const XLA_FFI_Buffer* buffer, DataType type) {
    if (buffer->dtype != static_cast<XLA_FFI_DataType>(type)) problem = "an array has the wrong element type";
    return buffer;
  }
  // The scalar attribute that is next in the binding; the size of its type is checked.
  const void* take_attribute(XLA_FFI_DataType type) {
    static const int64_t zero = 0;
    const char* name = *attributes++;
    for (int64_t i = 0; i < frame->attrs.size; ++i) {
      const XLA_FFI_ByteSpan* found = frame->attrs.names[i];
      if (found->len != std::strlen(name) || std::memcmp(found->ptr, name, found->len) != 0) continue;
      const auto* scalar = static_cast<const XLA_FFI_Scalar*>(frame->attrs.attrs[i]);
      if (frame->attrs.types[i] == XLA_FFI_AttrType_SCALAR && scalar->dtype == type) return scalar->value;
    }
    problem = "an attribute is missing or has the wrong type";
    return &zero;
  }
};

inline XLA_FFI_Error* to_xla(const XLA_FFI_Api* api, const Error& error) {
  if (!error.failure()) return nullptr;
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, error.message().c_str(),
                                 static_cast<XLA_FFI_Error_Code>(error.code())};
  return api->XLA_FFI_Error_Create(&args);
}

template <class T>
constexpr XLA_FFI_DataType scalar_type() {
  if constexpr (std::is_same_v<T, bool>) return XLA_FFI_DataType_PRED;
  if constexpr (std::is_same_v<T, float>) return XLA_FFI_DataType_F32;
  if constexpr (std::is_same_v<T, int64_t>) return XLA_FFI_DataType_S64;
}

struct Pool {};
template <class T>
struct Attribute {};
struct Remaining {};
struct RemainingResults {};

// One overload for each kind of operand; the first argument only selects it.
template <DataType type>
Buffer<type> decode(Buffer<type>*, Decoder& d) {
  return Buffer<type>(d.check(d.take(d.frame->args.args, d.frame->args.size, d.argument), type));
}
inline AnyBuffer decode(AnyBuffer*, Decoder& d) {
  return AnyBuffer(d.take(d.frame->args.args, d.frame->args.size, d.argument));
}
template <DataType type>
ResultBuffer<type> decode(ResultBuffer<type>*, Decoder& d) {
  return ResultBuffer<type>(Buffer<type>(d.check(d.take(d.frame->rets.rets, d.frame->rets.size, d.result), type)));
}
template <class T>
T decode(Attribute<T>*, Decoder& d) {
  T value;
  std::memcpy(&value, d.take_attribute(scalar_type<T>()), sizeof value);
  return value;
}
inline ThreadPool decode(Pool*, Decoder& d) { return ThreadPool(d.frame->api, d.frame->ctx); }

}  // namespace internal

// The results that follow those of the binding; no kernel looks at them.
class RemainingRets {};

// The arguments that follow those of the binding.
class RemainingArgs {
 public:
  RemainingArgs(const XLA_FFI_CallFrame* frame, int64_t first) : frame_(frame), first_(first) {}
  size_t size() const { return frame_->args.size - first_; }

  template <class T>
  ErrorOr<T> get(size_t i) const {
    internal::Decoder decoder{frame_, nullptr, first_ + static_cast<int64_t>(i)};
    const T value = internal::decode(static_cast<T*>(nullptr), decoder);
    if (decoder.problem) return Error::InvalidArgument(decoder.problem);
    return value;
  }

 private:
  const XLA_FFI_CallFrame* frame_;
  int64_t first_;
};

namespace internal {

inline RemainingRets decode(RemainingResults*, Decoder& d) {
  d.result = d.frame->rets.size;
  return RemainingRets();
}
inline RemainingArgs decode(Remaining*, Decoder& d) {
  const int64_t first = d.argument;
  d.argument = d.frame->args.size;
  return RemainingArgs(d.frame, first);
}

}  // namespace internal

// ---- handlers --------------------------------------------------------------------------------------------------

// What a function is called with: its operands in order, and the names of its attributes.
template <class... Operands>
struct Binding {
  static constexpr size_t kMaxAttributes = 8;
  const char* names[kMaxAttributes] = {};
  size_t num_names = 0;

  template <class Operand>
  Binding<Operands..., Operand> add() const {
    Binding<Operands..., Operand> next;
    for (size_t i = 0; i < num_names; ++i) next.names[i] = names[i];
    next.num_names = num_names;
    return next;
  }
  template <class T>
  auto Ctx() const {
    static_assert(std::is_same_v<T, ThreadPool>);
    return add<internal::Pool>();
  }
  template <class T>
  auto Arg() const { return add<T>(); }
  template <class T>
  auto Ret() const { return add<Result<T>>(); }
  auto RemainingArgs() const { return add<internal::Remaining>(); }
  auto RemainingRets() const { return add<internal::RemainingResults>(); }
  template <class T>
  auto Attr(const char* name) const {
    auto next = add<internal::Attribute<T>>();
    next.names[next.num_names++] = name;
    return next;
  }

  template <class Function>
  XLA_FFI_Error* call(XLA_FFI_CallFrame* frame, Function function) const {
    for (auto* extension = frame->extension_start; extension; extension = extension->next) {
      if (extension->type != XLA_FFI_Extension_Metadata) continue;
      // XLA asks which version of its interface the handler was compiled with.
      XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
      metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
      metadata->traits = 0;
#if XLA_FFI_API_MINOR >= 3
      metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
#endif
      return nullptr;
    }
    internal::Decoder decoder{frame, names};
    // Braces decode from left to right.
    std::tuple<decltype(internal::decode(static_cast<Operands*>(nullptr), decoder))...> operands{
        internal::decode(static_cast<Operands*>(nullptr), decoder)...};
    if (decoder.argument != frame->args.size || decoder.result != frame->rets.size) {
      decoder.problem = "wrong number of arrays";
    }
    if (decoder.problem) return internal::to_xla(frame->api, Error::InvalidArgument(decoder.problem));
    return internal::to_xla(frame->api, std::apply(function, operands));
  }
};

struct Ffi {
  static Binding<> Bind() { return {}; }
};

}  // namespace xla::ffi

// Defines the C function `symbol` that XLA calls: it decodes a call by `binding` and passes it to `function`.
#define XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function, binding)                              \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) { \
    return (binding).call(frame, function);                                                   \
  }                                                                                           \
  static_assert(true)
