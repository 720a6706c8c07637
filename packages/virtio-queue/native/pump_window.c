/* Bytes that wait for a descriptor. */

#include "pump.h"

#include <string.h>

uint64_t vp_window_keep(struct vp_window *window, const uint8_t *from, uint64_t length)
{
    uint64_t room = window->size - window->length, done = 0;
    if (length > room)
        length = room;
    while (done < length) {
        uint32_t at = (window->start + window->length) % window->size;
        uint64_t part = window->size - at < length - done ? window->size - at : length - done;
        memcpy(window->bytes + at, from + done, part);
        window->length += (uint32_t)part;
        done += part;
    }
    return done;
}

void vp_window_pieces(const struct vp_window *window, struct iovec pieces[2])
{
    uint32_t first = window->size - window->start;
    if (first > window->length)
        first = window->length;
    pieces[0] = (struct iovec){window->bytes + window->start, first};
    pieces[1] = (struct iovec){window->bytes, window->length - first};
}

void vp_window_drop(struct vp_window *window, uint64_t length)
{
    window->start = (uint32_t)(window->start + length) % window->size;
    window->length -= (uint32_t)length;
}
