/* The pump's thread: sleeping and waking, batches of chains, publication, what goes to Python. */

#include "pump.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t vp_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void vp_wake(int fd)
{
    uint64_t one = 1;
    /* A counter that is full wakes as well. */
    if (write(fd, &one, sizeof one) < 0)
        return;
}

static void clear(int fd)
{
    uint64_t count;
    if (read(fd, &count, sizeof count) < 0)
        return;
}

struct vp_pump *vp_new(int uring, int *error)
{
    struct vp_pump *pump = calloc(1, sizeof *pump);
    *error = ENOMEM;
    if (pump == NULL)
        return NULL;
    pthread_mutex_init(&pump->lock, NULL);
    pump->uring.fd = -1;
    pump->header_size = VP_HEADER;
    pump->control = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pump->attention = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    *error = pump->control < 0 || pump->attention < 0 ? errno : 0;
    if (*error == 0 && uring) {
        *error = vp_uring_open(&pump->uring, VP_CHAINS);
        pump->has_uring = *error == 0;
    }
    if (*error != 0) {
        vp_free(pump);
        return NULL;
    }
    return pump;
}

void vp_free(struct vp_pump *pump)
{
    vp_stop(pump);
    vp_leave(pump);
    if (pump->has_uring)
        vp_uring_close(&pump->uring);
    if (pump->control >= 0)
        close(pump->control);
    if (pump->attention >= 0)
        close(pump->attention);
    free(pump->net.frame);
    free(pump->net.received);
    free(pump->output.window.bytes);
    vp_vsock_free(pump);
    free(pump->handed);
    free(pump->answers);
    pthread_mutex_destroy(&pump->lock);
    free(pump);
}

/* --- what goes to Python and comes back --- */

void vp_hand_over(struct vp_request *request)
{
    struct vp_pump *pump = request->queue->pump;
    pump->counters.handed_over++;
    pthread_mutex_lock(&pump->lock);
    pump->handed[pump->handed_count++] = request;
    pthread_mutex_unlock(&pump->lock);
    vp_wake(pump->attention);
}

int vp_take(struct vp_pump *pump, uint32_t *queue, uint32_t *chain, struct vq_batch **batch)
{
    clear(pump->attention);
    pthread_mutex_lock(&pump->lock);
    int found = pump->handed_count != 0;
    if (found) {
        struct vp_request *request = pump->handed[0];
        pump->handed_count--;
        memmove(pump->handed, pump->handed + 1, pump->handed_count * sizeof *pump->handed);
        *queue = (uint32_t)(request->queue - pump->queues);
        *chain = request->chain;
        *batch = request->batch->chains;
    }
    pthread_mutex_unlock(&pump->lock);
    return found;
}

void vp_answer(struct vp_pump *pump, uint32_t queue, uint32_t head, uint32_t length)
{
    pthread_mutex_lock(&pump->lock);
    pump->answers[pump->answer_count] = (struct vp_answer){queue, head, length};
    __atomic_store_n(&pump->answer_count, pump->answer_count + 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&pump->lock);
    vp_wake(pump->control);
}

static void use_answers(struct vp_pump *pump)
{
    if (__atomic_load_n(&pump->answer_count, __ATOMIC_ACQUIRE) == 0)
        return;
    pthread_mutex_lock(&pump->lock);
    for (uint32_t i = 0; i < pump->answer_count; i++) {
        struct vp_answer *answer = &pump->answers[i];
        struct vp_queue *queue = &pump->queues[answer->queue];
        vp_publish(queue);
        queue->heads[0] = answer->head;
        queue->lengths[0] = answer->length;
        queue->done = 1;
    }
    __atomic_store_n(&pump->answer_count, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&pump->lock);
}

/* --- the thread --- */

/* What was waited for came: whether looking for it would have paid. */
static void adapt(struct vp_pump *pump, uint64_t idle_since)
{
    if (pump->alone)
        return;
    pump->spin = vp_now() - idle_since < 2 * VP_SPIN ? VP_SPIN : pump->spin / 2;
}

