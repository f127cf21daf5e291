// The gradient of the bypass values: dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]].
//
// `make ptx` builds value_gradient.ptx from this file; core/cuda_kernels.py chooses the entry and the launch, and
// tests/core/test_cuda_kernels.py compiles this text for the CPU and runs it.
//
// Letters: T tokens, O neurons, I input connections, k connections per neuron. A tile is all I inputs of a few tokens: x
// comes as (tiles, I, TOKENS), so that a tile is contiguous and the tokens of an input are one vector of BYTES bytes. A thread
// has one neuron. It keeps the sums of up to K of its connections in registers; for each tile it loads TOKENS entries of
// dy and, for each connection, one vector from shared memory. The next tile is copied meanwhile into a second stage.
//
// Grid: x blocks of neurons, y groups of connections, z splits, each a range of tiles. A split writes its own sums,
// (splits, O, k), which the caller adds: no atomics, so that equal runs have equal bits.
//
// Where two stages do not fit into shared memory, a stage is a slice of the inputs. Every thread then skips the
// connections outside of the slice.

#include <cuda_pipeline_primitives.h>

struct Shape {
  int tokens, outputs, inputs, k;  // inputs: I, rounded up to a whole number of 16 bytes
  int connections;                 // of a group, at most K
  int tiles, tiles_per_split;
  int slice;  // inputs of a stage
};

// Elements in float32, and `sum` plus the products of dy with the tokens in a word or a vector of x.
__device__ __forceinline__ float wide(float element) { return element; }
__device__ __forceinline__ float wide(unsigned short bfloat16) { return __uint_as_float(unsigned(bfloat16) << 16); }

template <typename Element>
__device__ __forceinline__ float add(float sum, const float* dy, unsigned word) {
  if (sizeof(Element) == 4) return sum + dy[0] * __uint_as_float(word);
  sum += dy[0] * __uint_as_float(word << 16);
  return sum + dy[1] * __uint_as_float(word & 0xffff0000u);
}

template <typename Element>
__device__ __forceinline__ float add(float sum, const float* dy, uint2 vector) {
  sum = add<Element>(sum, dy, vector.x);
  return add<Element>(sum, dy + 4 / sizeof(Element), vector.y);
}

template <typename Element>
__device__ __forceinline__ float add(float sum, const float* dy, uint4 vector) {
  sum = add<Element>(sum, dy, make_uint2(vector.x, vector.y));
  return add<Element>(sum, dy + 8 / sizeof(Element), make_uint2(vector.z, vector.w));
}

template <typename Element, typename Vector, int K, bool SLICED>
__device__ __forceinline__ void value_gradient(
    const uint4* __restrict__ x, const Element* __restrict__ dy, const int* __restrict__ columns, float* __restrict__ sums,
    const Shape shape) {
  constexpr int TOKENS = sizeof(Vector) / sizeof(Element);
  constexpr int PACKED = sizeof(uint4) / sizeof(Vector);  // inputs in 16 bytes
  extern __shared__ uint4 stages[];

  const int neuron = blockIdx.x * blockDim.x + threadIdx.x;
  const int read = min(neuron, shape.outputs - 1);  // threads without a neuron repeat the last one and write nothing
  const int group = blockIdx.y * shape.connections;
  const int count = min(shape.connections, shape.k - group);

  unsigned chosen[K / 2];  // two columns of 16 bits each; those beyond `count` repeat the last one
#pragma unroll
  for (int j = 0; j < K; j += 2) {
    const int* row = columns + size_t(read) * shape.k + group;
    chosen[j / 2] = unsigned(row[min(j, count - 1)]) | unsigned(row[min(j + 1, count - 1)]) << 16;
  }
  float total[K];
#pragma unroll
  for (int j = 0; j < K; ++j) total[j] = 0.f;

  const int begin = blockIdx.z * shape.tiles_per_split;
  const int end = min(begin + shape.tiles_per_split, shape.tiles);

  auto copy = [&](int stage, int tile, int first) {
    const uint4* from = x + (size_t(tile) * shape.inputs + first) / PACKED;
    uint4* to = stages + stage * (shape.slice / PACKED);
    const int chunks = (SLICED ? min(shape.slice, shape.inputs - first) : shape.inputs) / PACKED;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) __pipeline_memcpy_async(to + i, from + i, sizeof(uint4));
  };
  Element ahead[TOKENS];  // dy of the next tile, on its way
  auto load = [&](int tile) {
    const Element* from = dy + size_t(tile) * TOKENS * shape.outputs + read;
    const int last = shape.tokens - 1 - tile * TOKENS;  // tokens beyond it repeat it; their x is zero
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) ahead[t] = from[unsigned(min(t, last)) * unsigned(shape.outputs)];
  };

  copy(0, begin, 0);
  __pipeline_commit();
  load(begin);
  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    float now[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) now[t] = wide(ahead[t]);
    for (int first = 0; first < shape.inputs; first += shape.slice) {
      __pipeline_wait_prior(0);
      __syncthreads();  // this stage has arrived for all threads, and all have read the other one
      if (SLICED && first + shape.slice < shape.inputs) {
        copy(stage ^ 1, tile, first + shape.slice);
      } else if (tile + 1 < end) {
        copy(stage ^ 1, tile + 1, 0);
      }
      __pipeline_commit();
      if (first == 0 && tile + 1 < end) load(tile + 1);
      const Vector* inputs = reinterpret_cast<const Vector*>(stages + stage * (shape.slice / PACKED));
#pragma unroll
      for (int j = 0; j < K; ++j) {
        unsigned column = j % 2 ? chosen[j / 2] >> 16 : chosen[j / 2] & 0xffffu;
        if (SLICED) {
          column -= first;
          if (column >= unsigned(shape.slice)) continue;
        }
        total[j] += add<Element>(0.f, now, inputs[column]);
      }
      stage ^= 1;
      if (!SLICED) break;
    }
  }
  if (neuron < shape.outputs) {
    float* row = sums + (size_t(blockIdx.z) * shape.outputs + neuron) * shape.k + group;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (j < count) row[j] = total[j];
    }
  }
}

#define ENTRY(NAME, ELEMENT, VECTOR, K, SLICED)                                                                       \
  extern "C" __global__ void __launch_bounds__(1024, 1) value_gradient_##NAME##_##K(                                  \
      const uint4* x, const ELEMENT* dy, const int* columns, float* sums, int tokens, int outputs, int inputs, int k, \
      int connections, int tiles, int tiles_per_split, int slice) {                                                   \
    value_gradient<ELEMENT, VECTOR, K, SLICED>(                                                                       \
        x, dy, columns, sums, Shape{tokens, outputs, inputs, k, connections, tiles, tiles_per_split, slice});         \
  }
#define ENTRIES(NAME, ELEMENT, VECTOR, SLICED) \
  ENTRY(NAME, ELEMENT, VECTOR, 4, SLICED)      \
  ENTRY(NAME, ELEMENT, VECTOR, 8, SLICED)      \
  ENTRY(NAME, ELEMENT, VECTOR, 12, SLICED)     \
  ENTRY(NAME, ELEMENT, VECTOR, 16, SLICED)     \
  ENTRY(NAME, ELEMENT, VECTOR, 20, SLICED)

ENTRIES(bfloat16_8_tokens, unsigned short, uint4, false)
ENTRIES(bfloat16_4_tokens, unsigned short, uint2, false)
ENTRIES(bfloat16_sliced, unsigned short, uint2, true)
ENTRIES(float32_4_tokens, float, uint4, false)
ENTRIES(float32_2_tokens, float, uint2, false)
ENTRIES(float32_sliced, float, uint2, true)
