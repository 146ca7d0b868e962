// What our kernels need of CUDA, on the processor: the threads of a block are fibers of one thread of the system, which change at barriers
// and shuffles alone, in an order that a seed draws anew each time. So a kernel whose result depends on the order, or whose threads wait
// at different barriers, is found.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local

struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace host {

constexpr unsigned WARP_SIZE = 32;
constexpr size_t STACK = 1 << 16;

enum class State { Ready, AtBarrier, AtShuffle, Done };

struct Fiber {
    ucontext_t context;
    State state;
    unsigned char slot[8];
    std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
};

struct Index { unsigned x; };

// One block at a time.
struct Block {
    std::vector<Fiber> fibers;
    std::function<void()> body;
    ucontext_t scheduler;
    uint64_t random;
    Index block, thread, block_dim, grid_dim;
};

// One of each test thread, shared by all modules.
inline Block& now() { static thread_local Block block; return block; }

inline uint64_t draw(Block& b, uint64_t below) {
    b.random = b.random * 6364136223846793005ull + 1442695040888963407ull;
    return (b.random >> 33) % below;
}

[[noreturn]] inline void stop(const char* what) {
    fprintf(stderr, "kernel on the host: %s\n", what);
    abort();
}

// Lets others run until whatever this thread waits for has come.
inline void wait(State what) {
    Block& b = now();
    Fiber& own = b.fibers[b.thread.x];
    own.state = what;
    swapcontext(&own.context, &b.scheduler);
}

inline void enter() {
    Block& b = now();
    b.body();
    wait(State::Done);
}

// Lets those go whose barrier or shuffle is complete; false if all are done.
inline bool release(Block& b) {
    bool any = false, running = false;
    size_t at_barrier = 0, done = 0;
    for (size_t w = 0; w < b.fibers.size(); w += WARP_SIZE) {
        size_t shuffling = 0;
        for (size_t i = w; i < w + WARP_SIZE; i++) {
            State s = b.fibers[i].state;
            shuffling += s == State::AtShuffle;
            at_barrier += s == State::AtBarrier;
            done += s == State::Done;
            running |= s != State::Done;
        }
        if (shuffling == WARP_SIZE) {
            for (size_t i = w; i < w + WARP_SIZE; i++) b.fibers[i].state = State::Ready;
            any = true;
        }
    }
    if (!running) return false;
    if (!any && at_barrier + done == b.fibers.size()) {
        for (Fiber& f : b.fibers)
            if (f.state == State::AtBarrier) f.state = State::Ready;
        any = true;
    }
    if (!any) stop("threads of a block wait for each other at different places");
    return true;
}

inline void run_block(Block& b) {
    for (size_t i = 0; i < b.fibers.size(); i++) {
        Fiber& f = b.fibers[i];
        f.state = State::Ready;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &b.scheduler;
        makecontext(&f.context, enter, 0);
    }
    std::vector<unsigned> ready;
    do {
        ready.clear();
        for (unsigned i = 0; i < b.fibers.size(); i++)
            if (b.fibers[i].state == State::Ready) ready.push_back(i);
        while (!ready.empty()) {
            size_t pick = draw(b, ready.size());
            b.thread.x = ready[pick];
            ready[pick] = ready.back();
            ready.pop_back();
            swapcontext(&b.scheduler, &b.fibers[b.thread.x].context);
        }
    } while (release(b));
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}

// As cuLaunchKernel takes it: each argument by its address.
template <class... A>
void launch(void (*kernel)(A...), unsigned blocks, unsigned threads, uint64_t seed, void** arguments) {
    Block& b = now();
    b.fibers.resize(threads);
    b.random = seed;
    b.grid_dim.x = blocks;
    b.block_dim.x = threads;
    b.body = [=] { call(kernel, arguments, std::index_sequence_for<A...>()); };
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; i++) order[i] = i;
    for (unsigned i = blocks; i > 1; i--) std::swap(order[i - 1], order[draw(b, i)]);
    for (unsigned i : order) {
        b.block.x = i;
        run_block(b);
    }
}

// Round to nearest, ties to even, as cvt.rn does.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint16_t to_f16(float x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    double a = std::fabs((double)x);
    if (a >= 65520.0) return sign | 0x7c00;
    // Multiples of the spacing at this exponent; nearbyint rounds ties to even.
    int exponent = a < 0x1p-14 ? -14 : std::ilogb(a);
    double units = std::nearbyint(std::ldexp(a, 10 - exponent));
    return sign | (uint16_t)(((exponent + 14) << 10) + (int)units);
}

inline float from_f16(uint16_t h) {
    int exponent = h >> 10 & 31, part = h & 1023;
    float a = exponent == 31 ? (part ? NAN : INFINITY)
                             : (float)std::ldexp(exponent ? 1024 + part : part, (exponent ? exponent : 1) - 25);
    return h & 0x8000 ? -a : a;
}

}  // namespace host

#define blockIdx (host::now().block)
#define threadIdx (host::now().thread)
#define blockDim (host::now().block_dim)
#define gridDim (host::now().grid_dim)

static inline void __syncthreads() { host::wait(host::State::AtBarrier); }

template <class V>
V __shfl_xor_sync(unsigned mask, V x, int lanes) {
    if (mask != 0xffffffffu) host::stop("a shuffle of a part of a warp");
    host::Block& b = host::now();
    unsigned own = b.thread.x;
    memcpy(b.fibers[own].slot, &x, sizeof x);
    host::wait(host::State::AtShuffle);
    V other;
    memcpy(&other, b.fibers[own ^ lanes].slot, sizeof other);
    // Nobody writes its next value before all have read this one.
    host::wait(host::State::AtShuffle);
    return other;
}

static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
// C libraries may have functions of these names.
#define __expf(x) expf(x)
#define rsqrtf(x) (1.f / sqrtf(x))
static inline float atomicAdd(float* to, float x) { float old = *to; *to += x; return old; }
