// doctest's main, which first prints the instruction sets that run and those that do not.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "isas.h"

int main(int argc, char** argv) {
  for (const kernel_tests::Isa& isa : kernel_tests::primitives_of_isas()) {
    const bool runs = isa.skipped.empty();
    std::printf("%-24s %s%s\n", isa.name.c_str(), runs ? "runs" : "not run: ", isa.skipped.c_str());
  }
  doctest::Context context(argc, argv);
  context.setOption("no-intro", true);
  return context.run();
}
