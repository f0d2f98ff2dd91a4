// Matrix products of the expert kernels: torch's own mm on memory that these kernels lay out. A
// product inside a task of a thread runs on that thread; elsewhere mm uses every thread.
#pragma once

#include <cstdint>

#include "checks.h"

namespace moeops::cpu {

// A strided view of memory that somebody else keeps alive.
struct Matrix {
  char* data;
  ScalarType type;
  int64_t rows, columns;
  int64_t row_stride, column_stride;

  Matrix transposed() const { return {data, type, columns, rows, column_stride, row_stride}; }
  // Rows [first, first + count).
  Matrix row_range(int64_t first, int64_t count) const;
};

// The matrix of expert e in weight [E, rows, columns], any strides.
Matrix expert_matrix(const Tensor& weight, int64_t e);
// Rows [first, first + count) of t [R, columns], contiguous.
Matrix row_matrix(const Tensor& t, int64_t first, int64_t count);

// The data of row `row` of t [R, columns], contiguous; null if there is no t.
const void* row_of(const std::optional<Tensor>& t, int64_t row);

// out = a @ b, plus bias (of out's type, one for each column) unless it is null. Half products and
// bias are added up in float32 and rounded once. `out` is contiguous.
void multiply(const Matrix& a, const Matrix& b, const Matrix& out, const void* bias = nullptr);

// Sets every element to zero.
void clear(const Matrix& out);

}  // namespace moeops::cpu
