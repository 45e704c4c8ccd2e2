// Attention for the rows of a unit: queries of one sequence and KV head that share tiles of keys and values.
#pragma once

#include <algorithm>
#include <cmath>

#include "tile.h"

namespace pallas_kernels {
namespace {

// ---- the problem -----------------------------------------------------------------------------------------------

template <class Element>
struct Problem {
  const float* q;           // [T, H, D]
  const float* k;           // [T, K, D]
  const float* v;           // [T, K, D]
  Element* k_cache;         // [N, K, B, D], the blocks of this layer
  Element* v_cache;         // [N, K, B, D]; may be k_cache
  const int32_t* kv_slots;  // [T]
  const int32_t* query_starts;  // [S+1]
  const int32_t* context_lens;  // [S]
  const int32_t* block_tables;  // [S, M]
  const float* alibi_slopes;    // [H] or null
  const float* sinks;           // [H] or null
  float* out;                   // [T, H, D]
  int64_t T, S, M, H, K, G, D, N, B;
  int32_t window;  // keys visible to a query, including its own
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
  int32_t num_pieces;          // 1: one item processes the whole unit; otherwise one item per segment
  int64_t partials;            // index of the first piece's result
};

struct Item {
  int32_t unit;
  int32_t piece;
  float cost;
};

// Softmax state of the rows of a unit: maximum score, sum of exponentials, weighted values.
struct State {
  float* top;   // [rows]
  float* sum;   // [rows, kLanes]: partial sums during a segment; afterwards the total is in lane 0
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

  // The keys that this thread will probably need next.
  struct Start {
    const Unit* unit;  // null: unknown
    int begin;
  };

  // Attends from `unit` to the keys in [begin, end), which are segment bounds clipped to the visible keys. Returns the
  // softmax state.
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

  // Merges `part`, whose keys follow those of `total`, into `total`. Either may be empty.
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

  // Divides by the sum of exponentials, including a sink's if there is one, and writes the rows to `out`.
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
  // The key and value rows of one tile. Entries for invisible keys repeat a visible one.
  struct Rows {
    const Element* keys[kTile];
    const Element* values[kTile];
    int begin, end;  // visible to any row, relative to the tile
  };

  // The part of [keys.begin, keys.end) visible to any of the `count` rows starting at `row`; empty if begin >= end.
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
      // While this tile is processed, the next one is prefetched, even if it belongs to another item.
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

  // scores_[row, j] = q[row] . key[j] for groups of kLanes keys that contain a visible key; the rest is undefined.
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
          multiply_add<R(), V()>(q_ + row * p_.D, p_.D, 0, dim, Strided{keys, kTile},
                                 scores_ + row * kTile + group * kLanes, kTile, true);
        });
      }
    });
  }

  // Turns the scores of row r into weights and updates its maximum and sum. Not inlined, so that every row is computed
  // by the same machine code.
  __attribute__((noinline)) void softmax(const Unit& unit, int r, int tile, const Rows& rows, const State& state) {
    const int position = unit.first_position + r / static_cast<int>(p_.G);
    const int64_t head = unit.head * p_.G + r % p_.G;
    const int first = rows.begin / kLanes, last = (rows.end + kLanes - 1) / kLanes;
    float* scores = scores_ + r * kTile;
    // Key j is visible if begin <= j < end. position - window cannot overflow: both are in [0, 2^31).
    const int begin = std::max(position - p_.window + 1, 0) - tile, end = position + 1 - tile;
    if (std::max(begin, 0) >= std::min(end, kTile)) {
      for (int group = first; group < last; ++group) store(scores + group * kLanes, Vec{});
      rescale_[r] = 1;
      return;
    }
    const bool plain = p_.soft_cap == 0 && p_.alibi_slopes == nullptr && begin <= 0 && end >= kTile;
    if (plain && first == 0 && last == kGroups) {  // the common case stays in registers
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

  // Raises the maximum of row r to that of `scores`, sets the factor that rescales its previous sums, and returns the
  // new maximum.
  KERNEL_INLINE float begin_row(int r, Vec scores, const State& state) {
    const float old_top = state.top[r];
    const float new_top = std::max(old_top, largest(scores));
    rescale_[r] = old_top == new_top ? 1.0f : exp_of(old_top - new_top);
    state.top[r] = new_top;
    return new_top;
  }

  // out[row] = out[row] * rescale[row] + sum over j of weight[row, j] * value[j], in ascending order of j.
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
    // The first block of rows prefetches. A prefetch of what is being read, as by the others, has no effect.
    const void* const* prefetched = nullptr;
    const void* next[kTile];
    if (ahead != nullptr) {
      std::copy(ahead->values, ahead->values + kTile, next);
      prefetched = next;
    }
    const void* current[kTile];
    std::copy(values + rows.begin, values + rows.end, current + rows.begin);
    for_each_block(num_rows, [&](int row, int count) {
      const Range range = visible(unit, row, count, tile, rows);
      for (int64_t d = 0; d < dim_; d += kBlockVecs * kLanes) {
        const int num_vecs = static_cast<int>(std::min<int64_t>(kBlockVecs, (dim_ - d) / kLanes));
        const int64_t size = prefetched == nullptr ? sizeof(float) : sizeof(Element);
        const Scattered from{values, d, prefetched == nullptr ? current : prefetched, d * size, kLanes * size};
        with_shape(count, num_vecs, [&](auto R, auto V) {
          multiply_add<R(), V()>(scores_ + row * kTile, kTile, range.begin, range.end, from, state.out + row * dim_ + d,
                                 dim_, is_first);
        });
      }
      prefetched = nullptr;
    });
  }

  // Splits the rows into blocks of nearly equal size, at most kBlockRows each.
  template <class F>
  static KERNEL_INLINE void for_each_block(int num_rows, F&& f) {
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
  int end_ = 0;  // end of this item's keys
};

}  // namespace
}  // namespace pallas_kernels
