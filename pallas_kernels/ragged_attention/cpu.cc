// Ragged attention over a blocked KV cache on the CPU: writes new keys and values in place, then attends.
//
// The order of every sum is a function of the query's own position alone:
//   - a score adds over the head dimension from 0 to D-1;
//   - keys are taken in tiles of 64 and tiles in segments of 256, both aligned to position 0 of the sequence;
//   - within a segment the softmax runs online, tile after tile; a segment's result is then merged into those before.
// So neither the companions of a row, nor how its prompt was cut into chunks, nor the number of threads changes a bit
// of it: rows share tiles of work, never a sum. Masked keys add an exact zero; keys of no row are never read.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"

namespace fastgen {
namespace {

constexpr int kTile = 64;      // keys whose transpose (16 KB at D = 64) shares the L1 cache with the values
constexpr int kSegment = 256;  // the least piece of a context that threads share
constexpr int kMaxRows = 192;  // query rows of a unit: enough to pay for the transpose, and still in the L2 cache
constexpr int kGroups = kTile / kLanes;

// Accumulators of a micro-kernel: kBlockRows x kBlockVecs vectors, which leaves registers for the operands.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVecs = 4;  // of 32 registers
#else
constexpr int kBlockVecs = 2;  // of 16
#endif
static_assert(kGroups % kBlockVecs == 0, "a tile is whole micro-kernels");

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- element types of the cache --------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

FASTGEN_INLINE Vec load_as_float(const float* p) { return load(p); }
FASTGEN_INLINE Vec load_as_float(const BFloat16* p) {
  const IntVec wide = __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), IntVec) << 16;
  Vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
FASTGEN_INLINE float to_float(float x) { return x; }
FASTGEN_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
void convert(const float* from, float* to, int n) { std::memcpy(to, from, n * sizeof(float)); }
void convert(const float* from, BFloat16* to, int n) {
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    // To the nearest, ties to even; a NaN keeps its sign and becomes quiet.
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i].bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

// ---- small pieces ----------------------------------------------------------------------------------------------

template <int Step, size_t... I>
FASTGEN_INLINE Vec swap_lanes(Vec v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int(I ^ Step)...);
}

FASTGEN_INLINE float largest(Vec v) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  if constexpr (kLanes > 8) v = max(v, swap_lanes<8>(v, lanes));
  if constexpr (kLanes > 4) v = max(v, swap_lanes<4>(v, lanes));
  v = max(v, swap_lanes<2>(v, lanes));
  v = max(v, swap_lanes<1>(v, lanes));
  return v[0];
}

FASTGEN_INLINE float exp_of(float x) { return exp(splat(x))[0]; }

FASTGEN_INLINE Vec tanh_of(Vec x) {
  const Vec size = max(x, -x);
  const Vec e = exp(-2.0f * size);
  const Vec y = (1.0f - e) / (1.0f + e);
  return x < Vec{} ? -y : y;
}

