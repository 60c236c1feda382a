#!/usr/bin/env bash
# Everything that only a GPU can say, in one go of at most eight minutes: the tests marked gpu, steps
# of every kind at two sizes of base and of batch, and a run of eight clients. No network is needed
# and comigs need not be installed; weights are random, at the shapes of SmolLM2-135M and
# Llama 3.2 1B.
#
#     bash benchmarks/gpu.sh [FOLDER]          # FOLDER: where the table and gpu.json go
#
# PYTHON is the interpreter; WHEELS a folder of wheels that it lacks (pydantic, tomli-w, gguf);
# DEVICE, BASES, LARGE and SLOWER (times the time that a stage may take) may name another setting, to
# try the script where there is no GPU.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-gpu}}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
bases=${BASES:-random-smollm2-135m random-llama-3.2-1b}
large=${LARGE:-64}
mkdir -p "$out"
out=$(cd "$out" && pwd)
began=$SECONDS

if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$site
fi
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# A stage that fails or takes too long must not cost the others: each says so, and the next begins.
stage() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name, at $((SECONDS - began)) s"
  timeout $((seconds * ${SLOWER:-1})) "$@" >"$out/$name.log" 2>&1 || echo "$name: failed ($?), see $name.log"
}

stage tests 90 "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py
for base in $bases; do
  # the naive mixture and logits of large vocabularies fill a GPU at the larger batch, if all sit at once
  stage "step-$base-8" 80 "$python" benchmarks/step.py --base "$base" --device "$device" --together \
    --batch 8 --only A B C D --out "$out/step-$base-8.json"
  stage "step-$base-$large" 80 "$python" benchmarks/step.py --base "$base" --device "$device" \
    --batch "$large" --only "A rank 16" "C E=2" "C E=8 K=2" D --out "$out/step-$base-$large.json"
  stage "run-$base" 60 "$python" -m comigs run benchmarks/gpu.toml --out "$out/run-$base" \
    --set base.name="$base" --set base.device="$device"
done
"$python" benchmarks/gpu_table.py "$out"
