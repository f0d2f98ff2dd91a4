// Which experts a warp chooses for its token. T tokens, E experts, K experts per token. Lane l
// holds the scores of experts l, l + 32, l + 64, ... in registers, kSlots of them.
#pragma once

#include <cmath>

#include "route_options.h"
#include "vector.cuh"

namespace moeops {

// An unsigned key that orders like the float, with -0 equal to +0. Keys of real values are never 0.
__device__ __forceinline__ uint32_t order_key(float v) {
  const uint32_t bits = __float_as_uint(v + 0.0f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return key == 0 ? 1 : key;
}
__device__ __forceinline__ uint64_t order_key(double v) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(v + 0.0));
  const uint64_t key = bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
  return key == 0 ? 1 : key;
}

// The value a key was made of (of NaN, some NaN).
__device__ __forceinline__ float value_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ double value_of_key(uint64_t key) {
  const uint64_t sign = uint64_t{1} << 63;
  return __longlong_as_double(static_cast<long long>(key & sign ? key & ~sign : ~key));
}

__device__ __forceinline__ uint32_t warp_max_key(uint32_t key) {
  return __reduce_max_sync(kFullMask, key);
}
__device__ __forceinline__ uint64_t warp_max_key(uint64_t key) { return warp_max(key); }

template <typename Acc>
__device__ __forceinline__ Acc smallest_normal();
template <>
__device__ __forceinline__ float smallest_normal<float>() {
  return 1.17549435e-38f;
}
template <>
__device__ __forceinline__ double smallest_normal<double>() {
  return 2.2250738585072014e-308;
}

// z[i] becomes the score of expert lane + 32 * i; lanes past the last expert hold -infinity before
// and 0 after.
template <typename Acc, int kSlots>
__device__ __forceinline__ void scores_from_logits(Acc (&z)[kSlots], bool sigmoid) {
  if (sigmoid) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) z[i] = Acc(1) / (Acc(1) + exp(-z[i]));
    return;
  }
  Acc top = z[0];
#pragma unroll
  for (int i = 1; i < kSlots; ++i) top = z[i] > top ? z[i] : top;
  top = warp_max(top);
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    z[i] = exp(z[i] - top);
    sum += z[i];
  }
  const Acc factor = Acc(1) / warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) z[i] *= factor;
}

template <typename T, int kSlots>
__device__ __forceinline__ void load_logits(const T* row, int num_experts,
                                            device_accumulate_t<T> (&z)[kSlots]) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    z[i] = e < num_experts ? to_accumulate(row[e]) : Acc(-INFINITY);
  }
}

// Removes from `keys` the experts outside the top_groups best groups; a group is worth the sum of
// its two best choices, or with kBySum of all. `group_worth` is this warp's shared memory, one
// value per group.
template <bool kBySum = false, typename Acc, int kSlots, typename Key>
__device__ __forceinline__ void keep_best_groups(const Acc (&choice)[kSlots], Key (&keys)[kSlots],
                                                 const RouteOptions& options, Acc* group_worth) {
  const int lane = threadIdx.x % kWarpSize;
  const int group_size = options.num_experts / options.num_groups;
  const bool power_of_two = (group_size & (group_size - 1)) == 0;
  const int shift = __ffs(group_size) - 1;
  const Acc kLowest = kBySum ? Acc(0) : Acc(-INFINITY);
  const bool two = !kBySum && group_size > 1;
  int group[kSlots];  // of the lane's experts; -1 past the last
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    group[i] = power_of_two ? e >> shift : e / group_size;
    if (e >= options.num_experts) group[i] = -1;
  }
  // What two lanes know of a group: the two best of their two best, or the sum of their sums.
  const auto merge = [](Acc& first, Acc& second, int offset) {
    const Acc other_first = __shfl_xor_sync(kFullMask, first, offset);
    if constexpr (kBySum) {
      first += other_first;
      return;
    }
    const Acc other_second = __shfl_xor_sync(kFullMask, second, offset);
    const Acc loser = first < other_first ? first : other_first;
    first = first < other_first ? other_first : first;
    second = second < other_second ? other_second : second;
    second = second < loser ? loser : second;
  };
  // The worth of groups that are aligned neighbours in one register: all of a register's at once.
  const bool aligned = group_size <= kWarpSize && power_of_two;
  if (aligned) {
    // A few registers at a time: their exchanges do not wait for each other.
    constexpr int kTile = kSlots < 4 ? kSlots : 4;
#pragma unroll
    for (int base = 0; base < kSlots; base += kTile) {
      Acc first[kTile], second[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        first[i] = group[base + i] < 0 ? kLowest : choice[base + i];
        second[i] = kLowest;
      }
      for (int offset = group_size / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) merge(first[i], second[i], offset);
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (group[base + i] >= 0 && lane % group_size == 0) {
          group_worth[group[base + i]] = two ? first[i] + second[i] : first[i];
        }
      }
    }
  }
  // The worth of other groups, one after the other.
  for (int g = 0; g < options.num_groups && !aligned; ++g) {
    Acc first = kLowest, second = kLowest;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (group[i] == g) {
        if constexpr (kBySum) {
          first += choice[i];
        } else if (choice[i] > first) {
          second = first;
          first = choice[i];
        } else if (choice[i] > second) {
          second = choice[i];
        }
      }
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) merge(first, second, offset);
    if (lane == 0) group_worth[g] = two ? first + second : first;
  }
  __syncwarp();
  // Keys of the groups that do not stay become 0; a group stays if fewer than top_groups groups
  // come before it.
  const auto stays = [&](int mine) {
    int better = 0;
    for (int g = 0; g < options.num_groups; ++g) {
      better +=
          group_worth[g] > group_worth[mine] || (group_worth[g] == group_worth[mine] && g < mine);
    }
    return better < options.top_groups;
  };
  if (options.num_groups <= kWarpSize) {  // every lane asks for one group
    const unsigned kept = __ballot_sync(kFullMask, lane < options.num_groups && stays(lane));
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (group[i] >= 0 && !(kept >> group[i] & 1)) keys[i] = 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (group[i] >= 0 && !stays(group[i])) keys[i] = 0;
    }
  }
  __syncwarp();
}

