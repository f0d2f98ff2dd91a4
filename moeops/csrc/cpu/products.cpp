#include "cpu/products.h"

#include <cstring>

#include "aten.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// A tensor of its own on the memory: it requires no gradient and belongs to the calling thread, in
// which torch's gradient and inference modes need not be those of the thread that called the op.
Tensor view_of(const Matrix& m) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  m.type);
}

// A row of `like`'s type and width as a tensor [columns].
Tensor row_vector(const void* data, const Matrix& like) {
  return torch::stable::from_blob(const_cast<void*>(data), {like.columns}, {1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  like.type);
}

// What mm is given for `m`. torch's float16 mm is a scalar loop on the CPU, 4 to 60 times slower
// than converting to float32 and back (torch 2.13, 4096 x 512 x 512).
Tensor multiplicand(const Matrix& m) {
  return m.type == ScalarType::Half ? torch::stable::to(view_of(m), ScalarType::Float) : view_of(m);
}

// out = product + bias, row by row; `product` may be `out` itself.
template <typename scalar_t, typename product_t>
void finish_rows(const product_t* product, const scalar_t* bias, const Matrix& out) {
  using acc_t = accumulate_t<scalar_t>;
  auto* target = reinterpret_cast<scalar_t*>(out.data);
  torch::stable::parallel_for(
      0, out.rows, grain_rows(out.columns), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          scalar_t* to = target + row * out.columns;
          const product_t* from = product + row * out.columns;
          for (int64_t i = 0; i < out.columns; ++i) {
            const acc_t own = static_cast<acc_t>(from[i]);
            to[i] = static_cast<scalar_t>(bias ? own + static_cast<acc_t>(bias[i]) : own);
          }
        }
      });
}

}  // namespace

Matrix Matrix::row_range(int64_t first, int64_t count) const {
  return {data + first * row_stride * element_size(type),
          type,
          count,
          columns,
          row_stride,
          column_stride};
}

Matrix expert_matrix(const Tensor& weight, int64_t e) {
  const ScalarType type = weight.scalar_type();
  auto* data = static_cast<char*>(const_cast<void*>(weight.const_data_ptr()));
  return {data + e * weight.stride(0) * element_size(type),
          type,
          weight.size(1),
          weight.size(2),
          weight.stride(1),
          weight.stride(2)};
}

Matrix row_matrix(const Tensor& t, int64_t first, int64_t count) {
  const ScalarType type = t.scalar_type();
  auto* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return {data + first * t.size(1) * element_size(type), type, count, t.size(1), t.size(1), 1};
}

const void* row_of(const std::optional<Tensor>& t, int64_t row) {
  return t ? row_matrix(*t, row, 1).data : nullptr;
}

void multiply(const Matrix& a, const Matrix& b, const Matrix& out, const void* bias) {
  if (out.rows == 0 || out.columns == 0) return;
  if (a.columns == 0) {
    clear(out);
  } else if (out.type == ScalarType::Half) {
    using torch::headeronly::Half;
    const Tensor product = torch::stable::matmul(multiplicand(a), multiplicand(b));
    finish_rows(static_cast<const float*>(product.const_data_ptr()), static_cast<const Half*>(bias),
                out);
    return;
  } else if (out.type == ScalarType::BFloat16 && bias) {
    // A bias added afterwards would be added to a product that is rounded.
    Tensor target = view_of(out);
    linear_out(target, view_of(a), view_of(b.transposed()), row_vector(bias, out));
    return;
  } else {
    Tensor target = view_of(out);
    mm_out(target, view_of(a), view_of(b));
  }
  if (!bias) return;
  MOEOPS_DISPATCH_FLOAT(out.type, "multiply", [&] {
    finish_rows(reinterpret_cast<const scalar_t*>(out.data), static_cast<const scalar_t*>(bias),
                out);
  });
}

void clear(const Matrix& out) {
  const auto row_bytes = static_cast<size_t>(out.columns * element_size(out.type));
  for (int64_t row = 0; row_bytes > 0 && row < out.rows; ++row) {
    std::memset(out.row_range(row, 1).data, 0, row_bytes);
  }
}

}  // namespace moeops::cpu
