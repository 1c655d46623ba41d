// The runtime's own state, shared by scheduler.cpp (threads, barriers, warp operations) and memory.cpp (access checks).
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_host.h"

namespace vlmfast::emulation {

constexpr int kMaxThreads = 1024;
constexpr int kWarpLanes = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr size_t kMaxStaticBytes = 1 << 20;  // __shared__ variables of all kernels of a library; nvcc counts a kernel's
constexpr size_t kPageBytes = 4096;
constexpr int kPoison = 0xff;  // NaN in every float type, -1 in the signed integers

// A span of memory.
struct Span {
  char* begin = nullptr;
  size_t size = 0;

  bool holds(const void* pointer) const {
    const char* p = static_cast<const char*>(pointer);
    return p >= begin && p < begin + size;
  }
};

// ---- threads: scheduler.cpp and warp.cpp ----

#ifdef __x86_64__
using Context = void*;  // a stack pointer
#else
using Context = ucontext_t;
#endif

enum class State : uint8_t { kReady, kAtWarpOp, kAtBarrier, kExited };

struct Thread {
  Context context;
  uint3 index;
  State state;
  uint32_t tick;  // number of barriers and __syncwarps that it has passed
  // The barrier or warp operation that it waits at.
  Site site;
  Barrier barrier;
  WarpOp op;
  unsigned mask, argument;
  int width;
  uint64_t value, result;
};

extern Thread threads[kMaxThreads];
extern uint32_t lane_ticks[kMaxThreads][kWarpLanes];  // tick of each lane of the warp that a thread is ordered after
extern unsigned waiting_lanes[kMaxThreads / kWarpLanes], alive_lanes[kMaxThreads / kWarpLanes];
extern int current_thread;      // its number in the block
extern bool running;            // whether a kernel is running
extern uint32_t barrier_epoch;  // number of barriers that the block has passed
extern uint32_t block_serial;   // numbers the blocks of all launches
extern uint32_t launch_serial;  // block_serial of the launch's first block
extern uint32_t fenced_serial;  // the last block that passed a __threadfence

inline Thread& current() { return threads[current_thread]; }
void enter(int thread);
void yield_to_next();  // runs other fibres until the current one is ready again
void finish_warp_ops_without_exited(int warp);

// ---- memory: spans by scheduler.cpp, checks by memory.cpp ----

extern Span fibre_stacks;    // kMaxThreads of kStackBytes each
extern Span static_shared;   // the __shared__ variables
extern Span dynamic_shared;  // of the running launch
extern Span library;         // this library's image, which holds constant tables

void start_tracking();             // at the begin of a launch
std::string location_of_access();  // " at file:line" of the access that failed, or empty

// Counters of a launch. Bytes are counted only in check mode.
struct Counters {
  uint64_t launches, blocks, bytes_loaded, bytes_stored;
};
extern Counters counters;

}  // namespace vlmfast::emulation
