/* Memory that can be taken away from outside, and what happens then.
 *
 * A file that is truncated while it is mapped turns every access behind its end into SIGBUS, which
 * kills the process by default. The handler here puts a page of zeros where the lost one was, notes
 * the loss and lets the access go on; Python looks at the note after each copy and raises. An
 * access of a vCPU fails with EFAULT in KVM_RUN meanwhile and never comes here.
 *
 * A child of fork does not have memory that is excluded from inheritance, but it has the Python
 * objects that refer to it. So the child gets zeros there before any Python code runs in it.
 *
 * The handler may run in any thread at any time, so it reads nothing but this static table, without
 * a lock. A slot is in use while its length is not 0. One that changes meanwhile is not the one whose
 * memory is being accessed, for who accesses memory keeps it: it is told by its odd or new version. */

#include "vm_memory.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOTS 8192

struct range {
    uint8_t *base;
    size_t length;
    size_t page;
    enum vmm_watch kind;
};

static struct slot {
    struct range range;
    unsigned version; /* odd while the range changes */
    int lost;
    int next; /* of the same mapping */
} slots[SLOTS];

static int used; /* slots below are or were in use */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;

static int give_zeros(uint8_t *base, size_t length)
{
    return mmap(base, length, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

static void set_range(struct slot *slot, struct range range)
{
    __atomic_fetch_add(&slot->version, 1, __ATOMIC_ACQ_REL);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    slot->range = range;
    __atomic_fetch_add(&slot->version, 1, __ATOMIC_RELEASE);
}

/* The range of a slot if it contains an address; else one of no length. */
static struct range get_range(const struct slot *slot, uintptr_t address)
{
    unsigned version = __atomic_load_n(&slot->version, __ATOMIC_ACQUIRE);
    struct range range = slot->range;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if ((version & 1) || version != __atomic_load_n(&slot->version, __ATOMIC_RELAXED) ||
        range.kind == VMM_WATCH_NO_FORK || address - (uintptr_t)range.base >= range.length)
        range.length = 0;
    return range;
}

/* Put zeros where an access failed; whether it was to memory of ours. */
static int replace_lost(uintptr_t address, int code)
{
    int count = __atomic_load_n(&used, __ATOMIC_ACQUIRE);
    for (int i = 0; i < count; i++) {
        struct range range = get_range(&slots[i], address);
        if (range.length == 0)
            continue;
        size_t offset = (address - (uintptr_t)range.base) & ~(range.page - 1);
        /* Of a file that was cut, all pages behind this one are lost with it. Page by page would be
         * one mapping each, and the kernel allows 65530. Memory next to an overlay is sound, and
         * what the hardware lost is one page, as is what a pool of huge pages does not have. */
        int all = range.kind == VMM_WATCH_FILE && code == BUS_ADRERR;
        if (!give_zeros(range.base + offset, all ? range.length - offset : range.page))
            return 0;
        __atomic_store_n(&slots[i].lost, 1, __ATOMIC_RELEASE);
        return 1;
    }
    return 0;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    /* Only the kernel says where: a signal that was sent has its sender's numbers there. */
    int replaced = info->si_code > 0 && replace_lost((uintptr_t)info->si_addr, info->si_code);
    errno = saved;
    if (replaced)
        return;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
        return;
    }
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
        return;
    }
    int repeated = info->si_code > 0 && info->si_code != BUS_MCEERR_AO;
    if (!repeated && previous.sa_handler == SIG_IGN)
        return;
    signal(SIGBUS, SIG_DFL);
    if (!repeated) /* else the access is done again, and kills */
        raise(SIGBUS);
}

static void before_fork(void) { pthread_mutex_lock(&lock); }

static void after_fork(void) { pthread_mutex_unlock(&lock); }

static void in_child(void)
{
    for (int i = 0; i < used; i++)
        if (slots[i].range.length != 0 && slots[i].range.kind == VMM_WATCH_NO_FORK) {
            give_zeros(slots[i].range.base, slots[i].range.length);
            slots[i].lost = 1;
        }
    pthread_mutex_unlock(&lock);
}

/* Install what is needed, with the lock held. Somebody else's handler may have come on top of ours
 * (faulthandler does that): then ours goes on top again. */
static int install(enum vmm_watch kind)
{
    static int forks;
    if (!forks) {
        int error = pthread_atfork(before_fork, after_fork, in_child);
        if (error != 0)
            return error;
        forks = 1;
    }
    if (kind == VMM_WATCH_NO_FORK)
        return 0;
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) != 0)
        return errno;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus)
        return 0;
    struct sigaction ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&ours.sa_mask);
    /* A handler that was on top of ours calls it again in the end: never make that a circle. */
    static int installed;
    if (!installed)
        previous = now;
    installed = 1;
    return sigaction(SIGBUS, &ours, NULL) == 0 ? 0 : errno;
}

int vmm_watch(struct vmm_mapping *mapping, uint8_t *base, size_t length, size_t page,
              enum vmm_watch kind)
{
    pthread_mutex_lock(&lock);
    int error = install(kind);
    int i = 0;
    while (i < SLOTS && slots[i].range.length != 0)
        i++;
    if (error == 0 && i == SLOTS)
        error = ENFILE;
    if (error == 0) {
        slots[i].lost = 0;
        slots[i].next = mapping->watch;
        mapping->watch = i;
        set_range(&slots[i], (struct range){base, length, page, kind});
        if (i >= used)
            __atomic_store_n(&used, i + 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

void vmm_unwatch(struct vmm_mapping *mapping)
{
    pthread_mutex_lock(&lock);
    for (int i = mapping->watch; i >= 0; i = slots[i].next)
        set_range(&slots[i], (struct range){0});
    mapping->watch = -1;
    pthread_mutex_unlock(&lock);
}

int vmm_mapping_guard_faults(struct vmm_mapping *mapping, size_t page, int each)
{
    int huge = page != (size_t)sysconf(_SC_PAGESIZE);
    return vmm_watch(mapping, mapping->base, mapping->length, page,
                     huge || each ? VMM_WATCH_PAGES : VMM_WATCH_FILE);
}

int vmm_mapping_lost(struct vmm_mapping *mapping)
{
    int lost = __atomic_load_n(&mapping->lost, __ATOMIC_ACQUIRE);
    pthread_mutex_lock(&lock);
    for (int i = mapping->watch; i >= 0; i = slots[i].next)
        lost |= __atomic_load_n(&slots[i].lost, __ATOMIC_ACQUIRE);
    pthread_mutex_unlock(&lock);
    return lost;
}

void vmm_mapping_lose(struct vmm_mapping *mapping)
{
    __atomic_store_n(&mapping->lost, 1, __ATOMIC_RELEASE);
}
