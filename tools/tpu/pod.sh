#!/usr/bin/env bash
# A Cloud TPU slice from nothing to a finished run, also a spot one that is taken away now and then.
#
#   export PROJECT=my-project ZONE=us-east5-b NAME=tune TYPE=v6e-8 BUCKET=my-runs
#   CONFIG=llama3-8b-lora-v6e-8.yaml DATA=chats.jsonl tools/tpu/pod.sh watch train.epochs=3
#
# `watch` does it all and is safe to call again; its parts are verbs too:
#   create    ask for the slice, and wait until it is there
#   install   jaxtune on every worker, the bucket mounted at ~/runs, the token in its place
#   push      the config and the data to every worker, into ~/job
#   run       start `jaxtune train` on every worker; words that follow go to it
#   logs      follow worker 0's log
#   status    what the run's workers ended with: running, or exit codes
#   watch     all of these; again after a stop (exit code 75) or a crash, on a new slice after a preemption; until done
#   delete    the slice, and the request for it
#
# Settings, from the environment:
#   PROJECT ZONE NAME   of Google Cloud, and what the slice and the run are called
#   TYPE                v5e-8, v5e-16, v6e-8, v5p-128 …, as `jaxtune plan` has them
#   BUCKET              a bucket for the run folder and the compile cache, near the zone. The run's folder is renamed within
#                       it, so make it with: gcloud storage buckets create gs://BUCKET --location=REGION \
#                       --uniform-bucket-level-access --enable-hierarchical-namespace
#   CONFIG              a config; the run's output is ~/runs/NAME whatever it says
#   DATA                files that the config names, separated by spaces; they come to lie beside it
#   PACKAGE             what to install: a name, a version (jaxtune==0.1.0), or a wheel here (default: jaxtune)
#   SPOT=0              not a spot slice
#   QUEUE=0             create it at once instead of waiting in the queue
#   RUNTIME             the VM's image, where it is not the TYPE's usual one
#   TOKEN_FILE, SECRET  a Hugging Face token: a file here, or a name in Secret Manager. Neither is ever on a command line
#   FLAGS               XLA_FLAGS or LIBTPU_INIT_ARGS for the run, such as "LIBTPU_INIT_ARGS=--xla_…"
#   POLL=30 CRASHES=5   seconds between looks, and how many crashes in a row are the last
#   DRY_RUN=1           print the commands instead of running them
#
# Exit codes: 0 done; 2 something to put right first (the log's end says what); 1 all else.
set -euo pipefail

: "${PROJECT:=}" "${ZONE:=}" "${NAME:=}" "${TYPE:=}" "${BUCKET:=}" "${CONFIG:=}" "${DATA:=}" "${RUNTIME:=}"
: "${SPOT:=1}" "${QUEUE:=1}" "${PACKAGE:=jaxtune}" "${POLL:=30}" "${CRASHES:=5}" "${DRY_RUN:=0}"
: "${TOKEN_FILE:=}" "${SECRET:=}" "${FLAGS:=}"

die() { echo "pod.sh: $*" >&2; exit 2; }
say() { echo "$(date +%H:%M:%S) $*" >&2; }

# Run a command, or print it as it could be typed.
cloud() {
  if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' gcloud "$@" && echo
  else
    gcloud "$@"
  fi
}
tpu() { cloud compute tpus tpu-vm "$1" "$NAME" "${@:2}" "${place[@]}"; }
copy() { cloud compute tpus tpu-vm scp "$@" --worker=all "${place[@]}"; }
queue() { cloud compute tpus queued-resources "$1" "$NAME-queue" "${@:2}" "${place[@]}"; }

# A script for every worker. Values go before it as assignments, quoted for the shell there.
everywhere() { tpu ssh --worker=all --command="$1"; }
given() { local name; for name in "$@"; do printf '%s=%q; ' "$name" "${!name}"; done; }

accelerator() { case $TYPE in v5e-*) echo "v5litepod-${TYPE#v5e-}" ;; *) echo "$TYPE" ;; esac; }

image() {
  [[ -z $RUNTIME ]] || { echo "$RUNTIME"; return; }
  case $(accelerator) in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) die "TYPE $TYPE: its image is not known here; set RUNTIME" ;;
  esac
}

state() { # of the slice: READY, PREEMPTED …; GONE where there is none, UNKNOWN where that cannot be asked
  local said
  if said=$(tpu describe --format='value(state)' 2>&1); then echo "$said"
  elif [[ $said == *NOT_FOUND* ]]; then echo GONE
  else echo UNKNOWN; fi
}

create() {
  local spot=() type version
  [[ $SPOT != 1 ]] || spot=(--spot)
  type=$(accelerator) version=$(image)
  if [[ $QUEUE != 1 ]]; then
    tpu create --accelerator-type="$type" --version="$version" "${spot[@]}"
    return
  fi
  queue create --node-id="$NAME" --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
  local now=ACTIVE
  while true; do
    [[ $DRY_RUN == 1 ]] || now=$(queue describe --format='value(state.state)')
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) say "the request for $NAME is $now"; return 75 ;;
    esac
    say "$NAME: $now"
    sleep "$POLL"
  done
}

delete() {
  if [[ $QUEUE == 1 ]]; then queue delete --force; else tpu delete; fi
}

