/* The C part of vm-memory: mappings with a counted lifetime, and atomic access to them. */
#ifndef VM_MEMORY_H
#define VM_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ != 8
#error "vm-memory supports 64-bit little-endian hosts"
#endif

/* One mapping of host memory. It is unmapped, and its file closed, with the last reference. */
struct vmm_mapping {
    uint8_t *base;       /* first byte of the memory itself */
    size_t length;       /* whole pages */
    int fd;              /* owned; -1 for anonymous memory */
    uint8_t *outer;      /* base less the guard in front */
    size_t outer_length; /* both guards included */
    long references;
};

/* On failure NULL, with the errno of the failing call in *error. Takes over `fd` on success only. */
struct vmm_mapping *vmm_mapping_new(size_t length, size_t alignment, size_t guard, int flags,
                                    int fd, int64_t offset, int *error);
void vmm_mapping_retain(struct vmm_mapping *mapping);
void vmm_mapping_release(struct vmm_mapping *mapping);

/* Replace pages by a private mapping of a file. 0, or the errno. The range is checked by the caller. */
int vmm_mapping_overlay(struct vmm_mapping *mapping, size_t start, size_t length, int fd,
                        int64_t offset);

/* Orders are numbered as in vm_memory.Order. Addresses are host addresses, aligned to `size`. */
void vmm_fence(int order);
uint64_t vmm_load(uint64_t host, uint32_t size, int order);
void vmm_store(uint64_t host, uint32_t size, uint64_t value, int order);
void vmm_fill(uint64_t host, int value, size_t length);

#endif
