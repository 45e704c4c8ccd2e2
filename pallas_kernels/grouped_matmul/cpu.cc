// y[t] = x[t] @ w[g], or silu(x[t] @ gate[g]) * (x[t] @ up[g]), for rows t sorted by their group g.
//
//      x [T, K]      | group 0 | group 1 |   | group 3      | no group |     sizes: 2, 2, 0, 3
//      w panels      [G, ceil(N / kWidth), steps, kWidth, group]: each group's weight, laid out as in matmul/cpu.cc
//
// In blocks (see blocks.h), w is [G, ceil(N / kWidth), num_blocks, bytes, 1]. Only the weights of groups with rows are read. Rows that belong to no group are set to zero at no further cost.
#include <vector>

#include "blocks.h"

namespace pallas_kernels {
namespace {

// At most kMaxRows adjacent rows of one group, multiplied together by one tile.
struct RowBlock {
  int64_t row, rows;
};
// Adjacent row blocks of one group. One work item multiplies a chunk by one panel.
struct Chunk {
  int64_t group, first_block, last_block;
};

// Splits every group into row blocks of nearly equal size (15 rows become 8 + 7, not 14 + 1), and groups the blocks
// into chunks.
void split(const int32_t* sizes, int64_t num_groups, int64_t num_rows, int64_t bytes_per_row,
           std::vector<RowBlock>& blocks, std::vector<Chunk>& chunks) {
  const int64_t blocks_per_chunk = std::max<int64_t>(1, kChunkBytes / (bytes_per_row * kMaxRows));
  int64_t start = 0;
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t rows = std::min<int64_t>(std::max(sizes[group], 0), num_rows - start);
    if (rows == 0) continue;
    const int64_t first = blocks.size(), count = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * rows / count;
      blocks.push_back({start + begin, (i + 1) * rows / count - begin});
    }
    const int64_t num_chunks = (count + blocks_per_chunk - 1) / blocks_per_chunk;
    for (int64_t i = 0; i < num_chunks; ++i) {
      chunks.push_back({group, first + i * count / num_chunks, first + (i + 1) * count / num_chunks});
    }
    start += rows;
  }
}

struct PackedRows;
struct WidePanel;
struct Sums;

