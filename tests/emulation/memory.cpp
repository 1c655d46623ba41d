// The checks of each load and store in check mode. In that mode the kernels are compiled with -fsanitize=thread and
// -fsanitize=undefined, and call the hooks of this file. It is never compiled with sanitizers itself.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace vlmfast::emulation {

// ---- races: the last accesses of each byte ----

enum class Access : uint8_t { kNone, kPlain, kAtomic };

struct Record {
  uint32_t block, epoch, tick;
  uint16_t thread;
  Access access;
};

struct Shadow {
  Record write, read, earlier_read;  // the last accesses of a byte; the two reads are of different threads
};

struct FreeShadow {
  void operator()(Shadow* shadow) const { free(shadow); }
};
using ShadowArray = std::unique_ptr<Shadow[], FreeShadow>;

static ShadowArray make_shadow(size_t bytes) {  // by calloc, so that pages which are never accessed take no memory
  return ShadowArray(static_cast<Shadow*>(calloc(bytes, sizeof(Shadow))));
}

// ---- traffic: the bytes that even an infinite cache would fetch and write back during a launch ----

class DistinctBytes {
 public:
  uint64_t count = 0;  // of all launches, each byte once per launch

  void start_launch() { lines_.clear(); }

  void add(const char* p, size_t bytes) {
    for (const char* const end = p + bytes; p < end;) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(p), first = address % kLineBytes;
      const size_t here = std::min<size_t>(kLineBytes - first, end - p);
      const uint64_t mask = ~uint64_t{0} >> (kLineBytes - here) << first;
      uint64_t& touched = lines_[address / kLineBytes];
      count += __builtin_popcountll(mask & ~touched);
      touched |= mask;
      p += here;
    }
  }

 private:
  static constexpr size_t kLineBytes = 64;  // a bit for each byte of a line
  std::unordered_map<uintptr_t, uint64_t> lines_;
};

static DistinctBytes distinct_loaded, distinct_stored;

// A tensor, or rows of one: bytes between the rows are not its own.
struct Region {
  char* begin;
  int64_t rows, row_bytes, row_pitch;
  bool writable;
  ShadowArray shadow;  // only of writable memory: reads alone cannot race

  int64_t size() const { return (rows - 1) * row_pitch + row_bytes; }

  bool holds(const char* p, int64_t bytes) const {
    const int64_t offset = p - begin;
    if (offset < 0 || offset + bytes > size()) return false;
    return row_pitch < row_bytes || offset % row_pitch + bytes <= row_bytes;
  }
};

static std::vector<Region> regions;
static ShadowArray static_shadow, dynamic_shadow;
static void* access_address;  // address of the code that makes the access being checked

void start_tracking() {
  if (static_shadow == nullptr) static_shadow = make_shadow(kMaxStaticBytes);
  if (dynamic_shadow == nullptr) dynamic_shadow = make_shadow(kMaxSharedBytes);
  access_address = nullptr;
  distinct_loaded.start_launch();
  distinct_stored.start_launch();
}

static bool of_this_launch(const Record& record) {
  return record.access != Access::kNone && record.block >= launch_serial;
}

static bool happened_before(const Record& record) {
  if (record.block != block_serial) return fenced_serial == block_serial;  // another block: ordered only by a fence
  if (record.thread == current_thread || record.epoch < barrier_epoch) return true;
  return record.thread / kWarpLanes == current_thread / kWarpLanes &&
         lane_ticks[current_thread][record.thread % kWarpLanes] >= record.tick;
}

static void check_order(const Record& record, Access access, bool shared, const char* doing, const char* done,
                        const void* p) {
  if (!of_this_launch(record) || (access == Access::kAtomic && record.access == Access::kAtomic)) return;
  if (shared && record.block != block_serial) return;  // another block's shared memory
  if (happened_before(record)) return;
  fail("race: %s of %s memory at %p, %s by thread %d of the launch's block %u, with no barrier between", doing,
       shared ? "shared" : "global", p, done, record.thread, record.block - launch_serial);
}

