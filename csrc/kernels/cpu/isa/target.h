// Opens and closes the region of a file that is compiled for one instruction set. System headers must come
// before.
#pragma once

#define DYNQUANT_PRAGMA(text) _Pragma(#text)

#if defined(DYNQUANT_EMULATED)  // tests/kernels/emulated: intrinsics as plain code, for a CPU without them
#define DYNQUANT_TARGET_BEGIN(features)
#define DYNQUANT_TARGET_END
#elif defined(__clang__)
#define DYNQUANT_TARGET_BEGIN(features) \
  DYNQUANT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DYNQUANT_TARGET_END DYNQUANT_PRAGMA(clang attribute pop)
#else
#define DYNQUANT_TARGET_BEGIN(features) \
  DYNQUANT_PRAGMA(GCC push_options) DYNQUANT_PRAGMA(GCC target(features))
#define DYNQUANT_TARGET_END DYNQUANT_PRAGMA(GCC pop_options)
#endif
