/* A pipe over AF_VSOCK: `vsock CID PORT` connects, `vsock - PORT` takes one connection. Standard input
 * goes out, and its end is passed on by a half close; what comes in goes to standard output.
 *
 * `vsock CID PORT COUNT` has so many connections at once, sends a number on each, closes its half, and
 * prints how many of them have come back, with the end behind them. */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static int fail(const char *what)
{
	fprintf(stderr, "vsock: %s: %s\n", what, strerror(errno));
	return 1;
}

static int put(int fd, const char *data, ssize_t length)
{
	while (length > 0) {
		ssize_t done = write(fd, data, length);
		if (done < 0)
			return -1;
		data += done;
		length -= done;
	}
	return 0;
}

static int storm(const struct sockaddr_vm *address, uint32_t count)
{
	int fds[1024];
	uint32_t back, right = 0;
	for (uint32_t n = 0; n < count; n++) {
		fds[n] = socket(AF_VSOCK, SOCK_STREAM, 0);
		if (fds[n] < 0 || connect(fds[n], (struct sockaddr *)address, sizeof(*address)))
			return fail("connect");
	}
	for (uint32_t n = 0; n < count; n++)
		if (put(fds[n], (char *)&n, sizeof(n)) || shutdown(fds[n], SHUT_WR))
			return fail("write");
	for (uint32_t n = 0; n < count; n++) {
		if (recv(fds[n], &back, sizeof(back), MSG_WAITALL) != sizeof(back))
			return fail("read");
		right += back == n && read(fds[n], &back, 1) == 0;
		close(fds[n]);
	}
	printf("%u\n", right);
	return 0;
}

int main(int argc, char **argv)
{
	static char buffer[65536];
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	struct sockaddr_vm address = { .svm_family = AF_VSOCK };

	if (argc < 3 || argc > 4 || fd < 0)
		return fail("usage: vsock CID|- PORT [COUNT]");
	address.svm_port = strtoul(argv[2], NULL, 10);
	if (strcmp(argv[1], "-") == 0) {
		int listener = fd;
		address.svm_cid = VMADDR_CID_ANY;
		if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1))
			return fail("listen");
		fprintf(stderr, "vsock: listening\n");
		fd = accept(listener, NULL, NULL);
		if (fd < 0)
			return fail("accept");
		close(listener);
	} else {
		address.svm_cid = strtoul(argv[1], NULL, 10);
		if (argc == 4)
			return storm(&address, strtoul(argv[3], NULL, 10) % 1024);
		if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
			return fail("connect");
	}
	struct pollfd ends[2] = { { .fd = 0, .events = POLLIN }, { .fd = fd, .events = POLLIN } };
	while (ends[1].fd >= 0) {
		if (poll(ends, 2, -1) < 0)
			return fail("poll");
		for (int n = 0; n < 2; n++) {
			if (ends[n].fd < 0 || !ends[n].revents)
				continue;
			ssize_t got = read(ends[n].fd, buffer, sizeof(buffer));
			if (got < 0)
				return fail("read");
			if (got > 0 && put(n ? 1 : fd, buffer, got))
				return fail("write");
			if (got == 0) {
				ends[n].fd = -1;
				if (n == 0)
					shutdown(fd, SHUT_WR);
			}
		}
	}
	return 0;
}
