/* KVM_RUN, and the kick that ends it from any thread.
 *
 * A kick must end the run that is under way, or else the next one. Two flags decide which:
 * kvm_run.immediate_exit, which the kernel reads when it enters KVM_RUN, and `tid`, which says that
 * a thread may already be past that point. The runner stores tid, then the kernel reads the flag;
 * the kicker stores the flag, then reads tid. All four are sequentially consistent, so at least one
 * side sees the other: either KVM_RUN refuses to enter, or the kicker sends a signal. A signal that
 * arrives before the system call does no harm, because the flag is set already.
 *
 * The flag is taken back only by the run that reports the kick, with an exchange: a kick that falls
 * between an exit for another reason and the next run stays set and ends that next run.
 */
#define _GNU_SOURCE
#include "kvmi.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define KVM_RUN_REQUEST 0xAE80UL
#define IMMEDIATE_EXIT 1 /* offset in struct kvm_run */
#define EXIT_REASON 8
#define UNION 32
#define EXIT_IO 2
#define EXIT_MMIO 6
#define EXIT_MEMORY_FAULT 39

static __thread int thread_id;
static pthread_mutex_t signal_lock = PTHREAD_MUTEX_INITIALIZER;
static int signal_number;

static void no_op(int number)
{
    (void)number;
}

static void forget_thread(void)
{
    thread_id = 0;
}

int kvmi_kick_signal(void)
{
    int result = -EBUSY;
    pthread_mutex_lock(&signal_lock);
    if (signal_number) {
        result = signal_number;
        goto done;
    }
    /* The first real-time signal nobody uses. glibc keeps the lowest ones to itself. */
    for (int number = SIGRTMIN + 1; number <= SIGRTMAX; number++) {
        struct sigaction old, ours;
        if (sigaction(number, 0, &old) < 0 || old.sa_handler != SIG_DFL)
            continue;
        memset(&ours, 0, sizeof ours);
        ours.sa_handler = no_op; /* no SA_RESTART: a system call it meets ends with EINTR */
        sigemptyset(&ours.sa_mask);
        if (sigaction(number, &ours, 0) < 0)
            continue;
        pthread_atfork(0, 0, forget_thread);
        signal_number = result = number;
        break;
    }
done:
    pthread_mutex_unlock(&signal_lock);
    return result;
}

void kvmi_vcpu_init(kvmi_vcpu *vcpu, int fd, uint8_t *page, int kick_signal)
{
    memset(vcpu, 0, sizeof *vcpu);
    vcpu->fd = fd;
    vcpu->page = page;
    vcpu->kick_signal = kick_signal;
}

/* Once a thread: learn its id, and make sure the kick's signal reaches it. */
static int prepare_thread(int number)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_UNBLOCK, &set, 0);
    return thread_id = (int)syscall(SYS_gettid);
}

/* One KVM_RUN: an exit reason, KVMI_KICKED or -errno. */
static int enter(kvmi_vcpu *vcpu)
{
    int result;

    /* EAGAIN: an application processor was woken by INIT or SIPI and is to be entered again. */
    do {
        vcpu->runs++;
        result = ioctl(vcpu->fd, KVM_RUN_REQUEST, 0UL) < 0 ? -errno : 0;
    } while (result == -EAGAIN);
    if (result == -EINTR) {
        if (__atomic_exchange_n(&vcpu->page[IMMEDIATE_EXIT], 0, __ATOMIC_SEQ_CST)) {
            vcpu->kicks++;
            result = KVMI_KICKED;
        }
    } else {
        int reason = *(volatile int *)(vcpu->page + EXIT_REASON);
        /* A memory fault is an exit although the system call fails with EFAULT or EHWPOISON. */
        if (result == 0 ||
            ((result == -EFAULT || result == -EHWPOISON) && reason == EXIT_MEMORY_FAULT))
            result = reason & 0x7fffffff;
    }
    return result;
}

/* The data of port I/O and MMIO in struct kvm_run. */
struct io {
    uint8_t direction, size;
    uint16_t port;
    uint32_t count;
    uint64_t data_offset;
};
struct mmio {
    uint64_t phys_addr;
    uint8_t data[8];
    uint32_t len;
    uint8_t is_write;
};

