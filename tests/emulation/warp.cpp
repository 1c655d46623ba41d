// Warp operations: shuffles, votes, reductions, matches and __syncwarp. Each finishes once all lanes of its mask have
// arrived.
#include "runtime.h"

namespace vlmfast::emulation {

static uint64_t combine(WarpOp op, uint64_t a, uint64_t b) {
  const auto ua = static_cast<uint32_t>(a), ub = static_cast<uint32_t>(b);
  const auto sa = static_cast<int32_t>(ua), sb = static_cast<int32_t>(ub);
  switch (op) {
    case WarpOp::kAdd:
      return ua + ub;
    case WarpOp::kMinUnsigned:
      return ua < ub ? ua : ub;
    case WarpOp::kMaxUnsigned:
      return ua > ub ? ua : ub;
    case WarpOp::kMinSigned:
      return static_cast<uint32_t>(sa < sb ? sa : sb);
    case WarpOp::kMaxSigned:
      return static_cast<uint32_t>(sa > sb ? sa : sb);
    case WarpOp::kAnd:
      return ua & ub;
    case WarpOp::kXor:
      return ua ^ ub;
    default:
      return ua | ub;  // kOr, and ballots, to which each lane contributes its bit
  }
}

// The lane that a shuffle of `lane` reads, in groups of `width`; a lane without a source reads itself.
static int shuffle_source(const Thread& thread, int lane) {
  const int first = lane & ~(thread.width - 1), end = first + thread.width;
  const int64_t argument = thread.argument;
  switch (thread.op) {
    case WarpOp::kShuffle:
      return first + static_cast<int>(argument & (thread.width - 1));
    case WarpOp::kShuffleUp:
      return lane - argument < first ? lane : static_cast<int>(lane - argument);
    case WarpOp::kShuffleDown:
      return lane + argument >= end ? lane : static_cast<int>(lane + argument);
    default:  // kShuffleXor: a group may read lanes of groups before it, not of groups behind it
      return (lane ^ argument) >= end ? lane : static_cast<int>(lane ^ argument);
  }
}

static bool is_shuffle(WarpOp op) { return op <= WarpOp::kShuffleXor; }

static void finish_shuffle(Thread* warp, int lane, unsigned lanes) {
  const int source = shuffle_source(warp[lane], lane);
  if (!(lanes >> source & 1)) {
    enter(static_cast<int>(warp - threads) + lane);
    fail("shuffle reads lane %d, which takes no part (mask %08x), %s:%d", source, warp[lane].mask, warp[lane].site.file,
         warp[lane].site.line);
  }
  warp[lane].result = warp[source].value;
}

// Only __syncwarp, of all warp operations, orders memory.
static void join_ticks(Thread* warp, unsigned lanes) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t* seen = lane_ticks[warp - threads + lane];
    for (int other = 0; other < kWarpLanes; ++other) {
      if ((lanes >> other & 1) && seen[other] < warp[other].tick) seen[other] = warp[other].tick;
    }
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) warp[lane].tick += lanes >> lane & 1;
}

// Finishes the operation that `thread` waits at, if all lanes of its mask have arrived or exited.
static bool finish_warp_op(int thread) {
  const int warp_number = thread / kWarpLanes;
  Thread* const warp = threads + warp_number * kWarpLanes;
  const Thread& first = threads[thread];
  const unsigned lanes = first.mask & alive_lanes[warp_number];
  bool started = false;
  uint64_t total = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const Thread& other = warp[lane];
    if (other.state != State::kAtWarpOp || other.op != first.op || other.mask != first.mask ||
        !(other.site == first.site)) {
      return false;
    }
    total = started ? combine(first.op, total, other.value) : other.value;
    started = true;
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if (is_shuffle(first.op)) {
      finish_shuffle(warp, lane, lanes);
    } else if (first.op == WarpOp::kMatchAny) {
      warp[lane].result = 0;
      for (int other = 0; other < kWarpLanes; ++other) {
        if ((lanes >> other & 1) && warp[other].value == warp[lane].value) warp[lane].result |= 1u << other;
      }
    } else {
      warp[lane].result = total;
    }
  }
  if (first.op == WarpOp::kSyncWarp) join_ticks(warp, lanes);
  waiting_lanes[warp_number] &= ~lanes;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes >> lane & 1) warp[lane].state = State::kReady;
  }
  return true;
}

static bool all_lanes_wait(int thread) {
  const int warp = thread / kWarpLanes;
  return (threads[thread].mask & alive_lanes[warp] & ~waiting_lanes[warp]) == 0;
}

void finish_warp_ops_without_exited(int warp) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int thread = warp * kWarpLanes + lane;
    if ((waiting_lanes[warp] >> lane & 1) && all_lanes_wait(thread)) finish_warp_op(thread);
  }
}

uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, unsigned argument, int width, Site site) {
  const int lane = current_thread % kWarpLanes;
  if (!(mask >> lane & 1)) fail("lane %d is not in its own mask %08x, %s:%d", lane, mask, site.file, site.line);
  if (width < 1 || width > kWarpLanes || (width & (width - 1)) != 0) {
    fail("shuffle width %d is no power of two up to 32, %s:%d", width, site.file, site.line);
  }
  Thread& thread = current();
  thread.op = op;
  thread.mask = mask;
  thread.value = value;
  thread.argument = argument;
  thread.width = width;
  thread.site = site;
  thread.state = State::kAtWarpOp;
  waiting_lanes[current_thread / kWarpLanes] |= 1u << lane;
  if (!all_lanes_wait(current_thread) || !finish_warp_op(current_thread)) yield_to_next();
  return thread.result;
}

}  // namespace vlmfast::emulation
