/* Exits that need no decision, served without Python: see kvm_ioctls.hot.
 *
 * The declarations may change at any time, in any thread: each has a sequence number that is odd
 * while it changes. A reader that meets a change treats the exit as undeclared, which is always
 * right, only slower. Posted writes go through one queue for all vCPUs, under a lock, so that their
 * order is that in which the guest made them whichever vCPU made them.
 */
#include "kvmi.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NOTHING, POST, ANSWER, IGNORE };

struct kvmi_hot {
    pthread_mutex_t lock;
    uint32_t room, head, count; /* of the queue; count is also read without the lock */
    uint32_t handed;            /* whether taken writes may still be in the handler's hands */
    int wake;                   /* an eventfd, or -1 */
    uint64_t full;
    uint32_t used; /* declarations that have ever been set */
    kvmi_declaration declarations[KVMI_DECLARATIONS];
    kvmi_posted queue[];
};

kvmi_hot *kvmi_hot_new(uint32_t room, int wake)
{
    kvmi_hot *hot = calloc(1, sizeof *hot + room * sizeof hot->queue[0]);
    if (!hot)
        return 0;
    pthread_mutex_init(&hot->lock, 0);
    hot->room = room;
    hot->wake = wake;
    return hot;
}

void kvmi_hot_free(kvmi_hot *hot)
{
    pthread_mutex_destroy(&hot->lock);
    free(hot);
}

void kvmi_hot_set(kvmi_hot *hot, uint32_t index, const kvmi_declaration *value)
{
    kvmi_declaration *place = &hot->declarations[index];
    pthread_mutex_lock(&hot->lock);
    __atomic_store_n(&place->sequence, place->sequence + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&place->kind, value->kind, __ATOMIC_RELAXED);
    __atomic_store_n(&place->pio, value->pio, __ATOMIC_RELAXED);
    __atomic_store_n(&place->size, value->size, __ATOMIC_RELAXED);
    __atomic_store_n(&place->first, value->first, __ATOMIC_RELAXED);
    __atomic_store_n(&place->length, value->length, __ATOMIC_RELAXED);
    __atomic_store_n(&place->value, value->value, __ATOMIC_RELAXED);
    __atomic_store_n(&place->sequence, place->sequence + 1, __ATOMIC_RELEASE);
    if (index >= hot->used)
        __atomic_store_n(&hot->used, index + 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&hot->lock);
}

uint64_t kvmi_hot_count(kvmi_hot *hot, uint32_t index)
{
    return __atomic_load_n(&hot->declarations[index].count, __ATOMIC_RELAXED);
}

uint64_t kvmi_hot_full(kvmi_hot *hot)
{
    return __atomic_load_n(&hot->full, __ATOMIC_RELAXED);
}

/* Whether some posted write has not been handled: `handed` is set before `count` falls. */
int kvmi_hot_waiting(kvmi_hot *hot)
{
    return __atomic_load_n(&hot->count, __ATOMIC_SEQ_CST) != 0 ||
           __atomic_load_n(&hot->handed, __ATOMIC_SEQ_CST) != 0;
}

/* Take up to `room` writes; with that, those that were taken before have been handled. */
uint32_t kvmi_hot_take(kvmi_hot *hot, kvmi_posted *out, uint32_t room)
{
    uint32_t taken = 0;
    pthread_mutex_lock(&hot->lock);
    __atomic_store_n(&hot->handed, room && hot->count, __ATOMIC_SEQ_CST);
    while (taken < room && hot->count) {
        out[taken++] = hot->queue[hot->head];
        hot->head = (hot->head + 1) % hot->room;
        __atomic_store_n(&hot->count, hot->count - 1, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&hot->lock);
    return taken;
}

static int post(kvmi_hot *hot, uint64_t address, uint64_t data, uint32_t size, uint32_t pio)
{
    int first = 0;
    pthread_mutex_lock(&hot->lock);
    if (hot->count == hot->room) {
        __atomic_store_n(&hot->full, hot->full + 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&hot->lock);
        return 0;
    }
    hot->queue[(hot->head + hot->count) % hot->room] = (kvmi_posted){address, data, size, pio};
    first = hot->count == 0;
    __atomic_store_n(&hot->count, hot->count + 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&hot->lock);
    if (first && hot->wake >= 0) {
        ssize_t ignored = write(hot->wake, &(uint64_t){1}, 8);
        (void)ignored; /* a counter at its limit wakes as well */
    }
    return 1;
}

/* Serve one access of `size` bytes at `data`, if a declaration covers all of it. */
int kvmi_hot_serve(kvmi_hot *hot, uint64_t address, uint32_t size, uint32_t pio, int is_write,
                   uint8_t *data)
{
    uint32_t used = __atomic_load_n(&hot->used, __ATOMIC_ACQUIRE);
    for (uint32_t index = 0; index < used; index++) {
        kvmi_declaration *place = &hot->declarations[index], seen;
        seen.sequence = __atomic_load_n(&place->sequence, __ATOMIC_ACQUIRE);
        seen.kind = __atomic_load_n(&place->kind, __ATOMIC_RELAXED);
        seen.pio = __atomic_load_n(&place->pio, __ATOMIC_RELAXED);
        seen.size = __atomic_load_n(&place->size, __ATOMIC_RELAXED);
        seen.first = __atomic_load_n(&place->first, __ATOMIC_RELAXED);
        seen.length = __atomic_load_n(&place->length, __ATOMIC_RELAXED);
        seen.value = __atomic_load_n(&place->value, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (seen.sequence & 1 ||
            seen.sequence != __atomic_load_n(&place->sequence, __ATOMIC_RELAXED))
            return 0;
        if (seen.kind == NOTHING || seen.pio != pio || (seen.kind == ANSWER) == is_write ||
            (seen.size && seen.size != size) || address - seen.first >= seen.length ||
            size > seen.length - (address - seen.first))
            continue;
        if (seen.kind == ANSWER) {
            uint64_t value = seen.value >> 8 * (address - seen.first);
            memcpy(data, &value, size);
        } else if (seen.kind == POST) {
            uint64_t value = 0;
            memcpy(&value, data, size);
            if (!post(hot, address, value, size, pio))
                return 0;
        }
        __atomic_fetch_add(&place->count, 1, __ATOMIC_RELAXED);
        return 1;
    }
    return 0;
}
