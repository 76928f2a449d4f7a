#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kSharedSlack = 1024;

std::mt19937_64 chance;
sigjmp_buf escape;  // target of a failure: run()
std::string failure;

struct Meeting {
  const char* what = nullptr;
  unsigned arrived = 0;
  std::vector<void*> arguments;
  std::vector<Fiber*> waiting;
};

struct Barrier {
  unsigned arrivals = 0;
  unsigned pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  std::vector<Fiber*> waiting;
};

using Actions = std::vector<std::function<void()>>;

struct Warp {
  Meeting meeting;
  Actions open;  // wgmma since the last commit
  std::deque<Actions> groups;
};

}  // namespace

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  bool done = false;
  Index thread;
  unsigned number = 0;
  Block* block = nullptr;
  const char* waits_for = "";
  Actions open;  // cp.async since the last commit
  std::deque<Actions> groups;
};

struct Block {
  Index index;
  unsigned rank = 0;
  unsigned char* shared = nullptr;
  std::vector<Block*>* cluster = nullptr;
  Meeting* cluster_meeting = nullptr;
  Meeting meeting;
  std::map<unsigned, Meeting> numbered;
  std::vector<Warp> warps;
};

namespace {

struct Grid {
  Shape shape;
  std::function<void()> kernel;
};

// Stacks are reused: mapping them is most of the cost of a fiber.
std::vector<void*> free_stacks;

void* take_stack() {
  if (!free_stacks.empty()) {
    void* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* stack =
      mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a fiber's stack");
  return stack;
}

// A running grid or a part of one. Grids nest: a thread that waits for the previous kernel runs it there.
struct Scheduler {
  const Grid* grid = nullptr;
  std::vector<Fiber*> ready;
  Actions pending;
  std::map<void*, Barrier> barriers;  // of all blocks
  jmp_buf home;
  Fiber* current = nullptr;
  unsigned held_back = 0;  // a warp of every block
  size_t steps_until_new_pace = 0;
};

Scheduler* scheduler = nullptr;
std::deque<Grid> line;  // launched, not yet run

void enter() {
  scheduler->grid->kernel();
  Fiber* fiber = scheduler->current;
  for (auto& group : fiber->groups) {
    for (auto& action : group) action();
  }
  fiber->done = true;
  _longjmp(scheduler->home, 1);
}

void switch_to(Fiber* fiber) {
  scheduler->current = fiber;
  if (_setjmp(scheduler->home) != 0) return;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

void suspend() {
  Fiber* fiber = scheduler->current;
  if (_setjmp(fiber->place) == 0) _longjmp(scheduler->home, 1);
}

size_t draw(size_t count) { return chance() % count; }

// Lets other threads go first.
void step_back() {
  if (coin()) return;
  scheduler->ready.push_back(scheduler->current);
  suspend();
}

void meet(Meeting& meeting, const char* what, unsigned index, unsigned count, void* argument, Body body) {
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.arguments.assign(count, nullptr);
  }
  if (std::strcmp(meeting.what, what) != 0) {
    fail(std::string("threads diverged: some are at ") + meeting.what + ", some at " + what);
  }
  meeting.arguments[index] = argument;
  if (++meeting.arrived < count) {
    scheduler->current->waits_for = what;
    meeting.waiting.push_back(scheduler->current);
    suspend();
    return;
  }
  meeting.arrived = 0;
  if (body != nullptr) body(meeting.arguments.data(), count);
  for (Fiber* fiber : meeting.waiting) scheduler->ready.push_back(fiber);
  meeting.waiting.clear();
  step_back();
}

void run_some_pending() {
  const size_t at = draw(scheduler->pending.size());
  std::function<void()> action = std::move(scheduler->pending[at]);
  scheduler->pending.erase(scheduler->pending.begin() + static_cast<std::ptrdiff_t>(at));
  action();
}

// With a uniform choice all warps would advance at the same pace, so one of them is held back for a while.
size_t draw_ready(Scheduler& mine) {
  if (mine.steps_until_new_pace-- == 0) {
    mine.held_back = static_cast<unsigned>(draw(16));
    mine.steps_until_new_pace = 200 + draw(4000);
  }
  size_t at = 0;
  for (int attempt = 0; attempt < 16; ++attempt) {
    at = draw(mine.ready.size());
    if (mine.ready[at]->number / 32 != mine.held_back) break;
  }
  return at;
}

std::string describe(const Fiber& fiber) {
  const Index& b = fiber.block->index;
  return "thread " + std::to_string(fiber.number) + " of block (" + std::to_string(b.x) + ", " +
         std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
}

// Runs these blocks (whole clusters) together.
void run_blocks(const Grid& grid, std::vector<std::unique_ptr<Block>>& blocks) {
  const Index& size = grid.shape.block;
  const unsigned threads = size.x * size.y * size.z;
  Scheduler mine;
  mine.grid = &grid;
  Scheduler* outer = scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<void*> stacks;
  for (auto& block : blocks) {
    block->warps.resize((threads + 31) / 32);
    for (unsigned number = 0; number < threads; ++number) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
      fiber->number = number;
      fiber->block = block.get();
      getcontext(&fiber->start);
      stacks.push_back(take_stack());
      fiber->start.uc_stack.ss_sp = stacks.back();
      fiber->start.uc_stack.ss_size = kStack;
      fiber->start.uc_link = nullptr;
      makecontext(&fiber->start, enter, 0);
      mine.ready.push_back(fiber.get());
      fibers.push_back(std::move(fiber));
    }
  }
  scheduler = &mine;
  size_t left = fibers.size();
  while (left > 0) {
    if (!mine.pending.empty() && (mine.ready.empty() || draw(8) == 0)) {
      run_some_pending();
      continue;
    }
    if (mine.ready.empty()) {
      std::string message = "deadlock";
      for (auto& fiber : fibers) {
        if (!fiber->done) {
          message += ": " + describe(*fiber) + " waits at " + fiber->waits_for;
          break;
        }
      }
      fail(message);
    }
    const size_t at = draw_ready(mine);
    Fiber* fiber = mine.ready[at];
    mine.ready[at] = mine.ready.back();
    mine.ready.pop_back();
    switch_to(fiber);
    if (fiber->done) --left;
  }
  if (!mine.pending.empty()) fail("a block ended before its asynchronous copies");
  for (auto& block : blocks) {
    for (const Warp& warp : block->warps) {
      if (!warp.open.empty() || !warp.groups.empty()) fail("a warp ended before its wgmma");
    }
  }
  scheduler = outer;
  for (void* stack : stacks) free_stacks.push_back(stack);
}

void run_grid(const Grid& grid) {
  const Index& size = grid.shape.grid;
  const unsigned cluster = grid.shape.cluster;
  const uint64_t clusters = uint64_t{size.x} * size.y * size.z / cluster;
  std::vector<uint64_t> order(clusters);
  for (uint64_t i = 0; i < clusters; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), chance);
  for (uint64_t next = 0; next < clusters;) {
    const uint64_t together = std::min<uint64_t>(1 + draw(3), clusters - next);
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<std::vector<Block*>>> members;
    std::vector<std::unique_ptr<Meeting>> meetings;
    std::vector<std::unique_ptr<unsigned char[]>> memory;
    for (uint64_t i = 0; i < together; ++i) {
      members.push_back(std::make_unique<std::vector<Block*>>());
      meetings.push_back(std::make_unique<Meeting>());
      for (unsigned rank = 0; rank < cluster; ++rank) {
        const uint64_t number = order[next + i] * cluster + rank;
        auto block = std::make_unique<Block>();
        block->index = {static_cast<unsigned>(number % size.x),
                        static_cast<unsigned>(number / size.x % size.y),
                        static_cast<unsigned>(number / (uint64_t{size.x} * size.y))};
        block->rank = rank;
        block->cluster = members.back().get();
        block->cluster_meeting = meetings.back().get();
        const size_t bytes = grid.shape.shared_bytes + 2 * kSharedSlack;
        memory.push_back(std::make_unique<unsigned char[]>(bytes));
        const uint64_t garbage = chance();
        for (size_t j = 0; j < bytes; ++j)
          memory.back()[j] = static_cast<unsigned char>(garbage >> (j % 8 * 8));
        const uintptr_t start = reinterpret_cast<uintptr_t>(memory.back().get());
        block->shared = memory.back().get() + (1024 - start % 1024) % 1024;
        std::memset(block->shared + grid.shape.shared_bytes, 0xA5, 16);
        members.back()->push_back(block.get());
        blocks.push_back(std::move(block));
      }
    }
    run_blocks(grid, blocks);
    for (auto& block : blocks) {
      for (int j = 0; j < 16; ++j) {
        if (block->shared[grid.shape.shared_bytes + j] != 0xA5)
          fail("a write beyond the block's shared memory");
      }
    }
    next += together;
  }
}

