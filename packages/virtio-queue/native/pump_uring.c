/* The io_uring engine, by the kernel's interface alone. */

#include "pump.h"

#include <errno.h>
#include <limits.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint8_t *map(int fd, size_t size, uint64_t what)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)what);
    return at == MAP_FAILED ? NULL : at;
}

int vp_uring_open(struct vp_uring *uring, uint32_t entries)
{
    struct io_uring_params params = {.flags = IORING_SETUP_CLAMP};
    uring->fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    if (uring->fd < 0)
        return errno;
    uring->sq_size = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    uring->cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    uring->sqes_size = params.sq_entries * sizeof(struct io_uring_sqe);
    uint8_t *sq = uring->sq_map = map(uring->fd, uring->sq_size, IORING_OFF_SQ_RING);
    uint8_t *cq = uring->cq_map = map(uring->fd, uring->cq_size, IORING_OFF_CQ_RING);
    uring->sqes = map(uring->fd, uring->sqes_size, IORING_OFF_SQES);
    if (sq == NULL || cq == NULL || uring->sqes == NULL) {
        vp_uring_close(uring);
        return ENOMEM;
    }
    uring->sq_head = (uint32_t *)(sq + params.sq_off.head);
    uring->sq_tail = (uint32_t *)(sq + params.sq_off.tail);
    uring->sq_array = (uint32_t *)(sq + params.sq_off.array);
    uring->sq_mask = params.sq_entries - 1;
    uring->sq_entries = params.sq_entries;
    uring->cq_head = (uint32_t *)(cq + params.cq_off.head);
    uring->cq_tail = (uint32_t *)(cq + params.cq_off.tail);
    uring->cqes = cq + params.cq_off.cqes;
    uring->cq_mask = params.cq_entries - 1;
    uring->cq_entries = params.cq_entries;
    return 0;
}

void vp_uring_close(struct vp_uring *uring)
{
    if (uring->sq_map != NULL)
        munmap(uring->sq_map, uring->sq_size);
    if (uring->cq_map != NULL)
        munmap(uring->cq_map, uring->cq_size);
    if (uring->sqes != NULL)
        munmap(uring->sqes, uring->sqes_size);
    close(uring->fd);
    uring->fd = -1;
}

int vp_uring_has_room(const struct vp_uring *uring)
{
    return uring->queued < uring->sq_entries &&
           uring->queued + uring->in_kernel < uring->cq_entries;
}

int vp_uring_start(struct vp_uring *uring, struct vp_request *request)
{
    const struct vp_block *disk = &request->queue->pump->block;
    int allocates = request->operation == VP_PUNCH || request->operation == VP_ZERO;
    if (!vp_uring_has_room(uring) || request->operation == VP_FILL ||
        (allocates && disk->is_device))
        return -1;
    uint32_t tail = *uring->sq_tail, slot = tail & uring->sq_mask;
    struct io_uring_sqe *sqe = &((struct io_uring_sqe *)uring->sqes)[slot];
    *sqe = (struct io_uring_sqe){.fd = disk->fd, .user_data = (uint64_t)(uintptr_t)request};
    if (request->operation == VP_READ || request->operation == VP_WRITE) {
        sqe->opcode = request->operation == VP_READ ? IORING_OP_READV : IORING_OP_WRITEV;
        sqe->addr = (uint64_t)(uintptr_t)request->iovecs;
        sqe->len = request->iovec_count < IOV_MAX ? request->iovec_count : IOV_MAX;
        sqe->off = request->offset;
        if (request->operation == VP_WRITE)
            sqe->rw_flags = vp_file_write_flags(disk);
    } else if (request->operation == VP_SYNC) {
        sqe->opcode = IORING_OP_FSYNC;
        sqe->fsync_flags = IORING_FSYNC_DATASYNC;
    } else {
        sqe->opcode = IORING_OP_FALLOCATE;
        sqe->off = request->offset;
        sqe->addr = request->left;
        sqe->len = (uint32_t)vp_file_mode(request);
    }
    uring->sq_array[slot] = slot;
    __atomic_store_n(uring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    uring->queued++;
    uring->queued_bytes += request->cost;
    return 0;
}

/* Do what the kernel refuses to take, and what follows it. */
static void do_here(struct vp_request *request)
{
    while (vp_block_step(request, vp_file_do(request)))
        continue;
}

/* Hand over what is queued; returns how many requests made a step. */
static uint32_t submit(struct vp_uring *uring)
{
    uint32_t queued = uring->queued;
    if (queued == 0)
        return 0;
    uring->queued_bytes = 0;
    long taken = syscall(__NR_io_uring_enter, uring->fd, queued, 0, 0, NULL, 0);
    if (taken >= 0) {
        uring->queued -= (uint32_t)taken;
        uring->in_kernel += (uint32_t)taken;
        return (uint32_t)taken;
    }
    if (errno == EINTR)
        return 0;
    uint32_t tail = *uring->sq_tail;
    __atomic_store_n(uring->sq_tail, tail - queued, __ATOMIC_RELEASE);
    uring->queued = 0;
    for (uint32_t i = tail - queued; i != tail; i++) {
        struct io_uring_sqe *sqe = &((struct io_uring_sqe *)uring->sqes)[i & uring->sq_mask];
        do_here((struct vp_request *)(uintptr_t)sqe->user_data);
    }
    return queued;
}

int vp_uring_turn(struct vp_pump *pump)
{
    struct vp_uring *uring = &pump->uring;
    int count = (int)submit(uring);
    uint32_t head = *uring->cq_head, tail = __atomic_load_n(uring->cq_tail, __ATOMIC_ACQUIRE);
    for (; head != tail; head++, count++) {
        struct io_uring_cqe *cqe = &((struct io_uring_cqe *)uring->cqes)[head & uring->cq_mask];
        struct vp_request *request = (struct vp_request *)(uintptr_t)cqe->user_data;
        int64_t result = cqe->res;
        __atomic_store_n(uring->cq_head, head + 1, __ATOMIC_RELEASE);
        uring->in_kernel--;
        /* A file opened with O_NONBLOCK may not want to wait here, and what comes next may not be
         * for the kernel's queue. */
        if (result == -EAGAIN)
            do_here(request);
        else if (vp_block_step(request, result) && vp_uring_start(uring, request))
            do_here(request);
    }
    return count;
}
