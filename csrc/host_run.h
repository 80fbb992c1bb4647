// The primitives on the CPU: runs whole grids in plain C++, so that kernels are tested where there is no GPU.
//
// Every CUDA thread is a fiber; a scheduler picks the next at random wherever threads may meet. What a GPU does not
// promise does not hold here either:
//
// * A store to shared memory may reach other threads late, and after younger ones, until a block barrier.
// * A published word arrives at other blocks any time later, in any order; a look at four words may see some of them.
// * Lanes of a warp are ordered by nothing but block barriers: mma, shuffles and warp_sync only bring them together.
//   Lanes that have waited for other blocks are apart until a warp_sync.
// * An access whose address is no multiple of its size ends the run.
// * Shared memory begins as NaN. A block may run as late as it can, or never.
// * exponential is off by a unit or two in the last place, products of a tensor core are rounded once.
//
// Each place in the sources that orders or waits is a site; one of them may be dropped, to see whether a test notices.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define DEVICE inline
#define HOST_DEVICE inline
#define UNROLLED for

namespace host {

struct Store {
    uint32_t* target;
    uint32_t value;
};

struct Warp {
    // Lanes that have come to the collective under way, and how many collectives are over.
    int arrived = 0;
    long over = 0;
    uint32_t operands[32][6];
    float* accumulators[32];
    uint32_t values[32];
};

struct Block {
    int x, y;
    std::vector<Words> shared;
    std::vector<Warp> warps;
    int arrived = 0;
    long barriers = 0;
    // What plain loads have seen of memory that others write, as an L1 cache keeps it: only where a look was dropped.
    std::map<const uint32_t*, uint32_t> stale;
};

struct Fiber {
    ucontext_t context = {};
    std::unique_ptr<char[]> stack;
    Block* block;
    int thread;
    // Stores to shared memory that no other thread sees yet.
    std::vector<Store> late;
    // What it waits for: a counter that passes a value, or any store that arrives.
    const long* counter = nullptr;
    long value = 0;
    bool looking = false, done = false;
    // Whether it may have lost the other lanes of its warp, which mma.sync wants together, since they last met.
    bool apart = false;
};

// How the next grid is run.
struct Settings {
    uint32_t seed = 0;
    int late_block = -1;                // runs as late as it can
    int dead_block = -1;                // never runs
    int dropped = -1;                   // a site that does nothing
    uint64_t longest_wait = 2'000'000;  // turns of the scheduler
};
inline Settings settings;

constexpr size_t STACK_BYTES = 96 << 10;
constexpr uint32_t UNINITIALISED = 0xffc1ffc1u;

class Machine {
  public:
    int threads = 0, blocks_y = 0;
    Fiber* current = nullptr;
    uint64_t turns = 0;

    void run(int x, int y, int threads_, int shared_bytes, bool together, std::function<void()> kernel) {
        random_.seed(settings.seed);
        threads = threads_, blocks_y = y, kernel_ = std::move(kernel), turns = 0;
        std::vector<int> order(x * y);
        for (int n = 0; n < x * y; ++n) order[n] = n;
        std::shuffle(order.begin(), order.end(), random_);
        const int at_once = together ? x * y : 1;
        for (int first = 0; first < x * y; first += at_once) {
            blocks_.clear();
            fibers_.clear();
            for (int n = first; n < first + at_once; ++n)
                if (order[n] != settings.dead_block) add(order[n] % x, order[n] / x, order[n], shared_bytes);
            schedule();
            while (!under_way_.empty()) arrive();
            for (const Store& store : lost_) *store.target = store.value;
            lost_.clear();
        }
    }

    // Let others run; come back when `counter` has passed `value`.
    void wait(const long* counter, long value) {
        current->counter = counter, current->value = value;
        yield();
        current->counter = nullptr;
    }
    void yield() { swapcontext(&current->context, &scheduler_); }
    // Come back when a published word has arrived, or nothing else is left to do.
    void look_again() {
        current->looking = true;
        yield();
    }

    // End the run: an exception cannot leave a fiber.
    void fail(const char* reason) {
        failure_ = reason;
        while (true) yield();
    }

