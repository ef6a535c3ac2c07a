// SPDX-License-Identifier: MIT
// dsa_kernels.cu: the CUDA kernels of dsa.py, which compiles and launches them. Copy it beside that file.
//
// Axes and names are dsa.py's. Arrays are C-contiguous where no strides are given; batch axes are flattened
// into one of B entries. A kernel stands in an #ifdef of its name, as its constants arrive by -D. Query t of
// a batch entry sees keys from k_start[t] (null: 0) up to k_end[t] (null: offset + t + 1, clipped to [0, S]).

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <math_constants.h>

// ---------------------------------------------------------------------------------------------------------
// What kernels share

typedef long long i64;
typedef unsigned char u8;
typedef __nv_bfloat16 bf16;

constexpr unsigned ALL = 0xffffffff;  // the lanes of a warp
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define UNROLL _Pragma("unroll")      // the loop that follows: what it indexes then stays in registers

struct Window {
    i64 start, end;
    __device__ bool sees(i64 s) const { return start <= s && s < end; }
};

// The window of query t of batch entry b, from what k_start and k_end hold, or their defaults.
__device__ Window window_of(const int* k_start, const int* k_end, i64 b, i64 t, i64 T, i64 S, i64 offset) {
    i64 end = k_end ? k_end[b * T + t] : min(max(offset + t + 1, 0LL), S);
    return {k_start ? k_start[b * T + t] : 0, end};
}

// PTX, one instruction each, under the ISA's own names
#define PTX(NAME, PARAMETERS, ...) __device__ void NAME PARAMETERS { asm volatile(__VA_ARGS__ : "memory"); }

__device__ unsigned cvta_shared(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

template <int BYTES>  // 4, 8 or 16, to which both addresses are aligned
PTX(cp_async, (void* shared, const void* global), "cp.async.ca.shared.global [%0], [%1], %2;"
    ::"r"(cvta_shared(shared)), "l"(global), "n"(BYTES))
template <int BYTES>  // the same, or zeros where !there: then global is not read
__device__ void cp_async(unsigned shared, const void* global, bool there) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;"
                     ::"r"(shared), "l"(global), "r"(there ? 16 : 0));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     ::"r"(shared), "l"(global), "n"(BYTES), "r"(there ? BYTES : 0));
}
PTX(cp_async_commit_group, (), "cp.async.commit_group;" ::)
template <int PENDING> PTX(cp_async_wait_group, (), "cp.async.wait_group %0;" ::"n"(PENDING))
PTX(cp_async_wait_all, (), "cp.async.wait_all;" ::)

// 16 bytes that nobody writes meanwhile, or zeros
__device__ uint4 load_16(const void* from, bool there) {
    return there ? __ldg((const uint4*)from) : make_uint4(0, 0, 0, 0);
}

// Four 8 x 8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i / 8.
PTX(ldmatrix_x4, (unsigned (&d)[4], unsigned row),
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row))
PTX(ldmatrix_x2, (unsigned& d0, unsigned& d1, unsigned row),
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(d0), "=r"(d1) : "r"(row))
PTX(ldmatrix_x4_trans, (unsigned (&d)[4], unsigned row),
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row))
PTX(stmatrix_x4, (unsigned row, const unsigned* d),  // sm_90
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
    ::"r"(row), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]))

// An 8 x 8 matrix of 16 bits, a row of it in four lanes, becomes its transpose.
__device__ unsigned movmatrix_trans(unsigned x) {
    unsigned d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}

// d [16, 8] += a [16, 16] b [16, 8], and two numbers in a register; the last argument says of which type
#define SIXTEEN_BITS(TYPE, BITS)                                                                          \
    __device__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, TYPE) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." BITS "." BITS ".f32 "                                \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                              \
    }                                                                                                     \
    __device__ unsigned cvt_rn_x2(float lo, float hi, TYPE) {                                             \
        unsigned d;                                                                                       \
        asm("cvt.rn." BITS "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));                            \
        return d;                                                                                         \
    }
SIXTEEN_BITS(bf16, "bf16")
SIXTEEN_BITS(__half, "f16")

// Hopper (sm_90a): products that a warpgroup of 128 threads starts and waits for, and barriers that copies
// and threads arrive at. A warpgroup's warp w holds rows 16 w .. 16 w + 15 of d, laid out as by mma_m16n8k16.

typedef unsigned long long u64;

PTX(mbarrier_init, (u64* bar, int arrivals), "mbarrier.init.shared.b64 [%0], %1;"
    ::"r"(cvta_shared(bar)), "r"(arrivals))
