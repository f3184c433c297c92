// w <- (I - V^T V) w by classical Gram-Schmidt, twice, in three sweeps over V instead of four:
//   1. c1 = V w      2. w -= V^T c1 and c2 = V w, tile by tile      3. w -= V^T c2 and |w|^2
// The columns are cut into segments, which threads share, and segments into tiles, which stay in the cache.
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "vectorized.h"

namespace torchflat {
namespace {

constexpr int kLanes = 8;
constexpr int kRowsAtOnce = 4;
constexpr int64_t kTileBytes = 384 * 1024;
constexpr int64_t kMaxSegments = 64;

template <int Rows, class T>
TORCHFLAT_INLINE void dot_rows(const T* v, int64_t stride, const double* w, int64_t columns, double* dots) {
  double sums[Rows][kLanes] = {};
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    for (int row = 0; row < Rows; ++row) multiply_add<kLanes>(sums[row], v + row * stride + column, w + column);
  }
  for (; column < columns; ++column) {
    for (int row = 0; row < Rows; ++row) multiply_add<1>(sums[row], v + row * stride + column, w + column);
  }
  for (int row = 0; row < Rows; ++row) dots[row] = pairwise_sum<kLanes>(sums[row]);
}

template <class T>
TORCHFLAT_VECTORIZED void dot_tile(
    const T* v, int64_t stride, int64_t rows, const double* w, int64_t columns, double* dots) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
    dot_rows<kRowsAtOnce>(v + row * stride, stride, w, columns, dots + row);
  }
  for (; row < rows; ++row) dot_rows<1>(v + row * stride, stride, w, columns, dots + row);
}

template <class T>
TORCHFLAT_VECTORIZED void update_tile(
    const T* v, int64_t stride, int64_t rows, const double* coefficients, double* w, int64_t columns) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
    const T* block = v + row * stride;
    for (int64_t column = 0; column < columns; ++column) {
      w[column] = subtract_rows<kRowsAtOnce>(w[column], block + column, stride, coefficients + row);
    }
  }
  for (; row < rows; ++row) {
    const T* block = v + row * stride;
    for (int64_t column = 0; column < columns; ++column) {
      w[column] = subtract_rows<1>(w[column], block + column, stride, coefficients + row);
    }
  }
}

template <class T>
class Projector {
 public:
  Projector(const Basis& basis, double* w)
      : v_(static_cast<const T*>(basis.data)),
        stride_(basis.stride),
        rows_(basis.rows),
        columns_(basis.columns),
        w_(w) {
    const int64_t fitting = kTileBytes / (std::max<int64_t>(rows_, 1) * static_cast<int64_t>(sizeof(T)));
    width_ = std::clamp<int64_t>(fitting / 64 * 64, 256, 4096);
    tiles_ = (columns_ + width_ - 1) / width_;
    segments_ = std::clamp<int64_t>(tiles_, 1, kMaxSegments);
  }

  // Writes the coefficients and, after them, the norm of what is left of w.
  void run(double* result) {
    const std::vector<double> first = sweep(nullptr, true);
    const std::vector<double> second = sweep(first.data(), true);
    const std::vector<double> square = sweep(second.data(), false);
    for (int64_t row = 0; row < rows_; ++row) result[row] = first[row] + second[row];
    result[rows_] = std::sqrt(square[0]);
  }

 private:
  // Takes V^T `coefficients` off w, if given; returns V w, or |w|^2 if the dots of the rows are not wanted.
  std::vector<double> sweep(const double* coefficients, bool rows_wanted) {
    const int64_t wanted = rows_wanted ? rows_ : 1;
    std::vector<Sum> partial(segments_ * wanted);
    torch::stable::parallel_for(0, segments_, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> dots(wanted);
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t last = part_start(segment + 1, segments_, tiles_);
        for (int64_t tile = part_start(segment, segments_, tiles_); tile < last; ++tile) {
          const int64_t start = tile * width_;
          const int64_t columns = std::min(width_, columns_ - start);
          if (coefficients) update_tile(v_ + start, stride_, rows_, coefficients, w_ + start, columns);
          if (rows_wanted) {
            dot_tile(v_ + start, stride_, rows_, w_ + start, columns, dots.data());
          } else {
            dot_tile(w_ + start, columns_, 1, w_ + start, columns, dots.data());
          }
          for (int64_t row = 0; row < wanted; ++row) partial[segment * wanted + row].add(dots[row]);
        }
      }
    });
    std::vector<double> totals(wanted);
    for (int64_t row = 0; row < wanted; ++row) {
      Sum total{};
      for (int64_t segment = 0; segment < segments_; ++segment) total.add(partial[segment * wanted + row]);
      totals[row] = total.value();
    }
    return totals;
  }

  const T* v_;
  int64_t stride_, rows_, columns_;
  double* w_;
  int64_t width_, tiles_, segments_;
};

Tensor orthogonalize_(const Tensor& basis, const Tensor& vector) {
  const Basis checked = checked_basis(basis, vector);
  Tensor result = torch::stable::new_empty(vector, {checked.rows + 1});
  auto* w = static_cast<double*>(vector.mutable_data_ptr());
  auto* out = static_cast<double*>(result.mutable_data_ptr());
  visit(checked.kind, [&](auto element) { Projector<decltype(element)>(checked, w).run(out); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CPU, library) { library.impl("orthogonalize_", TORCH_BOX(&orthogonalize_)); }

}  // namespace torchflat