// Removes from `keys` the experts outside the one group with the largest sum of scores, which are 0
// past the last expert.
template <typename Acc, int kSlots, typename Key>
__device__ __forceinline__ void keep_largest_group(const Acc (&score)[kSlots], Key (&keys)[kSlots],
                                                   int num_experts, int num_groups) {
  const int lane = threadIdx.x % kWarpSize;
  const int group_size = num_experts / num_groups;
  const bool power_of_two = (group_size & (group_size - 1)) == 0;
  const int shift = __ffs(group_size) - 1;
  Key best = 0;
  int chosen = 0;                                 // the first of the best, as experts
  if (power_of_two && group_size <= kWarpSize) {  // neighbours in one register
    int mine = num_experts;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      Acc sum = score[i];
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        if (offset < group_size) sum += __shfl_xor_sync(kFullMask, sum, offset);
      }
      const int e = lane + i * kWarpSize;
      const Key key = e < num_experts ? order_key(sum) : 0;
      if (key > best) {
        best = key;
        mine = e;
      }
    }
    const Key top = warp_max_key(best);
    const int e = __reduce_min_sync(kFullMask, best == top ? mine : num_experts);
    chosen = e >> shift << shift;
  } else {
    for (int first = 0; first < num_experts; first += group_size) {
      Acc sum = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int e = lane + i * kWarpSize;
        sum += e >= first && e < first + group_size ? score[i] : Acc(0);
      }
      const Key key = order_key(warp_sum(sum));
      if (key > best) {
        best = key;
        chosen = first;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    if (e < chosen || e >= chosen + group_size) keys[i] = 0;
  }
}

// A lane's candidates, best first. Up to four are kept sorted, so that the best is at hand in every
// round; more are searched anew, which costs fewer registers.
template <typename Key, int kSlots>
struct LaneCandidates {
  static constexpr bool kSorted = kSlots <= 4;
  Key keys[kSlots];
  int slots[kSlots];

  __device__ __forceinline__ void prepare() {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) slots[i] = i;
    if constexpr (kSorted) {
#pragma unroll
      for (int pass = 1; pass < kSlots; ++pass) {
#pragma unroll
        for (int i = 0; i < kSlots - pass; ++i) {
          const bool swap = keys[i + 1] > keys[i];  // strict: equal keys stay in slot order
          const Key key = swap ? keys[i + 1] : keys[i];
          const int slot = swap ? slots[i + 1] : slots[i];
          keys[i + 1] = swap ? keys[i] : keys[i + 1];
          slots[i + 1] = swap ? slots[i] : slots[i + 1];
          keys[i] = key;
          slots[i] = slot;
        }
      }
    }
  }

  __device__ __forceinline__ void best(Key& key, int& slot) const {
    key = keys[0];
    slot = slots[0];
    if constexpr (!kSorted) {
#pragma unroll
      for (int i = 1; i < kSlots; ++i) {
        if (keys[i] > key) {
          key = keys[i];
          slot = slots[i];
        }
      }
    }
  }

  // Takes the best one out.
  __device__ __forceinline__ void remove(int slot) {
    if constexpr (kSorted) {
#pragma unroll
      for (int i = 0; i + 1 < kSlots; ++i) {
        keys[i] = keys[i + 1];
        slots[i] = slots[i + 1];
      }
      keys[kSlots - 1] = 0;
    } else {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (slots[i] == slot) keys[i] = 0;
      }
    }
  }
};

// The warp takes its K best candidates out, best first: their ids, and their logits if kByLogit,
// else their scores. Returns which of the lane's own slots they were, as bits.
template <bool kByLogit, typename Acc, int kSlots, typename Key>
__device__ __forceinline__ uint64_t choose_best(LaneCandidates<Key, kSlots>& candidates,
                                                const Acc (&score)[kSlots], int K, int E,
                                                Acc* chosen, int32_t* chosen_ids) {
  const int lane = threadIdx.x % kWarpSize;
  uint64_t taken = 0;
  for (int k = 0; k < K; ++k) {
    Key key;
    int slot;
    candidates.best(key, slot);
    const Key top = warp_max_key(key);
    const int expert = __reduce_min_sync(kFullMask, key == top ? lane + slot * kWarpSize : E);
    Acc value = value_of_key(top);
    if constexpr (!kByLogit) {
      Acc own = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) own = i == slot ? score[i] : own;
      value = __shfl_sync(kFullMask, own, expert % kWarpSize);
    }
    if (lane == expert % kWarpSize) {
      candidates.remove(slot);
      taken |= uint64_t{1} << slot;
    }
    if (lane == 0) {
      chosen[k] = value;
      chosen_ids[k] = expert;
    }
  }
  return taken;
}

}  // namespace moeops
