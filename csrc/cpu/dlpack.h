// The part of DLPack 1.3 that is needed to look at a tensor that Python holds. It is a C ABI of its own, which torch
// offers as Tensor.__dlpack_c_exchange_api__ whatever its version; see https://dmlc.github.io/dlpack.
#pragma once

#include <cstdint>

namespace torchflat::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Tensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t axes;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t offset;   // in bytes
};

struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* managed_from_python;
  void* managed_to_python;
  int (*look)(void* python, Tensor* result);  // owns nothing; not 0, with a Python error set, if that cannot be
  void* stream;
};

}  // namespace torchflat::dlpack