static void track(Shadow* shadow, const char* p, size_t bytes, bool write, Access access, bool shared) {
  const Record now{block_serial, barrier_epoch, current().tick, static_cast<uint16_t>(current_thread), access};
  for (size_t i = 0; i < bytes; ++i) {
    Shadow& byte = shadow[i];
    if (shared && !write && !(of_this_launch(byte.write) && byte.write.block == block_serial)) {
      fail("read of shared memory at %p that nobody has written", static_cast<const void*>(p + i));
    }
    check_order(byte.write, access, shared, write ? "write" : "read", "written", p + i);
    if (write) {
      check_order(byte.read, access, shared, "write", "read", p + i);
      check_order(byte.earlier_read, access, shared, "write", "read", p + i);
      byte.write = now;
    } else {
      if (byte.read.thread != current_thread || byte.read.block != block_serial) byte.earlier_read = byte.read;
      byte.read = now;
    }
  }
}

// ---- bounds and alignment ----

static void check_global(const char* p, size_t bytes, bool write, Access access) {
  const Region* read_only = nullptr;
  for (const Region& region : regions) {
    if (!region.holds(p, static_cast<int64_t>(bytes))) continue;
    if (!region.writable && write) {
      read_only = &region;
      continue;
    }
    (write ? counters.bytes_stored : counters.bytes_loaded) += bytes;
    (write ? distinct_stored : distinct_loaded).add(p, bytes);
    if (region.shadow != nullptr) track(&region.shadow[p - region.begin], p, bytes, write, access, false);
    return;
  }
  if (read_only != nullptr) fail("write to an input at %p", static_cast<const void*>(p));
  if (library.holds(p) && !write) return;  // a table of constants
  const Region* nearest = nullptr;
  for (const Region& region : regions) {
    if (region.begin <= p && (nearest == nullptr || region.begin > nearest->begin)) nearest = &region;
  }
  if (nearest == nullptr)
    fail("%s of %zu bytes at %p, before all tensors", write ? "write" : "read", bytes, static_cast<const void*>(p));
  fail("%s of %zu bytes at byte %td of an %s of %td rows of %td bytes, %td apart", write ? "write" : "read", bytes,
       p - nearest->begin, nearest->writable ? "output" : "input", nearest->rows, nearest->row_bytes,
       nearest->row_pitch);
}

static void check_access(const void* pointer, size_t bytes, bool write, size_t alignment, Access access, void* code) {
  if (!running) return;
  access_address = code;
  const char* const p = static_cast<const char*>(pointer);
  if (fibre_stacks.holds(p)) {
    if ((p - fibre_stacks.begin) / static_cast<ptrdiff_t>(kStackBytes) != current_thread) {
      fail("access to another thread's local variables at %p", pointer);
    }
  } else if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail("misaligned %s of %zu bytes at %p", write ? "write" : "read", bytes, pointer);
  } else if (static_shared.holds(p)) {
    track(&static_shadow[p - static_shared.begin], p, bytes, write, access, true);
  } else if (dynamic_shared.holds(p) && p + bytes <= dynamic_shared.begin + dynamic_shared.size) {
    track(&dynamic_shadow[p - dynamic_shared.begin], p, bytes, write, access, true);
  } else if (p + bytes > dynamic_shared.begin && p < dynamic_shared.begin + dynamic_shared.size + kPageBytes) {
    fail("%s of %zu bytes at byte %td of dynamic shared memory, which has %zu", write ? "write" : "read", bytes,
         p - dynamic_shared.begin, dynamic_shared.size);
  } else {
    check_global(p, bytes, write, access);
  }
  access_address = nullptr;
}

void check_atomic(const void* pointer, size_t size, void* code) {
  check_access(pointer, size, true, size, Access::kAtomic, code);
}

