// The tiles that the Hopper kernels exist for, and the one table that chooses among them.
#pragma once

#include <cstdint>
#include <string>

namespace moeops::cuda::hopper {

// Columns of a tile of 128 rows; pingpong or cooperative consumers; pairs of CTAs share weights.
enum class RowsTileKind {
  kPingpong192,
  kPingpong192Pair,
  kPingpong128,
  kCooperative256,
  kCooperative256Pair
};

struct RowsChoice {
  RowsTileKind tile;
  bool large_groups;  // all row tiles of an expert are visited together, or eight of them
  bool whole_tiles;   // multiply dead blocks of 64 rows too: CTAs stay in step, and share L2 reads
};

enum class WeightGradTileKind { kPingpong192, kPingpong192Pair, kCooperative256 };

struct WeightGradChoice {
  WeightGradTileKind tile;
  int group;  // tiles along m that are visited together
};

// What the epilogue of a product computes, as far as tiles exist for it.
enum class Unit { kPlain, kSwiglu, kWithOptions };

// Sizes of a product, as a host that must not wait for the device knows them: n columns, k of the
// reduction, the mean rows per expert.
struct ProductSize {
  int64_t n, k, rows_per_expert;
};

RowsChoice choose_store(const ProductSize& size, bool across);
RowsChoice choose_up(const ProductSize& size, bool gated, bool across);
RowsChoice choose_down_backward(const ProductSize& size, Unit unit, double memory_speed);
WeightGradChoice choose_weight_grad(int64_t m, int64_t n, int64_t rows_per_expert, bool gathers_q);

// What MOEOPS_TILES, a list such as "up=c256x2:large:whole,down=p192:small:skip,dw_up=p192x2:16",
// says of a product in place of the table; for measurements.
bool forced_choice(const char* product, RowsChoice& choice);
bool forced_choice(const char* product, WeightGradChoice& choice);

}  // namespace moeops::cuda::hopper
