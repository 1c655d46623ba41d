// Runs one block after another; the threads of a block are fibres of one CPU thread, which switch only at barriers and
// warp operations. Never compiled with sanitizers.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>

#include "runtime.h"

namespace vlmfast::emulation {

// ---- fibres ----

#ifdef __x86_64__
// swapcontext makes a system call at each switch; this only saves the registers that a function call must preserve.
extern "C" void vlmfast_emulation_switch(Context* from, Context to);
__asm__(
    ".text\n"
    ".hidden vlmfast_emulation_switch\n"
    ".globl vlmfast_emulation_switch\n"
    ".type vlmfast_emulation_switch,@function\n"
    "vlmfast_emulation_switch:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    ".size vlmfast_emulation_switch,.-vlmfast_emulation_switch\n");

static void switch_context(Context& from, Context& to) { vlmfast_emulation_switch(&from, to); }

static void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 3;  // a function is entered with rsp % 16 == 8
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  context = top;
}
#else
static void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

static void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// ---- state ----

Coordinates coordinates;
dim3 block_shape, grid_shape;
bool running;
Gpu gpu = {1, 5};  // small, so that kernels have to loop, persistent ones too
int current_thread;
uint32_t barrier_epoch, block_serial, launch_serial, fenced_serial;
Span fibre_stacks, static_shared, dynamic_shared, library;
Counters counters;

Thread threads[kMaxThreads];
uint32_t lane_ticks[kMaxThreads][kWarpLanes];
unsigned waiting_lanes[kMaxThreads / kWarpLanes], alive_lanes[kMaxThreads / kWarpLanes];
static int thread_count, waiting_at_barrier, exited;
static int schedule;                                // 0 forward, 1 backward, else the seed of a shuffle
static int order[kMaxThreads], place[kMaxThreads];  // order[place[t]] == t
static Context launcher;
static void (*kernel)(void*);
static void* kernel_arguments;
static char* dynamic_shared_end;  // of the arena; a guard page follows
static std::string error_text;
static std::mutex launch_mutex;
static int (*executor)(const void* kernel, void* const* arguments, int count, const unsigned* shape,
                       size_t shared_bytes);

void fence() { fenced_serial = block_serial; }

void enter(int thread) {
  current_thread = thread;
  coordinates.thread = threads[thread].index;
}

// Aborts the launch: the other fibres are never resumed.
void fail(const char* format, ...) {
  char where[160], what[1024];
  const uint3 t = current().index, b = coordinates.block;
  snprintf(where, sizeof where, "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  error_text = std::string(where) + what;
  Context abandoned;
  switch_context(abandoned, launcher);
  __builtin_unreachable();
}

[[noreturn]] static void fail_divergent() {
  std::map<std::string, int> counts;
  for (int t = 0; t < thread_count; ++t) {
    const Thread& thread = threads[t];
    std::string doing = "have exited";
    if (thread.state != State::kExited) {
      doing = thread.state == State::kAtBarrier ? "wait at a barrier" : "wait at a warp operation";
      doing += std::string(", ") + thread.site.file + ":" + std::to_string(thread.site.line);
    }
    ++counts[doing];
  }
  std::string text = "divergent barrier or warp operation:";
  for (const auto& [doing, count] : counts) text += " [" + std::to_string(count) + " threads " + doing + "]";
  fail("%s", text.c_str());
}

// ---- barriers ----

static void release_barrier() {
  int sum = 0;
  for (int t = 0; t < thread_count; ++t) {
    if (!(threads[t].site == threads[0].site)) fail_divergent();
    sum += threads[t].value != 0;
  }
  for (int t = 0; t < thread_count; ++t) {
    Thread& thread = threads[t];
    thread.state = State::kReady;
    thread.result = thread.barrier == Barrier::kAnd  ? sum == thread_count
                    : thread.barrier == Barrier::kOr ? sum > 0
                                                     : sum;
  }
  waiting_at_barrier = 0;
  ++barrier_epoch;
}

// Runs other fibres until the current one is ready again.
void yield_to_next() {
  const int self = current_thread;
  if (exited == thread_count) {
    Context finished;
    switch_context(finished, launcher);
  }
  if (waiting_at_barrier + exited == thread_count) {
    if (exited > 0) fail_divergent();
    release_barrier();
  }
  for (int step = 1; step <= thread_count; ++step) {
    const int next = order[(place[self] + step) % thread_count];
    if (threads[next].state != State::kReady) continue;
    if (next != self) {
      enter(next);
      switch_context(threads[self].context, threads[next].context);
    }
    return;
  }
  fail_divergent();
}

int block_barrier(Barrier kind, int predicate, Site site) {
  Thread& thread = current();
  thread.barrier = kind;
  thread.value = predicate != 0;
  thread.site = site;
  thread.state = State::kAtBarrier;
  ++thread.tick;
  ++waiting_at_barrier;
  yield_to_next();
  return static_cast<int>(thread.result);
}

// ---- launches ----

static void fibre() {
  kernel(kernel_arguments);
  const int warp = current_thread / kWarpLanes;
  current().state = State::kExited;
  ++exited;
  alive_lanes[warp] &= ~(1u << current_thread % kWarpLanes);
  finish_warp_ops_without_exited(warp);
  yield_to_next();
  __builtin_unreachable();
}

void* dynamic_shared_memory(size_t alignment) {
  if (dynamic_shared.size == 0) fail("dynamic shared memory used, but launched with 0 bytes");
  if (alignment > 16) fail("dynamic shared memory is aligned to 16 bytes, not to %zu", alignment);
  return dynamic_shared.begin;
}

// __shared__ variables are thread_local: together they form this library's TLS segment of the launching thread.
static thread_local volatile char touch_to_allocate_segment;

static int find_segments(dl_phdr_info* info, size_t, void*) {
  Span image;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    char* const begin = reinterpret_cast<char*>(info->dlpi_addr + header.p_vaddr);
    if (image.begin == nullptr) image.begin = begin;
    image.size = begin + header.p_memsz - image.begin;
  }
  if (!image.holds(reinterpret_cast<void*>(&find_segments))) return 0;
  library = image;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_TLS) static_shared = {static_cast<char*>(info->dlpi_tls_data), header.p_memsz};
  }
  return 1;
}

