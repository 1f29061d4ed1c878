#!/usr/bin/env bash
# A run on a GKE cluster that xpk made, one slice or several, started again until it is done.
#
#   PROJECT=p ZONE=us-east5-b CLUSTER=c NAME=tune TYPE=v6e-16 IMAGE=REGION-docker.pkg.dev/p/r/jaxtune \
#     tools/tpu/xpk.sh train.epochs=3
#
# Settings, from the environment: those above; SLICES (1); RESTARTS (50); DRY_RUN=1 prints the command instead.
# A bucket is to be mounted at /bucket, with the config in it as run.yaml, its data beside; the run folder comes there:
#   xpk storage attach runs --type=gcsfuse --bucket=BUCKET --mount-point=/bucket --readonly=false --auto-mount=true …
# The image is that of tools/tpu/Dockerfile.
# A token for gated models goes into the cluster as a secret, or the model into the bucket; never onto this line.
set -euo pipefail

: "${TYPE:=}" "${SLICES:=1}" "${RESTARTS:=50}" "${DRY_RUN:=0}"
for needed in PROJECT ZONE CLUSTER NAME TYPE IMAGE; do
  [[ -n ${!needed:-} ]] || { echo "xpk.sh: set $needed" >&2; exit 2; }
done

words=''
for word in "$@"; do words+=$(printf ' %q' "$word"); done
type=$TYPE
[[ $type != v5e-* ]] || type=v5litepod-${type#v5e-}
command=(
  xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
  --tpu-type="$type" --num-slices="$SLICES" --docker-image="$IMAGE"
  --max-restarts="$RESTARTS" --restart-on-exit-codes=75 --termination-grace-period-seconds=300
  --command="JAX_COMPILATION_CACHE_DIR=/bucket/xla jaxtune train /bucket/run.yaml output=/bucket/runs/$NAME$words"
)
if [[ $DRY_RUN == 1 ]]; then
  printf '%q ' "${command[@]}" && echo
else
  "${command[@]}"
fi
