/* The floor of an exit: KVM_RUN in a loop on a vCPU that Python made, reads answered by a constant.
 *
 * Each function does its work `count` times and returns the nanoseconds of one. They are called
 * through ctypes on the same vCPU, in the same thread and between the same runs as our own way. */

#define _GNU_SOURCE
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static volatile uint64_t sink;

static int exit_once(int fd, struct kvm_run *run)
{
    if (ioctl(fd, KVM_RUN, 0) != 0)
        return -1;
    switch (run->exit_reason) {
    case KVM_EXIT_IO: {
        uint8_t *data = (uint8_t *)run + run->io.data_offset;
        if (run->io.direction == KVM_EXIT_IO_OUT)
            sink += *data;
        else
            *data = 0x60;
        return 0;
    }
    case KVM_EXIT_MMIO:
        if (run->mmio.is_write)
            sink += run->mmio.data[0];
        else
            run->mmio.data[0] = 0x60;
        return 0;
    case KVM_EXIT_HLT:
        return 0;
    }
    return -1;
}

double floor_exits(int fd, void *run, int count)
{
    int64_t start = now();
    for (int i = 0; i < count; i++)
        if (exit_once(fd, run) != 0)
            return -1;
    return (double)(now() - start) / count;
}

/* Raise an interrupt by its eventfd and run to the exit that its handler makes. */
double floor_irqfd(int fd, void *run, int count, int irqfd)
{
    int64_t start = now();
    for (int i = 0; i < count; i++)
        if (write(irqfd, &(uint64_t){1}, 8) != 8 || exit_once(fd, run) != 0)
            return -1;
    return (double)(now() - start) / count;
}

/* Run to an exit before which the guest has signalled an ioeventfd, and take the signal. */
double floor_ioeventfd(int fd, void *run, int count, int eventfd)
{
    uint64_t value;
    int64_t start = now();
    for (int i = 0; i < count; i++)
        if (exit_once(fd, run) != 0 || read(eventfd, &value, 8) != 8)
            return -1;
    return (double)(now() - start) / count;
}

double floor_ioctl(int fd, unsigned long request, void *data, int count)
{
    int64_t start = now();
    for (int i = 0; i < count; i++)
        if (ioctl(fd, request, data) != 0)
            return -1;
    return (double)(now() - start) / count;
}
