// What freezes a lab that is not pinned to one host CPU, within seconds.
//
// One thread keeps a guest at VMRUN with an interrupt window asked for that never opens, which is
// where QEMU changes its pending interrupts without a lock. The other lives from timer interrupt to
// timer interrupt: when one is lost, the kernel never arms its one-shot timer again.
//
// Usage: stress SECONDS. Prints how many sleeps were served in each second.

#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { ORIGIN = 0x2000, MEMORY = 0x4000 };

// cpuid; jmp to it: exits to the kernel at each turn, and interrupts stay masked.
static const uint8_t turn[] = {0x0f, 0xa2, 0xeb, 0xfc};

static atomic_bool over;
static atomic_ulong naps;

static int ask(int file, unsigned long request, void *argument, const char *name)
{
    int result = ioctl(file, request, argument);
    if (result < 0)
        err(2, "%s", name);
    return result;
}

static void *spin(void *unused)
{
    (void)unused;
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(2, "/dev/kvm");
    int vm = ask(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
    uint8_t *memory =
        mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        err(2, "mmap");
    memcpy(memory + ORIGIN, turn, sizeof turn);
    struct kvm_userspace_memory_region region = {
        .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory};
    ask(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");

    int vcpu = ask(vm, KVM_CREATE_VCPU, NULL, "KVM_CREATE_VCPU");
    int size = ask(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        err(2, "mmap of the vCPU");
    struct kvm_sregs special;
    ask(vcpu, KVM_GET_SREGS, &special, "KVM_GET_SREGS");
    special.cs.selector = 0;
    special.cs.base = 0;
    ask(vcpu, KVM_SET_SREGS, &special, "KVM_SET_SREGS");
    struct kvm_regs general = {.rip = ORIGIN, .rflags = 2};
    ask(vcpu, KVM_SET_REGS, &general, "KVM_SET_REGS");
    run->request_interrupt_window = 1;
    while (!over) {
        ioctl(vcpu, KVM_RUN, NULL);
        if (run->exit_reason == KVM_EXIT_FAIL_ENTRY || run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
            errx(2, "the guest ended with exit reason %u", run->exit_reason);
    }
    return NULL;
}

static void *nap(void *unused)
{
    (void)unused;
    const struct timespec microsecond = {.tv_nsec = 1000};
    while (!over) {
        nanosleep(&microsecond, NULL);
        atomic_fetch_add(&naps, 1);
    }
    return NULL;
}

int main(int count, char **arguments)
{
    int seconds = count == 2 ? atoi(arguments[1]) : 0;
    if (seconds <= 0)
        errx(2, "usage: stress SECONDS");
    pthread_t threads[2];
    if (pthread_create(&threads[0], NULL, spin, NULL) || pthread_create(&threads[1], NULL, nap, NULL))
        errx(2, "no threads to be had");
    unsigned long before = 0;
    while (seconds-- > 0) {
        sleep(1);
        unsigned long now = atomic_load(&naps);
        printf("%lu\n", now - before);
        fflush(stdout);
        before = now;
    }
    over = true;
    for (int index = 0; index < 2; index++)
        pthread_join(threads[index], NULL);
    return 0;
}
