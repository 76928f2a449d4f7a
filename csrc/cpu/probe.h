// Measured limits of this CPU, which the benchmarks set beside the kernels: int8 and fp32 arithmetic from
// registers alone, and the speed at which a buffer of a given size can be read.
#pragma once

namespace pybind11 {
class module_;
}

namespace dynquant {

// Adds to the extension module:
//   probe_isas() -> list[str]                          ISAs whose int8 limit this CPU can show
//   probe_int8(isa, seconds) -> float                  GOPS of one core, 2 operations a multiply-accumulate
//   probe_fp32(seconds) -> float                       GFLOPS of one core, FMA, widest vectors
//   probe_read_patterns() -> list[str]
//   probe_read(pattern, bytes, seconds) -> float       GB/s of one core, the buffer read again and again
// All run on the calling thread and release the GIL.
void bind_probes(pybind11::module_& module);

}  // namespace dynquant