void on_fault(int, siginfo_t* info, void*) {
  failure = "an access to unmapped memory";
  if (scheduler != nullptr && scheduler->current != nullptr)
    failure += " by " + describe(*scheduler->current);
  (void)info;
  siglongjmp(escape, 1);
}

Warp& warp_of(Fiber* fiber) { return fiber->block->warps[fiber->number / 32]; }

void run_groups(std::deque<Actions>& groups, unsigned pending) {
  while (groups.size() > pending) {
    const Actions actions = std::move(groups.front());
    groups.pop_front();
    for (const auto& action : actions) action();
  }
}

Barrier& barrier_at(void* address) {
  const auto found = scheduler->barriers.find(address);
  if (found == scheduler->barriers.end()) fail("a barrier that was never initialised");
  return found->second;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    for (Fiber* fiber : barrier.waiting) scheduler->ready.push_back(fiber);
    barrier.waiting.clear();
  }
}

}  // namespace

const Index& thread_index() { return scheduler->current->thread; }
const Index& block_index() { return scheduler->current->block->index; }
const Index& block_size() { return scheduler->grid->shape.block; }
const Index& grid_size() { return scheduler->grid->shape.grid; }
unsigned thread_number() { return scheduler->current->number; }
unsigned cluster_rank() { return scheduler->current->block->rank; }
unsigned char* shared_memory() { return scheduler->current->block->shared; }

