// CPU emulation of ptx.cuh: every CUDA thread of a block is a fiber; warp / warpgroup instructions are rendezvous
// points where the last arriver computes the result for all; asynchronous copies and wgmma may be executed at once
// ("eager"), as late as their wait allows ("lazy"), or at a random moment, so missing waits and early reuse show up.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>
#define PRIM static inline
#define MEMBER inline
#define KERNEL(threads, minblocks) extern "C" void
#define __grid_constant__
#define UNROLL
#define PARAM const
#define INF (__builtin_inff())
#define DYN_SMEM(name) uint8_t* const name = cpu::blk->smem
typedef uint16_t bf16_t;
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
#ifndef __x86_64__
#error "add a switch for this ISA (or use ucontext)"
#endif
extern "C" void shim_switch(void** save_sp, void* load_sp);
#ifdef SHIM_IMPL
asm(".text\n.globl shim_switch\n.type shim_switch,@function\nshim_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#endif
namespace cpu {
enum Mode { EAGER, LAZY, RANDOM };
[[noreturn]] inline void die(const char* what);
struct Fiber {
    void* sp;
    std::unique_ptr<uint8_t[]> stack;
    dim3 tid;
    int id;
    bool done = false;
    const unsigned* wp = nullptr;
    unsigned wv = 0;
    const char* why = "";  // blocked while *wp == wv
    std::vector<std::function<void()>> cp_open;
    std::deque<std::vector<std::function<void()>>> cp_groups;
};
struct Group {
    int n = 0, arrived = 0;
    unsigned gen = 0;
    const void* op = nullptr;
    void* slot[1024];
};
struct MBar {
    unsigned expected = 0, pending = 0, phase = 0;
    long tx = 0;
};
struct WgState {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> groups;
};
struct Block {
    dim3 grid, bdim, bid;
    uint8_t* smem;
    size_t smem_size;
    int nthr;
    std::vector<Fiber> fib;
    void* main_sp;
    std::vector<Group> warp, wgroup;
    Group bar[17];
    std::vector<WgState> wg;
    std::map<uint32_t, MBar> mbar;
    std::deque<std::function<void()>> async;
    Mode mode;
    uint64_t rng;
    std::function<void()>* body;
    int remaining;
    uint64_t switches = 0;
    bool hop = false;  // let any warp run next
    bool now() { return mode == EAGER || (mode == RANDOM && (rnd() & 1)); }
    uint32_t rnd() {
        rng ^= rng << 13;
        rng ^= rng >> 7;
        rng ^= rng << 17;
        return (uint32_t)(rng >> 16);
    }
};
inline thread_local Block* blk;
inline thread_local Fiber* cur;
[[noreturn]] inline void die(const char* what) {
    std::fprintf(stderr, "cpu_shim: %s (block %u,%u,%u", what, blk->bid.x, blk->bid.y, blk->bid.z);
    if (cur)
        std::fprintf(stderr, ", thread %d", cur->id);
    std::fprintf(stderr, ")\n");
    std::exit(3);
}
#define SHIM_CHECK(c, msg) \
    do {                   \
        if (!(c))          \
            cpu::die(msg); \
    } while (0)
inline void yield() { shim_switch(&cur->sp, blk->main_sp); }
inline void wait_while(const unsigned* p, unsigned v, const char* why) {
    while (*p == v) {
        cur->wp = p;
        cur->wv = v;
        cur->why = why;
        yield();
    }
    cur->wp = nullptr;
}
// all n threads of g meet here with an argument each; the last one runs fn(slots)
template <class Fn>
inline void meet(Group& g, int n, int rank, const void* op, void* arg, const char* why, Fn fn) {
    if (g.arrived == 0) {
        g.op = op;
        g.n = n;
    }
    SHIM_CHECK(g.op == op && g.n == n, "threads of one warp/warpgroup/barrier are at different instructions");
    g.slot[rank] = arg;
    const unsigned gen = g.gen;
    if (++g.arrived == n) {
        g.arrived = 0;
        fn(g.slot);
        g.gen++;
    } else
        wait_while(&g.gen, gen, why);
}
inline uint8_t* sm(uint32_t a, uint32_t n, uint32_t align) {
    SHIM_CHECK(a % align == 0, "misaligned shared-memory address");
    SHIM_CHECK((size_t)a + n <= blk->smem_size, "shared-memory access out of bounds");
    return blk->smem + a;
}
inline float bf(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline uint16_t to_bf(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000)
        return 0x7fff;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void tramp() {
    (*blk->body)();
    cur->done = true;
    blk->remaining--;
    for (;;)
        yield();
}
inline void run_block(Block& b, std::function<void()>& body) {
    blk = &b;
    b.body = &body;
    b.nthr = b.bdim.x * b.bdim.y * b.bdim.z;
    b.remaining = b.nthr;
    b.fib = std::vector<Fiber>(b.nthr);
    b.warp.assign((b.nthr + 31) / 32, {});
    b.wgroup.assign((b.nthr + 127) / 128, {});
    b.wg.assign((b.nthr + 31) / 32, {});
    const size_t SS = 64 << 10;
    for (int i = 0; i < b.nthr; i++) {
        Fiber& f = b.fib[i];
        f.id = i;
        f.tid = {i % b.bdim.x, i / b.bdim.x % b.bdim.y, i / (b.bdim.x * b.bdim.y)};
        f.stack.reset(new uint8_t[SS]);
        uintptr_t top = ((uintptr_t)f.stack.get() + SS) & ~(uintptr_t)15;
        void** sp = (void**)top;
        *--sp = nullptr;
        *--sp = (void*)tramp;
        for (int k = 0; k < 6; k++)
            *--sp = nullptr;
        f.sp = sp;
    }
    const int nw = (int)b.warp.size();
    // Not always the first warp: what others must wait for it to write would always be there.
    int w = b.mode == EAGER ? 0 : b.mode == LAZY ? nw - 1 : (int)(b.rnd() % nw);
    auto run_async = [&] {
        const size_t k = b.mode == RANDOM ? b.rnd() % b.async.size() : 0;
        auto op = std::move(b.async[k]);
        b.async.erase(b.async.begin() + k);
        op();
    };
    while (b.remaining) {  // RANDOM lets one warp run on for a while, so that it gets far ahead of the others
        bool ran = false;
        for (int n = 0, ww = w; n < nw && !ran; n++, ww = (ww + 1) % nw) {
            for (int i = ww * 32; i < ww * 32 + 32 && i < b.nthr; i++) {
                Fiber& f = b.fib[i];
                if (f.done || (f.wp && *f.wp == f.wv))
                    continue;
                cur = &f;
                b.switches++;
                shim_switch(&b.main_sp, f.sp);
                cur = nullptr;
                ran = true;
            }
            if (ran)
                w = b.mode != RANDOM ? (ww + 1) % nw : !b.hop && b.rnd() % 32 ? ww : b.rnd() % nw;
            b.hop = false;
        }
        if (!b.async.empty() && (!ran || (b.mode == RANDOM && b.rnd() % 64 == 0))) {
            run_async();
            ran = true;
        }
        if (!ran && b.remaining) {
            for (auto& f : b.fib)
                if (!f.done && (f.id % 32 == 0))
                    std::fprintf(stderr, "  thread %d waits: %s\n", f.id, f.why);
            die("deadlock");
        }
    }
    SHIM_CHECK(b.async.empty(), "block ended with copies in flight");
    for (auto& g : b.wg)
        SHIM_CHECK(g.open.empty() && g.groups.empty(), "block ended with wgmma in flight");
}
struct Stats {
    std::atomic<uint64_t> switches{0};
};
template <class F>
inline void launch(dim3 grid, dim3 bdim, size_t smem, F body, Mode mode = EAGER, uint64_t seed = 1, int nthreads = 1,
                   Stats* st = nullptr) {
    std::atomic<uint64_t> next{0};
    const uint64_t total = (uint64_t)grid.x * grid.y * grid.z;
    auto work = [&] {
        std::unique_ptr<uint8_t[]> raw(new uint8_t[smem + 1024]);
        uint8_t* base = (uint8_t*)(((uintptr_t)raw.get() + 1023) & ~(uintptr_t)1023);
        std::function<void()> fn = body;
        for (uint64_t i; (i = next++) < total;) {
            Block b;
            b.grid = grid;
            b.bdim = bdim;
            b.bid = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                     (unsigned)(i / ((uint64_t)grid.x * grid.y))};
            b.smem = base;
            b.smem_size = smem;
            b.mode = mode;
            b.rng = (seed + i) * 0x9E3779B97F4A7C15ull | 1;
            std::memset(base, 0xFF, smem);  // 0xFFFF is a bf16 NaN
            run_block(b, fn);
            if (st)
                st->switches += b.switches;
        }
    };
    std::vector<std::thread> ts;
    for (int t = 1; t < nthreads; t++)
        ts.emplace_back(work);
    work();
    for (auto& t : ts)
        t.join();
}
inline Group& my_warp() { return blk->warp[cur->id >> 5]; }
inline Group& my_wg() { return blk->wgroup[cur->id >> 7]; }
inline void asyncly(std::function<void()> op) {
    if (blk->mode == EAGER)
        op();
    else
        blk->async.push_back(std::move(op));
}
inline void mbar_check(uint32_t a) {
    MBar& m = blk->mbar[a];
    if (m.pending == 0 && m.tx == 0) {
        m.phase ^= 1;
        m.pending = m.expected;
    }
}
inline MBar& mb(uint32_t a) {
    auto it = blk->mbar.find(a);
    SHIM_CHECK(it != blk->mbar.end(), "mbarrier used before init");
    return it->second;
}
}  // namespace cpu
#define threadIdx (cpu::cur->tid)
#define blockIdx (cpu::blk->bid)
#define blockDim (cpu::blk->bdim)
#define gridDim (cpu::blk->grid)
#define SHIM_OP                   \
    ([]() -> const void* {        \
        static const char id = 0; \
        return &id;               \
    }())

PRIM int thread_here() { return (int)threadIdx.x; }
PRIM uint32_t smem_u32(const void* p) { return (uint32_t)((const uint8_t*)p - cpu::blk->smem); }
PRIM void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
    struct A {
        uint32_t* r;
        uint32_t a;
    } me{r, a};
    cpu::meet(cpu::my_warp(), 32, cpu::cur->id & 31, SHIM_OP, &me, "ldmatrix", [](void** s) {
        for (int m = 0; m < 4; m++)
            for (int row = 0; row < 8; row++) {
                const uint8_t* p = cpu::sm(((A*)s[m * 8 + row])->a, 16, 16);
                for (int q = 0; q < 4; q++)
                    std::memcpy(&((A*)s[row * 4 + q])->r[m], p + q * 4, 4);
            }
    });
}
PRIM void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
    struct A {
        uint32_t* r;
        uint32_t a;
    } me{r, a};
    cpu::meet(cpu::my_warp(), 32, cpu::cur->id & 31, SHIM_OP, &me, "ldmatrix.trans", [](void** s) {
        for (int m = 0; m < 4; m++)
            for (int row = 0; row < 8; row++) {
                const uint8_t* p = cpu::sm(((A*)s[m * 8 + row])->a, 16, 16);
                for (int column = 0; column < 8; column++)
                    std::memcpy((uint8_t*)&((A*)s[column * 4 + row / 2])->r[m] + row % 2 * 2, p + column * 2, 2);
            }
    });
}
namespace cpu {
// Inputs are 16 bits wide, read by `number`. Sums are float32: the order of a tensor core's is its own affair.
template <float (*number)(uint16_t)>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const void* op) {
    struct M {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } me{d, a, {b0, b1}};
    meet(my_warp(), 32, cur->id & 31, op, &me, "mma", [](void** s) {
        float A[16][16], B[16][8], D[16][8];
        for (int l = 0; l < 32; l++) {
            M* t = (M*)s[l];
            int g = l >> 2, q = (l & 3) * 2;
            for (int r = 0; r < 4; r++)
                for (int h = 0; h < 2; h++)
                    A[g + (r & 1) * 8][q + (r >> 1) * 8 + h] = number((uint16_t)(t->a[r] >> (16 * h)));
            for (int r = 0; r < 2; r++)
                for (int h = 0; h < 2; h++)
                    B[q + r * 8 + h][g] = number((uint16_t)(t->b[r] >> (16 * h)));
            for (int r = 0; r < 4; r++)
                D[g + (r >> 1) * 8][q + (r & 1)] = t->d[r];
        }
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++)
                for (int j = 0; j < 8; j++)
                    D[i][j] += A[i][k] * B[k][j];
        for (int l = 0; l < 32; l++) {
            M* t = (M*)s[l];
            int g = l >> 2, q = (l & 3) * 2;
            for (int r = 0; r < 4; r++)
                t->d[r] = D[g + (r >> 1) * 8][q + (r & 1)];
        }
    });
}
inline float half(uint16_t bits) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return (float)h;
}
}  // namespace cpu
PRIM void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cpu::mma_16x8x16<cpu::bf>(d, a, b0, b1, SHIM_OP);
}
PRIM void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cpu::mma_16x8x16<cpu::half>(d, a, b0, b1, SHIM_OP);
}
PRIM void cp_async16(uint32_t dst, const void* src) {
    uint8_t* p = cpu::sm(dst, 16, 16);
    SHIM_CHECK(((uintptr_t)src & 15) == 0, "cp.async source not 16-byte aligned");
    auto op = [p, src] { std::memcpy(p, src, 16); };
    if (cpu::blk->now())
        op();
    else
        cpu::cur->cp_open.push_back(op);
}
PRIM void cp_async16_zfill(uint32_t dst, const void* src, int bytes) {
    uint8_t* p = cpu::sm(dst, 16, 16);
    SHIM_CHECK(((uintptr_t)src & 15) == 0, "cp.async source not 16-byte aligned");
    SHIM_CHECK(bytes >= 0 && bytes <= 16, "cp.async of more than 16 bytes");
    auto op = [p, src, bytes] {
        std::memset(p, 0, 16);
        std::memcpy(p, src, bytes);
    };
    if (cpu::blk->now())
        op();
    else
        cpu::cur->cp_open.push_back(op);
}
template <int BYTES>
PRIM void cp_async_small_zfill(uint32_t dst, const void* src, int bytes) {
    static_assert(BYTES == 4 || BYTES == 8, "cp.async.ca of 4 or 8 bytes");
    uint8_t* p = cpu::sm(dst, BYTES, BYTES);
    SHIM_CHECK(((uintptr_t)src & (BYTES - 1)) == 0, "cp.async source not aligned");
    SHIM_CHECK(bytes >= 0 && bytes <= BYTES, "cp.async of more bytes than it has");
    auto op = [p, src, bytes] {
        std::memset(p, 0, BYTES);
        std::memcpy(p, src, bytes);
    };
    if (cpu::blk->now())
        op();
    else
        cpu::cur->cp_open.push_back(op);
}
PRIM void cp_async_commit() {
    cpu::cur->cp_groups.push_back(std::move(cpu::cur->cp_open));
    cpu::cur->cp_open.clear();
}
template <int N>
PRIM void cp_async_wait() {
    auto& g = cpu::cur->cp_groups;
    while ((int)g.size() > N) {
        for (auto& op : g.front())
            op();
        g.pop_front();
    }
}
PRIM void named_bar_sync(int id, int n) {
    cpu::meet(cpu::blk->bar[id], n, 0, &cpu::blk->bar[id], nullptr, "bar.sync", [](void**) {});
}
// Counts its threads and goes on; whoever syncs at the same barrier waits for them.
PRIM void named_bar_arrive(int id, int n) {
    cpu::Group& g = cpu::blk->bar[id];
    if (g.arrived == 0) {
        g.op = &g;
        g.n = n;
    }
    SHIM_CHECK(g.n == n, "a barrier with two counts of threads");
    if (++g.arrived == n) {
        g.arrived = 0;
        g.gen++;
    }
}
PRIM void block_sync() { named_bar_sync(16, cpu::blk->nthr); }
PRIM float shfl_xor(float v, int m) {
    struct S {
        float v, r;
        int m;
    } me{v, 0, m};
    cpu::meet(cpu::my_warp(), 32, cpu::cur->id & 31, SHIM_OP, &me, "shfl", [](void** s) {
        for (int l = 0; l < 32; l++)
            ((S*)s[l])->r = ((S*)s[l ^ ((S*)s[l])->m])->v;
    });
    return me.r;
}
PRIM float ex2(float x) { return std::exp2(x); }
PRIM float fmax_(float a, float b) { return a > b ? a : b; }
PRIM uint32_t pack_bf16(float lo, float hi) { return cpu::to_bf(lo) | (uint32_t)cpu::to_bf(hi) << 16; }
PRIM uint32_t pack_f16(float lo, float hi) {
    const _Float16 h[2] = {(_Float16)lo, (_Float16)hi};
    uint32_t bits;
    std::memcpy(&bits, h, 4);
    return bits;
}
// ---- Hopper ----
PRIM void mbar_init(uint32_t b, uint32_t n) {
    cpu::sm(b, 8, 8);
    cpu::blk->mbar[b] = cpu::MBar{n, n, 0, 0};
}
PRIM void mbar_arrive(uint32_t b) {
    auto& m = cpu::mb(b);
    SHIM_CHECK(m.pending > 0, "mbarrier arrived too often");
    m.pending--;
    cpu::mbar_check(b);
    // Now and then a thread that has given something away stands still until others have got to use it.
    if (cpu::blk->mode == cpu::RANDOM && cpu::blk->rnd() % 8 == 0)
        for (uint32_t n = cpu::blk->rnd() % 256; n; n--) {
            cpu::blk->hop = true;
            cpu::yield();
        }
}
PRIM void mbar_expect_tx(uint32_t b, uint32_t bytes) {
    cpu::mb(b).tx += bytes;
    mbar_arrive(b);
}
PRIM bool mbar_try_wait(uint32_t b, uint32_t parity) { return cpu::mb(b).phase != parity; }
PRIM void mbar_wait(uint32_t b, uint32_t parity) { cpu::wait_while(&cpu::mb(b).phase, parity, "mbarrier"); }
PRIM void fence_barrier_init() {}
PRIM void fence_async_proxy() {}
template <int N>
PRIM void setmaxnreg_inc() {
    cpu::meet(cpu::my_wg(), 128, cpu::cur->id & 127, SHIM_OP, nullptr, "setmaxnreg", [](void**) {});
}
template <int N>
PRIM void setmaxnreg_dec() {
    cpu::meet(cpu::my_wg(), 128, cpu::cur->id & 127, SHIM_OP, nullptr, "setmaxnreg", [](void**) {});
}
// A map of 2-byte elements with the 128-byte swizzle: address, rank, then sizes, strides (bytes) and box of each dimension.
inline void tmap_encode_sw128(TensorMap* m, int rank, const void* base, const uint64_t* dim, const uint64_t* stride,
                              const uint32_t* box) {
    m->opaque[0] = (uint64_t)base;
    m->opaque[1] = rank;
    for (int i = 0; i < 4; i++) {
        m->opaque[2 + i] = i < rank ? dim[i] : 1;
        m->opaque[6 + i] = i == 0 ? 2 : i < rank ? stride[i - 1] : 0;
        m->opaque[10 + i] = i < rank ? box[i] : 1;
    }
}
PRIM void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
    uint8_t* const to = cpu::sm(dst, bytes, 16);
    SHIM_CHECK(((uintptr_t)src & 15) == 0 && bytes % 16 == 0, "a bulk copy of bytes that are not at multiples of 16");
    cpu::mb(bar);
    cpu::asyncly([=] {
        std::memcpy(to, src, bytes);
        cpu::mb(bar).tx -= (long)bytes;
        cpu::mbar_check(bar);
    });
}
PRIM uint32_t swz128(uint32_t a) { return a ^ ((a >> 7) & 7) << 4; }
namespace cpu {
inline void tma_load(uint32_t dst, const TensorMap* m, uint32_t bar, int rank, std::vector<int64_t> at) {
    SHIM_CHECK(((uintptr_t)m & 63) == 0, "a tensor map not at a multiple of 64 bytes");
    const TensorMap t = *m;
    const uint64_t* const o = t.opaque;
    SHIM_CHECK((int)o[1] == rank, "a tensor map of another rank");
    const uint32_t bytes = (uint32_t)(o[10] * o[11] * o[12] * o[13] * 2);
    sm(dst, bytes, 1024);
    mb(bar);
    at.resize(4);
    asyncly([=] {
        const uint64_t* const size = t.opaque + 2;
        const uint64_t* const stride = t.opaque + 6;
        const uint64_t* const box = t.opaque + 10;
        uint32_t to = dst;
        for (uint32_t w = 0; w < box[3]; w++)
            for (uint32_t z = 0; z < box[2]; z++)
                for (uint32_t y = 0; y < box[1]; y++)
                    for (uint32_t x = 0; x < box[0]; x++, to += 2) {
                        const int64_t g[4] = {at[0] + x, at[1] + y, at[2] + z, at[3] + w};
                        uint64_t offset = 0;
                        bool inside = true;
                        for (int i = 0; i < 4; i++) {
                            inside &= g[i] >= 0 && g[i] < (int64_t)size[i];
                            offset += (uint64_t)g[i] * stride[i];
                        }
                        uint16_t v = 0;
                        if (inside)
                            std::memcpy(&v, (const uint8_t*)t.opaque[0] + offset, 2);
                        std::memcpy(blk->smem + swz128(to), &v, 2);
                    }
        mb(bar).tx -= (long)bytes;
        mbar_check(bar);
    });
}
}  // namespace cpu
PRIM void tma_load_3d(uint32_t dst, const TensorMap* m, uint32_t bar, int c0, int c1, int c2) {
    cpu::tma_load(dst, m, bar, 3, {c0, c1, c2});
}
PRIM void tma_load_4d(uint32_t dst, const TensorMap* m, uint32_t bar, int c0, int c1, int c2, int c3) {
    cpu::tma_load(dst, m, bar, 4, {c0, c1, c2, c3});
}
PRIM void wgmma_fence() {}
template <int N>
PRIM void pin(float (&)[N]) {}
namespace cpu {
// 128-byte-swizzled operand tiles, gathered in 16-byte chunks.
// K-major ((8,m),(8,2)):((64,SBO),(1,8)) ; MN-major ((64,m),(8,2)):((1,LBO),(64,SBO)), in elements of 2 bytes
inline void gather(uint64_t d, int mn0, int mns, int mn_major, float (*number)(uint16_t), float* out, int smn, int sk) {
    const uint32_t a = (uint32_t)(d & 0x3FFF) << 4, lbo = (uint32_t)(d >> 16 & 0x3FFF) << 4,
                   sbo = (uint32_t)(d >> 32 & 0x3FFF) << 4;
    SHIM_CHECK(d >> 62 == 1, "only the 128-byte swizzle is emulated");
    auto chunk = [&](uint32_t off) { return (const uint16_t*)sm(swz128(a + off), 16, 16); };
    if (!mn_major)
        for (int mn = mn0; mn < mn0 + mns; mn++)
            for (int c = 0; c < 2; c++) {
                auto h = chunk(mn % 8 * 128 + mn / 8 * sbo + c * 16);
                for (int i = 0; i < 8; i++)
                    out[(mn - mn0) * smn + (c * 8 + i) * sk] = number(h[i]);
            }
    else
        for (int k = 0; k < 16; k++)
            for (int mn = mn0; mn < mn0 + mns; mn += 8) {
                auto h = chunk(mn % 64 * 2 + mn / 64 * lbo + k % 8 * 128 + k / 8 * sbo);
                for (int i = 0; i < 8; i++)
                    out[(mn - mn0 + i) * smn + k * sk] = number(h[i]);
            }
}
struct WArg {
    float* d;
    const uint32_t* ra;
    uint64_t a, b;
    int accum, tb, n;  // n: columns of d, 64 or 128
    float (*number)(uint16_t);
};
struct WOp {
    int warp;
    WArg t[32];
};
// one warp's 16 rows: the hardware orders nothing between the four warps of a warpgroup, so neither do we
inline void wgmma_exec(const WOp& w) {
    static thread_local float A[16][16], Bm[16][128], D[16][128];
    const WArg& u = w.t[0];
    gather(u.b, 0, u.n, u.tb, u.number, &Bm[0][0], 1, 128);
    if (!u.ra)
        gather(u.a, w.warp * 16, 16, 0, u.number, &A[0][0], 16, 1);
    for (int l = 0; l < 32; l++) {
        int row = l >> 2, q = (l & 3) * 2;
        const WArg& t = w.t[l];
        SHIM_CHECK(t.a == u.a && t.b == u.b && t.accum == u.accum, "wgmma descriptors differ inside a warp");
        if (u.ra)
            for (int r = 0; r < 4; r++)
                for (int h = 0; h < 2; h++)
                    A[row + (r & 1) * 8][q + (r >> 1) * 8 + h] = u.number((uint16_t)(t.ra[r] >> (16 * h)));
        for (int i = 0; i < u.n / 2; i++)
            D[row + (i >> 1 & 1) * 8][(i >> 2) * 8 + q + (i & 1)] = u.accum ? t.d[i] : 0.f;
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < u.n; j++)
                D[i][j] += A[i][k] * Bm[k][j];
    for (int l = 0; l < 32; l++) {
        int row = l >> 2, q = (l & 3) * 2;
        for (int i = 0; i < u.n / 2; i++)
            w.t[l].d[i] = D[row + (i >> 1 & 1) * 8][(i >> 2) * 8 + q + (i & 1)];
    }
}
inline void wgmma_issue(WArg me, const void* op) {
    if (!me.accum)
        for (int i = 0; i < me.n / 2; i++)
            me.d[i] = NAN;  // poison until waited for
    meet(my_warp(), 32, cur->id & 31, op, &me, "wgmma", [](void** s) {
        WOp v;
        v.warp = cur->id >> 5 & 3;
        for (int t = 0; t < 32; t++)
            v.t[t] = *(WArg*)s[t];
        auto& q = blk->wg[cur->id >> 5];
        if (q.open.empty() && q.groups.empty() && blk->now())
            wgmma_exec(v);
        else
            q.open.push_back([v] { wgmma_exec(v); });
    });
}
}  // namespace cpu
template <bool BF16_, int N>
PRIM void wgmma_ss(float (&d)[N], uint64_t a, uint64_t b, int accum) {
    cpu::wgmma_issue({d, nullptr, a, b, accum, 0, 2 * N, BF16_ ? cpu::bf : cpu::half}, SHIM_OP);
}
template <bool BF16_, int N>
PRIM void wgmma_rs(float (&d)[N], const uint32_t (&a)[4], uint64_t b) {
    cpu::wgmma_issue({d, a, 0, b, 1, 1, 2 * N, BF16_ ? cpu::bf : cpu::half}, SHIM_OP);
}
PRIM void wgmma_commit() {
    cpu::meet(cpu::my_warp(), 32, cpu::cur->id & 31, SHIM_OP, nullptr, "wgmma.commit", [](void**) {
        auto& g = cpu::blk->wg[cpu::cur->id >> 5];
        g.groups.push_back(std::move(g.open));
        g.open.clear();
    });
}
template <int N>
PRIM void wgmma_wait() {
    cpu::meet(cpu::my_warp(), 32, cpu::cur->id & 31, SHIM_OP, nullptr, "wgmma.wait", [](void**) {
        auto& g = cpu::blk->wg[cpu::cur->id >> 5].groups;
        while ((int)g.size() > N) {
            for (auto& op : g.front())
                op();
            g.pop_front();
        }
    });
}
PRIM float half_to_float(uint16_t bits) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return (float)h;
}
PRIM uint16_t float_to_half(float x) {
    _Float16 h = (_Float16)x;
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}
PRIM float bf16_to_float(uint16_t bits) { return cpu::bf(bits); }
PRIM uint16_t float_to_bf16(float x) { return cpu::to_bf(x); }
PRIM uint32_t float_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
PRIM float bits_float(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
PRIM float lg2(float x) { return std::log2(x); }
PRIM float rint_(float x) { return std::nearbyint(x); }
PRIM float abs_(float x) { return std::fabs(x); }
PRIM float mul_rn(float a, float b) { return a * b; }
PRIM float add_rn(float a, float b) { return a + b; }
PRIM float div_rn(float a, float b) { return a / b; }
PRIM float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
PRIM uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
PRIM uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t n = selector >> (4 * i) & 15;
        uint32_t byte = (uint32_t)(both >> (8 * (n & 7))) & 255;
        if (n & 8)
            byte = byte & 128 ? 255 : 0;
        r |= byte << (8 * i);
    }
    return r;
}
namespace cpu {
template <class F>
inline uint32_t pairwise(uint32_t a, uint32_t b, bool half, F f) {
    uint32_t r = 0;
    for (int i = 0; i < 2; i++) {
        const uint16_t x = (uint16_t)(a >> (16 * i)), y = (uint16_t)(b >> (16 * i));
        r |= (uint32_t)(half ? float_to_half(f(half_to_float(x), half_to_float(y))) : to_bf(f(bf(x), bf(y)))) << (16 * i);
    }
    return r;
}
}  // namespace cpu
PRIM uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    return cpu::pairwise(a, b, false, [](float x, float y) { return x + y; });
}
PRIM uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    return cpu::pairwise(a, b, false, [](float x, float y) { return x * y; });
}
PRIM uint32_t add_f16x2(uint32_t a, uint32_t b) {
    return cpu::pairwise(a, b, true, [](float x, float y) { return x + y; });
}
PRIM uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    return cpu::pairwise(a, b, true, [](float x, float y) { return x * y; });
}
PRIM bool vote_any(bool x) {
    struct V {
        bool x, any;
    } me{x, false};
    cpu::meet(cpu::my_warp(), 32, cpu::cur->id & 31, SHIM_OP, &me, "vote", [](void** s) {
        bool any = false;
        for (int l = 0; l < 32; l++)
            any |= ((V*)s[l])->x;
        for (int l = 0; l < 32; l++)
            ((V*)s[l])->any = any;
    });
    return me.any;
}
PRIM void warp_sync() {
    cpu::meet(cpu::my_warp(), 32, cpu::cur->id & 31, SHIM_OP, nullptr, "syncwarp", [](void**) {});
}