# shellcheck disable=SC2016,SC2034  # the scripts are for the shell there, and so are the values given to them
install() {
  local spec="${PACKAGE/jaxtune/jaxtune[tpu,gcs]}" wheel=''
  if [[ $PACKAGE == *.whl ]]; then
    [[ -f $PACKAGE ]] || die "PACKAGE $PACKAGE: no such wheel here"
    wheel=${PACKAGE##*/}
    copy "$PACKAGE" "$NAME:"
  fi
  everywhere "$(given spec wheel BUCKET)"'
    set -euo pipefail
    python3 -m pip install --quiet --user uv
    [ -x ~/jaxtune/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/jaxtune
    [ -z "$wheel" ] || spec="jaxtune[tpu,gcs] @ file://$HOME/$wheel"
    ~/.local/bin/uv pip install --quiet --python ~/jaxtune/bin/python "$spec"
    if ! command -v gcsfuse > /dev/null; then
      key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
      sudo curl --fail --silent --show-error --output "$key" "$site/doc/apt-key.gpg"
      echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -c -s) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
      sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse
    fi
    mkdir -p ~/runs ~/job
    mountpoint -q ~/runs || gcsfuse --implicit-dirs "$BUCKET" ~/runs'
  local there='.cache/huggingface/token'
  if [[ -n $TOKEN_FILE ]]; then
    everywhere 'umask 077; mkdir -p ~/.cache/huggingface'
    copy "$TOKEN_FILE" "$NAME:$there"
    everywhere "chmod 600 $there"
  elif [[ -n $SECRET ]]; then
    everywhere "$(given SECRET there)"'
      set -euo pipefail; umask 077; mkdir -p ~/.cache/huggingface
      gcloud secrets versions access latest --secret="$SECRET" > ~/"$there"'
  fi
}

push() {
  local files=()
  read -r -a files <<< "$DATA"
  everywhere 'mkdir -p ~/job'
  copy "$CONFIG" "$NAME:job/run.yaml"
  [[ ${#files[@]} == 0 ]] || copy "${files[@]}" "$NAME:job/"
}

# shellcheck disable=SC2016,SC2034
run() {
  local words='' word
  for word in "$@"; do words+=$(printf ' %q' "$word"); done
  # The run outlives the connection. Every worker leaves its exit code in ~/job/code.
  everywhere "$(given NAME FLAGS words)"'
    set -euo pipefail
    export JAX_PLATFORMS=tpu JAX_COMPILATION_CACHE_DIR="$HOME/runs/.xla" ${FLAGS:+"$FLAGS"}
    cd ~/job
    rm -f code
    echo "~/jaxtune/bin/jaxtune train run.yaml output=$HOME/runs/$NAME$words; echo \$? > code" > command
    setsid nohup bash command >> log 2>&1 < /dev/null &
    echo $! > pid'
}

logs() { tpu ssh --worker=0 --command='tail -n 100 -F ~/job/log'; }

# shellcheck disable=SC2016
status() { # of the run on all workers: running, none, dead, or the exit code to act on
  local look='cd ~/job 2> /dev/null && [ -f pid ] || { echo code=none; exit; }
    [ -f code ] && echo "code=$(cat code)" && exit
    kill -0 "$(cat pid)" 2> /dev/null && echo code=running || echo code=dead'
  [[ $DRY_RUN != 1 ]] || { everywhere "$look"; return; }
  local found
  found=$(everywhere "$look" | sed -n 's/.*code=//p') || { echo unreachable; return; }
  if grep -qx 2 <<< "$found"; then echo 2
  elif grep -qx running <<< "$found"; then echo running
  elif grep -qvx 0 <<< "$found"; then grep -vx 0 <<< "$found" | sort -n | tail -n 1
  else echo 0; fi
}

crashed() { # counts; the last of so many in a row ends it
  [[ $((++crashes)) -lt $CRASHES ]] || { say "$1, $crashes times: see above, and pod.sh logs"; exit 1; }
}

watch() {
  if [[ $DRY_RUN == 1 ]]; then
    create && install && push && run "$@" && status
    return
  fi
  local first=1 found
  crashes=0
  while true; do
    case $(state) in
      READY) found=$(status) ;;
      UNKNOWN) found=unreachable ;;
      *)
        say "$NAME: asks for a slice"
        "$0" delete 2> /dev/null || true # what is left of the last one
        if "$0" create; then found=none; else
          [[ $? == 75 ]] || crashed 'no slice can be asked for' # 75: there was none this time
          sleep "$POLL"
          continue
        fi ;;
    esac
    [[ $first == 0 || $found == running || $found == unreachable ]] || found=none # of an earlier call
    case $found in
      0) say "done: gs://$BUCKET/$NAME; \`pod.sh delete\` gives the slice back"; return ;;
      2) say 'something is to be put right first:'; tpu ssh --worker=0 --command='tail -n 5 ~/job/log'; exit 2 ;;
      running | unreachable) first=0; sleep "$POLL"; continue ;;
      75) crashes=0 ;;
      none) ;;
      *) crashed "the run ended with $found" ;;
    esac
    say "$NAME: starts (it ended with: $found)"
    if "$0" install && "$0" push && "$0" run "$@"; then first=0; else
      crashed 'the run cannot be started'
      sleep "$POLL"
    fi
  done
}

verb=${1:-}
case $verb in
  create | install | push | run | logs | status | watch | delete) shift ;;
  *) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
for needed in PROJECT ZONE NAME TYPE; do [[ -n ${!needed:-} ]] || die "set $needed"; done
[[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || die "NAME $NAME: small letters, digits and dashes"
case $verb in install | watch) [[ -n $BUCKET ]] || die 'set BUCKET, where the run folder is kept' ;; esac
case $verb in push | watch) [[ -f $CONFIG ]] || die "CONFIG '$CONFIG': no such file" ;; esac
place=(--project="$PROJECT" --zone="$ZONE" --quiet)
"$verb" "$@"
