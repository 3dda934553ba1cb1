/* Fills an ipset with addresses over nfnetlink, in the batches that kube_router._fast.ipset makes: the yardstick in C.
 *
 * usage: ipset_batches SET FILE    FILE: one IPv4 address a line; SET: a hash:ip of family inet that exists
 * Prints the seconds from the text in memory to the kernel's last acknowledgement.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter/ipset/ip_set.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 60000, ENTRY = 16 };

static char *attribute(char *at, int type, const void *value, int length) {
	struct nlattr header = {.nla_len = NLA_HDRLEN + length, .nla_type = type};
	memcpy(at, &header, sizeof header);
	memcpy(at + NLA_HDRLEN, value, length);
	memset(at + NLA_HDRLEN + length, 0, NLA_ALIGN(length) - length);
	return at + NLA_HDRLEN + NLA_ALIGN(length);
}

static int compare(const void *left, const void *right) { return memcmp(left, right, 4); }

/* One message: everything of `count` records, and the wait for its acknowledgement. */
static void add(int socket, const char *name, const unsigned char *records, int count) {
	static char buffer[MOST + 1024], answer[65536];
	static unsigned sequence;
	unsigned char protocol = 6;
	unsigned line = htonl(1);
	struct nlmsghdr *message = (struct nlmsghdr *)buffer;
	struct nfgenmsg family = {.nfgen_family = AF_INET};
	char *at = buffer + NLMSG_HDRLEN;
	memcpy(at, &family, sizeof family);
	at = attribute(at + sizeof family, IPSET_ATTR_PROTOCOL, &protocol, 1);
	at = attribute(at, IPSET_ATTR_SETNAME, name, strlen(name) + 1);
	at = attribute(at, IPSET_ATTR_LINENO | NLA_F_NET_BYTEORDER, &line, 4);
	struct nlattr all = {.nla_len = NLA_HDRLEN + count * ENTRY, .nla_type = IPSET_ATTR_ADT | NLA_F_NESTED};
	memcpy(at, &all, sizeof all);
	at += NLA_HDRLEN;
	for (int i = 0; i < count; i++) {
		struct nlattr data = {.nla_len = ENTRY, .nla_type = IPSET_ATTR_DATA | NLA_F_NESTED};
		struct nlattr ip = {.nla_len = ENTRY - NLA_HDRLEN, .nla_type = IPSET_ATTR_IP | NLA_F_NESTED};
		memcpy(at, &data, sizeof data);
		memcpy(at + NLA_HDRLEN, &ip, sizeof ip);
		at = attribute(at + 2 * NLA_HDRLEN, IPSET_ATTR_IPADDR_IPV4 | NLA_F_NET_BYTEORDER, records + 4 * i, 4);
	}
	message->nlmsg_len = at - buffer;
	message->nlmsg_type = NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_ADD;
	message->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	message->nlmsg_seq = ++sequence;
	if (send(socket, buffer, message->nlmsg_len, 0) < 0) {
		perror("send");
		exit(1);
	}
	int length = recv(socket, answer, sizeof answer, 0);
	struct nlmsgerr *error = NLMSG_DATA((struct nlmsghdr *)answer);
	if (length < NLMSG_LENGTH((int)sizeof *error) || error->error) {
		fprintf(stderr, "the kernel answered %d\n", error->error);
		exit(1);
	}
}

int main(int argc, char **argv) {
	FILE *file = argc == 3 ? fopen(argv[2], "r") : NULL;
	if (!file) {
		fprintf(stderr, "usage: ipset_batches SET FILE\n");
		return 2;
	}
	size_t room = 1 << 24, length = 0;
	char *text = malloc(room);
	length = fread(text, 1, room - 1, file);
	text[length] = 0;
	int socket_ = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);
	struct sockaddr_nl own = {.nl_family = AF_NETLINK};
	int one = 1;
	setsockopt(socket_, SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof one);
	if (socket_ < 0 || bind(socket_, (struct sockaddr *)&own, sizeof own) < 0) {
		perror("netlink");
		return 1;
	}
	struct timespec began, ended;
	clock_gettime(CLOCK_MONOTONIC, &began);
	unsigned char *records = malloc(length * 4 + 4);
	int count = 0;
	for (char *at = strtok(text, "\n"); at; at = strtok(NULL, "\n"))
		if (inet_pton(AF_INET, at, records + 4 * count++) != 1) {
			fprintf(stderr, "no address: %s\n", at);
			return 1;
		}
	qsort(records, count, 4, compare);
	int most = (MOST - NLA_HDRLEN) / ENTRY;
	for (int done = 0; done < count; done += most)
		add(socket_, argv[1], records + 4 * done, count - done < most ? count - done : most);
	clock_gettime(CLOCK_MONOTONIC, &ended);
	printf("%.6f\n", (ended.tv_sec - began.tv_sec) + (ended.tv_nsec - began.tv_nsec) / 1e9);
	return 0;
}
