// y[t] = x[t] @ w[g], or silu(x[t] @ gate[g]) * (x[t] @ up[g]), for rows that are sorted by their group g.
//
//      x [T, K]      | group 0 | group 1 |   | group 3      | no group |     sizes: 2, 2, 0, 3
//      w panels      [G, ceil(N / kWidth), K, kWidth]: every group's weight as pallas_kernels/matmul stores one
//
// Only groups that have rows are read, and rows of no group are set to zero and cost nothing else. Every output is one
// chain of fused multiply-adds over k = 0 .. K-1, whatever the tile, the thread and the rows beside it: the result of
// a row does not depend on its companions, to the last bit.
#include <vector>

#include "common.h"

namespace fastgen {
namespace {

// Accumulators are kMaxRows * kVecs of the 32 (AVX-512, NEON) or 16 vector registers; the rest holds the weight's row.
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
// Bytes of activations that one item walks through for each panel: they should stay in the L2 cache.
constexpr int64_t kChunkBytes = 1 << 20;
// Fetched ahead in the panel, a memory page: the hardware's prefetcher stops at its end.
constexpr int64_t kAheadBytes = 4096;

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

// sums[Rows][kWidth] (+)= a @ b, with a [depth, Rows] and b [depth, kWidth].
template <int Rows, class Weight>
void tile(int64_t depth, const float* a, const typename Weight::Element* b, float* sums, bool first) {
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
    __builtin_prefetch(reinterpret_cast<const char*>(b) + kAheadBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(b) + kAheadBytes + 64);
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
using Tile = void (*)(int64_t, const float*, const typename Weight::Element*, float*, bool);

template <class Weight, size_t... I>
Tile<Weight> tile_for(int64_t rows, std::index_sequence<I...>) {
  static constexpr Tile<Weight> table[] = {tile<I + 1, Weight>...};
  return table[rows - 1];
}

// Neighbouring rows of one group, at most kMaxRows: those that a tile multiplies together.
struct RowBlock {
  int64_t row, rows;
};
// Neighbouring row blocks of one group: those that an item multiplies by one panel.
struct Chunk {
  int64_t group, first_block, last_block;
};

// Splits every group into row blocks of nearly equal size (15 rows are 8 + 7, not 14 + 1), and these into chunks.
void split(const int32_t* sizes, int64_t num_groups, int64_t num_rows, int64_t depth, std::vector<RowBlock>& blocks,
           std::vector<Chunk>& chunks) {
  const int64_t blocks_a_chunk = std::max<int64_t>(1, kChunkBytes / (depth * 4 * kMaxRows));
  int64_t start = 0;
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t rows = std::min<int64_t>(std::max(sizes[group], 0), num_rows - start);
    if (rows == 0) continue;
    const int64_t first = blocks.size(), count = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * rows / count;
      blocks.push_back({start + begin, (i + 1) * rows / count - begin});
    }
    const int64_t num_chunks = (count + blocks_a_chunk - 1) / blocks_a_chunk;
    for (int64_t i = 0; i < num_chunks; ++i) {
      chunks.push_back({group, first + i * count / num_chunks, first + (i + 1) * count / num_chunks});
    }
    start += rows;
  }
}

// out[k * rows + r] = x[r * depth + k]
void pack_rows(const float* x, int64_t rows, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      const Vec v = load(x + r * depth + k);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) out[(k + i) * rows + r] = v[i];
    }
  }
  for (; k < depth; ++k) {
    for (int64_t r = 0; r < rows; ++r) out[k * rows + r] = x[r * depth + k];
  }
}

// Where the sums of a tile go: y[row, columns of the panel].
struct Output {
  float* y;    // [T, n]
  int64_t n;
  bool gated;  // a panel is kWidth / 2 gate columns, then the up columns that belong to them

  void write(int64_t row, int64_t panel, const float* sums, const float* scales) const {
    const int vecs = gated ? kVecs / 2 : kVecs;
    for (int v = 0; v < vecs; ++v) {
      const int64_t column = (panel * vecs + v) * kLanes;
      const int64_t valid = std::min<int64_t>(n - column, kLanes);
      if (valid <= 0) return;
      Vec value = scaled(sums, scales, v);
      if (gated) value = silu(value) * scaled(sums, scales, v + vecs);
      float* at = y + row * n + column;
      if (valid == kLanes) {
        store(at, value);
      } else {
        for (int64_t i = 0; i < valid; ++i) at[i] = value[i];
      }
    }
  }

  static FASTGEN_INLINE Vec scaled(const float* sums, const float* scales, int v) {
    const Vec sum = load(sums + v * kLanes);
    return scales ? sum * load(scales + v * kLanes) : sum;
  }
};

struct PackedRows;
struct WidePanel;
struct Sums;

