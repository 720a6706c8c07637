/* Load of a guest that is saved and moved: each worker proves what it reads, and counts.
 *
 *   load start DISK HOST PORT VSOCKPORT    start all workers, in the background
 *   load look                              print their counters as JSON, and forget the longest gaps
 *
 * ticks   wakes up each millisecond and notes the longest gap between two of its looks at the clock
 * hash    8 MiB of memory of known content, proved and written anew page by page
 * disk    blocks of known content on a disk, past the page cache: written, read back and proved
 * tcp     what it sends comes back as it was, over one connection, made anew only if it breaks
 * vsock   the same over a socket to the host
 *
 * Content is made of a seed and a place, so that data of another place or another time is noticed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#define PAGE 4096
#define HASH_PAGES 2048
#define DISK_BLOCKS 512

/* Microseconds between two pieces of work: the guest is to be busy, not to starve who serves it. */
#define PACE 30000

enum { TICKS, HASH, DISK, TCP, VSOCK, WORKERS };
static const char *names[] = { "ticks", "hash", "disk", "tcp", "vsock" };

struct counters {
	volatile uint64_t rounds;   /* how much was done */
	volatile uint64_t errors;   /* what was read and was not what it must be */
	volatile uint64_t restarts; /* connections that had to be made anew */
	volatile uint64_t gap;      /* ns, the longest */
};

static struct counters *all;

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void rest(long microseconds)
{
	struct timespec t = { 0, microseconds * 1000 };
	clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
}

static void fill(uint64_t *page, uint64_t seed)
{
	for (int n = 0; n < PAGE / 8; n++) {
		seed = seed * 6364136223846793005ull + 1442695040888963407ull;
		page[n] = seed;
	}
}

static int same(const uint64_t *page, uint64_t seed)
{
	static uint64_t wanted[PAGE / 8];
	fill(wanted, seed);
	return memcmp(page, wanted, PAGE) == 0;
}

static void ticks(struct counters *mine)
{
	uint64_t last = now();
	for (;;) {
		rest(1000);
		uint64_t at = now();
		if (at < last)
			mine->errors++;
		if (at - last > mine->gap)
			mine->gap = at - last;
		last = at;
		mine->rounds++;
	}
}

static void hash(struct counters *mine)
{
	uint64_t *pages = mmap(NULL, HASH_PAGES * PAGE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	uint64_t generation = 1;
	for (uint64_t n = 0; n < HASH_PAGES; n++)
		fill(pages + n * PAGE / 8, n << 32 | generation);
	for (;; generation++) {
		for (uint64_t n = 0; n < HASH_PAGES; n++) {
			if (!same(pages + n * PAGE / 8, n << 32 | generation))
				mine->errors++;
			fill(pages + n * PAGE / 8, n << 32 | (generation + 1));
			mine->rounds++;
			if (n % 8 == 7)
				rest(PACE);
		}
	}
}

static void disk(struct counters *mine, const char *path)
{
	static uint64_t generations[DISK_BLOCKS];
	uint64_t *page = aligned_alloc(PAGE, PAGE), chance = 1;
	int fd = open(path, O_RDWR | O_DIRECT);
	if (fd < 0 || !page) {
		mine->errors++;
		return;
	}
	for (;;) {
		chance = chance * 6364136223846793005ull + 1442695040888963407ull;
		uint64_t block = (chance >> 33) % DISK_BLOCKS;
		if (generations[block] && (pread(fd, page, PAGE, block * PAGE) != PAGE ||
					   !same(page, block << 32 | generations[block])))
			mine->errors++;
		fill(page, block << 32 | ++generations[block]);
		if (pwrite(fd, page, PAGE, block * PAGE) != PAGE)
			mine->errors++;
		if (chance >> 60 == 0 && fsync(fd))
			mine->errors++;
		mine->rounds++;
		rest(PACE);
	}
}

/* One connection, until it breaks. */
static void echo(struct counters *mine, int fd)
{
	static uint64_t page[PAGE / 8];
	struct timeval patience = { 60, 0 };
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	for (uint64_t seed = mine->rounds << 8;; seed++) {
		fill(page, seed);
		if (send(fd, page, PAGE, MSG_NOSIGNAL) != PAGE)
			return;
		memset(page, 0, PAGE);
		if (recv(fd, page, PAGE, MSG_WAITALL) != PAGE)
			return;
		if (!same(page, seed))
			mine->errors++;
		mine->rounds++;
		rest(PACE);
	}
}

static void stream(struct counters *mine, int family, const void *address, socklen_t length)
{
	for (;;) {
		int fd = socket(family, SOCK_STREAM, 0);
		if (fd >= 0 && connect(fd, address, length) == 0)
			echo(mine, fd);
		close(fd);
		mine->restarts++;
		rest(20000);
	}
}

static void work(int worker, char **arguments)
{
	struct counters *mine = all + worker;
	struct sockaddr_in host = { .sin_family = AF_INET };
	struct sockaddr_vm other = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST };

	switch (worker) {
	case TICKS:
		ticks(mine);
		break;
	case HASH:
		hash(mine);
		break;
	case DISK:
		disk(mine, arguments[0]);
		break;
	case TCP:
		host.sin_port = htons(atoi(arguments[2]));
		inet_pton(AF_INET, arguments[1], &host.sin_addr);
		stream(mine, AF_INET, &host, sizeof(host));
		break;
	case VSOCK:
		other.svm_port = atoi(arguments[3]);
		stream(mine, AF_VSOCK, &other, sizeof(other));
		break;
	}
}

int main(int argc, char **argv)
{
	int fd = open("/tmp/load", O_RDWR | O_CREAT, 0600);
	if (fd < 0 || ftruncate(fd, PAGE)) {
		perror("load");
		return 1;
	}
	all = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (argc == 2 && strcmp(argv[1], "look") == 0) {
		for (int n = 0; n < WORKERS; n++) {
			printf("%s\"%s\": {\"rounds\": %lu, \"errors\": %lu, \"restarts\": %lu, "
			       "\"gap\": %.6f}", n ? ", " : "{", names[n], all[n].rounds,
			       all[n].errors, all[n].restarts, all[n].gap / 1e9);
			all[n].gap = 0;
		}
		printf("}\n");
		return 0;
	}
	if (argc != 6 || strcmp(argv[1], "start") != 0) {
		fprintf(stderr, "load start DISK HOST PORT VSOCKPORT, or load look\n");
		return 1;
	}
	signal(SIGHUP, SIG_IGN);
	for (int n = 0; n < WORKERS; n++)
		if (fork() == 0) {
			setsid();
			work(n, argv + 2);
			return 1;
		}
	return 0;
}