static char* map_memory(size_t size) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

// Allocates the stacks, each with a guard page below it, and shared memory, with a guard page behind it.
static void allocate_once() {
  if (fibre_stacks.begin != nullptr) return;
  fibre_stacks = {map_memory(kMaxThreads * kStackBytes), kMaxThreads * kStackBytes};
  for (int t = 0; t < kMaxThreads; ++t) mprotect(fibre_stacks.begin + t * kStackBytes, kPageBytes, PROT_NONE);
  constexpr size_t kArena = (kMaxSharedBytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  char* const arena = map_memory(kArena + kPageBytes);
  dynamic_shared_end = arena + kArena;
  mprotect(dynamic_shared_end, kPageBytes, PROT_NONE);
}

static const char* refusal(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  if (size < 1 || size > kMaxThreads || block.z > 64) return "a block has 1 to 1024 threads, and at most 64 along z";
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) return "a grid has at least one block along each axis";
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return "the grid is too large";
  if (static_shared.begin == nullptr && static_shared.size > 0) return "no memory for __shared__ variables";
  if (static_shared.size > kMaxStaticBytes) return "more __shared__ variables than the emulation has room for";
  if (shared_bytes > kMaxSharedBytes) return "more shared memory than a block can have";
  return nullptr;
}

static void choose_order(std::minstd_rand& random) {
  std::iota(order, order + thread_count, 0);
  if (schedule == 1) std::reverse(order, order + thread_count);
  if (schedule > 1) std::shuffle(order, order + thread_count, random);
  for (int i = 0; i < thread_count; ++i) place[order[i]] = i;
}

static void run_block(uint64_t number) {
  const dim3 grid = grid_shape;
  coordinates.block = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / grid.x / grid.y)};
  memset(dynamic_shared.begin, kPoison, dynamic_shared.size);
  memset(static_shared.begin, kPoison, static_shared.size);
  memset(lane_ticks, 0, sizeof lane_ticks[0] * thread_count);
  memset(waiting_lanes, 0, sizeof waiting_lanes);
  memset(alive_lanes, 0, sizeof alive_lanes);
  barrier_epoch = 0;
  waiting_at_barrier = exited = 0;
  ++block_serial;
  ++counters.blocks;
  for (int t = 0; t < thread_count; ++t) {
    alive_lanes[t / kWarpLanes] |= 1u << t % kWarpLanes;
    threads[t].state = State::kReady;
    threads[t].tick = 1;
    make_context(threads[t].context, fibre_stacks.begin + t * kStackBytes, fibre);
  }
  enter(order[0]);
  switch_context(launcher, threads[order[0]].context);  // comes back when all have exited, or at a failure
}

