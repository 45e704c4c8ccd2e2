// y = x @ w (+ residual), or silu(x @ gate) * (x @ up), for weights stored in panels: float32, bfloat16 or int8.
//
// A panel holds kWidth output columns of the weight, row after row of the contraction axis:
//
//      w [K, N]                      panels [ceil(N / kWidth), K, kWidth]
//      |<- kWidth ->|<- kWidth ->|   so that a tile reads one unbroken stream of memory
//
// Every output is one chain of fused multiply-adds over k = 0 .. K-1, whatever the tile, the thread and the number of
// rows: the result of a row does not depend on its companions, to the last bit.
#include "common.h"

namespace fastgen {
namespace {

// Accumulators are kMaxRows * kVecs of the 32 (AVX-512, NEON) or 16 vector registers; the others hold a row of the
// panel.
#if defined(__AVX512F__)
constexpr int kVecs = 2, kMaxRows = 14;
#elif defined(__aarch64__)
constexpr int kVecs = 4, kMaxRows = 6;
#else
constexpr int kVecs = 2, kMaxRows = 6;
#endif
constexpr int kWidth = kVecs * kLanes;
// Rows of a panel that are worked on at once: 2048 * 32 floats are 256 KB, a part of the L2 cache.
constexpr int64_t kDepth = 2048;
// Bytes of activations that one item walks through for each panel: they should stay in the L2 or L3 cache.
constexpr int64_t kChunkBytes = 1 << 20;
// How far a single tile fetches ahead in its own panel, a memory page: the hardware's prefetcher stops at its end.
constexpr int64_t kNearBytes = 4096;

struct Float32 {
  static constexpr bool kNarrow = false;
  using Element = float;
  static FASTGEN_INLINE Vec get(const float* p) { return load(p); }
};
struct BFloat16 {
  static constexpr bool kNarrow = true;
  using Element = uint16_t;
  static FASTGEN_INLINE Vec get(const uint16_t* p) { return load_bfloat16(p); }
};
struct Int8 {
  static constexpr bool kNarrow = true;
  using Element = int8_t;
  static FASTGEN_INLINE Vec get(const int8_t* p) { return load_int8(p); }
};

// sums[Rows][kWidth] (+)= a @ b, with a [depth, Rows] (packed) and b [depth, kWidth]. `ahead` is memory that will be
// needed soon: `ahead_step` bytes of it are fetched into the cache for every k.
template <int Rows, class Weight>
void tile(int64_t depth, const float* a, const typename Weight::Element* b, float* sums, bool first,
          const char* ahead, int64_t ahead_step) {
  Vec acc[Rows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = first ? Vec{} : load(sums + r * kWidth + v * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = Weight::get(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec x = splat(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = x * row[v] + acc[r][v];
    }
    // Two cache lines, since a float32 row of an AVX-512 panel is that long.
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 64);
    ahead += ahead_step;
    a += Rows;
    b += kWidth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(sums + r * kWidth + v * kLanes, acc[r][v]);
  }
}

template <class Weight>
using Tile = void (*)(int64_t, const float*, const typename Weight::Element*, float*, bool, const char*, int64_t);

template <class Weight, size_t... I>
Tile<Weight> tile_for(int64_t rows, std::index_sequence<I...>) {
  static constexpr Tile<Weight> table[] = {tile<I + 1, Weight>...};
  return table[rows - 1];
}

// Rows are split into blocks of nearly equal size, at most kMaxRows: 15 rows are 8 + 7, not 14 + 1.
struct RowBlocks {
  int64_t rows, count, size, num_larger;

  explicit RowBlocks(int64_t rows) : rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {
    size = count ? rows / count : 0;
    num_larger = count ? rows % count : 0;
  }
  int64_t start(int64_t i) const { return i * size + std::min(i, num_larger); }
  int64_t length(int64_t i) const { return size + (i < num_larger); }
};

// out[k * rows + r] = x[r * depth + k], for at most kMaxRows rows.
void pack_rows(const float* x, int64_t rows, int64_t depth, float* out) {
  constexpr int kGroups = (kMaxRows + kLanes - 1) / kLanes;
  const float* const end = out + rows * depth;
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec columns[kGroups][kLanes];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t r = g * kLanes + i;
        columns[g][i] = r < rows ? load(x + r * depth + k) : Vec{};
      }
      transpose(columns[g]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i, out += rows) {
      for (int g = 0; g * kLanes < rows; ++g) {
        // A whole vector spills into the next column, which overwrites that; behind the last one another thread may
        // be writing.
        float* to = out + g * kLanes;
        if (to + kLanes <= end) {
          store(to, columns[g][i]);
        } else {
          for (int64_t r = 0; to + r < end; ++r) to[r] = columns[g][i][r];
        }
      }
    }
  }
  for (; k < depth; ++k) {
    for (int64_t r = 0; r < rows; ++r) *out++ = x[r * depth + k];
  }
}

// Where the sums of a tile go: y[row, columns of the panel].
struct Output {
  const float* scales;    // [num_panels, kWidth] or null
  const float* residual;  // like y, or null
  float* y;               // [M, n]
  int64_t n;
  bool gated;  // a panel is kWidth / 2 gate columns, then the up columns that belong to them

