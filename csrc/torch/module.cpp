// dynquant._C: loading it registers the ops; its functions name and choose the instruction set.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "autograd.h"
#include "cpu/isa/dispatch.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("available_isas", &dynquant::cpu::available_isas,
             "Instruction sets this CPU can run, lowest first.");
  module.def("isa", &dynquant::cpu::isa, "The instruction set in use.");
  module.def("set_isa", &dynquant::cpu::set_isa, pybind11::arg("name"), "Forces one of the available ones.");
  module.def("run_below_autograd", &dynquant::run_below_autograd, pybind11::arg("name"),
             pybind11::arg("refuses_gradients"), "Registers an op as one without gradient.");
}
