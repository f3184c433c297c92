// Streams, error checks, and reductions in a fixed order, for the CUDA kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../arguments.h"

namespace torchflat {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Room on the device for `count` partial sums; freed into the stream's pool with the tensor.
inline Tensor sums_like(const Tensor& tensor, int64_t count) {
  static_assert(sizeof(Sum) == 2 * sizeof(double));
  return torch::stable::new_empty(tensor, {2 * count}, torch::headeronly::ScalarType::Double);
}

// The sum over a warp, in its lane 0.
__device__ inline double warp_sum(double value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over a block, in its thread 0.
__device__ inline Sum block_sum(const Sum& mine, Sum* shared) {
  shared[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x].add(shared[threadIdx.x + half]);
  }
  return shared[0];
}

// out[row] = the sum of partial[i * rows + row] over i, one block for each row. With `root`, its square root.
static __global__ void collect(const Sum* partial, int64_t count, int64_t rows, bool root, double* out) {
  __shared__ Sum shared[kThreads];
  const int64_t row = blockIdx.x;
  Sum sum{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum.add(partial[i * rows + row]);
  const Sum total = block_sum(sum, shared);
  if (threadIdx.x == 0) out[row] = root ? sqrt(total.value()) : total.value();
}

}  // namespace torchflat
