// y = x @ w[layer] (+ residual), or silu(x @ gate) * (x @ up), for float32, bfloat16 or int8 weights stored in panels,
// or weights of 4 or 8 bits stored in blocks.
//
// The weights of all layers are one array, and `layer` selects one of them in place: a loop over layers copies nothing.
#include "blocks.h"

namespace pallas_kernels {
namespace {

// Splits the rows into blocks of nearly equal size, at most kMaxRows each: 15 rows become 8 + 7, not 14 + 1.
struct RowBlocks {
  int64_t rows, count, size, num_larger;

  explicit RowBlocks(int64_t rows) : rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {
    size = count ? rows / count : 0;
    num_larger = count ? rows % count : 0;
  }
  int64_t start(int64_t i) const { return i * size + std::min(i, num_larger); }
  int64_t length(int64_t i) const { return size + (i < num_larger); }
};

// One row, two panels at a time: a column is one chain of multiply-adds, and only with several vectors of columns does a
// CPU have another one to go on with while it waits for a result. A work item is a run of such pairs, so that what a
// pair prefetches is what the thread needs next.
template <class Weight>
void multiply_row(ffi::ThreadPool& pool, const typename Weight::Factor* a, int64_t steps, const Weight& weight,
                  int64_t num_panels, const Output& output) {
  const int64_t num_pairs = (num_panels + 1) / 2, pair_bytes = 2 * weight.panel_bytes();
  const int64_t enough_items = 8 * std::max<int64_t>(pool.num_threads(), 1);
  const int64_t run = std::max<int64_t>(1, std::min(kRunBytes / pair_bytes, num_pairs / enough_items));
  parallel_for(pool, (num_pairs + run - 1) / run, [&](int64_t item) {
    for (int64_t panel = 2 * run * item; panel < std::min(2 * run * (item + 1), num_panels); panel += 2) {
      float sums[2 * kWidth];
      const bool pair = panel + 1 < num_panels;
      for (int64_t k = 0; k == 0 || k < steps; k += kDepth) {
        weight.multiply_row(std::min(kDepth, steps - k), a + k, weight.part(panel, k), sums, k == 0, pair);
      }
      output.write(0, panel, sums, nullptr);
      if (pair) output.write(0, panel + 1, sums + kWidth, nullptr);
    }
  });
}

struct PackedRows;
struct WidePanel;
struct Sums;

// scales [num_panels, kWidth] or null.
template <class Weight>
void multiply(ffi::ThreadPool& pool, const float* x, int64_t m, int64_t depth, const Weight& weight, const float* scales,
              int64_t num_panels, const Output& output) {
  using Factor = typename Weight::Factor;
  using Wide = typename Weight::Wide;
  const RowBlocks blocks(m);
  if (blocks.count == 0 || num_panels == 0) return;
  const int64_t steps = num_steps<Wide>(depth);

  // Activations are transposed within a row block. A single float32 row already has that layout.
  const bool packs = m > 1 || Weight::kGroup > 1;
  Factor* packed = packs ? reinterpret_cast<Factor*>(scratch<PackedRows>(m * steps)) : nullptr;
  const Factor* a = packs ? packed : reinterpret_cast<const Factor*>(x);
  if constexpr (Weight::kPairs) {
    if (!packs) return multiply_row(pool, a, steps, weight, num_panels, output);
  }
  const int64_t num_packs = packs ? blocks.count : 0;
  std::atomic<int64_t> num_packed{0};

  // A work item is a (chunk of row blocks, panel) pair. There are as few chunks as the cache size and the number of
  // threads allow.
  const int64_t num_threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t enough_items = 4 * num_threads;
  int64_t num_chunks = std::max((m * steps * static_cast<int64_t>(sizeof(Factor)) + kChunkBytes - 1) / kChunkBytes,
                                (enough_items + num_panels - 1) / num_panels);
  num_chunks = std::min(num_chunks, blocks.count);

  parallel_for(pool, num_packs + num_chunks * num_panels, [&](int64_t item) {
    if (item < num_packs) {
      const int64_t start = blocks.start(item);
      pack_rows<Wide>(x + start * depth, blocks.length(item), depth, packed + start * steps);
      num_packed.fetch_add(1, std::memory_order_release);
      return;
    }
    // Packing items have lower numbers than this one, so they have already started (see parallel_for).
    wait_until([&] { return num_packed.load(std::memory_order_acquire) == num_packs; });
    const int64_t chunk = (item - num_packs) / num_panels, panel = (item - num_packs) % num_panels;
    const int64_t first_block = chunk * blocks.count / num_chunks;
    const int64_t last_block = (chunk + 1) * blocks.count / num_chunks;
    const float* panel_scales = scales ? scales + panel * kWidth : nullptr;
    const int64_t first_row = blocks.start(first_block);
    const bool widens = weight.widens(last_block - first_block, blocks.length(first_block));
    auto* wide = reinterpret_cast<typename Wide::Element*>(
        widens ? scratch<WidePanel>(std::min(steps, kDepth) * kWidth) : nullptr);
    float* sums = scratch<Sums>((blocks.start(last_block) - first_row) * kWidth);

    for (int64_t k = 0; k == 0 || k < steps; k += kDepth) {
      const int64_t part = std::min(kDepth, steps - k);
      const char* b = weight.part(panel, k);
      if (widens) weight.widen(b, part, wide);
      // A single tile is bound by memory, so it prefetches a short distance ahead in its own stream. With several
      // tiles, all but the first find the panel in the cache; together they prefetch what this thread will most likely
      // need next: the rest of the panel, and then the panel num_threads further on, because threads claim panels in
      // order. A wrong guess, or an address past the end, costs only time.
      const bool last_part = k + part == steps, single = last_block - first_block == 1;
      const char* ahead = single && !widens ? b + kNearBytes : weight.part(last_part ? panel + num_threads : panel,
                                                                           last_part ? 0 : k + part);
      const int64_t ahead_step = weight.step_bytes() / (last_block - first_block);
      for (int64_t i = first_block; i < last_block; ++i) {
        const int64_t row = blocks.start(i), rows = blocks.length(i);
        const Factor* block = a + row * steps + k * rows;
        float* block_sums = sums + (row - first_row) * kWidth;
        const char* fetch = ahead + (i - first_block) * ahead_step * part;
        if (widens) {
          tile_for<Wide>(rows)(part, reinterpret_cast<const typename Wide::Factor*>(block), wide, block_sums, k == 0,
                               fetch, ahead_step);
        } else {
          weight.multiply(rows, part, block, b, block_sums, k == 0, fetch, ahead_step);
        }
        if (last_part) {
          for (int64_t r = 0; r < rows; ++r) output.write(row + r, panel, block_sums + r * kWidth, panel_scales);
        }
      }
    }
  });
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("pallas_kernels_matmul: " + what); }

template <class Arithmetic>
ffi::Error matmul_blocks(ffi::ThreadPool& pool, int64_t format, int64_t size, F32 x, int64_t rows, ffi::AnyBuffer weight,
                         int64_t axis, int64_t layer, const Output& output) {
  const auto xs = x.dimensions(), ws = weight.dimensions();
  Blocks<Arithmetic> blocks(format, weight.untyped_data(), size, xs[1]);
  if (!blocks.stored_as(ws[axis + 1], ws[axis + 2], ws[axis + 3])) {
    return wrong("activations and blocks have incompatible shapes");
  }
  blocks.data += layer * ws[axis] * blocks.panel_bytes();
  multiply(pool, x.typed_data(), rows, xs[1], blocks, nullptr, ws[axis], output);
  return ffi::Error::Success();
}

// weight is [L, num_panels, steps, kWidth, group], or one layer without the axis L; in blocks, of type uint8, it is
// [L, num_panels, num_blocks, bytes, 1]. Rows of x from num_rows on are padding: they are not computed, and their results are
// zero. Remaining arguments: scales, float32[L, num_panels, kWidth], if the weight is int8; then the residual if
// `has_residual`. `format`, `block_size` and `rounds` (whether products are those of bfloat16) are for blocks only.
ffi::Error matmul(ffi::ThreadPool pool, bool gated, bool has_residual, int64_t format, int64_t block_size, bool rounds, F32 x,
                  ffi::AnyBuffer weight, S32 layer, S32 num_rows, ffi::RemainingArgs others,
                  ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), ys = y->dimensions();
  const int64_t columns = gated ? kWidth / 2 : kWidth;
  const int64_t axis = ws.size() == 5;  // the number of layer axes
  if (xs.size() != 2 || ws.size() != static_cast<size_t>(4 + axis) || ys.size() != 2 || ys[0] != xs[0] ||
      (ys[1] + columns - 1) / columns != ws[axis]) {
    return wrong("activations, panels and result have incompatible shapes");
  }
  const int64_t num_layers = axis ? ws[0] : 1, num_panels = ws[axis];
  const int64_t index = layer.typed_data()[0];
  if (index < 0 || index >= num_layers) {
    return wrong("layer " + std::to_string(index) + " of a weight with " + std::to_string(num_layers) + " layers");
  }
  const bool scaled = weight.element_type() == ffi::S8;
  if (others.size() != static_cast<size_t>(scaled) + has_residual) return wrong("wrong number of arguments");
  Output output{nullptr, y->typed_data(), ys[1], gated};
  const float* scales = nullptr;
  for (size_t i = 0; i < others.size(); ++i) {
    const ffi::ErrorOr<F32> other = others.get<F32>(i);
    if (!other.has_value()) return other.error();
    const bool is_scales = scaled && i == 0;
    if (static_cast<int64_t>(other->element_count()) != (is_scales ? num_layers * num_panels * kWidth : ys[0] * ys[1])) {
      return wrong("scales or residual have the wrong size");
    }
    (is_scales ? scales : output.residual) = other->typed_data() + (is_scales ? index * num_panels * kWidth : 0);
  }
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, xs[0]);
  std::memset(y->typed_data() + rows * ys[1], 0, (xs[0] - rows) * ys[1] * sizeof(float));
  if (weight.element_type() == ffi::U8) {
    return with_memory("pallas_kernels_matmul", [&] {
      return rounds ? matmul_blocks<BFloat16::Wide>(pool, format, block_size, x, rows, weight, axis, index, output)
                    : matmul_blocks<Float32>(pool, format, block_size, x, rows, weight, axis, index, output);
    });
  }
  return with_storage(weight.element_type(), "pallas_kernels_matmul", [&](auto storage) {
    using Storage = decltype(storage);
    const int64_t steps = num_steps<Storage>(xs[1]);
    if (ws[axis + 3] != Storage::kGroup || ws[axis + 2] != kWidth || ws[axis + 1] != steps) {
      return wrong("activations, panels and result have incompatible shapes");
    }
    const auto* panels = static_cast<const typename Storage::Element*>(weight.untyped_data());
    const Dense<Storage> dense{panels + index * num_panels * steps * kStep<Storage>, steps};
    multiply(pool, x.typed_data(), rows, xs[1], dense, scales, num_panels, output);
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace pallas_kernels

// The number of output columns of a panel, and of values per column in one step. The Python side packs accordingly.
KERNEL_EXPORT int pallas_kernels_matmul_panel_width() { return pallas_kernels::kWidth; }
KERNEL_EXPORT int pallas_kernels_matmul_narrow_group() { return pallas_kernels::BFloat16::kGroup; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsMatmul, pallas_kernels::matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("gated")
                                  .Attr<bool>("has_residual")
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("block_size")
                                  .Attr<bool>("rounds")
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