static int serve(kvmi_vcpu *vcpu, int reason)
{
    if (reason == EXIT_IO) {
        struct io *io = (struct io *)(vcpu->page + UNION);
        return io->count == 1 && kvmi_hot_serve(vcpu->hot, io->port, io->size, 1, io->direction,
                                                vcpu->page + io->data_offset);
    }
    if (reason == EXIT_MMIO) {
        struct mmio *mmio = (struct mmio *)(vcpu->page + UNION);
        return mmio->len <= 8 && kvmi_hot_serve(vcpu->hot, mmio->phys_addr, mmio->len, 0,
                                                mmio->is_write, mmio->data);
    }
    return 0;
}

/* Writes that were posted come before whatever ended the run, so that waits until they are taken. */
static int hold(kvmi_vcpu *vcpu, int result)
{
    vcpu->has_held = kvmi_hot_waiting(vcpu->hot);
    vcpu->held = result;
    return vcpu->has_held ? KVMI_POSTED : result;
}

static int run_hot(kvmi_vcpu *vcpu)
{
    uint32_t left = vcpu->limit;
    int result = vcpu->held;

    if (vcpu->has_held)
        return hold(vcpu, result);
    while (serve(vcpu, result = enter(vcpu))) {
        vcpu->served++;
        if (!--left) {
            result = -EINTR;
            break;
        }
    }
    return hold(vcpu, result);
}

int kvmi_run(kvmi_vcpu *vcpu)
{
    int tid = thread_id ? thread_id : prepare_thread(vcpu->kick_signal);
    int result;

    if (__atomic_exchange_n(&vcpu->running, 1, __ATOMIC_SEQ_CST))
        return -EBUSY;
    if (__atomic_load_n(&vcpu->retired, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&vcpu->running, 0, __ATOMIC_SEQ_CST);
        return -EBADF;
    }
    __atomic_store_n(&vcpu->tid, tid, __ATOMIC_SEQ_CST);
    result = vcpu->hot ? run_hot(vcpu) : enter(vcpu);
    __atomic_store_n(&vcpu->tid, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&vcpu->running, 0, __ATOMIC_SEQ_CST);
    return result;
}

/* What ended the run before last posted writes were found; to be called once they are taken. */
int kvmi_take_held(kvmi_vcpu *vcpu)
{
    vcpu->has_held = 0;
    return vcpu->held;
}

int kvmi_serve_hot(kvmi_vcpu *vcpu, kvmi_hot *hot, uint32_t limit)
{
    if (__atomic_exchange_n(&vcpu->running, 1, __ATOMIC_SEQ_CST))
        return -EBUSY;
    int result = vcpu->has_held ? -EBUSY : 0;
    if (!result) {
        vcpu->hot = hot;
        vcpu->limit = limit;
    }
    __atomic_store_n(&vcpu->running, 0, __ATOMIC_SEQ_CST);
    return result;
}

int kvmi_kick(kvmi_vcpu *vcpu)
{
    /* A kick that is already pending sends its own signal; a second one could only fill the queue
     * of real-time signals, whose length is limited. */
    if (__atomic_exchange_n(&vcpu->page[IMMEDIATE_EXIT], 1, __ATOMIC_SEQ_CST))
        return 0;
    for (int tries = 0; tries < 20000; tries++) {
        int tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST);
        if (!tid)
            return 0;
        if (syscall(SYS_tgkill, getpid(), tid, vcpu->kick_signal) == 0) {
            __atomic_fetch_add(&vcpu->signals, 1, __ATOMIC_RELAXED);
            return 0;
        }
        if (errno == ESRCH)
            return 0; /* the thread has ended, so it is not in KVM_RUN */
        if (errno != EAGAIN)
            return -errno;
        /* The process's queue of real-time signals is full: wait for room. */
        nanosleep(&(struct timespec){.tv_nsec = 50000}, 0);
        if (!__atomic_load_n(&vcpu->page[IMMEDIATE_EXIT], __ATOMIC_SEQ_CST))
            return 0;
    }
    return -EAGAIN;
}

/* Let no further run begin and wait until the one under way has ended. */
void kvmi_retire(kvmi_vcpu *vcpu)
{
    __atomic_store_n(&vcpu->retired, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&vcpu->running, __ATOMIC_SEQ_CST)) {
        int tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST);
        __atomic_store_n(&vcpu->page[IMMEDIATE_EXIT], 1, __ATOMIC_SEQ_CST);
        if (tid)
            syscall(SYS_tgkill, getpid(), tid, vcpu->kick_signal);
        nanosleep(&(struct timespec){.tv_nsec = 100000}, 0);
    }
}
