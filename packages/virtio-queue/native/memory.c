/* Guest memory as the walker sees it: lookups in vm-memory's table, reads of descriptors. */

#include "virtio_queue.h"

int vq_fail(struct vq_ring *ring, int rule, int64_t descriptor, uint64_t value)
{
    ring->fault.rule = rule;
    ring->fault.descriptor = descriptor;
    ring->fault.value = value;
    return -1;
}

const struct vmm_table_region *vq_search(struct vq_ring *ring, uint64_t address)
{
    const struct vmm_table *table = ring->table;
    const struct vmm_table_region *region;
    uint32_t low = 0, high = table->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (table->regions[middle].guest_address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return NULL;
    region = &table->regions[low - 1];
    if (address - region->guest_address >= region->size)
        return NULL;
    ring->recent = low - 1;
    return region;
}

/* Whether `length` > 0 bytes from `address` are all memory; the caller excluded a wrap. */
int vq_check_range(struct vq_ring *ring, uint64_t address, uint64_t length)
{
    for (;;) {
        const struct vmm_table_region *region = vq_find(ring, address);
        if (region == NULL)
            return 0;
        uint64_t rest = region->size - (address - region->guest_address);
        if (length <= rest)
            return 1;
        address += rest;
        length -= rest;
    }
}

/* Descriptors of an indirect table that cross from one region into the next. */
int vq_read_crossing(struct vq_ring *ring, uint64_t address, uint64_t words[2])
{
    uint8_t *bytes = (uint8_t *)words;
    for (uint64_t i = 0; i < 16; i++) {
        const struct vmm_table_region *region = vq_find(ring, address + i);
        if (region == NULL)
            return 0;
        const volatile uint8_t *at = region->host + (address + i - region->guest_address);
        bytes[i] = *at;
    }
    return 1;
}

/* Regions start at multiples of 8, so a field lies in one of them. */
uint8_t *vq_at_slow(struct vq_ring *ring, const struct vq_area *area, uint64_t offset)
{
    const struct vmm_table_region *region = vq_find(ring, area->address + offset);
    return region->host + (area->address + offset - region->guest_address);
}

void vq_mark_slow(struct vq_ring *ring, const struct vq_area *area, uint64_t offset,
                  uint64_t length)
{
    if (area->host != NULL) {
        ring->table->mark(area->bitmap, area->offset + offset, length);
        return;
    }
    for (uint64_t at = area->address + offset; length != 0; at += 2, length -= 2) {
        const struct vmm_table_region *region = vq_find(ring, at);
        if (region->bitmap != NULL)
            ring->table->mark(region->bitmap, at - region->guest_address, 2);
    }
}

int vq_bind_area(struct vq_ring *ring, struct vq_area *area, uint64_t length)
{
    area->host = NULL;
    area->bitmap = NULL;
    if (area->address + length < area->address || !vq_check_range(ring, area->address, length))
        return 0;
    const struct vmm_table_region *region = vq_find(ring, area->address);
    uint64_t offset = area->address - region->guest_address;
    if (region->size - offset >= length) {
        area->host = region->host + offset;
        area->offset = offset;
        area->bitmap = region->bitmap;
    }
    return 1;
}
