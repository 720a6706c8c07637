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
    /* EAGAIN: an application processor was woken by INIT or SIPI and is to be entered again. */
    do {
        vcpu->runs++;
        result = ioctl(vcpu->fd, KVM_RUN_REQUEST, 0UL) < 0 ? -errno : 0;
    } while (result == -EAGAIN);
    __atomic_store_n(&vcpu->tid, 0, __ATOMIC_SEQ_CST);

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
