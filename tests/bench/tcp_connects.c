/* New TCP connections one after the other: how long each takes, and how many there are in a second.
 *
 * usage: tcp_connects serve ADDRESS PORT            accepts, and waits for the client's reset, until it is ended
 *        tcp_connects connect ADDRESS PORT COUNT    prints: rate, p50 and p99 in microseconds of connect(2)
 * The client resets every connection at once, so that no port waits in TIME_WAIT.
 */
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1e6 + at.tv_nsec / 1e3;
}

static void fail(const char *what) {
	perror(what);
	exit(1);
}

static int compare(const void *left, const void *right) {
	double a = *(const double *)left, b = *(const double *)right;
	return (a > b) - (a < b);
}

static void reset(int connection) {
	struct linger at_once = {.l_onoff = 1, .l_linger = 0};
	setsockopt(connection, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
	close(connection);
}

static void serve(struct addrinfo *to) {
	int one = 1, listener = socket(to->ai_family, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, to->ai_addr, to->ai_addrlen) || listen(listener, 4096))
		fail("listen");
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		char byte;
		int connection = accept(listener, NULL, NULL);
		while (connection >= 0 && read(connection, &byte, 1) > 0)
			;
		close(connection);
	}
}

static void connect_often(struct addrinfo *to, int count) {
	double *took = malloc(count * sizeof *took), began = now();
	for (int i = 0; i < count; i++) {
		int connection = socket(to->ai_family, SOCK_STREAM, 0);
		double before = now();
		if (connect(connection, to->ai_addr, to->ai_addrlen))
			fail("connect");
		took[i] = now() - before;
		reset(connection);
	}
	double rate = count / ((now() - began) / 1e6);
	qsort(took, count, sizeof *took, compare);
	printf("%.1f %.2f %.2f\n", rate, took[count / 2], took[(int)(count * 0.99)]);
}

int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM}, *to;
	if (argc < 4 || getaddrinfo(argv[2], argv[3], &hints, &to)) {
		fprintf(stderr, "usage: tcp_connects serve|connect ADDRESS PORT [COUNT]\n");
		return 2;
	}
	if (!strcmp(argv[1], "serve"))
		serve(to);
	connect_often(to, argc > 4 ? atoi(argv[4]) : 1000);
	return 0;
}
