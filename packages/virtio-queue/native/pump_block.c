/* Block requests, section 5.2.6: what may be done, and what comes next. No I/O here.
 *
 * The rules and their order are those of the plain-Python model in
 * `virtio_queue.testing.model.block`; tests compare the two. */

#include "pump.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK, S_IOERR, S_UNSUPP };
enum { SECTOR = 512, UNMAP = 1 };

static const struct vq_chain *chain_of(const struct vp_request *request)
{
    return &request->batch->chains->chains[request->chain];
}

static struct vp_counters *counters_of(const struct vp_request *request)
{
    return &request->queue->pump->counters;
}

/* Write the status byte and give the chain back. Returns 0. */
static int answer(struct vp_request *request, uint8_t status)
{
    const struct vq_chain *chain = chain_of(request);
    struct vq_batch *batch = request->batch->chains;
    struct vq_ring *ring = request->queue->ring;
    uint64_t length = request->written;
    *request->status = status;
    if (length == chain->writable_length - 1)
        length++;
    else /* A gap before the status: what `length` does not tell of was written too. */
        vq_mark_written(ring, batch, chain, chain->writable_length);
    request->operation = VP_NONE;
    vp_finish(request, length);
    return 0;
}

static int refuse(struct vp_request *request, uint8_t status, uint64_t *counter)
{
    ++*counter;
    return answer(request, status);
}

/* Find the status byte, the last one, and take it out of the writable part. */
static int find_status(struct vp_request *request)
{
    const struct vq_chain *chain = chain_of(request);
    struct iovec *iovecs = (struct iovec *)request->batch->chains->iovecs + chain->first_iovec;
    uint32_t count = chain->readable_iovecs + chain->writable_iovecs;
    if (chain->writable_length == 0)
        return -1;
    struct iovec *last = &iovecs[count - 1];
    request->status = (uint8_t *)last->iov_base + --last->iov_len;
    request->iovecs = iovecs + chain->readable_iovecs;
    request->iovec_count = chain->writable_iovecs - (last->iov_len == 0);
    return 0;
}

static void drop(struct vp_request *request, uint64_t bytes)
{
    while (bytes != 0) {
        struct iovec *first = request->iovecs;
        size_t part = first->iov_len < bytes ? first->iov_len : bytes;
        first->iov_base = (uint8_t *)first->iov_base + part;
        first->iov_len -= part;
        bytes -= part;
        if (first->iov_len == 0) {
            request->iovecs++;
            request->iovec_count--;
        }
    }
}

/* Make the readable part behind the header what is to be moved. */
static void use_readable(struct vp_request *request)
{
    const struct vq_chain *chain = chain_of(request);
    request->iovecs = (struct iovec *)request->batch->chains->iovecs + chain->first_iovec;
    request->iovec_count = chain->readable_iovecs;
    drop(request, VP_HEADER);
    request->left = chain->readable_length - VP_HEADER;
}

/* Whether a range is whole sectors on the disk. */
static int on_disk(const struct vp_request *request, uint64_t sector, uint64_t length)
{
    uint64_t sectors = __atomic_load_n(&request->queue->pump->block.sectors, __ATOMIC_RELAXED);
    return length != 0 && length % SECTOR == 0 && length / SECTOR <= sectors &&
           sector <= sectors - length / SECTOR;
}

static void copy_out(struct vp_request *request, void *to, uint64_t length)
{
    for (uint8_t *at = to; length != 0;) {
        size_t part = request->iovecs->iov_len < length ? request->iovecs->iov_len : length;
        memcpy(at, request->iovecs->iov_base, part);
        drop(request, part);
        at += part;
        length -= part;
    }
}

static void get_id(struct vp_request *request)
{
    const uint8_t *id = request->queue->pump->block.id;
    uint64_t room = chain_of(request)->writable_length - 1;
    uint64_t length = room < sizeof request->queue->pump->block.id
                          ? room : sizeof request->queue->pump->block.id;
    for (uint64_t done = 0; done < length;) {
        size_t part = request->iovecs->iov_len;
        if (part > length - done)
            part = length - done;
        memcpy(request->iovecs->iov_base, id + done, part);
        drop(request, part);
        done += part;
    }
    request->written = length;
}