// `weight` holds the panels of all groups, one group after another; scales [num_groups, num_panels, kWidth] or null.
template <class Weight>
void multiply(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t depth, const int32_t* sizes,
              int64_t num_groups, const Weight& weight, const float* scales, int64_t num_panels,
              const Output& output) {
  using Factor = typename Weight::Factor;
  using Wide = typename Weight::Wide;
  const int64_t steps = num_steps<Wide>(depth);
  std::vector<RowBlock> blocks;
  std::vector<Chunk> chunks;
  split(sizes, num_groups, num_rows, steps * sizeof(Factor), blocks, chunks);
  const int64_t num_blocks = blocks.size(), num_chunks = chunks.size();
  const int64_t num_used = num_blocks ? blocks.back().row + blocks.back().rows : 0;
  std::memset(output.y + num_used * output.n, 0, (num_rows - num_used) * output.n * sizeof(float));

  // Activations are transposed within a row block. A single float32 row already has that layout.
  auto* packed = reinterpret_cast<Factor*>(scratch<PackedRows>(num_used * steps));
  std::atomic<int64_t> num_packed{0};
  const auto packs = [](const RowBlock& block) { return block.rows > 1 || Weight::kGroup > 1; };
  const auto rows_of = [&](const RowBlock& block) {
    return (packs(block) ? packed : reinterpret_cast<const Factor*>(x)) + block.row * steps;
  };

  parallel_for(pool, num_blocks + num_chunks * num_panels, [&](int64_t item) {
    if (item < num_blocks) {
      const RowBlock block = blocks[item];
      if (packs(block)) pack_rows<Wide>(x + block.row * depth, block.rows, depth, packed + block.row * steps);
      num_packed.fetch_add(1, std::memory_order_release);
      return;
    }
    // Packing items have lower numbers than this one, so they have already started (see parallel_for).
    wait_until([&] { return num_packed.load(std::memory_order_acquire) == num_blocks; });
    const Chunk chunk = chunks[(item - num_blocks) / num_panels];
    const int64_t panel = (item - num_blocks) % num_panels, index = chunk.group * num_panels + panel;
    const float* panel_scales = scales ? scales + index * kWidth : nullptr;
    const int64_t first_row = blocks[chunk.first_block].row;
    const RowBlock last = blocks[chunk.last_block - 1];
    const bool widens = weight.widens(chunk.last_block - chunk.first_block, blocks[chunk.first_block].rows);
    auto* wide = reinterpret_cast<typename Wide::Element*>(
        widens ? scratch<WidePanel>(std::min(steps, kDepth) * kWidth) : nullptr);
    float* sums = scratch<Sums>((last.row + last.rows - first_row) * kWidth);

    for (int64_t k = 0; k == 0 || k < steps; k += kDepth) {
      const int64_t part = std::min(kDepth, steps - k);
      const char* b = weight.part(index, k);
      const char* ahead = b + kNearBytes;
      if (widens) weight.widen(b, part, wide);
      for (int64_t i = chunk.first_block; i < chunk.last_block; ++i) {
        const RowBlock block = blocks[i];
        const Factor* a = rows_of(block) + k * block.rows;
        float* block_sums = sums + (block.row - first_row) * kWidth;
        if (widens) {
          tile_for<Wide>(block.rows)(part, reinterpret_cast<const typename Wide::Factor*>(a), wide, block_sums, k == 0,
                                     ahead, weight.step_bytes());
        } else {
          weight.multiply(block.rows, part, a, b, block_sums, k == 0, ahead, weight.step_bytes());
        }
        if (k + part < steps) continue;
        for (int64_t r = 0; r < block.rows; ++r) {
          output.write(block.row + r, panel, block_sums + r * kWidth, panel_scales);
        }
      }
    }
  });
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

ffi::Error wrong(const char* what) {
  return ffi::Error::InvalidArgument(std::string("pallas_kernels_grouped_matmul: ") + what);
}

// weight is [G, num_panels, steps, kWidth, group], or [L, G, ...] with the groups of all layers, one after another; in
// blocks, of type uint8, it is [..., num_blocks, bytes, 1]. `scales` is float32[G, num_panels, kWidth], or [L, G, ...], if
// the weight is int8, else empty. `format`, `block_size` and `rounds` are those of `matmul`, for blocks only.
ffi::Error grouped_matmul(ffi::ThreadPool pool, bool gated, int64_t format, int64_t block_size, bool rounds, F32 x,
                          ffi::AnyBuffer weight, F32 scales, S32 group_sizes, S32 first_group,
                          ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), ys = y->dimensions();
  const int64_t columns = gated ? kWidth / 2 : kWidth;
  const size_t axis = ws.size() == 6;  // the number of layer axes
  if (xs.size() != 2 || ws.size() != 5 + axis || ys.size() != 2 || ys[0] != xs[0] ||
      (ys[1] + columns - 1) / columns != ws[axis + 1]) {
    return wrong("activations, panels and result have incompatible shapes");
  }
  const int64_t num_weights = axis ? ws[0] * ws[1] : ws[0], num_panels = ws[axis + 1];
  const bool is_int8 = weight.element_type() == ffi::S8;
  if (static_cast<int64_t>(scales.element_count()) != (is_int8 ? num_weights * num_panels * kWidth : 0)) {
    return wrong("scales have the wrong size");
  }
  const int64_t num_groups = group_sizes.element_count(), first = first_group.typed_data()[0];
  if (first < 0 || first + num_groups > num_weights) return wrong("first_group is out of range");
  const auto run = [&](auto panels) {
    panels.data += first * num_panels * panels.panel_bytes() / sizeof(*panels.data);
    multiply(pool, x.typed_data(), xs[0], xs[1], group_sizes.typed_data(), num_groups, panels,
             is_int8 ? scales.typed_data() + first * num_panels * kWidth : nullptr, num_panels,
             Output{nullptr, y->typed_data(), ys[1], gated});
    return ffi::Error::Success();
  };
  const auto run_blocks = [&](auto arithmetic) {
    const Blocks<decltype(arithmetic)> blocks(format, weight.untyped_data(), block_size, xs[1]);
    return blocks.stored_as(ws[axis + 2], ws[axis + 3], ws[axis + 4])
               ? run(blocks)
               : wrong("activations and blocks have incompatible shapes");
  };
  if (weight.element_type() == ffi::U8) {
    return with_memory("pallas_kernels_grouped_matmul",
                       [&] { return rounds ? run_blocks(BFloat16::Wide{}) : run_blocks(Float32{}); });
  }
  return with_storage(weight.element_type(), "pallas_kernels_grouped_matmul", [&](auto storage) {
    using Storage = decltype(storage);
    const int64_t steps = num_steps<Storage>(xs[1]);
    if (ws[axis + 4] != Storage::kGroup || ws[axis + 3] != kWidth || ws[axis + 2] != steps) {
      return wrong("activations, panels and result have incompatible shapes");
    }
    return run(Dense<Storage>{static_cast<const typename Storage::Element*>(weight.untyped_data()), steps});
  });
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsGroupedMatmul, pallas_kernels::grouped_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("gated")
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("block_size")
                                  .Attr<bool>("rounds")
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
