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

/* How often to look for room again that another thread took meanwhile. */
#define TRIES 100

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

/* Put memory where it was reserved. Between the guards nothing is replaced: a file may refuse after
 * the kernel took away what was there, and then another thread's mapping may be in the gap. */
static int occupy(struct vmm_mapping *mapping, int flags, int fd, int64_t offset)
{
    munmap(mapping->base, mapping->length);
    void *memory = mmap(mapping->base, mapping->length, PROT_READ | PROT_WRITE,
                        flags | MAP_FIXED_NOREPLACE, fd, offset);
    if (memory == mapping->base)
        return 0;
    int error = errno;
    if (memory != MAP_FAILED) { /* before Linux 4.17 the address is a wish */
        munmap(memory, mapping->length);
        error = EEXIST;
    }
    uint8_t *end = mapping->base + mapping->length, *outer_end = mapping->outer + mapping->outer_length;
    if (mapping->base > mapping->outer) {
        munmap(mapping->outer, (size_t)(mapping->base - mapping->outer));
        munmap(end, (size_t)(outer_end - end));
    }
    return error;
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
    for (int tries = 0; tries < TRIES; tries++) {
        *error = reserve(mapping, alignment, guard);
        if (*error != 0)
            break;
        *error = occupy(mapping, flags, fd, offset);
        if (*error == 0)
            return mapping;
        if (*error != EEXIST)
            break;
    }
    free(mapping);
    return NULL;
}

struct vmm_mapping *vmm_mapping_adopt(uint64_t host, size_t length, uint64_t owner)
{
    struct vmm_mapping *mapping = calloc(1, sizeof *mapping);
    if (mapping == NULL)
        return NULL;
    mapping->base = (uint8_t *)(uintptr_t)host;
    mapping->length = length;
    mapping->fd = -1;
    mapping->references = 1;
    mapping->watch = -1;
    mapping->owner = (void *)(uintptr_t)owner;
    vmm_keep(owner);
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
    if (mapping->outer_length != 0)
        munmap(mapping->outer, mapping->outer_length);
    if (mapping->owner != NULL)
        vmm_let_go(mapping->owner);
    if (mapping->fd >= 0)
        close(mapping->fd);
    free(mapping);
}

int vmm_mapping_overlay(struct vmm_mapping *mapping, size_t start, size_t length, int fd,
                        int64_t offset)
{
    uint8_t *base = mapping->base + start;
    /* Mapped elsewhere first: a file that refuses must not leave a gap in the guest's memory. */
    uint8_t *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd,
                           offset);
    if (memory == MAP_FAILED)
        return errno;
    if (mapping->no_dump)
        madvise(memory, length, MADV_DONTDUMP);
    if (mapping->no_fork)
        madvise(memory, length, MADV_DONTFORK);
    /* Watched before it is there: a mapping that nobody watches could kill the process. */
    int error = vmm_watch(mapping, base, length, (size_t)sysconf(_SC_PAGESIZE), VMM_WATCH_PAGES);
    if (error == 0 &&
        mremap(memory, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, base) == MAP_FAILED)
        error = errno;
    if (error != 0)
        munmap(memory, length);
    return error;
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