FASTGEN_INLINE Vec lane_numbers() {
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// ---- micro-kernel ----------------------------------------------------------------------------------------------

// c[r, :] += sum over i in [begin, end) of a[r, i] * b(i)[:] for R rows and V vectors of columns, i rising.
template <int R, int V, class RowOfB>
FASTGEN_INLINE void multiply_add(const float* a, int64_t lda, int begin, int end, RowOfB b, float* c, int64_t ldc,
                                 bool from_zero) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = from_zero ? Vec{} : load(c + r * ldc + v * kLanes);
  }
  for (int i = begin; i < end; ++i) {
    const float* row = b(i);
    Vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(row + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const float x = a[r * lda + i];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x * columns[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
  }
}

// Calls f with the compile-time numbers of rows and vectors.
template <int V, class F>
FASTGEN_INLINE void with_rows(int num_rows, F&& f) {
  switch (num_rows) {
    case 1: return f(std::integral_constant<int, 1>(), std::integral_constant<int, V>());
    case 2: return f(std::integral_constant<int, 2>(), std::integral_constant<int, V>());
    case 3: return f(std::integral_constant<int, 3>(), std::integral_constant<int, V>());
    case 4: return f(std::integral_constant<int, 4>(), std::integral_constant<int, V>());
    case 5: return f(std::integral_constant<int, 5>(), std::integral_constant<int, V>());
    default: return f(std::integral_constant<int, 6>(), std::integral_constant<int, V>());
  }
}

template <class F>
FASTGEN_INLINE void with_shape(int num_rows, int num_vecs, F&& f) {
  if constexpr (kBlockVecs == 4) {
    if (num_vecs == 4) return with_rows<4>(num_rows, f);
    if (num_vecs == 3) return with_rows<3>(num_rows, f);
  }
  if (num_vecs == 2) return with_rows<2>(num_rows, f);
  return with_rows<1>(num_rows, f);
}

// ---- the problem -----------------------------------------------------------------------------------------------

template <class Element>
struct Problem {
  const float* q;           // [T, H, D]
  const float* k;           // [T, K, D]
  const float* v;           // [T, K, D]
  Element* k_cache;         // [N, K, B, D], the blocks of this layer
  Element* v_cache;         // [N, K, B, D]
  const int32_t* kv_slots;  // [T]
  const int32_t* query_starts;  // [S+1]
  const int32_t* context_lens;  // [S]
  const int32_t* block_tables;  // [S, M]
  const float* alibi_slopes;    // [H] or null
  const float* sinks;           // [H] or null
  float* out;                   // [T, H, D]
  int64_t T, S, M, H, K, G, D, N, B;
  int32_t window;  // keys that a query sees, its own included
  float scale;
  float soft_cap;  // 0: none

  int64_t padded_dim() const { return (D + kLanes - 1) / kLanes * kLanes; }
};

// Consecutive queries of one sequence for one KV head: the rows that share tiles of keys and values.
struct Unit {
  int32_t sequence, head;
  int32_t first_token;    // in [0, T)
  int32_t num_tokens;
  int32_t first_position;  // of first_token in its sequence
  int32_t key_begin, key_end;  // keys visible to any row
  int32_t num_pieces;          // 1: one item does it all; else one item a segment
  int64_t partials;            // index of the first piece's result
};

struct Item {
  int32_t unit;
  int32_t piece;
  float cost;
};

// Softmax state of the rows of a unit: top score, sum of exponentials, weighted values.
struct State {
  float* top;   // [rows]
  float* sum;   // [rows, kLanes] while a segment runs, then [rows] in the first of them
  float* out;   // [rows, padded D]
  static int64_t size(int64_t rows, int64_t dim) { return rows * (1 + kLanes + dim) + kLanes; }
  static State at(float* memory, int64_t rows, int64_t dim) {
    return State{memory + rows * (kLanes + dim), memory + rows * dim, memory};
  }
};

template <class Element>
class Worker {
 public:
  explicit Worker(const Problem<Element>& problem) : p_(problem), dim_(problem.padded_dim()) {}

  // The keys that this thread will probably want next.
  struct Start {
    const Unit* unit;  // null: unknown
    int begin;
  };

  // Attends from `unit` to the keys of [begin, end); begin and end are clipped segment borders. Returns the state.
  State attend(const Unit& unit, int begin, int end, Start next) {
    next_ = next;
    end_ = end;
    const int rows = unit.num_tokens * static_cast<int>(p_.G);
    prepare(unit, rows);
    bool is_first = true;
    for (int at = begin; at < end;) {
      const int next = std::min(end, (at / kSegment + 1) * kSegment);
      State& state = is_first ? total_ : part_;
      attend_segment(unit, rows, at, next, state);
      if (!is_first) merge(rows, part_, total_);
      is_first = false;
      at = next;
    }
    return total_;
  }

  // Adds the keys behind those of `total`. An empty side changes nothing.
  void merge(int rows, const State& part, const State& total) {
    for (int r = 0; r < rows; ++r) {
      if (part.top[r] == -kInfinity) continue;
      if (total.top[r] == -kInfinity) {
        total.top[r] = part.top[r];
        total.sum[r * kLanes] = part.sum[r * kLanes];
        std::memcpy(total.out + r * dim_, part.out + r * dim_, dim_ * sizeof(float));
        continue;
      }
      const float top = std::max(total.top[r], part.top[r]);
      const float keep = exp_of(total.top[r] - top), add = exp_of(part.top[r] - top);
      total.top[r] = top;
      total.sum[r * kLanes] = total.sum[r * kLanes] * keep + part.sum[r * kLanes] * add;
      for (int64_t d = 0; d < dim_; d += kLanes) {
        float* to = total.out + r * dim_ + d;
        store(to, load(to) * keep + load(part.out + r * dim_ + d) * add);
      }
    }
  }

  // Divides by the sum of exponentials, a sink's included, and writes the rows to `out`.
  void finish(const Unit& unit, const State& total) {
    for (int i = 0, r = 0; i < unit.num_tokens; ++i) {
      for (int g = 0; g < p_.G; ++g, ++r) {
        const int64_t head = unit.head * p_.G + g;
        float factor;
        if (p_.sinks != nullptr) {
          const float top = std::max(total.top[r], p_.sinks[head]);
          const float keep = exp_of(total.top[r] - top);
          factor = keep / (total.sum[r * kLanes] * keep + exp_of(p_.sinks[head] - top));
        } else {
          factor = 1.0f / total.sum[r * kLanes];
        }
        float* to = p_.out + ((unit.first_token + i) * p_.H + head) * p_.D;
        const float* from = total.out + r * dim_;
        for (int64_t d = 0; d < p_.D; ++d) to[d] = from[d] * factor;
      }
    }
  }

 private:
  // The element rows of one tile; those of no visible key repeat a visible one.
  struct Rows {
    const Element* keys[kTile];
    const Element* values[kTile];
    int begin, end;  // visible to any row, relative to the tile
  };

  // The part of [keys.begin, keys.end) that any of `count` rows from `row` on sees; empty when begin >= end.
  struct Range {
    int begin, end;
  };
  Range visible(const Unit& unit, int row, int count, int tile, const Rows& keys) const {
    const int group = static_cast<int>(p_.G);
    const int first = unit.first_position + row / group, last = unit.first_position + (row + count - 1) / group;
    return {std::max(keys.begin, std::max(first - p_.window + 1, 0) - tile), std::min(keys.end, last + 1 - tile)};
  }

  void prepare(const Unit& unit, int rows) {
    struct Tag {};
    const int64_t state = State::size(rows, dim_);
    float* memory = scratch<Tag>(2 * state + rows * (p_.D + kTile + 1) + kTile * (p_.D + dim_) + 16 * kLanes);
    auto take = [&](int64_t n) {
      float* start = memory;
      memory += (n + kLanes - 1) / kLanes * kLanes;  // keeps vectors aligned
      return start;
    };
    keys_ = take(p_.D * kTile);
    values_ = take(kTile * dim_);
    scores_ = take(rows * kTile);
    total_ = State::at(take(state), rows, dim_);
    part_ = State::at(take(state), rows, dim_);
    q_ = take(rows * p_.D);
    rescale_ = take(rows);
    float* to = q_;
    for (int i = 0; i < unit.num_tokens; ++i) {
      const float* from = p_.q + ((unit.first_token + i) * p_.H + unit.head * p_.G) * p_.D;
      for (int64_t d = 0; d < p_.G * p_.D; ++d) *to++ = from[d] * p_.scale;
    }
  }

  void find_rows(const Unit& unit, int tile, int begin, int end, Rows& rows) const {
    const int32_t* table = p_.block_tables + unit.sequence * p_.M;
    rows.begin = std::max(begin, tile) - tile;
    rows.end = std::min(end, tile + kTile) - tile;
    for (int j = rows.begin; j < rows.end;) {
      const int position = tile + j;
      const int offset = static_cast<int>(position % p_.B);
      const int64_t block = std::clamp<int64_t>(table[position / p_.B], 0, p_.N - 1);
      const int64_t start = ((block * p_.K + unit.head) * p_.B + offset) * p_.D;
      const int count = std::min<int>(rows.end - j, static_cast<int>(p_.B) - offset);
      for (int i = 0; i < count; ++i, ++j) {
        rows.keys[j] = p_.k_cache + start + i * p_.D;
        rows.values[j] = p_.v_cache + start + i * p_.D;
      }
    }
    auto repeat = [&](int j, int visible) {
      rows.keys[j] = rows.keys[visible];
      rows.values[j] = rows.values[visible];
    };
    for (int j = 0; j < rows.begin; ++j) repeat(j, rows.begin);
    for (int j = rows.end; j < kTile; ++j) repeat(j, rows.end - 1);
  }

  void attend_segment(const Unit& unit, int num_rows, int begin, int end, State& state) {
    for (int r = 0; r < num_rows; ++r) state.top[r] = -kInfinity;
    std::memset(state.sum, 0, num_rows * kLanes * sizeof(float));
    const int first_tile = begin / kTile * kTile;
    Rows buffers[2];
    find_rows(unit, first_tile, begin, end, buffers[0]);
    for (int tile = first_tile, i = 0; tile < end; tile += kTile, ++i) {
      const Rows& rows = buffers[i & 1];
      // While this tile is worked on, the next one comes into the cache, be it of another item.
      Rows* ahead = &buffers[(i + 1) & 1];
      if (tile + kTile < end) {
        find_rows(unit, tile + kTile, begin, end, *ahead);
      } else if (end < end_) {
        find_rows(unit, end, end, end_, *ahead);
      } else if (next_.unit != nullptr) {
        find_rows(*next_.unit, next_.begin / kTile * kTile, next_.begin, next_.unit->key_end, *ahead);
      } else {
        ahead = nullptr;
      }
      score(unit, num_rows, tile, rows, ahead);
      for (int r = 0; r < num_rows; ++r) softmax(unit, r, tile, rows, state);
      add_values(unit, num_rows, tile, rows, ahead, tile == first_tile, state);
    }
    for (int r = 0; r < num_rows; ++r) {
      float s = 0;
      for (int lane = 0; lane < kLanes; ++lane) s += state.sum[r * kLanes + lane];
      state.sum[r * kLanes] = s;
    }
  }

  // scores_[row, j] = q[row] . key[j] for the groups of kLanes keys that hold a visible one; the rest is undefined.
  void score(const Unit& unit, int num_rows, int tile, const Rows& rows, const Rows* ahead) {
    const int first = rows.begin / kLanes, last = (rows.end + kLanes - 1) / kLanes;
    for (int group = first; group < last; ++group) {
      const Element* const* keys = rows.keys + group * kLanes;
      float* to = keys_ + group * kLanes;
      int64_t d = 0;
      for (; d + kLanes <= p_.D; d += kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) block[j] = load_as_float(keys[j] + d);
        if (ahead != nullptr) {
          for (int j = group * kLanes; j < (group + 1) * kLanes; ++j) __builtin_prefetch(ahead->keys[j] + d, 0, 2);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kTile, block[i]);
      }
      for (; d < p_.D; ++d) {
        for (int j = 0; j < kLanes; ++j) to[d * kTile + j] = to_float(keys[j][d]);
      }
    }
    const int dim = static_cast<int>(p_.D);
    for_each_block(num_rows, [&](int row, int count) {
      const Range range = visible(unit, row, count, tile, rows);
      if (range.begin >= range.end) return;
      const int end = (range.end + kLanes - 1) / kLanes;
      for (int group = range.begin / kLanes; group < end; group += kBlockVecs) {
        const float* keys = keys_ + group * kLanes;
        with_shape(count, std::min(kBlockVecs, end - group), [&](auto R, auto V) {
          multiply_add<R(), V()>(
              q_ + row * p_.D, p_.D, 0, dim, [&](int d) { return keys + d * kTile; },
              scores_ + row * kTile + group * kLanes, kTile, true);
        });
      }
    });
  }

  // Turns the scores of row r into weights and carries its top and sum on. Not inlined: one compiled form for all.
  __attribute__((noinline)) void softmax(const Unit& unit, int r, int tile, const Rows& rows, const State& state) {
    const int position = unit.first_position + r / static_cast<int>(p_.G);
    const int64_t head = unit.head * p_.G + r % p_.G;
    const int first = rows.begin / kLanes, last = (rows.end + kLanes - 1) / kLanes;
    float* scores = scores_ + r * kTile;
    // Visible: begin <= j < end. The window's difference cannot overflow: both lie in [0, 2^31).
    const int begin = std::max(position - p_.window + 1, 0) - tile, end = position + 1 - tile;
    if (std::max(begin, 0) >= std::min(end, kTile)) {
      for (int group = first; group < last; ++group) store(scores + group * kLanes, Vec{});
      rescale_[r] = 1;
      return;
    }
    const bool plain = p_.soft_cap == 0 && p_.alibi_slopes == nullptr && begin <= 0 && end >= kTile;
    if (plain && first == 0 && last == kGroups) {  // the usual case stays in registers
      Vec x[kGroups];
      for (int group = 0; group < kGroups; ++group) x[group] = load(scores + group * kLanes);
      Vec top = x[0];
      for (int group = 1; group < kGroups; ++group) top = max(top, x[group]);
      const float new_top = begin_row(r, top, state);
      Vec sum = load(state.sum + r * kLanes) * rescale_[r];
      for (int group = 0; group < kGroups; ++group) {
        const Vec weight = exp_below_overflow(x[group] - new_top);
        store(scores + group * kLanes, weight);
        sum = sum + weight;
      }
      store(state.sum + r * kLanes, sum);
      return;
    }
    Vec top = splat(-kInfinity);
    for (int group = first; group < last; ++group) {
      Vec x = load(scores + group * kLanes);
      if (p_.soft_cap != 0) x = p_.soft_cap * tanh_of(x / p_.soft_cap);
      const Vec key = lane_numbers() + static_cast<float>(group * kLanes);  // relative to the tile
      if (p_.alibi_slopes != nullptr) x += p_.alibi_slopes[head] * (key + static_cast<float>(tile - position));
      if (begin > group * kLanes) x = key < splat(static_cast<float>(begin)) ? splat(-kInfinity) : x;
      if (end < (group + 1) * kLanes) x = key < splat(static_cast<float>(end)) ? x : splat(-kInfinity);
      store(scores + group * kLanes, x);
      top = max(top, x);
    }
    const float new_top = begin_row(r, top, state);
    Vec sum = load(state.sum + r * kLanes) * rescale_[r];
    for (int group = first; group < last; ++group) {
      const Vec weight = exp_below_overflow(load(scores + group * kLanes) - new_top);
      store(scores + group * kLanes, weight);
      sum = sum + weight;
    }
    store(state.sum + r * kLanes, sum);
  }

  // Raises the top score of row r to that of `scores`, sets the factor that its sums so far shrink by; the new top.
  FASTGEN_INLINE float begin_row(int r, Vec scores, const State& state) {
    const float old_top = state.top[r];
    const float new_top = std::max(old_top, largest(scores));
    rescale_[r] = old_top == new_top ? 1.0f : exp_of(old_top - new_top);
    state.top[r] = new_top;
    return new_top;
  }

  // out[row] = out[row] * rescale[row] + sum over j of weight[row, j] * value[j], j rising.
  void add_values(const Unit& unit, int num_rows, int tile, const Rows& rows, const Rows* ahead, bool is_first,
                  const State& state) {
    const float* values[kTile];
    if (std::is_same_v<Element, float> && dim_ == p_.D) {
      for (int j = rows.begin; j < rows.end; ++j) values[j] = reinterpret_cast<const float*>(rows.values[j]);
    } else {
      for (int j = rows.begin; j < rows.end; ++j) {
        float* to = values_ + j * dim_;
        for (int64_t d = 0; d < p_.D; ++d) to[d] = to_float(rows.values[j][d]);
        for (int64_t d = p_.D; d < dim_; ++d) to[d] = 0;
        values[j] = to;
      }
    }
    if (!is_first) {
      for (int r = 0; r < num_rows; ++r) {
        if (rescale_[r] == 1.0f) continue;
        float* out = state.out + r * dim_;
        for (int64_t d = 0; d < dim_; d += kLanes) store(out + d, load(out + d) * rescale_[r]);
      }
    }
    bool prefetch = ahead != nullptr;
    for_each_block(num_rows, [&](int row, int count) {
      const Range range = visible(unit, row, count, tile, rows);
      for (int64_t d = 0; d < dim_; d += kBlockVecs * kLanes) {
        const int num_vecs = static_cast<int>(std::min<int64_t>(kBlockVecs, (dim_ - d) / kLanes));
        with_shape(count, num_vecs, [&](auto R, auto V) {
          auto run = [&](auto row_of) {
            multiply_add<R(), V()>(scores_ + row * kTile, kTile, range.begin, range.end, row_of,
                                   state.out + row * dim_ + d, dim_, is_first);
          };
          if (prefetch) {
            run([&](int j) {
              for (int i = 0; i < V() * kLanes; i += kLanes) __builtin_prefetch(ahead->values[j] + d + i, 0, 2);
              return values[j] + d;
            });
          } else {
            run([&](int j) { return values[j] + d; });
          }
        });
      }
      prefetch = false;
    });
  }

  // Cuts rows into blocks of at most kBlockRows, as equal as can be.
  template <class F>
  static FASTGEN_INLINE void for_each_block(int num_rows, F&& f) {
    const int num_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
    for (int i = 0; i < num_blocks; ++i) {
      const int row = num_rows * i / num_blocks;
      f(row, num_rows * (i + 1) / num_blocks - row);
    }
  }

  const Problem<Element>& p_;
  const int64_t dim_;
  float* keys_ = nullptr;     // [D, kTile]
  float* values_ = nullptr;   // [kTile, padded D]
  float* scores_ = nullptr;   // [rows, kTile]
  float* q_ = nullptr;        // [rows, D], scaled
  float* rescale_ = nullptr;  // [rows]
  State total_{}, part_{};
  Start next_{};
  int end_ = 0;  // of the keys of this item
};

