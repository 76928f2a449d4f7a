// Tensor maps, TMA's descriptors of matrices. The driver's encoder is looked up at run time, so that the
// extension does not link libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace dynquant::cuda {

struct TensorMapEncoder {
  cudaError_t error;
  decltype(&cuTensorMapEncodeTiled) encode;
};

// Looked up once per process.
inline const TensorMapEncoder& tensor_map_encoder() {
  static const TensorMapEncoder encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    TensorMapEncoder looked_up = {};
    looked_up.error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (looked_up.error == cudaSuccess && found != cudaDriverEntryPointSuccess) {
      looked_up.error = cudaErrorSymbolNotFound;
    }
    looked_up.encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    return looked_up;
  }();
  return encoder;
}

// int8 [rows, columns] with a row stride of row_bytes (a multiple of 16, as is the address). A box is 128
// columns of box_rows rows; TMA writes it to shared memory with the 128-byte swizzle, 0 outside the matrix.
inline cudaError_t encode_tensor_map(CUtensorMap* map, const int8_t* data, int64_t rows, int64_t columns,
                                     int64_t row_bytes, int box_rows) {
  const TensorMapEncoder& encoder = tensor_map_encoder();
  if (encoder.error != cudaSuccess) return encoder.error;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_stride[2] = {1, 1};
  const CUresult result =
      encoder.encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(data), size, stride, box,
                     element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace dynquant::cuda