// weight [num_groups, num_panels, depth, kWidth], scales [num_groups, num_panels, kWidth] or null.
template <class Weight>
void multiply(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t depth, const int32_t* sizes,
              int64_t num_groups, const typename Weight::Element* weight, const float* scales, int64_t num_panels,
              const Output& output) {
  using Element = typename Weight::Element;
  std::vector<RowBlock> blocks;
  std::vector<Chunk> chunks;
  split(sizes, num_groups, num_rows, depth, blocks, chunks);
  const int64_t num_blocks = blocks.size(), num_chunks = chunks.size();
  const int64_t num_used = num_blocks ? blocks.back().row + blocks.back().rows : 0;
  std::memset(output.y + num_used * output.n, 0, (num_rows - num_used) * output.n * sizeof(float));

  // Activations are transposed within a row block; a single row is that already.
  float* packed = scratch<PackedRows>(num_used * depth);
  std::atomic<int64_t> num_packed{0};
  const auto rows_of = [&](const RowBlock& block) {
    return (block.rows == 1 ? x : packed) + block.row * depth;
  };

  parallel_for(pool, num_blocks + num_chunks * num_panels, [&](int64_t item) {
    if (item < num_blocks) {
      const RowBlock block = blocks[item];
      if (block.rows > 1) pack_rows(x + block.row * depth, block.rows, depth, packed + block.row * depth);
      num_packed.fetch_add(1, std::memory_order_release);
      return;
    }
    // Whoever packs has a lower number, so has begun: see parallel_for.
    wait_until([&] { return num_packed.load(std::memory_order_acquire) == num_blocks; });
    const Chunk chunk = chunks[(item - num_blocks) / num_panels];
    const int64_t panel = (item - num_blocks) % num_panels, index = chunk.group * num_panels + panel;
    const Element* panel_data = weight + index * depth * kWidth;
    const float* panel_scales = scales ? scales + index * kWidth : nullptr;
    const int64_t first_row = blocks[chunk.first_block].row;
    const RowBlock last = blocks[chunk.last_block - 1];
    // With many rows it pays to widen the panel to float32 once, with few it is done on the way into the registers.
    const bool widens = Weight::kNarrow && chunk.last_block - chunk.first_block > 1;
    float* wide = widens ? scratch<WidePanel>(std::min(depth, kDepth) * kWidth) : nullptr;
    float* sums = scratch<Sums>((last.row + last.rows - first_row) * kWidth);

    for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      const Element* b = panel_data + k * kWidth;
      if (widens) {
        for (int64_t i = 0; i < part * kWidth; i += kLanes) store(wide + i, Weight::get(b + i));
      }
      for (int64_t i = chunk.first_block; i < chunk.last_block; ++i) {
        const RowBlock block = blocks[i];
        const float* a = rows_of(block) + k * block.rows;
        float* block_sums = sums + (block.row - first_row) * kWidth;
        constexpr auto all = std::make_index_sequence<kMaxRows>{};
        if (widens) {
          tile_for<Float32>(block.rows, all)(part, a, wide, block_sums, k == 0);
        } else {
          tile_for<Weight>(block.rows, all)(part, a, b, block_sums, k == 0);
        }
        if (k + part < depth) continue;
        for (int64_t r = 0; r < block.rows; ++r) {
          output.write(block.row + r, panel, block_sums + r * kWidth, panel_scales);
        }
      }
    }
  });
}

using F32 = ffi::Buffer<ffi::F32>;

// `scales` is float32[G, num_panels, kWidth] if the weight is int8, else empty.
ffi::Error grouped_matmul(ffi::ThreadPool pool, bool gated, F32 x, ffi::AnyBuffer weight, F32 scales,
                          ffi::Buffer<ffi::S32> group_sizes, ffi::Buffer<ffi::S32> first_group,
                          ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), ys = y->dimensions();
  const int64_t columns = gated ? kWidth / 2 : kWidth;
  if (xs.size() != 2 || ws.size() != 4 || ys.size() != 2 || ws[3] != kWidth || ws[2] != xs[1] || ys[0] != xs[0] ||
      (ys[1] + columns - 1) / columns != ws[1]) {
    return ffi::Error::InvalidArgument("fastgen_grouped_matmul: activations, panels and result do not fit");
  }
  const bool is_int8 = weight.element_type() == ffi::S8;
  if (static_cast<int64_t>(scales.element_count()) != (is_int8 ? ws[0] * ws[1] * kWidth : 0)) {
    return ffi::Error::InvalidArgument("fastgen_grouped_matmul: scales do not fit");
  }
  const int64_t num_groups = group_sizes.element_count(), first = first_group.typed_data()[0];
  if (first < 0 || first + num_groups > ws[0]) {
    return ffi::Error::InvalidArgument("fastgen_grouped_matmul: first_group is out of range");
  }
  const Output output{y->typed_data(), ys[1], gated};
  const auto multiply_by = [&](auto kind) {
    using Weight = decltype(kind);
    const auto* panels = static_cast<const typename Weight::Element*>(weight.untyped_data());
    multiply<Weight>(pool, x.typed_data(), xs[0], xs[1], group_sizes.typed_data(), num_groups,
                     panels + first * ws[1] * ws[2] * kWidth,
                     is_int8 ? scales.typed_data() + first * ws[1] * kWidth : nullptr, ws[1], output);
    return ffi::Error::Success();
  };
  try {
    switch (weight.element_type()) {
      case ffi::F32: return multiply_by(Float32{});
      case ffi::BF16: return multiply_by(BFloat16{});
      case ffi::S8: return multiply_by(Int8{});
      default: return ffi::Error::InvalidArgument("fastgen_grouped_matmul: weights are float32, bfloat16 or int8");
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fastgen_grouped_matmul: no memory for packed activations");
  }
}

}  // namespace
}  // namespace fastgen

// Output columns in a panel; the Python side packs accordingly.
extern "C" int fastgen_grouped_matmul_panel_width() { return fastgen::kWidth; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(FastgenGroupedMatmul, fastgen::grouped_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("gated")
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
