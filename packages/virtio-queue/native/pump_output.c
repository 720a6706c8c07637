/* Bytes of a queue to a descriptor, as a console's are (5.3.6).
 *
 * What the descriptor does not take at once waits in a window, so that a driver that looks for its
 * buffer in a loop, as Linux's console does, is not held up by who reads. Behind a full window the
 * next chain waits, or its bytes are dropped. */

#include "pump.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* How many chains are taken, and bytes written at once, before the thread looks at all else. */
enum { BUDGET = 64, MOST = 1 << 20 };

/* Write pieces: how many bytes; 0 when there is no room; all of them when nobody reads any more. */
static uint64_t put(struct vp_queue *queue, const struct iovec *pieces, int count, uint64_t length)
{
    struct vp_output *output = &queue->pump->output;
    ssize_t done = -1;
    while (!output->broken && (done = writev(output->fd, pieces, count)) < 0) {
        if (errno == EAGAIN) {
            queue->fd_events = POLLOUT;
            return 0;
        }
        output->broken = errno != EINTR;
        queue->pump->counters.last_errno = (uint64_t)errno;
    }
    if (!output->broken)
        return (uint64_t)done;
    queue->pump->counters.dropped_bytes += length;
    return length;
}

static void flush(struct vp_queue *queue)
{
    struct vp_output *output = &queue->pump->output;
    while (output->length != 0 && !queue->fd_events) {
        uint32_t first = VP_WINDOW - output->start;
        if (first > output->length)
            first = output->length;
        struct iovec pieces[2] = {{output->window + output->start, first},
                                  {output->window, output->length - first}};
        uint32_t done = (uint32_t)put(queue, pieces, 2, output->length);
        output->start = (output->start + done) % VP_WINDOW;
        output->length -= done;
    }
}

/* Keep as many bytes as there is room for. */
static uint64_t keep(struct vp_output *output, const uint8_t *from, uint64_t length)
{
    uint64_t room = VP_WINDOW - output->length, done = 0;
    if (length > room)
        length = room;
    while (done < length) {
        uint32_t at = (output->start + output->length) % VP_WINDOW;
        uint64_t part = VP_WINDOW - at < length - done ? VP_WINDOW - at : length - done;
        memcpy(output->window + at, from + done, part);
        output->length += (uint32_t)part;
        done += part;
    }
    return done;
}

/* Pieces of a chain from an offset on, as far as one call takes them; their bytes in *length. */
static int gather(const struct vp_request *request, uint64_t offset, struct iovec *pieces,
                  uint64_t *length)
{
    const struct vq_batch *chains = request->batch->chains;
    const struct vq_chain *chain = &chains->chains[request->chain];
    const struct vq_iovec *iovec = chains->iovecs + chain->first_iovec;
    int count = 0;
    *length = 0;
    for (uint32_t i = 0; i < chain->readable_iovecs && count < IOV_MAX && *length < MOST; i++) {
        uint64_t cut = iovec[i].length < offset ? iovec[i].length : offset;
        uint64_t part = iovec[i].length - cut;
        offset -= cut;
        if (part == 0)
            continue;
        if (part > MOST - *length)
            part = MOST - *length;
        pieces[count++] = (struct iovec){(uint8_t *)(uintptr_t)iovec[i].host + cut, part};
        *length += part;
    }
    return count;
}

/* Take the bytes of the current chain: 1 when that was all of them, 0 when the rest has to wait. */
static int take(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    struct vp_output *output = &pump->output;
    struct iovec pieces[IOV_MAX];
    uint64_t length;
    int count;
    while ((count = gather(output->current, output->offset, pieces, &length)) != 0) {
        uint64_t done = 0, lost = pump->counters.dropped_bytes;
        if (vp_stopping(pump))
            return 0;
        if (output->length == 0 && !queue->fd_events)
            done = put(queue, pieces, count, length);
        if (done == 0) {
            for (int i = 0; i < count; i++)
                done += keep(output, pieces[i].iov_base, pieces[i].iov_len);
            if (done == 0 && !output->lossy)
                return 0;
            if (done == 0) {
                done = length;
                pump->counters.dropped_bytes += length;
            }
        }
        output->offset += done;
        pump->counters.sent_bytes += done - (pump->counters.dropped_bytes - lost);
    }
    return 1;
}

int vp_output_serve(struct vp_queue *queue)
{
    struct vp_output *output = &queue->pump->output;
    flush(queue);
    for (int i = 0; i < BUDGET; i++) {
        if (output->current == NULL && (output->current = vp_next_request(queue)) == NULL)
            return 0;
        if (!take(queue))
            return 0;
        vp_finish(output->current, 0);
        output->current = NULL;
        output->offset = 0;
    }
    return 1;
}

int vp_output_new(struct vp_pump *pump)
{
    pump->output.window = malloc(VP_WINDOW);
    return pump->output.window == NULL ? -1 : 0;
}

void vp_output_open(struct vp_pump *pump)
{
    struct vp_output *output = &pump->output;
    struct vp_queue *queue = &pump->queues[0];
    queue->serve = vp_output_serve;
    queue->fd = output->fd;
    output->current = NULL;
    if (queue->adopted == 0)
        output->offset = 0; /* nothing is under way */
}

void vp_output_window(struct vp_pump *pump, uint8_t *bytes, uint32_t length, int read)
{
    struct vp_output *output = &pump->output;
    for (uint32_t i = 0; read && i < length; i++)
        bytes[i] = output->window[(output->start + i) % VP_WINDOW];
    if (read)
        output->length = 0;
    else
        keep(output, bytes, length);
}
