/* Mappings of host memory with a counted lifetime.
 *
 * Python's references and those of C consumers count alike, so memory can vanish under neither. */

#include "vm_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#define RESERVED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
#define HUGETLBFS 0x958458f6

/* Reserve address space for the memory and both guards, the memory aligned. */
static int reserve(struct vmm_mapping *mapping, size_t alignment, size_t guard)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t slack = alignment > page ? alignment : 0;
    size_t wanted, total;
    if (__builtin_add_overflow(mapping->length, 2 * guard, &wanted) ||
        __builtin_add_overflow(wanted, slack, &total))
        return ENOMEM;
    uint8_t *area = mmap(NULL, total, PROT_NONE, RESERVED, -1, 0);
    if (area == MAP_FAILED)
        return errno;
    uintptr_t first = (uintptr_t)area + guard;
    uint8_t *base = slack ? (uint8_t *)((first + alignment - 1) & ~(uintptr_t)(alignment - 1))
                          : (uint8_t *)first;
    uint8_t *outer = base - guard;
    if (outer > area)
        munmap(area, (size_t)(outer - area));
    if (area + total > outer + wanted)
        munmap(outer + wanted, (size_t)(area + total - (outer + wanted)));
    mapping->base = base;
    mapping->outer = outer;
    mapping->outer_length = wanted;
    return 0;
}

struct vmm_mapping *vmm_mapping_new(size_t length, size_t alignment, size_t guard, int flags,
                                    int fd, int64_t offset, int *error)
{
    struct vmm_mapping *mapping = calloc(1, sizeof *mapping);
    if (mapping == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    mapping->length = length;
    mapping->fd = fd;
    mapping->references = 1;
    mapping->watch = -1;
    *error = reserve(mapping, alignment, guard);
    if (*error != 0) {
        free(mapping);
        return NULL;
    }
    /* MAP_FIXED over our own reservation: the only place where an address is forced. */
    void *memory = mmap(mapping->base, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, offset);
    if (memory == MAP_FAILED) {
        *error = errno;
        munmap(mapping->outer, mapping->outer_length);
        free(mapping);
        return NULL;
    }
    return mapping;
}

void vmm_mapping_retain(struct vmm_mapping *mapping)
{
    __atomic_fetch_add(&mapping->references, 1, __ATOMIC_RELAXED);
}

void vmm_mapping_release(struct vmm_mapping *mapping)
{
    if (__atomic_sub_fetch(&mapping->references, 1, __ATOMIC_ACQ_REL) != 0)
        return;
    vmm_unwatch(mapping);
    munmap(mapping->outer, mapping->outer_length);
    if (mapping->fd >= 0)
        close(mapping->fd);
    free(mapping);
}

int vmm_mapping_overlay(struct vmm_mapping *mapping, size_t start, size_t length, int fd,
                        int64_t offset)
{
    uint8_t *base = mapping->base + start;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    /* Watched first: a mapping that nobody watches could kill the process. */
    int error = vmm_watch(mapping, base, length, page, VMM_WATCH_OVERLAY);
    if (error != 0)
        return error;
    void *memory = mmap(base, length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, offset);
    if (memory == MAP_FAILED)
        return errno;
    /* The pages are new to the kernel: say again what was said about the old ones. */
    if (mapping->no_dump)
        madvise(base, length, MADV_DONTDUMP);
    if (mapping->no_fork)
        madvise(base, length, MADV_DONTFORK);
    return 0;
}

int vmm_mapping_exclude(struct vmm_mapping *mapping, int from_dumps, int from_forks)
{
    if (from_dumps) {
        if (madvise(mapping->base, mapping->length, MADV_DONTDUMP) != 0)
            return errno;
        mapping->no_dump = 1;
    }
    if (from_forks) {
        int error = vmm_watch(mapping, mapping->base, mapping->length,
                              (size_t)sysconf(_SC_PAGESIZE), VMM_WATCH_NO_FORK);
        if (error != 0)
            return error;
        if (madvise(mapping->base, mapping->length, MADV_DONTFORK) != 0)
            return errno;
        mapping->no_fork = 1;
    }
    return 0;
}

size_t vmm_file_page_size(int fd)
{
    struct statfs system;
    if (fstatfs(fd, &system) != 0 || (uint32_t)system.f_type != HUGETLBFS)
        return 0;
    return (size_t)system.f_bsize;
}