bool coin() { return (chance() & 1) != 0; }

void fail(const std::string& message) {
  failure = message;
  siglongjmp(escape, 1);
}

void meet_warp(const char* what, void* argument, Body body) {
  Fiber* fiber = scheduler->current;
  meet(warp_of(fiber).meeting, what, fiber->number % 32, 32, argument, body);
}

void meet_block(const char* what, void* argument, Body body) {
  Fiber* fiber = scheduler->current;
  const Index& size = scheduler->grid->shape.block;
  meet(fiber->block->meeting, what, fiber->number, size.x * size.y * size.z, argument, body);
}

void meet_cluster(const char* what) {
  Fiber* fiber = scheduler->current;
  const Index& size = scheduler->grid->shape.block;
  const unsigned threads = size.x * size.y * size.z;
  meet(*fiber->block->cluster_meeting, what, fiber->block->rank * threads + fiber->number,
       threads * scheduler->grid->shape.cluster, nullptr, nullptr);
}

void meet_threads(const char* what, unsigned number, unsigned count) {
  Fiber* fiber = scheduler->current;
  if (number == 0 || number > 15 || count % 32 != 0) fail("a barrier of the block that there is not");
  meet(fiber->block->numbered[number], what, fiber->number % count, count, nullptr, nullptr);
}

void later(std::function<void()> action) {
  if (coin()) {
    action();
  } else {
    scheduler->pending.push_back(std::move(action));
  }
}

void copy_async(std::function<void()> copy) {
  if (coin()) {
    copy();
  } else {
    scheduler->current->open.push_back(std::move(copy));
  }
}

void copy_async_commit() {
  Fiber* fiber = scheduler->current;
  fiber->groups.push_back(std::move(fiber->open));
  fiber->open.clear();
}

void copy_async_wait(unsigned pending) { run_groups(scheduler->current->groups, pending); }

void wgmma(std::function<void()> product) { warp_of(scheduler->current).open.push_back(std::move(product)); }

void wgmma_commit() {
  Warp& warp = warp_of(scheduler->current);
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
  if (coin()) run_groups(warp.groups, 0);
}

void wgmma_wait(unsigned pending) { run_groups(warp_of(scheduler->current).groups, pending); }

void* in_block(void* shared, unsigned rank) {
  Block* mine = scheduler->current->block;
  return (*mine->cluster)[rank]->shared + (static_cast<unsigned char*>(shared) - mine->shared);
}

void barrier_init(void* barrier, unsigned arrivals) {
  scheduler->barriers[barrier] = Barrier{arrivals, arrivals, 0, 0, {}};
}

void barrier_arrive(void* address) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending == 0) fail("more arrivals at a barrier than it was initialised for");
  --barrier.pending;
  end_phase_if_complete(barrier);
}

// Arrived bytes count as negative; they may arrive before their announcement.
void barrier_expect(void* address, int64_t bytes) {
  Barrier& barrier = barrier_at(address);
  barrier.bytes += bytes;
  end_phase_if_complete(barrier);
}

void barrier_wait(void* address, unsigned parity) {
  Barrier& barrier = barrier_at(address);
  while (barrier.phase % 2 == parity) {
    scheduler->current->waits_for = "an mbarrier";
    barrier.waiting.push_back(scheduler->current);
    suspend();
  }
}

void launch(const Shape& shape, std::function<void()> kernel) {
  if (!shape.overlap) synchronize();
  line.push_back(Grid{shape, std::move(kernel)});
}

void synchronize() {
  while (!line.empty()) {
    const Grid last = std::move(line.back());
    line.pop_back();
    if (!last.shape.overlap) synchronize();
    run_grid(last);
  }
}

std::string run(uint64_t seed, const std::function<void()>& call) {
  static bool installed = false;
  if (!installed) {
    static char alternate[64 * 1024];
    stack_t stack = {};
    stack.ss_sp = alternate;
    stack.ss_size = sizeof(alternate);
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    installed = true;
  }
  chance.seed(seed);
  failure.clear();
  scheduler = nullptr;
  line.clear();
  if (sigsetjmp(escape, 1) == 0) {
    call();
    synchronize();
  }
  scheduler = nullptr;
  line.clear();
  return failure;
}

}  // namespace emulator
