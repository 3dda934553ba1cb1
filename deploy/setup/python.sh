#!/usr/bin/env bash
# Put the project and what it needs into .venv: `python.sh run` for the agent and the lab, `python.sh dev` also for tests,
# linters and builds. PYTHON chooses the interpreter (default python3, at least 3.11).
#
# The project is installed as its users install it, not in editable form: tests see what a wheel would hold. Two stamps
# make a second run quick: one over pyproject.toml for the dependencies, one over the sources for the project itself.
set -euo pipefail
cd "$(dirname "$0")/../.."

mode="${1:-}"
case "$mode" in
    run | dev) ;;
    *) echo "usage: python.sh run|dev" >&2; exit 2 ;;
esac

# Two makes at once (a lab in one window, tests in another) must not install over each other.
mkdir -p build
exec 9>build/.setup.lock
flock 9

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: $python is no Python 3.11 or later: install one and name it with PYTHON=/path/to/python3" >&2
    exit 1
fi
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    echo "setup: making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi
pip=(.venv/bin/python -P -m pip --disable-pip-version-check --no-input)

# --- dependencies
requirements() { # the build requirements, the dependencies and, for dev, every extra; one a line
    .venv/bin/python -P - "$mode" <<'PYTHON'
import pathlib, sys, tomllib
data = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
lines = data["build-system"]["requires"] + data["project"]["dependencies"] + ["wheel"]
if sys.argv[1] == "dev":
    lines += [line for extra in data["project"]["optional-dependencies"].values() for line in extra]
print("\n".join(lines))
PYTHON
}
wanted="$(requirements)"
stamp=".venv/.dependencies"
fingerprint="$(printf '%s' "$wanted" | sha256sum | cut -d' ' -f1)"
if ! grep -qsx "$fingerprint" "$stamp"; then
    echo "setup: installing the Python dependencies into .venv (a minute or two)"
    "${pip[@]}" install --upgrade pip -r <(printf '%s\n' "$wanted")
    # What `dev` installs holds for `run` too: keep both fingerprints.
    { printf '%s\n' "$fingerprint"; mode=run; requirements | head -c -1 | sha256sum | cut -d' ' -f1; } >"$stamp"
fi

# --- the project itself
fingerprint="$({
    .venv/bin/python --version
    find _fast ipc supervisor workers setup.py pyproject.toml MANIFEST.in README.md LICENSE -type f \
        \( -name '*.py' -o -name '*.pyx' -o -name '*.pyi' -o -name '*.proto' -o -name '*.toml' -o -name py.typed \
        -o -name MANIFEST.in \) ! -name '*_pb2.py*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
} | sha256sum | cut -d' ' -f1)"
if ! grep -qsx "$fingerprint" .venv/.project; then
    echo "setup: building kube-router and installing it into .venv"
    rm -f .venv/.project
    rm -rf build/lib* build/bdist* # left-overs of an earlier build bring deleted modules back
    "${pip[@]}" install --quiet --no-build-isolation --no-deps --force-reinstall .
    echo "$fingerprint" >.venv/.project
fi
