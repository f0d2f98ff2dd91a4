// Thin wrappers over the sm_90a instructions of the Hopper kernels: barriers, copies between global
// and shared memory, matrix products. Shared memory is addressed by 32-bit shared-window addresses.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace moeops::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Barriers in shared memory (mbarrier).
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// At a barrier of any CTA of the cluster. The qualified form with .release.cluster would compile to
// a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t cluster_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_barrier) : "memory");
}
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, int parity) {
  constexpr int kSuspendNanoseconds = 2000;  // at most, a completed phase wakes the thread
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(passed)
      : "r"(barrier), "r"(parity), "n"(kSuspendNanoseconds)
      : "memory");
  return passed != 0;
}

// Who waits, in the report of the watchdog.
enum class Waiting { kForEmptyStage = 1, kForFullStage = 2, kForTurn = 3, kForPreActivation = 4 };

// In builds with MOEOPS_WATCHDOG a wait of about a second ends the kernel by a store to address
// 16 * (16 * who + stage), which compute-sanitizer prints; a deadlock would otherwise last for
// ever. (trap or printf here would make ptxas serialise the matrix products.)
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity, Waiting who, int stage) {
#ifdef MOEOPS_WATCHDOG
  uint32_t polls = 0;
  while (!barrier_passed(barrier, parity)) {
    if (++polls == (1u << 20)) {
      const uint64_t address = 16 * (16 * static_cast<uint64_t>(who) + stage);
      asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(address), "r"(parity) : "memory");
    }
  }
#else
  while (!barrier_passed(barrier, parity)) {
  }
#endif
}

// Barrier `id` (1 to 15) of `threads` threads of the block.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Clusters.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Where CTA `rank` of the cluster has what this CTA has at `address`.
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
// Not .aligned: lanes that left early count as arrived.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Copies of 16 bytes per thread; zero_fill: no access, zeros instead.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool zero_fill) {
  const int bytes = zero_fill ? 0 : 16;
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
// The thread's arrival, once all of its copies so far have landed.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Tensor copies (TMA) of the box of `map` at the given coordinates, innermost first.
__device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                            int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                            int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                            int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// The same into both CTAs of a pair, at the same shared address; each CTA's own barrier is told.
constexpr uint16_t kBothCtas = 3;
__device__ __forceinline__ void tensor_load_pair(uint32_t to, const CUtensorMap* map,
                                                 uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(kBothCtas), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tensor_load_pair(uint32_t to, const CUtensorMap* map,
                                                 uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(kBothCtas), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void tensor_load_pair(uint32_t to, const CUtensorMap* map,
                                                 uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(kBothCtas), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t from, int x, int y,
                                             int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(from), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most `kPending` of the thread's groups of stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void store_wait_all() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Orders this thread's ordinary accesses to shared memory before those of the copy engine and of
// the tensor cores.
__device__ __forceinline__ void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers of a warpgroup's threads.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// 8 x 8 matrices of 16-bit values, four at a time.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t from, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t from) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_8(uint32_t to, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared_4(uint32_t to, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// Matrix products of a warpgroup (the products themselves are in wgmma.cuh).
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler must not move accumulators across this point.
template <int kCount>
__device__ __forceinline__ void hold(float (&accumulators)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}
// A copy in a register of its own: sums that are written elsewhere than by products would make
// ptxas serialise the products.
__device__ __forceinline__ float moved(float sum) {
  float copy;
  asm volatile("mov.b32 %0, %1;" : "=f"(copy) : "f"(sum));
  return copy;
}
// Ends the life of the last tile's sums, which the first product of a tile else seems to read.
template <int kRows, int kCount>
__device__ __forceinline__ void clear(float (&sums)[kRows][kCount]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[m][i] = 0;
  }
}
// Descriptor of an operand in 128-byte swizzled lines, the next 8 of which follow after 1024 bytes.
// Operands with k across the lines: the next 64 columns follow after `next_columns` bytes.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t next_columns) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kNextLines = 1024 >> 4;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         (static_cast<uint64_t>(next_columns >> 4) << 16) | (kNextLines << 32) | kSwizzle128;
}

}  // namespace moeops::hopper
