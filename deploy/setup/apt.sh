#!/usr/bin/env bash
# Install the Debian packages that the demo (apt.sh demo) or the tests (apt.sh test) need; nothing when all are there.
#
# No daemon is started and none is left to start at boot: bird, etcd, gobgpd and others are run by the lab and
# the tests only, in namespaces of their own. The kernel is for a virtual machine (tests/vm): no boot loader comes with it.
set -euo pipefail

demo=(python3 python3-venv python3-dev gcc libc6-dev iproute2 iptables ipset nftables conntrack iputils-ping kmod procps
    util-linux ca-certificates gobgpd containernetworking-plugins bird2)
tests=(etcd-server openssl tcpdump git frr exabgp qemu-system-x86 busybox-static linux-image-amd64)
units=(bird.service gobgpd.service etcd.service frr.service exabgp.service)

case "${1:-}" in
    demo) wanted=("${demo[@]}") ;;
    test) wanted=("${demo[@]}" "${tests[@]}") ;;
    *) echo "usage: apt.sh demo|test" >&2; exit 2 ;;
esac

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

missing=()
for package in "${wanted[@]}"; do
    installed "$package" || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

echo "setup: installing ${#missing[@]} Debian packages: ${missing[*]}"
if [ "$(id -u)" -ne 0 ]; then
    echo "setup: needs root for apt: run the same make target as root, once" >&2
    exit 1
fi

# Debian starts a daemon when its package is installed, unless this policy forbids it (invoke-rc.d(8)).
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

enabled_before=()
if command -v systemctl >/dev/null; then
    for unit in "${units[@]}"; do
        if systemctl is-enabled --quiet "$unit" 2>/dev/null; then enabled_before+=("$unit"); fi
    done
fi

export DEBIAN_FRONTEND=noninteractive
# A run that was cut off can leave packages half configured, and then apt refuses to go on.
dpkg --configure -a
apt-get -q update
apt-get -q -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 install --no-install-recommends "${missing[@]}"

if command -v systemctl >/dev/null; then
    for unit in "${units[@]}"; do
        case " ${enabled_before[*]:-} " in *" $unit "*) continue ;; esac
        systemctl disable --quiet "$unit" 2>/dev/null || true # not every package has every unit
    done
fi
