/* Packed virtqueues, section 2.8. A position is an offset with the wrap counter in bit 15. */

#include "virtio_queue.h"

#define AVAIL 0x0080u
#define USED 0x8000u

enum { EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC };

uint32_t vq_packed_advance(const struct vq_ring *ring, uint32_t position, int64_t count)
{
    int64_t offset = (int64_t)(position & ~VQ_WRAP) + count;
    uint32_t wrap = position & VQ_WRAP;
    if (offset >= (int64_t)ring->size) {
        offset -= ring->size;
        wrap ^= VQ_WRAP;
    } else if (offset < 0) {
        offset += ring->size;
        wrap ^= VQ_WRAP;
    }
    return (uint32_t)offset | wrap;
}

static int is_available(uint32_t flags, uint32_t position)
{
    int wrap = (position & VQ_WRAP) != 0;
    return ((flags & AVAIL) != 0) == wrap && ((flags & USED) != 0) != wrap;
}

int64_t vq_packed_available(struct vq_ring *ring)
{
    uint64_t offset = 16 * (uint64_t)(ring->next_avail & ~VQ_WRAP) + 14;
    uint32_t flags = vq_load16(vq_at(ring, &ring->desc, offset), __ATOMIC_ACQUIRE);
    return is_available(flags, ring->next_avail);
}

static int walk_table(struct vq_walk *walk, uint64_t table, uint32_t entries)
{
    for (uint32_t i = 0; i < entries; i++) {
        struct vq_element element;
        if (!vq_read_descriptor(walk->ring, table + 16 * (uint64_t)i, &element))
            return vq_fail(walk->ring, VQ_TABLE_PLACE, i, table);
        int rc = vq_add_element(walk, i, element.address, element.length, element.b & VQ_WRITE);
        if (rc != 0)
            return rc;
    }
    return 0;
}

/* Descriptors between the positions of the device's reading and its writing. */
static uint32_t ahead(const struct vq_ring *ring)
{
    int64_t count = (int64_t)(ring->next_avail & ~VQ_WRAP) - (ring->next_used & ~VQ_WRAP);
    if ((ring->next_avail ^ ring->next_used) & VQ_WRAP)
        count += ring->size;
    return (uint32_t)count;
}

int vq_packed_pop(struct vq_ring *ring, struct vq_walk *walk)
{
    if (!vq_packed_available(ring))
        return 0;
    uint32_t position = ring->next_avail, slots = 0, index;
    struct vq_element element;
    for (;;) {
        index = position & ~VQ_WRAP;
        slots++;
        if (slots > ring->size)
            return vq_fail(ring, VQ_LIST_LENGTH, index, slots);
        if (!vq_read_own(ring, index, &element))
            return vq_fail(ring, VQ_PLACE, index, ring->desc.address);
        if (!is_available(element.b, position))
            return vq_fail(ring, VQ_LIST_PARTIAL, index, element.b);
        position = vq_packed_advance(ring, position, 1);
        int rc;
        if (element.b & VQ_INDIRECT) {
            if (!ring->indirect)
                return vq_fail(ring, VQ_NOT_NEGOTIATED, index, element.b);
            if ((element.b & VQ_NEXT) || slots > 1)
                return vq_fail(ring, VQ_INDIRECT_NEXT, index, element.b);
            int64_t entries = vq_table_entries(walk, index, element.address, element.length);
            if (entries < 0)
                return -1;
            rc = walk_table(walk, element.address, (uint32_t)entries);
            if (rc != 0)
                return rc;
            break;
        }
        rc = vq_add_element(walk, index, element.address, element.length, element.b & VQ_WRITE);
        if (rc != 0)
            return rc;
        if (!(element.b & VQ_NEXT))
            break;
    }
    if (ring->flights[element.a].slots != 0)
        return vq_fail(ring, VQ_IN_FLIGHT, index, element.a);
    if (ahead(ring) + slots > ring->size)
        return vq_fail(ring, VQ_RING_FULL, index, ahead(ring) + slots);
    walk->chain->head = element.a;
    walk->chain->slots = slots;
    ring->next_avail = position;
    return 1;
}

void vq_packed_put(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                   const uint32_t *lengths)
{
    uint32_t position = ring->next_used, first_flags = 0;
    uint64_t first = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t offset = 16 * (uint64_t)(position & ~VQ_WRAP);
        uint32_t slots = ring->flights[heads[i]].slots;
        uint32_t flags = position & VQ_WRAP ? AVAIL | USED : 0;
        if (lengths[i] != 0)
            flags |= VQ_WRITE;
        vq_store32(vq_at(ring, &ring->desc, offset + 8), lengths[i], __ATOMIC_RELAXED);
        vq_store16(vq_at(ring, &ring->desc, offset + 12), (uint16_t)heads[i], __ATOMIC_RELAXED);
        if (i == 0) {
            /* Seen last, and with it the whole batch. */
            first = offset + 14;
            first_flags = flags;
        } else {
            vq_store16(vq_at(ring, &ring->desc, offset + 14), (uint16_t)flags, __ATOMIC_RELEASE);
            vq_mark(ring, &ring->desc, offset + 8, 8);
        }
        position = vq_packed_advance(ring, position, slots);
        ring->pending += slots;
    }
    vq_store16(vq_at(ring, &ring->desc, first), (uint16_t)first_flags, __ATOMIC_RELEASE);
    vq_mark(ring, &ring->desc, first - 6, 8);
    ring->next_used = position;
}

int vq_packed_needs_notification(struct vq_ring *ring, uint64_t pending)
{
    uint32_t event = vq_load32(vq_at(ring, &ring->driver, 0), __ATOMIC_RELAXED);
    uint32_t flags = event >> 16 & 3, wish = event & 0x7FFF;
    if (flags == EVENT_DISABLE)
        return 0;
    if (flags != EVENT_DESC || !ring->event_idx || wish >= ring->size)
        return 1;
    /* Both positions on one axis, which repeats after two rounds of the ring. */
    int64_t passed = (int64_t)(ring->next_used & ~VQ_WRAP) - wish - 1;
    if ((event ^ ring->next_used) & VQ_WRAP)
        passed += ring->size;
    if (passed < 0)
        passed += 2 * (int64_t)ring->size;
    return (uint64_t)passed < pending;
}

void vq_packed_ask(struct vq_ring *ring, int wanted)
{
    uint32_t event = (uint32_t)EVENT_DISABLE << 16;
    if (wanted)
        event = ring->event_idx ? ring->next_avail | (uint32_t)EVENT_DESC << 16 : EVENT_ENABLE;
    vq_store32(vq_at(ring, &ring->device, 0), event, __ATOMIC_RELEASE);
    vq_mark(ring, &ring->device, 0, 4);
}
