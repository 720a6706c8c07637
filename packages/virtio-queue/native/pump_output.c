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
    struct vp_window *window = &queue->pump->output.window;
    struct iovec pieces[2];
    while (window->length != 0 && !queue->fd_events) {
        vp_window_pieces(window, pieces);
        vp_window_drop(window, put(queue, pieces, 2, window->length));
    }
}

/* Take the bytes of the current chain: 1 when that was all of them, 0 when the rest has to wait. */
static int take(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    struct vp_output *output = &pump->output;
    struct iovec pieces[IOV_MAX];
    uint64_t length;
    int count;
    while ((count = vp_pieces(output->current, 0, output->offset, MOST, pieces, IOV_MAX, &length)) !=
           0) {
        uint64_t done = 0, lost = pump->counters.dropped_bytes;
        if (vp_stopping(pump))
            return 0;
        if (output->window.length == 0 && !queue->fd_events)
            done = put(queue, pieces, count, length);
        if (done == 0) {
            for (int i = 0; i < count; i++)
                done += vp_window_keep(&output->window, pieces[i].iov_base, pieces[i].iov_len);
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
    pump->output.window.size = VP_WINDOW;
    pump->output.window.bytes = malloc(VP_WINDOW);
    return pump->output.window.bytes == NULL ? -1 : 0;
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
    struct vp_window *window = &pump->output.window;
    struct iovec pieces[2];
    if (!read) {
        vp_window_keep(window, bytes, length);
        return;
    }
    vp_window_pieces(window, pieces);
    memcpy(bytes, pieces[0].iov_base, pieces[0].iov_len);
    memcpy(bytes + pieces[0].iov_len, pieces[1].iov_base, pieces[1].iov_len);
    vp_window_drop(window, window->length);
}