PTX(mbarrier_arrive, (u64* bar), "mbarrier.arrive.shared.b64 _, [%0];" ::"r"(cvta_shared(bar)))
PTX(cp_async_mbarrier_arrive, (u64* bar),  // once what this thread has copied so far is there
    "cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(cvta_shared(bar)))
PTX(mbarrier_wait, (u64* bar, int parity),  // until its phase 0, 1, 2.. of this parity is complete
    "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra AGAIN; }"
    ::"r"(cvta_shared(bar)), "r"(parity))
PTX(bar_sync, (int id, int threads), "bar.sync %0, %1;" ::"r"(id), "r"(threads))
PTX(bar_arrive, (int id, int threads), "bar.arrive %0, %1;" ::"r"(id), "r"(threads))
PTX(fence_proxy_async, (), "fence.proxy.async.shared::cta;" ::)
template <int N> PTX(setmaxnreg_inc, (), "setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N))
template <int N> PTX(setmaxnreg_dec, (), "setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N))

// A cluster of blocks (sm_90 on). mapa gives an address in another block's shared memory; words stored there
// count their bytes on a barrier beside them.
PTX(fence_mbarrier_init, (), "fence.mbarrier_init.release.cluster;" ::)
PTX(barrier_cluster_arrive_relaxed, (), "barrier.cluster.arrive.relaxed.aligned;" ::)
PTX(barrier_cluster_wait, (), "barrier.cluster.wait.aligned;" ::)
__device__ unsigned mapa(const void* shared, int rank) {
    unsigned d;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(cvta_shared(shared)), "r"(rank));
    return d;
}
PTX(st_async, (unsigned at, int x, unsigned bar),
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(at), "r"(x), "r"(bar))
PTX(st_async, (unsigned at, int4 x, unsigned bar),
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
    ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(bar))
PTX(mbarrier_arrive_expect_tx, (u64* bar, int bytes), "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
    ::"r"(cvta_shared(bar)), "r"(bytes))
PTX(cp_async_bulk, (void* shared, const void* global, int bytes, u64* bar),  // all multiples of 16
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    ::"r"(cvta_shared(shared)), "l"(global), "r"(bytes), "r"(cvta_shared(bar)))

PTX(wgmma_fence, (), "wgmma.fence.sync.aligned;" ::)
PTX(wgmma_commit_group, (), "wgmma.commit_group.sync.aligned;" ::)
template <int PENDING> PTX(wgmma_wait_group, (), "wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING))

// A matrix in shared memory, in panels of 128 bytes of each row: [panel][row][128], 1,024-byte aligned, with
// 16-byte chunks at chunk ^ row % 8. n bytes further are + n / 16; panel_bytes matters where it is transposed.
__device__ u64 wgmma_matrix(unsigned shared, int panel_bytes = 16) {
    return (shared & 0x3FFFF) >> 4 | (u64)(panel_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// The registers of d, as operands: their places, 32, the first 64 and 64 more, and their constraints
#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define TO_32 " {" TEN() TEN(1) TEN(2) "%30,%31}, "
#define TO_64 " {" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60,%61,%62,%63}, "
#define TO_MORE " {%64,%65,%66,%67,%68,%69," TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
                "%120,%121,%122,%123,%124,%125,%126,%127}, "
#define F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
              "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(i) F8(i), F8(i + 8), F8(i + 16), F8(i + 24)
#define R4(i) "r"(a[i]), "r"(a[i + 1]), "r"(a[i + 2]), "r"(a[i + 3])

// Products d = a b, + d if `add`; the last argument says of which type. a and b are matrices in shared
// memory, or a is in registers as mma_m16n8k16 has it. An instruction takes 32 bytes of each row; k64 is four
// of them in one statement: where d is named once, kernels compile a twelfth faster.
#define K16(BITS)                                                                                          \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." BITS TO_32 "a, b, p, 1, 1, 0, 0;"                        \
    "add.s64 a, a, 2; add.s64 b, b, 2;"
#define K16_BOTH_SIDES(BITS, A, ORDER)                                                                     \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." BITS TO_64 A ", b, p, 1, 1, " ORDER ";"                 \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." BITS TO_MORE A ", c, p, 1, 1, " ORDER ";"               \
    "add.s64 a, a, 2; add.s64 b, b, 128; add.s64 c, c, 128;"
#define WGMMA(TYPE, BITS)                                                                                  \
    __device__ void wgmma_m64n64k64(float (&d)[32], u64 a, u64 b, bool add, TYPE) {                        \
        asm volatile("{ .reg .pred p; .reg .b64 a, b; mov.b64 a, %32; mov.b64 b, %33;"                     \
                     "setp.ne.b32 p, %34, 0;" K16(BITS)                                                    \
                     "setp.eq.b32 p, 0, 0;" K16(BITS) K16(BITS) K16(BITS) "}"                              \
                     : F32(0) : "l"(a), "l"(b), "r"((int)add));                                            \
    }                                                                                                      \
    /* d [64, 256] += a b, b [64, 256] contiguous along the 256, in panels of 64 */                        \
    __device__ void wgmma_m64n256k64(float (&d)[128], u64 a, u64 b, TYPE) {                                \
        asm volatile("{ .reg .pred p; .reg .b64 a, b, c; setp.eq.b32 p, 0, 0;"                             \
                     " mov.b64 a, %129; mov.b64 b, %128; add.s64 c, b, 1024;"                              \
                     K16_BOTH_SIDES(BITS, "a", "0, 1") K16_BOTH_SIDES(BITS, "a", "0, 1")                   \
                     K16_BOTH_SIDES(BITS, "a", "0, 1") K16_BOTH_SIDES(BITS, "a", "0, 1") "}"               \
                     : F32(0), F32(32), F32(64), F32(96) : "l"(b), "l"(a));                                \
    }                                                                                                      \
    __device__ void wgmma_m64n256k64(float (&d)[128], const unsigned (&a)[16], u64 b, TYPE) {              \
        asm volatile("{ .reg .pred p; .reg .b64 a, b, c; setp.eq.b32 p, 0, 0;"                             \
                     " mov.b64 a, 0; mov.b64 b, %128; add.s64 c, b, 1024;"                                 \
                     K16_BOTH_SIDES(BITS, "{%129,%130,%131,%132}", "1")                                    \
                     K16_BOTH_SIDES(BITS, "{%133,%134,%135,%136}", "1")                                    \
                     K16_BOTH_SIDES(BITS, "{%137,%138,%139,%140}", "1")                                    \
                     K16_BOTH_SIDES(BITS, "{%141,%142,%143,%144}", "1") "}"                                \
                     : F32(0), F32(32), F32(64), F32(96) : "l"(b), R4(0), R4(4), R4(8), R4(12));           \
    }
WGMMA(bf16, "bf16.bf16")
WGMMA(__half, "f16.f16")
__device__ void wgmma_m64n64k32_e4m3(float (&d)[32], const unsigned (&a)[4], u64 b, bool add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"
                 TO_32 "{%32,%33,%34,%35}, %36, p, 1, 1; }" : F32(0) : R4(0), "l"(b), "r"((int)add));
}
#define WGMMA_M64N128(TYPE, SHAPE, ORDER)                                                                  \
    __device__ void wgmma_m64n128(float (&d)[64], const unsigned (&a)[4], u64 b, bool add, TYPE) {         \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128" SHAPE   \
                     TO_64 "{%64,%65,%66,%67}, %68, p, 1, 1" ORDER "; }"                                   \
                     : F32(0), F32(32) : R4(0), "l"(b), "r"((int)add));                                    \
    }
WGMMA_M64N128(u8, "k32.f32.e4m3.e4m3", "")
WGMMA_M64N128(bf16, "k16.f32.bf16.bf16", ", 0")
WGMMA_M64N128(__half, "k16.f32.f16.f16", ", 0")

__device__ void wgmma_wait_group(float (&d)[32]) {  // for all; as an operand, d is not read before
    asm volatile("wgmma.wait_group.sync.aligned 0;" : F32(0) :: "memory");
}
template <int PENDING> __device__ void wgmma_wait_group(float (&d)[64]) {  // d is read from here on
    asm volatile("wgmma.wait_group.sync.aligned %64;" : F32(0), F32(32) : "n"(PENDING) : "memory");
}

// Types

template <class T> __device__ float widen(T x) { return float(x); }
__device__ double widen(double x) { return x; }
template <class T, class A> __device__ T rounded(A x) {
    if constexpr (sizeof(T) == 2) return T(float(x));
    else return T(x);
}

// Two e4m3 codes to two halves, exact, NaN too; by hardware from sm_89 on.
__device__ unsigned e4m3x2_to_half2(unsigned codes) {
    __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
    return h.x | (unsigned)h.y << 16;
}

// The value of an e4m3 code, exact. The bits << 7 are a float16 whose exponent has the bias 7 in place of 15.
// Not by way of a subnormal float32: CuPy compiles with -ftz=true, which makes those 0.
__device__ float e4m3(u8 code) {
    const float x = __half2float(__ushort_as_half((code & 127) << 7 | (code & 128) << 8)) * 256;
    return (code & 127) == 127 ? __uint_as_float(0x7FC00000 | (code >> 7) << 31) : x;
}

// Arithmetic

// relu as NumPy has it: NaN stays NaN, which fmaxf would make 0.
__device__ float relu(float x) {
#if __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(x) : "f"(x));
    return x;
#else
    return x < 0 ? 0 : x;
#endif
}
__device__ double relu(double x) { return x < 0 ? 0 : x; }

__device__ int sum_of_warp(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(ALL, x);
#else
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(ALL, x, d);
    return x;
#endif
}
template <class T> __device__ T sum_of_warp(T x) {
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(ALL, x, d);
    return x;
}
template <class T> __device__ T sum_of_block(T x) {  // of 256 threads, always in the same order
    __shared__ T parts[8];
    x = sum_of_warp(x);
    __syncthreads();  // all have read the sum before
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    for (int w = 0; w < 8; w++) sum += parts[w];
    return sum;
}
template <class T> __device__ T max_of_warp(T x) {
    for (int d = 16; d; d /= 2) x = fmax(x, __shfl_xor_sync(ALL, x, d));
    return x;
}
template <class T, class Logit> __device__ T lse_of_warp(i64 first, i64 step, i64 N, const Logit& logit) {
    T top = -T(CUDART_INF_F), total = 0;  // of this lane: the maximum, and the sum of exp(logit - top)
#pragma unroll 32 / sizeof(T)
    for (i64 n = first; n < N; n += step) {
        const T x = logit(n), before = top;
        top = fmax(top, x);
        total = x == -T(CUDART_INF_F) ? total : total * exp(before - top) + exp(x - top);
    }
    const T all = max_of_warp(top);
    return all + log(sum_of_warp(total == 0 ? total : total * exp(top - all)));
}
__device__ float sum_of_quad(float x) {  // of four lanes, which hold a row of d
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
__device__ float max_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

// A tile of rows of 2-byte values in shared memory. Its 16-byte chunks are stored at chunk ^ (row % 8),
// so that ldmatrix, which reads one chunk of 8 rows, touches all banks. A row is a multiple of 8 chunks.
__device__ unsigned swizzled(int row, int chunk) {
    return ((chunk >> 3) << 7) | (((chunk ^ row) & 7) << 4);
}

// What a row's sums are multiplied by in the end: 1 / total, less what a sink takes
template <class A> __device__ __forceinline__ A share_of(A total, const A* sink, int head, A lse) {
    const auto kept = [&](A z) { return z == -A(CUDART_INF_F) ? A(1) : A(1) / (A(1) + exp(z - lse)); };
    return (total == 0 ? A(0) : 1 / total) * (sink ? kept(sink[head]) : A(1));
}

// ---------------------------------------------------------------------------------------------------------
// index_scores_fma                                                                      eq. (1) of dsa.py
//     scores[t,s] = sum_j weights[t,j] * relu(index_q[t,j,:] . index_k[s,:]),  -inf outside t's window
// in    index_q [B, T, J, E], index_k [B, S, E], weights [B, T, J] of REAL = float or double; windows [B, T]
//       apart: from one entry's keys to the next, in keys
// out   scores [B, T, S] REAL, every element written
// grid  B * ceil(T / 8) * ceil(S / KEYS), key tiles fastest
// block 256: a warp a query, a lane OWN keys
// smem  24 KB: 32 values of a tile of keys, and of 8 heads of each warp's query
// cost  2*J*E FLOP a (t,s); bound by FMA, shared memory close behind
#ifdef INDEX_SCORES_FMA
constexpr int OWN = 16 / sizeof(REAL), KEYS = 32 * OWN, HEADS = 8, DEPTH = 32;
static_assert(DEPTH == 32, "a lane, and 8 times 4 warps, each load one value of a key");
struct alignas(16) Vec { REAL x[OWN]; };

KERNEL(256, 2) index_scores_fma(const REAL* index_q, const REAL* index_k, const REAL* weights,
        const int* k_start, const int* k_end, REAL* scores, i64 T, i64 S, i64 offset, i64 apart, i64 J,
        i64 E) {
    __shared__ Vec keys[DEPTH][32 + 1];  // [e][lane]: transposed, and padded against bank conflicts
    __shared__ Vec heads[8][HEADS][DEPTH / OWN];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 tiles = (S + KEYS - 1) / KEYS, blocks_t = (T + 7) / 8;
    const i64 s0 = blockIdx.x % tiles * KEYS, b = blockIdx.x / tiles / blocks_t;
    const i64 t = blockIdx.x / tiles % blocks_t * 8 + warp;
    const Window window = t < T ? window_of(k_start, k_end, b, t, T, S, offset) : Window{0, 0};
    const bool live = __syncthreads_or(max(window.start, s0) < min(window.end, s0 + KEYS));

    const REAL* q = index_q + (b * T + t) * J * E;
    const REAL* k = index_k + (b * apart + s0) * E;
    const int num_keys = min((i64)KEYS, S - s0);
    const int e = lane % 8 + warp % 4 * 8, key = lane / 8 + warp / 4 * 4;  // a warp loads 8 values of 4 keys
    REAL sum[OWN] = {};
    for (i64 j0 = 0; j0 < J && live; j0 += HEADS) {
        REAL product[HEADS][OWN] = {};
        for (i64 e0 = 0; e0 < E; e0 += DEPTH) {
            __syncthreads();
#pragma unroll 4
            for (int i = 0; i < KEYS / 8; i++) {
                const int s = key + 8 * i;
                keys[e][s / OWN].x[s % OWN] = s < num_keys && e0 + e < E ? k[s * E + e0 + e] : 0;
            }
            UNROLL for (int j = 0; j < HEADS; j++) {
                const bool real = t < T && j0 + j < J && e0 + lane < E;
                heads[warp][j][lane / OWN].x[lane % OWN] = real ? q[(j0 + j) * E + e0 + lane] : 0;
            }
            __syncthreads();
#pragma unroll 4
            for (int v = 0; v < DEPTH / OWN; v++) {
                Vec own[OWN];
                for (int i = 0; i < OWN; i++) own[i] = keys[v * OWN + i][lane];
                for (int j = 0; j < HEADS; j++) {
                    const Vec head = heads[warp][j][v];
                    for (int i = 0; i < OWN; i++)
                        for (int o = 0; o < OWN; o++) product[j][o] += head.x[i] * own[i].x[o];
                }
            }
        }
        for (int j = 0; j < HEADS; j++) {
            if (j0 + j >= J || t >= T) break;
            const REAL weight = weights[(b * T + t) * J + j0 + j];
            for (int o = 0; o < OWN; o++) sum[o] += weight * relu(product[j][o]);
        }
    }
    for (int o = 0; o < OWN; o++) {
        const i64 s = s0 + lane * OWN + o;
        if (t < T && s < S) scores[(b * T + t) * S + s] = window.sees(s) ? sum[o] : -(REAL)CUDART_INF;
    }
}
#endif

#if defined(INDEX_SCORES_MMA) || defined(INDEX_SCORES_WGMMA)
struct Span {
    int first, count;
    __device__ bool has(int key) const { return (unsigned)(key - first) < (unsigned)count; }
};

// What a block's queries, at most MANY, see of its tile of keys. They are multiplied TOGETHER at a time.
template <int MANY, int TOGETHER> struct Visible {
    Span spans[MANY];                     // of the tile's keys, counted from its first
    int live[MANY / TOGETHER], num_live;  // the groups of TOGETHER queries of which one sees some key

    __device__ bool any(int group) const {
        int keys = 0;
        for (int q = 0; q < TOGETHER; q++) keys += spans[group * TOGETHER + q].count;
        return keys > 0;
    }
    // By the whole block, for queries t0.. and keys s0.. of batch entry b: the above, and -inf to the others.
    __device__ void find(const int* k_start, const int* k_end, float* scores, i64 b, i64 t0, i64 s0,
                         int queries, int keys, i64 T, i64 S, i64 offset) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int groups = (queries + TOGETHER - 1) / TOGETHER;
        for (int t = threadIdx.x; t < groups * TOGETHER; t += blockDim.x) {
            Window w = {0, 0};
            if (t < queries) w = window_of(k_start, k_end, b, t0 + t, T, S, offset);
            const auto in_tile = [&](i64 s) { return (int)min(max(s - s0, 0LL), (i64)keys); };
            spans[t] = {in_tile(w.start), max(in_tile(w.end) - in_tile(w.start), 0)};
        }
        __syncthreads();
        if (warp == 0) {
            int before = 0;
            for (int x = lane; x - lane < groups; x += 32) {
                const bool meets = x < groups && any(x);
                const unsigned who = __ballot_sync(ALL, meets);
                if (meets) live[before + __popc(who & ((1u << lane) - 1))] = x;
                before += __popc(who);
            }
            if (lane == 0) num_live = before;
        }
        for (int t = warp; t < queries; t += blockDim.x / 32)
            for (int key = lane; key < keys && !any(t / TOGETHER); key += 32)
                scores[(b * T + t0 + t) * S + s0 + key] = -CUDART_INF_F;
        __syncthreads();
    }
};
#endif

// ---------------------------------------------------------------------------------------------------------
// index_scores_mma                                                       eq. (1) of dsa.py on tensor cores
// in    index_q [B, T, J, PITCH] of ELEMENT, zero from E on; weights [B, T, J] f32; windows [B, T]
//       index_k [B, S, E] of ELEMENT; where that is e4m3 codes [B, S, E + 4], a float32 scale behind each key
// out   scores [B, T, S] f32, every element written
// grid  B * ceil(T / 64) * ceil(S / KEYS), key tiles fastest: they share the queries in L2
// block 128: each warp keeps TILES * 16 keys in registers, fragments of A, while heads of B stream past
// smem  2 stages of HEADS heads, a multiple of 8: 35 KB at J=64, E=128 in bf16
// cost  2*J*E FLOP a (t,s). A warp reads a head once for its 64 keys: 2*E bytes for 128*E FLOP.
#ifdef INDEX_SCORES_MMA
template <class T> struct Operand { using type = T; };
template <> struct Operand<unsigned char> { using type = __half; };  // which holds every code
using Multiplied = Operand<ELEMENT>::type;
constexpr bool FP8 = sizeof(ELEMENT) == 1;
constexpr int QUERIES = 64, STAGES = 2;
constexpr int KEYS = 4 * TILES * 16, GROUPS = (J + HEADS - 1) / HEADS;
constexpr int SPAN = 64 / sizeof(ELEMENT);        // values of a head that one ldmatrix_x4 brings
constexpr int LOADS = (E + SPAN - 1) / SPAN, STEPS = SPAN / 16, DEPTH = LOADS * STEPS;
constexpr int ROW = LOADS * 64 + 16;              // bytes of a head in shared memory; 16 more shift the banks
constexpr int ENTRY = FP8 ? E + 4 : E;            // of ELEMENT, of a key
static_assert(PITCH * sizeof(ELEMENT) % 16 == 0 && PITCH >= E, "cp.async moves 16 bytes of index_q");
static_assert(E * sizeof(ELEMENT) % 4 == 0, "two values of a key are read at a time, and its scale");
static_assert(HEADS % 8 == 0, "a fragment of B is 8 heads");
static_assert(TILES <= 4, "each of a quad's four lanes stores one tile");

struct Stage {
    alignas(16) unsigned char heads[HEADS][ROW];
    float weights[HEADS];
};
static_assert(sizeof(Stage) == HEADS * (ROW + 4), "dsa.py asks for two of these");

// The pair of values e, e + 1 of a key as two of the 16 bit type that is multiplied; zero beyond E.
__device__ unsigned key_pair(const ELEMENT* key, int e) {
    if (e >= E) return 0;
    if constexpr (FP8) return e4m3x2_to_half2(*(const unsigned short*)(key + e));
    else return *(const unsigned*)(key + e);
}

KERNEL(128, 2) index_scores_mma(const ELEMENT* index_q, const ELEMENT* index_k, const float* weights,
        const int* k_start, const int* k_end, float* scores, i64 T, i64 S, i64 offset, i64 apart) {
    extern __shared__ __align__(16) unsigned char shared[];
    Stage* stages = (Stage*)shared;
    __shared__ Visible<QUERIES, 1> seen;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;  // as in PTX
    const i64 tiles = (S + KEYS - 1) / KEYS, blocks_t = (T + QUERIES - 1) / QUERIES;
    const i64 tile = blockIdx.x % tiles * KEYS, b = blockIdx.x / tiles / blocks_t;
    const i64 t0 = blockIdx.x / tiles % blocks_t * QUERIES, first = b * T + t0;  // row of the first query

    if constexpr (LOADS * SPAN > PITCH)  // cp.async never writes there
        for (int x = threadIdx.x; x < STAGES * HEADS; x += 128)
            for (int y = PITCH * sizeof(ELEMENT); y < LOADS * 64; y++)
                stages[x / HEADS].heads[x % HEADS][y] = 0;
    seen.find(k_start, k_end, scores, b, t0, tile, min((i64)QUERIES, T - t0), min((i64)KEYS, S - tile), T, S,
              offset);
    const int num_live = seen.num_live;
    if (num_live == 0) return;

    const auto fetch = [&](int job) {  // heads group job % GROUPS of live query job / GROUPS
        if (job < num_live * GROUPS) {
            Stage& stage = stages[job % STAGES];
            const int j0 = job % GROUPS * HEADS, heads = min(HEADS, J - j0);
            const i64 row = (first + seen.live[job / GROUPS]) * J + j0;
            constexpr int PIECES = PITCH * sizeof(ELEMENT) / 16;
            const uint4* from = (const uint4*)(index_q + row * PITCH);
            for (int x = threadIdx.x; x < heads * PIECES; x += 128)
                cp_async<16>(&stage.heads[x / PIECES][x % PIECES * 16], from + x);
            for (int j = threadIdx.x; j < heads; j += 128) cp_async<4>(&stage.weights[j], weights + row + j);
        }
        cp_async_commit_group();
    };
    for (int job = 0; job < STAGES - 1; job++) fetch(job);

    // Keys to registers. With codes, a lane's four values of a step stand side by side, in heads as in keys.
    unsigned keys[TILES][DEPTH][4];
    UNROLL for (int m = 0; m < TILES; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            const i64 s = min(tile + warp * TILES * 16 + 16 * m + 8 * half + g, S - 1);
            const ELEMENT* key = index_k + (b * apart + s) * ENTRY;
            UNROLL for (int step = 0; step < DEPTH; step++) {
                keys[m][step][half] = key_pair(key, 16 * step + (FP8 ? 4 * i : 2 * i));
                keys[m][step][half + 2] = key_pair(key, 16 * step + (FP8 ? 4 * i + 2 : 2 * i + 8));
            }
        }
    float scale[2] = {1, 1};  // of the two keys that this lane stores
    if constexpr (FP8)
        for (int half = 0; half < 2; half++) {
            const i64 s = min(tile + warp * TILES * 16 + 16 * i + 8 * half + g, S - 1);
            scale[half] = *(const float*)(index_k + (b * apart + s) * ENTRY + E);
        }

    for (int query = 0, job = 0; query < num_live; query++) {
        float sum[TILES][2] = {};
        for (int group = 0; group < GROUPS; group++, job++) {
            cp_async_wait_group<STAGES - 2>();
            __syncthreads();
            fetch(job + STAGES - 1);
            const Stage& stage = stages[job % STAGES];
#pragma unroll 2
            for (int j = 0; j < HEADS && group * HEADS + j < J; j += 8) {
                float product[TILES][4] = {};
                UNROLL for (int load = 0; load < LOADS; load++) {
                    unsigned heads[4];
                    ldmatrix_x4(heads, cvta_shared(&stage.heads[j + lane % 8][load * 64 + lane / 8 * 16]));
                    UNROLL for (int step = 0; step < STEPS; step++) {
                        unsigned head[2] = {heads[2 * step % 4], heads[(2 * step + 1) % 4]};
                        if constexpr (FP8) {
                            head[0] = e4m3x2_to_half2(heads[step] & 0xffff);
                            head[1] = e4m3x2_to_half2(heads[step] >> 16);
                        }
                        for (int m = 0; m < TILES; m++)
                            mma_m16n8k16(product[m], keys[m][load * STEPS + step], head[0], head[1],
                                         Multiplied());
                    }
                }
                UNROLL for (int c = 0; c < 2; c++) {  // heads j + 2 i and j + 2 i + 1
                    if (J % 8 && group * HEADS + j + 2 * i + c >= J) continue;
                    const float weight = stage.weights[j + 2 * i + c];
                    for (int m = 0; m < TILES; m++)
                        for (int half = 0; half < 2; half++)
                            sum[m][half] += weight * relu(product[m][2 * half + c]);
                }
            }
        }
        // The quad adds up its heads; its lane i stores keys g and g + 8 of tile i.
        const int t = seen.live[query];
        float* row = scores + (first + t) * S + tile;
        for (int half = 0; half < 2; half++) {
            float own = 0;
            UNROLL for (int m = 0; m < TILES; m++) {
                const float x = sum_of_quad(sum[m][half]);
                own = m == i ? x : own;
            }
            const int key = warp * TILES * 16 + 16 * i + 8 * half + g;
            if (i < TILES && tile + key < S)
                row[key] = seen.spans[t].has(key) ? own * scale[half] : -CUDART_INF_F;
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// index_scores_few_wgmma                                       eq. (1) of few queries, in fp8, at memory speed
// in    index_q [B, T, J, 128] e4m3 codes, weights [B, T, J] f32, J = 32 or 64; windows [B, T]
//       index_k [B, S, 132]: of each key e4m3 codes and a float32 scale
//       apart: from one entry's keys to the next, in keys
// out   scores [B, T, S] f32, every element written: the bits of index_scores_wgmma, as all sums have its order
// grid  B * ceil(S / 256), key tiles fastest  block 128: a warpgroup multiplies 64 keys by J heads at a time
// smem  struct Few, 42 KB, five blocks' on a multiprocessor; 50 where two queries share operands, TOGETHER
// cost  132 bytes and T * 2*J*E FLOP a key: bound by memory at T = 1. Tensor cores add up e4m3 products in
//       fewer bits than float32 has: scores are right to about 1e-4 of the largest.
#ifdef INDEX_SCORES_FEW_WGMMA
constexpr int E = 128, ENTRY = E + 4, HEADS = 64, TILES = 4, KEYS = TILES * 64;
static_assert(J == 32 || J == HEADS, "the heads of a query are one operand; others have other sums");

struct Few {
    alignas(1024) u8 heads[TOGETHER][HEADS][E];  // as wgmma_matrix has them
    alignas(16) u8 keys[KEYS * ENTRY];           // as they stand in memory
    float weights[TOGETHER][HEADS];
    u64 here[TILES];  // of a tile's keys
};
static_assert(sizeof(Few) == 34816 + 8192 * TOGETHER, "dsa.py asks for as much");

KERNEL(128, 6 - TOGETHER) index_scores_few_wgmma(const u8* index_q, const u8* index_k, const float* weights,
        const int* k_start, const int* k_end, float* scores, i64 T, i64 S, i64 offset, i64 apart) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Few& sh = *(Few*)shared;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, i = lane % 4;  // as in PTX
    const unsigned tiles = (S + KEYS - 1) / KEYS;
    const i64 b = blockIdx.x / tiles, s0 = blockIdx.x % tiles * (i64)KEYS;
    const int num_keys = min((i64)KEYS, S - s0);

    // 1. The keys, on their way: whole tiles by one copy each if they are aligned, the rest by words
    const u8* from = index_k + (b * apart + s0) * ENTRY;
    constexpr int BYTES = 64 * ENTRY;  // of a tile
    const int whole = (size_t)from % 16 == 0 ? num_keys / 64 : 0;
    if (tid == 0)
        for (int tile = 0; tile < TILES; tile++) {
            mbarrier_init(&sh.here[tile], 1);
            fence_proxy_async();
            mbarrier_arrive_expect_tx(&sh.here[tile], tile < whole ? BYTES : 0);
            if (tile < whole)
                cp_async_bulk(sh.keys + tile * BYTES, from + tile * BYTES, BYTES, &sh.here[tile]);
        }
    for (int x = whole * BYTES + tid * 4; x < num_keys * ENTRY; x += 128 * 4)
        cp_async<4>(sh.keys + x, from + x);

    for (i64 t0 = 0; t0 < T; t0 += TOGETHER) {
        const i64 row = b * T + t0;
        float* to = scores + row * S;
        const auto window_at = [&](int q) { return window_of(k_start, k_end, b, t0 + q, T, S, offset); };
        const Window alone = TOGETHER == 1 ? window_at(0) : Window();  // early; two would cost registers
        const int queries = TOGETHER == 1 ? 1 : min((i64)TOGETHER, T - t0);
        // 2. The queries' heads
        __syncthreads();
        for (int q = 0; q < queries; q++) {
            const uint4* codes = (const uint4*)(index_q + (row + q) * J * E);
            for (int x = 0; x < HEADS / 16; x++) {
                const int j = x * 16 + tid / 8;
                const uint4 four = j < J ? codes[x * 128 + tid] : make_uint4(0, 0, 0, 0);
                *(uint4*)(sh.heads[q][j] + swizzled(j, tid % 8)) = four;
            }
            if (tid < HEADS) sh.weights[q][tid] = tid < J ? weights[(row + q) * J + tid] : 0;
        }
        fence_proxy_async();
        cp_async_wait_all();
        __syncthreads();
        float weight[TOGETHER][16];
        UNROLL for (int x = 0; x < 16 * TOGETHER; x++)
            weight[x / 16][x % 16] = sh.weights[x / 16][x % 16 / 2 * 8 + 2 * i + x % 2];

        // 3. 64 keys at a time: products, then their weighted sum, whose quad's lane i keeps that of tile i.
        //    A lane reads the steps of a key from step g on, so that few read from one bank, and turns them.
        float own[TOGETHER][2] = {};
        UNROLL for (int tile = 0; tile < TILES; tile++) {
            unsigned a[4][4];
            const unsigned* key = (const unsigned*)(sh.keys + (tile * 64 + warp * 16 + g) * ENTRY) + i;
            mbarrier_wait(&sh.here[tile], 0);
            for (int x = 0; x < 4; x++) {  // of this key and, where x is odd, of 8 keys on
                unsigned read[4], turned[4];
                for (int y = 0; y < 4; y++)
                    read[y] = key[x % 2 * 2 * ENTRY + (y + g) % 4 * 8 + x / 2 * 4];
                for (int y = 0; y < 4; y++) turned[y] = g & 1 ? read[(y + 3) % 4] : read[y];
                for (int y = 0; y < 4; y++) a[y][x] = g & 2 ? turned[(y + 2) % 4] : turned[y];
            }
            UNROLL for (int q = 0; q < TOGETHER; q++) {
                if (q >= queries) break;
                const u64 heads = wgmma_matrix(cvta_shared(sh.heads[q]));
                float d[32];
                wgmma_fence();
                for (int step = 0; step < 4; step++)
                    wgmma_m64n64k32_e4m3(d, a[step], heads + step * 2, step > 0);
                wgmma_commit_group();
                wgmma_wait_group(d);
                for (int half = 0; half < 2; half++) {
                    float sum = 0;
                    for (int x = 0; x < J / 4; x++)
                        sum += weight[q][x] * relu(d[x / 2 * 4 + half * 2 + x % 2]);
                    sum += __shfl_xor_sync(ALL, sum, 2);
                    sum += __shfl_xor_sync(ALL, sum, 1);
                    if (tile == i) own[q][half] = sum;
                }
            }
        }
        UNROLL for (int q = 0; q < TOGETHER; q++) {
            if (q >= queries) break;
            const Window window = TOGETHER == 1 ? alone : window_at(q);
            for (int half = 0; half < 2; half++) {
                const int key = i * 64 + warp * 16 + half * 8 + g;
                const float scale = *(const float*)(sh.keys + key * ENTRY + E), score = own[q][half] * scale;
                if (key < num_keys) to[q * S + s0 + key] = window.sees(s0 + key) ? score : -CUDART_INF_F;
            }
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// index_scores_wgmma                                             eq. (1) of dsa.py on Hopper's tensor cores
// in    index_q [B, T, J, E] of ELEMENT; weights [B, T, J] f32; windows [B, T]
//       index_k [B, S, E] of ELEMENT; where that is e4m3 codes [B, S, E + 4], a float32 scale behind each key
// out   scores [B, T, S] f32, every element written. The tensor cores add up e4m3 products to about 14 bits.
// grid  B * ceil(T / most) * ceil(S / KEYS), most <= QUERIES; key tiles fastest: they share the queries in L2
// block 384: two warpgroups, each with TILES * 64 keys in registers, as A, and one that copies heads as B
// smem  STAGES times 128 heads, those of TOGETHER queries: 66 KB in fp8 at E=128
// cost  2*J*E FLOP a (t,s), and for 2*E of them an FMNMX and an FFMA, which set the pace in fp8
#ifdef INDEX_SCORES_WGMMA
constexpr bool FP8 = sizeof(ELEMENT) == 1;
constexpr int ENTRY = FP8 ? E + 4 : E;  // of ELEMENT, of a key
constexpr int HEADS = 128, TOGETHER = HEADS / J, QUERIES = 208, STAGES = 4;
constexpr int TILES = FP8 ? 4 : 2, KEYS = 2 * TILES * 64;  // as many as fit the registers at E=128
constexpr int STEPS = E * sizeof(ELEMENT) / 32, CHUNKS = 2 * STEPS;  // of 32 and of 16 bytes of a row
constexpr int PANELS = STEPS / 4, COPIED = 128 / CHUNKS;  // heads, by 128 threads at a time
static_assert(HEADS % J == 0 && J % 16 == 0, "a product is of 128 heads; 16 are added up at a time");
static_assert(CHUNKS == 8 || CHUNKS == 16, "128 threads copy 16 or 8 whole heads");

struct Shared {
    alignas(1024) u8 heads[STAGES][PANELS][HEADS][128];
    alignas(16) float weights[STAGES][HEADS / 16][4][4];  // [x][i]: of heads 16 x + 2 i + {0, 1, 8, 9}
    u64 full[STAGES], empty[STAGES];
    Visible<QUERIES, TOGETHER> seen;
};
static_assert(sizeof(Shared) == (STAGES * PANELS * HEADS * 128 + 3780 + 13 * J / 2 + 1023) / 1024 * 1024,
              "dsa.py asks for as much");

KERNEL(384, 1) index_scores_wgmma(const ELEMENT* index_q, const ELEMENT* index_k, const float* weights,
        const int* k_start, const int* k_end, float* scores, i64 T, i64 S, i64 offset, i64 apart, i64 most) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Shared& sh = *(Shared*)shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;  // as in PTX
    const i64 tiles = (S + KEYS - 1) / KEYS, blocks_t = (T + most - 1) / most;
    const i64 tile = blockIdx.x % tiles * KEYS, b = blockIdx.x / tiles / blocks_t;
    const i64 t0 = blockIdx.x / tiles % blocks_t * most, first = b * T + t0;  // row of the first query
    const int queries = min(most, T - t0), num_keys = min((i64)KEYS, S - tile);

    if (threadIdx.x < STAGES) {
        mbarrier_init(&sh.full[threadIdx.x], 128);
        mbarrier_init(&sh.empty[threadIdx.x], 256);
    }
    sh.seen.find(k_start, k_end, scores, b, t0, tile, queries, num_keys, T, S, offset);
    const int jobs = sh.seen.num_live;
    if (jobs == 0) return;

    if (warp >= 8) {           // copy heads and weights, up to STAGES jobs ahead
        setmaxnreg_dec<24>();  // with twice inc<240> that is what the block began with: 3 * 168
        const int thread = threadIdx.x % 128, head = thread / CHUNKS, chunk = thread % CHUNKS;
        const unsigned at = chunk / 8 * (HEADS * 128) + head * 128 + swizzled(head, chunk % 8);
        for (int job = 0; job < jobs; job++) {
            const int stage = job % STAGES, t = sh.seen.live[job] * TOGETHER;
            const i64 row = (first + t) * J;
            const uint4* from = (const uint4*)(index_q + row * E) + thread;
            mbarrier_wait(&sh.empty[stage], job / STAGES % 2 ^ 1);
            UNROLL for (int x = 0; x < CHUNKS; x++)
                cp_async<16>(cvta_shared(sh.heads[stage]) + at + x * COPIED * 128, from + x * 128,
                             x * COPIED / J < queries - t);
            float* weight = &sh.weights[stage][thread / 16][thread % 8 / 2][thread / 8 % 2 * 2 + thread % 2];
            cp_async<4>(cvta_shared(weight), weights + row + thread, thread / J < queries - t);
            cp_async_mbarrier_arrive(&sh.full[stage]);
        }
        return;
    }
    setmaxnreg_inc<240>();

    // Keys to registers. Rows are given to keys such that value `half` of tile m, of lane 4 g + i, belongs to
    // key 4 g + 2 (m % 2) + half of 32: when the quad has added up its heads, lane l stores key l.
    const int own = warp * TILES * 16;  // the warp's first key
    const ELEMENT* entries = index_k + (b * apart + tile) * ENTRY;
    unsigned keys[TILES][STEPS][4];
    float scale[TILES / 2];
    UNROLL for (int m = 0; m < TILES; m++)
        for (int half = 0; half < 2; half++) {
            const int s = min(own + m / 2 * 32 + 4 * g + m % 2 * 2 + half, num_keys - 1);
            const unsigned* key = (const unsigned*)(entries + s * ENTRY);
            UNROLL for (int step = 0; step < STEPS; step++) {
                keys[m][step][half] = key[8 * step + i];
                keys[m][step][half + 2] = key[8 * step + 4 + i];
            }
        }
    for (int pair = 0; pair < TILES / 2; pair++) {
        const int s = min(own + 32 * pair + lane, num_keys - 1);
        scale[pair] = FP8 ? *(const float*)(entries + s * ENTRY + E) : 1;
    }

    float product[2][64];  // of tile m in product[m % 2]: one is multiplied while the other is added up
    const auto await = [&](int job) {
        mbarrier_wait(&sh.full[job % STAGES], job / STAGES % 2);
        fence_proxy_async();
    };
    const auto multiply = [&](int m, int job, int step) {
        const u64 heads = wgmma_matrix(cvta_shared(sh.heads[job % STAGES]));
        if (step == 0) wgmma_fence();
        wgmma_m64n128(product[m % 2], keys[m][step], heads + step / 4 * (HEADS * 8) + step % 4 * 2, step > 0,
                      *index_k);
        if (step == STEPS - 1) wgmma_commit_group();
    };
    await(0);
    for (int step = 0; step < STEPS; step++) multiply(0, 0, step);
    for (int job = 0; job < jobs; job++) {
        const int stage = job % STAGES, next = min(job + 1, jobs - 1), t = sh.seen.live[job] * TOGETHER;
        float sum[TOGETHER][4];  // over this thread's heads, of four keys
        const auto add_up = [&](int m, int begin, int end) {  // 16 heads at a time
            const float(&p)[64] = product[m % 2];
            UNROLL for (int x = begin; x < end; x++) {
                const float4 w = *(float4*)sh.weights[stage][x][i];
                for (int half = 0; half < 2; half++) {
                    float& to = sum[16 * x / J][m % 2 * 2 + half];
                    to = (16 * x % J ? to : 0) + w.x * relu(p[8 * x + 2 * half]);
                    to += w.y * relu(p[8 * x + 2 * half + 1]);
                    to += w.z * relu(p[8 * x + 2 * half + 4]);
                    to += w.w * relu(p[8 * x + 2 * half + 5]);
                }
            }
        };
        const auto store = [&](int pair) {
            const int key = own + 32 * pair + lane;
            const bool high = i & 2, odd = i & 1;
            float* row = scores + (first + t) * S + tile + key;
            UNROLL for (int q = 0; q < TOGETHER; q++) {
                const float* x = sum[q];  // lane i of a quad gets the sum over its lanes of x[i]
                const float x02 = (high ? x[2] : x[0]) + __shfl_xor_sync(ALL, high ? x[0] : x[2], 2);
                const float x13 = (high ? x[3] : x[1]) + __shfl_xor_sync(ALL, high ? x[1] : x[3], 2);
                const float total = (odd ? x13 : x02) + __shfl_xor_sync(ALL, odd ? x02 : x13, 1);
                const float score = sh.seen.spans[t + q].has(key) ? total * scale[pair] : -CUDART_INF_F;
                if (key < num_keys && t + q < queries) row[q * S] = score;
            }
        };
        UNROLL for (int m = 0; m < TILES; m++) {
            if (m == TILES - 1) await(next);
            wgmma_wait_group<0>(product[m % 2]);
            UNROLL for (int step = 0; step < STEPS; step++) {  // in vain for the last job's last tile
                multiply((m + 1) % TILES, m + 1 < TILES ? job : next, step);
                add_up(m, step * 8 / STEPS, (step + 1) * 8 / STEPS);
            }
            if (m % 2) store(m / 2);
        }
        mbarrier_arrive(&sh.empty[stage]);  // all, as all read weights: racecheck reports one for a warp
    }
    wgmma_wait_group<0>(product[0]);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// select_topk                                                                           eq. (2) of dsa.py
//     the first top_k visible keys of each row in the order (-score, key), ascending, then -1; the first
//     num_sinks and the last local_window of them whatever they score. NaN and -inf are not visible.
// in    scores [B, T, S] REAL = float or double, at a multiple of 16 bytes; windows [B, T]
// out   indices [B, T, K] i32, every element written
// grid  B * T * BLOCKS  block BLOCK: a row, or a part of one that a cluster of BLOCKS shares (sm_90 on)
// smem  struct Shared: 8 KB of counts and CAPACITY runs of 16 bytes, 90 KB; in a cluster 40 KB more
// cost  one read of the row and a sixteenth. A sample gives a rank that somewhat more than top_k keys should
//       have; runs in which a key has it, one at least, are held in shared memory, in any order: 15
//       instructions a run. Where their keys are too few, or they are too many for a block, the row itself
//       takes their place: it is exact either way. Some two rounds count them; then what is kept is marked,
//       a bit a key, and written in order. In float32, without forced keys, a row that fits HELD registers of
//       each thread is kept there instead: one read, and 55 instructions a key.
// ---------------------------------------------------------------------------------------------------------
#ifdef SELECT_TOPK
constexpr int WARPS = BLOCK / 32, WIDTH = 16 / sizeof(REAL);
constexpr int RESIDENT = BLOCKS > 1 || BLOCK == 1024 ? 1 : HELD && HELD <= 16 ? 3 : 2;  // on a multiprocessor
constexpr int EVERY = 16, PIECE = 8 / WIDTH;  // of each EVERY pieces of PIECE runs, one is sampled
constexpr int LOADS = BLOCK == 1024 || sizeof(REAL) == 8 ? 4 : 8;  // runs that a thread reads at a time
constexpr int SPAN = 1 << 16;  // keys with a mark at a time: 32 * BINS
template <int BYTES> struct Bits { using type = unsigned; };
template <> struct Bits<8> { using type = unsigned long long; };
using Rank = Bits<sizeof(REAL)>::type;  // grows with the score, equal for equal scores; 0: not visible
struct alignas(16) Vec { REAL x[WIDTH]; };
struct alignas(16) Ranks { Rank x[WIDTH]; };

constexpr int DIGIT = 11, BINS = 1 << DIGIT, OWN = BINS / BLOCK;  // OWN: bins that a thread looks through
constexpr int COARSE = 8 * sizeof(Rank) - DIGIT;             // the first shift for ranks of any scores
constexpr int FINE = (sizeof(Rank) == 8 ? 53 : 24) - DIGIT;  // that for those of two octaves above a score
struct alignas(4 * OWN) Counts { int x[OWN]; };

#if BLOCKS > 1
constexpr int SLICE = BINS / BLOCKS;
static_assert(BINS == 4 * BLOCK, "each thread sends four counts");

struct Exchange {
    int round, kept[BLOCKS];
    u64 gathered[2], spread[2], counted;  // barriers
    alignas(16) int slice[SLICE], slices[2][BLOCKS][SLICE], all[2][BINS];

    __device__ void begin() {
        if (threadIdx.x == 0) {
            for (int x = 0; x < 2; x++) mbarrier_init(&gathered[x], 1), mbarrier_init(&spread[x], 1);
            mbarrier_init(&counted, 1);
            mbarrier_arrive_expect_tx(&counted, sizeof(kept));
            fence_mbarrier_init();
            round = 0;
        }
        __syncwarp();
        barrier_cluster_arrive_relaxed();
    }
    // How many keys the blocks before this one keep, and all of them, when each says how many it does.
    __device__ int before(int own, int& all) {
        const int part = blockIdx.x % BLOCKS;
        if (threadIdx.x < BLOCKS)
            st_async(mapa(&kept[part], threadIdx.x), own, mapa(&counted, threadIdx.x));
        mbarrier_wait(&counted, 0);
        int sum = all = 0;
        for (int r = 0; r < BLOCKS; r++) {
            if (r == part) sum = all;
            all += kept[r];
        }
        return sum;
    }
};
static_assert(sizeof(Exchange) <= 40000, "dsa.py asks for as much");
#else
struct Exchange {
    __device__ void begin() {}
    __device__ int before(int, int&) { return 0; }
};
#endif

struct Shared : Exchange {
    alignas(16) int bins[BINS + 1];  // and one for what does not count; or marks; zeros while nobody counts
    int sums[2][32];
    int place, bin, above, equal, count;
    Ranks ranks[CAPACITY];
    int run[CAPACITY];  // of which these are the ranks
    unsigned short list[HELD * BLOCK + 1];  // the kept keys of a row that fits in registers
};
static_assert(sizeof(Shared) <= sizeof(Exchange) + 8500 + CAPACITY * 20 + 2 * HELD * BLOCK, "as in dsa.py");

constexpr Rank SIGN = (Rank)1 << (8 * sizeof(REAL) - 1);

__device__ Rank rank_of(REAL x) {
    const Rank bits = (Rank&)x;  // const would convert it
    return !(x > -(REAL)CUDART_INF) ? 0 : bits & SIGN ? 0 - bits : bits | SIGN;  // the same for -0.0 and +0.0
}

// A score that all of this rank and above reach; with -ftz=true, others may.
__device__ REAL score_of(Rank rank) {
    rank = max(rank, ((Rank)1 << (sizeof(REAL) == 8 ? 52 : 23)) + 1);  // of the least finite score
    rank = rank & SIGN ? rank ^ SIGN : 0 - rank;
    return (REAL&)rank;
}

// Sum of x over the threads before this one, and over all of them. One barrier; calls alternate `turn`.
__device__ int sum_before(Shared& sh, int x, int turn, int& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int upto = x;
    for (int d = 1; d < 32; d *= 2) {
        const int y = __shfl_up_sync(ALL, upto, d);
        if (lane >= d) upto += y;
    }
    if (lane == 31) sh.sums[turn][warp] = upto;
    __syncthreads();
    const int sum = lane < WARPS ? sh.sums[turn][lane] : 0;
    total = sum_of_warp(sum);
    return sum_of_warp(lane < warp ? sum : 0) + upto - x;
}

// Where the first `need` visible keys of begin..end end, or, from behind, where the last `need` begin.
__device__ int nth_visible(Shared& sh, const REAL* row, int begin, int end, int need, bool behind) {
    int turn = 0, seen = 0, total;
    if (need == 0) return behind ? end : begin;
    for (int x = threadIdx.x; x - (int)threadIdx.x < end - begin && seen < need; x += BLOCK, turn ^= 1) {
        const int s = behind ? end - 1 - x : begin + x;
        const bool visible = x < end - begin && rank_of(row[s]);
        const int before = seen + sum_before(sh, visible, turn, total);
        if (visible && before == need - 1) sh.place = behind ? s : s + 1;
        seen += total;
    }
    __syncthreads();
    const int place = seen < need ? (behind ? begin : end) : sh.place;
    __syncthreads();
    return place;
}

// What all threads have counted in the OWN bins of this one, which become zeros; the first has the last bins
#if BLOCKS <= 1
__device__ Counts add_up(Shared& sh) {
    __syncthreads();
    Counts& own = ((Counts*)sh.bins)[BLOCK - 1 - threadIdx.x];
    const Counts counts = own;
    own = {};
    return counts;
}
#else
// those of the cluster: each block adds up a slice of the bins, and sends it to all. Rounds alternate their
// memory: who is in the next one has heard from all that they are done with the last.
__device__ Counts add_up(Shared& sh) {
    const int x = threadIdx.x, part = blockIdx.x % BLOCKS, at = x * 4 % SLICE, block = x * 4 / SLICE;
    __syncthreads();
    const int now = sh.round % 2, parity = sh.round / 2 % 2;
    if (x == 0) {
        mbarrier_arrive_expect_tx(&sh.gathered[now], sizeof(sh.all[0]));
        mbarrier_arrive_expect_tx(&sh.spread[now], sizeof(sh.all[0]));
    }
    int4& own = *(int4*)(sh.bins + x * 4);
    st_async(mapa(&sh.slices[now][part][at], block), own, mapa(&sh.gathered[now], block));
    own = {};
    mbarrier_wait(&sh.gathered[now], parity);
    for (int y = x; y < SLICE; y += BLOCK) {
        int sum = 0;
        for (int r = 0; r < BLOCKS; r++) sum += sh.slices[now][r][y];
        sh.slice[y] = sum;
    }
    __syncthreads();
    if (x == 0) sh.round++;
    st_async(mapa(&sh.all[now][part * SLICE + at], block), *(const int4*)(sh.slice + at),
             mapa(&sh.spread[now], block));
    mbarrier_wait(&sh.spread[now], parity);
    return ((const Counts*)sh.all[now])[BLOCK - 1 - x];
}
#endif

// The need-th largest of the words >= lo > 0 that each(count) counts: all words >= at are `need` and, where
// the last ones tie, `excess` more, or at most `spare`. at = 1: they are fewer. A round counts words by
// (word - lo) >> shift, those beyond the last bin in it, and the next one what is in a bin, until bins are
// 1 << finest wide. The words are those of all blocks that share the row.
template <class Word> struct Cut { Word at; int need, excess; };

template <class Word, class Each>
__device__ Cut<Word> nth_largest(Shared& sh, int need, Word lo, int shift, Each each, int finest = 0,
                                 int spare = 0) {
    Word width = 0 - lo;
    while (true) {
        each([&](Word w) {
            const Word x = w - lo, bin = HELD ? x >> shift : min(x >> shift, (Word)(BINS - 1));
            atomicAdd(&sh.bins[x < width ? (int)bin : BINS], 1);  // in a branch, it takes longer
        });
        const Counts counts = add_up(sh);
        int mine = 0, total;
        for (int x = 0; x < OWN; x++) mine += counts.x[x];
        int above = sum_before(sh, mine, 0, total);
        if (above < need && need <= above + mine)
            for (int x = OWN - 1; x >= 0; x--) {
                if (above < need && need <= above + counts.x[x]) {
                    sh.bin = (BLOCK - 1 - threadIdx.x) * OWN + x;
                    sh.above = above, sh.equal = counts.x[x];
                }
                above += counts.x[x];
            }
        __syncthreads();
        if (total < need) return {1, need, 0};
        const Word begin = (Word)sh.bin << shift;
        width = sh.bin == BINS - 1 ? width - begin : (Word)1 << shift;
        lo += begin, need -= sh.above;
        const int excess = sh.equal - need;
        if (excess <= spare || width <= (Word)1 << finest) return {lo, need, excess};
        const int bits = sizeof(Word) == 8 ? 64 - __clzll(width - 1) : 32 - __clz(width - 1);
        shift = max(bits - DIGIT, finest);
    }
}

extern "C" __global__ void
#if BLOCKS > 1
__cluster_dims__(BLOCKS, 1, 1)
#endif
__launch_bounds__(BLOCK, RESIDENT) select_topk(
        const REAL* scores, const int* k_start, const int* k_end, int* indices, i64 T, i64 S,
        i64 K, i64 offset, i64 top_k, i64 local_window, i64 num_sinks) {
    extern __shared__ __align__(16) unsigned char bytes[];
    Shared& sh = *(Shared*)bytes;
    const unsigned of = blockIdx.x / BLOCKS, batch = of / (unsigned)T;
    const int tid = threadIdx.x, part = blockIdx.x % BLOCKS;
    const REAL* row = scores + of * S;
    int* out = indices + of * K;
    const Window window = window_of(k_start, k_end, batch, of - batch * T, T, S, offset);
    const int start = window.start, end = max(window.start, window.end);
    ((Counts*)sh.bins)[tid] = {};
    if (tid == 0) sh.count = 2;  // what stands beside whole runs
    sh.begin();

    // Forced keys are those below `head` and from `tail` on; the middle is ranked for what top_k leaves.
    const int head = HELD ? start : nth_visible(sh, row, start, end, num_sinks, false);
    const int tail = HELD ? end : nth_visible(sh, row, head, end, local_window, true);
    const int need = min(top_k - num_sinks - local_window, S), middle = tail - head;

    // 1. The block's share of the keys, counted from `first`, where 16 bytes begin: begin is its first to be
    //    visible, from .. to are ranked, at `keys` it ends. Of the ranked ones, whole runs of 16 bytes.
    int first = HELD ? start : start - (int)((size_t)(row + start) / sizeof(REAL) % WIDTH);
    const int share = (end - first + 32 * BLOCKS - 1) / (32 * BLOCKS) * 32;
    first += share * part, row += first;
    const auto of_share = [&](int s) { return max(min(s - first, share), 0); };
    const int begin = of_share(start), from = of_share(head), to = of_share(tail), keys = of_share(end);
    const int run0 = (from + WIDTH - 1) / WIDTH, run1 = max(run0, to / WIDTH);
    const Vec* run = (const Vec*)row;
    Rank own[HELD + 1];  // of a row that fits in registers: a warp has HELD times 32 keys side by side
    const auto each_own = [&](auto take) {
#pragma unroll
        for (int x = 0; x < HELD; x++) take(own[x], tid / 32 * 32 * HELD + 32 * x + tid % 32);
    };
    // take(rank, x, how many before it there are) for each key whose rank is `such`. Calls alternate `turn`.
    const auto in_order = [&](int turn, auto such, auto take) {
        int place = 0, all;
        each_own([&](Rank rank, int) { place += such(rank); });
        place = __shfl_sync(ALL, sum_before(sh, place, turn, all), 0);
        each_own([&](Rank& rank, int x) {
            const unsigned lanes = __ballot_sync(ALL, such(rank));
            const int before = place + __popc(lanes & ((1u << tid % 32) - 1));
            if (such(rank)) take(rank, x, before);
            place += __popc(lanes);
        });
        return all;
    };
    each_own([&](Rank& rank, int x) { rank = rank_of(x < to ? row[x] : -(REAL)CUDART_INF); });
    __syncthreads();
    if constexpr (BLOCKS > 1) barrier_cluster_wait();  // all have begun. It empties L1: in front of the loads
    int held = -1;  // candidates in shared memory, -1: the share itself
    const auto ranked = [&](auto take) {
        if (HELD) return each_own(take);
        if (held < 0)
#pragma unroll 1
            for (int x = from + tid; x < to; x += BLOCK) take(rank_of(row[x]), x);
        for (int i = tid; i < held; i += BLOCK) {
            const Ranks ranks = sh.ranks[i];
            for (int v = 0; v < WIDTH; v++) take(ranks.x[v], sh.run[i] * WIDTH + v);
        }
    };
    Rank at = need ? 1 : ~(Rank)0;  // the least rank that is kept
    unsigned last = 0;              // and, where it ties, the least ~key
    if (need && middle > need) {
        // 2. The rank that somewhat more than `need` keys should have, or a larger one
        const int wanted = need / EVERY + 4 * (int)sqrtf(need / EVERY) + 4;
        const bool few = middle <= (CAPACITY - 2) * WIDTH && middle <= 2 * EVERY * wanted;
        Rank lo = 1;
        if (!HELD && !few && wanted * EVERY < CAPACITY * BLOCKS) {
            const auto sample = [&](auto count) {
#pragma unroll 2
                for (int i = tid; i < (run1 - run0) / (PIECE * EVERY) * PIECE; i += BLOCK) {
                    const Vec vec = run[run0 + i / PIECE * PIECE * EVERY + i % PIECE];
                    for (int v = 0; v < WIDTH; v++) count(rank_of(vec.x[v]));
                }
            };
            const int spare = BLOCKS > 1 ? wanted : wanted / 4;  // a round is worth some keys more
            lo = nth_largest<Rank>(sh, wanted, 1, COARSE, sample, COARSE - DIGIT, spare).at;
        }
        // 3. The runs of which a key has it, in any order, and what stands beside whole runs
        if (!HELD && (few || lo > 1)) {
            const REAL floor = score_of(lo);
            const auto hold = [&](int place, int r, const Vec& vec) {
                if (place < CAPACITY) sh.run[place] = r, (Vec&)sh.ranks[place] = vec;
            };
            if (tid < 2) {
                const int r = tid ? run1 : run0 - 1;
                Vec vec;
                for (int v = 0, x = r * WIDTH; v < WIDTH; v++, x++)
                    vec.x[v] = from <= x && x < to ? row[x] : -(REAL)CUDART_INF;
                hold(tid, r, vec);
            }
            for (int r = run0 + tid; r < run1; r += LOADS * BLOCK) {
                Vec vec[LOADS];
                bool reach[LOADS];
                int many = 0;
                for (int u = 0; u < LOADS; u++)
                    if (r + u * BLOCK < run1) vec[u] = run[r + u * BLOCK];
                for (int u = 0; u < LOADS; u++) {
                    REAL top = vec[u].x[0];
                    for (int v = 1; v < WIDTH; v++) top = fmax(top, vec[u].x[v]);
                    reach[u] = r + u * BLOCK < run1 && top >= floor;
                    many += reach[u];
                }
                int place = many ? atomicAdd(&sh.count, many) : 0;
                for (int u = 0; u < LOADS; u++)
                    if (reach[u]) hold(place++, r + u * BLOCK, vec[u]);
            }
            __syncthreads();
            held = sh.count <= CAPACITY ? sh.count : -1;
            for (int i = tid; i < held; i += BLOCK) {
                const Vec vec = (const Vec&)sh.ranks[i];
                for (int v = 0; v < WIDTH; v++) sh.ranks[i].x[v] = rank_of(vec.x[v]);
            }
        }
        // 4. The last of them to be kept
        const auto rank = [&](auto count) { ranked([&](Rank rank, int) { count(rank); }); };
        Cut<Rank> cut = nth_largest<Rank>(sh, need, lo, lo > 1 ? FINE : COARSE, rank);
        if (cut.at == 1 && lo > 1) {  // fewer than `need` have it: the sample was unlike the row
            held = -1;
            cut = nth_largest<Rank>(sh, need, 1, COARSE, rank);
        }
        at = cut.at;
        const auto tied = [&](auto count) {
            ranked([&](Rank rank, int x) { count(rank == at ? ~(unsigned)(first + x) : 0); });
        };
        if (HELD && cut.excess)
            in_order(0, [&](Rank r) { return r == at; }, [&](Rank& r, int, int i) { r *= i < cut.need; });
        else if (cut.excess) last = nth_largest<unsigned>(sh, cut.need, 1, 32 - DIGIT, tied).at;
    }

    // 5. What registers hold is written side by side
    int placed = 0, all = 0;
    if (HELD) {
        all = in_order(1, [&](Rank r) { return r >= at; }, [&](Rank, int x, int i) { sh.list[i] = x; });
        __syncthreads();
#pragma unroll 4
        for (int x = tid; x < K; x += BLOCK) out[x] = x < all ? first + sh.list[x] : -1;
        return;
    }
    // 6. Else mark what is kept, SPAN keys at a time, and write it in order
    const auto each_kept = [&](int x0, int x1, auto put) {
        const auto forced = [&](int from, int to) {
#pragma unroll 1
            for (int x = max(from, x0) + tid; x < min(to, x1); x += BLOCK)
                if (rank_of(row[x])) put(x);
        };
        forced(begin, from), forced(to, keys);
        ranked([&](Rank rank, int x) {
            const bool best = rank > at || (rank == at && ~(unsigned)(first + x) >= last);
            if (best && x0 <= x && x < x1) put(x);
        });
    };
    int in_share = 0, x0 = 0, total;
    if (BLOCKS > 1 && keys > SPAN) {
        each_kept(0, keys, [&](int) { in_share++; });
        sum_before(sh, in_share, 1, in_share);
    }
    do {
        each_kept(x0, x0 + SPAN, [&](int x) { atomicOr(&sh.bins[(x - x0) / 32], 1u << x % 32); });
        __syncthreads();
        const int many = ((min(keys - x0, SPAN) + 31) / 32 + BLOCK - 1) / BLOCK;  // words of this thread
        int* const marks = sh.bins + tid * many;
        int mine = 0;
        for (int w = 0; w < many; w++) mine += __popc(marks[w]);
        int place = sum_before(sh, mine, 0, total);
        if (x0 == 0) placed = sh.before(keys > SPAN ? in_share : total, all);
        place += placed, placed += total;
        for (int w = 0; w < many; w++) {
            for (unsigned left = marks[w]; left; left &= left - 1)
                out[place++] = first + x0 + (tid * many + w) * 32 + __ffs(left) - 1;
            marks[w] = 0;
        }
        __syncthreads();
    } while ((x0 += SPAN) < keys);
    for (int x = max(all, placed) + part * BLOCK + tid; x < K; x += BLOCKS * BLOCK) out[x] = -1;
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend                                                              eq. (3) of dsa.py
//     out[t,h] = sum_i softmax_i(scale * q[t,h] . k[key_i, g]) v[key_i, g],   g = h / R;   lse[t,h]
// in    q [B, T, H, D], k and v with strides (v = k where TIED), or k packed (R8 e4m3 | scales | ROPE bf16)
//       key_i = indices[b, t, i] int32 (outside [0, S): absent), or the window [k_start[b, t], k_end[b, t])
// out   out [Z, B, T, H, DV], lse [Z, B, T, H], every element written; Z splits of `chunk` slots each
// grid  (B * T * G * head tiles, Z)  block 128
// smem  HEADS * D values of Q, dynamic
// cost  2 * (D + DV) FLOP for each head and key; a block reads its keys once for HEADS heads
// macros  HEADS (of one group), COLUMNS = ceil(DV / 128), TIED, QT, KT, VT, OUT, ACC, R8 and ROPE
//         (R8 = 0: k is not packed)
#if defined(ATTEND) || defined(ATTEND_FEW_MMA) || defined(ATTEND_MMA) || defined(ATTEND_WGMMA)
struct Shape {
    i64 T, S, H, G, slots, chunk;  // slots: of indices, -1: windows
    i64 k_batch, k_key, k_group, v_batch, v_key, v_group;  // strides, in elements
};

// What a block works on: one query, heads `head`.. of a group, and some of its slots.
struct Job {
    i64 row, b;
    int group, head, heads;  // heads: how many of its HEADS there are
    int start, lo, hi;
    const int* keys;

    // Job x of split z
    __device__ Job(const Shape& n, const int* indices, const int* k_start, const int* k_end, i64 x, i64 z) {
        const int per_group = n.H / n.G, tiles = (per_group + HEADS - 1) / HEADS;
        row = x / tiles / n.G, b = row / n.T, group = x / tiles % n.G;
        head = x % tiles * HEADS, heads = min(HEADS, per_group - head), head += group * per_group;
        i64 count = n.slots;
        start = 0, keys = n.slots < 0 ? nullptr : indices + row * n.slots;
        if (n.slots < 0) {
            const i64 end = k_end ? k_end[row] : n.S - n.T + row % n.T + 1;
            start = k_start ? k_start[row] : 0;
            count = end - start;
        }
        lo = (int)max(0ll, min(z * n.chunk, count)), hi = (int)max(0ll, min(lo + n.chunk, count));
    }
    __device__ int slot(int i) const { return i >= hi ? -1 : keys ? keys[i] : start + i; }
    __device__ int key(int i, i64 S) const {  // -1: absent
        const int key = slot(i);
        return key >= 0 && key < S ? key : -1;
    }
};

// 8 e4m3 codes times a scale, as bfloat16; exact where it is a power of two, as a code has 4 significant bits
__device__ uint4 decode8(uint2 codes, float scale) {
    unsigned r[4];
    UNROLL for (int i = 0; i < 4; i++) {
        const unsigned two = e4m3x2_to_half2((i < 2 ? codes.x : codes.y) >> i % 2 * 16 & 0xFFFF);
        const float2 x = __half22float2(*(const __half2*)&two);
        r[i] = cvt_rn_x2(x.x * scale, x.y * scale, bf16());
    }
    return make_uint4(r[0], r[1], r[2], r[3]);
}
#endif

#ifdef ATTEND
constexpr int ATTEND_KEYS = 32;
constexpr int SCALES = (R8 + 127) / 128;

__device__ ACC key_value(const KT* row, int d) {
    if constexpr (R8 == 0) {
        return widen(row[d]);
    } else {
        const u8* at = (const u8*)row;
        const u8* s = d < R8 ? at + R8 + d / 128 * 4 : at + R8 + SCALES * 4 + (d - R8) * 2;
        if (d >= R8) return __uint_as_float((unsigned)s[0] << 16 | (unsigned)s[1] << 24);
        return e4m3(at[d]) * __uint_as_float(s[0] | s[1] << 8 | s[2] << 16 | (unsigned)s[3] << 24);
    }
}

KERNEL(128, sizeof(ACC) == 8 ? 2 : 4) attend(const QT* q, const KT* k, const VT* v, const int* indices,
        const int* k_start, const int* k_end, const ACC* sink, OUT* out, ACC* lse, i64 T, i64 S, i64 H, i64 G,
        i64 slots, i64 chunk, i64 k_batch, i64 k_key, i64 k_group, i64 v_batch, i64 v_key, i64 v_group,
        double scale, i64 D, i64 DV) {
    const Shape n = {T, S, H, G, slots, chunk, k_batch, k_key, k_group, v_batch, v_key, v_group};
    extern __shared__ __align__(16) char shared[];
    ACC* q_s = (ACC*)shared;  // [HEADS][D]
    __shared__ ACC p[HEADS][ATTEND_KEYS], m[HEADS], total[HEADS], rescale[HEADS];
    __shared__ int ids[ATTEND_KEYS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const Job job(n, indices, k_start, k_end, blockIdx.x, blockIdx.y);
    const ACC log2e = ACC(1.4426950408889634), c = ACC(scale * 1.4426950408889634), inf = ACC(CUDART_INF_F);

    for (int i = tid; i < HEADS * D; i += 128)
        q_s[i] = i / D < job.heads ? ACC(widen(q[(job.row * n.H + job.head) * D + i])) : ACC(0);
    if (tid < HEADS) m[tid] = -inf, total[tid] = 0;
    ACC o[HEADS][COLUMNS] = {};
    k += job.b * n.k_batch + job.group * n.k_group;
    if constexpr (!TIED) v += job.b * n.v_batch + job.group * n.v_group;

    for (int i = job.lo; i < job.hi; i += ATTEND_KEYS) {
        __syncthreads();
        if (tid < ATTEND_KEYS) ids[tid] = job.key(i + tid, n.S);
        __syncthreads();
        for (int j = warp; j < ATTEND_KEYS; j += 4) {  // scores: a warp takes a key, its lanes the values
            ACC dot[HEADS] = {};
            if (ids[j] >= 0)
                for (int d = lane; d < D; d += 32) {
                    const ACC x = key_value(k + ids[j] * n.k_key, d);
                    UNROLL for (int h = 0; h < HEADS; h++) dot[h] += q_s[h * D + d] * x;
                }
            UNROLL for (int h = 0; h < HEADS; h++) {
                dot[h] = sum_of_warp(dot[h]);
                if (lane == 0) p[h][j] = ids[j] < 0 ? -inf : dot[h] * c;
            }
        }
        __syncthreads();
        for (int h = warp; h < HEADS; h += 4) {  // online softmax: a warp takes a head, its lanes the keys
            const ACC x = p[h][lane], before = m[h];
            const ACC top = fmax(max_of_warp(x), before);
            const ACC safe = top == -inf ? ACC(0) : top, share = exp2(x - safe), factor = exp2(before - safe);
            const ACC sum = sum_of_warp(share);
            __syncwarp();
            p[h][lane] = share;
            if (lane == 0) m[h] = top, rescale[h] = factor, total[h] = total[h] * factor + sum;
        }
        __syncthreads();
        UNROLL for (int h = 0; h < HEADS; h++)
            UNROLL for (int j = 0; j < COLUMNS; j++) o[h][j] *= rescale[h];
#pragma unroll 4
        for (int s = 0; s < ATTEND_KEYS; s++) {
            if (ids[s] < 0) continue;
            UNROLL for (int j = 0; j < COLUMNS; j++) {
                const int d = tid + 128 * j;
                if (d >= DV) continue;
                ACC x;
                if constexpr (TIED) x = key_value(k + ids[s] * n.k_key, d);
                else x = widen(v[ids[s] * n.v_key + d]);
                UNROLL for (int h = 0; h < HEADS; h++) o[h][j] += p[h][s] * x;
            }
        }
    }
    __syncthreads();
    const i64 rows = (i64)gridDim.x / ((n.H / n.G + HEADS - 1) / HEADS) / n.G, first = blockIdx.y * rows;
    UNROLL for (int h = 0; h < HEADS; h++) {
        if (h >= job.heads) continue;
        const i64 at = (first + job.row) * n.H + job.head + h;
        const ACC log_sum = total[h] == 0 ? -inf : (m[h] + log2(total[h])) / log2e;
        const ACC share = share_of(total[h], sink, job.head + h, log_sum);
        if (tid == 0) lse[at] = log_sum;
        UNROLL for (int j = 0; j < COLUMNS; j++)
            if (tid + 128 * j < DV) out[at * DV + tid + 128 * j] = rounded<OUT>(o[h][j] * share);
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_few_mma                                  eq. (3), as attend, for up to 16 heads of a group in 16 bits
// in    q, k, v of TYPE, float16 or bfloat16, whose rows begin at multiples of 16 bytes
// grid  (B * T * G, Z), groups slowest: L2 then holds one group's keys  block 128: a warp every fourth tile
// smem  what the four warps found: 16 * HEADS * DV bytes
// cost  2 * (D + DV) bytes a key and group out of L2, at some 11 instructions of a warp a key: bound by bytes
// A tile of 16 keys goes from memory into registers as the operands it is. S^T = K Q^T: lane 4 g + i reads 8
// values of keys g and g + 8, two steps of 16, as it read q. O^T = V^T P^T: it reads values 8 g.. of keys 2 i,
// 2 i + 1, + 8, + 9 and pairs them; row g of step j is value 8 g + 2 j, row g + 8 the next. A lane's columns
// are heads 2 i and 2 i + 1 in both, so that maxima and sums stay where they are.
// macros  HEADS (all of a group), D, DV, TYPE, OUT
#ifdef ATTEND_FEW_MMA
constexpr int NT = (HEADS + 7) / 8, CHUNKS = (D + 31) / 32, BLOCKS = (DV + 63) / 64;
constexpr int RESIDENT = NT * (D + DV) <= 128 ? 4 : NT * (D + DV) <= 256 ? 3 : 2;
static_assert(HEADS <= 16 && D % 8 == 0 && DV % 8 == 0, "16 bytes are read at a time");

union Four {
    uint4 all;
    unsigned x[4];
    __device__ void load(const TYPE* from, bool there) { all = load_16(from, there); }
};

KERNEL(128, RESIDENT) attend_few_mma(const TYPE* q, const TYPE* k, const TYPE* v, const int* indices,
        const int* k_start, const int* k_end, const float* sink, OUT* out, float* lse, i64 T, i64 S, i64 H,
        i64 G, i64 slots, i64 chunk, i64 k_batch, i64 k_key, i64 k_group, i64 v_batch, i64 v_key, i64 v_group,
        double scale) {
    const Shape n = {T, S, H, G, slots, chunk, k_batch, k_key, k_group, v_batch, v_key, v_group};
    __shared__ float kept[4][HEADS], sums[4][HEADS], parts[4][HEADS][DV];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;  // as in PTX
    const unsigned rows = gridDim.x / (unsigned)G;
    const Job job(n, indices, k_start, k_end, blockIdx.x % rows * G + blockIdx.x / rows, blockIdx.y);
    const float c = float(scale * 1.4426950408889634);
    const i64 first = job.row * H + job.head;
    k += job.b * k_batch + job.group * k_group, v += job.b * v_batch + job.group * v_group;

    Four q_s[NT][CHUNKS], k_s[CHUNKS][2];
    UNROLL for (int t = 0; t < NT; t++)
        UNROLL for (int x = 0; x < CHUNKS; x++)
            q_s[t][x].load(q + (first + t * 8 + g) * D + 32 * x + 8 * i,
                           t * 8 + g < HEADS && 32 * x + 8 * i < D);
    const auto look_up = [&](int tile) { return job.key(job.lo + tile * 16 + lane % 16, S); };
    const auto load_keys = [&](int id) {
        UNROLL for (int half = 0; half < 2; half++) {
            const i64 key = __shfl_sync(ALL, id, g + 8 * half);
            UNROLL for (int x = 0; x < CHUNKS; x++)
                k_s[x][half].load(k + key * k_key + 32 * x + 8 * i, key >= 0 && 32 * x + 8 * i < D);
        }
    };
    float o[NT][4 * BLOCKS][4] = {}, m[NT][2], total[NT][2] = {};
    UNROLL for (int t = 0; t < NT; t++) m[t][0] = m[t][1] = -CUDART_INF_F;
    const int tiles = (job.hi - job.lo + 15) / 16;
    int id = look_up(warp), next = look_up(warp + 4);
    load_keys(id);
    for (int tile = warp; tile < tiles; tile += 4) {
        const unsigned there = __ballot_sync(ALL, id >= 0) >> g;
        Four v_s[BLOCKS][4];
        UNROLL for (int y = 0; y < 4; y++) {
            const i64 key = __shfl_sync(ALL, id, y / 2 * 8 + 2 * i + y % 2);
            UNROLL for (int x = 0; x < BLOCKS; x++)
                v_s[x][y].load(v + key * v_key + 64 * x + 8 * g, key >= 0 && 64 * x + 8 * g < DV);
        }
        // 1. s = k . q in base 2, absent keys -inf; then the next keys may come
        float s[NT][4] = {};
        bool grows = false;
        UNROLL for (int x = 0; x < 2 * CHUNKS; x++) {
            const Four &a = k_s[x / 2][0], &b = k_s[x / 2][1];
            const int y = x % 2 * 2;
            const unsigned keys[4] = {a.x[y], b.x[y], a.x[y + 1], b.x[y + 1]};
            UNROLL for (int t = 0; t < NT; t++)
                mma_m16n8k16(s[t], keys, q_s[t][x / 2].x[y], q_s[t][x / 2].x[y + 1], TYPE());
        }
        id = next, next = look_up(tile + 8);
        load_keys(id);
        UNROLL for (int t = 0; t < NT; t++)
            UNROLL for (int x = 0; x < 4; x++) {
                s[t][x] = there >> x / 2 * 8 & 1 ? s[t][x] * c : -CUDART_INF_F;
                grows |= s[t][x] > m[t][x % 2] + 8;  // p up to 2^8 spares rescaling o
            }
        // 2. the new maxima
        if (__any_sync(ALL, grows))
            UNROLL for (int t = 0; t < NT; t++)
                UNROLL for (int z = 0; z < 2; z++) {
                    float top = fmaxf(fmaxf(s[t][z], s[t][z + 2]), m[t][z]);
                    for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, d));
                    const float factor = top == m[t][z] ? 1 : exp2f(m[t][z] - top);
                    m[t][z] = top, total[t][z] *= factor;
                    UNROLL for (auto& x : o[t]) x[z] *= factor, x[z + 2] *= factor;
                }
        // 3. p = exp2(s - max), and o += p v
        unsigned p[NT][2];
        UNROLL for (int t = 0; t < NT; t++)
            UNROLL for (int half = 0; half < 2; half++) {
                float share[2];
                for (int z = 0; z < 2; z++) {
                    share[z] = exp2f(s[t][2 * half + z] - (m[t][z] == -CUDART_INF_F ? 0 : m[t][z]));
                    total[t][z] += share[z];
                }
                p[t][half] = movmatrix_trans(cvt_rn_x2(share[0], share[1], TYPE()));
            }
        UNROLL for (int x = 0; x < 4 * BLOCKS; x++) {
            const Four(&y)[4] = v_s[x / 4];
            unsigned values[4];
            for (int z = 0; z < 4; z++) {
                const unsigned lo = y[z / 2 * 2].x[x % 4], hi = y[z / 2 * 2 + 1].x[x % 4];
                values[z] = __byte_perm(lo, hi, z % 2 ? 0x7632 : 0x5410);
            }
            UNROLL for (int t = 0; t < NT; t++) mma_m16n8k16(o[t][x], values, p[t][0], p[t][1], TYPE());
        }
    }
    // 4. What the warps found; what a head keeps of each warp's sums, in place of their maximum; all together
    UNROLL for (int t = 0; t < NT; t++)
        UNROLL for (int z = 0; z < 2; z++) {
            for (int d = 4; d < 32; d *= 2) total[t][z] += __shfl_xor_sync(ALL, total[t][z], d);
            const int h = t * 8 + 2 * i + z;
            if (h >= HEADS) continue;
            if (g == 0) kept[warp][h] = m[t][z], sums[warp][h] = total[t][z];
            UNROLL for (int x = 0; x < 4 * BLOCKS; x++) {
                const int d = x / 4 * 64 + 8 * g + x % 4 * 2;
                if (d < DV) *(float2*)&parts[warp][h][d] = make_float2(o[t][x][z], o[t][x][z + 2]);
            }
        }
    __syncthreads();
    const i64 at = (i64)blockIdx.y * rows * H + first;
    if (threadIdx.x < HEADS) {
        const int h = threadIdx.x;
        const float top = fmaxf(fmaxf(kept[0][h], kept[1][h]), fmaxf(kept[2][h], kept[3][h]));
        float sum = 0;
        for (int w = 0; w < 4; w++) {
            kept[w][h] = kept[w][h] == -CUDART_INF_F ? 0 : exp2f(kept[w][h] - top);
            sum += sums[w][h] * kept[w][h];
        }
        const float log_sum = sum == 0 ? -CUDART_INF_F : (top + log2f(sum)) * 0.6931471805599453f;
        const float share = share_of(sum, sink, job.head + h, log_sum);
        for (int w = 0; w < 4; w++) kept[w][h] *= share;
        lse[at + h] = log_sum;
    }
    __syncthreads();
#pragma unroll 4
    for (int x = threadIdx.x; x < HEADS * DV; x += 128) {
        float value = 0;
        for (int w = 0; w < 4; w++) value += kept[w][x / DV] * (&parts[w][0][0])[x];
        out[at * DV + x] = rounded<OUT>(value);
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_mma                                                          eq. (3), as attend, on tensor cores
// in    q, k, v of TYPE, float16 or bfloat16, D and DV even; packed keys are decoded to bfloat16, exactly
// grid  (B * T * G * head tiles, Z)  block 256: 8 warps
// smem  Q | two tiles of K (packed: one, and one of bytes) | two of V unless TIED | P | row maxima | rescale
//       HEADS = KEYS = 64, D = 576, tied: 72 + 144 + 8 + 1.8 KB
// S = Q K^T: WM x WN warps, each MT * 16 heads by NT * 8 keys. O += P V: each warp all heads by PAIRS * 16 of
// DV, so that a value is read from shared memory once. While a tile is multiplied the next one is copied.
// macros  HEADS, KEYS, D, DV, TIED, TYPE, OUT, R8, ROPE, VEC, VVEC (bytes, 4 to 16: alignment of rows of k, v)
#ifdef ATTEND_MMA
constexpr int ROW = (D + 63) / 64 * 64, VROW = (DV + 63) / 64 * 64;  // values of a row in shared memory
constexpr int STEPS = (D + 15) / 16;  // of 16 values of q . k
constexpr int BYTES = R8 + (R8 + 127) / 128 * 4 + 2 * ROPE, BYTE_ROW = (BYTES + 15) / 16 * 16;
constexpr bool PACKED = R8 > 0;
constexpr int WM = HEADS >= 32 ? 2 : 1, MT = HEADS / 16 / WM;
constexpr int WN = 8 / WM < KEYS / 8 ? 8 / WM : KEYS / 8, NT = KEYS / 8 / WN;
constexpr int OM = HEADS / 16, OCTETS = (DV + 15) / 16, PAIRS = (OCTETS + 7) / 8;
constexpr int PASSES = KEYS / 32;
static_assert(KEYS == 32 || KEYS == 64, "a copy takes 32 keys at a time, a row of P is 128 bytes");
static_assert(NT == 1 || NT == 2, "a warp reads keys with one ldmatrix");
static_assert(D % 2 == 0 && DV % 2 == 0, "values are copied and written two at a time");
static_assert(!PACKED || (TIED && R8 % 8 == 0 && ROPE % 8 == 0), "packed keys are decoded 8 at a time");

// N bytes from src, or zeros, by the 8 threads of a row.
template <int N, int ALIGN, bool SWIZZLE>
__device__ void copy_row(char* tile, int row, int stride, const void* src, bool there, int part) {
    const unsigned base = cvta_shared(tile) + row * stride;
    const char* from = (const char*)src + part * ALIGN;
    UNROLL for (int i = 0; i < (N + 8 * ALIGN - 1) / (8 * ALIGN); i++) {
        const int at = i * 8 * ALIGN + part * ALIGN;
        if (N % (8 * ALIGN) != 0 && at >= N) continue;
        const unsigned to = !SWIZZLE      ? at
                            : ALIGN == 16 ? i * 128 + swizzled(row, part)
                                          : swizzled(row, at / 16) + at % 16;
        cp_async<ALIGN>(base + to, from + i * 8 * ALIGN, there);
    }
}

KERNEL(256, 1) attend_mma(const TYPE* q, const void* k, const TYPE* v, const int* indices, const int* k_start,
        const int* k_end, const float* sink, OUT* out, float* lse, i64 T, i64 S, i64 H, i64 G, i64 slots,
        i64 chunk, i64 k_batch, i64 k_key, i64 k_group, i64 v_batch, i64 v_key, i64 v_group, double scale) {
    const Shape n = {T, S, H, G, slots, chunk, k_batch, k_key, k_group, v_batch, v_key, v_group};
    extern __shared__ __align__(128) char shared[];
    char* q_s = shared;  // [HEADS][ROW]
    char* k_s = q_s + HEADS * ROW * 2;  // [1 or 2][KEYS][ROW]
    char* v_s = TIED ? k_s : k_s + 2 * KEYS * ROW * 2;  // [2][KEYS][VROW]
    char* byte_s = k_s + KEYS * ROW * 2;  // [KEYS][BYTE_ROW] if PACKED
    char* p_s = PACKED ? byte_s + KEYS * BYTE_ROW
                : TIED ? k_s + 2 * KEYS * ROW * 2
                       : v_s + 2 * KEYS * VROW * 2;
    float* max_s = (float*)(p_s + HEADS * 128);  // [WN][HEADS]
    float* rescale_s = max_s + WN * HEADS;  // [HEADS]
    int* there_s = (int*)(rescale_s + HEADS);  // [2][KEYS]

    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int wm = warp % WM, wn = warp / WM;
    const bool scores = warp < WM * WN;
    const Job job(n, indices, k_start, k_end, blockIdx.x, blockIdx.y);
    const float c = float(scale * 1.4426950408889634);
    const i64 k_first = job.b * n.k_batch + job.group * n.k_group,
              v_first = job.b * n.v_batch + job.group * n.v_group;

    if constexpr (D % 16 != 0 || (!TIED && DV % 16 != 0)) {  // padding takes part in the products
        for (char* at = shared + tid * 16; at < p_s; at += 256 * 16) *(uint4*)at = make_uint4(0, 0, 0, 0);
        __syncthreads();
    }
    for (int h = tid / 8; h < HEADS; h += 32)
        copy_row<D * 2, D % 8 == 0 ? 16 : 4, true>(
            q_s, h, ROW * 2, q + (job.row * n.H + job.head + (h < job.heads ? h : 0)) * D, h < job.heads,
            tid % 8);

    int ids[PASSES];
    const auto look_up = [&](int i) {
        UNROLL for (int p = 0; p < PASSES; p++) ids[p] = job.key(job.lo + i * KEYS + p * 32 + tid / 8, n.S);
    };
    const auto copy = [&](int i) {  // starts the copy of tile i; says whether any key of this thread is there
        bool any = false;
        UNROLL for (int p = 0; p < PASSES; p++) {
            const int row = p * 32 + tid / 8;
            const bool there = ids[p] >= 0;
            const i64 id = there ? ids[p] : 0;
            if (tid % 8 == 0) there_s[i % 2 * KEYS + row] = there;
            any |= there;
            if constexpr (PACKED) {
                copy_row<BYTES, VEC, false>(byte_s, row, BYTE_ROW, (const u8*)k + k_first + id * n.k_key,
                                            there, tid % 8);
            } else {
                copy_row<D * 2, VEC, true>(k_s + i % 2 * KEYS * ROW * 2, row, ROW * 2,
                                           (const TYPE*)k + k_first + id * n.k_key, there, tid % 8);
                if constexpr (!TIED)
                    copy_row<DV * 2, VVEC, true>(v_s + i % 2 * KEYS * VROW * 2, row, VROW * 2,
                                                 v + v_first + id * n.v_key, there, tid % 8);
            }
        }
        return any;
    };
    const auto decode = [&]() {
        if constexpr (PACKED) {
            constexpr int CODES = R8 / 8, UNITS = CODES + ROPE / 8;
            UNROLL for (int p = 0; p < PASSES; p++) {
                const int row = p * 32 + tid / 8;
                const char* entry = byte_s + row * BYTE_ROW;
                char* to = k_s + row * ROW * 2;
#pragma unroll 4
                for (int at = tid % 8; at < CODES; at += 8) {
                    const unsigned* e = (const unsigned*)(entry + at * 8);
                    *(uint4*)(to + swizzled(row, at)) =
                        decode8(make_uint2(e[0], e[1]), *(const float*)(entry + R8 + at * 8 / 128 * 4));
                }
                for (int at = CODES + tid % 8; at < UNITS; at += 8) {
                    const unsigned* e = (const unsigned*)(entry + BYTES - 2 * ROPE + (at - CODES) * 16);
                    *(uint4*)(to + swizzled(row, at)) = make_uint4(e[0], e[1], e[2], e[3]);
                }
            }
        }
    };

    float o[OM][2 * PAIRS][4] = {}, m[MT][2], total[MT][2] = {};
    UNROLL for (int i = 0; i < MT; i++) m[i][0] = m[i][1] = -CUDART_INF_F;
    const int tiles = (job.hi - job.lo + KEYS - 1) / KEYS;
    bool any = false;
    if (tiles > 0) look_up(0), any = copy(0), look_up(1);

    for (int i = 0; i < tiles; i++) {
        cp_async_wait_all();
        const bool some = __syncthreads_or(any);  // tile i is here, and nobody reads tile i - 1 any more
        if constexpr (PACKED) {
            if (some) decode();
            __syncthreads();
        }
        if (i + 1 < tiles) any = copy(i + 1), look_up(i + 2);
        if (!some) continue;
        const unsigned k_tile = cvta_shared(k_s + (PACKED ? 0 : i % 2) * KEYS * ROW * 2);
        const unsigned v_tile = TIED ? k_tile : cvta_shared(v_s + i % 2 * KEYS * VROW * 2);
        constexpr int V_ROW = TIED ? ROW : VROW;

        float s[MT][NT][4] = {};
        if (scores) {
            // 1. s = q . k, in base 2, absent keys -inf
            // Rows begin at multiples of 128 bytes: the next 16 values are one XOR away, the next 64 an add.
            const int q_row = wm * MT * 16 + lane % 16,
                      k_row = wn * NT * 8 + (NT == 2 ? lane / 16 * 8 : 0) + lane % 8;
            const unsigned q_at = cvta_shared(q_s) + q_row * ROW * 2 + swizzled(q_row, lane / 16);
            const unsigned k_at = k_tile + k_row * ROW * 2 + swizzled(k_row, lane / 8 % 2);
#pragma unroll 3
            for (int panel = 0; panel < (STEPS + 3) / 4; panel++)
                UNROLL for (int step = 0; step < 4; step++) {
                    if (STEPS % 4 != 0 && panel * 4 + step >= STEPS) continue;
                    unsigned a[MT][4], b[4];
                    UNROLL for (int x = 0; x < MT; x++)
                        ldmatrix_x4(a[x], (q_at ^ step << 5) + panel * 128 + x * 16 * ROW * 2);
                    if constexpr (NT == 2) ldmatrix_x4(b, (k_at ^ step << 5) + panel * 128);
                    else ldmatrix_x2(b[0], b[1], (k_at ^ step << 5) + panel * 128);
                    UNROLL for (int x = 0; x < MT; x++)
                        UNROLL for (int y = 0; y < NT; y++)
                            mma_m16n8k16(s[x][y], a[x], b[2 * y], b[2 * y + 1], TYPE());
                }
            // 2. row maxima of this warp's keys
            UNROLL for (int y = 0; y < NT; y++)
                UNROLL for (int z = 0; z < 2; z++) {
                    const bool there = there_s[i % 2 * KEYS + wn * NT * 8 + y * 8 + lane % 4 * 2 + z];
                    UNROLL for (int x = 0; x < MT; x++) {
                        s[x][y][z] = there ? s[x][y][z] * c : -CUDART_INF_F;
                        s[x][y][z + 2] = there ? s[x][y][z + 2] * c : -CUDART_INF_F;
                    }
                }
            UNROLL for (int x = 0; x < MT; x++)
                UNROLL for (int half = 0; half < 2; half++) {
                    float top = -CUDART_INF_F;
                    UNROLL for (int y = 0; y < NT; y++)
                        top = fmaxf(top, fmaxf(s[x][y][2 * half], s[x][y][2 * half + 1]));
                    top = max_of_quad(top);
                    if (lane % 4 == 0) max_s[wn * HEADS + (wm * MT + x) * 16 + half * 8 + lane / 4] = top;
                }
        }
        __syncthreads();
        if (scores) {
            // 3. p = exp2(s - max), the sum, and how much o shrinks
            UNROLL for (int x = 0; x < MT; x++)
                UNROLL for (int half = 0; half < 2; half++) {
                    const int row = (wm * MT + x) * 16 + half * 8 + lane / 4;
                    float top = m[x][half];
                    UNROLL for (int w = 0; w < WN; w++) top = fmaxf(top, max_s[w * HEADS + row]);
                    const float safe = top == -CUDART_INF_F ? 0 : top, factor = exp2f(m[x][half] - safe);
                    float sum = 0;
                    UNROLL for (int y = 0; y < NT; y++) {
                        const float p0 = exp2f(s[x][y][2 * half] - safe),
                                    p1 = exp2f(s[x][y][2 * half + 1] - safe);
                        sum += p0 + p1;
                        *(unsigned*)(p_s + row * 128 + swizzled(row, wn * NT + y) + lane % 4 * 4) =
                            cvt_rn_x2(p0, p1, TYPE());
                    }
                    total[x][half] = total[x][half] * factor + sum;
                    m[x][half] = top;
                    if (wn == 0 && lane % 4 == 0) rescale_s[row] = factor;
                }
        }
        __syncthreads();
        // 4. o = o * factor + p v
        UNROLL for (int x = 0; x < OM; x++) {
            const float f0 = rescale_s[x * 16 + lane / 4], f1 = rescale_s[x * 16 + 8 + lane / 4];
            if (__any_sync(ALL, f0 != 1 || f1 != 1))
                UNROLL for (int y = 0; y < 2 * PAIRS; y++)
                    o[x][y][0] *= f0, o[x][y][1] *= f0, o[x][y][2] *= f1, o[x][y][3] *= f1;
        }
        const unsigned p_at = cvta_shared(p_s) + lane % 16 * 128 + swizzled(lane, lane / 16);
        const unsigned v_at = v_tile + lane % 16 * V_ROW * 2;
        UNROLL for (int step = 0; step < KEYS / 16; step++) {
            unsigned a[OM][4];
            UNROLL for (int x = 0; x < OM; x++) ldmatrix_x4(a[x], (p_at ^ step << 5) + x * 16 * 128);
            UNROLL for (int y = 0; y < PAIRS; y++) {
                if (warp * PAIRS + y >= OCTETS) continue;
                unsigned b[4];
                ldmatrix_x4_trans(
                    b, v_at + swizzled(lane, (warp * PAIRS + y) * 2 + lane / 16) + step * 16 * V_ROW * 2);
                UNROLL for (int x = 0; x < OM; x++) {
                    mma_m16n8k16(o[x][2 * y], a[x], b[0], b[1], TYPE());
                    mma_m16n8k16(o[x][2 * y + 1], a[x], b[2], b[3], TYPE());
                }
            }
        }
    }
    // 5. Each row's sum, from the threads that hold parts of it; then the division, the sink and the cast
    cp_async_wait_all();
    __syncthreads();
    if (scores)
        UNROLL for (int x = 0; x < MT; x++)
            UNROLL for (int half = 0; half < 2; half++) {
                const int row = (wm * MT + x) * 16 + half * 8 + lane / 4;
                const float sum = sum_of_quad(total[x][half]);
                if (lane % 4 == 0) max_s[wn * HEADS + row] = sum;
                if (lane % 4 == 0 && wn == 0) rescale_s[row] = m[x][half];
            }
    __syncthreads();
    const i64 rows = (i64)gridDim.x / ((n.H / n.G + HEADS - 1) / HEADS) / n.G;
    const i64 first = (blockIdx.y * rows + job.row) * n.H + job.head;
    if (tid < HEADS) {
        float sum = 0;
        for (int w = 0; w < WN; w++) sum += max_s[w * HEADS + tid];
        const float log_sum = sum == 0 ? -CUDART_INF_F : (rescale_s[tid] + log2f(sum)) * 0.6931471805599453f;
        const bool there = tid < job.heads;
        if (there) lse[first + tid] = log_sum;
        rescale_s[tid] = share_of(sum, there ? sink : nullptr, job.head + tid, log_sum);
    }
    __syncthreads();
    UNROLL for (int x = 0; x < OM; x++)
        UNROLL for (int half = 0; half < 2; half++) {
            const int row = x * 16 + half * 8 + lane / 4;
            const float share = rescale_s[row];
            if (row >= job.heads) continue;
            UNROLL for (int y = 0; y < 2 * PAIRS; y++) {
                const int d = warp * PAIRS * 16 + y * 8 + lane % 4 * 2;
                const float x0 = o[x][y][2 * half] * share, x1 = o[x][y][2 * half + 1] * share;
                OUT* at = out + (first + row) * DV + d;
                if (d >= DV) continue;
                if constexpr (sizeof(OUT) == 4) *(float2*)at = make_float2(x0, x1);
                else *(unsigned*)at = cvt_rn_x2(x0, x1, TYPE());
            }
        }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_wgmma                                    eq. (3), as attend_mma, for the latent shapes on Hopper
// in    one group of keys whose first DV = 512 values are v (TIED); q and k of TYPE, or k packed and q bf16
// grid  one block a SM: of the B * T * head tiles * Z jobs it takes every gridDim.x-th
// block 512: warpgroups 0 and 1 multiply, 2 and 3 copy
// smem  struct Plan: 225 KB at D = 576
// A tile of 64 keys comes in three parts: two halves of the values, and what a key has beyond them. Warpgroup
// i % 2 scores tile i and publishes its weights; then both add their half of the values, one with the weights
// in its registers, the other with those published, once it has begun to score tile i + 1. A part is free for
// tile i + 2 when the last one to read it is done, so that copies hardly pause.
// cost  of a tile: 2,176 cycles of products, 1,800 of L2 (74 KB; 2,700 where it lacks them); measured 2,950
// macros  HEADS = 64, D, DV, TYPE, OUT, R8, ROPE
#ifdef ATTEND_WGMMA
constexpr int KEYS = 64, PANELS = D / 64, HALF = DV / 2, PANEL = 64 * 128;  // a panel: 64 values of 64 rows
constexpr bool PACKED = R8 > 0;
constexpr int MULTIPLYING = PACKED ? 192 : 208;  // registers of a thread that does; decoding needs 64
static_assert(HEADS == 64, "rows of a wgmma");
static_assert(DV == 512, "two warpgroups hold 64 x 512 sums, 128 a thread");
static_assert(D % 64 == 0 && D <= 576, "Q and two tiles of keys fit in shared memory");
static_assert(!PACKED || (R8 == DV && ROPE == D - DV), "both halves are codes, the third part is not");

struct Plan {
    char q[PANELS][PANEL], k[2][PANELS][PANEL], p[HEADS][128];
    float max[HEADS], sum[2][HEADS];
    int any[4];                                  // whether the tile that a warp published last has keys
    u8 there[2][KEYS];                           // whether a slot of both tiles is one; with the third part
    u64 q_full, q_free, full[2][3], free[2][3];  // of Q, and of the parts of both tiles
};
static_assert(sizeof(Plan) == 3 * 128 * D + 9216, "dsa.py asks for it");

__device__ bool is_key(int slot, i64 S) { return (unsigned)slot < (unsigned)S; }

// How often a buffer was used before. A job begins with buffer 0 whatever came before it: who scores a tile,
// and so the order of its sums, depends on nothing but its place in the job.
struct Uses {
    int even = 0, odd = 0;
    __device__ int before(int tile) const { return (tile % 2 ? odd : even) + tile / 2; }
    __device__ void add(int tiles) { even += (tiles + 1) / 2, odd += tiles / 2; }
};

// What warpgroup 2 + half copies: this half of the values of all tiles of a job; half 1 also the third part,
// half 0 also Q. A thread copies 16 bytes of a panel for rows row, row + 16, + 32, + 48.
__device__ __forceinline__ void copy_job(Plan& plan, const Job& job, const TYPE* q, const char* k,
                                         const Shape& n, int half, int jobs, Uses uses) {
    const int row = threadIdx.x % 128 / 8, column = threadIdx.x % 8, swizzle = swizzled(row, column);
    const int tiles = (job.hi - job.lo + KEYS - 1) / KEYS;
    int slots[4];
    const auto look_up = [&](int tile) {
        UNROLL for (int r = 0; r < 4; r++) slots[r] = job.slot(job.lo + tile * KEYS + r * 16 + row);
    };
    look_up(0);
    if (half == 0) {
        if (jobs) mbarrier_wait(&plan.q_free, jobs - 1 & 1);
        for (int h = row; h < HEADS; h += 16) {
            const bool there = h < job.heads;
            const TYPE* from = q + (job.row * n.H + job.head + (there ? h : 0)) * D + column * 8;
            UNROLL for (int panel = 0; panel < PANELS; panel++)
                cp_async<16>(cvta_shared(plan.q[panel]) + h * 128 + swizzle, from + panel * 64, there);
        }
        cp_async_mbarrier_arrive(&plan.q_full);
    }

    constexpr int SIZE = PACKED ? 1 : 2;
    const unsigned bytes = n.k_key * SIZE;  // from one key to the next
    const char* first = k + job.b * n.k_batch * SIZE + unsigned(half * HALF * SIZE + column * 16);
    int buffer;
    const auto copy = [&](int panel_0, int panels, int at) {  // bytes of each key, `at` from this half on
        UNROLL for (int r = 0; r < 4; r++) {
            const bool there = is_key(slots[r], n.S);
            const char* from = first + (there ? (i64)slots[r] : 0) * bytes + at;
            const unsigned to = cvta_shared(plan.k[buffer][panel_0]) + (r * 16 + row) * 128 + swizzle;
            UNROLL for (int panel = 0; panel < panels; panel++)
                cp_async<16>(to + panel * PANEL, from + panel * 128, there);
        }
    };
    uint4 codes[2][2];  // of packed keys: two of the four rows, two blocks of 128 each
    float2 scales[2];
    const auto load = [&](int r0) {
        UNROLL for (int r = 0; r < 2; r++) {
            const bool there = is_key(slots[r0 + r], n.S);
            const char* from = first + (there ? (i64)slots[r0 + r] : 0) * bytes;
            scales[r] = make_float2(0, 0);
            if (there) scales[r] = *(const float2*)(from + (R8 + half * (8 - HALF) - column * 16));
            UNROLL for (int block = 0; block < 2; block++) {
                codes[r][block] = make_uint4(0, 0, 0, 0);
                if (there) codes[r][block] = *(const uint4*)(from + block * 128);
            }
        }
    };
    const auto decode = [&](int r0) {
        char* const to = plan.k[buffer][half * HALF / 64 + column / 4] + (r0 * 16 + row) * 128;
        const int odd = column / 4;  // these threads begin with the second of their two chunks: other banks
        const int chunk = swizzled(row, column % 4 * 2 + odd);
        UNROLL for (int r = 0; r < 2; r++)
            UNROLL for (int block = 0; block < 2; block++) {
                const uint4 x = codes[r][block];
                const uint2 lo = make_uint2(x.x, x.y), hi = make_uint2(x.z, x.w);
                const float scale = block ? scales[r].y : scales[r].x;
                char* at = to + block * 2 * PANEL + r * 2048;
                *(uint4*)(at + chunk) = decode8(odd ? hi : lo, scale);
                *(uint4*)(at + (chunk ^ 16)) = decode8(odd ? lo : hi, scale);
            }
    };
    if constexpr (PACKED) load(0);
    for (int tile = 0; tile < tiles; tile++) {
        const int used = uses.before(tile);
        buffer = tile % 2;
        const auto acquire = [&](int part) {
            if (used) mbarrier_wait(&plan.free[buffer][part], used - 1 & 1);
        };
        if (half == 1) {
            acquire(2);
            if (column == 0) {
                UNROLL for (int r = 0; r < 4; r++) plan.there[buffer][r * 16 + row] = is_key(slots[r], n.S);
                mbarrier_arrive(&plan.full[buffer][2]);
            }
            copy(DV / 64, PANELS - DV / 64, PACKED ? HALF + R8 / 128 * 4 : HALF * 2);
            cp_async_mbarrier_arrive(&plan.full[buffer][2]);
        }
        acquire(half);
        if constexpr (PACKED) {  // loads are under way while rows before are decoded, or a buffer waited for
            decode(0);
            load(2);
            look_up(tile + 1);
            decode(2);
            load(0);
            fence_proxy_async();
            mbarrier_arrive(&plan.full[buffer][half]);
        } else {
            copy(half * HALF / 64, HALF / 64, 0);
            look_up(tile + 1);
            cp_async_mbarrier_arrive(&plan.full[buffer][half]);
        }
    }
}

// x[j] of lane i of four becomes x[i] of lane j.
__device__ void transpose_quad(unsigned (&x)[4]) {
    UNROLL for (int d = 1; d <= 2; d *= 2) {
        const bool high = threadIdx.x & d;
        UNROLL for (int j = 0; j < 4; j++) {
            if (j & d) continue;
            const unsigned got = __shfl_xor_sync(ALL, high ? x[j] : x[j + d], d);
            if (high) x[j] = got;
            else x[j + d] = got;
        }
    }
}

KERNEL(512, 1) attend_wgmma(const TYPE* q, const char* k, const TYPE* v, const int* indices,
        const int* k_start, const int* k_end, const float* sink, OUT* out, float* lse, i64 T, i64 S, i64 H,
        i64 G, i64 slots, i64 chunk, i64 k_batch, i64 k_key, i64 k_group, i64 v_batch, i64 v_key, i64 v_group,
        double scale, i64 rows, i64 splits) {
    const Shape n = {T, S, H, G, slots, chunk, k_batch, k_key, k_group, v_batch, v_key, v_group};
    extern __shared__ __align__(1024) char shared[];
    Plan& plan = *(Plan*)shared;
    const int tid = threadIdx.x, lane = tid % 32;
    const int group = __shfl_sync(ALL, tid / 128, 0);  // so that the compiler knows it uniform
    if (tid == 0) {
        mbarrier_init(&plan.q_full, 128), mbarrier_init(&plan.q_free, 8);
        for (int i = 0; i < 6; i++)
            mbarrier_init(&plan.full[0][i], i % 3 == 2 ? 144 : 128), mbarrier_init(&plan.free[0][i], 4);
    }
    __syncthreads();
    const int per_split = rows * ((H + HEADS - 1) / HEADS), all = per_split * splits;
    int jobs = 0;  // done so far
    Uses uses;
    if (group >= 2) {
        setmaxnreg_dec<256 - MULTIPLYING>();
        for (int x = blockIdx.x; x < all; x += gridDim.x, jobs++) {
            const Job job(n, indices, k_start, k_end, x % per_split, x / per_split);
            copy_job(plan, job, q, k, n, group - 2, jobs, uses);
            uses.add((job.hi - job.lo + KEYS - 1) / KEYS);
        }
        return;
    }

    setmaxnreg_inc<MULTIPLYING>();
    const float c = fabs(scale) < 1e-37 ? 1e-37f : float(scale * 1.4426950408889634);  // 0 inf is NaN
    const int row = tid % 128 / 32 * 16 + lane / 4;  // of the heads; this thread's other one is row + 8
    const int other = 1 - group;                     // the warpgroup, and the buffer of its tiles
    const u64 q_at = wgmma_matrix(cvta_shared(plan.q)), k_at = wgmma_matrix(cvta_shared(plan.k[group])),
              p_at = wgmma_matrix(cvta_shared(plan.p)),
              v_at = wgmma_matrix(cvta_shared(plan.k[group][group * HALF / 64]), PANEL),
              other_v_at = wgmma_matrix(cvta_shared(plan.k[other][group * HALF / 64]), PANEL);
    const unsigned p_to = cvta_shared(plan.p[row - lane / 4 + lane % 16]) + swizzled(lane, lane / 16);
    const auto release = [&](int buffer, int part) {
        if (lane == 0) mbarrier_arrive(&plan.free[buffer][part]);  // only products read it, of whole warps
    };
    for (int x = blockIdx.x; x < all; x += gridDim.x, jobs++) {
        const Job job(n, indices, k_start, k_end, x % per_split, x / per_split);
        const int tiles = (job.hi - job.lo + KEYS - 1) / KEYS;
        float o[128] = {}, m[2] = {-CUDART_INF_F, -CUDART_INF_F}, total[2] = {};
        const auto rescale = [&](const float (&top)[2]) {
            if (!__any_sync(ALL, top[0] != m[0] || top[1] != m[1])) return;
            wgmma_wait_group<0>();
            float factor[2];
            UNROLL for (int half = 0; half < 2; half++) {
                factor[half] = m[half] == top[half] ? 1 : exp2f(m[half] - top[half]);
                m[half] = top[half];
                total[half] *= factor[half];
            }
            UNROLL for (int i = 0; i < 128; i++) o[i] *= factor[i / 2 % 2];
        };
        const auto take = [&](int tile) {  // of the other warpgroup
            mbarrier_wait(&plan.full[other][group], uses.before(tile) & 1);
            fence_proxy_async();
            bar_sync(2 + other, 256);
            rescale({plan.max[row], plan.max[row + 8]});
            if (__any_sync(ALL, plan.any[row / 16]))
                wgmma_fence(), wgmma_m64n256k64(o, p_at, other_v_at, TYPE());
            wgmma_commit_group();
        };
        mbarrier_wait(&plan.q_full, jobs & 1);
        int tile = group;
        for (; tile < tiles; tile += 2) {
            // 1. s = q . k, part by part as they come; between them o of the tile before
            float s[32];
            const auto score = [&](int part, int panels, bool first) {
                mbarrier_wait(&plan.full[group][part], uses.before(tile) & 1);
                fence_proxy_async();
                wgmma_fence();
                const u64 skip = part * (HALF / 64 * PANEL / 16), q_part = q_at + skip, k_part = k_at + skip;
                UNROLL for (int panel = 0; panel < panels; panel++) {
                    const int at = panel * (PANEL / 16);
                    wgmma_m64n64k64(s, q_part + at, k_part + at, !first || panel > 0, TYPE());
                }
                wgmma_commit_group();
            };
            score(2, PANELS - DV / 64, true);
            score(group, HALF / 64, D == DV);
            if (tile > 0) take(tile - 1);
            score(other, HALF / 64, false);
            const uchar2 mine = ((const uchar2*)plan.there[group])[lane];  // of slots 2 lane and 2 lane + 1
            const unsigned there[2] = {__ballot_sync(ALL, mine.x), __ballot_sync(ALL, mine.y)};
            const bool any = there[0] | there[1];
            if (tile > 0) wgmma_wait_group<1>(), release(other, group);
            wgmma_wait_group<0>();
            release(group, 2);
            if ((there[0] & there[1]) != ALL)
                UNROLL for (int i = 0; i < 32; i++)
                    if (!(there[i % 2] >> (i / 4 * 4 + lane % 4) & 1)) s[i] = copysignf(CUDART_INF_F, -c);
            // 2. p = exp2(c s - m), of the maximum so far: p up to 2^8 spares rescaling o. Else once more
            unsigned p[16];
            float sum[2], most;
            const auto weigh = [&] {
                sum[0] = sum[1] = most = 0;
                UNROLL for (int i = 0; i < 32; i += 2) {
                    const int half = i / 2 % 2;
                    const float safe = m[half] == -CUDART_INF_F ? 0 : m[half];
                    const float p0 = exp2f(fmaf(s[i], c, -safe)), p1 = exp2f(fmaf(s[i + 1], c, -safe));
                    sum[half] += p0 + p1;
                    most = fmaxf(most, fmaxf(p0, p1));
                    p[i / 2] = cvt_rn_x2(p0, p1, TYPE());
                }
            };
            const auto raise = [&] {  // m, to the largest score where that is above by more than 8
                float top[2] = {-CUDART_INF_F, -CUDART_INF_F};
                UNROLL for (int i = 0; i < 32; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i] * c);
                UNROLL for (int half = 0; half < 2; half++) {
                    top[half] = max_of_quad(top[half]);
                    if (top[half] <= m[half] + 8) top[half] = m[half];
                }
                rescale(top);
            };
            if constexpr (PACKED) raise();  // first, as doing p twice takes registers that decoding needs
            weigh();
            if (!PACKED && __any_sync(ALL, most > 256 || min(m[0], m[1]) == -CUDART_INF_F)) raise(), weigh();
            total[0] += sum[0], total[1] += sum[1];
            // 3. o += p v, and p for the other. A warp overwrites rows of p that only its own products read
            const auto add = [&] {
                wgmma_fence();
                wgmma_m64n256k64(o, p, v_at, TYPE());
                wgmma_commit_group();
            };
            if (any) {  // else as where rows of indices end in -1
                UNROLL for (int step = 0; step < 4; step++) stmatrix_x4(p_to ^ step * 32, p + 4 * step);
                if constexpr (!PACKED) add();
            }
            if (lane % 4 == 0) plan.max[row] = m[0], plan.max[row + 8] = m[1];
            if (lane == 0) plan.any[row / 16] = any;
            fence_proxy_async();
            bar_arrive(2 + group, 256);
            if (PACKED && any) add();
            wgmma_wait_group<0>();
            release(group, group);
        }
        // The last tile may be the other's
        if (tile == tiles && tiles > 0) take(tile - 1), wgmma_wait_group<0>(), release(other, group);
        uses.add(tiles);
        if (lane == 0) mbarrier_arrive(&plan.q_free);
        // 4. Each row's sum of both warpgroups; then the division, the sink and the cast
        bar_sync(1, 256);
        UNROLL for (int half = 0; half < 2; half++) {
            total[half] = sum_of_quad(total[half]);
            if (lane % 4 == 0) plan.sum[group][row + half * 8] = total[half];
        }
        bar_sync(1, 256);
        UNROLL for (int half = 0; half < 2; half++) {
            const int h = row + half * 8;
            const bool there = h < job.heads;
            const i64 at = (x / per_split * rows + job.row) * H + job.head + h;
            const float sum = plan.sum[0][h] + plan.sum[1][h];
            const float log_sum = sum == 0 ? -CUDART_INF_F : (m[half] + log2f(sum)) * 0.6931471805599453f;
            const float share = share_of(sum, there ? sink : nullptr, job.head + h, log_sum);
            if (group == 0 && lane % 4 == 0 && there) lse[at] = log_sum;
            OUT* to = out + at * DV + group * HALF;
            UNROLL for (int i = 2 * half; i < 128; i += 16) {  // 32 values of a row by four threads
                unsigned x[4];
                UNROLL for (int j = 0; j < 4; j++) {
                    const float *at = &o[i + 4 * j], y0 = at[0] * share, y1 = at[1] * share;
                    if constexpr (sizeof(OUT) == 2) x[j] = cvt_rn_x2(y0, y1, TYPE());
                    else if (there) *(float2*)(to + i / 4 * 8 + j * 8 + lane % 4 * 2) = make_float2(y0, y1);
                }
                if constexpr (sizeof(OUT) == 2) {
                    transpose_quad(x);
                    if (there) *(uint4*)(to + i / 4 * 8 + lane % 4 * 8) = make_uint4(x[0], x[1], x[2], x[3]);
                }
            }
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// merge_attention                                                     what `splits` blocks found, together
//     L = logsumexp_i(lses[i]);   out = sum_i exp(lses[i] - L) outs[i], less the sink's share;   lse = L
// in    outs [splits, rows, DV], lses [splits, rows] of ACC, splits <= 128;
//       rows = B * T * H; sink [H] of ACC or null
// out   out [rows, DV] OUT, lse [rows] ACC
// grid  rows  block 128.   The order of the sum is that of the splits, so runs agree bit for bit.
// macros  ACC, OUT, COLUMNS = ceil(DV / 128), LOADS: splits that are read at a time
#ifdef MERGE_ATTENTION
KERNEL(128) merge_attention(const ACC* outs, const ACC* lses, const ACC* sink, OUT* out, ACC* lse, i64 splits,
        i64 rows, i64 H, i64 DV) {
    __shared__ ACC weights[128];
    const i64 row = blockIdx.x;
    const ACC inf = ACC(CUDART_INF_F);
    ACC top = -inf, total = 0, o[COLUMNS] = {}, part[LOADS][COLUMNS];
    const auto load = [&](int first) {
        UNROLL for (int i = 0; i < LOADS; i++)
            UNROLL for (int j = 0; j < COLUMNS; j++) {
                const int d = threadIdx.x + 128 * j;
                part[i][j] = first + i < splits && d < DV ? outs[((first + i) * rows + row) * DV + d] : 0;
            }
    };
    if (threadIdx.x < splits) weights[threadIdx.x] = lses[threadIdx.x * rows + row];
    load(0);  // on their way while the weights are found
    __syncthreads();
    for (int i = 0; i < splits; i++) top = fmax(top, weights[i]);
    if (top == -inf) top = 0;
    __syncthreads();
    if (threadIdx.x < splits) weights[threadIdx.x] = exp(weights[threadIdx.x] - top);
    __syncthreads();
    for (int first = 0; first < splits; first += LOADS) {
        if (first > 0) load(first);
        UNROLL for (int i = 0; i < LOADS; i++) {
            const ACC weight = first + i < splits ? weights[first + i] : 0;
            total += weight;
            UNROLL for (int j = 0; j < COLUMNS; j++) o[j] += weight * part[i][j];
        }
    }
    const ACC log_sum = total == 0 ? -inf : top + log(total);
    const ACC share = share_of(total, sink, row % H, log_sum);
    if (threadIdx.x == 0) lse[row] = log_sum;
    UNROLL for (int j = 0; j < COLUMNS; j++)
        if (threadIdx.x + 128 * j < DV)
            out[row * DV + threadIdx.x + 128 * j] = rounded<OUT>(o[j] * share);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// quantize_fp8                                                 quantized and packed of dsa.py, byte for byte
// in    x [rows, x_stride] of XT, whose first `width` values become codes and the `rope` after them bfloat16
// out   of each row the codes at out + row * out_stride, the bfloat16 tail_offset after, the float32 scales
//       at scales + row * scale_stride + scale_offset; all in bytes. In a cache entry scales is out.
// grid  ceil(rows * (ceil(width / BLOCK) + (rope > 0)) / 8)  block 256: a warp takes a block or tail of a row
// macros  BLOCK, UE8M0, XT, ACC (double for float64)
#ifdef QUANTIZE_FP8
__device__ u8 sign_of(XT x) { return ((const u8*)&x)[sizeof(XT) - 1] & 128; }

// With -ftz=true a cast would make subnormal results 0.
__device__ float to_float(float x) { return x; }
__device__ float to_float(double x) {
    float y;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x));
    return y;
}

__device__ u8 e4m3_code(XT raw, float scale) {
    const double size = fabs(ACC(widen(raw)) / ACC(scale));
    return __nv_cvt_double_to_fp8(size, __NV_SATFINITE, __NV_E4M3) | sign_of(raw);
}

KERNEL(256) quantize_fp8(const XT* x, u8* out, u8* scales, i64 rows, i64 width, i64 rope, i64 x_stride,
        i64 out_stride, i64 scale_stride, i64 scale_offset, i64 tail_offset, float least) {
    const i64 blocks = (width + BLOCK - 1) / BLOCK, parts = blocks + (rope > 0);
    const i64 job = blockIdx.x * 8ll + threadIdx.x / 32, row = job / parts, part = job % parts;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += row * x_stride;
    if (part == blocks) {
        for (i64 i = lane; i < rope; i += 32) {
            const float y = to_float(widen(x[width + i]));
            unsigned bits = __float_as_uint(y);
            bits = isnan(y) ? 0x7FC0 : (bits + (bits >> 16 & 1) + 0x7FFF) >> 16;
            u8* at = out + row * out_stride + tail_offset + 2 * i;
            at[0] = bits, at[1] = bits >> 8;
        }
        return;
    }
    const i64 first = part * BLOCK, end = min(first + BLOCK, width);
    ACC most = 0;
    for (i64 i = first + lane; i < end; i += 32)
        most = fmax(most, fabs(ACC(widen(x[i]))));  // passes over NaN
    most = max_of_warp(most);
    float scale = fminf(fmaxf(float(most), least), 0x1.fffffep127f) / 448.0f;
    if (UE8M0)  // up to a power of two
        scale = __uint_as_float((__float_as_uint(scale) + 0x7FFFFF) & 0xFF800000);
    if (lane < 4)
        scales[row * scale_stride + scale_offset + part * 4 + lane] = __float_as_uint(scale) >> 8 * lane;
    for (i64 i = first + lane; i < end; i += 32) out[row * out_stride + i] = e4m3_code(x[i], scale);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// made_of_x         of a layer's tokens: y = weight * x / sqrt(mean x^2 + eps), of keys LayerNorm, and RoPE
// inout x rows of ACC, `apart` from one to the next: qr [Q], c [R], k_pe [rope], and an indexer's key [E]
// in    cos, sin [.., rope / 2], those of token t at first + t % positions
// out   normed [rows, Q] OUT, of qr; the others stay in x: c is normed, k_pe turned, and the key both
// grid  (rows, 2, or 3 with an indexer)   block 256
// rotate   RoPE of x [tokens, H, 2 * half] TYPE, apart and next_head numbers to the next, to y, which may be x
// grid  (tokens, ceil(H * half / 256))   block 256: a thread a pair, (2i, 2i + 1) or (i, i + half)
template <class T, class A> __device__ void turn(const T* x, T* y, i64 i, i64 half, bool pairs, A c, A s) {
    const i64 a = pairs ? 2 * i : i, b = a + (pairs ? 1 : half);
    const A p = widen(x[a]), q = widen(x[b]);
    y[a] = rounded<T>(p * c - q * s), y[b] = rounded<T>(p * s + q * c);
}

#ifdef MADE_OF_X
KERNEL(256) made_of_x(ACC* x, OUT* normed, const ACC* q_norm, const ACC* kv_norm, const ACC* k_norm,
        const ACC* bias, const ACC* cos, const ACC* sin, i64 first, i64 positions, i64 apart, i64 Q, i64 R,
        i64 rope, i64 E, i64 interleaved, double eps, double index_eps) {
    const bool of_q = blockIdx.y == 0, of_key = blockIdx.y == 2;
    const i64 N = of_q ? Q : of_key ? E : R, at = (first + blockIdx.x % positions) * (rope / 2);
    const ACC* weight = of_q ? q_norm : of_key ? k_norm : kv_norm;
    x += blockIdx.x * apart + (of_q ? 0 : of_key ? Q + R + rope : Q);
    ACC sum = 0, squares = 0;
    for (i64 i = threadIdx.x; i < N; i += 256) sum += x[i];
    const ACC mean = of_key ? sum_of_block(sum) / N : ACC(0);
    for (i64 i = threadIdx.x; i < N; i += 256) squares += (x[i] - mean) * (x[i] - mean);
    const ACC r = 1 / sqrt(sum_of_block(squares) / N + ACC(of_key ? index_eps : eps));
    for (i64 i = threadIdx.x; i < N; i += 256) {
        const ACC y = weight[i] * (x[i] - mean) * r + (of_key ? bias[i] : ACC(0));
        if (of_q) normed[blockIdx.x * Q + i] = rounded<OUT>(y);
        else x[i] = y;
    }
    __syncthreads();
    x += of_key ? 0 : R;
    for (i64 i = threadIdx.x; i < rope / 2 && !of_q; i += 256)
        turn(x, x, i, rope / 2, !of_key || interleaved, cos[at + i], sin[at + i]);
}
#endif

#ifdef ROTATE
KERNEL(256) rotate(const TYPE* x, TYPE* y, const ACC* cos, const ACC* sin, i64 first, i64 positions, i64 H,
        i64 half, i64 apart, i64 next_head, i64 y_apart, i64 y_next_head, i64 interleaved) {
    const unsigned n = blockIdx.y * 256 + threadIdx.x, head = n / (unsigned)half, i = n % (unsigned)half;
    const i64 at = (first + blockIdx.x % (unsigned)positions) * half + i;
    x += blockIdx.x * apart + head * next_head, y += blockIdx.x * y_apart + head * y_next_head;
    if (head < H) turn(x, y, i, half, interleaved, cos[at], sin[at]);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// Training, section 13 of dsa.py. Its products are cuBLAS's, over keys that `gather` puts side by side, for M
// queries at a time; what stands between them is here. `ACC` is float, or double for float64.

// ---------------------------------------------------------------------------------------------------------
// gather                                                                 the keys of each query, side by side
// in    x [S, G, width] of UNIT, 2 to 16 bytes; rows [M, K] i32
// out   out [M, G, K, width] of UNIT, every element written: zeros where a row is no key
// grid  (ceil(K / 8), M * G)  block 256: a warp copies a key    (M * G on y: at most 65,535)
#ifdef GATHER
KERNEL(256) gather(const UNIT* __restrict__ x, const int* rows, UNIT* __restrict__ out, i64 K, i64 S, i64 G,
        i64 width) {
    const i64 slot = blockIdx.x * 8 + threadIdx.x / 32, at = blockIdx.y * K + slot;
    if (slot >= K) return;
    const i64 g = blockIdx.y % (unsigned)G, key = rows[blockIdx.y / (unsigned)G * K + slot];
    const bool there = key >= 0 && key < S;
#pragma unroll 4
    for (i64 i = threadIdx.x % 32; i < width; i += 32)  // x shall stay in L2, out need not
        __stcs(out + at * width + i, there ? x[(key * G + g) * width + i] : UNIT());
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_backward_norms                    sparse_attention_backward: what the slots of a head have in common
//     norms[.., 0] = logaddexp(lse, z);   norms[.., 1] = dout . out
// in    dout of TYPE and out of OUT [rows, DV], lse [rows] of ACC, rows = B * T * H; z [H] of ACC or null
// out   norms [rows, 2] of ACC, every element written
// grid  ceil(rows / 8)  block 256: a warp a head of a query
#ifdef ATTEND_BACKWARD_NORMS
KERNEL(256) attend_backward_norms(const TYPE* __restrict__ dout, const OUT* __restrict__ out, const ACC* lse,
        const ACC* z, ACC* norms, i64 rows, i64 H, i64 DV) {
    const i64 at = blockIdx.x * 8ll + threadIdx.x / 32;
    if (at >= rows) return;
    ACC delta = 0;
#pragma unroll 8
    for (i64 i = at * DV + threadIdx.x % 32; i < (at + 1) * DV; i += 32)
        delta += ACC(widen(dout[i])) * widen(out[i]);
    delta = sum_of_warp(delta);
    const ACC own = lse[at], sink = z ? z[at % H] : -ACC(CUDART_INF_F);
    const ACC gap = own == sink ? 0 : fabs(own - sink);
    if (threadIdx.x % 32) return;
    norms[2 * at] = max(own, sink) + log1p(exp(-gap));
    norms[2 * at + 1] = delta;
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_backward                                                 sparse_attention_backward, a slot at a time
//     p = exp(scale s - norms[.., 0]);   ds = scale p (dp - norms[.., 1])
// in    s = q . k, dp = dout . v, [M, H, K] of ACC; rows [M, K] i32, absent outside [0, S); norms [M, H, 2]
// out   pairs [M, G, 2, H / G, K] of TYPE: ds, then p, 0 where absent
// grid  M * H  block 256: a head of a query
// cost  12 bytes a slot in 16 bits: bound by memory
#ifdef ATTEND_BACKWARD
KERNEL(256) attend_backward(const ACC* __restrict__ s, const ACC* __restrict__ dp,
        const int* __restrict__ rows, const ACC* norms, TYPE* __restrict__ pairs, i64 K, i64 H, i64 G,
        i64 S, double scale) {
    const i64 at = blockIdx.x, m = at / H, r = H / G;
    norms += 2 * at;
    TYPE* to = pairs + (at / r * 2 * r + at % r) * K;
#pragma unroll 4
    for (i64 i = threadIdx.x; i < K; i += 256) {
        const bool there = (unsigned)rows[m * K + i] < S;
        const ACC p = there ? exp(ACC(scale) * s[at * K + i] - norms[0]) : 0;
        to[i] = rounded<TYPE>(there ? ACC(scale) * p * (dp[at * K + i] - norms[1]) : 0);
        to[r * K + i] = rounded<TYPE>(p);
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_backward_wgmma                     for latents on Hopper: s and dp, p and ds as above, dq = sum ds k
// in    q [M, H, D], dout [M, H, DV], k [S, D] bf16, whose first DV values are v; rows, norms as above, f32
// out   dq [M, H, D] bf16; both [M, PARTS, 2, 32, D] bf16, or null: q of 32 heads, then their dout, 0 beyond
//       DV and H; pairs [M, K, PARTS, 2, 32] bf16: ds of 32 heads, then p, 0 where absent
// grid  M * ceil(PARTS / 2)  block 384: warpgroups 0 and 1 have a part each, 2 copies
// smem  struct Plan: 224 KB at D = 576
// A tile of 64 keys comes in panels of 64 values, which are read for s and dp, then for dq, and are free one
// by one for the next tile. Products have keys for rows, or sum over them: no part needs another.
// cost  of a tile: 3,456 cycles of products, 4,600 of shared memory, 3,000 of L2 (74 KB)
#ifdef ATTEND_BACKWARD_WGMMA
constexpr int DV = 512, PANELS = D / 64, PANEL = 64 * 128;  // a panel: 64 values of 64 rows
static_assert(D % 64 == 0 && D <= 576, "two parts and a tile of keys fit in shared memory");
struct Plan {
    char both[PANELS][2][PANEL], k[PANELS][PANEL], ds[PANEL];  // ds: of two parts
    u64 full[PANELS], free[PANELS];
};
static_assert(sizeof(Plan) == 384 * D + 8192 + D / 4, "dsa.py asks for it");

// d [64, 32] += a^T b of a [16, 64] and b [16, 32], contiguous along the 64 and the 32
__device__ void wgmma_m64n32k16(float (&d)[16], u64 a, u64 b) {
    asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16"
                 " {" TEN() "%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1, 1, 1; }"
                 : F8(0), F8(8) : "l"(a), "l"(b));
}

KERNEL(384, 1) attend_backward_wgmma(const bf16* q, const bf16* dout, const bf16* k, const float2* norms,
        const int* rows, bf16* dq, bf16* both, bf16* pairs, i64 S, i64 H, i64 K, double scale) {
    extern __shared__ __align__(1024) char shared[];
    Plan& plan = *(Plan*)shared;
    const int tid = threadIdx.x, warp = tid % 128 / 32, lane = tid % 32;
    const int group = __shfl_sync(ALL, tid / 128, 0);  // so that the compiler knows it uniform
    const int parts = (H + 31) / 32, blocks = (parts + 1) / 2, tiles = (K + 63) / 64;
    const int part = blockIdx.x % blocks * 2, groups = min(2, parts - part);
    const i64 m = blockIdx.x / blocks;
    rows += m * K, pairs += m * K * parts * 64;
    const auto key_at = [&](int slot) { return slot < K ? rows[slot] : -1; };
    if (tid == 0)
        for (int i = 0; i < PANELS; i++)
            mbarrier_init(&plan.full[i], 128), mbarrier_init(&plan.free[i], 4 * groups);
    __syncthreads();

    if (group == 2) {  // a thread copies 16 bytes of a panel for rows row, row + 16, ..
        setmaxnreg_dec<40>();
        const int row = tid % 128 / 8, column = tid % 8, at = row * 128 + swizzled(row, column);
        const bool write = both;
        both += (m * parts + part) * 64 * D + column * 8;
        q += m * H * D + column * 8, dout += m * H * DV + column * 8, k += column * 8;
        const auto head_of = [&](int r) {  // of 32; so that a lane has 8 heads in a row
            return row % 8 / 2 * 8 + r % 2 * 4 + row / 8 * 2 + row % 2;
        };
        for (int tile = 0; tile < tiles; tile++) {
            int keys[4];
            for (int r = 0; r < 4; r++) keys[r] = key_at(tile * 64 + r * 16 + row);
            for (int panel = 0; panel < PANELS; panel++) {
                if (tile) mbarrier_wait(&plan.free[panel], tile - 1 & 1);
                for (int r = 0; r < 4 * groups && tile == 0; r++) {  // q and dout of a part, of the next
                    const int head = (part + r / 4) * 32 + head_of(r), width = r / 2 % 2 ? DV : D;
                    const bool there = head < H && panel < width / 64;
                    const bf16* const from = (r / 2 % 2 ? dout : q) + (there ? head * width + panel * 64 : 0);
                    cp_async<16>(cvta_shared(plan.both[panel]) + r * 2048 + at, from, there);
                }
                for (int r = 0; r < 4; r++) {
                    const bool there = (unsigned)keys[r] < (unsigned)S;
                    cp_async<16>(cvta_shared(plan.k[panel]) + r * 2048 + at,
                                 k + (there ? (i64)keys[r] : 0) * D + panel * 64, there);
                }
                cp_async_mbarrier_arrive(&plan.full[panel]);
            }
        }
        cp_async_wait_all();  // what this thread copied is written side by side, for the product that follows
        for (int i = 0; i < PANELS * 4 * groups && write; i++) {
            const int panel = i % PANELS, r = i / PANELS;
            *(uint4*)(both + (r / 2 * 32 + head_of(r)) * D + panel * 64) =
                *(const uint4*)(plan.both[panel][0] + r * 2048 + at);
        }
        return;
    }
    if (group >= groups) return;
    setmaxnreg_inc<232>();
    const float c = float(scale);
    const int row = warp * 16 + lane / 4;   // of the tile's keys; this thread's other one is row + 8
    const int first = (part + group) * 32;  // of the part's heads; this thread's are 8 from lane % 4 * 8 on
    const unsigned own = cvta_shared(plan.both[0][group]), own_ds = cvta_shared(plan.ds) + group * 64;
    const u64 both_at = wgmma_matrix(own), ds_at = wgmma_matrix(own_ds), k_at = wgmma_matrix(cvta_shared(plan.k));
    const auto release = [&](int panel) {
        if (lane == 0) mbarrier_arrive(&plan.free[panel]);  // only products read it, of whole warps
    };
    float2 norm[8];
    for (int i = 0; i < 8; i++) {
        const int head = first + lane % 4 * 8 + i;
        norm[i] = head < H ? norms[m * H + head] : make_float2(CUDART_INF_F, 0);
    }
    float sum[PANELS][16] = {};  // dq^T
    for (int tile = 0; tile < tiles; tile++) {
        const int slots[2] = {tile * 64 + row, tile * 64 + row + 8};
        const int keys[2] = {key_at(slots[0]), key_at(slots[1])};
        // 1. s, and in s[16] .. dp, of the same keys and heads, panel by panel as they come
        float s[32];
        UNROLL for (int panel = 0; panel < PANELS; panel++) {
            mbarrier_wait(&plan.full[panel], tile & 1);
            fence_proxy_async();
            wgmma_fence();
            const int at = panel * (PANEL / 16);
            wgmma_m64n64k64(s, k_at + at, both_at + 2 * at, panel > 0, bf16());
            wgmma_commit_group();
        }
        wgmma_wait_group(s);
        // 2. p and ds; nobody reads the last ds any more, as the last panel was free
        unsigned p[2][4], ds[2][4];  // of two heads each
        UNROLL for (int i = 0; i < 16; i += 2) {
            const int e = i / 2 % 2, h = i / 4;
            float x[2], y[2];
            for (int j = 0; j < 2; j++) {
                const bool there = (unsigned)keys[e] < (unsigned)S;
                x[j] = there ? __expf(c * s[i + j] - norm[2 * h + j].x) : 0;
                y[j] = there ? c * x[j] * (s[16 + i + j] - norm[2 * h + j].y) : 0;
            }
            p[e][h] = cvt_rn_x2(x[0], x[1], bf16()), ds[e][h] = cvt_rn_x2(y[0], y[1], bf16());
            const int at = (row + e * 8) * 128 + swizzled(row, group * 4 + h) + lane % 4 * 4;
            *(unsigned*)(plan.ds + at) = ds[e][h];
        }
        fence_proxy_async();
        bar_sync(1 + group, 128);
        // 3. dq^T += k^T ds; p and ds go out meanwhile
        wgmma_fence();
        UNROLL for (int panel = 0; panel < PANELS; panel++) {
            for (int step = 0; step < 4; step++)
                wgmma_m64n32k16(sum[panel], k_at + (panel * PANEL + step * 2048) / 16, ds_at + step * 128);
            wgmma_commit_group();
            for (int e = 0; e < 2 && panel == 1; e++) {
                uint4* const to = (uint4*)(pairs + (slots[e] * (i64)parts + part + group) * 64) + lane % 4;
                if (slots[e] >= K) continue;
                to[0] = make_uint4(ds[e][0], ds[e][1], ds[e][2], ds[e][3]);
                to[4] = make_uint4(p[e][0], p[e][1], p[e][2], p[e][3]);
            }
            if (panel > 0) wgmma_wait_group<1>(), release(panel - 1);
        }
        wgmma_wait_group<0>();
        release(PANELS - 1);
    }
    UNROLL for (int i = 0; i < PANELS * 16; i += 2) {  // transposed, 8 x 8 values at a time
        const float* const x = &sum[i / 16][i % 16];
        const int head = first + lane / 8 * 8 + i % 16 / 4 * 2 + lane / 4 % 2;
        const int d = i / 16 * 64 + warp * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
        const unsigned two = movmatrix_trans(cvt_rn_x2(x[0], x[1], bf16()));
        if (head < H) *(unsigned*)(dq + (m * H + head) * D + d) = two;
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_backward_rows                       sparse_attention_backward of small heads: a row against its others
//     p and ds as above, of s = a.a' and dp = b.b';   d_a = sum ds a',  d_b = sum p b'
// in    BY_KEY 0: a, b are rows of q and dout, the others k and v at list [T, K] i32, absent outside [0, S)
//       BY_KEY 1: a, b are rows of k and v, the others those heads of q and dout that share them, of queries
//       list[first[key]] .. list[first[key + 1] - 1], in their order
//       norms [T, H, 2] as above; D, DV multiples of 8, at most 128
// out   d_a, and BY_KEY d_b, of TYPE, every element written
// grid  rows of a  block 128: a warp takes 32 / LANES others at a time, a lane 8 values of each
// cost  2 * (D + DV) bytes a pair out of L2
#ifdef ATTEND_BACKWARD_ROWS
constexpr int LANES = D > 64 || DV > 64 ? 16 : 8;
static_assert(D % 8 == 0 && DV % 8 == 0 && D <= 128 && DV <= 128, "LANES lanes read 16 bytes each");
union Eight { uint4 all; TYPE x[8]; };

__device__ void widened(float (&to)[8], const TYPE* from, bool there) {
    Eight eight;
    eight.all = load_16(from, there);
    UNROLL for (int x = 0; x < 8; x++) to[x] = widen(eight.x[x]);
}

KERNEL(128, 6) attend_backward_rows(const TYPE* a, const TYPE* b, const TYPE* other_a, const TYPE* other_b,
        const float2* norms, const int* list, const i64* first, TYPE* d_a, TYPE* d_b, i64 S, i64 H, i64 G,
        i64 K, double scale) {
    __shared__ float parts[4][8 * 2 * LANES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = lane % LANES * 8;
    const int r = H / G, per_row = BY_KEY ? G : H, row = blockIdx.x / per_row, head = blockIdx.x % per_row;
    const i64 own = blockIdx.x;
    list += BY_KEY ? first[row] : row * K;
    const int count = BY_KEY ? (int)(first[row + 1] - first[row]) * r : (int)K;
    const float c = float(scale);
    float x[8], y[8], sum_a[8] = {}, sum_b[8] = {};
    widened(x, a + own * D + at, at < D), widened(y, b + own * DV + at, at < DV);
    const float2 own_norm = BY_KEY ? make_float2(0, 0) : norms[own];
#pragma unroll 2
    for (int j0 = warp * (32 / LANES); j0 < count; j0 += 4 * (32 / LANES)) {
        const int j = j0 + lane / LANES, found = j < count ? list[BY_KEY ? j / r : j] : -1;
        const bool there = found >= 0 && (BY_KEY || found < S);
        const i64 other = !there ? 0 : BY_KEY ? found * H + head * r + j % r : found * G + head / r;
        float p[8], q[8], s = 0, dp = 0;
        widened(p, other_a + other * D + at, there && at < D);
        widened(q, other_b + other * DV + at, there && at < DV);
        const float2 norm = BY_KEY ? norms[other] : own_norm;
        UNROLL for (int i = 0; i < 8; i++) s += x[i] * p[i], dp += y[i] * q[i];
        UNROLL for (int d = LANES / 2; d; d /= 2)
            s += __shfl_xor_sync(ALL, s, d), dp += __shfl_xor_sync(ALL, dp, d);
        const float weight = there ? __expf(c * s - norm.x) : 0;
        const float ds = there ? c * weight * (dp - norm.y) : 0;
        UNROLL for (int i = 0; i < 8; i++) {
            sum_a[i] += ds * p[i];
            if (BY_KEY) sum_b[i] += weight * q[i];
        }
    }
    UNROLL for (int i = 0; i < 8; i++) {
        for (int d = LANES; d < 32; d *= 2) {
            sum_a[i] += __shfl_xor_sync(ALL, sum_a[i], d);
            if (BY_KEY) sum_b[i] += __shfl_xor_sync(ALL, sum_b[i], d);
        }
        if (lane < LANES) parts[warp][at + i] = sum_a[i], parts[warp][8 * LANES + at + i] = sum_b[i];
    }
    __syncthreads();
    for (int d = threadIdx.x; d < (BY_KEY ? 16 : 8) * LANES; d += 128) {
        const float sum = parts[0][d] + parts[1][d] + parts[2][d] + parts[3][d];
        const int v = d - 8 * LANES;
        if (d < D) d_a[own * D + d] = rounded<TYPE>(sum);
        if (v >= 0 && v < DV) d_b[own * DV + v] = rounded<TYPE>(sum);
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_backward_mma        sparse_attention_backward of 8 heads of a query on tensor cores, p and ds as above
//     dq = sum ds k
// in    q, dout, k, v, norms and list as above, in bf16
// out   dq, every element written; pairs [T, K, G, ceil(H / G / 8), 2, 8] bf16, unless null: ds, then p
// grid  T * G * ceil(H / G / 8)  block 128: a warp takes 16 slots at a time, in two tiles of its own
// smem  struct Tiles for each warp: 32 KB at D = DV = 64
// cost  2 * (D + DV) bytes a slot out of L2
// All products have heads for columns: of s [16 keys, 8 heads] nothing is padding.
#ifdef ATTEND_BACKWARD_MMA
constexpr int STEPS = (D + 15) / 16, VSTEPS = (DV + 15) / 16;  // of 16 values
constexpr int ROW = (D + 63) / 64 * 64, VROW = (DV + 63) / 64 * 64;
static_assert(D % 8 == 0 && DV % 8 == 0 && D <= 128 && DV <= 128, "rows are copied 16 bytes at a time");
struct Tiles {
    bf16 k[2][16][ROW], v[2][16][VROW];  // swizzled
};

// The operand b of a product with x^T, x [heads, WIDTH] of up to 8 heads: of every 16 values two registers.
template <int WIDTH, int N> __device__ void load_heads(unsigned (&b)[N][2], const bf16* x, int heads) {
    const int lane = threadIdx.x % 32;
    UNROLL for (int i = 0; i < 2 * N; i++) {
        const int at = i * 8 + lane % 4 * 2;
        b[i / 2][i % 2] = lane / 4 < heads && at < WIDTH ? *(const unsigned*)(x + lane / 4 * WIDTH + at) : 0;
    }
}

// d [16 keys, 8 heads] = tile [16, WIDTH] b
template <int N>
__device__ void multiply(float (&d)[4], unsigned tile, int row_bytes, const unsigned (&b)[N][2]) {
    const int row = threadIdx.x % 16, chunk = threadIdx.x % 32 / 16;
    UNROLL for (int i = 0; i < N; i++) {
        unsigned a[4];
        ldmatrix_x4(a, tile + row * row_bytes + swizzled(row, i * 2 + chunk));
        mma_m16n8k16(d, a, b[i][0], b[i][1], bf16());
    }
}

KERNEL(128, 4) attend_backward_mma(const bf16* q, const bf16* dout, const bf16* k, const bf16* v,
        const float2* norms, const int* list, bf16* dq, bf16* pairs, i64 S, i64 H, i64 G, i64 K,
        double scale) {
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = H / G, parts = (r + 7) / 8;
    const int part = blockIdx.x % parts, group = blockIdx.x / parts % G, heads = min(8, r - part * 8);
    const i64 t = blockIdx.x / (parts * G), first = t * H + group * r + part * 8;
    Tiles& tiles = ((Tiles*)shared)[warp];
    const float c = float(scale);
    const int apart = G * parts * 8;
    if (pairs) pairs += ((t * K * G + group) * parts + part) * 16 + lane % 4 * 2;
    unsigned q_b[STEPS][2], dout_b[VSTEPS][2];
    load_heads<D>(q_b, q + first * D, heads), load_heads<DV>(dout_b, dout + first * DV, heads);
    float2 norm[2];  // of this lane's two heads
    for (int i = 0; i < 2; i++) {
        const int head = lane % 4 * 2 + i;
        norm[i] = head < heads ? norms[first + head] : make_float2(CUDART_INF_F, 0);
    }
    if (D % 16 || DV % 16)  // padding takes part in the products
        for (int i = lane; i < sizeof(Tiles) / 16; i += 32) ((uint4*)&tiles)[i] = make_uint4(0, 0, 0, 0);
    __syncwarp();

    const auto key_at = [&](int i) {  // of the slot of this lane in the warp's tile i
        const i64 slot = (i * 4 + warp) * 16ll + lane % 16;
        const int key = slot < K ? list[t * K + slot] : -1;
        return key < S ? key : -1;
    };
    const auto copy = [&](auto& tile, const bf16* from, int width, int key) {
        UNROLL for (int j = 0; j < width / 16 + width % 16 / 8; j++) {
            const int chunk = j * 32 + lane, row = chunk / (width / 8), column = chunk % (width / 8);
            const int own = __shfl_sync(ALL, key, row % 16);
            const unsigned to = cvta_shared(&tile[row % 16]) + swizzled(row % 16, column);
            if (row < 16) cp_async<16>(to, from + (max(own, 0) * G + group) * width + column * 8, own >= 0);
        }
    };
    const auto fetch = [&](int i, int key) {
        copy(tiles.k[i % 2], k, D, key), copy(tiles.v[i % 2], v, DV, key);
        cp_async_commit_group();
    };
    float sum[STEPS][4] = {};  // dq^T [D, 8 heads]
    int key = key_at(0), next;
    fetch(0, key);
    const int count = (K + 63) / 64;
    for (int i = 0; i < count; i++, key = next) {
        fetch(i + 1, next = key_at(i + 1));
        cp_async_wait_group<1>();
        __syncwarp();
        const unsigned k_tile = cvta_shared(tiles.k[i % 2]), v_tile = cvta_shared(tiles.v[i % 2]);
        float s[4] = {}, dp[4] = {};
        multiply(s, k_tile, 2 * ROW, q_b), multiply(dp, v_tile, 2 * VROW, dout_b);
        unsigned p_a[2], ds_a[2];  // of keys lane / 4 and lane / 4 + 8
        UNROLL for (int e = 0; e < 2; e++) {
            const int own = __shfl_sync(ALL, key, lane / 4 + e * 8);
            float p[2], ds[2];
            for (int h = 0; h < 2; h++) {
                p[h] = own < 0 ? 0 : __expf(c * s[2 * e + h] - norm[h].x);
                ds[h] = own < 0 ? 0 : c * p[h] * (dp[2 * e + h] - norm[h].y);
            }
            p_a[e] = cvt_rn_x2(p[0], p[1], bf16()), ds_a[e] = cvt_rn_x2(ds[0], ds[1], bf16());
            const int slot = (i * 4 + warp) * 16 + lane / 4 + e * 8;
            unsigned* const to = (unsigned*)pairs + i64(slot) * apart;
            if (pairs && slot < K) to[0] = ds_a[e], to[4] = p_a[e];
        }
        const unsigned b[2] = {movmatrix_trans(ds_a[0]), movmatrix_trans(ds_a[1])};
        UNROLL for (int j = 0; j < STEPS; j++) {  // dq^T += k^T ds
            unsigned a[4];
            const int row = lane / 16 * 8 + lane % 8;
            ldmatrix_x4_trans(a, k_tile + row * 2 * ROW + swizzled(row, j * 2 + lane / 8 % 2));
            mma_m16n8k16(sum[j], a, b[0], b[1], bf16());
        }
        __syncwarp();  // nobody reads this tile any more
    }
    cp_async_wait_all();
    __syncthreads();
    float* all = (float*)shared;  // [4 warps][8 heads][D]
    UNROLL for (int j = 0; j < STEPS; j++)
        for (int e = 0; e < 4; e++) {
            const int d = j * 16 + lane / 4 + e / 2 * 8;
            if (d < D) all[(warp * 8 + lane % 4 * 2 + e % 2) * D + d] = sum[j][e];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * D; i += 128)
        dq[first * D + i] = __float2bfloat16_rn(all[i] + all[8 * D + i] + all[16 * D + i] + all[24 * D + i]);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attend_backward_keys_mma       sparse_attention_backward: what heads of all queries bring to a tile of keys
//     dk[key] = sum ds q,  dv[key] = sum p dout;  TIED: both in one row, dv in its first values
// in    q [M, H, D], dout [M, H, DV] bf16; rows [M, K] i32; pairs bf16, ds and p of each slot: TIED
//       [M, K, 2, 32], of up to 32 heads, else [M, K, G, ceil(H / G / 8), 2, 8]; order [M * K] i64: slots by
//       tile of 128 keys, those of a tile in order; first [tiles + 1] i64: where each tile's begin
// out   sums [SEGMENTS, S, G, TIED ? D : D + DV] f32 of as many parts of a tile's slots, every element written
// grid  tiles * SEGMENTS * G * parts of COLUMNS values, of q, then, unless TIED, of dout   block 2 * COLUMNS
// smem  struct Stage: 111 KB at 192 COLUMNS, 100 KB at 128
// A group: slots of one query whose keys ascend, so that each stands there once. ds and p of NQ groups, by
// key [128, 64] and mostly zeros, multiply the rows of their heads; 16 keys without any slot are left out.
// cost  of a group: COLUMNS * 32 bytes of L2 (untied half), at most COLUMNS / 8 * 13 cycles of products
#ifdef ATTEND_BACKWARD_KEYS_MMA
constexpr int THREADS = 2 * COLUMNS, NQ = TIED ? 4 : 8, OWN = 64 / NQ, WIDE = TIED ? 32 : 8;
constexpr int EACH = 640 / THREADS, WINDOW = EACH * THREADS;  // slots at a time, of a thread and of the block
constexpr int Q_PARTS = (D + COLUMNS - 1) / COLUMNS, WIDTH = TIED ? D : D + DV;
constexpr int PARTS = Q_PARTS + (TIED ? 0 : (DV + COLUMNS - 1) / COLUMNS);
struct alignas(16) Stage {
    bf16 a[3][128][64 + 8], b[2][64][COLUMNS + 8];  // padded, so that ldmatrix touches all banks
    unsigned some[3][4], slot[WINDOW];              // some: which 16s of keys have slots in 16 columns of a
    int query[WINDOW], place[WINDOW], starts[THREADS / 32];
};
static_assert(sizeof(Stage) == (55359 + 256 * COLUMNS + 2048 + 12 * WINDOW + THREADS / 8 & ~15), "dsa.py asks");

KERNEL(THREADS, TIED ? 1 : 4 - COLUMNS / 64) attend_backward_keys_mma(const bf16* q, const bf16* dout,
        const int* rows, const bf16* pairs, const i64* order, const i64* first, float* sums, i64 S, i64 H,
        i64 G, i64 K) {
    extern __shared__ __align__(128) char shared[];
    Stage& stage = *(Stage*)shared;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, part = blockIdx.x % PARTS;
    const int g = blockIdx.x / PARTS % (int)G, at = blockIdx.x / (PARTS * (int)G);
    const int segment = at % SEGMENTS, tile = at / SEGMENTS, r = H / G, rounds = (r + 7) / 8;
    const int side = part >= Q_PARTS, column = (part - side * Q_PARTS) * COLUMNS;
    const i64 base = first[tile], count = first[tile + 1] - base;  // of slots, in all less than 2**31
    const int start = base + count * segment / SEGMENTS, end = base + count * (segment + 1) / SEGMENTS;
    const int own_tile = warp % 2 * 4, own_column = warp / 2 * 32;  // a warp has 64 keys, 32 columns
    float sum[4][4][4] = {};
    const auto clear = [&](int i, int stages) {
        for (int x = tid; x < stages * 128 * 9; x += THREADS) ((uint4*)stage.a[i])[x] = make_uint4(0, 0, 0, 0);
        if (tid < stages * 4) stage.some[i][tid] = 0;
    };
    for (int round = 0; round < rounds; round++) {
        const int head = g * r + round * 8, heads = min(8, r - round * 8);
        for (int begin = start; begin < end; begin += WINDOW) {
            // 1. Where this thread's slots stand, and which groups of the window begin with them
            const int own = begin + tid * EACH;
            unsigned slot[EACH];
            int row[EACH], group[EACH], starts = 0;
            unsigned last = tid && own < end ? order[own - 1] : 0;
            int last_key = tid && own < end ? rows[last] : 0;
            UNROLL for (int j = 0; j < EACH; j++) {
                const bool there = own + j < end;
                slot[j] = there ? order[own + j] : last;
                const int key = there ? rows[slot[j]] : 0;
                row[j] = there && (unsigned)key < S && key / 128 == tile ? key % 128 : -1;
                const bool as_before = slot[j] / (unsigned)K == last / (unsigned)K && key > last_key;
                group[j] = starts += there && !(tid + j && as_before);
                last = slot[j], last_key = key;
            }
            int before = starts;  // .. of the warp's lanes up to this one
            for (int d = 1; d < 32; d *= 2) {
                const int x = __shfl_up_sync(ALL, before, d);
                before += lane >= d ? x : 0;
            }
            __syncthreads();  // the window before is done
            if (lane == 31) stage.starts[warp] = before;
            clear(0, 3);
            __syncthreads();
            int groups = 0;
            before -= starts + 1;  // groups count from 0
            for (int w = 0; w < THREADS / 32; w++) {
                before += w < warp ? stage.starts[w] : 0;
                groups += stage.starts[w];
            }
            UNROLL for (int j = 0; j < EACH; j++) {
                const int i = before + group[j];
                if (group[j] > (j ? group[j - 1] : 0)) stage.query[i] = slot[j] / (unsigned)K;
                stage.slot[j * THREADS + tid] = slot[j];
                stage.place[j * THREADS + tid] = row[j] < 0 ? -1 : i * 128 + row[j];
            }
            __syncthreads();
            // 2. NQ groups at a time: while they are multiplied, the next come
            const auto fetch = [&](int i) {
                UNROLL for (int j = 0; j < EACH; j++) {
                    const int x = j * THREADS + tid, place = stage.place[x], row = place % 128;
                    const int n = place / 128 - i * NQ;
                    if (place < 0 || n < 0 || n >= NQ) continue;
                    const i64 slot = stage.slot[x], unit = TIED ? slot : (slot * G + g) * rounds + round;
                    const bf16* const from = pairs + unit * 2 * WIDE + (TIED ? round : side) * 8;
                    const unsigned to = cvta_shared(&stage.a[i % 3][row][n * OWN]);
                    cp_async<16>(to, from, true);
                    if (TIED) cp_async<16>(to + 16, from + WIDE, true);
                    atomicOr(&stage.some[i % 3][n * OWN / 16], 1u << row / 16);
                }
#pragma unroll 2
                for (int j = 0; j < 4; j++) {
                    const int x = j * THREADS + tid, to = x / (COLUMNS / 8), h = to % 8;
                    const int n = i * NQ + to / OWN, chunk = x % (COLUMNS / 8) * 8, c = column + chunk;
                    const bool of_dout = TIED ? to / 8 % 2 : side;
                    const int width = of_dout ? DV : D;
                    const bool there = n < groups && h < heads && c < width;
                    const i64 from = there ? (stage.query[n] * H + head + h) * width + c : 0;
                    cp_async<16>(cvta_shared(&stage.b[i % 2][to][chunk]), (of_dout ? dout : q) + from, there);
                }
                cp_async_commit_group();
            };
            fetch(0);
            for (int i = 0; i * NQ < groups; i++) {
                cp_async_wait_all();
                __syncthreads();  // and all have multiplied what came before
                if (i > 0) clear((i + 2) % 3, 1);
                if ((i + 1) * NQ < groups) fetch(i + 1);
#pragma unroll 2
                for (int step = 0; step < 4; step++) {
                    const unsigned some = stage.some[i % 3][step] >> own_tile;
                    const bf16* const row = stage.b[i % 2][step * 16 + lane % 16] + own_column + lane / 16 * 8;
                    unsigned b[2][4];
                    for (int x = 0; x < 2; x++) ldmatrix_x4_trans(b[x], cvta_shared(row + x * 16));
                    UNROLL for (int m = 0; m < 4; m++) {
                        if (!(some >> m & 1)) continue;
                        const bf16* const a_row = stage.a[i % 3][(own_tile + m) * 16 + lane % 16] + step * 16;
                        unsigned a[4];
                        ldmatrix_x4(a, cvta_shared(a_row + lane / 16 * 8));
                        for (int x = 0; x < 4; x++)
                            mma_m16n8k16(sum[m][x], a, b[x / 2][x % 2 * 2], b[x / 2][x % 2 * 2 + 1], bf16());
                    }
                }
            }
        }
    }
    UNROLL for (int i = 0; i < 64; i++) {
        const i64 key = tile * 128ll + (own_tile + i / 16) * 16 + lane / 4 + i / 2 % 2 * 8;
        const int c = column + own_column + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
        if (key < S && c < (side ? DV : D))
            sums[((segment * S + key) * G + g) * WIDTH + side * D + c] = sum[i / 16][i / 4 % 4][i % 4];
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// attention_target                        of each key that a query sees, the mean of its heads' probabilities
//     STEP 0: lse[m,h] = logsumexp_n(scale s[h,n]);   1: target[m,n] = mean_h exp(scale s[h,n] - lse[h])
// in    s = q . k of ACC, query m, head g R + i, key n at m s_query + g s_group + i N + n; rows [M, N] i32
// out   lse [M, H], then target [M, N] of ACC, every element written: 0 where rows are outside [0, S)
// grid  0: M * H, a head of a query, block 32;  1: M * ceil(N / 256), a thread a key, block 256
#ifdef ATTENTION_TARGET
KERNEL(256) attention_target(const ACC* s, const int* rows, ACC* lse, ACC* target, i64 S, i64 N, i64 H, i64 R,
        i64 s_query, i64 s_group, double scale) {
#if STEP == 0
    const i64 m = blockIdx.x / H, h = blockIdx.x % H;
    s += m * s_query + h / R * s_group + h % R * N, rows += m * N;
    lse[blockIdx.x] = lse_of_warp<ACC>(threadIdx.x, 32, N, [&](i64 n) {
        const ACC x = ACC(scale) * s[n];  // read in any case, so that many are on their way
        return (unsigned)rows[n] < S ? x : -ACC(CUDART_INF_F);
    });
#else
    const i64 tiles = (N + 255) / 256, m = blockIdx.x / tiles, n = blockIdx.x % tiles * 256 + threadIdx.x;
    if (n >= N) return;
    s += m * s_query + n, lse += m * H;
    ACC sum = 0;
    for (i64 g = 0; g < H / R; g++)
#pragma unroll 8
        for (int i = 0; i < R; i++) sum += exp(ACC(scale) * s[g * s_group + i * N] - lse[g * R + i]);
    target[m * N + n] = (unsigned)rows[m * N + n] < S ? sum / H : 0;
#endif
}
#endif

// ---------------------------------------------------------------------------------------------------------
// indexer_loss                 of a query, over the keys it sees: the KL of its scores from p, and its slopes
//     STEP 0: I = sum_j w_j relu(r_j), in d_i;   1: loss = sum_n p (log p - log softmax(I)),
//     d_i = softmax(I) sum_n p - p;   2: d_r = d_i w [r > 0],  d_w = sum_n d_i relu(r)
// in    r = index_q . index_k [M, J, N], w [M, J], p [M, N] of ACC; rows [M, N] i32, absent outside [0, S)
// out   d_i [M, N], d_w [M, J] of ACC, d_r [M, J, N] of TYPE, loss [M] f64, every element: 0 where absent
// grid  0: M * ceil(N / 256), a thread a key;  1: M, a query;  2: M * J, a head of a query   block 256
#ifdef INDEXER_LOSS
KERNEL(256) indexer_loss(const ACC* __restrict__ r, const ACC* w, const ACC* p, const int* rows,
        ACC* __restrict__ d_i, ACC* d_w, TYPE* __restrict__ d_r, double* loss, i64 S, i64 N, i64 J) {
    ACC sum = 0;
#if STEP == 0
    const i64 tiles = (N + 255) / 256, m = blockIdx.x / tiles, n = blockIdx.x % tiles * 256 + threadIdx.x;
    if (n >= N) return;
#pragma unroll 8
    for (i64 j = m * J; j < m * J + J; j++) sum += w[j] * relu(r[j * N + n]);
    d_i[m * N + n] = (unsigned)rows[m * N + n] < S ? sum : -ACC(CUDART_INF_F);
#elif STEP == 1
    __shared__ ACC parts[8];
    p += blockIdx.x * N, rows += blockIdx.x * N, d_i += blockIdx.x * N;
    parts[threadIdx.x / 32] = lse_of_warp<ACC>(threadIdx.x, 256, N, [&](i64 n) { return d_i[n]; });
    for (i64 n = threadIdx.x; n < N; n += 256) sum += (unsigned)rows[n] < S ? p[n] : 0;
    const ACC mass = sum_of_block(sum);  // and all parts are there
    const ACC lse = lse_of_warp<ACC>(threadIdx.x % 32, 32, 8, [&](i64 i) { return parts[i]; });
    sum = 0;
    for (i64 n = threadIdx.x; n < N; n += 256) {
        const bool seen = (unsigned)rows[n] < S;
        const ACC x = seen ? p[n] : 0, log_soft = d_i[n] - lse;
        sum += x != 0 ? x * (log(x) - log_soft) : 0;
        d_i[n] = seen ? mass * exp(log_soft) - x : 0;
    }
    loss[blockIdx.x] = sum_of_block(sum);
#else
    const i64 at = blockIdx.x, m = at / J;
#pragma unroll 4
    for (i64 n = threadIdx.x; n < N; n += 256) {
        const ACC x = r[at * N + n], d = d_i[m * N + n];
        const bool on = x > 0 && d != 0;  // else x and the weight may be anything
        sum += on ? d * x : 0;
        d_r[at * N + n] = rounded<TYPE>(on ? d * w[at] : 0);
    }
    d_w[at] = sum_of_block(sum);
#endif
}
#endif

// ---------------------------------------------------------------------------------------------------------
// add_by_key                                       what the slots of many queries bring to their keys, added up
// in    x [M, G, K, width] of WIDE values of ACC; order [M * K], first [S + 1] i64 by slots_by_key of dsa.py
// out   sums [S, G, width] of these grow by it, one row after the other, so that runs agree bit for bit
// grid  S * G  block as many warps as width has, at most 32
#ifdef ADD_BY_KEY
constexpr int LOADS = 8;  // rows on their way at a time
struct alignas(WIDE * sizeof(ACC)) Vec { ACC x[WIDE]; };

KERNEL(1024) add_by_key(const Vec* x, const i64* order, const i64* first, Vec* sums, i64 K, i64 G, i64 width) {
    const i64 key = blockIdx.x / G, g = blockIdx.x % G, begin = first[key], end = first[key + 1];
    if (begin == end) return;
    sums += blockIdx.x * width, x += g * K * width;
    for (int d = threadIdx.x; d < width; d += blockDim.x) {
        Vec sum = sums[d];
        for (i64 i = begin; i < end; i += LOADS) {
            Vec part[LOADS];
            UNROLL for (int l = 0; l < LOADS; l++) {
                const unsigned slot = order[min(i + l, end - 1)];
                const i64 row = G == 1 ? slot : slot + slot / (unsigned)K * (G - 1) * K;
                part[l] = i + l < end ? x[row * width + d] : Vec();
            }
            UNROLL for (int l = 0; l < LOADS; l++)
                UNROLL for (int j = 0; j < WIDE; j++) sum.x[j] += part[l].x[j];
        }
        sums[d] = sum;
    }
}
#endif
