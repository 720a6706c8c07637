/* The one place in C where elements of chains are checked, whatever the ring format. */

#include "virtio_queue.h"

#include <string.h>

int vq_add_element(struct vq_walk *walk, uint32_t index, uint64_t address, uint32_t length,
                   int writes)
{
    struct vq_ring *ring = walk->ring;
    struct vq_batch *batch = walk->batch;
    struct vq_chain *chain = walk->chain;

    if (writes)
        walk->writes = 1;
    else if (walk->writes)
        return vq_fail(ring, VQ_ORDER, index, address);
    walk->total += length;
    if (walk->total > (uint64_t)1 << 32)
        return vq_fail(ring, VQ_TOTAL, index, walk->total);

    uint32_t iovec = batch->iovec_count;
    if (length != 0) {
        uint64_t end = address + length;
        if (end < address && end != 0)
            return vq_fail(ring, VQ_WRAPS, index, address);
        uint64_t at = address, left = length;
        while (left != 0) {
            const struct vmm_table_region *region = vq_find(ring, at);
            if (region == NULL)
                return vq_fail(ring, VQ_PLACE, index, address);
            uint64_t offset = at - region->guest_address;
            uint64_t piece = region->size - offset;
            if (piece > left)
                piece = left;
            if (batch->iovec_capacity != 0) {
                if (iovec == batch->iovec_capacity)
                    return batch->count != 0 ? -2 : vq_fail(ring, VQ_FRAGMENTED, index, iovec);
                batch->iovecs[iovec].host = (uint64_t)(uintptr_t)(region->host + offset);
                batch->iovecs[iovec].length = piece;
                iovec++;
            }
            at += piece;
            left -= piece;
        }
    }
    if (batch->segment_count == batch->segment_capacity)
        return batch->count != 0 ? -2 : vq_fail(ring, VQ_FRAGMENTED, index, batch->segment_count);
    uint64_t *segment = batch->segments + 2 * (size_t)batch->segment_count++;
    segment[0] = address;
    segment[1] = length;
    uint32_t pieces = iovec - batch->iovec_count;
    batch->iovec_count = iovec;
    if (writes) {
        chain->writable_segments++;
        chain->writable_iovecs += pieces;
        chain->writable_length += length;
    } else {
        chain->readable_segments++;
        chain->readable_iovecs += pieces;
        chain->readable_length += length;
    }
    return 0;
}

int64_t vq_table_entries(struct vq_walk *walk, uint32_t index, uint64_t address, uint32_t length)
{
    struct vq_ring *ring = walk->ring;
    uint32_t entries = length / 16;
    uint64_t end = address + length;
    if (length == 0 || length % 16 != 0)
        return vq_fail(ring, VQ_TABLE_LENGTH, index, length);
    if (entries > (ring->size > VQ_MAX_INDIRECT ? ring->size : VQ_MAX_INDIRECT))
        return vq_fail(ring, VQ_TABLE_LIMIT, index, entries);
    if ((end < address && end != 0) || !vq_check_range(ring, address, length))
        return vq_fail(ring, VQ_TABLE_PLACE, index, address);
    return entries;
}

/* Copy a header out of guest memory, once, however it is cut; what is missing is zeros. */
void vq_copy_header(struct vq_ring *ring, struct vq_batch *batch, const struct vq_chain *chain)
{
    uint32_t size = batch->header_size, done = 0;
    uint8_t *header = batch->headers + (size_t)size * (size_t)(chain - batch->chains);
    const uint64_t *segment = batch->segments + 2 * (size_t)chain->first_segment;
    for (uint32_t i = 0; i < chain->readable_segments && done < size; i++, segment += 2) {
        uint64_t at = segment[0], left = segment[1];
        if (left > size - done)
            left = size - done;
        while (left != 0) {
            const struct vmm_table_region *region = vq_find(ring, at);
            uint64_t offset = at - region->guest_address;
            uint64_t piece = region->size - offset < left ? region->size - offset : left;
            memcpy(header + done, region->host + offset, piece);
            done += (uint32_t)piece;
            at += piece;
            left -= piece;
        }
    }
    memset(header + done, 0, size - done);
}
