// The kernels' bodies on a CPU, thread by thread over a grid: what the tests run in place of a GPU.
//
// Threads that meet at barriers are fibres: each runs to its next barrier before any goes on. Threads run in an order
// drawn from a seed, shared memory starts as NaN, and a block that writes beyond its shared memory or whose threads do
// not all reach a barrier is an error, so that what would be a race or undefined on a GPU shows here.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../kernels.hpp"

namespace {

using namespace fastnnunet::cuda;

constexpr std::size_t kStack = 1 << 16;
constexpr std::size_t kGuard = 256;  // bytes after shared memory that nobody may write

enum Status : int { kDone = 0, kUnknown = 1, kDiverged = 2, kBeyondShared = 3, kBadLaunch = 4 };

struct Fibre {
    ucontext_t start;  // its own stack
    jmp_buf place;     // where it waits: jumps between stacks need no system call, which swapcontext makes twice
    bool is_begun, is_finished;
};

struct Fibres {
    jmp_buf scheduler;
    std::vector<Fibre> threads{static_cast<std::size_t>(kBlockThreads)};
    std::vector<char> stacks = std::vector<char>(kStack * kBlockThreads);
};

struct HostThread {
    const i64* grid;
    i64 block_x, block_y, block_z;
    int number;
    void* memory;
    Fibres* fibres;  // null: the kernel has no barriers

    i64 x() const { return block_x * kBlockX + number % kBlockX; }
    i64 row() const { return block_y * kBlockY + number / kBlockX; }
    i64 x_step() const { return grid[0] * kBlockX; }
    i64 row_step() const { return grid[1] * kBlockY; }
    i64 group() const { return block_z; }
    i64 groups() const { return grid[2]; }
    i64 block() const { return block_x; }
    i64 blocks() const { return grid[0]; }
    int in_block() const { return number; }
    void sync() const {
        if (_setjmp(fibres->threads[number].place) == 0) _longjmp(fibres->scheduler, 1);
    }
    void lower(u32* to, u32 value) const { *to = std::min(*to, value); }
    void raise(u32* to, u32 value) const { *to = std::max(*to, value); }
    template <class T>
    T* shared() const {
        return static_cast<T*>(memory);
    }
};

template <class Params>
struct Call {
    void (*body)(const HostThread&, const Params&);
    const Params* params;
    HostThread at;
};

template <class Params>
void enter(unsigned high, unsigned low) {
    const auto* call = reinterpret_cast<Call<Params>*>(static_cast<std::uintptr_t>(high) << 32 | low);
    call->body(call->at, *call->params);
    call->at.fibres->threads[call->at.number].is_finished = true;
    _longjmp(call->at.fibres->scheduler, 1);
}

// Runs a thread to its next barrier or its end.
void resume(Fibres& fibres, int number) {
    Fibre& fibre = fibres.threads[number];
    if (_setjmp(fibres.scheduler) != 0) return;
    if (fibre.is_begun) _longjmp(fibre.place, 1);
    fibre.is_begun = true;
    setcontext(&fibre.start);
}

// A block whose threads meet at barriers
template <class Params>
bool run_fibres(std::vector<Call<Params>>& calls, const std::vector<int>& order, Fibres& fibres) {
    for (int i = 0; i < kBlockThreads; ++i) {
        fibres.threads[i].is_begun = fibres.threads[i].is_finished = false;
        ucontext_t& context = fibres.threads[i].start;
        getcontext(&context);
        context.uc_stack.ss_sp = &fibres.stacks[i * kStack];
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;  // it leaves by a jump
        const auto address = reinterpret_cast<std::uintptr_t>(&calls[i]);
        makecontext(&context, reinterpret_cast<void (*)()>(enter<Params>), 2, static_cast<unsigned>(address >> 32),
                    static_cast<unsigned>(address));
    }
    for (;;) {
        for (const int i : order) {
            if (!fibres.threads[i].is_finished) resume(fibres, i);
        }
        const auto done = std::count_if(fibres.threads.begin(), fibres.threads.end(),
                                        [](const Fibre& fibre) { return fibre.is_finished; });
        if (done == kBlockThreads) return true;
        if (done > 0) return false;  // some wait at a barrier that others will never reach
    }
}

template <class Params>
int launch(void (*body)(const HostThread&, const Params&), const Params& params, const i64* grid, std::size_t shared,
           unsigned seed) {
    static thread_local Fibres fibres;
    std::vector<unsigned char> memory(shared + kGuard + alignof(std::max_align_t));
    std::vector<int> order(kBlockThreads);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(seed);
    const i64 blocks = grid[0] * grid[1] * grid[2];
    for (i64 number = 0; number < blocks; ++number) {
        std::shuffle(order.begin(), order.end(), random);
        std::fill(memory.begin(), memory.end(), 0xFF);
        std::vector<Call<Params>> calls;
        for (int i = 0; i < kBlockThreads; ++i) {
            const HostThread at{grid, number % grid[0], number / grid[0] % grid[1], number / (grid[0] * grid[1]), i,
                                memory.data(), shared ? &fibres : nullptr};
            calls.push_back({body, &params, at});
        }
        if (shared) {
            if (!run_fibres(calls, order, fibres)) return kDiverged;
        } else {
            for (const int i : order) body(calls[i].at, params);
        }
        if (std::any_of(memory.begin() + static_cast<std::ptrdiff_t>(shared), memory.end(),
                        [](unsigned char byte) { return byte != 0xFF; })) {
            return kBeyondShared;
        }
    }
    return kDone;
}

}  // namespace

// Runs the kernel `name` over a grid (x, y, z of blocks) with `shared` bytes for each block.
extern "C" int fastnnunet_emulate(const char* name, const long long* grid, long long shared, const void* params,
                                  unsigned seed) {
    if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[1] > 65535 || grid[2] > 65535) return kBadLaunch;
#define FNN_KERNEL(kernel, Params, needed)                                                         \
    if (std::string(name) == #kernel) {                                                            \
        if ((shared > 0) != (needed > 0)) return kBadLaunch;                                       \
        return launch<Params>(kernel<HostThread>, *static_cast<const Params*>(params), grid,       \
                              static_cast<std::size_t>(shared), seed);                             \
    }
    FNN_KERNELS(FNN_KERNEL)
#undef FNN_KERNEL
    return kUnknown;
}

// Bytes of the parameters of a kernel and of the shared memory a block needs; 0 for a kernel that does not exist
extern "C" long long fastnnunet_params_bytes(const char* name) {
#define FNN_KERNEL(kernel, Params, needed) \
    if (std::string(name) == #kernel) return sizeof(Params);
    FNN_KERNELS(FNN_KERNEL)
#undef FNN_KERNEL
    return 0;
}

extern "C" long long fastnnunet_shared_bytes(const char* name) {
#define FNN_KERNEL(kernel, Params, needed) \
    if (std::string(name) == #kernel) return needed;
    FNN_KERNELS(FNN_KERNEL)
#undef FNN_KERNEL
    return 0;
}

// The names of all kernels, separated by spaces
extern "C" const char* fastnnunet_kernel_names() {
#define FNN_KERNEL(kernel, Params, needed) #kernel " "
    return FNN_KERNELS(FNN_KERNEL);
#undef FNN_KERNEL
}

// float16 of a float and back, for every float the caller likes
extern "C" void fastnnunet_round_trip(const float* values, unsigned short* halves, float* back, long long count) {
    for (long long i = 0; i < count; ++i) {
        const Half half = to_half(values[i]);
        halves[i] = half.bits;
        back[i] = to_float(half);
    }
}
