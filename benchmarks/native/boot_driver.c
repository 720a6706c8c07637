// Starts one VMM, stamps what happens until it exits, and prints the stamps.
//
//   boot_driver SECONDS COMMAND [ARGUMENT]...
//
// Each line of output is a time in nanoseconds since the process was started, a word, and a text:
//   entry    the first KVM_RUN: the first time the processor enters any guest
//   line     a line of the VMM's output, stamped when its first byte came
//   exit     the process ended; its exit status, or 128 and the signal
//   timeout  the process was killed after SECONDS
//   note     why a stamp is absent
//
// The first entry is seen from outside, alike for every VMM: a perf event on the tracepoint
// kvm:kvm_entry which switches itself off after one sample, so that it costs nothing later. The
// output is read a millisecond after it starts to come, so that a console that writes byte by byte
// does not wake this process for each of them.
//
// Before that it writes to the pages which the system would give out first. An emulator, as the lab
// is one, keeps its translations of code by the physical page, and drops them when the page is
// written: slowly, one by one. The kernel of the guest before was such code. Whoever comes first
// upon its pages would pay 50 to 150 ms for that, and which VMM is that is luck. Real processors
// have no such thing.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CPUS = 256, PAGE = 4096, MOST = 1 << 30 };

static int64_t start;

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void stamp(int64_t when, const char *word, const char *text)
{
    printf("%lld %s %s\n", (long long)(when - start), word, text);
}

// The number that perf knows the tracepoint by, or 0.
static int tracepoint(void)
{
    static const char name[] = "/sys/kernel/tracing/events/kvm/kvm_entry/id";
    FILE *file = fopen(name, "r");
    if (!file) {
        mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, NULL);
        file = fopen(name, "r");
    }
    int id = 0;
    if (file) {
        if (fscanf(file, "%d", &id) != 1)
            id = 0;
        fclose(file);
    }
    return id;
}

static int watch(int id, int cpu, void **ring)
{
    struct perf_event_attr attributes = {
        .type = PERF_TYPE_TRACEPOINT,
        .size = sizeof attributes,
        .config = id,
        .sample_period = 1,
        .sample_type = PERF_SAMPLE_TIME,
        .wakeup_events = 1,
        .disabled = 1,
        .use_clockid = 1,
        .clockid = CLOCK_MONOTONIC,
    };
    int event = syscall(SYS_perf_event_open, &attributes, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC);
    if (event < 0)
        return -1;
    *ring = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, event, 0);
    if (*ring == MAP_FAILED || ioctl(event, PERF_EVENT_IOC_REFRESH, 1)) {
        close(event);
        return -1;
    }
    return event;
}

// The time in the one sample of a ring, or 0 while there is none.
static int64_t sampled(void *ring)
{
    struct perf_event_mmap_page *page = ring;
    struct {
        struct perf_event_header header;
        int64_t time;
    } *sample = (void *)((char *)ring + PAGE);
    if (__atomic_load_n(&page->data_head, __ATOMIC_ACQUIRE) < sizeof *sample)
        return 0;
    return sample->header.type == PERF_RECORD_SAMPLE ? sample->time : 0;
}

// Write to free pages, once: to as many as a few guests have, or to half of what is free.
static void write_free_pages(void)
{
    struct sysinfo system;
    if (sysinfo(&system))
        return;
    size_t size = (size_t)system.freeram * system.mem_unit / 2;
    if (size > MOST)
        size = MOST;
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (pages != MAP_FAILED)
        munmap(pages, size);
}

int main(int count, char **arguments)
{
    if (count < 3) {
        fprintf(stderr, "boot_driver SECONDS COMMAND [ARGUMENT]...\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    start = now();
    int events[CPUS];
    void *rings[CPUS];
    int watched = 0, id = tracepoint(), cpus = sysconf(_SC_NPROCESSORS_CONF);
    for (int cpu = 0; id && cpu < cpus && cpu < CPUS; cpu++)
        if ((events[watched] = watch(id, cpu, &rings[watched])) >= 0)
            watched++;
    if (!watched)
        stamp(start, "note", id ? "perf events are not allowed" : "no tracepoint kvm:kvm_entry");

    write_free_pages();
    int output[2];
    if (pipe2(output, O_CLOEXEC)) {
        perror("boot_driver: pipe");
        return 1;
    }
    fflush(stdout);
    // Stamps are taken at once, also where the VMM keeps the only processor busy.
    struct sched_param priority = {.sched_priority = 1};
    sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &priority);
    start = now();
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_RDONLY);
        dup2(null, 0);
        dup2(output[1], 1);
        dup2(output[1], 2);
        setpgid(0, 0);
        execvp(arguments[2], arguments + 2);
        fprintf(stderr, "%s: %s\n", arguments[2], strerror(errno));
        _exit(127);
    }
    close(output[1]);
    int child_fd = syscall(SYS_pidfd_open, child, 0);
    int64_t deadline = start + atoll(arguments[1]) * 1000000000LL;
    int64_t entered = 0, exited = 0, line_start = 0;
    static char line[PAGE], bytes[1 << 16];
    size_t length = 0;

    for (int open_pipe = 1; !exited || open_pipe;) {
        struct pollfd wanted[CPUS + 2] = {
            {.fd = exited ? -1 : child_fd, .events = POLLIN},
            {.fd = open_pipe ? output[0] : -1, .events = POLLIN},
        };
        for (int each = 0; each < watched; each++)
            wanted[2 + each] = (struct pollfd){.fd = events[each], .events = POLLIN};
        // What a VMM's own helpers still write after its exit is of no interest.
        int wait = exited ? 100 : 1000;
        int ready = poll(wanted, 2 + watched, wait);
        int64_t time = now();
        if (wanted[0].revents)
            exited = time;
        else if (ready == 0 && exited)
            break;
        for (int each = 0; each < watched; each++)
            if (wanted[2 + each].revents)
                entered = sampled(rings[each]);
        if (entered && watched) {
            stamp(entered, "entry", "");
            while (watched)
                close(events[--watched]);
        }
        if (wanted[1].revents) {
            usleep(1000);
            ssize_t got = read(output[0], bytes, sizeof bytes);
            if (got <= 0)
                open_pipe = 0;
            for (ssize_t each = 0; each < got; each++) {
                if (length == 0)
                    line_start = time;
                if (bytes[each] == '\n' || length == sizeof line - 1) {
                    line[length] = 0;
                    stamp(line_start, "line", line);
                    length = 0;
                } else if (bytes[each] != '\r' && bytes[each] != 0) {
                    line[length++] = bytes[each];
                }
            }
        }
        if (!exited && time > deadline) {
            stamp(time, "timeout", arguments[2]);
            kill(-child, SIGKILL);
            deadline = INT64_MAX;
        }
    }
    if (length) {
        line[length] = 0;
        stamp(line_start, "line", line);
    }
    int status = 0;
    waitpid(child, &status, 0);
    char text[16];
    snprintf(text, sizeof text, "%d",
             WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    stamp(exited, "exit", text);
    return 0;
}