  void write(int64_t row, int64_t panel, const float* sums) const {
    const int vecs = gated ? kVecs / 2 : kVecs;
    const float* scale = scales ? scales + panel * kWidth : nullptr;
    for (int v = 0; v < vecs; ++v) {
      const int64_t column = (panel * vecs + v) * kLanes;
      const int64_t valid = std::min<int64_t>(n - column, kLanes);
      if (valid <= 0) return;
      Vec value = scaled(sums, scale, v);
      if (gated) value = silu(value) * scaled(sums, scale, v + vecs);
      const int64_t at = row * n + column;
      if (valid == kLanes) {
        if (residual) value += load(residual + at);
        store(y + at, value);
      } else {
        for (int64_t i = 0; i < valid; ++i) y[at + i] = residual ? value[i] + residual[at + i] : value[i];
      }
    }
  }

  static FASTGEN_INLINE Vec scaled(const float* sums, const float* scale, int v) {
    const Vec sum = load(sums + v * kLanes);
    return scale ? sum * load(scale + v * kLanes) : sum;
  }
};

struct PackedRows;
struct WidePanel;
struct Sums;

template <class Weight>
void multiply(ffi::ThreadPool& pool, const float* x, int64_t m, int64_t depth, const typename Weight::Element* weight,
              int64_t num_panels, const Output& output) {
  using Element = typename Weight::Element;
  const RowBlocks blocks(m);
  if (blocks.count == 0 || num_panels == 0) return;

  // Activations are transposed within a row block; one row is that already.
  const bool packs = m > 1;
  float* packed = packs ? scratch<PackedRows>(m * depth) : nullptr;
  const float* a = packs ? packed : x;
  const int64_t num_packs = packs ? blocks.count : 0;
  std::atomic<int64_t> num_packed{0};

  // Items are (chunk of row blocks, panel): as few chunks as the cache and the number of threads allow.
  const int64_t num_threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t enough_items = 4 * num_threads;
  int64_t num_chunks = std::max((m * depth * 4 + kChunkBytes - 1) / kChunkBytes,
                                (enough_items + num_panels - 1) / num_panels);
  num_chunks = std::min(num_chunks, blocks.count);

  parallel_for(pool, num_packs + num_chunks * num_panels, [&](int64_t item) {
    if (item < num_packs) {
      const int64_t start = blocks.start(item);
      pack_rows(x + start * depth, blocks.length(item), depth, packed + start * depth);
      num_packed.fetch_add(1, std::memory_order_release);
      return;
    }
    // Whoever packs has a lower number, so has begun: see parallel_for.
    wait_until([&] { return num_packed.load(std::memory_order_acquire) == num_packs; });
    const int64_t chunk = (item - num_packs) / num_panels, panel = (item - num_packs) % num_panels;
    const int64_t first_block = chunk * blocks.count / num_chunks;
    const int64_t last_block = (chunk + 1) * blocks.count / num_chunks;
    const Element* panel_data = weight + panel * depth * kWidth;
    const int64_t first_row = blocks.start(first_block);
    // With many rows it pays to widen the panel to float32 once, with few it is done on the way into the registers.
    const bool widens = Weight::kNarrow && last_block - first_block > 1;
    float* wide = widens ? scratch<WidePanel>(std::min(depth, kDepth) * kWidth) : nullptr;
    float* sums = scratch<Sums>((blocks.start(last_block) - first_row) * kWidth);

    for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      const Element* b = panel_data + k * kWidth;
      if (widens) {
        for (int64_t i = 0; i < part * kWidth; i += kLanes) store(wide + i, Weight::get(b + i));
      }
      // A single tile waits for memory, and fetches a little ahead in the stream that it reads. Several tiles find the
      // panel in the cache after the first; together they fetch what this thread most likely multiplies by next: the
      // rest of the panel, then, as threads take panels in turn, the one num_threads further on. A wrong guess, or
      // one past the end, costs time only.
      const bool last_part = k + part == depth, single = last_block - first_block == 1;
      const Element* next = last_part ? panel_data + num_threads * depth * kWidth : b + part * kWidth;
      const char* ahead = single ? reinterpret_cast<const char*>(b) + kNearBytes : reinterpret_cast<const char*>(next);
      const int64_t ahead_step = static_cast<int64_t>(kWidth * sizeof(Element)) / (last_block - first_block);
      for (int64_t i = first_block; i < last_block; ++i) {
        const int64_t row = blocks.start(i), rows = blocks.length(i);
        const float* block = a + row * depth + k * rows;
        float* block_sums = sums + (row - first_row) * kWidth;
        constexpr auto all = std::make_index_sequence<kMaxRows>{};
        const char* fetch = ahead + (i - first_block) * ahead_step * part;
        if (widens) {
          tile_for<Float32>(rows, all)(part, block, wide, block_sums, k == 0, fetch, ahead_step);
        } else {
          tile_for<Weight>(rows, all)(part, block, b, block_sums, k == 0, fetch, ahead_step);
        }
        if (last_part) {
          for (int64_t r = 0; r < rows; ++r) output.write(row + r, panel, block_sums + r * kWidth);
        }
      }
    }
  });
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// Rows of x from num_rows on are padding: they cost nothing and come out as zero.
// Further arguments: float32[num_panels, kWidth] scales if the weight is int8, then the residual if `has_residual`.
ffi::Error matmul(ffi::ThreadPool pool, bool gated, bool has_residual, F32 x, ffi::AnyBuffer weight, S32 num_rows,
                  ffi::RemainingArgs others, ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), ys = y->dimensions();
  const int64_t columns = gated ? kWidth / 2 : kWidth;
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2 || ws[2] != kWidth || ws[1] != xs[1] || ys[0] != xs[0] ||
      (ys[1] + columns - 1) / columns != ws[0]) {
    return ffi::Error::InvalidArgument("fastgen_matmul: activations, panels and result do not fit");
  }
  const bool scaled = weight.element_type() == ffi::S8;
  if (others.size() != static_cast<size_t>(scaled) + has_residual) {
    return ffi::Error::InvalidArgument("fastgen_matmul: wrong number of arguments");
  }
  Output output{nullptr, nullptr, y->typed_data(), ys[1], gated};
  for (size_t i = 0; i < others.size(); ++i) {
    const ffi::ErrorOr<F32> other = others.get<F32>(i);
    if (!other.has_value()) return other.error();
    const bool is_scales = scaled && i == 0;
    if (static_cast<int64_t>(other->element_count()) != (is_scales ? ws[0] * kWidth : ys[0] * ys[1])) {
      return ffi::Error::InvalidArgument("fastgen_matmul: scales or residual do not fit");
    }
    (is_scales ? output.scales : output.residual) = other->typed_data();
  }
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, xs[0]);
  std::memset(y->typed_data() + rows * ys[1], 0, (xs[0] - rows) * ys[1] * sizeof(float));
  const auto multiply_by = [&](auto kind) {
    using Weight = decltype(kind);
    const auto* panels = static_cast<const typename Weight::Element*>(weight.untyped_data());
    multiply<Weight>(pool, x.typed_data(), rows, xs[1], panels, ws[0], output);
    return ffi::Error::Success();
  };
  try {
    switch (weight.element_type()) {
      case ffi::F32: return multiply_by(Float32{});
      case ffi::BF16: return multiply_by(BFloat16{});
      case ffi::S8: return multiply_by(Int8{});
      default: return ffi::Error::InvalidArgument("fastgen_matmul: weights are float32, bfloat16 or int8");
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fastgen_matmul: no memory for packed activations");
  }
}

}  // namespace
}  // namespace fastgen

// Output columns in a panel; the Python side packs accordingly.
extern "C" int fastgen_matmul_panel_width() { return fastgen::kWidth; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(FastgenMatmul, fastgen::matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("gated")
                                  .Attr<bool>("has_residual")
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
