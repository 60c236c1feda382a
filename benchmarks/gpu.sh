#!/usr/bin/env bash
# Everything that only a GPU can say, in one go of at most eight minutes: the tests marked gpu, but
# for those of each method and option, which take too long; steps of every kind at two sizes of base
# and of batch, and a run of eight clients. No network is needed and comigs need not be installed;
# weights are random, at the shapes of SmolLM2-135M and Llama 3.2 1B.
#
#     bash benchmarks/gpu.sh [FOLDER]          # FOLDER: where gpu.json, gpu.txt and gpu.log go
#
# PYTHON is an interpreter with torch, transformers, peft and pytest; WHEELS a folder of wheels that
# it lacks: pydantic with pydantic_core, annotated_types, typing_inspection and typing_extensions;
# tomli_w; gguf. Without matplotlib runs have no report and end as failed; their figures count.
# DEVICE, BASES, LARGE and SLOWER (times the time that a stage may take) may name another setting, to
# try the script where there is no GPU.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-gpu}}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
kind=${device%%:*}
kind=${kind/cpu/pretended}
bases=${BASES:-random-smollm2-135m random-llama-3.2-1b}
large=${LARGE:-64}
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
measured=$scratch/measured
mkdir "$measured"
: >"$out/gpu.log"
began=$SECONDS

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --target "$scratch/site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$scratch/site
fi
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# A stage that fails or takes too long must not cost the others: each says so, and the next begins.
# What is measured by then is written at once, for nobody knows when the time is over.
stage() {
  local name=$1 seconds=$2 log=$measured/$1.log
  shift 2
  echo "== $name, at $((SECONDS - began)) s"
  timeout $((seconds * ${SLOWER:-1})) "$@" >"$log" 2>&1 || echo "$name: failed ($?), see gpu.log"
  { echo "== $name"; cat "$log"; } >>"$out/gpu.log"
  "$python" benchmarks/gpu_table.py "$measured" "$out" >"$out/gpu.txt"
}

# Making random weights takes longer than loading them, so that is done once, beside the tests.
for base in $bases; do
  timeout $((70 * ${SLOWER:-1})) "$python" - "$base" "$scratch/$base" "$device" <<'MAKE' >>"$out/gpu.log" 2>&1 &
import sys, torch
from comigs.bases.load import loaders
with torch.device(sys.argv[3]):
    made = loaders()[sys.argv[1]].load()
for part in made:
    part.save_pretrained(sys.argv[2])
MAKE
done
stage tests 75 "$python" -m pytest -p no:cacheprovider -W default -k "$kind and not methods" tests/test_gpu.py
wait
for base in $bases; do
  step=("$python" benchmarks/step.py --base "$scratch/$base" --device "$device" --together --repeats 5)
  ours=("C E=1 K=1" "C E=2 K=2" "C E=4 K=2" "C E=8 K=2")
  others=("A rank 16" "A rank 64" "B E=2" "D forward and backward")
  stage "step-$base-8" 60 "${step[@]}" --batch 8 --only "${others[@]}" "${ours[@]}" "B E=8" \
    --out "$measured/step-$base-8.json"
  stage "step-$base-$large" 80 "${step[@]}" --batch "$large" --only "${others[@]}" "${ours[@]}" \
    --out "$measured/step-$base-$large.json"
  stage "run-$base" 50 "$python" -m comigs run benchmarks/gpu.toml --out "$measured/run-$base" \
    --set base.name="$scratch/$base" --set base.device="$device" --set data.cache="$scratch/cache"
done
cat "$out/gpu.txt"