static int move(struct vp_request *request, uint64_t sector, int writes)
{
    const struct vp_block *disk = &request->queue->pump->block;
    struct vp_counters *counters = counters_of(request);
    if (writes) {
        if (disk->read_only)
            return refuse(request, S_IOERR, &counters->refused_read_only);
        use_readable(request);
    } else {
        request->left = chain_of(request)->writable_length - 1;
    }
    if (request->left > disk->max_data || !on_disk(request, sector, request->left))
        return refuse(request, S_IOERR, &counters->refused_range);
    request->offset = sector * SECTOR;
    request->cost = request->left;
    request->operation = writes ? VP_WRITE : VP_READ;
    return 1;
}

/* Point at the next segment of a discard or write zeroes request. */
static int next_segment(struct vp_request *request)
{
    const struct vp_segment *segment = &request->segments[request->segment];
    request->offset = segment->sector * SECTOR;
    request->left = (uint64_t)segment->sectors * SECTOR;
    request->operation = request->kind == T_DISCARD || segment->flags & UNMAP ? VP_PUNCH : VP_ZERO;
    /* A block device that gave space back may read as anything. */
    if (request->kind == T_WRITE_ZEROES && request->queue->pump->block.is_device)
        request->operation = VP_ZERO;
    return 1;
}

static int change_segments(struct vp_request *request)
{
    const struct vp_block *disk = &request->queue->pump->block;
    struct vp_counters *counters = counters_of(request);
    int discards = request->kind == T_DISCARD;
    uint32_t most = discards ? disk->max_discard_segments : disk->max_write_zeroes_segments;
    uint32_t sectors = discards ? disk->max_discard_sectors : disk->max_write_zeroes_sectors;
    if (disk->read_only)
        return refuse(request, S_IOERR, &counters->refused_read_only);
    use_readable(request);
    uint64_t count = request->left / sizeof *request->segments;
    if (request->left % sizeof *request->segments || count == 0 || count > most)
        return refuse(request, S_IOERR, &counters->refused_segments);
    request->segments = malloc(count * sizeof *request->segments);
    if (request->segments == NULL)
        return refuse(request, S_IOERR, &counters->refused_segments);
    request->segment_count = (uint32_t)count;
    copy_out(request, request->segments, count * sizeof *request->segments);
    for (uint64_t i = 0; i < count; i++) {
        const struct vp_segment *segment = &request->segments[i];
        if (segment->flags & (discards ? ~0u : ~(uint32_t)UNMAP))
            return refuse(request, S_UNSUPP, &counters->refused_unsupported);
        if (segment->sectors > sectors ||
            !on_disk(request, segment->sector, (uint64_t)segment->sectors * SECTOR))
            return refuse(request, S_IOERR, &counters->refused_range);
    }
    return next_segment(request);
}

int vp_block_prepare(struct vp_request *request)
{
    const struct vp_block *disk = &request->queue->pump->block;
    struct vp_counters *counters = counters_of(request);
    struct { uint32_t kind, reserved; uint64_t sector; } header;
    if (find_status(request))
        return -1;
    if (chain_of(request)->readable_length < sizeof header)
        return refuse(request, S_IOERR, &counters->refused_header);
    memcpy(&header, request->batch->chains->headers + VP_HEADER * (size_t)request->chain,
           sizeof header);
    request->kind = header.kind;
    switch (header.kind) {
    case T_IN:
        counters->reads++;
        return move(request, header.sector, 0);
    case T_OUT:
        counters->writes++;
        return move(request, header.sector, 1);
    case T_FLUSH:
        counters->flushes++;
        request->operation = VP_SYNC;
        if (disk->may_flush)
            return 1;
        break;
    case T_GET_ID:
        counters->get_ids++;
        get_id(request);
        return answer(request, S_OK);
    case T_DISCARD:
        counters->discards++;
        if (disk->may_discard)
            return change_segments(request);
        break;
    case T_WRITE_ZEROES:
        counters->write_zeroes++;
        if (disk->may_write_zeroes)
            return change_segments(request);
        break;
    default:
        return -1;
    }
    return refuse(request, S_UNSUPP, &counters->refused_unsupported);
}

