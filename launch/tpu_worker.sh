#!/usr/bin/env bash
# The worker's part of launch/tpu_vm.sh, which copies the repository to a TPU VM and calls this script over ssh. Internal.
#
#   tpu_worker.sh install DATE               make a virtual environment in this checkout, with dependencies as of DATE
#   tpu_worker.sh mount BUCKET FOLDER        mount gs://BUCKET at FOLDER with gcsfuse
#   tpu_worker.sh run ATTEMPT HOSTS FOLDER COMMAND...   start COMMAND, or adopt it if it runs or if ATTEMPT has started it before;
#                                            show its log, end with its status; FOLDER must outlive this VM
#   ~/dit_jax_run/worker.sh mark             (a link to this script) record that the user is stopping the command
#   ~/dit_jax_run/worker.sh stop             send SIGTERM to COMMAND once; wait until it has saved and ended
#
# Its state is in ~/dit_jax_run and is lost with the VM: attempt, command, pid, supervisor, status, log, and `stopped`.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=$HOME/dit_jax_run
STOPPED=75         # dit_jax.main has saved and should be started again
STOPPED_BY_HAND=76 # it has saved and should not be started again, because of `stop`

die() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

install() {
    local marker=$checkout/.venv/installed uv=$HOME/.local/bin/uv
    [[ -e $marker ]] && return
    # The VM images have Python 3.10; uv brings its own 3.12.
    [[ -x $uv ]] || python3 -m pip install --quiet --user uv
    "$uv" venv --quiet --clear --python 3.12 "$checkout/.venv"
    # Versions as of the commit's date, so that a worker installed after a preemption gets the same ones.
    "$uv" pip install --quiet --python "$checkout/.venv/bin/python" --exclude-newer "$1" -e "${checkout}[tpu]"
    touch "$marker"
}

mount_bucket() {
    local bucket=$1 folder=$2
    mountpoint -q "$folder" && return
    if ! command -v gcsfuse >/dev/null; then
        echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
        sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse >/dev/null
    fi
    sudo mkdir -p "$folder"
    sudo chown "$(id -u):$(id -g)" "$folder"
    gcsfuse --implicit-dirs "$bucket" "$folder"
}

# Refuses a folder on the VM's own disk: it would be lost with a preemption, and other workers would not see it.
check_folder() {
    local hosts=$1 folder=$2 parent=$2 filesystem target remedy="choose a folder under --mount or on a shared disk"
    while [[ ! -e $parent ]]; do parent=$(dirname "$parent"); done
    filesystem=$(findmnt --noheadings --output FSTYPE --target "$parent")
    target=$(findmnt --noheadings --output TARGET --target "$parent")
    case $filesystem in
        fuse* | nfs* | lustre | ceph | gpfs | beegfs) ;;
        tmpfs | ramfs | overlay) die "$folder is on $filesystem, which is lost with this VM; $remedy" 2 ;;
        *)
            [[ $target != / ]] || die "$folder is on the boot disk, which is lost with this VM; $remedy" 2
            ((hosts == 1)) || die "$folder is on $filesystem, the disk of one of $hosts hosts; $remedy" 2
            ;;
    esac
}

alive() {
    [[ -e $run/pid ]] && kill -0 "$(<"$run/pid")" 2>/dev/null
}

# The parent of COMMAND, in its own session, so that a lost ssh connection ends neither. A shutdown sends SIGTERM to both. The
# parent does not forward it, because a second SIGTERM would end the run before it has saved.
supervise() {
    local child status=0
    trap : TERM HUP INT
    cd "$checkout"
    PATH=$checkout/.venv/bin:$PATH "$@" &
    child=$!
    echo $$ >"$run/supervisor"
    echo "$child" >"$run/pid"
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal had interrupted wait
        status=0
        wait "$child" || status=$?
    done
    echo "$status" >"$run/status.partial"
    mv "$run/status.partial" "$run/status"
}

start() {
    local attempt=$1 command
    shift
    command=$(printf '%q ' "$@")
    exec 9>"$run/lock"
    flock 9
    if alive; then
        [[ $command == "$(<"$run/command")" ]] || die "another command runs here: $(<"$run/command"); use --stop first" 2
    elif [[ ! -e $run/attempt || $(<"$run/attempt") != "$attempt" ]]; then
        rm -f "$run"/{status,stopped,pid,supervisor}
        ln -sfn "$checkout/launch/tpu_worker.sh" "$run/worker.sh"
        echo "$command" >"$run/command"
        setsid bash "${BASH_SOURCE[0]}" supervise "$@" >"$run/log" 2>&1 </dev/null 9>&- &
        until [[ -e $run/pid ]]; do sleep 0.1; done
    fi
    echo "$attempt" >"$run/attempt"
    exec 9>&-
}

# Prints the log from its first line until the command has ended, each line prefixed with the number of this worker.
follow() {
    local worker
    worker=$(curl -fs --max-time 5 -H 'Metadata-Flavor: Google' \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) || worker=0
    tail --lines=+1 --follow --pid="$(<"$run/supervisor")" --sleep-interval=0.5 "$run/log" | sed -u "s/^/$worker|/"
}

run_command() {
    local attempt=$1 hosts=$2 folder=$3 status
    shift 3
    check_folder "$hosts" "$folder"
    mkdir -p "$run"
    start "$attempt" "$@"
    follow
    [[ -e $run/status ]] || die "the supervisor of the run was killed; its log is $run/log" 137
    status=$(<"$run/status")
    if [[ $status == "$STOPPED" && -e $run/stopped ]]; then status=$STOPPED_BY_HAND; fi
    exit "$status"
}

mark() {
    alive || die "no command runs here; nothing to stop"
    touch "$run/stopped"
}

# On one worker only: JAX forwards the request to the others, and a second signal would end a worker immediately.
stop() {
    kill -TERM "$(<"$run/pid")"
    until [[ -e $run/status ]]; do sleep 0.5; done
}

verb=$1
shift
case $verb in
    install) install "$@" ;;
    mount) mount_bucket "$@" ;;
    run) run_command "$@" ;;
    supervise) supervise "$@" ;;
    mark) mark ;;
    stop) stop ;;
    *) die "unknown verb $verb" 2 ;;
esac
