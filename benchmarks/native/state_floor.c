/* The floor of a restore: the same ioctls that ours made, in bare C, to the guest's first exit.
 *
 *     state_floor SCRIPT MEMORY WAY RANGES...
 *
 * SCRIPT is a recording of our own ioctls but KVM_CREATE_VM; MEMORY the snapshot's file; WAY one of eager,
 * copy-on-write and on-demand; RANGES are GUEST_ADDRESS:SIZE:FILE_OFFSET. Prints nanoseconds. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct record {
    uint32_t target, pointer; /* 0 /dev/kvm, 1 the VM, 2 its first vCPU */
    uint64_t request, value;
    uint32_t size, unused;
};

static struct {
    uint64_t guest, size, offset;
    uint8_t *host;
} ranges[8];
static int count, file, uffd;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void read_in(int i)
{
    off_t place = (off_t)ranges[i].offset, end = place + (off_t)ranges[i].size;
    while (place < end && (place = lseek(file, place, SEEK_DATA)) >= 0 && place < end) {
        off_t hole = lseek(file, place, SEEK_HOLE);
        hole = hole > end ? end : hole;
        while (place < hole) {
            ssize_t got = pread(file, ranges[i].host + (place - (off_t)ranges[i].offset),
                                (size_t)(hole - place), place);
            if (got <= 0)
                die("pread");
            place += got;
        }
    }
}

static void *serve(void *unused)
{
    (void)unused;
    static uint8_t page[4096];
    struct uffd_msg message;
    while (read(uffd, &message, sizeof message) == sizeof message) {
        uint64_t at = message.arg.pagefault.address & ~4095ULL;
        for (int i = 0; i < count; i++)
            if (at - (uint64_t)ranges[i].host < ranges[i].size) {
                uint64_t place = at - (uint64_t)ranges[i].host + ranges[i].offset;
                if (pread(file, page, 4096, (off_t)place) != 4096)
                    die("pread");
                struct uffdio_copy copy = {.dst = at, .src = (uint64_t)page, .len = 4096};
                ioctl(uffd, UFFDIO_COPY, &copy);
            }
    }
    return NULL;
}

static void map(const char *path, const char *way)
{
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        die(path);
    int demand = strcmp(way, "on-demand") == 0, private = strcmp(way, "copy-on-write") == 0;
    if (demand) {
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
        struct uffdio_api api = {.api = UFFD_API};
        if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) != 0)
            die("userfaultfd");
    }
    for (int i = 0; i < count; i++) {
        int flags = MAP_PRIVATE | MAP_NORESERVE | (private ? 0 : MAP_ANONYMOUS);
        ranges[i].host = mmap(NULL, ranges[i].size, PROT_READ | PROT_WRITE, flags,
                              private ? file : -1, private ? (off_t)ranges[i].offset : 0);
        if (ranges[i].host == MAP_FAILED)
            die("mmap");
        if (demand) {
            struct uffdio_register range = {.range = {(uint64_t)ranges[i].host, ranges[i].size},
                                            .mode = UFFDIO_REGISTER_MODE_MISSING};
            if (ioctl(uffd, UFFDIO_REGISTER, &range) != 0)
                die("UFFDIO_REGISTER");
        } else if (!private)
            read_in(i);
    }
    pthread_t thread;
    if (demand && pthread_create(&thread, NULL, serve, NULL) != 0)
        die("pthread_create");
}

static void patch(const struct record *record, uint8_t *data)
{
    int fd;
    if (record->request == KVM_SET_USER_MEMORY_REGION) {
        struct kvm_userspace_memory_region *region = (void *)data;
        for (int i = 0; i < count; i++)
            if (ranges[i].guest == region->guest_phys_addr)
                region->userspace_addr = (uint64_t)ranges[i].host;
    } else if (record->request == KVM_IRQFD || record->request == KVM_IOEVENTFD) {
        if ((fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0)
            die("eventfd");
        if (record->request == KVM_IRQFD)
            ((struct kvm_irqfd *)data)->fd = (uint32_t)fd;
        else
            ((struct kvm_ioeventfd *)data)->fd = fd;
    }
}

int main(int argc, char **argv)
{
    static uint8_t script[1 << 20];
    int fd = argc > 4 ? open(argv[1], O_RDONLY) : -1;
    ssize_t length = fd < 0 ? -1 : read(fd, script, sizeof script);
    if (length <= 0 || length == sizeof script)
        die("script");
    for (int i = 4; i < argc && count < 8; i++, count++)
        sscanf(argv[i], "%lu:%lu:%lu", &ranges[count].guest, &ranges[count].size,
               &ranges[count].offset);

    int64_t start = now();
    map(argv[2], argv[3]);
    int fds[3] = {open("/dev/kvm", O_RDWR | O_CLOEXEC), -1, -1};
    fds[1] = ioctl(fds[0], KVM_CREATE_VM, 0);
    if (fds[1] < 0)
        die("KVM_CREATE_VM");
    struct kvm_run *run = NULL;
    for (uint8_t *at = script; at < script + length;) {
        struct record *record = (void *)at;
        uint8_t *data = at + sizeof *record;
        at = data + (record->size + 7) / 8 * 8;
        if (record->pointer)
            patch(record, data);
        int result = ioctl(fds[record->target], record->request,
                           record->pointer ? (uint64_t)data : record->value);
        if (record->request == KVM_CREATE_VCPU) {
            fds[2] = result;
            int size = ioctl(fds[0], KVM_GET_VCPU_MMAP_SIZE, 0);
            run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[2], 0);
            if (run == MAP_FAILED)
                die("mmap of the vCPU");
        }
    }
    if (run == NULL)
        die("no vCPU in the script");
    if (ioctl(fds[2], KVM_RUN, 0) != 0 || run->exit_reason != KVM_EXIT_IO) {
        fprintf(stderr, "exit reason %u\n", run->exit_reason);
        return 1;
    }
    printf("%ld\n", now() - start);
    return 0;
}