// The innermost frame that does not belong to the emulation.
std::string location_of_access() {
  Dl_info info;
  if (access_address == nullptr || dladdr(access_address, &info) == 0) return "";
  char command[1024], line[512];
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%tx 2>/dev/null", info.dli_fname,
           static_cast<char*>(access_address) - 1 - static_cast<char*>(info.dli_fbase));
  std::string location;
  if (FILE* output = popen(command, "r")) {
    while (location.empty() && fgets(line, sizeof line, output) != nullptr) {
      const std::string frame(line, strcspn(line, "\n"));
      const bool own = frame.find("cuda_host.h") != std::string::npos || frame.rfind("??", 0) == 0;
      if (!own) location = " at " + frame.substr(frame.rfind('/') + 1);
    }
    pclose(output);
  }
  return location;
}

static void fail_undefined(const char* what, void* code) {
  if (!running) {
    fprintf(stderr, "undefined behaviour in a launcher: %s\n", what);
    abort();
  }
  access_address = code;
  fail("undefined behaviour: %s", what);
}

}  // namespace vlmfast::emulation

using namespace vlmfast::emulation;

// ---- hooks of -fsanitize=thread ----

#define HOOK(name, bytes, write, alignment)                                                \
  EMULATION_API void __tsan_##name(void* p) {                                              \
    check_access(p, bytes, write, alignment, Access::kPlain, __builtin_return_address(0)); \
  }
#define HOOKS(bytes)                           \
  HOOK(read##bytes, bytes, false, bytes)       \
  HOOK(write##bytes, bytes, true, bytes)       \
  HOOK(unaligned_read##bytes, bytes, false, 1) \
  HOOK(unaligned_write##bytes, bytes, true, 1)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

EMULATION_API void __tsan_read_range(void* p, size_t bytes) {
  check_access(p, bytes, false, 1, Access::kPlain, __builtin_return_address(0));
}
EMULATION_API void __tsan_write_range(void* p, size_t bytes) {
  check_access(p, bytes, true, 1, Access::kPlain, __builtin_return_address(0));
}
// The launchers are compiled with the kernels. Hooks that only launchers call do their access and check nothing.
EMULATION_API void __tsan_init() {}
EMULATION_API void __tsan_vptr_update(void** pointer, void* value) { *pointer = value; }
EMULATION_API void __tsan_vptr_read(void**) {}
EMULATION_API uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
EMULATION_API uint64_t __tsan_atomic64_load(const volatile uint64_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
EMULATION_API uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}

// ---- hooks of -fsanitize=undefined ----

#define UNDEFINED(name) \
  EMULATION_API void __ubsan_handle_##name() { fail_undefined(#name, __builtin_return_address(0)); }
UNDEFINED(type_mismatch_v1)
UNDEFINED(out_of_bounds)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)
UNDEFINED(shift_out_of_bounds)
UNDEFINED(builtin_unreachable)
UNDEFINED(missing_return)
UNDEFINED(float_cast_overflow)

// ---- for the launchers and the tests ----

// Lets kernels read `rows` rows of memory, or, where `writable`, read and write them.
EMULATION_API void vlmfast_emulation_allow(void* begin, int64_t rows, int64_t row_bytes, int64_t row_pitch,
                                           int writable) {
  Region region{static_cast<char*>(begin), rows, row_bytes, row_pitch, writable != 0, nullptr};
  if (writable) region.shadow = make_shadow(region.size());
  regions.push_back(std::move(region));
}
EMULATION_API void vlmfast_emulation_forbid_all() { regions.clear(); }

// Describes the region with that number, and returns whether there is one.
EMULATION_API int vlmfast_emulation_region(size_t number, int64_t* out) {
  if (number >= regions.size()) return 0;
  const Region& region = regions[number];
  const int64_t facts[] = {reinterpret_cast<int64_t>(region.begin), region.rows, region.row_bytes, region.row_pitch,
                           region.writable};
  std::copy(std::begin(facts), std::end(facts), out);
  return 1;
}

// Bytes loaded and bytes stored so far, each once per launch.
EMULATION_API void vlmfast_emulation_distinct(uint64_t* out) {
  out[0] = distinct_loaded.count;
  out[1] = distinct_stored.count;
}
