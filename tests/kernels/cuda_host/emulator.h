// Runs CUDA kernels on the CPU: a fiber for each thread, in random order, switching only where threads meet
// (barriers, shuffles, matrix instructions, waits). Work that the hardware may delay (asynchronous copies,
// wgmma, the kernel before an overlapping one) runs at random at once or at the last permitted moment. Shared
// memory starts as garbage. The emulator knows no kernel; its instructions follow the PTX manual.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Shape {
  Index grid;
  Index block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool overlap = false;
};

struct Block;
struct Fiber;

// The running fiber, its thread and its block.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
unsigned thread_number();
unsigned cluster_rank();
unsigned char* shared_memory();

// Random numbers.
bool coin();

// Ends the emulated call with this message.
[[noreturn]] void fail(const std::string& message);

// Every thread of a group calls this with its own argument; the last one runs `body` on all arguments, then
// all continue. `what` names the instruction: a group that meets at different ones is a fault.
using Body = void (*)(void** arguments, unsigned count);
void meet_warp(const char* what, void* argument, Body body);
void meet_block(const char* what, void* argument, Body body);
void meet_cluster(const char* what);
// Barrier `number` of the block, for `count` threads, the first of them a multiple of `count`.
void meet_threads(const char* what, unsigned number, unsigned count);

// An action to run between now and the end of the kernel, or at a wait for it.
void later(std::function<void()> action);

// cp.async of this thread.
void copy_async(std::function<void()> copy);
void copy_async_commit();
void copy_async_wait(unsigned pending);

// wgmma of this warp; groups in order.
void wgmma(std::function<void()> product);
void wgmma_commit();
void wgmma_wait(unsigned pending);

// The same address in the shared memory of another block of the cluster.
void* in_block(void* shared, unsigned rank);

// An mbarrier, by its address.
void barrier_init(void* barrier, unsigned arrivals);
void barrier_arrive(void* barrier);
void barrier_expect(void* barrier, int64_t bytes);
void barrier_wait(void* barrier, unsigned parity);

// Queues a kernel, its arguments bound. A kernel runs once its results are needed; a kernel that may overlap
// the previous one starts first and runs that one where it waits.
void launch(const Shape& shape, std::function<void()> kernel);
void synchronize();

// Runs `call` and all kernels it launches; "" or the message of a failure.
std::string run(uint64_t seed, const std::function<void()>& call);

}  // namespace emulator
