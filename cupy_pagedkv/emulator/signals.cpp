// signals.cpp: an access to no memory, a stack that is too small and Ctrl-C end a launch as any error does.
//
// A kernel's own code holds no lock and owns nothing: where a signal finds the thread there, it can be left for good. Where
// it finds the thread in the library, the next barrier, collective, atomic or checked access ends the launch.

#include "worker.hpp"
#include <csignal>
#include <cstring>
#include <pthread.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace emulated {

static std::uintptr_t code_of(const void* context)
{
    const auto& registers = ((const ucontext_t*)context)->uc_mcontext;
#if defined(__x86_64__)
    return (std::uintptr_t)registers.gregs[REG_RIP];
#elif defined(__aarch64__)
    return (std::uintptr_t)registers.pc;
#else
    return (void)registers, 0;
#endif
}

// Where the running kernel was, as a call would name it; null, if it was not in the kernel's own code.
static const void* place_in_kernel(const void* context)
{
    const std::uintptr_t code = code_of(context);
    return worker && code >= worker->code && code < worker->code_end ? (const void*)(code + 1) : nullptr;
}

static void unblock(int signal)
{
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, signal);
    pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
}

#define WHO "thread (%u, %u, %u) of block (%u, %u, %u)"
#define ME threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z

#if !defined(__SANITIZE_ADDRESS__)  // which has its own word on that
static struct sigaction before_segv, before_bus;

static void on_fault(int signal, siginfo_t* info, void* context)
{
    const void* place = place_in_kernel(context);
    const char* address = (const char*)info->si_addr;
    if (worker) {
        const char* low = worker->thread().stack.low;
        if (low && address < low && address >= low - Stack::GUARD) {
            unblock(signal);
            fail(place, nullptr, place ? "{0}: " WHO " needs more than %zu bytes for its variables and calls"
                                       : WHO " needs more than %zu bytes for its variables and calls", ME, Stack::SIZE);
        }
    }
    if (place) {
        unblock(signal);
        fail(place, nullptr, "{0}: " WHO " accesses address %p, where no memory is", ME, (const void*)address);
    }
    sigaction(signal, signal == SIGSEGV ? &before_segv : &before_bus, nullptr);  // and the access happens again
}

// Handlers need a stack of their own, where that of the kernel is used up.
struct HandlersStack {
    std::unique_ptr<char[]> memory;
    HandlersStack()
    {
        stack_t now;
        if (sigaltstack(nullptr, &now) || !(now.ss_flags & SS_DISABLE)) return;  // there is one
        constexpr std::size_t SIZE = 64 * 1024;
        memory.reset(new char[SIZE]);
        now.ss_sp = memory.get(), now.ss_size = SIZE, now.ss_flags = 0;
        sigaltstack(&now, nullptr);
    }
    ~HandlersStack()
    {
        stack_t none{};
        none.ss_flags = SS_DISABLE;
        if (memory) sigaltstack(&none, nullptr);
    }
};

void watch_faults()
{
    static thread_local HandlersStack stack;
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &before_segv);
        sigaction(SIGBUS, &action, &before_bus);
    });
}
#else
void watch_faults() {}
#endif

static struct sigaction before_interrupt;
static Launch* of_main_thread;

static bool is_main_thread() { return syscall(SYS_gettid) == getpid(); }

static void on_interrupt(int signal, siginfo_t* info, void* context)
{
    // Python notes it, and raises KeyboardInterrupt when the launch has ended; of one passed on to a helper it knows.
    if (is_main_thread() || info->si_code != SI_TKILL) {
        if (before_interrupt.sa_flags & SA_SIGINFO)
            before_interrupt.sa_sigaction(signal, info, context);
        else
            before_interrupt.sa_handler(signal);
    }
    Launch* launch = of_main_thread;
    if (!launch) return;
    if (!launch->error[0]) std::strcpy(launch->error, "was interrupted");
    if (place_in_kernel(context) && &worker->launch == launch) {
        unblock(signal);
        worker->abandon();
    }
}

void Interruptible::interrupt(const Launch& launch, std::thread& helper)
{
    if (of_main_thread == &launch) pthread_kill(helper.native_handle(), SIGINT);
}

Interruptible::Interruptible(Launch& launch)
{
    if (!is_main_thread()) return;
    sigaction(SIGINT, nullptr, &before_interrupt);
    if (!(before_interrupt.sa_flags & SA_SIGINFO)
        && (before_interrupt.sa_handler == SIG_DFL || before_interrupt.sa_handler == SIG_IGN))
        return;
    of_main_thread = &launch;
    struct sigaction action{};
    action.sa_sigaction = on_interrupt;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGINT, &action, nullptr);
}

Interruptible::~Interruptible()
{
    if (!is_main_thread() || !of_main_thread) return;
    sigaction(SIGINT, &before_interrupt, nullptr);
    of_main_thread = nullptr;
}

}  // namespace emulated
