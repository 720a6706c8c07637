/* Load of a guest that is moved: `load HOST PORT`. One process writes 16 MiB of memory again and
 * again, a page in each fifth of a millisecond or so; another sends a datagram each millisecond. */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAGES 4096

static void rest(long nanoseconds)
{
	struct timespec t = { 0, nanoseconds };
	nanosleep(&t, NULL);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 1;
	if (fork() == 0) {
		char *memory = mmap(NULL, PAGES * 4096l, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (unsigned long n = 0;; n++) {
			memset(memory + n % PAGES * 4096, (int)n, 4096);
			if (n % 10 == 0)
				rest(2000000);
		}
	}
	struct sockaddr_in host = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[2])) };
	inet_pton(AF_INET, argv[1], &host.sin_addr);
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	for (unsigned long n = 0;; n++) {
		sendto(fd, &n, sizeof(n), 0, (struct sockaddr *)&host, sizeof(host));
		rest(1000000);
	}
}
