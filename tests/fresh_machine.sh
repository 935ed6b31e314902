#!/usr/bin/env bash
# README's lines on fresh machines, as they are read from README: Debian 12 (Python 3.11) and Debian
# 13 (Python 3.13) with python3, git and nothing else, not even a compiler. Prints a Markdown table.
#
#   tests/fresh_machine.sh                            both systems
#   tests/fresh_machine.sh trixie                     one of them (bookworm, trixie)
#   PYTHON=python3.12 tests/fresh_machine.sh python   this machine with another Python; not a fresh
#                                                     system, but without this machine's pip settings
#
# It needs root, debootstrap and a network, and is not part of .ci/run. A system takes 15 minutes or
# more, and 9 GB in TMPDIR until it is done. What the lines print is kept in the folder named at the
# end. Two variables change what is measured:
#
#   FRESH_ENV="NAME=value ..."   passed on to the systems, say for a proxy or another index
#   TORCH="torch==2.13.0 --index-url ..."   installed first: a smaller build of PyTorch
#
# This machine's own certificates (/usr/local/share/ca-certificates) go along into the systems.
set -euo pipefail

systems=${*:-bookworm trixie}
if [[ $systems != python ]] && { [[ $EUID != 0 ]] || ! command -v debootstrap > /dev/null; }; then
    echo "skipped: this needs root and debootstrap (apt-get install debootstrap)"
    exit 0
fi

repository=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d --tmpdir fresh.XXXXXX)
trap 'rm -rf --one-file-system "$scratch"' EXIT
logs=$(mktemp -d --tmpdir fresh-logs.XXXXXX)
table="| system | Python | line | result | seconds | MB |"$'\n'"|---|---|---|---|---|---|"
failed=0

# README is the source of the lines.
git clone --quiet "$repository" "$scratch/clone"
readme="$scratch/clone/README.md"
main_job=$(grep -m1 -- '&& .venv/bin/python train.py' "$readme")
tests=$(grep -m1 -- '-m pytest' "$readme")
compiler=$(grep -om1 -- 'apt-get install [-a-z0-9+ ]*' "$readme")
alfworld=$(grep -m1 -- 'pip install -q alfworld==' "$readme")

inside() {  # run a command in the system's copy of the repository, with nothing of our environment
    local path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    if [[ $system == python ]]; then
        # shellcheck disable=SC2086  # FRESH_ENV is several words
        (cd "$root/repository" && env -i PATH="$root/bin:$path" HOME="$root" LANG=C.UTF-8 \
            PIP_CONFIG_FILE=/dev/null ${FRESH_ENV:-} bash -euo pipefail -c "$1")
    else
        # The mounts are the command's own and vanish with it. So are its processes: the bash that
        # stays for `|| exit 1` is the first of them, so that what it starts gets signals as usual.
        # shellcheck disable=SC2086
        env -i PATH=$path HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive ${FRESH_ENV:-} \
            unshare --mount --pid --fork --kill-child --mount-proc --root="$root" \
            bash -uo pipefail -c "cd /repository && { $1; } || exit 1"
    fi
}

make_system() {
    mkdir "$root"
    if [[ $system == python ]]; then
        mkdir "$root/bin"  # python3 on the PATH is the Python that was asked for
        printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v "${PYTHON:-python3}")" > "$root/bin/python3"
        chmod +x "$root/bin/python3"
    else
        debootstrap --variant=minbase --include=python3,python3-venv,git,ca-certificates \
            "$system" "$root"
        echo 'APT::Get::Assume-Yes "true";' > "$root/etc/apt/apt.conf.d/yes"
        cp -r /usr/local/share/ca-certificates "$root/usr/local/share/"
        printf '127.0.0.1 %s\n' localhost "$(hostname)" > "$root/etc/hosts"  # Debian's installer does
    fi
    cp -r "$scratch/clone" "$root/repository"
    if [[ $system != python ]]; then
        inside update-ca-certificates
    fi
}

size() {  # of the system in MB, without what pip keeps for the next time
    du -sxm --exclude=.cache "$root" | cut -f 1
}

row() {  # run a line, and add what came of it to the table: row LABEL COMMAND
    local label=$1 command=$2 result=ok before started seconds counted
    local log="$logs/$system-${label//[^A-Za-z]/-}.log"
    before=$(size)
    echo "+ $system: $command" >&2
    started=$SECONDS
    if ! inside "$command" > "$log" 2>&1; then
        result=FAILED
        failed=1
        tail -n 20 "$log" >&2
    fi
    seconds=$((SECONDS - started))
    counted=$(grep -E '^[0-9]+ (passed|failed|skipped).* in ' "$log" | tail -n 1 | sed 's/ in .*//') || true
    result+=${counted:+: $counted}
    table+=$'\n'"| $name | $version | $label | $result | $seconds | $(($(size) - before)) |"
    echo "  $result, $seconds s" >&2
}

for system in $systems; do
    root="$scratch/$system"
    echo "+ $system: make the system" >&2
    make_system > "$logs/$system-system.log" 2>&1
    version=$(inside 'python3 -c "import platform; print(platform.python_version())"')
    name=$(. "$root/etc/os-release" 2> /dev/null && echo "Debian $VERSION_ID" || echo "this machine")

    # 1) Without a compiler: install, then the main job, shortened, then the tests.
    if [[ ${TORCH:-} ]]; then
        row "smaller PyTorch" "python3 -m venv .venv && .venv/bin/pip install -q $TORCH"
    fi
    row "installation" "${main_job% && *}"
    row "main job, shortened" "$main_job --sft-steps 20 --env-steps 1024 --eval-episodes 100"
    row "tests" "$tests"

    # 2) With ALFWorld, after what README says that it needs.
    if [[ $system != python ]]; then
        row "compiler" "apt-get update -q && $compiler"
    fi
    row "ALFWorld" "$alfworld"
    row "ALFWorld's tests" "${tests##* && } -k alfworld"
    rm -rf --one-file-system "$root"
done

echo "$table"
echo "What the lines printed: $logs" >&2
exit $failed
