#!/usr/bin/env bash
# All that a machine with a GPU can tell of ekfac_rs, in at most nine minutes, into at most eight files.
#
#   scripts/gpu.sh OUT            on a GPU
#   scripts/gpu.sh --dry-run OUT  on a CPU, at tiny sizes: it shows that every part works, nothing else
#
# In the bundle (`just gpu-bundle`) it installs the wheels that are missing into a folder of its own,
# and needs no network; elsewhere it takes ekfac_rs as Python finds it. Every part has a limit of its
# own, and a part that fails or is stopped leaves what it has and lets the next one begin;
# OUT/summary.md says which. Exits with 1 if any part failed.
#
# Environment: PYTHON (python3), DEVICE (cuda:0, or cpu for a dry run), PART_LIMIT (seconds that
# no part may exceed).
set -uo pipefail

usage() {
    echo "usage: $0 [--dry-run] OUT" >&2
    exit 2
}

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
[ $# -eq 1 ] || usage
case $1 in -*) usage ;; esac
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
DEVICE=${DEVICE:-$([ -n "$dry" ] && echo cpu || echo cuda:0)}
[ "$DEVICE" = cpu ] && dry=1

# Nine minutes, less what it takes to stop the last part and to write the summary. Nobody waits for a
# dry run, and a CPU may have other work.
TOTAL=530
slower=1
[ -n "$dry" ] && slower=4
# But for OpenMP's setting, which nproc looks at.
cores=$(env -u OMP_NUM_THREADS nproc)
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 2
failures=0

# --- parts: what is run, for how long, and where what it says goes ---------------------------------

# part NAME SECONDS FILE COMMAND...: what the command says goes to the end of FILE
part() {
    local name=$1 limit=$((slower * $2)) file=$OUT/$3 result code began left said
    shift 3
    began=$SECONDS
    left=$((slower * TOTAL - SECONDS))
    [ "$limit" -gt "${PART_LIMIT:-$limit}" ] && limit=$PART_LIMIT
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -le 0 ]; then
        failures=$((failures + 1))
        row "$name" - - "left out: the nine minutes are over" ""
        return
    fi
    echo "$name: up to $limit s" >&2
    timeout --kill-after=2 "$limit" "$@" >>"$file" 2>&1
    code=$?
    case $code in
        0) result=ok ;;
        124 | 137) result="**stopped**" ;;
        *) result="**failed** ($code)" ;;
    esac
    [ "$code" -eq 0 ] || failures=$((failures + 1))
    # Its last words: of the tests how many passed, of what failed why.
    said=$(grep -v '^[[:space:]]*$' "$file" | tail -n 1 | tr -d '|`' | cut -c1-120)
    [ "$code" -eq 0 ] && [ "$name" != tests ] && said=
    row "$name" "$((SECONDS - began))" "$limit" "$result" "$said"
}

row() {
    local IFS='|'
    echo "| $1 | $2 | $3 | $4 | $5 |" >>"$OUT/summary.md"
}

information() {
    date -u '+%Y-%m-%d %H:%M UTC'
    uname -srm
    grep -m 1 '^model name' /proc/cpuinfo
    echo "cores: $cores"
    for tool in "nvidia-smi" "nvcc --version" "ncu --version" "compute-sanitizer --version"; do
        printf '\n$ %s\n' "$tool"
        # Each of them may be missing.
        $tool 2>&1 || true
    done
    printf '\n$ python -m ekfac_rs.info\n'
    "$PYTHON" -m ekfac_rs.info || return
    printf '\nWhat tests and peers need:\n'
    "$PYTHON" - <<'END'
from importlib import metadata

names = "pytest pytest-xdist hypothesis torchvision scipy matplotlib pillow timm"
for name in (*names.split(), "asdfghjkl", "curvlinops-for-pytorch", "laplace-torch", "nngeometry"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "missing")
END
}
export -f information

