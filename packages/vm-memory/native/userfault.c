/* Memory whose pages are supplied on demand: userfaultfd, and threads that supply them from a file.
 *
 * A thread that touches a missing page stands still until somebody supplies it. If that thread
 * holds the interpreter's lock, no Python code can be that somebody: so missing pages are served by
 * threads of C that never ask for it.
 *
 * The ioctls' numbers and layouts are the kernel's; headers older than a feature lack its names. */

#include "vm_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFDIO_POISON /* since Linux 6.6 */
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0) /* of /dev/userfaultfd, since Linux 6.1 */
#endif

int vmm_userfault_open(uint64_t features, int *error)
{
    int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd < 0) {
        *error = errno;
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -1;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
        *error = fd < 0 ? errno : 0;
        close(device);
        if (fd < 0)
            return -1;
    }
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    *error = ioctl(fd, UFFDIO_API, &api) == 0 ? 0 : errno;
    if (*error == 0)
        return fd;
    close(fd);
    return -1;
}

int vmm_userfault_register(int fd, uint64_t host, uint64_t length, uint64_t mode)
{
    struct uffdio_register range = {.range = {host, length}, .mode = mode};
    return ioctl(fd, UFFDIO_REGISTER, &range) == 0 ? 0 : errno;
}

int vmm_userfault_unregister(int fd, uint64_t host, uint64_t length)
{
    struct uffdio_range range = {host, length};
    return ioctl(fd, UFFDIO_UNREGISTER, &range) == 0 ? 0 : errno;
}

int vmm_userfault_wake(int fd, uint64_t host, uint64_t length)
{
    struct uffdio_range range = {host, length};
    return ioctl(fd, UFFDIO_WAKE, &range) == 0 ? 0 : errno;
}

int vmm_userfault_poison(int fd, uint64_t host, uint64_t length)
{
    struct uffdio_poison pages = {.range = {host, length}};
    return ioctl(fd, UFFDIO_POISON, &pages) == 0 ? 0 : errno;
}