    bool chance(unsigned one_in) { return random_() % one_in == 0; }
    void send(Store store, bool in_time) { (in_time ? under_way_ : lost_).push_back(store); }
    // Let one published word arrive.
    void arrive() {
        if (under_way_.empty()) return;
        std::swap(under_way_[random_() % under_way_.size()], under_way_.back());
        *under_way_.back().target = under_way_.back().value;
        under_way_.pop_back();
        for (Fiber& fiber : fibers_) fiber.looking = false;
    }
    // Let some of a fiber's late stores reach the others, or all of them: those to one word in their order.
    void settle(Fiber& fiber, bool all) {
        std::vector<Store> left;
        for (const Store& store : fiber.late) {
            bool stays = !all && chance(2);
            for (const Store& other : left) stays = stays || other.target == store.target;
            if (stays)
                left.push_back(store);
            else
                *store.target = store.value;
        }
        fiber.late = std::move(left);
    }

  private:
    std::mt19937 random_;
    std::function<void()> kernel_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::vector<Fiber> fibers_;
    std::vector<int> numbers_;  // of the fibers' blocks
    std::vector<Store> under_way_, lost_;
    ucontext_t scheduler_;
    const char* failure_ = nullptr;

    static void enter();

    void add(int x, int y, int number, int shared_bytes) {
        auto block = std::make_unique<Block>();
        block->x = x, block->y = y;
        Words fill;
        for (uint32_t& word : fill.word) word = UNINITIALISED;
        block->shared.assign(shared_bytes / sizeof(Words) + 1, fill);
        block->warps.resize((threads + 31) / 32);
        for (int thread = 0; thread < threads; ++thread) {
            Fiber fiber;
            fiber.block = block.get(), fiber.thread = thread;
            fiber.stack.reset(new char[STACK_BYTES]);
            fibers_.push_back(std::move(fiber));
            numbers_.push_back(number);
        }
        blocks_.push_back(std::move(block));
    }

    [[noreturn]] void give_up(const char* reason) {
        failure_ = nullptr;
        under_way_.clear(), lost_.clear(), numbers_.clear();
        throw std::runtime_error(reason);
    }

    bool is_ready(const Fiber& fiber) const {
        return !fiber.done && !fiber.looking && (fiber.counter == nullptr || *fiber.counter >= fiber.value);
    }

    void schedule() {
        for (Fiber& fiber : fibers_) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = STACK_BYTES;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, &Machine::enter, 0);
        }
        size_t left = fibers_.size();
        while (left > 0) {
            Fiber* next = pick();
            if (next == nullptr) {
                // nobody can go on before a word arrives, or those that look run out of patience
                if (!under_way_.empty()) {
                    arrive();
                } else {
                    bool anyone = false;
                    for (Fiber& fiber : fibers_) anyone = anyone || (fiber.looking && !fiber.done);
                    if (!anyone) give_up("host run: no thread can go on: some never come to a barrier");
                    for (Fiber& fiber : fibers_) fiber.looking = false;
                }
                continue;
            }
            if (chance(4)) arrive();
            if (!next->late.empty() && chance(8)) settle(*next, false);
            current = next;
            ++turns;
            swapcontext(&scheduler_, &next->context);
            if (failure_ != nullptr) give_up(failure_);
            if (next->done) --left;
        }
        numbers_.clear();
    }

    // A ready fiber at random; one of the late block only where there is no other.
    Fiber* pick() {
        const size_t count = fibers_.size(), begin = random_() % count;
        Fiber* late = nullptr;
        for (size_t n = 0; n < count; ++n) {
            const size_t index = begin + n < count ? begin + n : begin + n - count;
            if (!is_ready(fibers_[index])) continue;
            if (numbers_[index] != settings.late_block) return &fibers_[index];
            late = &fibers_[index];
        }
        return late;
    }
};

inline Machine machine;

inline void Machine::enter() {
    machine.kernel_();
    machine.settle(*machine.current, true);
    machine.current->done = true;
    swapcontext(&machine.current->context, &machine.scheduler_);
}

struct Site {
    std::string place, what;
};
inline std::vector<Site> sites;

inline int register_site(const char* file, int line, const char* what) {
    const char* slash = std::strrchr(file, '/');
    const std::string place = std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
    for (size_t n = 0; n < sites.size(); ++n)
        if (sites[n].place == place && sites[n].what == what) return static_cast<int>(n);
    sites.push_back({place, what});
    return static_cast<int>(sites.size()) - 1;
}

inline bool is_dropped(int site) {
    return site == settings.dropped;
}

inline void check_alignment(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) machine.fail("host run: a misaligned access");
}

inline Warp& warp() {
    return machine.current->block->warps[machine.current->thread / 32];
}

