#!/bin/bash
# One call on a GPU machine, from the root of a copy of the tree there; README.md beside this says which calls, and when.
#
#   SCCONV_COMMIT=… SCCONV_TREE=… OUT=FOLDER bash benchmark/gpu/calls.sh PART SECONDS
#
#   check     right or wrong; one network timed; keeps the first half of the images
#   train     the second half; four networks on CIFAR-100
#   trials    what could make SCConv faster, in a network
#   batch     the network at 512 images
#   layer     one layer at eight shapes
#   kernels   the Triton kernels of commit 8ba412e, unpacked in data/gpu/old
#   weights   nothing but the next pieces of weights that are left
#
# Everything ends before SECONDS, then results-PART.tgz is in OUT: unpacked in the root of a checkout it fills results/.
set -u
part=$1 limit=$2
here=benchmark/gpu
python=${PYTHON:-python3} device=${DEVICE:-cuda} quick=${QUICK:-}  # DEVICE=cpu QUICK=--quick: a rehearsal
state=${STATE:-/tmp/scconv-gpu}  # outlives a call, as long as the machine is the same
back=$state/back-$part
OUT=$(mkdir -p "${OUT:?a folder for what goes back}" && cd "$OUT" && pwd)
mkdir -p "$back/results/runs" "$back/results/benchmark" "$back/logs" "$state/weights"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 SCCONV_DATA=$state/data SCCONV_COMMIT=${SCCONV_COMMIT:-} SCCONV_TREE=${SCCONV_TREE:-}
export TORCHINDUCTOR_CACHE_DIR=$state/inductor TRITON_CACHE_DIR=$state/triton TORCHINDUCTOR_COMPILE_THREADS=4 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# A result must say which code made it, and no .git comes along.
for id in "$SCCONV_COMMIT" "$SCCONV_TREE"; do
  [[ $id =~ ^[0-9a-f]{40}$ ]] || { echo "calls.sh: '$id': SCCONV_COMMIT and SCCONV_TREE must be 40 hexadecimal digits each"; exit 2; }
done

