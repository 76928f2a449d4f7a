// The emulated device: its limits, its memory operations, and the driver's tensor maps.
#include <cuda.h>
#include <cuda_runtime.h>

#include <map>

namespace emulated_device {

int capability = 90;
int multiprocessors = 4;
int code = 90;
int index = 0;
int launches = 0;

size_t shared_bytes_of_block() {
  switch (capability) {
    case 80: return 163 * 1024;
    case 86:
    case 89:
    case 120: return 99 * 1024;
    default: return 227 * 1024;
  }
}

std::map<const void*, size_t> allowed_shared_bytes;

}  // namespace emulated_device

cudaError_t cudaGetDevice(int* index) {
  *index = emulated_device::index;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? emulated_device::multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? emulated_device::capability / 10
                                                            : emulated_device::capability % 10;
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* target, size_t target_row, const void* source, size_t source_row,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  emulator::synchronize();
  if (target_row < width || source_row < width) return cudaErrorInvalidValue;
  for (size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(target) + row * target_row,
                static_cast<const char*>(source) + row * source_row, width);
  }
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* target, size_t row_bytes, int value, size_t width, size_t height,
                              cudaStream_t) {
  emulator::synchronize();
  for (size_t row = 0; row < height; ++row) {
    std::memset(static_cast<char*>(target) + row * row_bytes, value, width);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t count, cudaStream_t) {
  emulator::synchronize();
  std::memset(target, value, count);
  return cudaSuccess;
}

cudaError_t remember_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulated_device::shared_bytes_of_block())
    return cudaErrorInvalidValue;
  emulated_device::allowed_shared_bytes[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config, emulator::Shape* shape) {
  const auto found = emulated_device::allowed_shared_bytes.find(kernel);
  const size_t allowed = found == emulated_device::allowed_shared_bytes.end() ? 48 * 1024 : found->second;
  const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  const bool grid_fits = config.gridDim.x > 0 && config.gridDim.y > 0 && config.gridDim.z > 0 &&
                         config.gridDim.x <= 0x7fffffff && config.gridDim.y <= 65535 &&
                         config.gridDim.z <= 65535;
  if (!grid_fits || threads == 0 || threads > 1024 || config.dynamicSmemBytes > allowed)
    return cudaErrorInvalidValue;
  shape->grid = {config.gridDim.x, config.gridDim.y, config.gridDim.z};
  shape->block = {config.blockDim.x, config.blockDim.y, config.blockDim.z};
  shape->shared_bytes = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (emulated_device::capability < 90) return cudaErrorInvalidValue;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      shape->cluster = attribute.val.clusterDim.x;
      if (config.gridDim.x % shape->cluster != 0) return cudaErrorInvalidValue;
    } else {
      shape->overlap = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  ++emulated_device::launches;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// Refuses the arguments that the driver's manual rules out.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool known = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 && rank == 2 &&
                     interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[0] % 16 == 0;
  const bool sized = size[0] > 0 && size[1] > 0 && size[0] <= uint64_t{1} << 32 &&
                     size[1] <= uint64_t{1} << 32 && stride[0] < uint64_t{1} << 40 && stride[0] >= size[0];
  const bool boxed = box[0] > 0 && box[0] <= 128 && box[1] > 0 && box[1] <= 256 && box[0] % 16 == 0;
  if (!known || !aligned || !sized || !boxed || element_stride[0] != 1 || element_stride[1] != 1) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = CUtensorMap{static_cast<const uint8_t*>(data), size[0], size[1], stride[0], box[0], box[1]};
  return CUDA_SUCCESS;
}
