/* Long copies, and looking through memory. */

#include "vm_memory.h"

#include <string.h>

void vmm_fill(uint64_t host, int value, size_t length)
{
    memset((void *)host, value, length);
}

void vmm_copy(uint64_t target, uint64_t source, size_t length)
{
    memmove((void *)target, (const void *)source, length);
}

int64_t vmm_find(uint64_t host, size_t length, const void *needle, size_t needle_length)
{
    const uint8_t *found = memmem((const void *)host, length, needle, needle_length);
    return found == NULL ? -1 : found - (const uint8_t *)host;
}

static int is_zero(const uint8_t *bytes, size_t length)
{
    return length == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0);
}

size_t vmm_zero_run(uint64_t host, size_t length, size_t page, int *zero)
{
    const uint8_t *bytes = (const uint8_t *)host;
    size_t done = 0;
    *zero = 0;
    while (done < length) {
        size_t step = length - done < page ? length - done : page;
        int is = is_zero(bytes + done, step);
        if (done == 0)
            *zero = is;
        else if (is != *zero)
            break;
        done += step;
    }
    return done;
}

size_t vmm_equal_run(uint64_t one, uint64_t other, size_t length, size_t page, int *equal)
{
    size_t done = 0;
    *equal = 0;
    while (done < length) {
        size_t step = length - done < page ? length - done : page;
        int is = memcmp((const uint8_t *)one + done, (const uint8_t *)other + done, step) == 0;
        if (done == 0)
            *equal = is;
        else if (is != *equal)
            break;
        done += step;
    }
    return done;
}
