// Included by probes.cpp once for each vector width, inside a namespace that defines
//   TARGET                        the function attribute that permits vectors of this width
//   Vector                        the vector type, of std::uint64_t
// No include guard: this is a body, not an interface.
//
// Each pattern reads `size` bytes (a multiple of kReadGranule) once and returns what depends on all of them.

TARGET std::uint64_t fold(const Vector* acc, int count) {
  std::uint64_t folded = 0;
  for (int i = 0; i < count; ++i) {
    for (std::size_t lane = 0; lane < sizeof(Vector) / sizeof(std::uint64_t); ++lane) {
      folded ^= acc[i][lane];
    }
  }
  return folded;
}

TARGET std::uint64_t read_sequential(const void* bytes, std::size_t size) {
  const Vector* data = static_cast<const Vector*>(bytes);
  const std::size_t count = size / sizeof(Vector);
  Vector acc[8] = {};
  for (std::size_t i = 0; i < count; i += 8) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      acc[j] ^= data[i + j];
    }
  }
  return fold(acc, 8);
}

// As above, and each line asked for 2 KB before it is read: further than some hardware prefetchers look.
TARGET std::uint64_t read_prefetch(const void* bytes, std::size_t size) {
  const Vector* data = static_cast<const Vector*>(bytes);
  const std::size_t count = size / sizeof(Vector);
  Vector acc[8] = {};
  for (std::size_t i = 0; i < count; i += 8) {
    const char* ahead = reinterpret_cast<const char*>(data + i) + 2048;  // past the end is harmless
#pragma GCC unroll 8
    for (std::size_t line = 0; line < 8 * sizeof(Vector); line += 64) {
      __builtin_prefetch(ahead + line);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      acc[j] ^= data[i + j];
    }
  }
  return fold(acc, 8);
}

// Four places at once, a quarter of the buffer apart: more lines under way at the same time.
TARGET std::uint64_t read_four_streams(const void* bytes, std::size_t size) {
  const Vector* data = static_cast<const Vector*>(bytes);
  const std::size_t quarter = size / sizeof(Vector) / 4;
  Vector acc[8] = {};
  for (std::size_t i = 0; i < quarter; i += 2) {
#pragma GCC unroll 4
    for (std::size_t stream = 0; stream < 4; ++stream) {
      acc[2 * stream] ^= data[stream * quarter + i];
      acc[2 * stream + 1] ^= data[stream * quarter + i + 1];
    }
  }
  return fold(acc, 8);
}

std::vector<ReadProbe> read_probes() {
  return {{"sequential", read_sequential}, {"prefetch", read_prefetch}, {"four_streams", read_four_streams}};
}
