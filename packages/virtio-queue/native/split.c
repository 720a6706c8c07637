/* Split virtqueues, section 2.7. */

#include "virtio_queue.h"

int64_t vq_split_available(struct vq_ring *ring)
{
    uint16_t idx = vq_load16(vq_at(ring, &ring->driver, 2), __ATOMIC_ACQUIRE);
    uint16_t count = idx - (uint16_t)ring->next_avail;
    if (count > ring->size)
        return vq_fail(ring, VQ_AVAIL_IDX, -1, count);
    return count;
}

static int walk_table(struct vq_walk *walk, uint64_t table, uint32_t entries)
{
    struct vq_ring *ring = walk->ring;
    uint32_t index = 0;
    for (uint32_t i = 0; i < entries; i++) {
        struct vq_element element;
        if (index >= entries)
            return vq_fail(ring, VQ_TABLE_NEXT, index, index);
        if (!vq_read_descriptor(ring, table + 16 * (uint64_t)index, &element))
            return vq_fail(ring, VQ_TABLE_PLACE, index, table);
        if (element.a & VQ_INDIRECT)
            return vq_fail(ring, VQ_NESTED, index, element.a);
        int rc = vq_add_element(walk, index, element.address, element.length,
                                element.a & VQ_WRITE);
        if (rc != 0)
            return rc;
        if (!(element.a & VQ_NEXT))
            return 0;
        index = element.b;
    }
    if (index >= entries)
        return vq_fail(ring, VQ_TABLE_NEXT, index, index);
    return vq_fail(ring, VQ_TABLE_LOOP, index, entries);
}

int vq_split_pop(struct vq_ring *ring, struct vq_walk *walk)
{
    uint32_t slot = ring->next_avail & (ring->size - 1);
    uint32_t head = vq_load16(vq_at(ring, &ring->driver, 4 + 2 * slot), __ATOMIC_RELAXED);
    if (head < ring->heads && ring->flights[head].slots != 0)
        return vq_fail(ring, VQ_IN_FLIGHT, head, head);
    walk->chain->head = head;

    uint32_t index = head, slots = 0;
    for (;;) {
        struct vq_element element;
        if (index >= ring->size)
            return vq_fail(ring, VQ_INDEX, index, index);
        slots++;
        if (slots > ring->size)
            return vq_fail(ring, VQ_LOOP, index, slots);
        if (!vq_read_own(ring, index, &element))
            return vq_fail(ring, VQ_PLACE, index, ring->desc.address);
        if (element.a & VQ_INDIRECT) {
            if (!ring->indirect)
                return vq_fail(ring, VQ_NOT_NEGOTIATED, index, element.a);
            if (element.a & VQ_NEXT)
                return vq_fail(ring, VQ_INDIRECT_NEXT, index, element.a);
            int64_t entries = vq_table_entries(walk, index, element.address, element.length);
            if (entries < 0)
                return -1;
            int rc = walk_table(walk, element.address, (uint32_t)entries);
            if (rc != 0)
                return rc;
            break;
        }
        int rc = vq_add_element(walk, index, element.address, element.length,
                                element.a & VQ_WRITE);
        if (rc != 0)
            return rc;
        if (!(element.a & VQ_NEXT))
            break;
        index = element.b;
    }
    walk->chain->slots = slots;
    ring->next_avail = (ring->next_avail + 1) & 0xFFFF;
    return 1;
}

void vq_split_put(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                  const uint32_t *lengths)
{
    uint32_t next = ring->next_used;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t offset = 4 + 8 * (uint64_t)(next & (ring->size - 1));
        vq_store32(vq_at(ring, &ring->device, offset), heads[i], __ATOMIC_RELAXED);
        vq_store32(vq_at(ring, &ring->device, offset + 4), lengths[i], __ATOMIC_RELAXED);
        vq_mark(ring, &ring->device, offset, 8);
        next = (next + 1) & 0xFFFF;
    }
    vq_store16(vq_at(ring, &ring->device, 2), (uint16_t)next, __ATOMIC_RELEASE);
    vq_mark(ring, &ring->device, 2, 2);
    ring->next_used = next;
    ring->pending += count;
}

int vq_split_needs_notification(struct vq_ring *ring, uint64_t pending)
{
    if (!ring->event_idx)
        return !(vq_load16(vq_at(ring, &ring->driver, 0), __ATOMIC_RELAXED) & 1);
    uint64_t offset = 4 + 2 * (uint64_t)ring->size;
    uint16_t event = vq_load16(vq_at(ring, &ring->driver, offset), __ATOMIC_RELAXED);
    return (uint16_t)(ring->next_used - event - 1) < pending;
}

void vq_split_ask(struct vq_ring *ring, int wanted)
{
    if (!ring->event_idx) {
        vq_store16(vq_at(ring, &ring->device, 0), wanted ? 0 : 1, __ATOMIC_RELAXED);
        vq_mark(ring, &ring->device, 0, 2);
    } else if (wanted) {
        uint64_t offset = 4 + 8 * (uint64_t)ring->size;
        vq_store16(vq_at(ring, &ring->device, offset), (uint16_t)ring->next_avail,
                   __ATOMIC_RELAXED);
        vq_mark(ring, &ring->device, offset, 2);
    }
}
