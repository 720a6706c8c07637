/* System calls that report -errno instead of setting it. */
#include "kvmi.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

int kvmi_ioctl(int fd, unsigned long request, void *argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

int kvmi_ioctl_value(int fd, unsigned long request, unsigned long value)
{
    int result = ioctl(fd, request, value);
    return result < 0 ? -errno : result;
}

int kvmi_map(int fd, uint64_t offset, uint64_t size, uint8_t **address)
{
    void *result = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (result == MAP_FAILED)
        return -errno;
    *address = result;
    return 0;
}

void kvmi_unmap(uint8_t *address, uint64_t size)
{
    munmap(address, size);
}
