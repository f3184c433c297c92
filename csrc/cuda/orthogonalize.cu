// w <- (I - V^T V) w by classical Gram-Schmidt, twice, in the same three sweeps over V as on the CPU. The grid is fixed
// and sums are collected in two stages, so that the answer does not depend on the order in which blocks run.
#include "launch.cuh"

namespace torchflat {
namespace {

constexpr int kBlocks = 512;
constexpr int kColumnsPerThread = 4;
constexpr int64_t kTile = kThreads * kColumnsPerThread;
constexpr int64_t kRowsPerLaunch = 128;  // as many running sums as fit in shared memory, times kWarps
constexpr int kRowsAtOnce = 4;

template <class T>
struct Columns {
  const T* v;
  int64_t stride, rows, columns;
};

template <class T>
__device__ double updated(const Columns<T>& basis, int64_t column, const double* coefficients, double w) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= basis.rows; row += kRowsAtOnce) {
    w = subtract_rows<kRowsAtOnce>(w, basis.v + row * basis.stride + column, basis.stride, coefficients + row);
  }
  for (; row < basis.rows; ++row) {
    w = subtract_rows<1>(w, basis.v + row * basis.stride + column, basis.stride, coefficients + row);
  }
  return w;
}

// For each tile of columns: takes V^T `coefficients` off w, if given, then adds up V[first + r] w for r < wanted, or
// |w|^2 if first < 0 (then wanted = 1). Writes `wanted` sums for each block.
template <class T>
__global__ void sweep(
    Columns<T> basis, const double* coefficients, double* w, int64_t first, int64_t wanted, Sum* partial) {
  __shared__ Sum sums[kWarps * kRowsPerLaunch];
  Sum* mine = sums + threadIdx.x / kWarpSize * wanted;
  const bool leader = threadIdx.x % kWarpSize == 0;
  if (leader) {
    for (int64_t row = 0; row < wanted; ++row) mine[row] = Sum{};
  }
  for (int64_t tile = blockIdx.x; tile * kTile < basis.columns; tile += kBlocks) {
    double values[kColumnsPerThread];
    for (int c = 0; c < kColumnsPerThread; ++c) {
      const int64_t column = tile * kTile + c * kThreads + threadIdx.x;
      if (column >= basis.columns) continue;
      values[c] = w[column];
      if (coefficients) w[column] = values[c] = updated(basis, column, coefficients, values[c]);
    }
    for (int64_t row = 0; row < wanted; ++row) {
      double sum = 0.0;
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const int64_t column = tile * kTile + c * kThreads + threadIdx.x;
        if (column >= basis.columns) continue;
        if (first < 0) {
          multiply_add<1>(&sum, &values[c], &values[c]);
        } else {
          multiply_add<1>(&sum, basis.v + (first + row) * basis.stride + column, &values[c]);
        }
      }
      sum = warp_sum(sum);
      if (leader) mine[row].add(sum);
    }
  }
  __syncthreads();
  for (int64_t row = threadIdx.x; row < wanted; row += kThreads) {
    Sum total{};
    for (int warp = 0; warp < kWarps; ++warp) total.add(sums[warp * wanted + row]);
    partial[blockIdx.x * wanted + row] = total;
  }
}

__global__ void add(int64_t rows, const double* first, const double* second, double* result) {
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) result[row] = first[row] + second[row];
}

template <class T>
void run(const Basis& basis, double* w, double* scratch, Sum* partial, double* result, cudaStream_t stream) {
  const Columns<T> columns{static_cast<const T*>(basis.data), basis.stride, basis.rows, basis.columns};
  double* first = scratch;
  double* second = scratch + basis.rows;
  const double* subtracted = nullptr;
  for (double* dots : {first, second}) {
    for (int64_t row = 0; row < basis.rows; row += kRowsPerLaunch) {
      const int64_t wanted = std::min(kRowsPerLaunch, basis.rows - row);
      // Only the first launch of a sweep changes w; the others see it changed.
      const double* coefficients = row == 0 ? subtracted : nullptr;
      sweep<<<kBlocks, kThreads, 0, stream>>>(columns, coefficients, w, row, wanted, partial);
      collect<<<wanted, kThreads, 0, stream>>>(partial, kBlocks, wanted, false, dots + row);
    }
    subtracted = dots;
  }
  sweep<<<kBlocks, kThreads, 0, stream>>>(columns, second, w, int64_t{-1}, int64_t{1}, partial);
  collect<<<1, kThreads, 0, stream>>>(partial, kBlocks, 1, true, result + basis.rows);
  add<<<1, kThreads, 0, stream>>>(basis.rows, first, second, result);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor orthogonalize_(const Tensor& basis, const Tensor& vector) {
  const Basis checked = checked_basis(basis, vector);
  const torch::stable::accelerator::DeviceGuard guard(vector.get_device_index());
  Tensor result = torch::stable::new_empty(vector, {checked.rows + 1});
  Tensor scratch = torch::stable::new_empty(vector, {2 * checked.rows});
  Tensor partial = sums_like(vector, kBlocks * std::clamp<int64_t>(checked.rows, 1, kRowsPerLaunch));
  visit(checked.kind, [&](auto element) {
    run<decltype(element)>(
        checked, static_cast<double*>(vector.mutable_data_ptr()), static_cast<double*>(scratch.mutable_data_ptr()),
        static_cast<Sum*>(partial.mutable_data_ptr()), static_cast<double*>(result.mutable_data_ptr()),
        current_stream(vector));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CUDA, library) { library.impl("orthogonalize_", TORCH_BOX(&orthogonalize_)); }

}  // namespace torchflat
