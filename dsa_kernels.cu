// SPDX-License-Identifier: MIT
// dsa_kernels.cu: the CUDA kernels of dsa.py, which compiles and launches them. Copy it beside that file.
//
// Axes and names are dsa.py's. Every array is C-contiguous; batch axes are flattened into one of B entries. A
// kernel stands in an #ifdef of its name, as its constants arrive by -D. Query t of a batch entry sees keys
// from k_start[t] (null: 0) up to k_end[t] (null: offset + t + 1, clipped to [0, S]).

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <math_constants.h>

// ---------------------------------------------------------------------------------------------------------
// Shared helpers
// ---------------------------------------------------------------------------------------------------------

constexpr unsigned ALL = 0xffffffff;  // the lanes of a warp

struct Window {
    long long start, end;
    __device__ bool sees(long long s) const { return start <= s && s < end; }
    __device__ bool meets(long long lo, long long hi) const { return max(start, lo) < min(end, hi); }
};

// The window of query t of batch entry b, from what k_start and k_end hold, or their defaults.
__device__ Window window_of(const int* k_start, const int* k_end, long long b, long long t, long long T,
                            long long S, long long offset) {
    long long end = k_end ? k_end[b * T + t] : min(max(offset + t + 1, 0LL), S);
    return {k_start ? k_start[b * T + t] : 0, end};
}

// PTX, under the ISA's own names

__device__ unsigned cvta_shared(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

template <int BYTES>  // 4, 8 or 16, to which both addresses are aligned
__device__ void cp_async(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                 ::"r"(cvta_shared(shared)), "l"(global), "n"(BYTES) : "memory");
}
__device__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i / 8.
__device__ void ldmatrix_x4(unsigned (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(cvta_shared(row)) : "memory");
}

__device__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// relu as NumPy has it: NaN stays NaN, which fmaxf would make 0.
__device__ float relu(float x) {
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(x) : "f"(x));
    return x;
}
__device__ double relu(double x) { return x < 0 ? 0 : x; }

// Two e4m3 codes to two halves, exact, NaN too; by hardware from sm_89 on.
__device__ unsigned e4m3x2_to_half2(unsigned codes) {
    __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
    return h.x | (unsigned)h.y << 16;
}

// ---------------------------------------------------------------------------------------------------------
// index_scores_fma                                                                      eq. (1) of dsa.py
//     scores[t,s] = sum_j weights[t,j] * relu(index_q[t,j,:] . index_k[s,:]),  -inf outside t's window
// in    index_q [B, T, J, E], index_k [B, S, E], weights [B, T, J] of REAL = float or double; windows [B, T]
// out   scores [B, T, S] REAL, every element written
// grid  B * ceil(T / 8) * ceil(S / KEYS), key tiles fastest
// block 256: a warp a query, a lane OWN keys
// smem  24 KB: 32 values of a tile of keys, and of 8 heads of each warp's query
// cost  2*J*E FLOP a (t,s); bound by FMA, shared memory close behind
// ---------------------------------------------------------------------------------------------------------
#ifdef INDEX_SCORES_FMA
constexpr int OWN = 16 / sizeof(REAL), KEYS = 32 * OWN, HEADS = 8, DEPTH = 32;
static_assert(DEPTH == 32, "a lane, and 8 times 4 warps, each load one value of a key");
struct alignas(16) Vec { REAL x[OWN]; };