static void sleep_for_events(struct vp_pump *pump)
{
    struct pollfd fds[2 * VP_QUEUES + 2];
    struct timespec timeout, *limit = NULL;
    nfds_t count = 0;
    if (pump->vsock != NULL) {
        vp_vsock_hear(pump, -1);
        adapt(pump, pump->queues[1].idle);
        return;
    }
    fds[count++] = (struct pollfd){pump->control, POLLIN, 0};
    fds[count++] = (struct pollfd){pump->uring.in_kernel ? pump->uring.fd : -1, POLLIN, 0};
    for (uint32_t i = 0; i < pump->queue_count; i++) {
        const struct vp_queue *queue = &pump->queues[i];
        int waits = queue->asleep && !queue->faulted;
        fds[count++] = (struct pollfd){waits ? queue->kick : -1, POLLIN, 0};
        fds[count++] = (struct pollfd){queue->fd_events ? queue->fd : -1, queue->fd_events, 0};
    }
    if (pump->wake != 0) {
        uint64_t now = vp_now(), rest = pump->wake > now ? pump->wake - now : 0;
        timeout = (struct timespec){(time_t)(rest / 1000000000u), (long)(rest % 1000000000u)};
        limit = &timeout;
    }
    pump->wake = 0;
    if (ppoll(fds, count, limit, NULL) <= 0)
        return;
    if (fds[0].revents)
        clear(pump->control);
    for (uint32_t i = 0; i < pump->queue_count; i++) {
        if (fds[3 + 2 * i].revents)
            pump->queues[i].fd_events = 0;
        if (fds[2 + 2 * i].revents) {
            clear(pump->queues[i].kick);
            pump->queues[i].asleep = 0;
            pump->counters.kicks++;
            adapt(pump, pump->queues[i].idle);
        }
    }
}

static int turn(struct vp_pump *pump)
{
    int busy = 0;
    for (uint32_t i = 0; i < pump->queue_count; i++)
        busy |= pump->queues[i].serve(&pump->queues[i]);
    if (pump->has_uring)
        busy |= vp_uring_turn(pump);
    use_answers(pump);
    for (uint32_t i = 0; i < pump->queue_count; i++)
        vp_publish(&pump->queues[i]);
    return busy;
}

static void *run(void *argument)
{
    struct vp_pump *pump = argument;
    pthread_setname_np(pthread_self(), "virtio-pump");
    __atomic_store_n(&pump->thread_id, syscall(SYS_gettid), __ATOMIC_RELEASE);
    while (!vp_stopping(pump))
        if (!turn(pump) && !vp_stopping(pump)) /* a turn may have heard what would wake it */
            sleep_for_events(pump);
    /* Nothing new is started any more. */
    while (pump->uring.in_kernel + pump->uring.queued != 0) {
        if (!vp_uring_turn(pump)) {
            struct pollfd ring = {pump->uring.fd, POLLIN, 0};
            poll(&ring, 1, 1000);
        }
    }
    use_answers(pump);
    for (uint32_t i = 0; i < pump->queue_count; i++) {
        vp_publish(&pump->queues[i]);
        vp_give_back(&pump->queues[i]);
        vp_give_back_collected(&pump->queues[i]);
    }
    return NULL;
}

int vp_start(struct vp_pump *pump)
{
    sigset_t all, former;
    size_t most = 0;
    for (uint32_t i = 0; i < pump->queue_count; i++)
        most += pump->queues[i].ring->size;
    free(pump->handed);
    free(pump->answers);
    pump->handed = calloc(most, sizeof *pump->handed);
    pump->answers = calloc(most, sizeof *pump->answers);
    if (pump->handed == NULL || pump->answers == NULL)
        return ENOMEM;
    pump->handed_count = pump->answer_count = 0;
    pump->stopping = 0;
    pump->wake = 0;
    pump->spin = 0;
    /* Who sends often waits for an answer, which nobody would read meanwhile. */
    pump->alone = pump->net.frame != NULL || sysconf(_SC_NPROCESSORS_ONLN) == 1;
    /* Signals are for Python's threads; faults are for whoever makes them. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &former);
    int error = pthread_create(&pump->thread, NULL, run, pump);
    pthread_sigmask(SIG_SETMASK, &former, NULL);
    pump->running = error == 0;
    return error;
}

void vp_stop(struct vp_pump *pump)
{
    if (!pump->running)
        return;
    __atomic_store_n(&pump->stopping, 1, __ATOMIC_RELEASE);
    vp_wake(pump->control);
    pthread_join(pump->thread, NULL);
    pump->running = 0;
}
