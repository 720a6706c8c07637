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
 * The handler may run in any thread at any time, so it reads nothing but this static table. A slot
 * is in use while its length is not 0. */

#include "vm_memory.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

#define SLOTS 8192

static struct slot {
    uint8_t *base;
    size_t length;
    size_t page;
    enum vmm_watch kind;
    int lost;
    int next; /* of the same mapping */
} slots[SLOTS];

static int used; /* slots below are or were in use */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;

static void give_zeros(uint8_t *base, size_t length)
{
    mmap(base, length, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    uintptr_t address = (uintptr_t)info->si_addr;
    int count = __atomic_load_n(&used, __ATOMIC_ACQUIRE);
    for (int i = 0; i < count; i++) {
        struct slot *slot = &slots[i];
        size_t length = __atomic_load_n(&slot->length, __ATOMIC_ACQUIRE);
        if (length == 0 || slot->kind == VMM_WATCH_NO_FORK ||
            address - (uintptr_t)slot->base >= length)
            continue;
        size_t offset = (address - (uintptr_t)slot->base) & ~(slot->page - 1);
        /* Of a file that was cut, all pages behind this one are lost with it. Page by page
         * would be one mapping each, and the kernel allows 65530. Memory next to an overlay is
         * sound, and what the hardware lost is one page. */
        int all = slot->kind == VMM_WATCH_FILE && info->si_code == BUS_ADRERR;
        void *zeros = mmap(slot->base + offset, all ? length - offset : slot->page,
                           PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        if (zeros == MAP_FAILED)
            break;
        __atomic_store_n(&slot->lost, 1, __ATOMIC_RELEASE);
        errno = saved;
        return;
    }
    errno = saved;
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(number, info, context);
    else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
        previous.sa_handler(number);
    else
        sigaction(SIGBUS, &previous, NULL); /* the access is repeated, and kills */
}

static void before_fork(void) { pthread_mutex_lock(&lock); }

static void after_fork(void) { pthread_mutex_unlock(&lock); }

static void in_child(void)
{
    for (int i = 0; i < used; i++)
        if (slots[i].length != 0 && slots[i].kind == VMM_WATCH_NO_FORK) {
            give_zeros(slots[i].base, slots[i].length);
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
    while (i < SLOTS && slots[i].length != 0)
        i++;
    if (error == 0 && i == SLOTS)
        error = ENFILE;
    if (error == 0) {
        slots[i].base = base;
        slots[i].page = page;
        slots[i].kind = kind;
        slots[i].lost = 0;
        slots[i].next = mapping->watch;
        mapping->watch = i;
        __atomic_store_n(&slots[i].length, length, __ATOMIC_RELEASE);
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
        __atomic_store_n(&slots[i].length, 0, __ATOMIC_RELEASE);
    mapping->watch = -1;
    pthread_mutex_unlock(&lock);
}

int vmm_mapping_guard_faults(struct vmm_mapping *mapping, size_t page)
{
    return vmm_watch(mapping, mapping->base, mapping->length, page, VMM_WATCH_FILE);
}

int vmm_mapping_lost(struct vmm_mapping *mapping)
{
    int lost = 0;
    pthread_mutex_lock(&lock);
    for (int i = mapping->watch; i >= 0; i = slots[i].next)
        lost |= __atomic_load_n(&slots[i].lost, __ATOMIC_ACQUIRE);
    pthread_mutex_unlock(&lock);
    return lost;
}

void vmm_mapping_lose(struct vmm_mapping *mapping)
{
    pthread_mutex_lock(&lock);
    for (int i = mapping->watch; i >= 0; i = slots[i].next)
        __atomic_store_n(&slots[i].lost, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
}