# Install our wheel, and of the others those whose distribution is not there.
install_wheels() {
    local wheels=$1 site=$2 missing
    mapfile -t missing < <("$PYTHON" - "$wheels/needed" <<'END'
import sys
from importlib import metadata
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        metadata.version(wheel.name.partition("-")[0].replace("_", "-"))
    except metadata.PackageNotFoundError:
        print(wheel)
END
    )
    local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps
        --no-compile --target "$site")
    # Ours by itself: a wheel that does not fit this Python would keep all others out.
    "${pip[@]}" "$wheels"/ekfac_rs-*.whl || return
    [ ${#missing[@]} -eq 0 ] && return
    echo "missing here, installed from the bundle: ${missing[*]##*/}"
    "${pip[@]}" "${missing[@]}"
}
export -f install_wheels

peers() {
    local workload=$1 precision=$2 quick=() beside
    # Those that the bundle brings; each is a process that imports torch, of which a CPU bears few.
    beside=(curvlinops nngeometry asdfghjkl laplace)
    if [ -n "$dry" ]; then
        quick=(--quick)
    else
        beside+=("forward and input gradients" "torch, written by hand" "ekfac_rs, XK-FAC")
        beside+=("ekfac_rs, XK-FAC nested")
    fi
    echo '```text'
    "$PYTHON" benchmarks/bench_peers.py "$workload" --device "$DEVICE" --precision "$precision" \
        --output "$work/peers-$workload" --beside "${beside[@]}" "${quick[@]}" >"$work/table"
}
export -f peers
export dry DEVICE work cores

# Peers leave a table and numbers for each workload, also where they are stopped half-way.
keep_peers() {
    local folder=$work/peers-$1
    printf '```\n\n' >>"$OUT/peers.md"
    [ -f "$folder/peers.md" ] && cat "$folder/peers.md" >>"$OUT/peers.md"
    # One object to a line.
    [ -f "$folder/peers.json" ] && tr -d '\n' <"$folder/peers.json" >>"$OUT/peers.json" &&
        echo >>"$OUT/peers.json"
}

# --- all of them -----------------------------------------------------------------------------------

for file in summary.md information.txt tests.txt bench.md peers.md peers.json profile.md \
    permuted-mnist.md; do
    rm -f "$OUT/$file"
done
{
    echo "# ekfac_rs on ${DEVICE}"
    echo
    [ -n "$dry" ] && echo "A dry run on a CPU: nothing is said of a GPU." && echo
    echo "| part | seconds | limit | result | last words |"
    echo "|---|---:|---:|---|---|"
} >"$OUT/summary.md"

if [ -d wheels ]; then
    part installation 40 information.txt bash -c 'install_wheels "$@"' - "$root/wheels" "$work/site"
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
part information 30 information.txt bash -c information

pytest=("$PYTHON" -m pytest -q --thorough -p no:benchmark -p no:cacheprovider)
if [ -n "$dry" ]; then
    part tests 100 tests.txt "${pytest[@]}" -n 0 tests/gpu/test_warnings.py tests/test_info.py
else
    part tests 130 tests.txt "${pytest[@]}" -n "$((cores < 8 ? cores : 8))" -m cuda tests
fi

bench=("$PYTHON" benchmarks/bench_gpu.py --device "$DEVICE" ${dry:+--quick} --only)
part "bench-gpu: pass" 75 bench.md "${bench[@]}" pass
part "bench-gpu: gram" 25 bench.md "${bench[@]}" gram
part "bench-gpu: patches" 20 bench.md "${bench[@]}" patches
part "bench-gpu: step" 60 bench.md "${bench[@]}" step
part "bench-gpu: product" 15 bench.md "${bench[@]}" product
part "bench-gpu: eigh" 40 bench.md "${bench[@]}" eigh

part profile 35 profile.md "$PYTHON" benchmarks/profile_gpu.py --device "$DEVICE" ${dry:+--quick}
part "permuted MNIST" 60 permuted-mnist.md \
    "$PYTHON" benchmarks/learn_gpu.py --device "$DEVICE" ${dry:+--quick}

# Last those that can be done without.
if [ -n "$dry" ]; then
    part "peers: conv" 60 peers.md bash -c 'peers "$@"' - conv ieee
    keep_peers conv
else
    part "peers: resnet50, tf32" 80 peers.md bash -c 'peers "$@"' - resnet50 tf32
    keep_peers resnet50
    part "peers: mlp, ieee" 50 peers.md bash -c 'peers "$@"' - mlp ieee
    keep_peers mlp
    part "peers: resnet18, tf32" 55 peers.md bash -c 'peers "$@"' - resnet18 tf32
    keep_peers resnet18
fi

echo >>"$OUT/summary.md"
echo "$SECONDS seconds in all, $failures parts without success." >>"$OUT/summary.md"
cat "$OUT/summary.md"
[ "$failures" -eq 0 ]
