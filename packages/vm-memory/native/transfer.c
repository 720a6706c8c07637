/* Vectored transfers between guest memory and files, without a copy on the way. */

#include "vm_memory.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

#define PIECES 64

/* The kernel moves at most this much in one call, and so do we. */
#define MOST 0x7ffff000UL

/* Describe the memory from `address` on; returns the number of pieces, up to `length` in all. */
static int pieces(const struct vmm_table *table, uint64_t address, uint64_t length,
                  struct iovec *vector)
{
    int64_t index = vmm_table_find(table, address);
    int count = 0;
    if (length > MOST)
        length = MOST;
    while (index >= 0 && index < table->count && length > 0 && count < PIECES) {
        const struct vmm_table_region *region = &table->regions[index++];
        uint64_t offset = address - region->guest_address;
        if (offset >= region->size)
            break;
        uint64_t step = region->size - offset < length ? region->size - offset : length;
        vector[count].iov_base = region->host + offset;
        vector[count++].iov_len = step;
        address += step;
        length -= step;
    }
    return count;
}

static void mark(const struct vmm_table *table, uint64_t address, uint64_t length)
{
    int64_t index = vmm_table_find(table, address);
    while (index >= 0 && index < table->count && length > 0) {
        const struct vmm_table_region *region = &table->regions[index++];
        uint64_t offset = address - region->guest_address;
        uint64_t step = region->size - offset < length ? region->size - offset : length;
        if (region->bitmap != NULL)
            vmm_bitmap_mark(region->bitmap, offset, step);
        address += step;
        length -= step;
    }
}

int64_t vmm_transfer(struct vmm_table *table, uint64_t address, uint64_t length, int fd,
                     int64_t offset, int out, int exact, int *error)
{
    uint64_t done = 0;
    *error = 0;
    while (done < length) {
        struct iovec vector[PIECES];
        int count = pieces(table, address + done, length - done, vector);
        if (count == 0) {
            *error = EFAULT;
            break;
        }
        ssize_t result;
        if (offset < 0)
            result = out ? writev(fd, vector, count) : readv(fd, vector, count);
        else
            result = out ? pwritev(fd, vector, count, offset + (int64_t)done)
                         : preadv(fd, vector, count, offset + (int64_t)done);
        if (result < 0)
            *error = errno; /* EINTR too: Python runs its signal handlers and calls again */
        if (result <= 0)
            break;
        if (!out)
            mark(table, address + done, (uint64_t)result);
        done += (uint64_t)result;
        if (!exact)
            break;
    }
    return (int64_t)done;
}