// All lanes of the warp come here; the last of them acts for all.
template <class Action>
void together(Action act) {
    Warp& w = warp();
    const long round = w.over + 1;
    if (++w.arrived == 32) {
        act(w);
        w.arrived = 0;
        w.over = round;
        machine.yield();
    } else {
        machine.wait(&w.over, round);
    }
}

inline void block_sync(int site) {
    if (is_dropped(site)) return machine.yield();
    Block& block = *machine.current->block;
    machine.settle(*machine.current, true);
    const long round = block.barriers + 1;
    if (++block.arrived == machine.threads) {
        block.arrived = 0;
        block.barriers = round;
        machine.yield();
    } else {
        machine.wait(&block.barriers, round);
    }
}

inline void warp_sync(int site) {
    if (is_dropped(site)) return;
    together([](Warp&) {});
    machine.current->apart = false;
}

// How often a thread has asked for the word of failures, which is far away from a GPU.
inline uint64_t flag_loads = 0;

inline void publish(int site, uint32_t* target, uint32_t value) {
    check_alignment(target, sizeof value);
    machine.send({target, value}, !is_dropped(site));
    if (machine.chance(4)) machine.yield();
}

inline Words look(int site, const uint32_t* source) {
    check_alignment(source, sizeof(Words));
    Words words;
    machine.yield();
    machine.current->apart = true;
    for (int n = 0; n < 4; ++n) {
        if (machine.chance(4)) machine.arrive();
        words.word[n] = is_dropped(site)
                            ? machine.current->block->stale.try_emplace(source + n, source[n]).first->second
                            : source[n];
    }
    return words;
}

inline bool are_published(int site, const Words& words) {
    bool all = true;
    for (uint32_t word : words.word) all = all && word != NOT_YET;
    return all || is_dropped(site);
}

}  // namespace host

// Where a site is, as a number.
#define FASTRNN_SITE(what)                                                     \
    ([] {                                                                      \
        static const int site = host::register_site(__FILE__, __LINE__, what); \
        return site;                                                           \
    }())

#define block_sync() host::block_sync(FASTRNN_SITE("block_sync"))
#define warp_sync() host::warp_sync(FASTRNN_SITE("warp_sync"))
#define publish(target, value) host::publish(FASTRNN_SITE("publish"), target, value)
#define look(source) host::look(FASTRNN_SITE("look"), source)
#define are_published(words) host::are_published(FASTRNN_SITE("are_published"), words)

inline int thread() {
    return host::machine.current->thread;
}
inline int threads() {
    return host::machine.threads;
}
inline int block_x() {
    return host::machine.current->block->x;
}
inline int block_y() {
    return host::machine.current->block->y;
}
inline int blocks_y() {
    return host::machine.blocks_y;
}

template <class Vector>
Vector load_vector(const void* source) {
    host::check_alignment(source, sizeof(Vector));
    return *static_cast<const Vector*>(source);
}
template <class Vector>
void store_vector(void* target, const Vector& value) {
    host::check_alignment(target, sizeof(Vector));
    *static_cast<Vector*>(target) = value;
}

