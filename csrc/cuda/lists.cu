// Dot product and scaled addition over two lists of tensors: a block for each chunk, a launch for each kBatch chunks.
#include "launch.cuh"

namespace torchflat {
namespace {

constexpr int64_t kChunk = 65536;
constexpr int64_t kBatch = 120;  // chunks travel as a kernel argument, which may be 4 KB

struct Batch {
  Chunk chunks[kBatch];
};

__global__ void dot_batch(Batch batch, Sum* partial) {
  __shared__ Sum shared[kWarps];
  const Chunk& chunk = batch.chunks[blockIdx.x];
  double sum = 0.0;
  visit(chunk.left_kind, [&](auto left) {
    visit(chunk.right_kind, [&](auto right) {
      const auto* a = static_cast<const decltype(left)*>(chunk.left);
      const auto* b = static_cast<const decltype(right)*>(chunk.right);
      for (int32_t index = threadIdx.x; index < chunk.count; index += kThreads) {
        multiply_add<1>(&sum, a + index, b + index);
      }
    });
  });
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = Sum{sum, 0.0};
  __syncthreads();
  if (threadIdx.x > 0) return;
  Sum total{};
  for (int warp = 0; warp < kWarps; ++warp) total.add(shared[warp]);
  partial[blockIdx.x] = total;
}

__global__ void add_batch(Batch batch, double alpha) {
  const Chunk& chunk = batch.chunks[blockIdx.x];
  visit(chunk.left_kind, [&](auto left) {
    visit(chunk.right_kind, [&](auto right) {
      auto* y = static_cast<decltype(left)*>(chunk.left);
      const auto* x = static_cast<const decltype(right)*>(chunk.right);
      for (int32_t index = threadIdx.x; index < chunk.count; index += kThreads) {
        y[index] = add_scaled(y[index], x[index], alpha);
      }
    });
  });
}

// Call `launch(batch, start, count)` for each batch of chunks.
template <class Launch>
void for_each_batch(const Chunks& chunks, const Launch& launch) {
  const int64_t total = static_cast<int64_t>(chunks.list.size());
  for (int64_t start = 0; start < total; start += kBatch) {
    Batch batch{};
    const int64_t count = std::min(kBatch, total - start);
    std::copy_n(chunks.list.begin() + start, count, batch.chunks);
    launch(batch, start, static_cast<unsigned>(count));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor dot(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  const Chunks chunks = checked_chunks(a, b, kChunk, false, "dot");
  const torch::stable::accelerator::DeviceGuard guard(a[0].get_device_index());
  const cudaStream_t stream = current_stream(a[0]);
  const int64_t count = static_cast<int64_t>(chunks.list.size());
  Tensor sums = sums_like(a[0], count);
  auto* partial = static_cast<Sum*>(sums.mutable_data_ptr());
  for_each_batch(chunks, [&](const Batch& batch, int64_t start, unsigned blocks) {
    dot_batch<<<blocks, kThreads, 0, stream>>>(batch, partial + start);
  });
  Tensor result = torch::stable::new_empty(a[0], {}, torch::headeronly::ScalarType::Double);
  collect<<<1, kThreads, 0, stream>>>(partial, count, 1, false, static_cast<double*>(result.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

void axpy_(const std::vector<Tensor>& y, const std::vector<Tensor>& x, double alpha) {
  const Chunks chunks = checked_chunks(y, x, kChunk, true, "axpy_");
  const torch::stable::accelerator::DeviceGuard guard(y[0].get_device_index());
  const cudaStream_t stream = current_stream(y[0]);
  for_each_batch(chunks, [&](const Batch& batch, int64_t, unsigned blocks) {
    add_batch<<<blocks, kThreads, 0, stream>>>(batch, alpha);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CUDA, library) {
  library.impl("dot", TORCH_BOX(&dot));
  library.impl("axpy_", TORCH_BOX(&axpy_));
}

}  // namespace torchflat
