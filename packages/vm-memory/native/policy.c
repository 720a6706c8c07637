/* What the kernel is told about memory: paging, locking, placement. */

#include "vm_memory.h"

#include <errno.h>
#include <linux/mempolicy.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* since Linux 5.14 */
#endif

int vmm_advise(uint64_t host, size_t length, int advice)
{
    return madvise((void *)host, length, advice) == 0 ? 0 : errno;
}

int vmm_populate(uint64_t host, size_t length, size_t page)
{
    while (madvise((void *)host, length, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR || errno == EAGAIN)
            continue;
        if (errno != EINVAL)
            return errno;
        /* An older kernel: touch each page, in a way that leaves what another thread writes. */
        for (size_t offset = 0; offset < length; offset += page)
            __atomic_fetch_or((uint8_t *)host + offset, 0, __ATOMIC_RELAXED);
        return 0;
    }
    return 0;
}

int vmm_lock(uint64_t host, size_t length, int on_fault)
{
    return mlock2((void *)host, length, on_fault ? MLOCK_ONFAULT : 0) == 0 ? 0 : errno;
}

int vmm_bind(uint64_t host, size_t length, int mode, uint64_t *mask, uint64_t bits)
{
    /* The kernel reads one bit less than it is told. */
    long result = syscall(SYS_mbind, (void *)host, length, mode, mask, bits + 1, MPOL_MF_MOVE);
    return result == 0 ? 0 : errno;
}

int vmm_nodes(uint64_t host, size_t page, size_t count, int *nodes)
{
    void **pages = malloc(count * sizeof *pages);
    if (pages == NULL)
        return ENOMEM;
    for (size_t i = 0; i < count; i++)
        pages[i] = (uint8_t *)host + i * page;
    long result = syscall(SYS_move_pages, 0, count, pages, NULL, nodes, 0);
    int error = result == 0 ? 0 : errno;
    free(pages);
    return error;
}
