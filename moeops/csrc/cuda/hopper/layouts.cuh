// Where values lie in shared memory and in which order tiles are visited. All positions are bytes.
#pragma once

namespace moeops::hopper {

// Operand tiles are lines of 128 bytes (64 values) whose 16-byte chunk c of line r lies at c ^ (r &
// 7). k along the lines: line = row of the tile, chunk = k / 8. k across the lines: per 64 columns
// 64 lines; line = k, chunk = column / 8.
__host__ __device__ constexpr int operand_chunk(int line, int chunk) {
  return line * 128 + ((chunk ^ (line & 7)) << 4);
}
constexpr int kColumnBlockBytes = 64 * 128;  // 64 columns x 64 k, with k across the lines

// Output chunks of 64 rows x 32 columns: lines of 64 bytes, 16-byte chunk c of row r at
// c ^ ((r >> 1) & 3), free of bank conflicts for stmatrix and ldmatrix.
__host__ __device__ constexpr int output_chunk(int row, int chunk) {
  return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}
constexpr int kOutputChunkBytes = 64 * 64;
// The address that lane `lane` of a warpgroup's warp gives for columns 8 j to 8 j + 15 of a chunk.
__host__ __device__ constexpr int output_lane(int warp, int lane, int j) {
  return output_chunk(warp * 16 + (lane & 15), j + (lane >> 4));
}

// Tiles along m in groups of `group`; inside a group m runs fastest.
__host__ __device__ inline void tile_in_groups(int t, int m_tiles, int n_tiles, int group, int& m,
                                               int& n) {
  const int g = t / (group * n_tiles), rest = t - g * group * n_tiles, first = g * group;
  const int size = m_tiles - first < group ? m_tiles - first : group;
  n = rest / size;
  m = first + rest - n * size;
}

// The same for the row-tile table, whose groups never cross experts: a group word holds the group's
// first row tile and its size; the group covers t in [first * n_tiles, (first + size) * n_tiles).
constexpr int kMaxGroup = 254;
__host__ __device__ constexpr int group_word(int first, int size) { return first * 256 + size; }
__host__ __device__ inline void row_tile_in_group(int t, int n_tiles, int word, int& m, int& n) {
  const int first = word >> 8, size = word & 255, rest = t - first * n_tiles;
  n = rest / size;
  m = first + rest - n * size;
}

// What the two CTAs of a cluster do with one unit of work.
enum class Pairing {
  kNothing,   // the last column of an odd number: there is none left
  kSeparate,  // one column each of the same row tile; CTA 1's column may be past the last one
  kShared,    // two neighbouring row tiles of the same column, whose other operand is shared
};
// Unit t of a group of `size` row tiles, which has size * ceil(n_tiles / 2) units: per two columns
// the size / 2 pairs of row tiles once for each column, then an odd last row tile with both
// columns.
__host__ __device__ inline Pairing pair_in_group(int t, int n_tiles, int word, int rank, int& m,
                                                 int& n) {
  const int first = word >> 8, size = word & 255, pairs = size >> 1;
  const int rest = t - first * ((n_tiles + 1) >> 1), j = rest / size, q = rest - j * size;
  if (q < 2 * pairs) {
    const int second = q >= pairs;
    m = first + 2 * (q - second * pairs) + rank;
    n = 2 * j + second;
    return n < n_tiles ? Pairing::kShared : Pairing::kNothing;
  }
  m = first + size - 1;
  n = 2 * j + rank;
  return Pairing::kSeparate;
}

}  // namespace moeops::hopper
