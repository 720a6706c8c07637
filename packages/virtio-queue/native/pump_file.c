/* The synchronous engine: one system call an operation, on a file or a block device. */

#include "pump.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

static const uint8_t zeroes[64 << 10];

int vp_file_mode(const struct vp_request *request)
{
    return FALLOC_FL_KEEP_SIZE |
           (request->operation == VP_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

/* Without a write-back cache each write is durable before it is used (5.2.6.2). */
int vp_file_write_flags(const struct vp_block *disk)
{
    return __atomic_load_n(&disk->writeback, __ATOMIC_RELAXED) ? 0 : RWF_DSYNC;
}

int64_t vp_file_do(struct vp_request *request)
{
    const struct vp_block *disk = &request->queue->pump->block;
    int count = request->iovec_count < IOV_MAX ? (int)request->iovec_count : IOV_MAX;
    uint64_t range[2] = {request->offset, request->left};
    off_t offset = (off_t)request->offset;
    int64_t result;
    switch (request->operation) {
    case VP_READ:
        result = count == 1
                     ? pread(disk->fd, request->iovecs->iov_base, request->iovecs->iov_len, offset)
                     : preadv(disk->fd, request->iovecs, count, offset);
        break;
    case VP_WRITE:
        result = pwritev2(disk->fd, request->iovecs, count, offset, vp_file_write_flags(disk));
        break;
    case VP_SYNC:
        result = fdatasync(disk->fd);
        break;
    case VP_FILL:
        result = pwrite(disk->fd, zeroes,
                        request->left < sizeof zeroes ? request->left : sizeof zeroes, offset);
        break;
    default: /* VP_PUNCH, VP_ZERO */
        if (disk->is_device)
            result = ioctl(disk->fd, request->operation == VP_PUNCH ? BLKDISCARD : BLKZEROOUT, range);
        else
            result = fallocate(disk->fd, vp_file_mode(request), offset, (off_t)request->left);
    }
    return result < 0 ? -errno : result;
}
