// What sweeps over lists of tensors share on the CPU.
#pragma once

#include "../arguments.h"

namespace torchflat {

constexpr int64_t kChunk = 16384;  // elements

// y <- beta * y + alpha * x / |x|, with y the left tensors and x the right ones; |x| is returned. Where it is 0, y only
// shrinks by `beta`; where it is not finite, nothing changes.
double normalized_step(Chunks& chunks, double alpha, double beta);

}  // namespace torchflat
