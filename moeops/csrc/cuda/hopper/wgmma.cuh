// One wrapper per product shape: d[m64, n] (+)= a[m64, k16] b[n, k16], both operands in shared
// memory, float32 sums. The register lists have to be literal text in the instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moeops::hopper {

// clang-format off
#define MOEOPS_REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define MOEOPS_REGISTERS_96 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define MOEOPS_REGISTERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define MOEOPS_OUT_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOEOPS_OUT_32(d, i) MOEOPS_OUT_8(d, i), MOEOPS_OUT_8(d, i + 8), MOEOPS_OUT_8(d, i + 16), MOEOPS_OUT_8(d, i + 24)
#define MOEOPS_OUT_64(d) MOEOPS_OUT_32(d, 0), MOEOPS_OUT_32(d, 32)
#define MOEOPS_OUT_96(d) MOEOPS_OUT_64(d), MOEOPS_OUT_32(d, 64)
#define MOEOPS_OUT_128(d) MOEOPS_OUT_96(d), MOEOPS_OUT_32(d, 96)

// %R a, %R+1 b, %R+2 whether to add to d, %R+3 and %R+4: k across the lines of a, of b.
#define MOEOPS_PRODUCT(N, R, A, B, ADD, ACROSS_A, ACROSS_B, TYPE)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD ", 0;\n"                                     \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                        \
               " {" MOEOPS_REGISTERS_##R "}, %" A ", %" B ", p, 1, 1, %" ACROSS_A ", %" ACROSS_B ";\n}\n" \
               : MOEOPS_OUT_##R(d)                                                                  \
               : "l"(a), "l"(b), "r"(add), "n"(kAcrossA), "n"(kAcrossB))
#define MOEOPS_PRODUCT_OF(N, R, A, B, ADD, ACROSS_A, ACROSS_B)                                      \
  template <typename T, int kAcrossA, int kAcrossB>                                                 \
  __device__ __forceinline__ void product(float (&d)[R], uint64_t a, uint64_t b, int add) {         \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                               \
      MOEOPS_PRODUCT(N, R, A, B, ADD, ACROSS_A, ACROSS_B, "bf16");                                  \
    } else {                                                                                        \
      static_assert(std::is_same_v<T, __half>, "products of bfloat16 or float16");                  \
      MOEOPS_PRODUCT(N, R, A, B, ADD, ACROSS_A, ACROSS_B, "f16");                                   \
    }                                                                                               \
  }
MOEOPS_PRODUCT_OF(128, 64, "64", "65", "66", "67", "68")
MOEOPS_PRODUCT_OF(192, 96, "96", "97", "98", "99", "100")
MOEOPS_PRODUCT_OF(256, 128, "128", "129", "130", "131", "132")
#undef MOEOPS_REGISTERS_64
#undef MOEOPS_REGISTERS_96
#undef MOEOPS_REGISTERS_128
#undef MOEOPS_OUT_8
#undef MOEOPS_OUT_32
#undef MOEOPS_OUT_64
#undef MOEOPS_OUT_96
#undef MOEOPS_OUT_128
#undef MOEOPS_PRODUCT
#undef MOEOPS_PRODUCT_OF
// clang-format on

}  // namespace moeops::hopper
