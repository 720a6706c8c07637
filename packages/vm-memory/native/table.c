/* Maps of guest memory for C code, of this extension and of others. */

#include "vm_memory.h"

#include <stdlib.h>

struct vmm_table *vmm_table_new(uint32_t count)
{
    struct vmm_table *table = calloc(1, sizeof *table + count * sizeof table->regions[0]);
    if (table == NULL)
        return NULL;
    table->version = VMM_TABLE_VERSION;
    table->count = count;
    table->references = 1;
    table->retain = vmm_table_retain;
    table->release = vmm_table_release;
    table->mark = vmm_bitmap_mark;
    return table;
}

void vmm_table_set(struct vmm_table *table, uint32_t index, uint64_t guest_address, uint64_t size,
                   struct vmm_mapping *mapping, struct vmm_bitmap *bitmap)
{
    struct vmm_table_region *region = &table->regions[index];
    vmm_mapping_retain(mapping);
    if (bitmap != NULL)
        vmm_bitmap_retain(bitmap);
    region->guest_address = guest_address;
    region->size = size;
    region->host = mapping->base;
    region->bitmap = bitmap;
    region->mapping = mapping;
}

void vmm_table_retain(struct vmm_table *table)
{
    __atomic_fetch_add(&table->references, 1, __ATOMIC_RELAXED);
}

void vmm_table_release(struct vmm_table *table)
{
    if (__atomic_sub_fetch(&table->references, 1, __ATOMIC_ACQ_REL) != 0)
        return;
    for (uint32_t i = 0; i < table->count; i++) {
        if (table->regions[i].mapping != NULL)
            vmm_mapping_release(table->regions[i].mapping);
        if (table->regions[i].bitmap != NULL)
            vmm_bitmap_release(table->regions[i].bitmap);
    }
    free(table);
}

int64_t vmm_table_find(const struct vmm_table *table, uint64_t address)
{
    uint32_t low = 0, high = table->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (table->regions[middle].guest_address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0 || address - table->regions[low - 1].guest_address >= table->regions[low - 1].size)
        return -1;
    return (int64_t)low - 1;
}
