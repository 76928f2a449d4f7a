// All inline assembly, and the one declaration of shared memory. The kernels contain no other inline
// assembly, so that a host that defines the same functions (and this include guard) can run them.
#ifndef DYNQUANT_CUDA_PTX_CUH_
#define DYNQUANT_CUDA_PTX_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace dynquant::cuda::ptx {

// ---- memory ----

// The block's dynamic shared memory; its size is given at launch.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Loads 16 bytes that this kernel reads once, without evicting other lines from L1.
__device__ __forceinline__ uint4 load_once(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}

// The index of a thread's warp, in a form that the compiler knows to be equal in all 32 lanes: values
// computed from it, such as wgmma's descriptors, stay in uniform registers.
__device__ __forceinline__ int warp_number() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

// Stores 16 bytes at once. The compiler splits the store of a uint4 whose words it computes one by one.
__device__ __forceinline__ void store_16_bytes(void* target, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// A barrier of `threads` threads (a multiple of 32) of the block; number 0 is __syncthreads'.
__device__ __forceinline__ void barrier_of_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- order of kernels (code for 9.0 and newer; older code must not be launched with `overlap`) ----

// Lets the next kernel on this stream start now if it was launched with `overlap`; it sees this kernel's
// results after wait_for_previous_kernel.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the previous kernels' results are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- numbers ----

// Minimum and maximum that are NaN if an operand is.
__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The same for two numbers at once, bfloat16 or half.
__device__ __forceinline__ uint32_t min_nan_bfloat16_pair(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ uint32_t max_nan_bfloat16_pair(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ uint32_t min_nan_half_pair(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ uint32_t max_nan_half_pair(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// Four integers saturated to int8, the first in the lowest byte.
__device__ __forceinline__ uint32_t saturated_bytes(int32_t a, int32_t b, int32_t c, int32_t d) {
  uint32_t r;
  asm("{\n"
      ".reg .b32 upper;\n"
      "cvt.pack.sat.s8.s32.b32 upper, %4, %3, 0;\n"
      "cvt.pack.sat.s8.s32.b32 %0, %2, %1, upper;\n"
      "}"
      : "=r"(r)
      : "r"(a), "r"(b), "r"(c), "r"(d));
  return r;
}

__device__ __forceinline__ float float_from_half(uint16_t bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}

// Two floats, rounded to nearest even, the first in the low half.
__device__ __forceinline__ uint32_t half_pair(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// ---- cp.async: asynchronous copies from global to shared memory (sm_80) ----

// Copies 16 bytes, or writes zeros if not `valid`; `source` must be a readable address in either case.
__device__ __forceinline__ void copy_async(void* shared, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Copies 4 bytes, which need only be aligned to 4.
__device__ __forceinline__ void copy_word_async(void* shared, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(source),
               "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most kPending of this thread's committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- mma.sync on int8 (sm_80) ----

// Four matrices of 8 rows x 16 bytes: the lane gives the address of row lane%8 of matrix lane/8; from each
// matrix it receives the four bytes from 4*(lane%4) on of row lane/4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Four 8x8 matrices of 16-bit elements: the lane's words a ... d hold elements 2*(lane%4) and + 1 of row
// lane/4 of one matrix each; the lane gives the address of row lane%8 of matrix lane/8, aligned to 16 bytes
// (sm_90).
__device__ __forceinline__ void store_matrices(void* shared_row, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// c[16, 8] += a[16, 32] * b[32, 8], with g = lane/4 and t = lane%4:
//   a: 0 = row g, k 4t..4t+3   1 = row g+8   2 = row g, k 16+4t..   3 = row g+8, k 16+4t..
//   b: 0 = k 4t..4t+3, column g   1 = k 16+4t..
//   c: 0, 1 = row g, columns 2t, 2t+1   2, 3 = row g+8
__device__ __forceinline__ void mma_16x8x32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- clusters, mbarrier, TMA, wgmma (sm_90a) ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to TMA and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival; the phase also waits for `bytes` more bytes from TMA.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// One arrival at the barrier at the same address of another block of the cluster, to tell its producer that a
// stage has been read. No write of this thread has to be visible to the other block, so there is no
// .release.cluster, which would fence the GPU's whole memory and empty L1 at each step of a main loop.
__device__ __forceinline__ void barrier_arrive_remote(uint64_t* barrier, uint32_t block_rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(block_rank)
      : "memory");
}

// Whether the phase of this parity has ended; waits for it up to a time limit.
__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Returns when the phase of this parity has ended. With DYNQUANT_TRAP_ON_DEADLOCK, meant for development, a
// deadlock ends in an error.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
#if defined(DYNQUANT_TRAP_ON_DEADLOCK)
  for (uint32_t tries = 0; !barrier_try_wait(barrier, parity); ++tries) {
    if (tries == 1u << 22) __trap();
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box at (column, row) of the tensor to shared memory, with zeros for elements outside the tensor.
// All bytes of the box, zeros included, count at `barrier`.
__device__ __forceinline__ void copy_box(void* shared, const void* map, int32_t column, int32_t row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// As copy_box, to the same address of every block of the cluster in `blocks` (a bit mask), and counted there.
__device__ __forceinline__ void copy_box_to_cluster(void* shared, const void* map, int32_t column,
                                                    int32_t row, uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Required before the first wgmma, and after other code has accessed its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler must neither move nor copy these registers past this point.
template <int kCount>
__device__ __forceinline__ void keep_registers(int32_t (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+r"(r[i])::"memory");
  }
}

// Lists of 16 registers for the asm statements below: %0 ... and "+r"(c[0]) ...
#define DYNQUANT_OPERANDS_16(i)                                                                         \
  "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3]), "+r"(c[i + 4]), "+r"(c[i + 5]),           \
      "+r"(c[i + 6]), "+r"(c[i + 7]), "+r"(c[i + 8]), "+r"(c[i + 9]), "+r"(c[i + 10]), "+r"(c[i + 11]), \
      "+r"(c[i + 12]), "+r"(c[i + 13]), "+r"(c[i + 14]), "+r"(c[i + 15])

// c[64, kN] (+)= a[64, 32] * b[32, kN] for a warpgroup; a, b: descriptors of shared memory; w = warp%4:
//   c: 4*j + 0, 1 = row 16*w + lane/4, columns 8*j + 2*(lane%4), + 1      4*j + 2, 3 = the same, 8 rows below
template <int kN>
__device__ void wgmma_64xNx32(int32_t (&c)[kN / 2], uint64_t a, uint64_t b, bool accumulate);

template <>
__device__ __forceinline__ void wgmma_64xNx32<32>(int32_t (&c)[16], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p;\n"
      "}"
      : DYNQUANT_OPERANDS_16(0)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

template <>
__device__ __forceinline__ void wgmma_64xNx32<64>(int32_t (&c)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p;\n"
      "}"
      : DYNQUANT_OPERANDS_16(0), DYNQUANT_OPERANDS_16(16)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

template <>
__device__ __forceinline__ void wgmma_64xNx32<128>(int32_t (&c)[64], uint64_t a, uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p;\n"
      "}"
      : DYNQUANT_OPERANDS_16(0), DYNQUANT_OPERANDS_16(16), DYNQUANT_OPERANDS_16(32), DYNQUANT_OPERANDS_16(48)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

template <>
__device__ __forceinline__ void wgmma_64xNx32<256>(int32_t (&c)[128], uint64_t a, uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p;\n"
      "}"
      : DYNQUANT_OPERANDS_16(0), DYNQUANT_OPERANDS_16(16), DYNQUANT_OPERANDS_16(32), DYNQUANT_OPERANDS_16(48),
        DYNQUANT_OPERANDS_16(64), DYNQUANT_OPERANDS_16(80), DYNQUANT_OPERANDS_16(96),
        DYNQUANT_OPERANDS_16(112)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

#undef DYNQUANT_OPERANDS_16

}  // namespace dynquant::cuda::ptx

#endif  // DYNQUANT_CUDA_PTX_CUH_