extern "C" __global__ void __launch_bounds__(256, 2) index_scores_fma(
        const REAL* index_q, const REAL* index_k, const REAL* weights, const int* k_start, const int* k_end,
        REAL* scores, long long T, long long S, long long J, long long E, long long offset) {
    __shared__ Vec keys[DEPTH][32 + 1];  // [e][lane]: transposed, and padded against bank conflicts
    __shared__ Vec heads[8][HEADS][DEPTH / OWN];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long tiles = (S + KEYS - 1) / KEYS, blocks_t = (T + 7) / 8;
    const long long s0 = blockIdx.x % tiles * KEYS, b = blockIdx.x / tiles / blocks_t;
    const long long t = blockIdx.x / tiles % blocks_t * 8 + warp;
    const Window window = t < T ? window_of(k_start, k_end, b, t, T, S, offset) : Window{0, 0};
    const bool live = __syncthreads_or(window.meets(s0, s0 + KEYS));

    const REAL* q = index_q + (b * T + t) * J * E;
    const REAL* k = index_k + (b * S + s0) * E;
    const int num_keys = min((long long)KEYS, S - s0);
    const int e = lane % 8 + warp % 4 * 8, key = lane / 8 + warp / 4 * 4;  // a warp loads 8 values of 4 keys
    REAL sum[OWN] = {};
    for (long long j0 = 0; j0 < J && live; j0 += HEADS) {
        REAL product[HEADS][OWN] = {};
        for (long long e0 = 0; e0 < E; e0 += DEPTH) {
            __syncthreads();
#pragma unroll 4
            for (int i = 0; i < KEYS / 8; i++) {
                const int s = key + 8 * i;
                keys[e][s / OWN].x[s % OWN] = s < num_keys && e0 + e < E ? k[s * E + e0 + e] : 0;
            }
#pragma unroll
            for (int j = 0; j < HEADS; j++) {
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
        const long long s = s0 + lane * OWN + o;
        if (t < T && s < S) scores[(b * T + t) * S + s] = window.sees(s) ? sum[o] : -(REAL)CUDART_INF;
    }
}
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
// ---------------------------------------------------------------------------------------------------------
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
static_assert(HEADS % 8 == 0, "a fragment of B is 8 heads");
static_assert(TILES <= 4, "each of a quad's four lanes stores one tile");

struct Stage {
    alignas(16) unsigned char heads[HEADS][ROW];
    float weights[HEADS];
};
static_assert(sizeof(Stage) == HEADS * (ROW + 4), "dsa.py asks for two of these");

// The pair of values e, e + 1 of a key as two of the 16 bit type that is multiplied; zero beyond E.
__device__ unsigned key_pair(const ELEMENT* key, int e) {
    if constexpr (E % 2 == 0) {
        if (e >= E) return 0;
        if constexpr (FP8) return e4m3x2_to_half2(*(const unsigned short*)(key + e));
        else return *(const unsigned*)(key + e);
    } else if constexpr (FP8) {
        const unsigned char* codes = (const unsigned char*)key;
        return e4m3x2_to_half2((e < E ? codes[e] : 0) | (e + 1 < E ? codes[e + 1] : 0) << 8);
    } else {
        const unsigned short* bits = (const unsigned short*)key;
        return (e < E ? bits[e] : 0u) | (e + 1 < E ? (unsigned)bits[e + 1] : 0u) << 16;
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) index_scores_mma(
        const ELEMENT* index_q, const ELEMENT* index_k, const float* weights, const int* k_start,
        const int* k_end, float* scores, long long T, long long S, long long offset) {
    extern __shared__ __align__(16) unsigned char shared[];
    Stage* stages = (Stage*)shared;
    __shared__ Window windows[QUERIES];
    __shared__ int live[QUERIES], num_live;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;  // as in PTX
    const long long tiles = (S + KEYS - 1) / KEYS, blocks_t = (T + QUERIES - 1) / QUERIES;
    const long long tile = blockIdx.x % tiles * KEYS, b = blockIdx.x / tiles / blocks_t;
    const long long t0 = blockIdx.x / tiles % blocks_t * QUERIES, s0 = tile + warp * TILES * 16;
    const int queries = min((long long)QUERIES, T - t0);
    const long long first = b * T + t0;  // row of the block's first query

    // List the queries whose windows meet this tile; the others see nothing of it.
    if (threadIdx.x < QUERIES) {
        const bool real = threadIdx.x < queries;
        windows[threadIdx.x] = {0, 0};
        if (real) windows[threadIdx.x] = window_of(k_start, k_end, b, t0 + threadIdx.x, T, S, offset);
    }
    if constexpr (LOADS * SPAN > PITCH)  // cp.async never writes there
        for (int x = threadIdx.x; x < STAGES * HEADS; x += 128)
            for (int y = PITCH * sizeof(ELEMENT); y < LOADS * 64; y++)
                stages[x / HEADS].heads[x % HEADS][y] = 0;
    __syncthreads();
    if (warp == 0) {
        int before = 0;
        for (int t = lane; t < QUERIES; t += 32) {
            const bool meets = windows[t].meets(tile, min(tile + KEYS, S));
            const unsigned who = __ballot_sync(ALL, meets);
            if (meets) live[before + __popc(who & ((1u << lane) - 1))] = t;
            before += __popc(who);
        }
        if (lane == 0) num_live = before;
    }
    __syncthreads();
    if (num_live < queries)
        for (int t = 0; t < queries; t++)
            if (!windows[t].meets(tile, min(tile + KEYS, S)))
                for (long long s = tile + threadIdx.x; s < min(tile + KEYS, S); s += 128)
                    scores[(first + t) * S + s] = -CUDART_INF_F;
    if (num_live == 0) return;

    const auto fetch = [&](int job) {  // heads group job % GROUPS of live query job / GROUPS
        if (job < num_live * GROUPS) {
            Stage& stage = stages[job % STAGES];
            const int j0 = job % GROUPS * HEADS, heads = min(HEADS, J - j0);
            const long long row = (first + live[job / GROUPS]) * J + j0;
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
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const long long s = s0 + 16 * m + 8 * half + g;
            const ELEMENT* key = index_k + (b * S + min(s, S - 1)) * ENTRY;
#pragma unroll
            for (int step = 0; step < DEPTH; step++) {
                keys[m][step][half] = key_pair(key, 16 * step + (FP8 ? 4 * i : 2 * i));
                keys[m][step][half + 2] = key_pair(key, 16 * step + (FP8 ? 4 * i + 2 : 2 * i + 8));
            }
        }
    float scale[2] = {1, 1};  // of the two keys that this lane stores
    if constexpr (FP8)
        for (int half = 0; half < 2; half++) {
            const long long s = min(s0 + 16 * i + 8 * half + g, S - 1);
            const unsigned char* bytes = (const unsigned char*)(index_k + (b * S + s) * ENTRY + E);
            const unsigned low = bytes[0] | bytes[1] << 8, high = bytes[2] | bytes[3] << 8;
            scale[half] = __uint_as_float(low | high << 16);
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
#pragma unroll
                for (int load = 0; load < LOADS; load++) {
                    unsigned heads[4];
                    ldmatrix_x4(heads, &stage.heads[j + lane % 8][load * 64 + lane / 8 * 16]);
#pragma unroll
                    for (int step = 0; step < STEPS; step++) {
                        unsigned head[2] = {heads[2 * step % 4], heads[(2 * step + 1) % 4]};
                        if constexpr (FP8) {
                            head[0] = e4m3x2_to_half2(heads[step] & 0xffff);
                            head[1] = e4m3x2_to_half2(heads[step] >> 16);
                        }
#pragma unroll
                        for (int m = 0; m < TILES; m++)
                            mma_m16n8k16(product[m], keys[m][load * STEPS + step], head, Multiplied());
                    }
                }
#pragma unroll
                for (int c = 0; c < 2; c++) {  // heads j + 2 i and j + 2 i + 1
                    if (J % 8 && group * HEADS + j + 2 * i + c >= J) continue;
                    const float weight = stage.weights[j + 2 * i + c];
#pragma unroll
                    for (int m = 0; m < TILES; m++)
                        for (int half = 0; half < 2; half++)
                            sum[m][half] += weight * relu(product[m][2 * half + c]);
                }
            }
        }
        // The quad adds up its heads; its lane i stores keys g and g + 8 of tile i.
        const int t = live[query];
        float* row = scores + (first + t) * S;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float own = 0;
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                float x = sum[m][half];
                x += __shfl_xor_sync(ALL, x, 1);
                x += __shfl_xor_sync(ALL, x, 2);
                own = m == i ? x : own;
            }
            const long long s = s0 + 16 * i + 8 * half + g;
            if (i < TILES && s < S) row[s] = windows[t].sees(s) ? own * scale[half] : -CUDART_INF_F;
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// select_topk                                                                           eq. (2) of dsa.py
//     the first top_k visible keys of each row in the order (-score, key), ascending, then -1; the first
//     num_sinks and the last local_window of them whatever they score. NaN and -inf are not visible.
// in    scores [B, T, S] REAL = float or double; windows [B, T]
// out   indices [B, T, K] i32, every element written
// grid  B * T    block 512, or, where rows are too few to fill the chip, 1024: one row
// smem  8 KB of counts and CAPACITY candidates: 72 KB in float32, 56 KB in float64
// cost  one read of the row and a sixteenth. A sample gives a score that somewhat more than top_k keys should
//       reach, and those that do are held in shared memory. Where they are too few or too many, the row
//       itself takes their place: it is exact either way.
// ---------------------------------------------------------------------------------------------------------
#ifdef SELECT_TOPK
constexpr int WARPS = BLOCK / 32, DIGIT = 11, BINS = 1 << DIGIT, CAPACITY = 32768 / sizeof(REAL);
constexpr int VEC = BLOCK == 1024 ? 32 / sizeof(REAL) : 4;  // scores that a thread loads at a time
template <int BYTES> struct Bits { using type = unsigned; };
template <> struct Bits<8> { using type = unsigned long long; };
using Rank = Bits<sizeof(REAL)>::type;  // grows with the score, equal for equal scores; 0: not visible
static_assert(BINS % BLOCK == 0, "each thread looks through as many bins");
struct alignas(16) Vec { REAL x[16 / sizeof(REAL)]; };

struct Shared {
    long long place;
    int bins[BINS], sums[2][32];
    int bin, above, equal;
    Rank rank[CAPACITY];
    int key[CAPACITY];
};
static_assert(sizeof(Shared) == 8472 + CAPACITY * (sizeof(REAL) + 4), "dsa.py asks for as much");

__device__ Rank rank_of(REAL x) {
    if (!(x > -(REAL)CUDART_INF)) return 0;
    Rank bits;
    if constexpr (sizeof(REAL) == 8) bits = __double_as_longlong(x);
    else bits = __float_as_uint(x);
    constexpr Rank SIGN = (Rank)1 << (8 * sizeof(REAL) - 1);
    if (bits == SIGN) bits = 0;  // -0.0 is +0.0. Not by x + 0, which may flush denormals
    return bits & SIGN ? ~bits : bits | SIGN;
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
    total = __reduce_add_sync(ALL, sum);
    return __reduce_add_sync(ALL, lane < warp ? sum : 0) + upto - x;
}

// The need-th largest of the words that word(i) gives for i < n, 0 apart, in as many of their leading bits as
// asked for, 11 at a time: all words >= at are `need` and, where the last ones tie, `excess` more.
template <class Word> struct Cut { Word at; int need, excess; };

template <class Word, class Words>
__device__ Cut<Word> nth_largest(Shared& sh, long long n, int need, int leading, Words word) {
    Word prefix = 0, known = 0;
    int equal = need;
    for (int bits = 8 * sizeof(Word); bits > 8 * (int)sizeof(Word) - leading; bits -= DIGIT) {
        const int shift = max(bits - DIGIT, 0);
        for (int x = threadIdx.x; x < BINS; x += BLOCK) sh.bins[x] = 0;
        if (threadIdx.x == 0) sh.bin = -1;
        __syncthreads();
        for (long long x = threadIdx.x; x - threadIdx.x % 32 < n; x += BLOCK) {
            const Word w = x < n ? word(x) : 0;
            const bool counts = w != 0 && (w & known) == prefix;
            const unsigned digit = (unsigned)(w >> shift) & ((1u << (bits - shift)) - 1);
            const unsigned who = __ballot_sync(ALL, counts), leader = __ffs(who) - 1;
            if (who == 0) continue;
            const bool alike = digit == __shfl_sync(ALL, digit, leader);  // then one lane counts for all
            if (!__all_sync(ALL, alike || !counts)) {
                if (counts) atomicAdd(&sh.bins[digit], 1);
            } else if (threadIdx.x % 32 == leader)
                atomicAdd(&sh.bins[digit], __popc(who));
        }
        __syncthreads();
        constexpr int OWN = BINS / BLOCK;
        const int top = BINS - 1 - threadIdx.x * OWN;  // from the largest digit down
        int mine = 0, total;
        for (int x = 0; x < OWN; x++) mine += sh.bins[top - x];
        int above = sum_before(sh, mine, 0, total);
        if (above < need && need <= above + mine)
            for (int x = 0; x < OWN; x++) {
                const int count = sh.bins[top - x];
                if (above < need && need <= above + count) {
                    sh.bin = top - x;
                    sh.above = above;
                    sh.equal = count;
                }
                above += count;
            }
        __syncthreads();
        if (sh.bin < 0) return {1, need, 0};  // there are not as many words: all of them
        prefix |= (Word)sh.bin << shift;
        known |= (Word)((1u << (bits - shift)) - 1) << shift;
        need -= sh.above;
        equal = sh.equal;
        __syncthreads();
        if (equal == need) break;
    }
    return {prefix ? prefix : 1, need, equal - need};
}

// Put what keep(rank, x) accepts of the positions begin <= x < end behind the `placed` that are, in order.
template <class Load, class Keep, class Put>
__device__ int compact(Shared& sh, long long begin, long long end, int placed, Load load, Keep keep,
                       Put put) {
    int turn = 0, total;
    __syncthreads();
    Rank next[VEC];
    if (begin < end) load(begin + threadIdx.x * VEC, next);
    for (long long x = begin + threadIdx.x * VEC; x - threadIdx.x * VEC < end; x += BLOCK * VEC, turn ^= 1) {
        Rank now[VEC];
        unsigned kept = 0;
        for (int v = 0; v < VEC; v++) {
            now[v] = next[v];
            kept |= (unsigned)keep(now[v], x + v) << v;
        }
        load(x + BLOCK * VEC, next);  // on its way while the threads wait for each other
        int place = placed + sum_before(sh, __popc(kept), turn, total);
        for (int v = 0; v < VEC; v++)
            if (kept >> v & 1) put(place++, x + v, now[v]);
        placed += total;
    }
    return placed;
}

// Where the first `need` visible keys of begin..end end, or, from behind, where the last `need` begin.
__device__ long long nth_visible(Shared& sh, const REAL* row, long long begin, long long end, int need,
                                 bool behind) {
    int turn = 0, seen = 0, total;
    if (need == 0) return behind ? end : begin;
    for (long long x = threadIdx.x; x - threadIdx.x < end - begin; x += BLOCK, turn ^= 1) {
        const long long s = behind ? end - 1 - x : begin + x;
        const bool visible = x < end - begin && rank_of(row[s]);
        const int before = seen + sum_before(sh, visible, turn, total);
        if (visible && before == need - 1) sh.place = behind ? s : s + 1;
        seen += total;
        if (seen >= need) {
            __syncthreads();
            const long long place = sh.place;
            __syncthreads();
            return place;
        }
    }
    __syncthreads();
    return behind ? begin : end;
}

constexpr int RESIDENT = BLOCK == 1024 ? 1 : sizeof(REAL) == 8 ? 2 : 3;  // blocks on a multiprocessor

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) select_topk(
        const REAL* scores, const int* k_start, const int* k_end, int* indices, long long T, long long S,
        long long K, long long offset, long long top_k, long long local_window, long long num_sinks) {
    extern __shared__ __align__(16) unsigned char bytes[];
    Shared& sh = *(Shared*)bytes;
    const REAL* row = scores + (long long)blockIdx.x * S;
    int* out = indices + (long long)blockIdx.x * K;
    const Window window = window_of(k_start, k_end, blockIdx.x / T, blockIdx.x % T, T, S, offset);
    const long long start = window.start, end = max(start, window.end);

    // Forced keys are those below `head` and from `tail` on; the middle is ranked for what top_k leaves.
    const long long head = nth_visible(sh, row, start, end, num_sinks, false);
    const long long tail = nth_visible(sh, row, head, end, local_window, true), middle = tail - head;
    const int need = min(top_k - num_sinks - local_window, S);

    const auto load_row = [&](long long lo, long long hi) {
        return [=](long long x, Rank* ranks) {
            constexpr int WIDTH = 16 / sizeof(REAL);
            if (lo <= x && x + VEC <= hi && (size_t)(row + x) % 16 == 0) {
                for (int v = 0; v < VEC; v += WIDTH) {
                    const Vec vec = *(const Vec*)(row + x + v);
                    for (int w = 0; w < WIDTH; w++) ranks[v + w] = rank_of(vec.x[w]);
                }
            } else
                for (int v = 0; v < VEC; v++) ranks[v] = lo <= x + v && x + v < hi ? rank_of(row[x + v]) : 0;
        };
    };
    const auto aligned = [&](long long x) { return x - (long long)((size_t)(row + x) / sizeof(REAL) % VEC); };
    const auto put_key = [&](int place, long long s, Rank) { out[place] = (int)s; };
    const auto visible = [](Rank rank, long long) { return rank > 0; };

    Rank at = 1;        // the least rank that is kept
    unsigned last = 0;  // and, where it ties, the least ~key
    int held = -1;      // candidates in shared memory, -1: the row itself
    if (need == 0) at = ~(Rank)0;
    else if (middle > need) {
        // The least rank of a candidate, from runs of 8 keys in every 128.
        const int sampled = need / 16 + 4 * (int)sqrtf(need / 16) + 4;
        Rank floor = 1;
        if (middle > CAPACITY || middle > 32 * sampled) {
            const auto sample = [&](long long x) { return rank_of(row[head + x / 8 * 128 + x % 8]); };
            if (sampled * 16 < CAPACITY)
                floor = nth_largest<Rank>(sh, middle / 128 * 8, sampled, 22, sample).at;
        }
        if (middle <= CAPACITY || sampled * 16 < CAPACITY) {
            held = compact(sh, aligned(head), tail, 0, load_row(head, tail),
                           [=](Rank rank, long long) { return rank >= floor; },
                           [&](int place, long long s, Rank rank) {
                               if (place >= CAPACITY) return;
                               sh.rank[place] = rank;
                               sh.key[place] = (int)s;
                           });
            if (held > CAPACITY || (held < need && floor > 1)) held = -1;
            __syncthreads();
        }
        const auto cut_at = [&](long long n, auto rank, auto key) {
            const Cut<Rank> cut = nth_largest<Rank>(sh, n, need, 8 * sizeof(Rank), rank);
            at = cut.at;
            if (cut.excess == 0) return;
            const auto tied = [&](long long x) { return rank(x) == at ? ~(unsigned)key(x) : 0; };
            last = nth_largest<unsigned>(sh, n, cut.need, 32, tied).at;
        };
        if (held >= 0)
            cut_at(held, [&](long long x) { return sh.rank[x]; }, [&](long long x) { return sh.key[x]; });
        else
            cut_at(middle, [&](long long x) { return rank_of(row[head + x]); },
                   [&](long long x) { return head + x; });
    }
    const auto best = [&](Rank rank, long long s) {
        return rank > at || (rank > 0 && rank == at && ~(unsigned)s >= last);
    };

    int placed = compact(sh, aligned(start), head, 0, load_row(start, head), visible, put_key);
    if (held < 0) placed = compact(sh, aligned(head), tail, placed, load_row(head, tail), best, put_key);
    else {
        const auto load = [&](long long x, Rank* ranks) {
            for (int v = 0; v < VEC; v++) ranks[v] = x + v < held ? sh.rank[x + v] : 0;
        };
        placed = compact(sh, 0, held, placed, load,
                         [&](Rank rank, long long x) { return rank > 0 && best(rank, sh.key[x]); },
                         [&](int place, long long x, Rank) { out[place] = sh.key[x]; });
    }
    placed = compact(sh, aligned(tail), end, placed, load_row(tail, end), visible, put_key);
    for (long long x = placed + threadIdx.x; x < K; x += BLOCK) out[x] = -1;
}
#endif
