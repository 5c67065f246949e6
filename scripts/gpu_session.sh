#!/usr/bin/env bash
# Everything the Triton kernels are judged by on a GPU, in one call of under ten minutes.
#
#     scripts/gpu_session.sh [--rehearse] [FOLDER]
#
# Leaves in FOLDER (by default $OUT, else gpu-session): tests.txt, memcheck.txt, racecheck.txt,
# scan.txt and decode.txt, the benches' JSON and plots beside the two, and summary.txt with every
# step's exit status and seconds; 124 is a step that ran out of time. --rehearse runs the same
# steps on a CPU, the kernels interpreted, at tiny sizes.
set -uo pipefail
cd "$(dirname "$0")/.."

rehearse=
if [[ ${1-} == --rehearse ]]; then
    rehearse=yes
    shift
    export TRITON_INTERPRET=1
fi
out=$(realpath -m "${1:-${OUT:-gpu-session}}")
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/.typing${PYTHONPATH:+:$PYTHONPATH}"
# Out-of-bounds accesses inside one large block of the caching allocator would go unseen.
watched=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)

# step NAME SECONDS COMMAND...: runs it within the seconds, its output into NAME.txt.
step() {
    local name=$1 seconds=$2 begin=$SECONDS status=0
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.txt" 2>&1 || status=$?
    echo "$name: exit status $status after $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
    return "$status"
}

# sanitize TOOL: compute-sanitizer's exit status is 3 where it finds an error.
sanitize() {
    step "$1" 80 "${watched[@]}" compute-sanitizer --tool "$1" --error-exitcode 3 \
        "$python" -P scripts/gpu_sanitize.py
}

: >"$out/summary.txt"
if [[ $rehearse ]]; then
    step tests 300 "$python" -P -m pytest tests/kernels -m gpu -q
    step memcheck 300 "${watched[@]}" "$python" -P scripts/gpu_sanitize.py
    step scan 300 "$python" -P - "$out/bench" <<'PYTHON'
import sys
from pathlib import Path

from seqbench.suite.bench.entrants import Size
from seqbench.suite.bench.scan import bench_scan

done = bench_scan(sizes=[Size(batch=1, length=64, width=16, state=4)], rounds=1, memory_sizes=())
print(*done.write(Path(sys.argv[1])), sep="\n")
PYTHON
    step decode 300 "$python" -P - "$out/bench" <<'PYTHON'
import sys
from pathlib import Path

from seqbench.suite.bench.decode import bench_decode

done = bench_decode(batches=[1], prompt=16)
print(*done.write(Path(sys.argv[1])), sep="\n")
PYTHON
    exit
fi

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv \
    | tee -a "$out/summary.txt"
# Correctness has no use of a quiet machine: both at once. What is compiled is kept for later.
{
    step warm 100 "$python" -P scripts/gpu_sanitize.py \
        && for tool in memcheck racecheck; do sanitize "$tool"; done
} &
step tests 180 "$python" -P -m pytest -p no:benchmark tests/kernels -m gpu -q -n "${WORKERS:-14}"
wait
# A bench writes when it is done, so one that would take too long is run again at its headline.
cli=("$python" -P -m seqbench.suite.cli bench)
step scan "${SCAN_SECONDS:-220}" "${cli[@]}" scan --device cuda --results "$out" \
    || step scan_quick 60 "${cli[@]}" scan --device cuda --quick --results "$out"
step decode $((590 - SECONDS)) "${cli[@]}" decode --device cuda --results "$out" \
    || step decode_quick $((600 - SECONDS > 20 ? 600 - SECONDS : 20)) \
        "${cli[@]}" decode --device cuda --quick --results "$out"