int vmm_userfault_protect(int fd, uint64_t host, uint64_t length, int on)
{
    struct uffdio_writeprotect range = {
        .range = {host, length}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    while (ioctl(fd, UFFDIO_WRITEPROTECT, &range) != 0)
        if (errno != EAGAIN)
            return errno;
    return 0;
}

/* One call of a copy, or of zeros when `from` is 0: how much it did, and why it stopped. */
static int64_t supply_once(int fd, uint64_t to, uint64_t from, uint64_t length, uint64_t mode,
                           int *error)
{
    int64_t done;
    if (from == 0) {
        struct uffdio_zeropage zero = {.range = {to, length}, .mode = mode};
        *error = ioctl(fd, UFFDIO_ZEROPAGE, &zero) == 0 ? 0 : errno;
        done = zero.zeropage;
    } else {
        struct uffdio_copy copy = {.dst = to, .src = from, .len = length, .mode = mode};
        *error = ioctl(fd, UFFDIO_COPY, &copy) == 0 ? 0 : errno;
        done = copy.copy;
    }
    if (*error == 0)
        return (int64_t)length;
    return done > 0 ? done : 0;
}

int64_t vmm_userfault_supply(int fd, uint64_t to, uint64_t from, uint64_t length, uint64_t mode,
                             int *error)
{
    uint64_t done = 0;
    while (done < length) {
        int64_t now = supply_once(fd, to + done, from ? from + done : 0, length - done, mode, error);
        done += (uint64_t)now;
        /* EAGAIN with nothing done: an event waits to be read first. */
        if (*error != 0 && !(*error == EAGAIN && now > 0))
            return (int64_t)done;
    }
    *error = 0;
    return (int64_t)done;
}

int vmm_userfault_read(int fd, struct vmm_userfault_event *events, int room, int *error)
{
    struct uffd_msg messages[16];
    ssize_t got = read(fd, messages, (size_t)(room < 16 ? room : 16) * sizeof *messages);
    *error = got < 0 && errno != EAGAIN ? errno : 0;
    int count = got < 0 ? 0 : (int)((size_t)got / sizeof *messages);
    for (int i = 0; i < count; i++) {
        struct uffd_msg *message = &messages[i];
        events[i].kind = message->event;
        if (message->event == UFFD_EVENT_PAGEFAULT) {
            events[i].host = message->arg.pagefault.address;
            events[i].end = 0;
            events[i].flags = message->arg.pagefault.flags;
            events[i].thread = message->arg.pagefault.feat.ptid;
        } else {
            events[i].host = message->arg.remove.start;
            events[i].end = message->arg.remove.end;
            events[i].flags = 0;
            events[i].thread = 0;
        }
    }
    return count;
}

/* --- the filler --- */

#define WINDOW (64 << 10)      /* around a missing page */
#define STRIDE (1 << 20)       /* in the background */
#define WAITING 256            /* faults read and not served yet */

struct range {
    uint64_t host, length, offset, first; /* `first`: number of its first page among all */
};

struct vmm_filler {
    struct vmm_filler_status status;
    int uffd, file, stop, notify;
    uint64_t page;
    uint64_t *removed;    /* a bit a page: thrown away since, so it is zeros and not the file's */
    pthread_mutex_t lock; /* between looking at `removed` and supplying the page */
    pthread_t threads[2];
    int running;
    int background;
    uint8_t *buffers[3]; /* of either thread, and zeros */
    size_t count;
    struct range ranges[];
};

/* Whether the background is to end: after a failure `vmm_filler_retry` begins anew. */
static int tell_stop(struct vmm_filler *filler)
{
    if (__atomic_load_n(&filler->status.error, __ATOMIC_ACQUIRE) != 0)
        return 1;
    struct pollfd fd = {.fd = filler->stop, .events = POLLIN};
    return poll(&fd, 1, 0) > 0;
}

static void notify(struct vmm_filler *filler)
{
    uint64_t one = 1;
    ssize_t ignored = write(filler->notify, &one, sizeof one);
    (void)ignored;
}

/* The first failure counts until `vmm_filler_retry`. */
static void fail(struct vmm_filler *filler, int error, uint64_t offset)
{
    pthread_mutex_lock(&filler->lock);
    if (filler->status.error == 0) {
        filler->status.error_offset = offset;
        __atomic_store_n(&filler->status.error, error, __ATOMIC_RELEASE);
        notify(filler);
    }
    pthread_mutex_unlock(&filler->lock);
}

/* Read all of a stretch of the file; 0 or an errno, ENODATA where the file ends too early. */
static int fetch(struct vmm_filler *filler, uint8_t *to, uint64_t offset, uint64_t length)
{
    uint64_t done = 0;
    while (done < length) {
        ssize_t got = pread(filler->file, to + done, length - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? errno : ENODATA;
        done += (uint64_t)got;
    }
    return 0;
}

static int is_removed(const struct vmm_filler *filler, uint64_t page)
{
    return filler->removed[page / 64] >> page % 64 & 1;
}

static int all_zero(const uint8_t *data, uint64_t length)
{
    return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
}

/* Supply one page that has been read; 0, or EAGAIN when an event has to be read first. */
static int supply_page(struct vmm_filler *filler, const struct range *range, uint64_t place,
                       const uint8_t *data)
{
    uint64_t page = filler->page;
    pthread_mutex_lock(&filler->lock);
    int zero = is_removed(filler, range->first + place / page) || all_zero(data, page);
    int error;
    uint64_t from = (uint64_t)(zero ? filler->buffers[2] : data);
    supply_once(filler->uffd, range->host + place, zero && page == 4096 ? 0 : from, page, 0,
                &error);
    pthread_mutex_unlock(&filler->lock);
    if (error == 0)
        __atomic_fetch_add(&filler->status.filled, 1, __ATOMIC_RELAXED);
    return error;
}

/* Whatever keeps a page from being supplied but EAGAIN means that it is there, or that the memory
 * is not ours any more: whoever waits for it looks again. */
static int settled(struct vmm_filler *filler, const struct range *range, uint64_t place, int error)
{
    if (error == EAGAIN)
        return 0;
    if (error != 0)
        vmm_userfault_wake(filler->uffd, range->host + place, filler->page);
    return 1;
}

static const struct range *find_range(const struct vmm_filler *filler, uint64_t host)
{
    for (size_t i = 0; i < filler->count; i++)
        if (host - filler->ranges[i].host < filler->ranges[i].length)
            return &filler->ranges[i];
    return NULL;
}

/* Supply the page that somebody waits for, then its neighbours; 0 if it has to be tried again. */
static int serve(struct vmm_filler *filler, uint64_t host)
{
    const struct range *range = find_range(filler, host);
    if (range == NULL)
        return 1;
    uint64_t page = filler->page, place = (host - range->host) & ~(page - 1);
    uint64_t window = page > WINDOW ? page : WINDOW;
    uint64_t start = place & ~(window - 1);
    uint64_t length = range->length - start < window ? range->length - start : window;
    uint8_t *buffer = filler->buffers[0];
    int error = fetch(filler, buffer, range->offset + start, length);
    if (error != 0) { /* a neighbour's failure is none of this page's */
        start = place;
        length = page;
        error = fetch(filler, buffer, range->offset + start, length);
    }
    if (error != 0) {
        fail(filler, error, range->offset + place);
        return 1;
    }
    error = supply_page(filler, range, place, buffer + (place - start));
    if (!settled(filler, range, place, error))
        return 0;
    for (uint64_t other = start; other < start + length; other += page)
        if (other != place)
            supply_page(filler, range, other, buffer + (other - start));
    return 1;
}

static void remove_pages(struct vmm_filler *filler, uint64_t start, uint64_t end)
{
    for (size_t i = 0; i < filler->count; i++) {
        const struct range *range = &filler->ranges[i];
        uint64_t low = start > range->host ? start : range->host;
        uint64_t high = end < range->host + range->length ? end : range->host + range->length;
        for (uint64_t host = low; host < high; host += filler->page) {
            uint64_t page = range->first + (host - range->host) / filler->page;
            filler->removed[page / 64] |= (uint64_t)1 << page % 64;
        }
    }
}

/* Read what there is to read. Pages thrown away are noted before anybody can supply them again. */
static int take_events(struct vmm_filler *filler, uint64_t *waiting, int count)
{
    struct vmm_userfault_event events[16];
    int error;
    pthread_mutex_lock(&filler->lock);
    int got = vmm_userfault_read(filler->uffd, events, 16, &error);
    for (int i = 0; i < got; i++)
        if (events[i].kind == UFFD_EVENT_REMOVE)
            remove_pages(filler, events[i].host, events[i].end);
    pthread_mutex_unlock(&filler->lock);
    for (int i = 0; i < got; i++) {
        if (events[i].kind != UFFD_EVENT_PAGEFAULT)
            continue;
        __atomic_fetch_add(&filler->status.faults, 1, __ATOMIC_RELAXED);
        if (count < WAITING)
            waiting[count++] = events[i].host;
        else /* it looks again, and asks again */
            vmm_userfault_wake(filler->uffd, events[i].host & ~(filler->page - 1), filler->page);
    }
    return count;
}

static void *serve_faults(void *argument)
{
    struct vmm_filler *filler = argument;
    struct pollfd fds[2] = {{.fd = filler->uffd, .events = POLLIN},
                            {.fd = filler->stop, .events = POLLIN}};
    uint64_t waiting[WAITING];
    int count = 0;
    for (;;) {
        if (poll(fds, 2, count > 0 ? 1 : -1) < 0 && errno != EINTR)
            return NULL;
        if (fds[1].revents)
            return NULL;
        count = take_events(filler, waiting, count);
        int left = 0;
        for (int i = 0; i < count; i++)
            if (!serve(filler, waiting[i]))
                waiting[left++] = waiting[i];
        count = left;
    }
}

/* Supply what is missing of a stretch that has been read. */
static int fill_stretch(struct vmm_filler *filler, const struct range *range, uint64_t place,
                        uint64_t length, uint8_t *data)
{
    uint64_t page = filler->page, done = 0;
    while (done < length) {
        int error = 0;
        uint64_t first = range->first + (place + done) / page, run = 0;
        pthread_mutex_lock(&filler->lock);
        while (done + run < length && !is_removed(filler, first + run / page))
            run += page;
        uint64_t now = run == 0 ? 0
                                : (uint64_t)supply_once(filler->uffd, range->host + place + done,
                                                        (uint64_t)data + done, run, 0, &error);
        pthread_mutex_unlock(&filler->lock);
        if (run == 0) {
            done += page; /* thrown away */
            continue;
        }
        __atomic_fetch_add(&filler->status.filled, now / page, __ATOMIC_RELAXED);
        done += now;
        if (error == EEXIST)
            done += page;
        else if (error == EAGAIN && now == 0) { /* the other thread has an event to read */
            if (tell_stop(filler))
                return 0;
            usleep(20);
        } else if (error == ENOENT || error == ESRCH)
            return 0; /* unmapped meanwhile */
        else if (error != 0 && error != EAGAIN) {
            fail(filler, error, range->offset + place + done);
            return -1;
        }
    }
    return 0;
}

static int fill_range(struct vmm_filler *filler, const struct range *range)
{
    uint64_t place = 0;
    while (place < range->length) {
        if (tell_stop(filler))
            return -1;
        off_t data = lseek(filler->file, (off_t)(range->offset + place), SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return 0; /* nothing but zeros behind, which unregistering gives */
        if (data < 0)
            data = (off_t)(range->offset + place);
        uint64_t page = filler->page;
        uint64_t start = ((uint64_t)data - range->offset) & ~(page - 1);
        place = start > place ? start : place;
        if (place >= range->length)
            return 0;
        off_t hole = lseek(filler->file, (off_t)(range->offset + place), SEEK_HOLE);
        uint64_t end = hole < 0 ? range->length
                                : ((uint64_t)hole - range->offset + page - 1) & ~(page - 1);
        if (end > range->length)
            end = range->length;
        if (end <= place)
            end = place + page;
        while (place < end) {
            if (tell_stop(filler))
                return -1;
            uint64_t stride = page > STRIDE ? page : STRIDE;
            uint64_t length = end - place < stride ? end - place : stride;
            int error = fetch(filler, filler->buffers[1], range->offset + place, length);
            if (error != 0) {
                fail(filler, error, range->offset + place);
                return -1;
            }
            if (fill_stretch(filler, range, place, length, filler->buffers[1]) < 0)
                return -1;
            place += length;
        }
    }
    return 0;
}

/* The file must be as long as the ranges say even where it ends in a hole. */
static int long_enough(struct vmm_filler *filler)
{
    off_t end = lseek(filler->file, 0, SEEK_END);
    for (size_t i = 0; i < filler->count; i++) {
        const struct range *range = &filler->ranges[i];
        if (end < (off_t)(range->offset + range->length)) {
            fail(filler, end < 0 ? errno : ENODATA, end < 0 ? 0 : (uint64_t)end);
            return 0;
        }
    }
    return 1;
}

static void *fill_all(void *argument)
{
    struct vmm_filler *filler = argument;
    for (size_t i = 0; i < filler->count; i++)
        if (fill_range(filler, &filler->ranges[i]) < 0)
            return NULL;
    /* A file that was cut meanwhile has no data where it had some: that is not zeros. */
    if (!long_enough(filler))
        return NULL;
    for (size_t i = 0; i < filler->count; i++)
        vmm_userfault_unregister(filler->uffd, filler->ranges[i].host, filler->ranges[i].length);
    __atomic_store_n(&filler->status.complete, 1, __ATOMIC_RELEASE);
    notify(filler);
    return NULL;
}

struct vmm_filler *vmm_filler_new(int uffd, int file, uint64_t page, size_t count,
                                  const uint64_t *ranges, int *error)
{
    struct vmm_filler *filler = calloc(1, sizeof *filler + count * sizeof filler->ranges[0]);
    *error = ENOMEM;
    if (filler == NULL)
        return NULL;
    filler->uffd = uffd;
    filler->file = file;
    filler->page = page;
    filler->count = count;
    uint64_t pages = 0;
    for (size_t i = 0; i < count; i++) {
        filler->ranges[i] = (struct range){ranges[3 * i], ranges[3 * i + 1], ranges[3 * i + 2],
                                           pages};
        pages += ranges[3 * i + 1] / page;
    }
    filler->status.pages = pages;
    pthread_mutex_init(&filler->lock, NULL);
    filler->stop = eventfd(0, EFD_CLOEXEC);
    filler->notify = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    filler->removed = calloc(pages / 64 + 1, sizeof *filler->removed);
    size_t room = page > STRIDE ? page : STRIDE;
    for (int i = 0; i < 3; i++) {
        void *memory = mmap(NULL, room, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        filler->buffers[i] = memory == MAP_FAILED ? NULL : memory;
    }
    if (filler->stop >= 0 && filler->notify >= 0 && filler->removed && filler->buffers[0] &&
        filler->buffers[1] && filler->buffers[2]) {
        *error = 0;
        return filler;
    }
    vmm_filler_free(filler);
    return NULL;
}

static int start(struct vmm_filler *filler, void *(*main)(void *))
{
    /* Signals are Python's, which takes them on its own threads. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&filler->threads[filler->running], NULL, main, filler);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (error == 0)
        filler->running++;
    return error;
}

int vmm_filler_start(struct vmm_filler *filler, int background)
{
    if (filler->running != 0)
        return EALREADY;
    filler->background = background;
    int error = start(filler, serve_faults);
    return error == 0 && background ? start(filler, fill_all) : error;
}

int vmm_filler_retry(struct vmm_filler *filler)
{
    if (__atomic_load_n(&filler->status.error, __ATOMIC_ACQUIRE) == 0)
        return 0;
    if (filler->background && filler->running == 2) {
        pthread_join(filler->threads[1], NULL); /* it ended with the failure, or does so soon */
        filler->running = 1;
    }
    uint64_t old;
    ssize_t ignored = read(filler->notify, &old, sizeof old);
    (void)ignored;
    __atomic_store_n(&filler->status.error, 0, __ATOMIC_RELEASE);
    for (size_t i = 0; i < filler->count; i++)
        vmm_userfault_wake(filler->uffd, filler->ranges[i].host, filler->ranges[i].length);
    return filler->background && !filler->status.complete ? start(filler, fill_all) : 0;
}

int vmm_filler_notify(struct vmm_filler *filler) { return filler->notify; }

struct vmm_filler_status *vmm_filler_look(struct vmm_filler *filler) { return &filler->status; }

void vmm_filler_free(struct vmm_filler *filler)
{
    uint64_t one = 1;
    ssize_t ignored = filler->stop >= 0 ? write(filler->stop, &one, sizeof one) : 0;
    (void)ignored;
    if (filler->notify >= 0)
        notify(filler); /* whoever waits for the end */
    for (int i = 0; i < filler->running; i++)
        pthread_join(filler->threads[i], NULL);
    if (filler->stop >= 0)
        close(filler->stop);
    if (filler->notify >= 0)
        close(filler->notify);
    size_t room = filler->page > STRIDE ? filler->page : STRIDE;
    for (int i = 0; i < 3; i++)
        if (filler->buffers[i] != NULL)
            munmap(filler->buffers[i], room);
    free(filler->removed);
    pthread_mutex_destroy(&filler->lock);
    free(filler);
}