static void run_grid() {
  const uint64_t blocks = uint64_t{grid_shape.x} * grid_shape.y * grid_shape.z;
  std::minstd_rand random(schedule);
  choose_order(random);
  uint64_t step = schedule > 1 ? random() % blocks | 1 : 1;
  while (std::gcd(step, blocks) != 1) ++step;
  launch_serial = block_serial + 1;
  start_tracking();
  for (uint64_t i = 0; i < blocks && error_text.empty(); ++i)
    run_block(schedule == 1 ? blocks - 1 - i : i * step % blocks);
}

static void on_signal(int signal, siginfo_t* info, void*) {
  if (!running) {
    std::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  fail("%s at address %p", strsignal(signal), info->si_addr);
}

// Reports a fault signal inside a kernel as the launch's error. The handler has a stack of its own, since that of the
// fibre may be exhausted.
class SignalScope {
 public:
  SignalScope() {
    static char stack[64 << 10];
    stack_t handler_stack{};
    handler_stack.ss_sp = stack;
    handler_stack.ss_size = sizeof stack;
    sigaltstack(&handler_stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &old_actions_[i]);
  }
  ~SignalScope() {
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kCount = 4;
  static constexpr int kSignals[kCount] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  stack_t old_stack_{};
  struct sigaction old_actions_[kCount];
};

cudaError_t launch(const Call& call, void (*function)(void*), void* closure, dim3 grid, dim3 block,
                   size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  allocate_once();
  touch_to_allocate_segment = 0;
  static_shared = {};
  dl_iterate_phdr(find_segments, nullptr);
  error_text.clear();
  if (const char* reason = refusal(grid, block, shared_bytes)) {
    error_text = reason;
    return cudaErrorInvalidConfiguration;
  }
  if (executor != nullptr) {
    const unsigned shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
    error_text = "refused by the executor of launches";
    return executor(call.kernel, call.arguments, call.count, shape, shared_bytes) == 0 ? cudaSuccess
                                                                                       : cudaErrorLaunchFailure;
  }
  kernel = function;
  kernel_arguments = closure;
  grid_shape = grid;
  block_shape = block;
  thread_count = static_cast<int>(block.x * block.y * block.z);
  for (unsigned t = 0; t < static_cast<unsigned>(thread_count); ++t) {
    threads[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  }
  dynamic_shared = {dynamic_shared_end - (shared_bytes + 15) / 16 * 16, shared_bytes};
  ++counters.launches;
  {
    const SignalScope signals;
    running = true;
    run_grid();
    running = false;
  }
  if (error_text.empty()) return cudaSuccess;
  char launched[200];
  snprintf(launched, sizeof launched, " [launch <<<(%u,%u,%u), (%u,%u,%u), %zu>>>]", grid.x, grid.y, grid.z, block.x,
           block.y, block.z, shared_bytes);
  error_text += location_of_access() + launched;
  return cudaErrorLaunchFailure;
}

}  // namespace vlmfast::emulation

using namespace vlmfast::emulation;

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error_text.empty() ? "an error that no launch returned" : error_text.c_str();
}

// ---- for the tests, through ctypes ----

EMULATION_API void vlmfast_emulation_schedule(int value) { schedule = value; }
EMULATION_API void vlmfast_emulation_gpu(int multiprocessors, int64_t most_blocks) {
  gpu = {multiprocessors, most_blocks};
}
// Names a function that executes the launches in place of the fibres, and returns 0 unless it fails; null for none.
EMULATION_API void vlmfast_emulation_execute_by(decltype(executor) function) { executor = function; }
EMULATION_API const char* vlmfast_emulation_error() { return error_text.c_str(); }
EMULATION_API void vlmfast_emulation_counters(Counters* out) { *out = counters; }
