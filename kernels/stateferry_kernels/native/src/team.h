// The threads that work for one calling thread.
//
// A job's tasks are taken one by one, so whoever is there does the job: the leader begins at once,
// members that are awake join in, and who comes too late is not waited for. That is the difference
// to an OpenMP region, which ends when its last thread has come, even one that the system has yet to
// give a core: where processes share cores, that is milliseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>

#include <pthread.h>
#include <sched.h>

namespace sf {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Team : public std::enable_shared_from_this<Team> {
public:
    // The calling thread's.
    static Team& mine() {
        static thread_local Mine mine;
        const uint32_t now = forks().load(std::memory_order_relaxed);
        if (!mine.team || mine.fork != now) {
            // After a fork the members are in the other process, and one may have been inside.
            if (mine.team) new std::shared_ptr<Team>(std::move(mine.team));
            mine.team = std::make_shared<Team>();
            mine.fork = now;
        }
        return *mine.team;
    }

    // work(member) on the leader, member 0, and on up to `members` - 1 others; over when all who
    // began are done.
    template <class Work>
    void run(int64_t members, const Work& work) {
        while (size_ < members && grow()) {
        }
        work_ = &work;
        members_ = members;
        call_ = [](const void* what, int64_t member) {
            (*static_cast<const Work*>(what))(member);
        };
        number_ = number_ + 1 < OVER ? number_ + 1 : 1;
        posted_.store(number_, std::memory_order_seq_cst);
        posted_.notify_all();
        work(0);
        posted_.store(NOTHING, std::memory_order_seq_cst);
        // Nobody can begin any more. A member that the system took off its core may take long.
        for (int spins = 0; inside_.load(std::memory_order_seq_cst);)
            ++spins < SPINS_BEFORE_YIELD ? relax() : void(sched_yield());
    }

private:
    static constexpr uint32_t NOTHING = 0, OVER = ~0u;
    // Some tens of microseconds, and some hundreds: a pass's calls follow each other faster than a
    // thread that sleeps is woken, and an idle process leaves the core to others.
    static constexpr int SPINS_BEFORE_YIELD = 1000, SPINS_BEFORE_SLEEP = 10000;

    struct Mine {
        std::shared_ptr<Team> team;
        uint32_t fork = 0;
        ~Mine() {
            if (team && fork == forks().load(std::memory_order_relaxed)) team->end();
        }
    };

    static std::atomic<uint32_t>& forks() {
        static std::atomic<uint32_t> count{0};
        static const int watched = pthread_atfork(nullptr, nullptr, [] { ++count; });
        (void)watched;
        return count;
    }

    // False: the system gives no thread.
    bool grow() {
        try {
            std::thread([team = shared_from_this(), member = size_] { team->follow(member); })
                .detach();
        } catch (const std::system_error&) {
            return false;
        }
        ++size_;
        return true;
    }

    void follow(int64_t member) {
        uint32_t done = NOTHING;
        for (int spins = 0;;) {
            const uint32_t job = posted_.load(std::memory_order_acquire);
            if (job == OVER) return;
            if (job == NOTHING || job == done) {
                if (++spins < SPINS_BEFORE_SLEEP)
                    relax();
                else
                    posted_.wait(job);
                continue;
            }
            inside_.fetch_add(1, std::memory_order_seq_cst);
            // Either the leader sees that we are inside, or we see that the job is over.
            if (posted_.load(std::memory_order_seq_cst) == job) {
                if (member < members_) {
                    call_(work_, member);
                    spins = 0;
                }
                done = job;
            }
            inside_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    void end() {
        posted_.store(OVER, std::memory_order_seq_cst);
        posted_.notify_all();
    }

    const void* work_ = nullptr;
    void (*call_)(const void*, int64_t) = nullptr;
    int64_t members_ = 0, size_ = 1;
    uint32_t number_ = NOTHING;
    alignas(64) std::atomic<uint32_t> posted_{NOTHING};
    alignas(64) std::atomic<int32_t> inside_{0};
};

}  // namespace sf
