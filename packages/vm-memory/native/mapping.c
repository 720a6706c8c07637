/* Mappings of host memory with a counted lifetime.
 *
 * Python's references and those of C consumers count alike, so memory can vanish under neither. */

#include "vm_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define RESERVED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

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
    munmap(mapping->outer, mapping->outer_length);
    if (mapping->fd >= 0)
        close(mapping->fd);
    free(mapping);
}

int vmm_mapping_overlay(struct vmm_mapping *mapping, size_t start, size_t length, int fd,
                        int64_t offset)
{
    void *memory = mmap(mapping->base + start, length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, offset);
    return memory == MAP_FAILED ? errno : 0;
}
