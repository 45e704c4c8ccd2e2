// Ragged attention over a blocked KV cache on the CPU: writes the new keys and values in place, then attends.
//
// The order of every sum depends only on the query's own position:
//   - a score sums over the head dimension from 0 to D-1;
//   - keys are processed in tiles of 64, and tiles in segments of 256, both aligned to position 0 of the sequence;
//   - within a segment the softmax is computed online, tile by tile; a segment is then merged into the previous ones.
// A row's result is therefore bit-identical regardless of the other rows in the batch, of how its prompt was split into
// chunks, and of the number of threads: rows share tiles but never a sum. Masked keys add an exact zero, and keys that
// are visible to no row are never read.
#include <algorithm>
#include <vector>

#include "worker.h"

namespace pallas_kernels {
namespace {

// ---- planning and running --------------------------------------------------------------------------------------

template <class Element>
void write(const Problem<Element>& p, ffi::ThreadPool& pool) {
  constexpr int64_t kTokens = 16;  // per task; four tasks or fewer are not worth another thread
  auto write_some = [&](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(p.T, (task + 1) * kTokens); ++t) {
      const int64_t slot = p.kv_slots[t];
      if (slot < 0 || slot >= p.N * p.B) continue;
      for (int64_t head = 0; head < p.K; ++head) {
        const int64_t from = (t * p.K + head) * p.D;
        const int64_t to = ((slot / p.B * p.K + head) * p.B + slot % p.B) * p.D;
        convert(p.k + from, p.k_cache + to, static_cast<int>(p.D));
        if (p.v_cache != p.k_cache) convert(p.v + from, p.v_cache + to, static_cast<int>(p.D));
      }
    }
  };
  const int64_t num_tasks = (p.T + kTokens - 1) / kTokens;
  if (num_tasks > 4) {
    parallel_for(pool, num_tasks, write_some);
  } else {
    for (int64_t task = 0; task < num_tasks; ++task) write_some(task);
  }
}

template <class Element>
std::vector<Unit> find_units(const Problem<Element>& p) {
  std::vector<Unit> units;
  const int64_t tokens_per_unit = std::max<int64_t>(1, kMaxRows / p.G);
  int64_t end_of_last = 0;
  auto clear = [&](int64_t begin, int64_t end) {
    if (begin < end) std::memset(p.out + begin * p.H * p.D, 0, (end - begin) * p.H * p.D * sizeof(float));
  };
  for (int64_t s = 0; s < p.S; ++s) {
    // The clamps have no effect on a well-formed batch; they keep a malformed one within the arrays.
    const int64_t start = std::clamp<int64_t>(p.query_starts[s], end_of_last, p.T);
    const int64_t end = std::clamp<int64_t>(p.query_starts[s + 1], start, p.T);
    const int64_t context = std::min<int64_t>(p.context_lens[s], p.M * p.B);
    clear(end_of_last, start);
    end_of_last = end;
    if (context < end - start) {
      clear(start, end);
      continue;
    }
    for (int64_t t = start; t < end; t += tokens_per_unit) {
      Unit unit{};
      unit.sequence = static_cast<int32_t>(s);
      unit.first_token = static_cast<int32_t>(t);
      unit.num_tokens = static_cast<int32_t>(std::min(tokens_per_unit, end - t));
      unit.first_position = static_cast<int32_t>(context - (end - t));
      unit.key_begin = std::max(0, unit.first_position - p.window + 1);
      unit.key_end = unit.first_position + unit.num_tokens;
      for (int64_t head = 0; head < p.K; ++head) {
        unit.head = static_cast<int32_t>(head);
        units.push_back(unit);
      }
    }
  }
  clear(end_of_last, p.T);
  return units;
}

template <class Element>
void attend(const Problem<Element>& p, ffi::ThreadPool& pool) {
  std::vector<Unit> units = find_units(p);
  if (units.empty()) return;
  // In units of one score: loading and transposing a key costs about as much as four rows of scores.
  auto cost_of = [&](const Unit& unit, int keys) { return static_cast<float>(keys) * (unit.num_tokens * p.G + 4); };
  float total_cost = 0;
  for (const Unit& unit : units) total_cost += cost_of(unit, unit.key_end - unit.key_begin);
  const float largest_item = total_cost / (4 * std::max<int64_t>(1, pool.num_threads()));
  constexpr float kWorthAThread = 200e3;  // multiply-adds: about 10 us, the cost of waking a thread
  const bool alone = total_cost * p.D < kWorthAThread;

  struct Partials {};
  const int64_t dim = p.padded_dim();
  std::vector<Item> items;
  int64_t num_floats = 0;
  for (size_t u = 0; u < units.size(); ++u) {
    Unit& unit = units[u];
    const int first = unit.key_begin / kSegment, last = (unit.key_end - 1) / kSegment;
    const int num_keys = unit.key_end - unit.key_begin;
    const bool split = !alone && last > first && cost_of(unit, num_keys) > largest_item;
    unit.num_pieces = split ? last - first + 1 : 1;
    unit.partials = num_floats;
    if (split) num_floats += unit.num_pieces * State::size(unit.num_tokens * p.G, dim);
    for (int piece = 0; piece < unit.num_pieces; ++piece) {
      items.push_back({static_cast<int32_t>(u), piece, cost_of(unit, split ? kSegment : num_keys)});
    }
  }
  float* partials = scratch<Partials>(num_floats);
  std::vector<std::atomic<int>> num_missing(units.size());
  for (size_t u = 0; u < units.size(); ++u) num_missing[u].store(units[u].num_pieces, std::memory_order_relaxed);

  auto first_key = [&](const Item& item) {
    const int begin = units[item.unit].key_begin;
    return item.piece == 0 ? begin : (begin / kSegment + item.piece) * kSegment;
  };
  const int64_t num_threads = alone ? 1 : std::max<int64_t>(1, pool.num_threads());
  auto run = [&](int64_t i) {
    const Item& item = items[i];
    const Unit& unit = units[item.unit];
    Worker<Element> worker(p);
    typename Worker<Element>::Start next{};
    if (i + num_threads < static_cast<int64_t>(items.size())) {
      const Item& later = items[i + num_threads];
      next = {&units[later.unit], first_key(later)};
    }
    if (unit.num_pieces == 1) {
      worker.finish(unit, worker.attend(unit, unit.key_begin, unit.key_end, next));
      return;
    }
    const int rows = unit.num_tokens * static_cast<int>(p.G);
    const int64_t size = State::size(rows, dim);
    auto partial = [&](int piece) { return State::at(partials + unit.partials + piece * size, rows, dim); };
    const int begin = first_key(item);
    const State state = worker.attend(unit, begin, std::min(unit.key_end, (begin / kSegment + 1) * kSegment), next);
    std::memcpy(partial(item.piece).out, state.out, size * sizeof(float));
    // The thread that completes the last piece merges all pieces, in key order.
    if (num_missing[item.unit].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int piece = 1; piece < unit.num_pieces; ++piece) worker.merge(rows, partial(piece), partial(0));
    worker.finish(unit, partial(0));
  };
  if (alone) {
    for (size_t i = 0; i < items.size(); ++i) run(i);
    return;
  }
  // The most expensive items come first, so that the threads finish at about the same time.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  parallel_for(pool, static_cast<int64_t>(items.size()), run);
}

// ---- XLA -------------------------------------------------------------------------------------------------------

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

template <class Element, ffi::DataType type>
ffi::Error ragged_attention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, ffi::Buffer<type> k_cache,
                            ffi::Buffer<type> v_cache, Ints kv_slots, Ints query_starts, Ints context_lens,
                            Ints block_tables, Ints layer, Ints window, Floats alibi_slopes, Floats sinks,
                            ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::Buffer<type>> new_k_cache,
                            ffi::Result<ffi::Buffer<type>> new_v_cache, int64_t num_blocks, float scale,
                            float soft_cap) {
  const bool values_in_keys = v_cache.element_count() == 0;
  if (new_k_cache->untyped_data() != k_cache.untyped_data() ||
      (!values_in_keys && new_v_cache->untyped_data() != v_cache.untyped_data())) {
    return ffi::Error::Internal("ragged_attention: the cache is not updated in place");
  }
  Problem<Element> p{};
  const auto q_dims = q.dimensions(), cache_dims = k_cache.dimensions(), table_dims = block_tables.dimensions();
  p.T = q_dims[0];
  p.H = q_dims[1];
  p.D = q_dims[2];
  p.K = cache_dims[1];
  p.B = cache_dims[2];
  p.G = p.H / p.K;
  p.N = num_blocks;
  p.S = table_dims[0];
  p.M = table_dims[1];
  const int64_t num_layers = cache_dims[0] / num_blocks;
  const int64_t start = std::clamp<int64_t>(layer.typed_data()[0], 0, num_layers - 1) * p.N * p.K * p.B * p.D;
  p.q = q.typed_data();
  p.k = k.typed_data();
  p.v = v.typed_data();
  p.k_cache = reinterpret_cast<Element*>(new_k_cache->untyped_data()) + start;
  p.v_cache = values_in_keys ? p.k_cache : reinterpret_cast<Element*>(new_v_cache->untyped_data()) + start;
  p.kv_slots = kv_slots.typed_data();
  p.query_starts = query_starts.typed_data();
  p.context_lens = context_lens.typed_data();
  p.block_tables = block_tables.typed_data();
  p.alibi_slopes = alibi_slopes.element_count() > 0 ? alibi_slopes.typed_data() : nullptr;
  p.sinks = sinks.element_count() > 0 ? sinks.typed_data() : nullptr;
  p.out = out->typed_data();
  p.window = std::max(1, window.typed_data()[0]);
  p.scale = scale;
  p.soft_cap = soft_cap;
  write(p, pool);
  attend(p, pool);
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<Floats>()              // q
      .template Arg<Floats>()              // k
      .template Arg<Floats>()              // v
      .template Arg<ffi::Buffer<type>>()   // k_cache
      .template Arg<ffi::Buffer<type>>()   // v_cache, [0] when values are read from the keys
      .template Arg<Ints>()                // kv_slots
      .template Arg<Ints>()                // query_starts
      .template Arg<Ints>()                // context_lens
      .template Arg<Ints>()                // block_tables
      .template Arg<Ints>()                // layer
      .template Arg<Ints>()                // window
      .template Arg<Floats>()              // alibi_slopes, [0] when there are none
      .template Arg<Floats>()              // sinks, [0] when there are none
      .template Ret<Floats>()              // out
      .template Ret<ffi::Buffer<type>>()   // k_cache
      .template Ret<ffi::Buffer<type>>()   // v_cache
      .template Attr<int64_t>("num_blocks")
      .template Attr<float>("scale")
      .template Attr<float>("soft_cap");
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(pallas_kernels_ragged_attention_f32,
                              (pallas_kernels::ragged_attention<float, xla::ffi::F32>),
                              pallas_kernels::binding<xla::ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(pallas_kernels_ragged_attention_bf16,
                              (pallas_kernels::ragged_attention<pallas_kernels::BFloat16, xla::ffi::BF16>),
                              pallas_kernels::binding<xla::ffi::BF16>());
