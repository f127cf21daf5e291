// Runs a CUDA kernel on the CPU, one block after another. Compiled by test_cuda_kernels.py together with the kernel's source.
//
// The threads of a block are coroutines that change at __syncthreads. A copy into shared memory leaves NaN there until its
// thread waits for it, and memory that was not copied holds NaN: a missing wait, a missing barrier or a read beyond what was
// copied shows in the result. The order of the threads changes from round to round.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x, y, z;
};
using std::min;

static Index threadIdx, blockIdx, blockDim;
constexpr int SHARED = 232448;  // the most that a block of any GPU has
alignas(16) uint4 stages[SHARED / 16];

static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace {
constexpr int BOUND = 1 << 16;  // bytes of a coroutine's stack
enum Fault { NONE, OUTSIDE, DIVERGED };
struct Copy {
  void* to;
  const void* from;
  int group;
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> pending;
  int group = 0;
  bool ended = false;
};
ucontext_t scheduler;
std::vector<Thread> threads;
int current, shared_bytes, fault;
const char *source_begin, *source_end;
void (*body)();
}  // namespace

static void __syncthreads() { swapcontext(&threads[current].context, &scheduler); }

static void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  const long offset = static_cast<char*>(to) - reinterpret_cast<char*>(stages);
  const char* first = static_cast<const char*>(from);
  if (size != 16 || offset % 16 || offset < 0 || offset + 16 > shared_bytes || reinterpret_cast<uintptr_t>(from) % 16 ||
      first < source_begin || first + 16 > source_end) {
    fault = OUTSIDE;
    return;
  }
  std::memset(to, 0xff, size);
  threads[current].pending.push_back({to, from, threads[current].group});
}
static void __pipeline_commit() { ++threads[current].group; }
static void __pipeline_wait_prior(int keep) {
  Thread& thread = threads[current];
  auto arrived = [&](const Copy& copy) { return copy.group < thread.group - keep; };
  for (const Copy& copy : thread.pending)
    if (arrived(copy)) std::memcpy(copy.to, copy.from, 16);
  auto& pending = thread.pending;
  pending.erase(std::remove_if(pending.begin(), pending.end(), arrived), pending.end());
}

#include SOURCE

static void run_thread() {
  body();
  threads[current].ended = true;
  swapcontext(&threads[current].context, &scheduler);
}

static void run_block(unsigned& order) {
  std::memset(stages, 0xff, sizeof stages);
  const int count = threads.size();
  for (Thread& thread : threads) {
    thread.ended = false;
    thread.group = 0;
    thread.pending.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = BOUND;
    makecontext(&thread.context, run_thread, 0);
  }
  for (int ended = 0; ended < count && !fault;) {
    order = order * 1664525u + 1013904223u;
    const bool backwards = order >> 31;
    const int first = (order >> 8) % count;
    for (int i = 0; i < count; ++i) {
      current = (backwards ? first + count - i : first + i) % count;
      threadIdx = {unsigned(current), 0, 0};
      swapcontext(&scheduler, &threads[current].context);
    }
    ended = std::count_if(threads.begin(), threads.end(), [](const Thread& thread) { return thread.ended; });
    if (ended && ended < count) fault = DIVERGED;
  }
}

using Entry = void (*)(const void*, const void*, const int*, float*, int, int, int, int, int, int, int, int);
struct Arguments {
  const void *x, *dy;
  const int* columns;
  float* sums;
  int scalars[8];
};
static Entry entry;
static Arguments arguments;
static void call() {
  const int* s = arguments.scalars;
  entry(arguments.x, arguments.dy, arguments.columns, arguments.sums, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]);
}

// Returns 0, or what went wrong.
extern "C" int launch(void* kernel, const int* grid, int block, int shared, unsigned order, const void* x, long x_bytes,
                      const void* dy, const int* columns, float* sums, const int* scalars) {
  entry = reinterpret_cast<Entry>(kernel);
  arguments = {x, dy, columns, sums, {}};
  std::copy(scalars, scalars + 8, arguments.scalars);
  body = call;
  source_begin = static_cast<const char*>(x);
  source_end = source_begin + x_bytes;
  shared_bytes = shared;
  fault = shared > SHARED ? OUTSIDE : NONE;
  blockDim = {unsigned(block), 1, 1};
  threads.resize(block);
  for (Thread& thread : threads) thread.stack.resize(BOUND);
  for (blockIdx.z = 0; blockIdx.z < unsigned(grid[2]); ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < unsigned(grid[1]); ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < unsigned(grid[0]) && !fault; ++blockIdx.x) run_block(order);
  return fault;
}
