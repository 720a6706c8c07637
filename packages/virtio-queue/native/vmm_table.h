/* The map of guest memory that vm-memory hands out (`GuestMemory.native_table`).
 *
 * Extensions share no header at build time: this repeats the declarations of vm-memory's
 * native/vm_memory.h, whose layout is an interface. `vq_bind` checks the version. */
#ifndef VMM_TABLE_H
#define VMM_TABLE_H

#include <stdint.h>

#define VMM_TABLE_VERSION 1

struct vmm_bitmap;
struct vmm_mapping;

struct vmm_table_region {
    uint64_t guest_address;
    uint64_t size;
    uint8_t *host;
    struct vmm_bitmap *bitmap; /* NULL when dirty pages are not tracked */
    struct vmm_mapping *mapping;
};

struct vmm_table {
    uint32_t version;
    uint32_t count;
    long references;
    void (*retain)(struct vmm_table *table);
    void (*release)(struct vmm_table *table);
    void (*mark)(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length);
    struct vmm_table_region regions[];
};

#endif