inline uint32_t* shared_memory() {
    return host::machine.current->block->shared.data()->word;
}
inline uint32_t load_shared(const uint32_t* source) {
    host::check_alignment(source, sizeof *source);
    const auto& late = host::machine.current->late;
    for (size_t n = late.size(); n-- > 0;)
        if (late[n].target == source) return late[n].value;
    return *source;
}
inline void store_shared(uint32_t* target, uint32_t value) {
    host::check_alignment(target, sizeof value);
    host::machine.current->late.push_back({target, value});
}
inline Words load_shared4(const uint32_t* source) {
    host::check_alignment(source, sizeof(Words));
    return {{load_shared(source), load_shared(source + 1), load_shared(source + 2), load_shared(source + 3)}};
}
inline void store_shared4(uint32_t* target, Words value) {
    host::check_alignment(target, sizeof value);
    for (int n = 0; n < 4; ++n) store_shared(target + n, value.word[n]);
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
    const int lane = thread() % 32;
    host::warp().values[lane] = value;
    // the last lane reads for all, before anyone can overwrite
    host::together([](host::Warp& w) {
        for (int n = 0; n < 32; ++n) w.operands[n][0] = w.values[n];
    });
    const uint32_t result = host::warp().operands[lane ^ mask][0];
    host::together([](host::Warp&) {});
    return result;
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint32_t load_flag(const uint32_t* flag) {
    ++host::flag_loads;
    return *flag;
}
inline void store_flag(uint32_t* flag, uint32_t value) {
    *flag = value;
}
#define LONGEST_WAIT host::settings.longest_wait
inline uint64_t wait_clock() {
    return host::machine.turns + 1;
}
inline void looked_in_vain() {
    host::machine.look_again();
}

inline float to_float(Bfloat16 element) {
    return as_float(static_cast<uint32_t>(element.bits) << 16);
}
inline float to_float(Float16 element) {
    const uint32_t sign = (element.bits & 0x8000u) << 16, exponent = element.bits >> 10 & 31,
                   fraction = element.bits & 1023;
    if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0)
        return std::copysign(std::ldexp(static_cast<float>(fraction), -24), as_float(sign | 0x3f800000u));
    return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline float to_float(Tf32 element) {
    return element.value;
}
inline float to_float(Float32 element) {
    return element.value;
}
inline void convert(float value, Bfloat16& element) {
    const uint32_t bits = as_bits(value);
    element.bits = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void convert(float value, Float16& element) {
    const uint16_t sign = as_bits(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (value != value) {
        element.bits = 0x7fff;
    } else if (size >= 65520.0f) {
        element.bits = sign | 0x7c00;
    } else if (size < 6.103515625e-5f) {  // subnormal: steps of 2^-24
        element.bits = sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
    } else {
        const uint32_t bits = as_bits(size);
        element.bits = sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
    }
}
inline void convert(float value, Tf32& element) {
    element.value = value == value ? value : as_float(0x7fc00000u);
}
inline void convert(float value, Float32& element) {
    element.value = value == value ? value : as_float(0x7fc00000u);
}
inline uint32_t rounded_to_tf32(uint32_t bits) {
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

// The GPU's is off by about 2 + |x| units in the last place.
inline float exponential(float x) {
    const float right = std::exp(x);
    return as_bits(right) % 2 == 0 ? right : right * (1.0f + 0x1p-22f);
}
inline float reciprocal(float x) {
    return 1.0f / x;
}

namespace host {

template <class T>
float operand(uint32_t word, int half) {
    if constexpr (T::PER_WORD == 1) return as_float(word & ~0x1fffu);
    T element;
    if constexpr (T::PER_WORD == 2) element.bits = static_cast<uint16_t>(half ? word >> 16 : word);
    return to_float(element);
}

// The product of a warp, from the fragments that PTX documents for mma.m16n8k16 and m16n8k8.
template <class T>
void multiply(Warp& w) {
    constexpr int PER_WORD = T::PER_WORD, DEPTH = 8 * PER_WORD;
    float a[16][DEPTH], b[DEPTH][8];
    for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < PER_WORD; ++half) {
            const int row = lane / 4, k = lane % 4 * PER_WORD + half;
            for (int n = 0; n < 4; ++n)
                a[row + n % 2 * 8][k + n / 2 * (DEPTH / 2)] = operand<T>(w.operands[lane][n], half);
            for (int n = 0; n < 2; ++n) b[k + n * (DEPTH / 2)][row] = operand<T>(w.operands[lane][4 + n], half);
        }
    for (int lane = 0; lane < 32; ++lane)
        for (int n = 0; n < 4; ++n) {
            double sum = w.accumulators[lane][n];
            for (int k = 0; k < DEPTH; ++k)
                sum += static_cast<double>(a[lane / 4 + n / 2 * 8][k]) * b[k][lane % 4 * 2 + n % 2];
            w.accumulators[lane][n] = static_cast<float>(sum);
        }
}

}  // namespace host

template <class T>
void mma(T, float* accumulator, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    if (host::machine.current->apart) host::machine.fail("host run: mma.sync in a warp whose lanes may have parted");
    const int lane = thread() % 32;
    const uint32_t operands[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(host::warp().operands[lane], operands, sizeof operands);
    host::warp().accumulators[lane] = accumulator;
    host::together(host::multiply<T>);
}

constexpr int INVALID_VALUE = 1;

template <class Kernel, class Arguments, class Launch>
int start(const Arguments& p, const Launch& launch) {
    const Grid grid = Kernel::grid(p, launch);
    if (launch.grid != nullptr) {
        *launch.grid = grid;
        return 0;
    }
    host::machine.run(grid.x, grid.y, grid.threads, grid.shared_bytes, grid.together, [&] { Kernel::run(p); });
    return 0;
}
