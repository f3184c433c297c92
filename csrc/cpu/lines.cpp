// Squares of the entries of matrices, summed along both axes at once: one read of each matrix.
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "vectorized.h"

namespace torchflat {
namespace {

constexpr int64_t kBlock = 262144;  // entries that one thread takes at a time
constexpr int64_t kSerialElements = 65536;

// Rows of a contiguous tensor (rows, columns, depth), where their sums go, and a row of sums for each column.
struct Block {
  const void* data;
  Kind kind;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  double* row_sums;
  double* column_sums;
};

template <class T>
TORCHFLAT_VECTORIZED void add_matrix(const T* a, const Block& block) {
  const bool ahead = is_long<T>(block.rows * block.columns);
  for (int64_t row = 0; row < block.rows; ++row, a += block.columns) {
    double sums[kLanes] = {};
    int64_t index = 0;
    for (; index + kLanes <= block.columns; index += kLanes) {
      if (ahead) fetch_ahead(a + index);
      for (int lane = 0; lane < kLanes; ++lane) {
        const double square = widen(a[index + lane]) * widen(a[index + lane]);
        sums[lane] += square;
        block.column_sums[index + lane] += square;
      }
    }
    double total = pairwise_sum<kLanes>(sums);
    for (; index < block.columns; ++index) {
      const double square = widen(a[index]) * widen(a[index]);
      total += square;
      block.column_sums[index] += square;
    }
    block.row_sums[row] = total;
  }
}

template <class T>
TORCHFLAT_VECTORIZED void add_deep(const T* a, const Block& block) {
  for (int64_t row = 0; row < block.rows; ++row) {
    double total = 0;
    for (int64_t column = 0; column < block.columns; ++column, a += block.depth) {
      double sum = 0;
      for (int64_t index = 0; index < block.depth; ++index) sum += widen(a[index]) * widen(a[index]);
      total += sum;
      block.column_sums[column] += sum;
    }
    block.row_sums[row] = total;
  }
}

// What a tensor's blocks write to, and where its sums end up.
struct Lines {
  int64_t start;     // in the result
  int64_t rows;
  int64_t columns;
  int64_t partial;   // where the rows of column sums begin
  int64_t blocks;
};

Tensor line_squares(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "line_squares: the list must not be empty");
  std::vector<Tensor> contiguous;
  std::vector<Lines> lines;
  int64_t length = 0, partials = 0, elements = 0;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() >= 2, "line_squares: tensors must have two axes or more, got ", shape_of(tensor));
    contiguous.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    const int64_t rows = tensor.size(0), columns = tensor.size(1), row = std::max<int64_t>(tensor.numel() / std::max<int64_t>(rows, 1), 1);
    const int64_t each = std::max<int64_t>(kBlock / row, 1), blocks = (rows + each - 1) / each;
    lines.push_back({length, rows, columns, partials, blocks});
    length += rows + columns;
    partials += blocks * columns;
    elements += tensor.numel();
  }
  Tensor result = torch::stable::empty({length}, torch::headeronly::ScalarType::Double);
  auto* out = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(out, length, 0.0);
  std::vector<double> sums(partials, 0.0);
  std::vector<Block> work;
  for (size_t index = 0; index < lines.size(); ++index) {
    const Lines& line = lines[index];
    if (contiguous[index].numel() == 0) continue;
    const int64_t row = contiguous[index].numel() / line.rows, each = std::max<int64_t>(kBlock / row, 1);
    const Kind kind = kind_of(contiguous[index]);
    const auto* data = static_cast<const char*>(contiguous[index].const_data_ptr());
    for (int64_t block = 0; block < line.blocks; ++block) {
      const int64_t first = block * each;
      work.push_back(
          {data + first * row * element_size(kind), kind, std::min(each, line.rows - first), line.columns,
           row / line.columns, out + line.start + first, sums.data() + line.partial + block * line.columns});
    }
  }
  const int64_t count = static_cast<int64_t>(work.size());
  const int64_t grain = elements < kSerialElements ? std::max<int64_t>(count, 1) : 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Block& block = work[index];
      visit(block.kind, [&](auto zero) {
        const auto* a = static_cast<const decltype(zero)*>(block.data);
        block.depth == 1 ? add_matrix(a, block) : add_deep(a, block);
      });
    }
  });
  for (const Lines& line : lines) {
    double* columns = out + line.start + line.rows;
    for (int64_t block = 0; block < line.blocks; ++block) {
      const double* part = sums.data() + line.partial + block * line.columns;
      for (int64_t column = 0; column < line.columns; ++column) columns[column] += part[column];
    }
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CPU, library) { library.impl("line_squares", TORCH_BOX(&line_squares)); }

}  // namespace torchflat
