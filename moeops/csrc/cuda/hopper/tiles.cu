#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "checks.h"
#include "hopper/tiles.h"

namespace moeops::cuda::hopper {

namespace {

// Every rule was measured by benchmarks.tiles, those of the backward of the down product on an H100
// and an H200, the others on an H100 (docs/hopper.md).
constexpr int64_t kManyRows = 1536;       // rows per expert from which 128-row tiles waste little
constexpr int64_t kFewRows = 128;         // up to here, dead blocks of rows are most of the work
constexpr int64_t kLongReduction = 4096;  // hides the epilogue of a cooperative tile, repays pairs
constexpr int64_t kManyColumns = 1024;    // from which pairs were ahead where memory is slow
constexpr double kFastMemory = 4;         // TB/s: an H200's, not an H100's
constexpr int64_t kShortReduction = 512;  // a tile's products take no longer than its loads

int64_t tiles_across(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

// Columns that a grid of tiles computes beyond the n that exist, as a part of n.
double waste(int64_t n, int64_t tile) {
  return static_cast<double>(tiles_across(n, tile) * tile) / static_cast<double>(n) - 1;
}

// Whether tiles of 192 columns, or of 256, compute much more than asked for where the other do not.
bool fits_256_better(int64_t n) { return waste(n, 192) > waste(n, 256) + 0.05; }
bool fits_192_better(int64_t n) { return waste(n, 256) > waste(n, 192) + 0.03; }

}  // namespace

RowsChoice choose_store(const ProductSize& size, bool across) {
  RowsChoice choice{};
  if (forced_choice(across ? "dx" : "down", choice)) return choice;
  if (size.rows_per_expert <= kFewRows) return {RowsTileKind::kPingpong192, false, false};
  const bool long_enough = size.k >= (across ? 2 * kShortReduction : kLongReduction);
  // Pairs of wide tiles read the least from L2, which limits these products.
  if (long_enough && !fits_192_better(size.n)) {
    return {RowsTileKind::kCooperative256Pair, false, false};
  }
  if (!across && size.rows_per_expert < kManyRows) {
    return {RowsTileKind::kPingpong192Pair, false, false};
  }
  // The down product of an expert reads its weights once that way; x's gradient does not care.
  return {RowsTileKind::kPingpong192, !across, size.k > kShortReduction};
}

RowsChoice choose_up(const ProductSize& size, bool gated, bool across) {
  RowsChoice choice{};
  if (forced_choice("up", choice)) return choice;
  if (!gated) return {RowsTileKind::kPingpong192Pair, false, false};
  // Gate and up in whole blocks of 64 columns.
  if (across) return {RowsTileKind::kCooperative256Pair, false, false};
  if (fits_256_better(size.n)) {
    return {RowsTileKind::kCooperative256, false, size.rows_per_expert > kFewRows};
  }
  return {RowsTileKind::kPingpong192Pair, false, false};
}

RowsChoice choose_down_backward(const ProductSize& size, Unit unit, double memory_speed) {
  RowsChoice choice{};
  if (forced_choice("dh", choice)) return choice;
  constexpr RowsChoice kPair{RowsTileKind::kPingpong192Pair, false, false};
  if (unit == Unit::kPlain) return kPair;
  const bool narrow = fits_256_better(size.n), even = tiles_across(size.n, 192) % 2 == 0;
  // Single CTAs were ahead nearly everywhere. Where memory is slow, pairs were with wide experts,
  // but never with an odd number of tiles. Why was not measured; pairs read fewer weights from L2.
  const bool shares = memory_speed < kFastMemory && size.rows_per_expert > kFewRows &&
                      size.n >= kManyColumns && even && (narrow || size.k >= kLongReduction);
  if (shares && unit == Unit::kSwiglu) return kPair;
  return {narrow ? RowsTileKind::kPingpong128 : RowsTileKind::kPingpong192, false, false};
}

WeightGradChoice choose_weight_grad(int64_t m, int64_t n, int64_t rows_per_expert, bool gathers_q) {
  WeightGradChoice choice{};
  if (forced_choice(gathers_q ? "dw_up" : "dw_down", choice)) return choice;
  if (!gathers_q && fits_256_better(n)) return {WeightGradTileKind::kCooperative256, 16};
  // Pairs share the operand in place; it is read often where the other one is wide.
  const int64_t in_place = gathers_q ? m : n;
  const bool pair = gathers_q ? in_place >= kLongReduction : in_place >= 1024;
  if (pair && rows_per_expert > kFewRows) return {WeightGradTileKind::kPingpong192Pair, 16};
  return {WeightGradTileKind::kPingpong192, 8};
}

namespace {

constexpr std::array<std::string_view, 6> kProducts{"up", "down", "dh", "dx", "dw_up", "dw_down"};

// The words after "product=" in MOEOPS_TILES.
std::optional<std::vector<std::string>> forced_words(const char* product) {
  const char* text = std::getenv("MOEOPS_TILES");
  if (text == nullptr) return std::nullopt;
  std::stringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    const size_t equals = entry.find('=');
    const std::string name = entry.substr(0, equals);
    STD_TORCH_CHECK(std::find(kProducts.begin(), kProducts.end(), name) != kProducts.end() &&
                        equals != std::string::npos,
                    "moeops: MOEOPS_TILES must name up, down, dh, dx, dw_up or dw_down before '=', "
                    "got '",
                    entry, "'. Correct it, or unset it.");
    if (name != product) continue;
    std::vector<std::string> words;
    std::stringstream rest(entry.substr(equals + 1));
    for (std::string word; std::getline(rest, word, ':');) words.push_back(word);
    return words;
  }
  return std::nullopt;
}

[[noreturn]] void refuse(const char* product, const char* wanted) {
  STD_TORCH_CHECK(false, "moeops: MOEOPS_TILES must give ", product, " as ", wanted, ", got '",
                  std::getenv("MOEOPS_TILES"), "'. Correct it, or unset it.");
  std::abort();
}

}  // namespace

bool forced_choice(const char* product, RowsChoice& choice) {
  constexpr auto kWanted = "p192|p192x2|p128|c256|c256x2:small|large:skip|whole";
  const auto words = forced_words(product);
  if (!words) return false;
  if (words->size() != 3) refuse(product, kWanted);
  const std::string& tile = (*words)[0];
  if (tile == "p192") {
    choice.tile = RowsTileKind::kPingpong192;
  } else if (tile == "p192x2") {
    choice.tile = RowsTileKind::kPingpong192Pair;
  } else if (tile == "p128") {
    choice.tile = RowsTileKind::kPingpong128;
  } else if (tile == "c256") {
    choice.tile = RowsTileKind::kCooperative256;
  } else if (tile == "c256x2") {
    choice.tile = RowsTileKind::kCooperative256Pair;
  } else {
    refuse(product, kWanted);
  }
  choice.large_groups = (*words)[1] == "large";
  choice.whole_tiles = (*words)[2] == "whole";
  if (!choice.large_groups && (*words)[1] != "small") refuse(product, kWanted);
  if (!choice.whole_tiles && (*words)[2] != "skip") refuse(product, kWanted);
  return true;
}

bool forced_choice(const char* product, WeightGradChoice& choice) {
  constexpr auto kWanted = "p192|p192x2|c256:GROUP";
  const auto words = forced_words(product);
  if (!words) return false;
  if (words->size() != 2) refuse(product, kWanted);
  const std::string& tile = (*words)[0];
  if (tile == "p192") {
    choice.tile = WeightGradTileKind::kPingpong192;
  } else if (tile == "p192x2") {
    choice.tile = WeightGradTileKind::kPingpong192Pair;
  } else if (tile == "c256") {
    choice.tile = WeightGradTileKind::kCooperative256;
  } else {
    refuse(product, kWanted);
  }
  choice.group = std::atoi((*words)[1].c_str());
  if (choice.group < 1) refuse(product, kWanted);
  return true;
}

}  // namespace moeops::cuda::hopper