left() { echo $((limit - SECONDS - ${1:-8})); }
job() {  # NAME, MOST SECONDS, COMMAND
  local name=$1 seconds=$2; shift 2
  [ -n "$quick" ] && seconds=$limit
  [ "$(left)" -lt "$seconds" ] && seconds=$(left)
  [ "$seconds" -lt 5 ] && { echo "[$SECONDS s] $name: no time left, not run"; return; }
  timeout -k 5 "$seconds" "$@" > "$back/logs/$name.log" 2>&1
  echo "[$SECONDS s] $name ended with $?"
}
started=0 turns=$state/turns-$part parts=$state/parts-$part
speed() {  # FILE, FORMS, OPTIONS of speed.py: compile side by side, a process for each direction and each group a,b,c of forms
  local file=$1 forms=$2 form way; shift 2
  for form in $forms; do for way in inference training; do
    started=$((started + 1))
    job "$file-$started" $((limit - SECONDS - 12)) $python benchmark/speed.py "$@" --forms 3x3 ${form//,/ } --directions $way \
      --turns "$turns" --device "$device" --dtype bfloat16 $quick ${quick:+--network scconv_resnet20} \
      --out "$(printf '%s/%s/%02d.json' "$parts" "$file" $started)" &
  done; done
}
ready() { ls "$turns" | grep -c ready; }
measure() {  # SECONDS it takes: when all else has ended, or time presses, one after the other
  until [ "$(jobs -rp | wc -l)" -le "$(ready)" ] || [ "$(left)" -lt "$1" ]; do sleep 0.5; done
  echo "[$SECONDS s] $(ready) of $started have compiled"
  touch "$turns/go"; wait
  for file in "$parts"/*; do [ -d "$file" ] && $python $here/merge.py "$file"/*.json --out "$back/results/benchmark/$(basename "$file").json"; done
}
rm -rf "$turns" "$parts"; mkdir -p "$turns" "$parts"
pack() { tar -czf "$OUT/.tmp.tgz" -C "$back" . && mv "$OUT/.tmp.tgz" "$OUT/results-$part.tgz"; }
send_weights() {  # in pieces of less than 16 MiB, four a call: 62 of 64 MiB
  for file in "$state"/weights/*.half.safetensors; do
    [ -e "$file" ] && split -b 15900K -d -a 1 "$file" "$state/weights/$(basename "$file").part-" && rm "$file"
  done
  for piece in $(ls "$state/weights" | grep '\.part-' | head -4); do mv "$state/weights/$piece" "$OUT/"; done
  echo "pieces of weights sent: $(ls "$OUT" | grep -c '\.part-'), left: $(ls "$state/weights" | grep -c '\.part-')"
}
trap pack EXIT
{ nvidia-smi -L; nproc; grep -m1 'model name' /proc/cpuinfo; } > "$back/logs/machine.log" 2>&1

case $part in
check)
  job unpack 100 $python $here/cifar_halves.py unpack data/gpu/a/half.npz "$state/a.npz" &
  job check-plain 120 $python $here/check.py plain --device "$device" --out "$back/results/benchmark" $quick &
  job check-compiled 150 $python $here/check.py compiled --device "$device" --out "$back/results/benchmark" ${BACKEND:+--backend $BACKEND} $quick &
  for precision in ${PRECISIONS-bf16 fp16}; do
    job "digits-$precision" 90 $python -m scconv.train --model scconv_resnet20 --data digits --recipe quick --precision "$precision" \
      --channels-last --overwrite --out "$state/digits" &
  done
  [ -n "$quick" ] || job tests 150 $python -m pytest -q -o addopts= -p no:cacheprovider -k "gpu or any_device" \
    tests/test_compiled.py tests/test_redundancy.py &
  speed "network-$device-bfloat16" "${FORMS:-floor,popular,plain 3x3+compile scconv+compile scconv+layers}" network
  measure 45
  grep -hE "WRONG|beyond the limit| passed| failed" "$back"/logs/*.log
  ;;
train)
  if [ ! -e "$state/data/cifar100/test.npz" ]; then
    [ -e "$state/a.npz" ] || { echo "calls.sh: the first half of the images is not on this machine, call: calls.sh check 60"; exit 3; }
    $python $here/cifar_halves.py unpack data/gpu/b/half.npz "$state/b.npz" && $python $here/cifar_halves.py join "$state/data" "$state/a.npz" "$state/b.npz" || exit 4
  fi
  job four "$limit" $python $here/train_four.py "$(left 15)" --out "$back/results/runs" --weights "$state/weights" ${ARGUMENTS:-}
  grep -v "^epoch" "$back/logs/four.log" | tail -n 30
  send_weights
  ;;
trials)
  speed "network-$device-bfloat16-reduce-overhead" "3x3+compile scconv+compile" network --compile-mode reduce-overhead
  speed "network-$device-bfloat16-dense" "3x3+compile scconv+compile dense+compile" network
  measure 60
  ;;
batch)  # apart from the others, which would not leave it enough memory
  speed "network-$device-bfloat16-batch512" "plain 3x3+compile scconv+compile" network --batch 512
  measure 45
  ;;
layer)
  for shape in 64,32,32 128,16,32 256,8,32 512,4,32 64,56,8 128,28,8 256,14,8 512,7,8; do
    speed "layer-$device-bfloat16" popular,plain,scconv+compile layer --shapes $shape --batch 128 --memory-formats channels_last
  done
  measure 30
  ;;
kernels)  # ratios to the 3×3 of the same run, to hold against those of network-cuda-bfloat16.json
  old=$PWD/data/gpu/old
  cd "$old" && PYTHONPATH=$old job kernels "$limit" $python benchmark/speed.py network --device "$device" --dtype bfloat16 --batch 128 \
    --forms 3x3 plain stock scconv $quick --out "$back/kernels-8ba412e.json"
  ;;
weights) send_weights ;;
*) echo "calls.sh: $part: must be check, train, trials, batch, layer, kernels or weights"; exit 2 ;;
esac
tail -n 3 "$back"/logs/*.log | cut -c1-200 | tail -n 60