static int fail(struct vp_request *request, int64_t result)
{
    struct vp_counters *counters = counters_of(request);
    counters->last_errno = (uint64_t)-result;
    switch (request->kind) {
    case T_IN:
        return refuse(request, S_IOERR, &counters->failed_reads);
    case T_OUT:
        return refuse(request, S_IOERR, &counters->failed_writes);
    case T_FLUSH:
        return refuse(request, S_IOERR, &counters->failed_flushes);
    case T_DISCARD:
        return refuse(request, S_IOERR, &counters->failed_discards);
    default:
        return refuse(request, S_IOERR, &counters->failed_write_zeroes);
    }
}

/* A segment is done: the next one, durability, or the end. */
static int end_segment(struct vp_request *request)
{
    if (++request->segment < request->segment_count)
        return next_segment(request);
    if (request->kind == T_WRITE_ZEROES &&
        !__atomic_load_n(&request->queue->pump->block.writeback, __ATOMIC_RELAXED)) {
        request->operation = VP_SYNC;
        return 1;
    }
    return answer(request, S_OK);
}

static int is_unsupported(int64_t result)
{
    return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENOTTY || result == -EINVAL;
}

int vp_block_step(struct vp_request *request, int64_t result)
{
    struct vp_counters *counters = counters_of(request);
    if (result == -EINTR)
        return 1;
    switch (request->operation) {
    case VP_READ:
    case VP_WRITE:
        if (result <= 0) /* 0: the file has become shorter */
            return fail(request, result < 0 ? result : -EIO);
        drop(request, (uint64_t)result);
        request->offset += (uint64_t)result;
        request->left -= (uint64_t)result;
        if (request->left != 0)
            return 1;
        if (request->operation == VP_READ)
            counters->read_bytes += request->written = request->cost;
        else
            counters->written_bytes += request->cost;
        return answer(request, S_OK);
    case VP_SYNC:
        return result < 0 ? fail(request, result) : answer(request, S_OK);
    case VP_PUNCH:
        if (result < 0 && !is_unsupported(result))
            return fail(request, result);
        if (result < 0 && request->kind == T_WRITE_ZEROES) {
            request->operation = VP_ZERO;
            return 1;
        }
        return end_segment(request); /* to discard is advice */
    case VP_ZERO:
        if (result < 0 && !is_unsupported(result))
            return fail(request, result);
        if (result < 0) {
            request->operation = VP_FILL;
            return 1;
        }
        return end_segment(request);
    default: /* VP_FILL */
        if (result <= 0)
            return fail(request, result < 0 ? result : -EIO);
        request->offset += (uint64_t)result;
        request->left -= (uint64_t)result;
        return request->left != 0 ? 1 : end_segment(request);
    }
}

/* Start a request. 0, or -1 when it has to wait. */
static int start(struct vp_request *request)
{
    struct vp_pump *pump = request->queue->pump;
    if (!request->prepared) {
        int rc = vp_block_prepare(request);
        if (rc < 0)
            vp_hand_over(request);
        if (rc <= 0)
            return 0;
        request->prepared = 1;
    }
    if (pump->has_uring && !vp_uring_has_room(&pump->uring))
        return -1;
    if (!vp_admit(pump, &pump->limiter, request->cost)) {
        pump->counters.throttled += request->prepared == 1;
        request->prepared = 2;
        return -1;
    }
    if (pump->has_uring && vp_uring_start(&pump->uring, request) == 0) {
        if (pump->uring.queued_bytes >= VP_SUBMIT)
            vp_uring_turn(pump);
        return 0;
    }
    while (vp_block_step(request, vp_file_do(request)))
        continue;
    return 0;
}

int vp_block_serve(struct vp_queue *queue)
{
    if (queue->asleep)
        return 0;
    if (queue->current == NULL || queue->next == queue->current->chains->count) {
        int rc = vp_get_chains(queue);
        if (rc <= 0)
            return rc == 0;
    }
    struct vp_batch *batch = queue->current;
    for (; queue->next < batch->chains->count; queue->next++)
        if (vp_stopping(queue->pump) || start(&batch->requests[queue->next]))
            return 0;
    return 1;
}