// ---- planning and running --------------------------------------------------------------------------------------

template <class Element>
void write(const Problem<Element>& p, ffi::ThreadPool& pool) {
  constexpr int64_t kTokens = 16;  // a task; fewer tokens than two tasks are not worth another thread
  auto write_some = [&](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(p.T, (task + 1) * kTokens); ++t) {
      const int64_t slot = p.kv_slots[t];
      if (slot < 0 || slot >= p.N * p.B) continue;
      for (int64_t head = 0; head < p.K; ++head) {
        const int64_t from = (t * p.K + head) * p.D;
        const int64_t to = ((slot / p.B * p.K + head) * p.B + slot % p.B) * p.D;
        convert(p.k + from, p.k_cache + to, static_cast<int>(p.D));
        convert(p.v + from, p.v_cache + to, static_cast<int>(p.D));
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
    // The clamps change nothing in a well-formed batch; they keep a malformed one inside the arrays.
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
  // In units of one row of scores; moving and transposing a key costs about as much as four rows do.
  auto cost_of = [&](const Unit& unit, int keys) { return static_cast<float>(keys) * (unit.num_tokens * p.G + 4); };
  float total_cost = 0;
  for (const Unit& unit : units) total_cost += cost_of(unit, unit.key_end - unit.key_begin);
  const float largest_item = total_cost / (4 * std::max<int64_t>(1, pool.num_threads()));
  constexpr float kWorthAThread = 200e3;  // multiply-adds: about 10 us, what waking a thread costs
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
    // Whoever completes the last piece merges them all, in the order of the keys.
    if (num_missing[item.unit].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int piece = 1; piece < unit.num_pieces; ++piece) worker.merge(rows, partial(piece), partial(0));
    worker.finish(unit, partial(0));
  };
  if (alone) {
    for (size_t i = 0; i < items.size(); ++i) run(i);
    return;
  }
  // The longest first, so that the threads finish together.
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
  if (new_k_cache->untyped_data() != k_cache.untyped_data() || new_v_cache->untyped_data() != v_cache.untyped_data()) {
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
  p.v_cache = reinterpret_cast<Element*>(new_v_cache->untyped_data()) + start;
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
      .template Arg<ffi::Buffer<type>>()   // v_cache
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
}  // namespace fastgen

XLA_FFI_DEFINE_HANDLER_SYMBOL(fastgen_ragged_attention_f32,
                              (fastgen::ragged_attention<float, xla::ffi::F32>),
                              fastgen::binding<xla::ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fastgen_ragged_attention_bf16,
                              (fastgen::ragged_attention<fastgen::BFloat16, xla::ffi::BF16>),
                              fastgen::binding<xla::ffi::BF16>());
