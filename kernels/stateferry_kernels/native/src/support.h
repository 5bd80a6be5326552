// Threads, scratch memory, and the processor's treatment of denormal numbers.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "simd.h"
#include "team.h"

namespace sf {

// States decay towards zero, and arithmetic on denormal numbers is many times slower than on
// others: they count as zero inside a kernel, whatever the caller's setting.
class FlushDenormals {
public:
#if defined(__x86_64__)
    FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040u); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

private:
    unsigned saved_;
#elif defined(__aarch64__)
    FlushDenormals() : saved_(__builtin_aarch64_get_fpcr64()) {
        __builtin_aarch64_set_fpcr64(saved_ | (1ull << 24));
    }
    ~FlushDenormals() { __builtin_aarch64_set_fpcr64(saved_); }

private:
    unsigned long long saved_;
#endif
};

// A thread's scratch memory: grows, is handed out piece by piece, and starts anew with each task.
class Scratch {
public:
    ~Scratch() { std::free(base_); }

    // Room for this many bytes in all, 64 more for each piece.
    void reserve(int64_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(base_);
        size_ = (bytes + 4095) / 4096 * 4096;
        base_ = static_cast<char*>(std::aligned_alloc(64, size_t(size_)));
        if (!base_) {
            size_ = 0;
            throw std::bad_alloc();
        }
    }

    template <class T>
    T* take(int64_t count) {
        char* piece = base_ + used_;
        used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(piece);
    }

    static Scratch& of_thread() {
        static thread_local Scratch scratch;
        return scratch;
    }

private:
    char* base_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};

// Bytes of `take` for each of these counts of elements.
template <class... Count>
int64_t scratch_bytes(Count... bytes) {
    return (int64_t(0) + ... + ((int64_t(bytes) + 63) / 64 * 64));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// To call others in costs a microsecond: work of fewer operations stays on the caller's thread.
inline bool too_small(int64_t operations) { return operations < 40000; }

// Run work(member) on up to `members` threads.
template <class Work>
void with_team(int64_t members, const Work& work) {
    Team::mine().run(members, [&](int64_t member) {
        FlushDenormals guard;
        work(member);
    });
}

// Run task(i) for i < count.
template <class Task>
void parallel(int64_t count, int64_t threads, int64_t operations, const Task& task) {
    const int64_t team = too_small(operations) ? 1 : (threads < count ? threads : count);
    if (team <= 1) {
        FlushDenormals guard;
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    alignas(64) std::atomic<int64_t> next{0};
    with_team(team, [&](int64_t) {
        for (int64_t i = next++; i < count; i = next++) task(i);
    });
}

// Run task(first, last) for pieces of [0, count): each thread walks through a stretch of its own, so
// that what it reads comes in one run, and then helps where something is left.
template <class Task>
void parallel_stretches(int64_t count, int64_t piece, int64_t threads, int64_t operations,
                        const Task& task) {
    const int64_t pieces = ceil_div(count, piece);
    const int64_t team = too_small(operations) ? 1 : (threads < pieces ? threads : pieces);
    auto run = [&](int64_t i) { task(i * piece, (i + 1) * piece < count ? (i + 1) * piece : count); };
    if (team <= 1) {
        FlushDenormals guard;
        for (int64_t i = 0; i < pieces; ++i) run(i);
        return;
    }
    struct alignas(64) Stretch {
        std::atomic<int64_t> next;
    };
    std::vector<Stretch> stretches(static_cast<size_t>(team));
    for (int64_t t = 0; t < team; ++t) stretches[size_t(t)].next = t * pieces / team;
    with_team(team, [&](int64_t member) {
        for (int64_t t = 0, whose = member; t < team; ++t, ++whose) {
            if (whose >= team) whose -= team;
            const int64_t last = (whose + 1) * pieces / team;
            std::atomic<int64_t>& next = stretches[size_t(whose)].next;
            for (int64_t i = next++; i < last; i = next++) run(i);
        }
    });
}

// How many tasks to make of `items` so that each thread gets some of `outer * tasks`: the more, the
// less a thread waits for the last one.
inline int64_t split(int64_t items, int64_t outer, int64_t threads, int64_t tasks_per_thread) {
    const int64_t tasks = threads > 1 ? tasks_per_thread * threads : 1;
    const int64_t wanted = ceil_div(tasks, outer < 1 ? 1 : outer);
    return wanted < items ? (wanted < 1 ? 1 : wanted) : items;
}

}  // namespace sf
