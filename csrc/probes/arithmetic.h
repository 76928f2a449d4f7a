// Included by probes.cpp once for each instruction, inside a namespace that defines
//   TARGET                        the function attribute that permits the instruction
//   Register                      the vector type
//   multiply_add(acc, a, b)       one step, with TARGET, forced inline
// No include guard: this is a body, not an interface.

// Ten independent chains: enough to hide a latency of 5 cycles at 2 instructions a cycle, and ten
// accumulators, two operands, a constant and a temporary fit 16 registers.
constexpr int kChains = 10;

TARGET void run(std::int64_t rounds) {
  Register acc[kChains] = {};
  for (int chain = 0; chain < kChains; ++chain) {
    asm("" : "+v"(acc[chain]));  // chains that look alike would be computed once
  }
  Register a = Register{} + 3;
  Register b = Register{} + 5;
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int chain = 0; chain < kChains; ++chain) {
      acc[chain] = multiply_add(acc[chain], a, b);
    }
  }
  for (int chain = 0; chain < kChains; ++chain) {
    asm volatile("" : : "v"(acc[chain]));  // the sums count as used
  }
}
